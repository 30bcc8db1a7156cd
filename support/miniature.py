"""What only the laptop demonstration needs, whose model has a million weights: settings, an expert and a random loop
without a model, a tokenizer of its own, and figures of what it replies."""
import json, random
from collections import Counter
from pathlib import Path

import tokenizers

import tasks
from env import MAX_LINES, NOTHING, InvalidAction, constants, parse, set_constant, short_prompt
from sample import Tokenizer, byte_alphabet
from support.cli import format_table
from support.conversations import read_conversations
from support.files import shorten

SHORT_ACTIONS = ("Set Constant", "Set Constant Again", "Undo Edit Script", "Execute Script")
SCRIPTED_ACTIONS = {        # of the scripted expert
    "short": SHORT_ACTIONS,
    "full": ("Inspect Script Lines", "Replace In Script", "Undo Edit Script", "Execute Script", "Final Answer")}
SHORT_FIELDS = ("Action", "Action Input")      # a model of a million weights gets every word more wrong
FACTORS = ("*2", "/2", "*5", "/5")      # that a constant is multiplied with
NUMBERS = ("0.1", "0.01")               # that take the place of 0.0, which no factor changes
AGENT_STEPS = 8         # replies of a trajectory of the trained model
VOCABULARY = 512        # ids of its tokenizer
TINY = {                # settings of the whole demonstration
    "model": "tiny",
    "prompt_format": "short", "actions": SHORT_ACTIONS, "fields": SHORT_FIELDS, "context": 320, "max_new_tokens": 64,
    "num": 6, "steps": 8, "max_row_tokens": 512, "batch": 8, "epochs": 10.0, "lr": 1.5e-3, "beta2": 0.95,
    "warmup": 20, "save_every": 500}


# ---------------------------------------------------------------------------------------------------------------------
# The scripted expert, and the random loop

def choices(script):
    """Returns [(number of a constant, value)] of all that is tried: what changes the script, with shares below 1."""
    pairs = []
    for number, (_, text, *_) in enumerate(constants(script), 1):
        for value in NUMBERS if text.strip("0.") == "" and "." in text else FACTORS:
            try:
                after = float(constants(set_constant(script, str(number), value))[number - 1][1])
            except InvalidAction:
                continue
            if not 0 < float(text) < 1 <= after:
                pairs.append((str(number), value))
    return pairs


def reply_of(cfg, step, notes, thought, action, **args):
    """Returns a reply of the expert. step: the record of the last one; notes: on what was tried so far."""
    lines = [line for line in step["observation"].splitlines() if not line.startswith("[")]     # [5 steps left]
    texts = {"Reflection": f"The last observation says: {shorten(' '.join(lines), 200)}",
             "Research Plan and Status": f"Run the script, try ideas. Results: {'; '.join(notes) or 'none'}.",
             "Fact Check": f"The best score that a run has printed is {step['best_printed']}.",
             "Thought": thought, "Action": action, "Action Input": json.dumps(args, ensure_ascii=False)}
    return "\n".join(f"{name}: {texts[name]}" for name in cfg.fields)


START = {"index": -1, "observation": "Nothing has been done.", **NOTHING}     # in place of the record of a last step


def is_better(step, task, best):
    """Returns whether the run of a step has printed a better score than the best before."""
    if step["outcome"] != "ok" or step["printed"] is None:
        return False
    return best is None or task.better(step["printed"], best)


def search_constants(cfg, task, rng, is_expert=True):
    """Yields the replies of a search over the constants of the script; send() it the record of each step, a dict.

    It runs the script, then changes a random constant by a random factor, and takes back what does not print a better
    score than ever before, until the steps are used up. That is the random loop. The expert goes on with a change that
    has helped as long as it helps, and tries nothing again of the same script.
    """
    entry = task.entry
    script = task.starter
    helped = None       # the last change, if it was kept
    failed = []         # changes of this script that were taken back
    notes = []
    step = yield reply_of(cfg, START, notes, "run it", "Execute Script", script_name=entry)
    best = step["printed"] if is_better(step, task, None) else None

    while True:
        # 1. A change.
        pairs = choices(script)
        if not pairs:
            step = yield reply_of(cfg, step, notes, "there is nothing to change", "Execute Script", script_name=entry)
            continue
        pair = rng.choice([pair for pair in pairs if pair not in failed] or pairs)
        if helped in pairs:
            pair = helped
        number, value = pair
        title = f"{constants(script)[int(number) - 1][0]} {value}"
        if pair == helped:
            step = yield reply_of(cfg, step, notes, title, "Set Constant Again")
        else:
            step = yield reply_of(cfg, step, notes, title, "Set Constant", constant=number, value=value)
        if not cfg.show_scores:
            step = yield reply_of(cfg, step, notes, "run it", "Execute Script", script_name=entry)

        # 2. It is kept, or taken back.
        helped = None
        if is_better(step, task, best):
            best = step["printed"]
            script = set_constant(script, number, value)
            notes.append(f"{title}: {best}, kept")
            failed = []
            if is_expert:
                helped = pair
        else:
            notes.append(f"{title}: taken back")
            if is_expert:
                failed.append(pair)
            step = yield reply_of(cfg, step, notes, "take it back", "Undo Edit Script", script_name=entry)


def fitting(idea, script):
    """Returns the edits of an idea that change the script; [] where the text of one does not occur once, or where the
    idea is told in words alone."""
    try:
        tasks.apply(script, idea)
    except (ValueError, KeyError):
        return []
    return [edit for edit in idea["edits"] if edit["find"] != edit["replace"]]


def try_ideas(cfg, task, ideas):
    """Yields the replies of the expert with full prompts, as search_constants does. It runs and reads the script, and
    tries the ideas one after another. One stays if the script then prints a better score than ever before; none is
    begun that might not end within cfg.steps."""
    entry = task.entry
    script = task.starter
    notes = []

    # 1. The score to beat, and the script.
    step = yield reply_of(cfg, START, notes, "run it", "Execute Script", script_name=entry)
    best = step["printed"] if is_better(step, task, None) else None
    for first in range(1, script.count("\n") + 2, MAX_LINES):
        step = yield reply_of(cfg, step, notes, "read it", "Inspect Script Lines", script_name=entry,
                              start_line_number=str(first), end_line_number=str(first + MAX_LINES - 1))

    # 2. Idea by idea: edits, and back where they are no better.
    for idea in ideas:
        edits = fitting(idea, script)
        needed = 2 * len(edits) + 1 + (not cfg.show_scores)
        if not edits or step["index"] + 1 + needed > cfg.steps:
            continue
        for edit in edits:
            step = yield reply_of(cfg, step, notes, idea["title"], "Replace In Script", script_name=entry, **edit)
        if not cfg.show_scores:
            step = yield reply_of(cfg, step, notes, "run it", "Execute Script", script_name=entry)
        if is_better(step, task, best):
            best = step["printed"]
            script = tasks.apply(script, idea)
            notes.append(f"{idea['title']}: {task.metric} {best}, kept")
            continue
        result = f"{task.metric} {step['printed']}" if step["outcome"] == "ok" else "failed"
        notes.append(f"{idea['title']}: {result}, taken back")
        for _ in edits:
            step = yield reply_of(cfg, step, notes, "take it back", "Undo Edit Script", script_name=entry)
    yield reply_of(cfg, step, notes, "end", "Final Answer", final_answer=f"{task.metric} {best}")


def scripted_policy(cfg, task, ideas, rng):
    """Returns a policy for play_trajectory: the scripted expert. ideas: for full prompts."""
    if cfg.prompt_format == "short":
        return policy_of(search_constants(cfg, task, rng), task)
    return policy_of(try_ideas(cfg, task, ideas), task)


def random_policy(cfg, task, rng):
    """Returns a policy for play_trajectory: the random loop."""
    return policy_of(search_constants(cfg, task, rng, is_expert=False), task)


def policy_of(replies, task):
    """Returns the policy of a generator of replies, which the recorded steps bring to where it was."""
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
# The tokenizer

# A digit is always a token of its own, and a word is the same tokens after any punctuation.
WORDS = r" ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"


def make_tokenizer(cfg):
    """Trains a tokenizer on the collected conversations and saves it to cfg.out, once."""
    if not Path(cfg.out, "tokenizer.json").exists():
        conversations, _ = read_conversations(cfg.trajectories, cfg.data, log=lambda line: None)
        texts = (message["content"] for conversation in conversations for message in conversation.messages)
        train_tokenizer(texts, VOCABULARY).save(cfg.out)


def train_tokenizer(texts, size):
    """Returns a Tokenizer of `size` ids that is learned from the texts. It has no default system message."""
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
    return Tokenizer(bpe, system=None)


# ---------------------------------------------------------------------------------------------------------------------
# What the trained model replies

NUM_STATES = 96     # of held-in and of held-out tasks
SHARES = ("valid", "undone if worse", "gone on if better")
LAST = ("a run", "a better score", "a worse score")     # what has just been seen, in turn


def unseen_states(split, rng):
    """Returns states that nobody was in, [(what has just been seen, last change, script, prompt)]: starters of a
    split's tasks with some numbers changed. The model is shown held-out scripts here; nothing is learned of them."""
    states = []
    ids = [id for id in tasks.names(split) if choices(tasks.load(id).starter)]
    for i in range(NUM_STATES):
        task = tasks.load(ids[i % len(ids)])
        last = LAST[i // len(ids) % len(LAST)]
        script = task.starter
        for _ in range(3):
            change = rng.choice(choices(script))
            script = set_constant(script, *change)
        worse, better = sorted((rng.random(), rng.random()), reverse=task.direction == "down")
        news = f"{better:.4f}, after Execute Script"
        if last == "a better score":
            news = f"{better:.4f}, better than {worse:.4f}, after Set Constant {' '.join(change)}"
        elif last == "a worse score":
            news = f"{worse:.4f}, worse than {better:.4f}, after Set Constant {' '.join(change)}"
        seen = NOTHING | {"news": news, "best_printed": round(better, 4)}
        prompt = short_prompt(task, seen, script, last != "a worse score", rng.randint(2, AGENT_STEPS - 1))
        states.append((last, change, script, prompt))
    return states


def is_valid(action, args, script, last, change):
    """Returns whether the environment would carry out an action in such a state."""
    try:
        if action == "Set Constant Again":
            set_constant(script, *change)
        if action == "Set Constant":
            set_constant(script, **args)
        return action not in ("Undo Edit Script", "Set Constant Again") or last != "a run"
    except InvalidAction:
        return False


def judge_replies(cfg, engine, split):
    """Returns ({name of SHARES: share}, [Counter of constants, of values], one state with its reply) of sampled replies
    in unseen states."""
    states = unseen_states(split, random.Random(cfg.seed))
    replies = engine.generate([prompt for *_, prompt in states], max_new_tokens=cfg.max_new_tokens, seed=cfg.seed)
    found = {name: [] for name in SHARES}
    named = Counter()
    values = Counter()
    for (last, change, script, _), (reply,) in zip(states, replies):
        _, action, args, error = parse(reply.text, cfg.fields, cfg.actions)
        found["valid"].append(not error and is_valid(action, args, script, last, change))
        if not error and action == "Set Constant":
            named[args["constant"]] += 1
            values[args["value"]] += 1
        if last == "a worse score":
            found["undone if worse"].append(action == "Undo Edit Script")
        elif last == "a better score" and change in choices(script):
            found["gone on if better"].append(action == "Set Constant Again")
    shares = {name: sum(hits) / max(1, len(hits)) for name, hits in found.items()}
    return shares, [named, values], f"{states[0][-1][-1]['content']}\n\nIts reply:\n{replies[0][0].text}"


def show_replies(cfg, engine):
    """Returns a text about sampled replies in unseen states: shares of valid ones, of edits taken back after a worse
    score and gone on with after a better one, and which constants and values they name."""
    rows = [("tasks", *SHARES, "constants", "values")]
    examples = []
    for split in ("held-in", "held-out"):
        shares, counters, example = judge_replies(cfg, engine, split)
        lists = [" ".join(f"{name}:{count}" for name, count in counter.most_common(8)) for counter in counters]
        rows.append((split, *(f"{share:.0%}" for share in shares.values()), *lists))
        examples.append(example)
    return (f"Its replies in states it has not seen, {NUM_STATES} of each kind:\n{format_table(rows)}\n\n"
            f"One state:\n{examples[0]}")
