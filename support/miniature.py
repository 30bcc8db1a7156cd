"""All that exists only because the laptop's model has a million weights."""
import json, random, re

import tokenizers
import torch
import torch.nn as nn

import tasks
from env import parse, printed_metric, short_prompt, shown_lines
from sample import Tokenizer, byte_alphabet


def fitting(idea, script):
    """The idea's edits for this script as [(find, replace)], [] where one would not find its text once. An import that
    gives way to another is kept beside it until the end, so that the script runs between the edits where it can."""
    for keep_imports in (True, False):
        text, edits = script, []
        for number, edit in enumerate(idea["edits"], 1):
            find, put = edit["find"], edit["replace"]
            imports = all(line.startswith(("import ", "from ")) for line in find.splitlines())
            if keep_imports and imports and find.endswith("\n") and find not in put and number < len(idea["edits"]):
                put = find + put
            if text.count(find) != 1:
                break
            if find != put:
                edits.append((find, put))
            text = text.replace(find, put)
        else:
            return edits
    return []

SHORT_ACTIONS = ("Replace In Script", "Undo Edit Script", "Execute Script", "Final Answer")
SHORT_FIELDS = ("Action", "Action Input")      # each word more is one more that a model of a million weights gets wrong


def constants(script):
    """Ideas made of a script's named numbers, "NAME = 5" at the start of a line: each multiplied and divided."""
    found = []
    for name, text in re.findall(r"^([A-Z][A-Z0-9_]*) = (\d[\d.e-]*)(?=\s)", script, re.MULTILINE):
        if not re.fullmatch(r"\d{1,15}(\.\d{0,15})?(e-?\d{1,2})?", text):    # 5-3, or a number beyond all bounds
            continue
        old, whole = float(text), text.isdigit()
        factors = (2, 0.5) if whole else (2, 0.5, 3, 0.1)       # three times as many of something takes too long
        values = [old * factor for factor in factors] if old else [1, 2, 5] if whole else [0.1, 0.01, 0.5]
        for value in dict.fromkeys(max(1, round(value)) if whole else value for value in values):
            new, find = f"{value:.3g}" if not whole else str(value), f"{name} = {text}"
            if name != "SEED" and float(new) != old and script.count(find) == 1 and not 0 < old < 1 <= value:
                found.append({"title": f"{name} {new}", "instruction": f"Set {name} to {new} instead of {text}.",
                              "edits": [{"find": find, "replace": f"{name} = {new}"}]})
    return found


def scripted_short(task, fields, steps, ideas, rng):
    """As scripted, for short prompts: they show the script, so it is not read, and a thought is the idea's title. Now
    and then it does not run the starter, or goes on to another idea before it runs the last: what always follows is not
    explored, and rl.py learns only from what is tried."""
    script, best, new = (task.folder / task.entry).read_text(), None, 0
    kept = script       # what the last good run had; since then there were `new` edits

    def reply(thought, action, **args):
        values = {"Thought": thought, "Action": action, "Action Input": json.dumps(args, ensure_ascii=False)}
        return "\n".join(f"{name}: {values[name]}" for name in fields if name in values)

    def run():
        return reply("run it", "Execute Script", script_name=task.entry)

    if rng.random() < 0.5:
        step = yield run()
        best = printed_metric(step["observation"], task.metric)
    for idea in ideas:
        edits = fitting(idea, script)
        for find, put in edits:
            step = yield reply(idea["title"], "Replace In Script", script_name=task.entry, find=find, replace=put)
            script = script.replace(find, put)
        new += len(edits)
        if not edits or rng.random() < 0.5:
            continue
        step = yield run()
        score = printed_metric(step["observation"], task.metric) if step["outcome"] == "ok" else None
        if score is not None and (best is None or task.better(score, best)):
            best, kept = score, script
        else:
            for _ in range(new):
                step = yield reply("take it back", "Undo Edit Script", script_name=task.entry)
            script = kept
        new = 0
    yield reply("end", "Final Answer", final_answer=f"{task.metric} {best}")

DRILLS = 8              # more edits of the same script that a redrawn copy has, where it has so many constants
NUMBER = re.compile(r"([A-Z][A-Z0-9_]*) = (\d[\d.e-]*)")      # a line of a script that gives a constant


def augment_constants(messages, rng):
    """A short prompt and its reply in which the constants of the script have other names, other numbers and another
    order, in both alike, and often most lines of the script are gone. The edit, if it is one, still fits the script:
    its text occurs in it once. Edits of the script's other constants follow it, as replies too: the long prompt is read
    once for up to nine texts to copy."""
    (prompt, reply), number = (one["content"] for one in messages), rng.random() < 0.7
    head, lines = prompt.split("\n")[:3], prompt.split("\n")[3:]
    before, key, args = reply.rpartition("Action Input: ")
    try:
        args = json.loads(args)
    except ValueError:      # parse() takes more forms than this one
        return messages
    places = [i for i, line in enumerate(lines) if NUMBER.fullmatch(line)]
    for i, line in zip(places, rng.sample([lines[i] for i in places], len(places))):
        lines[i] = line

    def word(_):
        return "".join(rng.choices("ABCDEFGHIJKLMNOPQRSTUVWXYZEAIOTRSNL", k=rng.choice((1, 2, 3, 4, 5, 6, 8))))

    def other(digits):      # the same form: 0.25 may become 0.73, never 00.1
        new = re.sub(r"\d", lambda _: rng.choice("123456789"), digits)
        return digits if re.fullmatch(r"0\.0*", digits) else "0" + new[1:] if digits.startswith("0.") else new

    changed = {}
    for i in places:
        name, digits = NUMBER.fullmatch(lines[i]).groups()
        changed[f"{name} = {digits}"] = f"{name} = {other(digits) if number else digits}"
    names = {name: "_".join(map(word, range(rng.randint(1, 3)))) for i in places if rng.random() < 0.8
             for name in [NUMBER.fullmatch(lines[i])[1]]}

    def put(text):
        for old, new in changed.items():
            text = re.sub(rf"\b{re.escape(old)}(?![\d.e])", new, text)
        return re.sub(r"\b[A-Z][A-Z0-9_]*\b", lambda found: names.get(found[0], found[0]), text)

    find, lines = put(args.get("find", "")), put("\n".join(lines)).split("\n")
    at = "\n".join(lines).find(find)
    if at >= 0 and rng.random() < 0.5:
        first = "\n".join(lines)[:at].count("\n")
        last = first + find.count("\n")
        lines = lines[rng.randint(0, first):rng.randint(last, min(last + 3, len(lines))) + 1]
    args |= {name: put(args[name]) for name in ("find", "replace") if name in args}
    if find and ("\n".join(lines).count(find) != 1 or args["replace"] == find):    # names that happen to be alike
        return messages
    replies = [args]
    if find:
        others = constants("\n".join(lines) + "\n")
        edits = {edit["find"]: edit for idea in rng.sample(others, len(others)) for edit in idea["edits"]}
        edits.pop(find, None)
        replies += [args | edit for edit in list(edits.values())[:DRILLS]]
    return [{**messages[0], "content": "\n".join(head + lines)},
            *({"role": "assistant", "content": before + key + json.dumps(each, ensure_ascii=False)} for each in replies)]


def augmented_copies(one, num, seed):
    """num copies of the messages of a short prompt and its reply, 7 of 10 of them redrawn; a quarter if no edit."""
    rng = random.Random(f"{seed} {one.source}")
    num = num if '"find": ' in one.messages[-1]["content"] else -(-num // 4)
    return [augment_constants(one.messages, rng) if rng.random() < 0.7 else one.messages for _ in range(num)]

VOCABULARY = 1024       # ids of the tokenizer that is trained for a model from scratch

AGENT_STEPS = 5         # replies of a trajectory of the small model, in evaluation
TINY = {"prompt": "short", "actions": SHORT_ACTIONS, "fields": SHORT_FIELDS, "context": 640,
        "keep": 24, "num": 5, "max_new_tokens": 96, "epochs": 1.0, "batch": 8, "copies": 56, "length": 1024,
        "lr": 1.5e-3, "warmup": 20, "beta2": 0.95, "validate_every": 500, "save_every": 500, "recompute": False}
TINY_STEPS = 8          # replies of a collected trajectory


def perturbed_states(split, num, rng):
    """num states that nobody was in, [(script, prompt)]: the starters of a split's tasks with two numbers changed, just
    run. Of held-out tasks the scripts are shown to the model here; nothing is learned of them."""
    found, ids = [], tasks.names(split)
    while len(found) < num:
        task = tasks.load(ids[len(found) % len(ids)])
        script = (task.folder / task.entry).read_text()
        for _ in range(2):
            ideas = [idea for idea in constants(script) if idea["edits"][0]["find"] in shown_lines(script)]
            if ideas:
                edit, = rng.choice(ideas)["edits"]
                script = script.replace(edit["find"], edit["replace"])
        seen = [{"role": "assistant", "content": "Action: Execute Script"},
                {"role": "user", "content": f"{task.entry} ran to the end in 1 s.\n{task.metric}: {rng.random():.4f}"}]
        found.append((script, short_prompt(task, [{}, {}, *seen], script)))
    return found


def reply_stats(s, engine, split, num=64):
    """(figures, a prompt, its reply) of num sampled replies in unseen states: the shares that can be read, that edit,
    and of the edits those whose text occurs once in the script; and how many of these differ."""
    states = perturbed_states(split, num, random.Random(s.seed))
    replies = engine.generate([prompt for _, prompt in states], max_new_tokens=s.max_new_tokens, seed=s.seed)
    read = [parse(reply.text, s.fields, s.actions) for reply, in replies]
    edits = [(args, script) for (_, action, args, error), (script, _) in zip(read, states)
             if not error and action == "Replace In Script"]
    fit = [json.dumps(args) + script for args, script in edits
           if args["find"] and script.count(args["find"]) == 1 and args["replace"] != args["find"]]
    return {"parsed": sum(not error for *_, error in read) / num, "edits": len(edits) / num,
            "valid": len(fit) / max(1, len(edits)), "distinct": len(set(fit))}, states[0][1], replies[0][0].text


@torch.no_grad()
def draw_copying(model, seed):
    """Draws weights that copy: blocks 0 and 1 hold an induction circuit (arXiv 2209.11895) before any training.

    Head 0 of block 0 looks one token back and head 1 two tokens. Each writes the embedding of the token it finds, seen
    in D directions V, into D other directions: U[0] and U[1]. In block 1 both heads ask for the places that come after
    the same two tokens, and write what stands there in the directions W: what followed the last time is what comes
    next. Learned from random weights this takes millions of tokens; so drawn, the model gets 80 % of a repeated random
    text right before the first step. All other weights are drawn small. Raises ValueError for a shape without room.
    """
    config = model.config
    C, D = config.hidden_size, config.head_dim
    group = config.num_attention_heads // config.num_key_value_heads
    if C < 4 * D or config.num_hidden_layers < 2 or D < 16 or group != 2:
        raise ValueError("copying needs 2 blocks, 4 heads of width 16 or more, and 2 query heads for each key head, "
                         f"found {config}")

    # 1. Everything else is small.
    generator = torch.Generator().manual_seed(seed)
    for name, p in model.named_parameters():
        if p.ndim == 2:
            std = C ** -0.5
            if "embed" in name:
                std = 0.1
            elif "o_proj" in name or "down" in name:
                std = 0.005
            nn.init.normal_(p, std=std, generator=generator)

    # 2. Four sets of D orthogonal directions, each (C, D), and a rotation of one of them.
    basis = torch.linalg.qr(torch.randn(C, C, generator=generator))[0]
    turn = torch.linalg.qr(torch.randn(D, D, generator=generator))[0]
    V, W, *U = basis[:, :4 * D].split(D, dim=1)

    # 3. Block 0 looks back. With a on the fastest rotary pairs, R(i) a . R(j) R(1) a is largest at j = i - 1: biases of
    # queries and keys alone tell how far back a head looks.
    look_back = model.model.layers[0].self_attn
    speed = config.rope_theta ** (torch.arange(0, 6, 2) / -D)                   # of the three fastest pairs
    fast_rows = torch.cat([torch.arange(3), torch.arange(3) + D // 2])
    look_back.k_proj.weight[:D] *= 0.3
    look_back.k_proj.bias[fast_rows] = 8 * torch.cat([speed.cos(), speed.sin()])
    look_back.v_proj.weight[:D] = V.T
    for head in range(group):
        rows = torch.arange(head * D, (head + 1) * D)
        angle = head * speed
        look_back.q_proj.weight[rows] *= 0.3
        look_back.q_proj.bias[rows[fast_rows]] = 8 * torch.cat([angle.cos(), -angle.sin()])
        look_back.o_proj.weight[:, rows] = 0.2 * U[head]

    # 4. Block 1 copies: what is here and before it is looked for in U[0] and, turned, U[1], through the slow rotary
    # pairs alone, which hardly tell one place from another.
    copy = model.model.layers[1].self_attn
    slow = (torch.arange(D) % (D // 2) >= 5).float()[:, None]
    copy.k_proj.weight[:D] = slow * (3 * U[0].T + turn @ U[1].T)
    copy.v_proj.weight[:D] = W.T
    for head in range(group):
        rows = torch.arange(head * D, (head + 1) * D)
        copy.q_proj.weight[rows] = slow * (3 * V.T + turn @ U[0].T)
        copy.o_proj.weight[:, rows] = 1.6 * W


# A digit is always a token of its own, and a word is the same tokens after any punctuation.
# Both make it easier for a small model to learn to copy.
WORDS = r" ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"


def train_tokenizer(texts, size, phrases=()):
    """Return a Tokenizer of `size` ids that is learned from the texts. It has no default system message.

    Each of `phrases` gets one more id, wherever it stands: it is what many replies have word for word.
    """
    pre_tokenizers = tokenizers.pre_tokenizers
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(tokenizers.Regex(WORDS), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    bpe.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=[Tokenizer.TEXT_END, Tokenizer.TURN, Tokenizer.END],
        initial_alphabet=byte_alphabet(),
        show_progress=False)
    bpe.train_from_iterator(texts, trainer)
    bpe.add_tokens([tokenizers.AddedToken(phrase, normalized=False) for phrase in phrases])
    return Tokenizer(bpe, system=None)
