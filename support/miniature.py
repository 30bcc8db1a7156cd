"""What only the laptop demonstration needs, whose model has a million weights: settings, an expert and a random loop
without a model, states that were made up, and a tokenizer of its own."""
import difflib, functools, json, random, re, string
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import tokenizers

import tasks
from env import MAX_LINES, NOTHING
from model import Config
from support.cli import RunError
from support.conversations import Conversation, read_conversations
from support.distributed import rank0_broadcast
from support.files import shorten
from support.prompts import short_prompt, shown_script
from support.scripts import (
    InvalidAction, change_number, changes, constants, inverse, set_constant, untried, without_comments)
from support.tokenizer import Tokenizer, byte_alphabet, open_checkpoint

SHORT_ACTIONS = ("Set Constant", "Set Constant Again", "Set Constant Inversely", "Undo Edit Script", "Execute Script")
SCRIPTED_ACTIONS = {        # of the scripted expert
    "short": SHORT_ACTIONS,
    "medium": ("Set Constant", "Replace In Script", "Undo Edit Script", "Execute Script"),
    "full": ("Inspect Script Lines", "Replace In Script", "Undo Edit Script", "Execute Script", "Final Answer")}
SHORT_FIELDS = ("Action", "Action Input")      # a model of a million weights gets every word more wrong
AGENT_STEPS = 8         # replies of a trajectory of the trained model
VOCABULARY = 512        # ids of its tokenizer
TINY = {                # settings of the whole demonstration
    "model": "tiny",
    "prompt_format": "short", "actions": SHORT_ACTIONS, "fields": SHORT_FIELDS, "context": 320, "max_new_tokens": 64,
    "num": 3, "steps": AGENT_STEPS, "max_row_tokens": 1024, "batch": 8, "lr": 1.5e-3, "beta2": 0.95,
    "warmup": 20, "save_every": 500}


# -- The scripted expert, and the random loop: generators of replies, which are sent the record of each step

START = {"index": -1, "observation": "Nothing has been done.", **NOTHING}     # in place of the record of a last step
RUN = "Execute Script", {"script_name": "train.py"}
UNDO = "Undo Edit Script", {"script_name": "train.py"}


def reply_of(cfg, step, thought, action, args):
    """Returns a reply of the expert. step: the record of the last one."""
    lines = [line for line in step["observation"].splitlines() if not line.startswith("[")]     # [5 steps left]
    texts = {"Reflection": f"The last observation says: {shorten(' '.join(lines), 200)}",
             "Research Plan and Status":
                 f"Run the script, try ideas. Last: {'; '.join(step['tries'][-3:]) or 'nothing'}.",
             "Fact Check": f"The best score that a run has printed is {step['best_printed']}.",
             "Thought": thought, "Action": action, "Action Input": json.dumps(args, ensure_ascii=False)}
    return "\n".join(f"{name}: {texts[name]}" for name in cfg.fields)


def is_better(step, task, best):
    """Returns whether the run of a step has printed a better score than the best before."""
    if step["outcome"] != "ok" or step["printed"] is None:
        return False
    return best is None or task.better(step["printed"], best)


def search_constants(cfg, task, rng, is_expert=True):
    """Yields the replies of a search over the constants of the script.

    It runs the script, then changes a random constant by a random factor, none twice of the same script, and takes back
    what does not print a better score than ever before, until the steps are used up. That is the random loop. The
    expert goes on with a change that has helped as long as it helps, and tries the other way at once where one has not.
    """
    script = task.starter       # the best
    step = yield reply_of(cfg, START, "run it", *RUN)
    best = step["printed"] if is_better(step, task, None) else None
    helped = None       # the last change, if it was kept

    while True:
        # 1. A change.
        offered = untried(script, step["tried"])     # the environment refuses the others
        if not offered:
            step = yield reply_of(cfg, step, "there is nothing to change", *RUN)
            continue
        change = helped
        action = ("Set Constant Again", {})
        if not is_expert or change not in offered:
            change = rng.choice(offered)
            action = set_action(change)

        # 2. What it brings; the other way, where it brings nothing.
        for is_second in (False, True):
            step = yield reply_of(cfg, step, "try another value", *action)
            if not cfg.show_scores:
                step = yield reply_of(cfg, step, "run it", *RUN)
            back = other_way(change)
            if is_better(step, task, best) or is_second or not is_expert or back not in untried(script, step["tried"]):
                break
            change = back
            action = ("Set Constant Inversely", {})

        # 3. It is kept, or taken back.
        helped = None
        if is_better(step, task, best):
            best = step["printed"]
            script = set_constant(script, *change)
            helped = change
        else:
            step = yield reply_of(cfg, step, "take it back", *UNDO)


def set_action(change):
    """Returns (action, its arguments) of a change, (number, value)."""
    return "Set Constant", {"constant": str(change[0]), "value": change[1]}


def other_way(change):
    """Returns the inverse of a change, (number, value); None: it has none."""
    back = inverse(set_action(change)[1])
    return (change[0], back["value"]) if back else None


MAX_PARTS = 2           # actions that one idea may take under medium prompts
LONGEST_ACTION = 400    # characters of the arguments of one, about 120 tokens


def apply_idea(script, idea):
    """Returns the script after an idea's edits; as it is where the text of one does not occur once, or where the idea
    is told in words alone."""
    try:
        return tasks.apply(script, idea)
    except (ValueError, KeyError):
        return script


def try_ideas(cfg, task, ideas):
    """Yields the replies of the expert with full prompts. It runs and reads the script, and tries the ideas one after
    another. One stays if the script then prints a better score than ever before; none is begun that might not end
    within cfg.steps."""
    script = task.starter
    # 1. The score to beat, and the script.
    step = yield reply_of(cfg, START, "run it", *RUN)
    best = step["printed"] if is_better(step, task, None) else None
    for first in range(1, script.count("\n") + 2, MAX_LINES):
        lines = {"start_line_number": str(first), "end_line_number": str(first + MAX_LINES - 1)}
        step = yield reply_of(cfg, step, "read it", "Inspect Script Lines", {"script_name": task.entry, **lines})

    # 2. Idea by idea: edits, and back where they are no better.
    for idea in ideas:
        changed = apply_idea(script, idea)
        edits = [edit for edit in idea.get("edits", []) if edit["find"] != edit["replace"]]
        needed = 2 * len(edits) + 1 + (not cfg.show_scores)
        if changed == script or step["index"] + 1 + needed > cfg.steps:
            continue
        for edit in edits:
            args = {"script_name": task.entry, **edit}
            step = yield reply_of(cfg, step, idea["title"], "Replace In Script", args)
        if not cfg.show_scores:
            step = yield reply_of(cfg, step, "run it", *RUN)
        if is_better(step, task, best):
            best = step["printed"]
            script = changed
            continue
        for _ in edits:
            step = yield reply_of(cfg, step, "take it back", *UNDO)
    yield reply_of(cfg, step, "end", "Final Answer", {"final_answer": f"{task.metric} {best}"})


def idea_actions(script, idea):
    """Returns [(action, its arguments)] that carry an idea out on a starter without comments, from its top to its end;
    [] where one would be long or there are more than MAX_PARTS."""
    target = without_comments(apply_idea(script, idea))
    script = without_comments(script)
    actions = []
    while script != target and len(actions) <= MAX_PARTS:
        action, args, script = first_change(script, target)
        actions.append((action, args))
    is_long = any(len(json.dumps(args)) > LONGEST_ACTION for _, args in actions)
    return [] if is_long or len(actions) > MAX_PARTS else actions


def first_change(script, target):
    """Returns (action, its arguments, the script after it) that brings a script nearer to the target."""
    before = script.splitlines(keepends=True)
    after = target.splitlines(keepends=True)
    blocks = difflib.SequenceMatcher(None, before, after, autojunk=False).get_opcodes()
    _, start, end, new_start, new_end = next(block for block in blocks if block[0] != "equal")
    old = "".join(before[start:end])
    new = "".join(after[new_start:new_end])
    changed = "".join([*before[:start], new, *before[end:]])

    # 1. A number alone.
    if [name for name, *_ in constants(old)] == [name for name, *_ in constants(new)] and old.count("\n") == 1:
        for name, value, *_ in constants(new):
            return "Set Constant", {"constant": name, "value": value}, changed

    # 2. Lines, with as many round them as it takes to occur once.
    while script.count(old) != 1:
        if start:
            start -= 1
            old = before[start] + old
            new = before[start] + new
        else:
            old += before[end]
            new += before[end]
            end += 1
    args = {"script_name": "train.py", "find": old.rstrip("\n"), "replace": new.rstrip("\n")}
    if script.count(args["find"]) != 1 or not new:
        args |= {"find": old, "replace": new}
    return "Replace In Script", args, changed


def follow_ideas(cfg, task, ideas, rng):
    """Yields the replies of the expert with medium prompts. It runs the script, then tries the ideas, and in between
    constants: a change that has helped once more, else a random one. What prints no better score than ever before is
    taken back."""
    text = without_comments(task.starter)       # the workspace's script where the best score comes from
    ideas = [(idea["title"], actions) for idea in ideas if (actions := idea_actions(task.starter, idea))]
    step = yield reply_of(cfg, START, "I need the score to beat.", *RUN)
    best = step["printed"] if is_better(step, task, None) else None
    helped = None       # the last constant's number and factor, if kept
    done = set()        # names and values of constants that are tried on this script; the environment refuses them

    while True:
        # 1. An idea, or a constant.
        change = None
        left = {}           # (number, factor) -> name, value and new value of a constant; what is untried
        for number, factor in changes(text):
            name, value, *_ = constants(text)[number - 1]
            new_value = change_number(name, value, factor)
            if (name, new_value) not in done:
                left[number, factor] = name, value, new_value
        if ideas and (helped is None and rng.random() < 0.5 or not left):
            title, actions = ideas.pop()
        elif left:
            change = helped if helped in left else rng.choice(list(left))
            name, value, new_value = left[change]
            word = "larger" if float(new_value) > float(value) else "smaller"
            title = f"A {word} {name} has helped, so I go on" if change == helped else f"A {word} {name} may help"
            actions = [("Set Constant", {"constant": name, "value": new_value})]
        else:
            step = yield reply_of(cfg, step, "There is nothing left to change.", *RUN)
            continue

        # 2. What it brings, of an idea up to a part that cannot be carried out, or whose run fails.
        num_made = 0
        after = text
        for action, args in actions:
            if not is_allowed(after, action, args, done):
                break
            try:
                changed = carry_out(after, action, args)
            except InvalidAction:       # the constant has this value already, or is no longer there
                break
            step = yield reply_of(cfg, step, f"{title}.", action, args)
            num_made += 1
            if action == "Set Constant" and after == text:
                done.add((args["constant"], args["value"]))
            after = changed
            if cfg.show_scores and step["outcome"] != "ok":
                break
        if num_made and not cfg.show_scores:
            step = yield reply_of(cfg, step, "I need to know what it prints.", *RUN)

        # 3. It is kept, or taken back.
        helped = None
        if num_made and is_better(step, task, best):
            best = step["printed"]
            text = after
            helped = change
            done.clear()
            continue
        for _ in range(num_made):
            why = "The script failed" if step["outcome"] not in ("ok", None) else "That was no better"
            step = yield reply_of(cfg, step, f"{why}, so I take it back.", *UNDO)


def is_allowed(script, action, args, done):
    """Returns whether an edit has not been done, and stands in what a medium prompt shows of the script."""
    if action == "Set Constant":
        return (args["constant"], args["value"]) not in done
    return script.count(args["find"]) == shown_script(script).count(args["find"]) == 1


def carry_out(script, action, args):
    """Returns the script after one of the expert's edits. InvalidAction: see set_constant."""
    if action == "Set Constant":
        return set_constant(script, **args)
    return script.replace(args["find"], args["replace"])


def scripted_policy(cfg, task, ideas, rng):
    """Returns a policy for play_trajectory: the scripted expert. ideas: for full and medium prompts."""
    if cfg.prompt_format == "medium":
        return policy_of(follow_ideas(cfg, task, ideas, rng), task)
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
                raise RunError(f"a trajectory of {task.id} was begun by another version of the scripted agent; play it "
                               "in another folder")
            next_reply = replies.send(line)
        num_seen = len(lines)
        return next_reply, None, {}
    return reply


# -- Imagined states: what the expert does depends on the prompt alone, so its rules can be learned without any run

NUM_IMAGINED = 3000
LAST = ("a run", "a better score", "a worse score", "an undo", "nothing")       # what has just been seen
FAILURES = ("The script ended with exit code 1: ValueError", "It was stopped: it used more than its processor time",
            "It left no valid submission.csv")
WHOLE = (1, 2, 3, 4, 5, 6, 8, 10, 12, 15, 16, 20, 25, 30, 32, 40, 50, 64, 100, 128, 200, 300, 500)
BROKEN = (0.0, 0.0001, 0.001, 0.003, 0.01, 0.015, 0.02, 0.05, 0.1, 0.2, 0.25, 0.3, 0.5, 0.7, 0.9, 1.0, 2.0, 3.0, 10.0)


class Imagined(NamedTuple):
    """A state that nobody was in, with what the expert does there."""
    prompt: list        # chat messages
    script: str
    before: str         # the script that the last change was made in
    change: tuple       # the last one, (number, value)
    tried: list         # changes of the best script
    actions: list       # [(action, its arguments)] of the expert, all as good


def imagine(metric, direction, script, last, rng):
    """Returns an Imagined of a script with some numbers changed. last: one of LAST."""
    # 1. Changes, and two scores.
    for _ in range(rng.randint(1, 3)):
        before = script
        change = rng.choice(changes(script))
        script = set_constant(script, *change)
    scale = rng.choice((1, 1, 1, 1000))
    better, worse = sorted((scale * rng.random(), scale * rng.random()), reverse=direction == "up")
    after = f", after Set Constant {change[0]} {change[1]}"

    # 2. What has been seen, and what to do.
    tried = []
    news = f"{better:.5g}, after Execute Script"
    actions = []        # none of its own: any change that is untried
    if last == "nothing":
        news = NOTHING["news"]
        actions = [RUN]
    elif last == "a better score":
        news = f"{better:.5g}, better than {worse:.5g}{after}"
        tried = [other_way(change)]
        if change in changes(script):
            news += ", again is untried"
            actions = [("Set Constant Again", {})]
    elif last == "a worse score":
        news = rng.choice((f"{worse:.5g}, worse than {better:.5g}", f"{worse:.5g}, worse than {better:.5g}",
                           f"{better:.5g}, equal to {better:.5g}", f"failed, {rng.choice(FAILURES)}")) + after
        tried = [change, *rng.sample(changes(before), rng.randint(0, 2))]
        actions = [UNDO]
        if other_way(change) in changes(before) and other_way(change) not in tried:
            news += ", inversely is untried"
            actions = [("Set Constant Inversely", {})]
    elif last == "an undo":
        news = f"{better:.5g}, equal to {better:.5g}, after Undo Edit Script"
        tried = rng.sample(changes(script), min(rng.randint(1, 5), len(changes(script)) - 1))
    if not actions:
        actions = [set_action(pair) for pair in changes(script) if pair not in tried]

    # 3. The prompt.
    tried = [pair for pair in tried if pair]
    seen = NOTHING | {"news": news, "best_printed": None if last == "nothing" else better,
                      "tried": [set_action(pair)[1] for pair in tried]}
    task = SimpleNamespace(metric=metric, direction=direction)
    steps_left = AGENT_STEPS if last == "nothing" else rng.randint(1, AGENT_STEPS - 1)
    prompt = short_prompt(task, seen, script, last != "a worse score", steps_left)
    return Imagined(prompt, script, before, change, tried, actions)


@functools.cache
def held_in_words():
    """Returns the metrics of held-in tasks, and the words that the names of their constants consist of."""
    held_in = [tasks.load(id) for id in tasks.names("held-in")]
    words = {word for task in held_in for name, *_ in constants(task.starter) for word in name.split("_")}
    return [task.metric for task in held_in], sorted(words)


def made_up_name(rng, num_parts):
    """Returns a name of a constant: with equal chances words of held-in ones, or letters that spell nothing."""
    parts = rng.sample(held_in_words()[1], num_parts)
    if rng.random() < 0.5:
        parts = ["".join(rng.choices(string.ascii_uppercase, k=rng.randint(1, 9))) for _ in parts]
    return "_".join(parts)


def imagined_conversations(cfg):
    """Returns [Conversation] of NUM_IMAGINED states in scripts that do not exist, and what the expert does there. Half
    of their constants are named with words of held-in ones, the others with letters that spell nothing."""
    rng = random.Random(cfg.seed)
    conversations = []
    for i in range(NUM_IMAGINED):
        lines = []
        for _ in range(rng.randint(1, 6)):
            name = made_up_name(rng, rng.randint(1, 2))
            lines.append(f"{name} = {rng.choice(rng.choice((WHOLE, BROKEN)))}")
        metric = rng.choice(held_in_words()[0])
        state = imagine(metric, rng.choice(("up", "down")), "\n".join(lines), rng.choice(LAST), rng)
        reply = reply_of(cfg, START, "", *rng.choice(state.actions))
        messages = [*state.prompt, {"role": "assistant", "content": reply}]
        conversations.append(Conversation(messages, [len(state.prompt)], f"imagined state {i}", f"imagined state {i}"))
    return conversations


# -- Disguised states: RL with a policy that cannot know the task learns what holds on all of them

CONSTANT_LINE = re.compile(r"^(\d+) (\w+)( = \S+(.*))$", re.MULTILINE)   # number, name, value with what is untried


class Disguised:
    """An Env with short prompts in disguise: another metric, and one of the constants alone, with another name and as
    number 1; any number means it. So the actions of a state differ in how they change it: what they earn tells nothing
    of a task's constants, and few scripts are run. A trajectory keeps the names."""

    def __init__(self, env, seed):
        self.env = env
        self.seed = seed
        self.number = None      # that the constant has in the script
        self.read_plain = env.read
        env.read = self.read

    def __getattr__(self, name):
        return getattr(self.env, name)

    def prompt(self):
        """Returns the messages that the policy sees."""
        content = self.env.prompt()[-1]["content"]
        lines = list(CONSTANT_LINE.finditer(content))
        if lines:
            # 1. A constant with something untried: that of the last change, or any.
            last = re.search(r"Set Constant (\d+)", content)
            offered = [line for line in lines if line[4]] or lines
            changed = [line for line in offered if last and line[1] == last[1]]
            line = random.Random(f"{self.seed} {self.env.index}").choice(changed or offered)
            self.number = line[1]
            name = made_up_name(random.Random(f"{self.seed} {self.number}"), 1)

            # 2. Its line in place of all, and its number where the last action is told.
            content = f"{content[:lines[0].start()]}1 {name}{line[3]}{content[lines[-1].end():]}"
            content = re.sub(rf"(?<=Set Constant ){self.number}\b", "1", content)
        metric = random.Random(self.seed).choice(held_in_words()[0])
        return [{"role": "user", "content": metric + content[content.index(", "):]}]

    @staticmethod
    def luck(pieces):
        """Returns the positions of those tokens of a reply, given as bytes, that name the constant. They have no
        advantage, as any number means it: else a policy comes to prefer number 1, also where there are others."""
        positions = []
        for i in range(len(pieces)):
            _, opening, name = b"".join(pieces[:i]).rpartition(b'"constant": "')
            if opening and b'"' not in name:
                positions.append(i)
        return positions

    def read(self, reply):
        """Returns what Env.read does of a reply to the last prompt, with the script's number of the constant."""
        values, action, args, error = self.read_plain(reply)
        if self.number and re.fullmatch(r"\s*[0-9]{1,9}\s*", args.get("constant", "")):
            args["constant"] = self.number
        return values, action, args, error


# -- The tokenizer

# A digit is always a token of its own, and a word is the same tokens after any punctuation.
WORDS = r" ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"


def make_tokenizer(cfg):
    """Trains a tokenizer on the collected and the imagined conversations and saves it to cfg.out, unless a run there is
    to be gone on with."""
    if not any(Path(cfg.out, "checkpoints").glob("step-??????")):
        conversations, _ = read_conversations(cfg.trajectories, cfg.data, log=lambda line: None)
        conversations += imagined_conversations(cfg)
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
        vocab_size=size, special_tokens=[Tokenizer.TEXT_END, Tokenizer.TURN, Tokenizer.END],
        initial_alphabet=byte_alphabet(), show_progress=False)
    bpe.train_from_iterator(texts, trainer)
    return Tokenizer(bpe, system=None)


def starting_point(cfg):
    """Returns (folder, Config, Tokenizer) of the model that is fine-tuned; folder is None where it is drawn."""
    if cfg.model != "tiny":
        return open_checkpoint(cfg.model)
    config = Config.preset("tiny")
    if cfg.prompt_format == "full":
        return None, config, Tokenizer.of_bytes()
    rank0_broadcast(lambda: make_tokenizer(cfg))
    tokenizer = Tokenizer.from_pretrained(cfg.out)
    return None, replace(config, vocab_size=tokenizer.size), tokenizer
