"""What only the laptop demonstration needs, whose model has a million weights: settings, an expert without a model,
edits of constants to copy, a tokenizer of its own, and figures of what it replies."""
import json, math, random, re
from collections import Counter
from pathlib import Path

import tokenizers
import torch
import torch.nn as nn

import tasks
from env import MAX_LINES, parse, printed_metric, short_prompt, shown_lines
from model import Qwen2
from sample import Tokenizer, byte_alphabet
from support.cli import format_table
from support.conversations import read_conversations
from support.files import TEXT, parse_json, shorten

SHORT_ACTIONS = ("Replace In Script", "Undo Edit Script", "Execute Script", "Final Answer")
SCRIPTED_ACTIONS = {"short": SHORT_ACTIONS, "full": ("Inspect Script Lines", *SHORT_ACTIONS)}   # of the scripted expert
SHORT_FIELDS = ("Action", "Action Input")      # a model of a million weights gets every word more wrong
NUM_IDEAS = 24          # of a task
AGENT_STEPS = 5         # replies of a trajectory of the trained model
VOCABULARY = 1024       # ids of its tokenizer
TINY = {                # settings of the whole demonstration
    "model": "tiny",
    "prompt_format": "short", "actions": SHORT_ACTIONS, "fields": SHORT_FIELDS, "context": 640, "max_new_tokens": 96,
    "num": 5, "steps": 8, "copies": 56, "max_row_tokens": 1024, "batch": 8, "epochs": 1.0, "lr": 1.5e-3, "beta2": 0.95,
    "warmup": 20, "save_every": 500}


# ---------------------------------------------------------------------------------------------------------------------
# The scripted expert

def fitting(idea, script):
    """Returns the edits of an idea that change the script; [] where the text of one does not occur once, or where the
    idea is told in words alone."""
    try:
        tasks.apply(script, idea)
    except (ValueError, KeyError):
        return []
    return [edit for edit in idea["edits"] if edit["find"] != edit["replace"]]


def constants(script):
    """Returns ideas made of the named numbers of a script, lines "NAME = 5", multiplied and divided."""
    ideas = []
    line = r"^([A-Z][A-Z0-9_]*) = (\d{1,15}(?:\.\d{0,15})?(?:e-?\d{1,2})?)(?=\s)"
    for name, text in re.findall(line, script, re.MULTILINE):
        find = f"{name} = {text}"
        if name == "SEED" or script.count(find) != 1:
            continue
        number = float(text)
        is_whole = text.isdigit()
        factors = (2, 0.5) if is_whole else (2, 0.5, 3, 0.1)        # three times as many of something takes too long
        values = [number * factor for factor in factors]
        if number == 0:
            values = [1, 2, 5] if is_whole else [0.1, 0.01, 0.5]
        if is_whole:
            values = [max(1, round(value)) for value in values]
        for value in dict.fromkeys(values):
            digits = str(value) if is_whole else f"{value:.3g}"
            if float(digits) == number or 0 < number < 1 <= value:      # a share must stay one
                continue
            ideas.append({"title": f"{name} {digits}", "instruction": f"Set {name} to {digits} instead of {text}.",
                          "edits": [{"find": find, "replace": f"{name} = {digits}"}]})
    return ideas


def short_ideas(task):
    """Returns ideas for short prompts: of constants, and those of one edit whose text the prompt shows."""
    script = task.starter
    shown = shown_lines(script)
    shipped = [idea for idea in tasks.ideas(task.id) if len(idea["edits"]) == 1 and idea["edits"][0]["find"] in shown]
    return constants(script) + shipped


def scripted(cfg, task, ideas, rng):
    """Yields the replies of the scripted expert; send() it the record of each step, a dict.

    It runs the script and tries the ideas one after another. An edit stays if the script then prints a better score
    than ever before; else it is taken back. With full prompts it reads the script first, and begins no idea that
    might not end within cfg.steps. Short prompts show the script; there it explores: sometimes it does not run the
    starter, or goes on to another idea before it runs the last, because rl.py learns only from what is tried.
    """
    explores = cfg.prompt_format == "short"
    script = task.starter
    best_script = script
    best = None
    num_edits = 0       # of `script` since best_script
    results = []
    step = {"index": -1, "observation": "Nothing has been done."}

    def reply(thought, action, **args):
        lines = [line for line in step["observation"].splitlines() if not line.startswith("[")]     # [5 steps left]
        texts = {"Reflection": f"The last observation says: {shorten(' '.join(lines), 200)}",
                 "Research Plan and Status": f"Run the script, try ideas. Results: {'; '.join(results) or 'none'}.",
                 "Fact Check": f"The best {task.metric} that a run has printed is {best}.",
                 "Thought": thought, "Action": action, "Action Input": json.dumps(args, ensure_ascii=False)}
        return "\n".join(f"{name}: {texts[name]}" for name in cfg.fields)

    # 1. The score to beat, and the script.
    if not explores or rng.random() < 0.5:
        step = yield reply("run it", "Execute Script", script_name=task.entry)
        best = printed_metric(step["observation"], task.metric)
    if not explores:
        for first in range(1, script.count("\n") + 2, MAX_LINES):
            step = yield reply("read it", "Inspect Script Lines", script_name=task.entry, start_line_number=str(first),
                               end_line_number=str(first + MAX_LINES - 1))

    # 2. Idea by idea: edits, a run, and back where that is no better.
    for idea in ideas:
        edits = fitting(idea, script)
        needed = 2 * len(edits) + 2
        if not explores and step["index"] + 1 + needed > cfg.steps:
            continue
        for edit in edits:
            find = edit["find"]
            replace = edit["replace"]
            step = yield reply(idea["title"], "Replace In Script", script_name=task.entry, find=find, replace=replace)
            script = script.replace(find, replace)
        num_edits += len(edits)
        if not edits or (explores and rng.random() < 0.5):
            continue
        step = yield reply("run it", "Execute Script", script_name=task.entry)
        score = printed_metric(step["observation"], task.metric) if step["outcome"] == "ok" else None
        if score is not None and (best is None or task.better(score, best)):
            best = score
            best_script = script
            results.append(f"{idea['title']}: {task.metric} {score}, kept")
        else:
            results.append(f"{idea['title']}: {'failed' if score is None else f'{task.metric} {score}'}, taken back")
            for _ in range(num_edits):
                step = yield reply("take it back", "Undo Edit Script", script_name=task.entry)
            script = best_script
        num_edits = 0
    yield reply("end", "Final Answer", final_answer=f"{task.metric} {best}")


def scripted_policy(cfg, task, ideas, rng):
    """Returns a policy for play_trajectory: the scripted expert, which the recorded steps bring to where it was."""
    replies = scripted(cfg, task, ideas, rng)
    next_reply = next(replies)
    num_seen = 1        # lines of the trajectory, the header among them

    def reply(env, lines, seed):
        nonlocal next_reply, num_seen
        for line in lines[num_seen:]:
            if line["reply"] != next_reply:
                raise ValueError(f"a trajectory of {task.id} was collected by another version of the scripted expert; "
                                 "give another --trajectories")
            next_reply = replies.send(line)
        num_seen = len(lines)
        return next_reply, None, {}
    return reply


# ---------------------------------------------------------------------------------------------------------------------
# The model and its training conversations

def make_tokenizer(cfg):
    """Trains a tokenizer on the collected conversations and saves it to cfg.out, once. The text that replies of one
    action share is one token, so that a reply takes few decisions. So is " = ": a number then stands right after its
    name, where copying looks."""
    if Path(cfg.out, "tokenizer.json").exists():
        return
    conversations, _ = read_conversations(cfg.trajectories, cfg.data, log=lambda line: None)
    replies = [conversation.messages[i]["content"]
               for conversation in conversations for i in conversation.assistant_turns]
    # The values of the two arguments that differ are cut out of the JSON.
    values = r'(?<="find": ").*?(?=", "replace": ")|(?<=", "replace": ").*?(?="}$)'
    counts = Counter(piece for reply in replies for piece in re.split(values, reply))
    phrases = [piece for piece, count in counts.items() if len(piece) > 3 and count * 50 > len(replies)]
    texts = (message["content"] for conversation in conversations for message in conversation.messages)
    train_tokenizer(texts, VOCABULARY, [*phrases, " = "]).save(cfg.out)


CONSTANT = re.compile(r"([A-Z][A-Z0-9_]*) = (\d[\d.e-]*)")      # a line of a script that gives a constant
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZEAIOTRSNL"
NUM_DRILLS = 8          # edits of other constants that follow in a redrawn copy


def copy_examples(cfg, tokenizer, conversations):
    """Returns the examples of cfg.copies copies of each conversation, which must be a short prompt and its reply; of a
    quarter as many if the reply is no edit. 7 of 10 copies have other constants."""
    copies = []
    for conversation in conversations:
        messages = conversation.messages
        if len(messages) != 2 or not messages[0]["content"].startswith("Task: "):
            raise ValueError("--copies are made of short prompts alone; collect with --prompt-format short")
        rng = random.Random(f"{cfg.seed} {conversation.source}")
        num = cfg.copies if '"find": ' in messages[1]["content"] else math.ceil(cfg.copies / 4)
        for _ in range(num):
            copies.append(augment_constants(messages, rng) if rng.random() < 0.7 else messages)
    examples = []
    for i, messages in enumerate(copies):
        ids, loss_mask = tokenizer.conversation(messages)
        if i % 10 == 0:     # the prompt too: a few names stand in it twice, which is more to learn copying from
            loss_mask = [True] * len(ids)
        examples.append((ids[:cfg.max_row_tokens + 1], loss_mask[:cfg.max_row_tokens + 1]))
    return [example for example in examples if any(example[1])]


def augment_constants(messages, rng):
    """Returns a short prompt and its reply with other names, numbers and order of the script's constants, and often
    with few lines of the script. The text of an edit still occurs once in the script. Edits of other constants follow,
    as replies too: the long prompt is then read once for up to nine texts to copy."""
    # 1. The parts of the prompt and of the reply.
    prompt, reply = (message["content"] for message in messages)
    has_new_numbers = rng.random() < 0.7
    *head, shown = prompt.split("\n", 3)      # three lines before the script
    lines = shown.split("\n")
    before, key, text = reply.rpartition("Action Input: ")
    try:
        args = parse_json(text, {str: TEXT}, "Action Input")
    except ValueError:      # a reply in another form, which may be right all the same
        return messages

    # 2. The constants change places, and get other numbers and names.
    places = [i for i, line in enumerate(lines) if CONSTANT.fullmatch(line)]
    for i, line in zip(places, rng.sample([lines[i] for i in places], len(places))):
        lines[i] = line
    pairs = [CONSTANT.fullmatch(lines[i]).groups() for i in places]
    numbers = {}
    if has_new_numbers:
        numbers = {f"{name} = {digits}": f"{name} = {redraw_digits(digits, rng)}" for name, digits in pairs}
    names = {name: draw_name(rng) for name, _ in pairs if rng.random() < 0.8}
    args |= {name: replace_all(args[name], numbers, names) for name in ("find", "replace") if name in args}
    script = replace_all("\n".join(lines), numbers, names)

    # 3. Most lines are often left out, but not those of the edit.
    find = args.get("find", "")
    start = script.find(find)
    if start >= 0 and rng.random() < 0.5:
        lines = script.split("\n")
        first = script[:start].count("\n")
        last = first + find.count("\n")
        script = "\n".join(lines[rng.randint(0, first):rng.randint(last, min(last + 3, len(lines))) + 1])
    if find and (script.count(find) != 1 or args.get("replace") == find):       # names that happen to be alike
        return messages

    # 4. Edits of other constants.
    replies = [args]
    if find:
        ideas = constants(script + "\n")
        edits = {edit["find"]: edit for idea in rng.sample(ideas, len(ideas)) for edit in idea["edits"]}
        edits.pop(find, None)
        replies += [args | edit for edit in list(edits.values())[:NUM_DRILLS]]
    texts = [before + key + json.dumps(values, ensure_ascii=False) for values in replies]
    return [{**messages[0], "content": "\n".join([*head, script])},
            *({"role": "assistant", "content": text} for text in texts)]


def redraw_digits(text, rng):
    """Returns a number of the same form: 0.25 may become 0.73, never 00.1."""
    if re.fullmatch(r"0\.0*", text):
        return text
    digits = re.sub(r"\d", lambda _: rng.choice("123456789"), text)
    return "0" + digits[1:] if text.startswith("0.") else digits


def draw_name(rng):
    """Returns a name of one to three words of random letters."""
    words = ["".join(rng.choices(LETTERS, k=rng.choice((1, 2, 3, 4, 5, 6, 8)))) for _ in range(rng.randint(1, 3))]
    return "_".join(words)


def replace_all(text, numbers, names):
    for before, after in numbers.items():
        text = re.sub(rf"\b{re.escape(before)}(?![\d.e])", after, text)
    return re.sub(r"\b[A-Z][A-Z0-9_]*\b", lambda match: names.get(match[0], match[0]), text)


# ---------------------------------------------------------------------------------------------------------------------
# What the trained model replies

NUM_STATES = 64     # of held-in and of held-out tasks


def perturbed_states(split, rng):
    """Returns states that nobody was in, [(script, prompt)]: starters of a split's tasks with two numbers changed,
    just run. The model is shown held-out scripts here; nothing is learned of them."""
    states = []
    ids = tasks.names(split)
    for i in range(NUM_STATES):
        task = tasks.load(ids[i % len(ids)])
        script = task.starter
        for _ in range(2):
            ideas = [idea for idea in constants(script) if idea["edits"][0]["find"] in shown_lines(script)]
            if ideas:
                script = tasks.apply(script, rng.choice(ideas))
        ran = [{"role": "assistant", "content": "Action: Execute Script"},
               {"role": "user", "content": f"{task.entry} ran to the end in 1 s.\n{task.metric}: {rng.random():.4f}"}]
        states.append((script, short_prompt(task, [{}, {}, *ran], script)))
    return states


def show_replies(cfg, engine):
    """Returns a text about sampled replies in unseen states: the shares that can be read and that edit, of the edits
    the share whose text occurs once in the script, how many of these differ, and one state with its reply."""
    rows = [("tasks", "can be read", "edits", "of them with text that occurs once", "different ones")]
    for split in ("held-in", "held-out"):
        states = perturbed_states(split, random.Random(cfg.seed))
        replies = engine.generate([prompt for _, prompt in states], max_new_tokens=cfg.max_new_tokens, seed=cfg.seed)
        num_parsed = 0
        edits = []
        for (reply,), (script, _) in zip(replies, states):
            _, action, args, error = parse(reply.text, cfg.fields, cfg.actions)
            num_parsed += not error
            if not error and action == "Replace In Script":
                edits.append((script, args["find"], args["replace"]))
        valid = [(script, find, put) for script, find, put in edits if find != put and script.count(find) == 1]
        shares = (num_parsed / NUM_STATES, len(edits) / NUM_STATES, len(valid) / max(1, len(edits)))
        rows.append((split, *(f"{share:.0%}" for share in shares), str(len(set(valid)))))
    return (f"Its replies in states it has not seen, {NUM_STATES} of each kind:\n{format_table(rows)}\n\n"
            f"One state:\n{states[0][1][-1]['content']}\n\nIts reply:\n{replies[0][0].text}")


# ---------------------------------------------------------------------------------------------------------------------
# The first weights and the tokenizer

@torch.no_grad()
def draw_model(config, seed):
    """Returns a model that copies: its blocks 0 and 1 hold an induction circuit (arXiv 2209.11895) before any training.

    Head 0 of block 0 looks one token back and head 1 two tokens. Each writes the embedding of the token it finds, seen
    in D directions V, into D other directions: U[0] and U[1]. In block 1 both heads ask for the places that come after
    the same two tokens, and write what stands there in the directions W: what followed the last time is what comes
    next. Learned from random weights this takes millions of tokens; so drawn, the model gets 80 % of a repeated random
    text right before the first step. All other weights are drawn small. It takes 2 blocks, a
    width of 4 D, and 2 query heads for each key head.
    """
    model = Qwen2.from_scratch(config, seed)
    C, D = config.hidden_size, config.head_dim
    group = config.num_attention_heads // config.num_key_value_heads

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
    return model


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
