"""The environment: an agent edits a training script, runs it, and is rewarded for what the script's submission scores.

    env = Env("leaf-classification", out="runs/x")    # after: python -m tasks prepare leaf-classification
    env.reset()                                       # -> chat messages: the rules, then the task
    while not env.done:
        step = env.step(policy(env.messages))         # -> Step: what was done, what the agent sees, the reward
    python env.py replay runs/x/trajectories/FILE     # runs a recorded trajectory again and prints what differs

State. A state is the chat messages and the workspace, and the workspace is a dict {path: sha256} over a store of blobs.
It becomes a folder only while a script runs: its files are copied to a temporary folder, the script runs there, and the
files it leaves are stored. So a snapshot is free, a recorded state comes back exactly, and no `..`, symlink or daemon
reaches the workspace. Regular files are kept with their contents; modes, times and empty folders are not. A script that
was stopped (time, memory, a signal) leaves the workspace as it was. `.undo/<number>/<path>` holds what edits replaced.

Actions have MLAgentBench's names and arguments, and one is ours: Replace In Script, an edit that the policy writes
itself. Every edit is scored by running the entry script in a copy of the workspace and grading its submission here, in
the parent, against answers that the script is not given. The agent never sees that score. The metric that a script
prints is noted beside it and not believed.

A script gets a clean environment, and limits on time, memory, file size, output and processes; nothing it started
survives it. A sandbox of two layers (_supervise) keeps it from the answers, other files, other processes and the
network; each is tried before it is trusted (protection), and where none holds nothing runs, unless told so with
sandbox="off". Scripts that use numpy or torch are forked from a process that has imported them, which saves most of
their time, and live under the same layers and limits. Linux only; the rest works anywhere.
"""
import argparse, contextlib, dataclasses, difflib, hashlib, io, json, math, os, random, re, shutil, stat, sys
import tempfile, zlib
import threading, time, uuid, weakref
from dataclasses import dataclass, field
from pathlib import Path

import tasks
from support import cli
from reward import KINDS, best_of, reward
from support.sandbox import NO_SPACE, SLOTS, Result, Unprotected, _discard, describe, execute, protection
from support.cli import ContextFull, RunError
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from support.files import check_form, shorten, parse_json, refuse_links_out, one_of, read_bytes, read_json_lines, some_of, up_to, write_atomic
from datetime import timedelta

OUTCOMES = {  # how a run can end -> the kind of reward (reward.KINDS), and what the agent reads after the output
    "ok": ("scored", ""),  # exit code 0 and, where it is graded, a valid submission
    "error": ("failed", "Find the cause in the error above and change the script."),  # exit code above 0
    "killed": ("failed", "Change the script so that it does not crash."),  # by a signal that is not ours
    "too many processes": ("failed", "Use fewer processes (n_jobs, num_workers)."),  # at once
    "no submission": ("failed", "The script must write submission.csv to the current folder."),
    "invalid submission": ("failed", "Correct what the script writes to submission.csv."),  # the grader refused it
    "timeout": ("limit", "Make it faster: a smaller model, fewer rounds or folds."),
    # also if it ended by MemoryError and the like
    "out of memory": ("limit", "Use less memory: smaller batches, a smaller model, smaller types."),
    "disk full": ("limit", "Write less to disk."),  # also a file above the size limit, or too much left behind
}
FIELDS = ("Reflection", "Research Plan and Status", "Fact Check", "Thought", "Action", "Action Input")
MAX_REPLY = 50_000                      # characters of a reply; a longer one is refused unread
MAX_OBSERVATION = 5_000                 # characters of an observation, about 1,500 tokens
MAX_LINES = 200                         # lines shown by one Inspect Script Lines
MAX_READ = 10 << 20                     # bytes of a file that an action looks at
MAX_SCRIPT = 1 << 20                    # bytes of a file that an action may edit
MAX_CODER = 20_000                      # characters of a file that Understand File shows to the coder
PROMPTS = ("full", "short")             # what of a state the policy is shown, see prompt_of
SHORT_SCRIPT, SHORT_NEWS = 200, 100     # characters of the script and of the news in a short prompt
MAX_FILES, MAX_BYTES = 1_000, 1 << 28   # what a script may leave in the workspace
WALL_FACTOR = 4     # limits are processor time, so that a busy machine ends no script; so much more wall time does
UNDO = ".undo/"


# ---------------------------------------------------------------------------------------------------------------------
# What is kept on disk

HASH = re.compile("[0-9a-f]{64}")
MAX_UNDO = 1_000                        # replaced files that are kept for Undo Edit Script
MAX_ENTRY = 16 << 20                    # bytes of a cache entry; one of ours has 3 MiB at most


def usable(path):
    """Whether a text can name a file of the workspace: a normalised path below it that does not begin like an option
    and is neither public data nor what edits have replaced. It goes for actions, scripts and records alike."""
    if not path.isprintable() or not 0 < len(path) <= 300 or path[0] in "/~-":
        return False
    parts = path.split("/")
    return parts[0] not in ("data", UNDO[:-1]) and not any(
        part in ("", ".", "..") or len(part.encode()) > 100 for part in parts)


def check_snapshot(files):
    """ValueError, one sentence, unless `files` is a snapshot as Env.snapshot gives it; it may come from anybody."""
    if type(files) is not dict or len(files) > MAX_FILES + MAX_UNDO:
        raise ValueError(f"a snapshot must be {{path: sha256}}, of at most {MAX_FILES} files and {MAX_UNDO} that edits "
                         "have replaced")
    folders = set()
    for path, sha in files.items():
        kept = re.fullmatch(r"\.undo/[1-9][0-9]{0,8}/(.+)", path) if isinstance(path, str) else None
        if not isinstance(path, str) or not usable(kept[1] if kept else path):
            raise ValueError(f"a snapshot names {shorten(repr(path), 80)}, which cannot be a file of a workspace")
        if not isinstance(sha, str) or not HASH.fullmatch(sha):
            raise ValueError(f"a snapshot has {shorten(repr(sha), 80)} for {path}, which is no sha256")
        folders |= {path[:place] for place, letter in enumerate(path) if letter == "/"}
    if both := folders & files.keys():
        raise ValueError(f"a snapshot has {min(both)} both as a file and as a folder")


def _open(path, parent=None):
    """A regular file, open for reading. No link is followed and no pipe is waited for: OSError, as for what is not
    there. parent: descriptor of the folder that the path is relative to."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=parent)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(f"{path} is no regular file")
    return open(descriptor, "rb")


def _copy(source, target=None):
    """Reads an open file, of which MAX_BYTES count; writes it to another if there is one. Returns the sha256."""
    sha, left = hashlib.sha256(), MAX_BYTES
    while block := source.read(min(left, 1 << 20)):
        sha.update(block)
        left -= len(block)
        if target and block == bytes(len(block)):   # a hole in a file costs nothing, and is to cost us nothing
            target.seek(len(block), os.SEEK_CUR)
        elif target:
            target.write(block)
    if target:
        target.truncate()
    return sha.hexdigest()


def _write_aside(path, source, sha=None):
    """Copies an open file to a path so that it is there whole or not at all, also with many writers and kill -9.
    OSError: it had not this sha256, so it changes meanwhile."""
    aside = path.with_name(f"{path.name}.{uuid.uuid4().hex}")
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with open(aside, "wb") as target:
            if _copy(source, target) != sha and sha:
                raise OSError(f"a file changed while it was stored as {path}")
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)


class ResultCache:
    """What runs gave, so that one state is run once: <folder>/<aa>/<key>. An entry is a line with the sha256 of the
    rest, and the rest, JSON; a damaged one counts as absent. Safe for many writers. recheck: the share of hits, 0 to 1,
    that are run again; `moved` lists those whose score is another now."""

    def __init__(self, folder, recheck=0.0):
        self.folder, self.recheck, self.moved, self.lock = Path(folder), recheck, [], threading.Lock()
        self.counts, self.running = {"runs": 0, "hits": 0, "rechecked": 0}, weakref.WeakValueDictionary()

    def alone(self, key):
        """A lock: whoever wants what another thread is finding out waits for it, and then knows."""
        with self.lock:
            return self.running.setdefault(key, threading.Lock())

    def count(self, what):
        with self.lock:
            self.counts[what] += 1

    def get(self, key):
        """The entry, None if there is none."""
        try:
            with _open(self.folder / key[:2] / key) as file:
                digest, text = file.read(MAX_ENTRY).split(b"\n", 1)
            return json.loads(text) if hashlib.sha256(text).hexdigest().encode() == digest else None
        except (OSError, ValueError, RecursionError):
            return None

    def put(self, key, entry):
        text = json.dumps(entry).encode()
        content = hashlib.sha256(text).hexdigest().encode() + b"\n" + text
        _write_aside(self.folder / key[:2] / key, io.BytesIO(content))


class MissingBlob(ValueError):
    """A recorded state cannot be restored: one of its files is missing, or is not what was recorded."""


class Blobs:
    """Contents by their sha256, in <folder>/<aa>/<sha256>. A blob of ours that is there is whole; as the folder may
    come from others, each is read once before it is used. Safe for many writers."""

    def __init__(self, folder):
        self.folder = Path(folder)

    def _stamp(self, sha):
        """(path, what tells whether the file was changed) of a blob; None if there is none. A text that is no sha256
        is none, and is never looked up."""
        if not isinstance(sha, str) or not HASH.fullmatch(sha):
            return None
        place = self.folder / sha[:2] / sha
        try:
            found = os.lstat(place)
        except OSError:
            return None
        right = stat.S_ISREG(found.st_mode) and found.st_size <= MAX_BYTES
        return (place, found.st_ino, found.st_size, found.st_ctime_ns) if right else None

    def has(self, sha):
        """Whether it is there, without looking at its contents."""
        return self._stamp(sha) is not None

    def path(self, sha):
        """Where its contents are. Gone: it is missing, or its contents are others."""
        stamp = self._stamp(sha)
        if not stamp or stamp not in _sound and not _is_sound(stamp):
            why = "damaged" if stamp else "missing"
            raise MissingBlob(f"the blob {shorten(str(sha), 80)} is {why} in {self.folder}: this state cannot be restored")
        return stamp[0]

    def put(self, content):
        """Stores bytes, or a file, by its path or descriptor; returns the sha256."""
        with io.BytesIO(content) if isinstance(content, bytes) else open(content, "rb") as source:
            sha = _copy(source)
            try:
                self.path(sha)
            except MissingBlob:
                source.seek(0)
                _write_aside(self.folder / sha[:2] / sha, source, sha)
                _keep_sound(self._stamp(sha))
        return sha


_sound = set()      # what _stamp gave for blobs whose contents are known to be those they are named by


def _is_sound(stamp):
    """Reads a blob; whether its contents are those it is named by."""
    with contextlib.suppress(OSError), _open(stamp[0]) as file:
        if _copy(file) == stamp[0].name:
            _keep_sound(stamp)
            return True
    return False


def _keep_sound(stamp):
    if len(_sound) >= 10_000:
        _sound.clear()
    _sound.add(stamp)


# ---------------------------------------------------------------------------------------------------------------------
# What the model reads and writes

ACTIONS = {  # name -> arguments with an explanation, and what it does; the method of Env is the name in lower case
    "List Files": ({"dir_path": 'folder; "." is the workspace'}, "names and sizes of the files in a folder."),
    "Inspect Script Lines": ({"script_name": "file", "start_line_number": "first line, from 1",
                              "end_line_number": "last line"},
                             f"shows these lines exactly, at most {MAX_LINES}. Look before you edit."),
    "Understand File": ({"file_name": "file", "things_to_look_for": "what to look for and report"},
                        "has a helper read a file and report."),
    "Edit Script (AI)": ({"script_name": "file to start from", "edit_instruction": "what to change, step by step",
                          "save_name": "file to write"},
                         "has a helper rewrite the script; check the difference it returns."),
    "Replace In Script": ({"script_name": "file", "find": "exact text that occurs once",
                           "replace": "the text to put there"},
                          "your own edit of a script; copy `find` exactly, spaces included."),
    "Undo Edit Script": ({"script_name": "file"}, "takes back the last edit of this file."),
    "Copy File": ({"source": "file", "destination": "file"}, "copies a file."),
    "Execute Script": ({"script_name": "file"}, "runs a Python script; returns what it prints."),
    "Final Answer": ({"final_answer": "what you did and the result"},
                     "ends the work. Use it once, when there is nothing left to improve."),
}
DEFAULT_ACTIONS = tuple(ACTIONS)
NEEDS_CODER = ("Understand File", "Edit Script (AI)")
EXPLAIN = {
    "Reflection": "what the last observation means; for an error, its cause",
    "Research Plan and Status": "the whole plan, what is done, and the results that observations confirmed",
    "Fact Check": "for each new claim: guessed, or confirmed by which observation",
    "Thought": "what you do now and why",
    "Action": "the name of one tool",
    "Action Input": "one JSON object with exactly that tool's keys",
}
SYSTEM = """You are a machine-learning engineer. You improve a training script, step by step, so that the predictions \
it writes score better on hidden test data. Each of your replies uses one tool; the next message is its observation.

Tools, with the keys of their Action Input:
{tools}

Rules:
- Run the script as it is first, so that you know the score to beat. Then change one thing, run again, and compare the \
validation scores.
- Only scores that a run has printed count. Undo changes that do not help.
- The script must write submission.csv in the form the task asks for. Only files in the workspace can be named; data/ \
is read-only.
- Nothing can be installed or downloaded.

Answer in exactly this form, every entry on its own line and nothing after the JSON. In JSON a line break inside a \
text is written \\n, a double quote \\", a backslash \\\\.
{entries}

Examples of a reply:

{examples}"""
EXAMPLES = {    # action -> a whole reply, since a small model copies the form it sees
    "Edit Script (AI)": """Reflection: The script runs; its validation score is the one to beat.
Research Plan and Status: 1. Run train.py: done. 2. **Have the features scaled.** 3. Run it again and compare.
Fact Check: The score is confirmed by the last observation. That scaling helps is guessed.
Thought: The features have very different ranges, so I have them scaled before training.
Action: Edit Script (AI)
Action Input: {"script_name": "train.py", "edit_instruction": "Scale all features with StandardScaler, fitted on the \
training part, before the model is trained.", "save_name": "train.py"}""",
    "Replace In Script": """Reflection: The script runs; its validation score is the one to beat.
Research Plan and Status: 1. Run train.py: done. 2. **Train for more epochs.** 3. Run it again and compare.
Fact Check: The score is confirmed by the last observation. That more epochs help is guessed.
Thought: The loss was still falling at the end, so I train longer.
Action: Replace In Script
Action Input: {"script_name": "train.py", "find": "EPOCHS = 5\\n", "replace": "EPOCHS = 10\\n"}""",
    "Execute Script": """Reflection: The work begins; there is no observation yet.
Research Plan and Status: 1. Run train.py as it is. 2. Change one thing, run, compare. Nothing is done yet.
Fact Check: Nothing is confirmed yet.
Thought: I run the script as it is, to know the score to beat.
Action: Execute Script
Action Input: {"script_name": "train.py"}"""}
PROBLEM = """Task: {task.id}

{problem}

The workspace holds {task.entry} (the script to improve) and data/ (read-only). The metric is {task.metric}; \
{better} is better. You have {steps} steps and {minutes:.0f} minutes; one run of a script may take \
{limit:.0f} s."""


def system_prompt(actions=DEFAULT_ACTIONS, fields=FIELDS):
    """The first message: tools, rules, format. The same for all tasks, so that its cache can be shared."""
    tools = "\n".join(f"- {name} {json.dumps(ACTIONS[name][0])}: {ACTIONS[name][1]}" for name in actions)
    offered = [dict(line.split(": ", 1) for line in reply.splitlines()) for name, reply in EXAMPLES.items()
               if name in actions]
    examples = ["\n".join(f"{name}: {each[name]}" for name in fields) for each in offered[:1] + offered[1:][-1:]]
    return SYSTEM.format(tools=tools, entries="\n".join(f"{name}: ({EXPLAIN[name]})" for name in fields),
                         examples="\n\n".join(examples))


SHORT = """Task: {task.id}
{task.metric}, {better} is better
Last: {news}
{script}"""


def prompt_of(shown, task, messages, snapshot, blobs):
    """The chat messages that the policy is shown in a state: its messages and snapshot.

    shown: "full", the messages themselves; "short", one message for a small model: task, what the last step brought,
    and the lines of the entry script that matter most.
    """
    if shown == "full":
        return messages
    sha = snapshot.get(task.entry)
    script = read_start(blobs.path(sha), MAX_SCRIPT).decode("utf-8", "replace") if sha else ""
    return short_prompt(task, messages, script)


def read_start(path, limit):
    """The first bytes of a file, at most `limit`."""
    with open(path, "rb") as file:
        return file.read(limit)


def short_prompt(task, messages, script):
    """prompt_of for "short", of the entry script's text."""
    better = "higher" if task.direction == "up" else "lower"
    return [{"role": "user", "content": SHORT.format(task=task, better=better, news=_news(task, messages),
                                                     script=shown_lines(script))}]


def shown_lines(script):
    """What a short prompt shows of a script: from its first constant on (before it are docstring and imports), without
    comments and empty lines, as many whole lines as SHORT_SCRIPT characters hold."""
    first = re.search(r"^[A-Z][A-Z0-9_]* = ", script, re.MULTILINE)
    shown, length = [], 0
    for line in script[first.start() if first else 0:].split("\n"):
        if line := line.partition("#")[0].rstrip(" \t"):
            shown.append(line + "\n")
            length += len(line) + 1
            if length > SHORT_SCRIPT:
                break
    text = "".join(shown)
    return text[:text.rfind("\n", 0, SHORT_SCRIPT + 1) + 1 or SHORT_SCRIPT].rstrip("\n")


def _news(task, messages):
    """One line about the last step. Of a run it tells how the printed score compares with the best before."""
    seen = [message["content"] for message in messages[2:] if message["role"] == "user"]
    if not seen:
        return "nothing"
    action = re.search(r"^Action: (.+)", messages[-2]["content"], re.MULTILINE)
    did = f"{action[1][:30]}: " if messages[-2]["role"] == "assistant" and action else ""
    ran = f"{task.entry} ran to the end"
    if seen[-1].startswith(ran):
        value = printed_metric(seen[-1], task.metric)
        before = [each for text in seen[:-1] if text.startswith(ran)
                  and (each := printed_metric(text, task.metric)) is not None]
        best = (max if task.direction == "up" else min)(before, default=None)
        if value is None or best is None:
            return did + ("ran" if value is None else f"{value:.4g}")
        return f"{did}{value:.4g}, {'better' if task.better(value, best) else 'no better'} than {best:.4g}"
    if seen[-1].startswith(f"{task.entry} is saved."):
        return did + "saved"
    lines = [line for line in seen[-1].splitlines() if line.strip() and not re.match(r"\[\d+ steps and ", line)]
    failed = seen[-1].startswith(f"{task.entry} ended with")
    return (did + "failed, " * failed + " ".join(" ".join(lines[-1 if failed else 0:][:1]).split()))[:SHORT_NEWS]


def parse(reply, fields=FIELDS, actions=DEFAULT_ACTIONS):
    """(fields, action, args, error) of a reply, for any string; error is "" if the action may be carried out, else one
    sentence.

    Every entry of `fields` must begin a line, in order; another case and markdown signs round its name pass. Of an
    entry that is repeated the first counts. What follows a line that starts with "Observation:" is invented and not
    read. The action must be a known name, exactly; quoting signs round it pass. Its input is the first JSON object
    after the header; code fences before it, raw line breaks in its texts and anything after it pass. The keys must be
    the tool's, exactly, and the values texts; line numbers may be whole numbers. All searches take linear time.
    """
    if len(reply) > MAX_REPLY:
        return {}, None, {}, f"The reply is longer than {MAX_REPLY:,} characters."
    if not reply.strip():
        return {}, None, {}, "The reply is empty."
    text, values, last, begin = cut_observation(reply), {}, None, 0
    for name in fields:
        header = rf"^[ \t>*#-]{{0,8}}{re.escape(name)}[ \t*]{{0,8}}:[ \t*]{{0,8}}"
        found = re.compile(header, re.MULTILINE | re.IGNORECASE).search(text, begin)
        if not found:
            return values, None, {}, (f'The entry "{name}:" is missing; expected are, in this order and each on its '
                                      f'own line: {", ".join(fields)}.')
        if last:
            values[last] = text[begin:found.start()].strip()
        last, begin = name, found.end()
    action, source = values["Action"].strip("`*\"'[] \t\n"), text[begin:]
    if action not in actions:
        return values, None, {}, f"There is no tool {shorten(action, 60)!r}; the tools are: {', '.join(actions)}."
    keys = ACTIONS[action][0]
    expected = f"expected is {json.dumps(keys)}"
    try:
        args = json.JSONDecoder(strict=False).raw_decode("{" + source.partition("{")[2])[0]
    except (ValueError, RecursionError) as error:
        return values, action, {}, f"The Action Input is not a JSON object ({shorten(str(error), 100)}); {expected}."
    if set(args) != set(keys):
        found = shorten(", ".join(map(repr, args)), 200) or "none"
        return values, action, {}, f"The Action Input of {action} has the keys {found}; {expected}."
    for key, value in args.items():
        number = key.endswith("line_number")
        if number and type(value) is int:
            args[key] = value = str(value)
        if type(value) is not str or number and not re.fullmatch(r"\s*[0-9]{1,9}\s*", value):
            kind = "a whole number" if number else "a text in double quotes"
            return values, action, {}, f'"{key}" must be {kind}; found {shorten(repr(value), 60)}.'
        if re.search("[\ud800-\udfff]", value):
            return values, action, {}, f'"{key}" holds half a surrogate pair, which is no character.'
    return values, action, args, ""


def cut_observation(reply):
    """The reply up to a line that starts with "Observation:"."""
    return re.split(r"^[ \t*]{0,8}Observation[ \t*]{0,8}:", reply, maxsplit=1, flags=re.MULTILINE)[0]


def plain(text):
    """The text with a question mark for each half of a surrogate pair, which cannot be written to a file."""
    return text.encode("utf-8", "replace").decode()


MAX_DIFF = 2_000    # lines of two texts together that difflib compares, which takes it 0.6 s at worst


def difference(old, new):
    """The lines of a unified difference of two texts, without its heads. Of texts that are long together, which take
    difflib for ever, it is one piece from the first line that differs to the last."""
    old, new = old.splitlines(), new.splitlines()
    if len(old) + len(new) <= MAX_DIFF:
        return list(difflib.unified_diff(old, new, lineterm="", n=2))[2:]
    shortest, head, tail = min(len(old), len(new)), 0, 0
    while head < shortest and old[head] == new[head]:
        head += 1
    while tail < shortest - head and old[-1 - tail] == new[-1 - tail]:
        tail += 1
    gone = old[head:len(old) - tail]
    come = new[head:len(new) - tail]
    if not gone and not come:       # they differ in their line ends
        return []
    return [f"@@ -{head + 1},{len(gone)} +{head + 1},{len(come)} @@", *(f"-{line}" for line in gone),
            *(f"+{line}" for line in come)]


def printed_metric(stdout, metric=""):
    """The validation score that a script printed: the last number of the last line that mentions "validation" or the
    metric's name; None if there is none."""
    for line in reversed(stdout.splitlines()):
        if "validation" in line.lower() or metric and metric.lower() in line.lower():
            numbers = re.findall(r"(?<![\w.])[-+]?(?:\d+(?:\.\d*)?|\.\d+)(?:[eE][-+]?\d{1,4})?(?!\w)", line[-1000:])
            if numbers and math.isfinite(value := float(numbers[-1])):
                return value
    return None


# ---------------------------------------------------------------------------------------------------------------------
# Settings of an agent

def check_fields(fields):
    """Raises ValueError unless a list or tuple names entries that a reply can be asked for."""
    if not set(fields) <= set(FIELDS) or tuple(fields[-2:]) != FIELDS[-2:]:
        raise ValueError(f"fields must be taken from {','.join(FIELDS)} and end in the last two")


@dataclass
class AgentSettings(cli.TaskSettings):
    """Settings of every program in which an agent acts."""
    actions: tuple[str, ...] = DEFAULT_ACTIONS  # what the agent may do
    fields: tuple[str, ...] = FIELDS  # entries of a reply; a weak model does better with "Thought,Action,Action Input"
    prompt_format: str = "full"  # what the model is shown of a state: full (the conversation), or short (one message:
        # the task, what the last step brought and the head of the script, for a model of a few million weights)
    steps: int = 15  # replies that a trajectory may have
    seconds: float = 1800.0  # that a trajectory may take

    def __post_init__(self):
        super().__post_init__()
        cli.check_choices(self, prompt_format=PROMPTS)
        cli.check_positive(self, "steps", "seconds")
        if unknown := set(self.actions) - set(DEFAULT_ACTIONS):
            raise ValueError(f"there is no action {min(unknown)!r}; the actions are: {','.join(DEFAULT_ACTIONS)}")
        try:
            check_fields(self.fields)
        except ValueError as error:
            raise ValueError(f"--{error}") from None


# agent.json in the folder of a model tells these settings, with which the model was trained to act.
AGENT_FORMAT = {
    "prompt_format": one_of(*PROMPTS),
    "actions": some_of(*DEFAULT_ACTIONS),
    "fields": (f"some of {', '.join(FIELDS)}, with the last two at the end", lambda value: (
        some_of(*FIELDS)[1](value) and value[-2:] == list(FIELDS[-2:]))),
    "context": up_to(1 << 20),
    "max_new_tokens": up_to(1 << 20),
    "steps": up_to(1000),
}


def read_agent(folder):
    """Returns {name: value} of the settings that agent.json in the folder of a model tells, {} where there is none.

    ValueError: an entry has another type, or is out of bounds. Other entries are ignored, which is announced.
    """
    path = Path(folder, "agent.json")
    raw = read_bytes(path, 1 << 16)
    if raw is None:
        return {}
    form = {f"{name}?": value for name, value in AGENT_FORMAT.items()}
    form["prompt?"] = AGENT_FORMAT["prompt_format"]     # an older name
    values = parse_json(raw, form, path)
    if "prompt" in values:
        values["prompt_format"] = values["prompt"]
    elif "prompt_format" in values:
        values["prompt"] = values["prompt_format"]
    if ignored := sorted(values.keys() - AGENT_FORMAT.keys() - {"prompt"}):
        names = shorten(", ".join(map(ascii, ignored)), 200)
        cli.announce(f"{path} may say {', '.join(AGENT_FORMAT)}; ignored: {names}")
    return {name: tuple(value) if isinstance(value, list) else value
            for name, value in values.items() if name in AGENT_FORMAT or name == "prompt"}


def write_agent(folder, agent):
    """Writes agent.json to the folder of a model. agent: settings with the names of AGENT_FORMAT as attributes, or some
    of them as a dict, as read_agent returns it."""
    if not isinstance(agent, dict):
        agent = {name: getattr(agent, name) for name in AGENT_FORMAT}
    write_atomic(Path(folder, "agent.json"), agent)


# ---------------------------------------------------------------------------------------------------------------------
# The environment

CANNOT_TAKE = "The helper cannot take this: "


class InvalidAction(ValueError):
    """An action whose arguments cannot be carried out; the message is for the agent."""


@dataclass
class Step:
    """One action and what it led to."""
    index: int                      # 0 for the first
    reply: str                      # as it came, at most MAX_REPLY + 1 characters
    fields: dict = field(default_factory=dict)      # entry -> text, without the Action Input
    action: str | None = None
    args: dict = field(default_factory=dict)
    valid: bool = False             # the reply parsed and the arguments were accepted
    error: str = ""                 # why not, one sentence
    observation: str = ""           # what the agent sees
    kind: str = "not an edit"       # the kind of reward, one of reward.KINDS
    outcome: str | None = None      # how the script ended, a key of OUTCOMES; None if none ran
    detail: str = ""                # one sentence about the outcome
    printed: float | None = None    # the validation score that the script printed, not to be believed
    score: float | None = None      # the graded score of the submission that this step's run wrote
    canary_p: float | None = None   # the chance to hold so many planted answers unread; see tasks.flagged
    m_before: float | None = None   # what the last edit before this step scored; at first the starter's score
    m_after: float | None = None    # the same after it: `score` if it was an edit and has one, else m_before
    m_top: float | None = None      # the best of the starter's score and of all edits before this step
    reward: float = 0.0
    seconds: float = 0.0            # of the whole step
    time_left_s: float = 0.0        # of the trajectory, when the step began
    script_seconds: float = 0.0     # of the run, also if its result was known already
    peak_bytes: int = 0             # of the run
    sandbox: str = ""               # the layers that were active in the run
    coder: list = field(default_factory=list)       # what the coder replied, for replay
    messages: list = field(default_factory=list)    # the chat messages that this step added: reply and observation,
#                                                     or the observation alone after a reply that could not be read
    snapshot: dict = field(default_factory=dict)    # the workspace after the step
    ended: str = ""                 # why the trajectory is over now: "final answer", "steps", "time"; "" if it goes on


class Env:
    """One trajectory on one task.

    task: a Task or its id. data: the folder of prepared data. out: where `blobs/` is kept; many Envs may share it.
    actions: names from ACTIONS; without a coder those that need one are left out. fields: the entries of a reply.
    steps, seconds: limits of the trajectory; waiting for a free slot to run a script does not count. coder:
    callable(messages) -> str, a second model for the (AI) actions; its ValueError (a text that does not fit) goes to
    the agent, other errors to the caller. prompt: what prompt() shows of a state, "full" or "short". python, threads,
    sandbox: see execute. gpu: "0,1" gives each script one of these GPUs. cache: the default, a Cache, lies in out.
    """

    def __init__(self, task, data="data", *, out, actions=DEFAULT_ACTIONS, fields=FIELDS, steps=15, seconds=1800,
                 coder=None, prompt="full", python=None, gpu=None, threads=1, sandbox="on", cache=None):
        if prompt not in PROMPTS:
            raise ValueError(f"prompt must be one of {', '.join(PROMPTS)}; found {prompt!r}")
        if unknown := [name for name in actions if name not in ACTIONS]:
            raise ValueError(f"unknown actions {unknown}; known are: {', '.join(ACTIONS)}")
        if not set(fields) <= set(FIELDS) or tuple(fields[-2:]) != FIELDS[-2:]:
            raise ValueError(f"fields must be taken from {FIELDS} and end in the last two; found {tuple(fields)}")
        self.task = tasks.load(task) if isinstance(task, str) else task
        self.info = tasks.info(self.task.id, data=data)
        self.graders = tasks.hash_files(*sorted(Path(tasks.__file__).parent.glob("*.py")),
                                        *self.task.folder.glob("task.py"))
        self.data, self.public = Path(data), (Path(data) / self.task.id / "public").resolve()
        self.blobs, self.cache = Blobs(Path(out) / "blobs"), cache or ResultCache(Path(out) / "cache")
        self.actions = tuple(name for name in actions if coder or name not in NEEDS_CODER)
        self.fields, self.steps, self.seconds, self.coder, self.shown = tuple(fields), steps, seconds, coder, prompt
        self.python, self.gpu, self.threads, self.sandbox = python, gpu, threads, sandbox
        self.reset()

    def reset(self):
        """Back to the starter; returns the messages."""
        starter = {self.task.entry: self.blobs.put(self.task.folder / self.task.entry)}
        problem = PROBLEM.format(task=self.task, limit=self.time_limit_s, problem=self.task.problem.strip(),
                                 steps=self.steps, minutes=self.seconds / 60,
                                 better="higher" if self.task.direction == "up" else "lower")
        self.restore(starter, [{"role": "system", "content": system_prompt(self.actions, self.fields)},
                               {"role": "user", "content": problem}])
        return self.messages

    def snapshot(self):
        """The workspace as {path: sha256}, with what edits have replaced under `.undo/`."""
        return dict(self.files)

    def restore(self, snapshot, messages=None, *, index=0, m_before=None, m_top=None, seconds=None):
        """Continues from a recorded state: the workspace before step `index`, the messages so far, what the last edit
        scored (default: the starter's score), the best score of an edit or the starter (default: the better of these
        two) and the seconds left (default: all). ValueError: it is no snapshot. Gone: a file is missing or damaged, or
        they are too many."""
        check_snapshot(snapshot)
        sizes = {path: self.blobs.path(sha).stat().st_size for path, sha in snapshot.items()}
        if sum(size for path, size in sizes.items() if not path.startswith(UNDO)) > MAX_BYTES:
            raise MissingBlob(f"the files of this state have more than {MAX_BYTES >> 20} MiB")
        self.files, self.index = dict(snapshot), index
        self.messages = [dict(message) for message in (self.messages if messages is None else messages)]
        self.m_before = self.info["m_init"] if m_before is None else m_before
        self.m_top = best_of(self.task.direction, self.info["m_init"], self.m_before, m_top)
        self.deadline = time.monotonic() + (self.seconds if seconds is None else seconds)
        self.ended = ""

    def prompt(self):
        """The chat messages that the policy is shown for its next reply."""
        return prompt_of(self.shown, self.task, self.messages, self.files, self.blobs)

    @property
    def time_limit_s(self):
        """Seconds that one run of a script may take."""
        return min(self.task.time_limit_s, tasks.MINIATURE_S if self.info.get("miniature") else math.inf)

    @property
    def done(self):
        return bool(self.ended)

    def step(self, reply, tokens=None):
        """Carries out a reply, whatever it is, and returns the Step. tokens: the sampled ids that spell the reply, kept
        in the messages so that its text is not encoded again. After the end nothing is done, and the Step says so."""
        started = time.monotonic()
        reply = plain(reply[:MAX_REPLY + 1])
        step = Step(self.index, reply, m_before=self.m_before, m_top=self.m_top, time_left_s=self.deadline - started)
        if self.done:
            step.kind, step.error, step.ended = "invalid", "The trajectory is over; nothing was done.", self.ended
            step.observation, step.m_after, step.snapshot = step.error, self.m_before, self.snapshot()
            return step
        step.fields, step.action, step.args, unread = parse(reply, self.fields, self.actions)
        try:
            if unread:
                raise InvalidAction(unread)
            if step.time_left_s > 0:
                name = step.action.lower().replace(" (ai)", "_ai").replace(" ", "_")
                step.observation, step.valid = getattr(self, f"_{name}")(step, **step.args), True
            else:
                step.kind, step.observation = "limit", "The time for this work was over before this reply."
        except InvalidAction as error:
            step.kind, step.error, step.observation = "invalid", str(error), f"Nothing was done. {error}"
        except OSError as error:
            if error.errno not in NO_SPACE:
                raise
            step.kind, step.outcome, step.valid = "limit", "disk full", True
            step.detail = f"This machine could not store the files: {error.strerror}."
            step.observation = f"{step.detail} {OUTCOMES['disk full'][1]}"
        self.index += 1
        if step.kind == "scored" and step.score is not None:    # what else is run says nothing about the last edit
            self.m_before = step.score
            self.m_top = best_of(self.task.direction, self.m_top, step.score)
        step.m_after, left = self.m_before, self.deadline - time.monotonic()
        self.ended = self.ended or ("time" if left <= 0 else "steps" if self.index >= self.steps else "")
        step.observation = shorten(step.observation, MAX_OBSERVATION)
        if not self.ended:
            step.observation += f"\n[{self.steps - self.index} steps and {left / 60:.0f} min left]"
        step.reward = reward(step.kind, step.m_before, step.score, m_top=step.m_top, m_init=self.info["m_init"],
                             m_best=self.info["m_best"], direction=self.task.direction, alpha=self.task.alpha)
        step.messages = [{"role": "user", "content": step.observation}]
        if unread:      # as in MLAgentBench it is not kept: a model that sees its own slips repeats them
            step.messages[0]["content"] += "\nYour last reply is dropped. Reply again in the form of the examples."
        else:
            step.messages.insert(0, {"role": "assistant", "content": cut_observation(reply)})
            if tokens is not None and step.messages[0]["content"] == reply:
                step.messages[0]["tokens"] = list(tokens)
        self.messages += step.messages
        step.snapshot, step.ended, step.seconds = self.snapshot(), self.ended, time.monotonic() - started
        return step

    # Files. A path is a normalised text below the workspace. "data/..." are the public files: outside it, only read.

    def _path(self, text, write=False):
        """The normalised path, "" for the workspace itself; Refused if it leads out of it or must not be written."""
        text, shown = text.strip(), shorten(repr(text), 80)
        if not text.isprintable() or len(text) > 300 or any(len(part.encode()) > 100 for part in text.split("/")):
            raise InvalidAction(f"{shown} is not a usable file name.")
        if text.startswith(("/", "~")) or ".." in text.split("/"):
            raise InvalidAction(f"{shown} is outside the workspace; name files relative to it, such as {self.task.entry}.")
        path = "/".join(part for part in text.split("/") if part not in ("", "."))
        if path[:1] in ("~", "-"):      # the interpreter would take it for an option
            raise InvalidAction(f"{shown} is not a usable file name: it begins with {path[0]!r}.")
        if write and (not path or text.endswith("/") or any(name.startswith(path + "/") for name in self.files)):
            raise InvalidAction(f"{shown} is a folder, not a file.")
        if f"{path}/".startswith(UNDO) or write and self._public(path):
            raise InvalidAction(f"{shown} is read-only.")
        if write and (file := next((name for name in self.files if path.startswith(name + "/")), None)):
            raise InvalidAction(f"{shown} cannot be written: {file} is a file, not a folder.")
        return path

    def _public(self, path):
        """The real place of "data" or "data/...", None for other paths. Symlinks are followed inside data only."""
        if path != "data" and not path.startswith("data/"):
            return None
        real = (self.public / path[5:]).resolve()
        if not real.is_relative_to(self.public):
            raise InvalidAction(f"{path} leads outside the data folder.")
        return real

    def _file(self, path):
        """The place of a file's contents; Refused if there is no such file."""
        real = self._public(path)
        if real and real.is_file():
            return real
        if path in self.files:
            return self.blobs.path(self.files[path])
        if not path or real and real.is_dir() or any(name.startswith(path + "/") for name in self.files):
            raise InvalidAction(f"{path or '.'} is a folder, not a file.")
        here = sorted(name for name in self.files if not name.startswith(UNDO))
        raise InvalidAction(f"There is no file {path}; the workspace holds {', '.join(here[:20])}, data/.")

    def _text(self, path, edit=False):
        """(text, size in bytes) of a file, of which the first MAX_READ bytes are looked at. Refused for binary files
        and, for an edit, if it is not UTF-8 or larger than MAX_SCRIPT."""
        file = self._file(path)
        size = file.stat().st_size
        content = read_start(file, MAX_READ)
        text = content.decode("utf-8", "replace")
        if b"\0" in content[:8192] or text.count("\ufffd") > len(text) // 10:
            raise InvalidAction(f"{path} is a binary file of {size:,} bytes that starts with {content[:8].hex(' ')}; "
                          "it cannot be shown. Read it in a script.")
        if edit and (size > MAX_SCRIPT or text.encode() != content):
            raise InvalidAction(f"{path} cannot be edited: it must be UTF-8 text of at most {MAX_SCRIPT:,} bytes.")
        return text, size

    def _write(self, path, content):
        """Puts bytes, or the contents of a file, at a path; what was there is kept for Undo Edit Script. Refused: the
        workspace is full."""
        sha = self.blobs.put(content)
        after = {name: each for name, each in self.files.items() if not name.startswith(UNDO)} | {path: sha}
        if len(after) > MAX_FILES or sum(self.blobs.path(each).stat().st_size for each in after.values()) > MAX_BYTES:
            raise InvalidAction(f"The workspace is full: it may hold {MAX_FILES:,} files and {MAX_BYTES >> 20:,} MiB.")
        if path in self.files:
            kept = sorted((int(name.split("/")[1]), name) for name in self.files if name.startswith(UNDO))
            if len(kept) == MAX_UNDO:
                del self.files[kept[0][1]]
            self.files[f"{UNDO}{kept[-1][0] + 1 if kept else 1}/{path}"] = self.files[path]
        self.files[path] = sha

    def _edited(self, step, path, old, new):
        """Makes an edit and scores it; returns its observation, the difference. Refused: it makes the file too large
        for another edit."""
        if old == new:
            return f"{path} is as it was: the edit changes nothing."
        content = new.encode()
        if len(content) > MAX_SCRIPT:
            raise InvalidAction(f"{path} would have {len(content):,} bytes; a script may have {MAX_SCRIPT:,}.")
        self._write(path, content)
        self._score_into(step)
        return "\n".join([f"{path} is saved. The difference:", *difference(old, new)])

    # Actions. Each takes the Step, for what a run gave, and the arguments, and returns the observation.

    def _list_files(self, step, dir_path):
        path = self._path(dir_path)
        prefix, real, size_of = path + "/" if path else "", self._public(path), {}
        if real and real.is_dir():
            with os.scandir(real) as entries:
                size_of = {entry.name + "/" * entry.is_dir(): entry.stat for entry in entries
                           if not entry.is_symlink() or os.path.exists(entry.path)}
        else:
            for name, sha in self.files.items():
                if name.startswith(prefix) and not name.startswith(UNDO):
                    first, slash, _ = name[len(prefix):].partition("/")
                    size_of[first + slash] = self.blobs.path(sha).stat
            if not path:
                size_of["data/"] = None
        if not size_of:
            raise InvalidAction(f"There is no folder {path}.")
        lines = [name if name.endswith("/") else f"{name}  {size_of[name]().st_size:,} bytes"
                 for name in sorted(size_of)[:100]]
        return "\n".join(lines + [f"... and {len(size_of) - 100:,} more"] * (len(size_of) > 100))

    def _inspect_script_lines(self, step, script_name, start_line_number, end_line_number):
        path = self._path(script_name)
        text, size = self._text(path)
        lines, first, last = text.splitlines(), int(start_line_number), int(end_line_number)
        if not 1 <= first <= min(last, max(1, len(lines))):
            raise InvalidAction(f"Lines {first} to {last} cannot be shown: {path} has {len(lines):,} lines.")
        shown = [shorten(line, MAX_OBSERVATION - 1000) for line in lines[first - 1:min(last, first - 1 + MAX_LINES)]]
        while len(shown) > 1 and len("\n".join(shown)) >= MAX_OBSERVATION - 200:
            shown.pop()
        more = f" (those of its first {MAX_READ:,} bytes)" if size > MAX_READ else ""
        return "\n".join([f"Lines {first} to {first + len(shown) - 1} of {len(lines):,}{more} of {path}:", *shown])

    def _understand_file(self, step, file_name, things_to_look_for):
        path = self._path(file_name)
        text, size = self._text(path)
        return self._ask(step, f"Read the file {path} ({size:,} bytes). Report shortly, quote the lines that matter, "
                               "guess nothing, and say what you could not find.\n\nLook for: "
                               f"{things_to_look_for}\n\n```\n{shorten(text, MAX_CODER)}\n```")

    def _edit_script_ai(self, step, script_name, edit_instruction, save_name):
        path, target = self._path(script_name), self._path(save_name, write=True)
        source = self._text(path, edit=True)[0]
        old = self._text(target, edit=True)[0] if target in self.files else ""
        answer = self._ask(step, f"This is the Python script {path}:\n```python\n{source}\n```\n\nChange it as "
                                 f"follows, and nothing else:\n{edit_instruction}\n\nAnswer with the whole changed "
                                 "script in one ```python block.")
        code = re.split(r"^[ \t]*```.*\n?", answer, maxsplit=2, flags=re.MULTILINE)  # before, inside, after the block
        if len(code) < 3 or not code[1].strip():
            return "The helper returned no whole script; nothing was changed. Ask for something simpler."
        return self._edited(step, target, old, code[1].strip("\n") + "\n")

    def _ask(self, step, question):
        """One question to the coder; its reply is kept in the step, as it is if it can be a text of ours."""
        try:
            answer = self.coder([{"role": "user", "content": question}])
            if not isinstance(answer, str):
                raise ValueError(f"its answer is no text but of type {type(answer).__name__}")
        except ValueError as error:
            raise InvalidAction(CANNOT_TAKE + shorten(plain(str(error)), 200)) from error
        step.coder.append(plain(answer[:MAX_SCRIPT + 1]))
        if len(answer) > MAX_SCRIPT:
            raise InvalidAction(f"The helper's answer is longer than {MAX_SCRIPT:,} characters; ask for less.")
        return step.coder[-1]

    def _replace_in_script(self, step, script_name, find, replace):
        path = self._path(script_name, write=True)
        old = self._text(path, edit=True)[0]
        place = old.find(find) if find else -1
        if place < 0:
            raise InvalidAction(f'"find" does not occur in {path}; copy it exactly as Inspect Script Lines shows it.')
        if old.find(find, place + 1) >= 0:      # also where the two overlap
            raise InvalidAction(f'"find" occurs {max(2, old.count(find))} times in {path}, not once; take in more of the '
                          "lines around it.")
        return self._edited(step, path, old, old[:place] + replace + old[place + len(find):])

    def _undo_edit_script(self, step, script_name):
        path = self._path(script_name, write=True)
        numbers = [int(name.split("/")[1]) for name in self.files
                   if name.startswith(UNDO) and name.split("/", 2)[2] == path]
        if not numbers:
            raise InvalidAction(f"There is no edit of {path} to undo.")
        before = self.files.get(path)
        self.files[path] = self.files.pop(f"{UNDO}{max(numbers)}/{path}")
        if self.files[path] == before:
            return f"{path} is as it was: the edit changed nothing."
        self._score_into(step)
        old, new = (read_start(self.blobs.path(sha), MAX_SCRIPT).decode("utf-8", "replace") if sha else ""
                    for sha in (before, self.files[path]))
        return "\n".join([f"{path} is saved. The difference:", *difference(old, new)])

    def _copy_file(self, step, source, destination):
        origin, target = self._path(source), self._path(destination, write=True)
        if (file := self._file(origin)).stat().st_size > MAX_BYTES // 2:
            raise InvalidAction(f"{origin} is too large to be copied; scripts can read it where it is.")
        if origin != target:
            self._write(target, file)
            if target == self.task.entry:
                self._score_into(step)
        return f"{origin} is copied to {target}."

    def _execute_script(self, step, script_name):
        path = self._path(script_name)
        if self._file(path) and path not in self.files:
            raise InvalidAction(f"{path} is data; only scripts in the workspace can be executed.")
        if self._is_too_large(path):
            raise InvalidAction(f"{path} is no script: it has more than {MAX_SCRIPT:,} bytes.")
        result, files = self._run_into(step, path)
        if files is not None:
            self.files = files | {name: sha for name, sha in self.files.items() if name.startswith(UNDO)}
        step.kind = "not an edit" if step.kind == "scored" else step.kind
        ending = "ran to the end in" if result.outcome == "ok" else f"ended with: {result.outcome}, after"
        parts, room = [f"{path} {ending} {result.seconds:.1f} s."], MAX_OBSERVATION - 1000
        if result.exit_code == 0:
            parts.append(shorten(result.stdout.strip() or result.stderr.strip() or "It printed nothing.", room))
        else:  # what it printed before the error stays
            parts += [shorten(text.strip(), room // 2) for text in (result.stdout, result.stderr) if text.strip()]
        missing = re.match(r"ModuleNotFoundError: No module named '([^']{1,60})'", result.detail)
        if missing:
            parts.append(f"The package {missing[1]} is not installed and cannot be; do without it.")
        elif result.outcome != "ok":
            parts.append(f"{shorten(result.detail, 300)} {OUTCOMES[result.outcome][1]}".strip())
        text = "\n".join(parts)
        known = any(text in message["content"] for message in self.messages)
        return text + "\nYou have seen this result: nothing has changed since. Edit the script first." * known

    def _final_answer(self, step, final_answer):
        self.ended = "final answer"
        return "The work is ended."

    # Running and scoring

    def score(self):
        """(graded score or None, Result): the entry script, run in a copy of the workspace with the task's own time
        limit. Changes nothing."""
        result, score, _ = self._run(self.task.entry, WALL_FACTOR * self.time_limit_s)
        return score, result

    def _score_into(self, step):
        """Scores the workspace after an edit; the agent sees nothing of it."""
        entry = self.task.entry
        if entry not in self.files or self._is_too_large(entry):    # a script has done that
            step.kind = "failed"
            step.detail = f"There is no {entry}, or it has more than {MAX_SCRIPT:,} bytes."
        else:
            self._run_into(step, entry)

    def _is_too_large(self, script):
        return self.blobs.path(self.files[script]).stat().st_size > MAX_SCRIPT

    def _run_into(self, step, script):
        """Runs a script in the time that is left and notes in the step what came of it. (Result, files), as _run."""
        result, score, files = self._run(script, max(0.0, min(WALL_FACTOR * self.time_limit_s,
                                                                 self.deadline - time.monotonic())))
        step.outcome, step.detail, step.kind = result.outcome, result.detail, OUTCOMES[result.outcome][0]
        step.score = score
        step.printed, step.script_seconds = printed_metric(result.stdout, self.task.metric), result.seconds
        step.peak_bytes, step.sandbox, step.canary_p = result.peak_bytes, result.sandbox, result.canary_p
        return result, files

    def _run(self, script, timeout_s):
        """(Result, graded score or None, files afterwards or None if they stay as they were): one script in a temporary
        copy of the workspace. It depends on the state alone, so it is kept: to run a script whose edit was scored costs
        nothing. The entry script starts without an old submission.csv; after another script a new one is graded."""
        before = {path: sha for path, sha in self.files.items() if not path.startswith(UNDO)}
        if script == self.task.entry:
            before.pop("submission.csv", None)
        key, waiting = self._key(script, before), time.monotonic()
        with self.cache.alone(key):
            self.deadline += time.monotonic() - waiting
            return self._run_alone(script, before, key, timeout_s)

    def _run_alone(self, script, before, key, timeout_s):
        """As _run, of the workspace `before`, while no other thread runs the same."""
        if known := self._known(key):
            self.cache.count("hits")
            if random.random() < self.cache.recheck:
                self.cache.count("rechecked")
                result, score, _ = self._run_now(script, before, WALL_FACTOR * self.time_limit_s)
                outcomes, scores = [known[0].outcome, result.outcome], [known[1], score]
                if outcomes[0] != outcomes[1] or scores[0] != scores[1]:
                    self.cache.moved.append({"task": self.task.id, "script": before[script], "outcome": outcomes,
                                             "score": scores})
            return known
        self.cache.count("runs")
        result, score, after = self._run_now(script, before, timeout_s)
        if result.limit:    # not wall time, nor slow first imports
            comes_again = result.limit in ("memory", "processes") or result.limit == "cpu" and result.warm
        else:               # a signal may be the kernel's, for lack of memory
            comes_again = result.exit_code >= 0 and result.outcome != "disk full"
        if comes_again:
            self.cache.put(key, {"result": dataclasses.asdict(result), "score": score, "after": after})
        return result, score, after

    def _known(self, key):
        """What the cache has, as _run; None if that is nothing, is not what a run gives, or its files are gone."""
        try:
            entry = self.cache.get(key)
            json.dumps(entry, ensure_ascii=False).encode()      # no half of a surrogate pair
            check_types(entry["result"], TYPES[Result], TYPES[Result].keys())
            result, score, after = Result(**entry["result"]), entry["score"], entry["after"]
            if after is not None:
                check_snapshot(after)
                for sha in after.values():
                    self.blobs.path(sha)
        except (TypeError, KeyError, ValueError):
            return None
        fits = (result.outcome == "ok" or score is None) and (result.outcome != "ok" or after is not None)
        return (result, score, after) if fits and _fits(score, float | None) else None

    def _key(self, script, before):
        """Stands for all that a run depends on: files, data, grader, limits, versions, what it runs on."""
        data = {name: value for name, value in self.info.items() if name not in ("m_init", "starter_seconds")}
        parts = [script, sorted(before.items()), data, self.graders, [self.time_limit_s, "cpu"],
                 self.task.memory_limit_bytes,
                 describe(self.python or sys.executable)[2], self.threads, bool(self.gpu),
                 protection() if self.sandbox == "on" else self.sandbox]
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()

    def _run_now(self, script, before, timeout_s):
        """As _run, for a workspace that holds the files `before`, whatever is known already."""
        score, after, waiting = None, None, time.monotonic()
        with SLOTS.take(self.threads, self.gpu) as gpu:
            self.deadline += time.monotonic() - waiting
            folder = Path(tempfile.mkdtemp(prefix="ml-agent-run-"))
            try:
                public = _stamps(self.public)
                self._build(folder, before)
                result = execute(script, folder, python=self.python, timeout_s=timeout_s, gpu=gpu,
                                 cpu_s=self.time_limit_s * self.threads,
                                 memory_bytes=self.task.memory_limit_bytes, threads=self.threads,
                                 sandbox=self.sandbox, readable=[self.public], hidden=[self.public.parent / "private"],
                                 temporary=True)
                if _stamps(self.public) != public:
                    raise RuntimeError(f"{script} has changed the public data in {self.public}; prepare them again: "
                                       f"python -m tasks prepare {self.task.id} --force")
                result = dataclasses.replace(result, **{  # the folder's name is random
                    name: getattr(result, name).replace(f"{folder}/", "") for name in ("stdout", "stderr", "detail")})
                if result.outcome in ("ok", "error"):
                    after = self._collect(folder)
                    if after is None:
                        detail = f"It left more than {MAX_FILES} files or {MAX_BYTES >> 20} MiB; nothing was kept."
                        result = dataclasses.replace(result, outcome="disk full", detail=detail)
                if result.outcome == "ok" and (
                        script == self.task.entry or after.get("submission.csv") != before.get("submission.csv")):
                    outcome, detail, score, canary_p = self._grade(folder / "submission.csv")
                    result = dataclasses.replace(result, outcome=outcome, detail=detail, canary_p=canary_p)
            finally:
                _discard(folder)
        return result, score, after

    def _grade(self, submission):
        """(outcome, detail, graded score or None, canary_p or None) of a run that ended well."""
        if not os.path.lexists(submission):
            return "no submission", "The script ended without writing submission.csv.", None, None
        try:
            return "ok", "", *tasks.judge(self.task.id, submission, data=self.data)
        except tasks.InvalidSubmission as error:
            return "invalid submission", f"submission.csv is not valid: {error}", None, None

    def _build(self, folder, files):
        """Writes the files to a folder. `data` is a folder of links to the public files: what a script adds is lost."""
        for path, sha in files.items():
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(self.blobs.path(sha), folder / path)
        (folder / "data").mkdir()
        for name in os.listdir(self.public):
            (folder / "data" / name).symlink_to(self.public / name)

    def _collect(self, folder):
        """{path: sha256} of the regular files that a script has left, None if they are too many or too large. Left out
        are links, pipes, what cannot be read, and what has no usable name."""
        with contextlib.suppress(OSError):      # the script may have locked it
            os.chmod(folder, 0o700)
        for store in (False, True):     # it is known to be not too much before any of it is stored
            found, total = {}, 0
            for number, (path, parent, entry) in enumerate(_entries(folder), 1):
                try:
                    if path and entry.is_file(follow_symlinks=False):
                        with _open(entry.name, parent) as file:
                            total += os.fstat(file.fileno()).st_size
                            found[path] = self.blobs.put(os.dup(file.fileno())) if store else None
                except OSError as error:    # it may not be read, or it changes or is gone meanwhile
                    if error.errno in NO_SPACE:
                        raise
                if number > 10 * MAX_FILES or len(found) > MAX_FILES or total > MAX_BYTES:
                    return None
        return found


def _entries(folder):
    """Yields (path, descriptor of its folder, os.DirEntry) of all that is below a folder; the path is "" for what has
    no usable name, in which nothing is looked up either, so no tree is too deep. No link is followed."""
    stack = []      # (prefix of paths, descriptor, entries) from the folder down to the one that is read now

    def look(prefix, name, parent=None):
        """Puts a folder on the stack, unless it cannot be read."""
        with contextlib.suppress(OSError):
            descriptor = os.open(name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=parent)
            stack.append((prefix, descriptor, os.scandir(descriptor)))

    try:
        look("", folder)
        while stack:
            prefix, parent, entries = stack[-1]
            if (entry := next(entries, None)) is None:
                os.close(stack.pop()[1])
                continue
            path = prefix + entry.name
            path = path if usable(path) else ""
            yield path, parent, entry
            if path and entry.is_dir(follow_symlinks=False):
                look(path + "/", entry.name, parent)
    finally:
        for _, descriptor, _ in stack:
            os.close(descriptor)


def _stamps(folder):
    """Names, sizes and times of a folder's entries: enough to see that a script has written to shared data. None: that
    cannot be told."""
    with contextlib.suppress(OSError), os.scandir(folder) as entries:
        found = [(entry.name, entry.stat(follow_symlinks=False)) for entry in entries]
        return sorted((name, each.st_size, each.st_mtime_ns) for name, each in found)


# ---------------------------------------------------------------------------------------------------------------------
# Records and replay. A trajectory file holds one JSON object a line: a header, the steps, and at most an "end".

SETTINGS = ("actions", "fields", "steps", "seconds", "python", "gpu", "threads", "sandbox")     # of an Env


def header(env, **more):
    """The first line, to be written right after reset(). more: the caller's own entries (model, seed)."""
    return {"type": "header", "task": env.task.id, "data": str(env.data), "prompt": env.shown,
            **{name: getattr(env, name) for name in SETTINGS}, "m_init": env.info["m_init"],
            "m_best": env.info["m_best"], "miniature": bool(env.info.get("miniature")), "snapshot": env.snapshot(),
            "messages": list(env.messages), **more}


def record(step, **more):
    """The line of a step. The state before step i: the snapshot of step i - 1, or the header's; the header's messages
    and those of all steps before i; m_before and m_top of step i."""
    return {"type": "step", **dataclasses.asdict(step), **more}


RECORDED = {    # what a line of a trajectory's file has at least, and the types of what we write into one
    "header": (("task", "messages", "snapshot", "m_init"), {
        "task": str, "data": str, "prompt": str, "actions": list, "fields": list, "steps": int, "seconds": float,
        "python": str | None, "gpu": str | None, "threads": int, "sandbox": str, "m_init": float, "m_best": float,
        "miniature": bool, "k": int, "seed": int, "max_new_tokens": int, "m_after": float, "seconds_left": float,
        "temperature": float, "top_p": float, "model": str, "expert": str, "tokenizer": str | None, "ideas": list,
        "data_sha256": dict}),
    "step": (("messages", "snapshot", "valid", "m_before", "m_after", "ended"), {
        "seconds_left": float, "tokens": int | None, "prompt_tokens": int | None, "cached_tokens": int | None,
        "sample_seconds": float | None, "finish": str | None}),
    "end": (("ended",), {"ended": str, "detail": str})}
TYPES = {cls: {each.name: each.type for each in dataclasses.fields(cls)} for cls in (Result, Step)}
RECORDED["step"][1].update({**TYPES[Step], "m_before": float, "m_after": float})     # a state has a score
CHOICES = {"prompt": PROMPTS, "actions": ACTIONS, "kind": KINDS, "outcome": OUTCOMES}


def _fits(value, kind):
    """Whether a value from JSON is of a type; in a list or dict all must be texts."""
    if kinds := getattr(kind, "__args__", None):
        return any(_fits(value, each) for each in kinds)
    if kind is float:
        return type(value) in (int, float) and abs(value) <= sys.float_info.max     # not so NaN
    if kind is int:
        return type(value) is int and abs(value) < 1 << 63
    if kind is list:
        return type(value) is list and all(_fits(each, str) for each in value)
    if kind is dict:
        return type(value) is dict and all(_fits(each, str) for pair in value.items() for each in pair)
    return isinstance(value, kind)


def check_types(values, types, needed):
    """ValueError, one sentence, unless a dict from JSON has all that is needed, and all of the right types."""
    if type(values) is not dict:
        raise ValueError("it is no JSON object")
    for name in needed:
        if name not in values:
            raise ValueError(f'its entry "{name}" is missing')
    for name, kind in types.items():
        if name not in values or name in ("messages", "snapshot"):
            continue
        value = values[name]
        if not _fits(value, kind) and not (name == "printed" and type(value) is float):     # NaN too: it is only shown
            expected = getattr(kind, "__name__", str(kind))
            raise ValueError(f'its entry "{name}" must be of type {expected}; found {shorten(ascii(value), 60)}')
        for each in value if type(value) is list else [value]:
            if name in CHOICES and each is not None and each not in CHOICES[name]:
                raise ValueError(f'its entry "{name}" must be one of {", ".join(CHOICES[name])}; found '
                                 f"{shorten(ascii(each), 60)}")


def check_record(line, first):
    """ValueError, one sentence, unless `line` is what header(), record() or an end wrote, as JSON gives it back. It may
    come from anybody: a text is a text, a number a number, a snapshot names files of a workspace. first: it must be the
    header."""
    if type(line) is not dict:
        raise ValueError("it is no JSON object")
    kind = line.get("type")
    if kind not in (("header",) if first else ("step", "end")):
        raise ValueError(f"its type is {shorten(ascii(kind), 60)}")
    needed, types = RECORDED[kind]
    check_types(line, types, needed)
    if kind == "end":
        return
    check_snapshot(line["snapshot"])
    if type(line["messages"]) is not list:
        raise ValueError('its entry "messages" is no list')
    for message in line["messages"]:
        if not (type(message) is dict and {"role", "content"} <= set(message) <= {"role", "content", "tokens"}
                and message["role"] in ("system", "user", "assistant") and _fits(message["content"], str)
                and plain(message["content"]) == message["content"]):
            raise ValueError('its entry "messages" must hold {"role", "content"} alone, and texts in them')
        tokens = message.get("tokens", [])
        if type(tokens) is not list or not all(type(each) is int and 0 <= each < 1 << 31 for each in tokens):
            raise ValueError('its entry "messages" has "tokens" that are no list of ids')
    if kind == "header" and not re.fullmatch(r"\w[\w.-]{0,99}", line["task"]):
        raise ValueError(f'its entry "task" is {shorten(ascii(line["task"]), 60)}, which is no id of a task')
    fields = line.get("fields", FIELDS) if kind == "header" else FIELDS
    if not set(fields) <= set(FIELDS) or tuple(fields[-2:]) != FIELDS[-2:]:
        raise ValueError(f'its entry "fields" must be taken from {", ".join(FIELDS)} and end in the last two')
    if kind == "step" and not line["messages"]:
        raise ValueError('its entry "messages" is empty')
    for name in ("steps", "seconds", "threads") if kind == "header" else ():
        if line.get(name, 1) <= 0:
            raise ValueError(f'its entry "{name}" must be above 0; found {line[name]}')


def read_trajectory(path):
    """(header, [step, ...]) of a trajectory file. ValueError names the line that is no record, and what is wrong."""
    records = []
    with _open(os.path.realpath(path)) as file:
        lines = file.read().rstrip().split(b"\n")
    for number, line in enumerate(lines, 1):
        try:
            records.append(json.loads(line))
            check_record(records[-1], number == 1)
        except (ValueError, RecursionError) as error:
            if number == 1 and not line.strip():
                raise ValueError(f"{path} is empty; a trajectory starts with a header") from None
            raise ValueError(f"{path}, line {number} is no record of a trajectory: {error}") from error
    return records[0], [each for each in records[1:] if each["type"] == "step"]


def best_before(task, head, steps):
    """The best score that a recorded trajectory had before what follows `steps`: the starter's, or an edit's."""
    return best_of(task.direction, head["m_init"], *(step["m_after"] for step in steps))


# ---------------------------------------------------------------------------------------------------------------------
# Playing with a policy: one trajectory, and many at a time

CODER_TOKENS = 4096     # a reply of the coder may have: it writes whole scripts
CODE_END = "\n```\n"    # the line that ends a script in a reply

USED = {        # what a line of a trajectory must have to be gone on with, counted and shown
    "header": ("m_after", "seconds_left", "miniature"),
    "step": ("seconds_left", "reply", "error", "observation", "detail", "sandbox", "action", "outcome", "kind", "printed",
             "score", "canary_p", "index", "reward", "seconds", "script_seconds", "coder", "fields", "args"),
    "end": ()}


def trajectory_path(folder, id, k):
    return Path(folder, f"{id}-{k}.jsonl")


def trajectory_files(folder):
    """The files of the trajectories in a folder of eval.py or sft.py --collect, those of a task in order."""
    found = [*Path(folder).glob("trajectories/*-*.jsonl"), *Path(folder).glob("*-*.jsonl")]
    named = [(*path.stem.rpartition("-")[::2], path) for path in found]
    return [path for id, k, path in sorted(named, key=lambda one: (one[0], len(one[1]), one[1]))
            if re.fullmatch(r"[\w.-]+ \d{1,9}", f"{id} {k}", re.ASCII)]


def read_record(path, mend=True):
    """The lines of a trajectory's file, as read_lines; each is checked to be a record of this task."""
    try:
        lines = read_json_lines(path, {}, mend)
        for i, line in enumerate(lines, 1):
            try:
                check_record(line, i == 1)
            except ValueError as error:
                raise ValueError(f"{path}, line {i} is no record of a trajectory: {error}") from None
            if missing := [name for name in USED[line["type"]] if name not in line]:
                raise ValueError(f"{path}, line {i}: {missing[0]!r} is missing")
        if lines:
            check_form(lines[0]["task"], one_of(path.stem.rpartition("-")[0]), f"{path}, line 1, 'task'")
    except ValueError as error:
        raise ValueError(f"{error}; delete that file to play it again") from None
    return lines


def end_reason(lines):
    """Why the trajectory is over ("final answer", "steps", "time", "context full"), "" if it is not."""
    return lines[-1].get("ended", "") if lines else ""


def make_env(s, task, out, cache, **more):
    """The Env of a task by what the settings of eval.py and sft.py have in common."""
    return Env(task, s.data, out=out, python=s.python, gpu=s.gpu or None, threads=s.threads, sandbox=s.sandbox,
               cache=cache, **more)


def model_policy(s, model, hint=""):
    """How a model replies in trajectory(). hint: said to it besides; the record of the trajectory is without it."""
    def reply(env, lines, seed):
        prompt = [dict(message) for message in env.prompt()]
        next(one for one in prompt if one["role"] == "user")["content"] += hint
        said = model.chat(prompt, max_new_tokens=s.max_new_tokens, stop=("\nObservation:",), seed=seed,
                          temperature=s.temperature, top_p=s.top_p)
        tokenizer = getattr(model, "tokenizer", None)       # a server keeps its own
        return said.text, tokenizer and tokenizer.spelling(said.tokens, said.text), {
            "finish": said.finish, "tokens": len(said.tokens), "prompt_tokens": said.prompt_tokens,
            "cached_tokens": said.cached_tokens, "sample_seconds": said.seconds}
    return reply


def play_trajectory(s, task, k, path, reply, coder, out, cache, run, about):
    """Plays trajectory k of a task to its end, from the last step in its file `path`, where it adds a line a step.
    reply(env, lines, seed): what the agent says after these lines, (text, token ids or None, {what its line is to tell
    besides}). coder: what sample.load gave, or None. out, cache: where files and what scripts gave are kept, shared by
    all. run: the Run that writes the lines, and that may stop it. about: what else the header tells."""
    def seed(speaker):  # differs between trajectories, steps and speakers; the same again after an interruption
        return zlib.crc32(f"{s.seed} {task.id} {k} {env.index} {speaker}".encode())

    def ask_coder(messages):
        said = coder.chat(messages, max_new_tokens=CODER_TOKENS, stop=CODE_END, seed=seed("coder"), **sampling)
        return said.text + CODE_END * (said.finish == "stop")       # a whole script, without what is said after it

    lines, sampling = read_record(path), dict(temperature=s.temperature, top_p=s.top_p)
    env = make_env(s, task, out, cache, actions=s.actions, fields=s.fields, steps=s.steps, seconds=s.seconds,
                coder=coder and ask_coder,
                prompt=s.prompt_format if hasattr(s, "prompt_format") else s.prompt)
    if lines:
        last, messages = lines[-1], [message for line in lines for message in line["messages"]]
        try:
            env.restore(last["snapshot"], messages, index=len(lines) - 1, m_before=last["m_after"],
                        m_top=best_before(task, lines[0], lines[1:]), seconds=min(last["seconds_left"], s.seconds))
        except ValueError as error:
            raise RunError(f"{path}: its last state cannot be restored: {error}. Delete it to play it anew") from None
    else:
        lines = [header(env, k=k, seed=s.seed, max_new_tokens=s.max_new_tokens, m_after=env.m_before,
                        seconds_left=s.seconds, **sampling, **about)]
        run.write(path, lines[0])
    while not (env.done or run.stop.is_set()):
        try:
            text, tokens, more = reply(env, lines, seed("policy"))
        except ContextFull as error:
            return run.write(path, {"type": "end", "ended": "context full", "detail": str(error)})
        step = env.step(text, tokens=tokens)
        lines.append(record(step, seconds_left=env.deadline - time.monotonic(), **more))
        run.write(path, lines[-1])


class Progress:
    """What the threads of one run share: where they report, and how they are stopped."""

    def __init__(self, records, num_steps):
        """records: {path: the lines it holds} of every trajectory, each of at most num_steps."""
        self.stop, self.lock, self.start, self.tokens = threading.Event(), threading.Lock(), time.monotonic(), 0
        self.num_steps, self.over = num_steps, {path for path, lines in records.items() if end_reason(lines)}
        self.steps = {path: sum(line["type"] == "step" for line in lines) for path, lines in records.items()}
        self.share_before = self.share()

    def write(self, path, line):
        """Appends a line to a trajectory's file, unless all was stopped: each line is whole, and none follows."""
        with self.lock:
            if self.stop.is_set():
                return
            with path.open("a") as file:
                file.write(json.dumps(line) + "\n")
            self.steps[path] += line["type"] == "step"
            self.tokens += line.get("tokens") or 0
            self.over |= {path} if line.get("ended") else set()

    def share(self):
        """What is done of all, 0 to 1, if each trajectory that is not over needs all its steps."""
        done = [1.0 if path in self.over else steps / self.num_steps for path, steps in self.steps.items()]
        return sum(done) / len(done)

    def line(self):
        """The progress in one line."""
        with self.lock:
            seconds, share = time.monotonic() - self.start, self.share()
        won = share - self.share_before
        return (f"{len(self.over)}/{len(self.steps)} trajectories, {sum(self.steps.values())} steps, "
                + f"{self.tokens / seconds:.1f} tokens/s, " * bool(self.tokens)      # an endpoint does not tell
                + f"{timedelta(seconds=int(seconds))} elapsed"
                + (f", ETA {timedelta(seconds=int(seconds * (1 - share) / won))}" if won > 0 else ""))


def run_parallel(jobs, work, parallel, run=None):
    """[work(*job) for each job], so many at a time. The first error stops all and is raised."""
    threads, futures = ThreadPoolExecutor(parallel), []

    def one(*job):
        try:
            return work(*job)
        except BaseException:
            for future in futures:      # here, before this thread takes the next one
                future.cancel()
            raise
    futures += [threads.submit(one, *job) for job in jobs]
    # a terminal's line is rewritten in place; a log gets a line now and then
    before, after, pause = ("\r", "\033[K", 0.5) if sys.stderr.isatty() else ("", "\n", 30.0)
    try:
        open_ = set(futures)
        while open_:
            over, open_ = wait(open_, pause, FIRST_EXCEPTION)
            for future in over:
                if not future.cancelled():
                    future.result()
            if run and open_:
                print(before + run.line(), end=after, file=sys.stderr, flush=True)
    finally:
        if run:
            with run.lock:      # not in the middle of a line
                run.stop.set()
            print(before + run.line(), end=after.strip() + "\n", file=sys.stderr, flush=True)
        threads.shutdown(wait=False, cancel_futures=True)
    return [future.result() for future in futures]


def prepare_tasks(s):
    """Prepares the tasks, each on first use, and returns [(task, what its task.json says)]. ValueError: no such task,
    or a raw folder that lacks something. RunError: a starter that does not run."""
    chosen = [tasks.load(id) for id in tasks.names(s.task)]
    if not chosen:
        raise ValueError(f"there is no {s.task} task here yet; python -m tasks list shows those there are")

    def one(task):
        raw = s.raw if len(chosen) == 1 else s.raw and Path(s.raw, task.id)
        if raw and not Path(raw).is_dir():
            raise ValueError(f"there is no folder {raw}. It should hold {task.download} ({task.size})."
                             + " For several tasks --raw holds a folder for each task id." * (len(chosen) > 1))
        try:
            tasks.prepare(task.id, raw or None, s.data, python=s.python, say=lambda line: print(line, file=sys.stderr))
        except RuntimeError as error:
            raise RunError(str(error)) from error
        return task, tasks.info(task.id, s.data)
    if len(chosen) == 1:        # here, where a request to end ends its starter
        return [one(chosen[0])]
    return run_parallel([[task] for task in chosen], one, SLOTS.cpus)


# ---------------------------------------------------------------------------------------------------------------------
# Replay

COMPARED = ("fields", "action", "args", "valid", "error", "observation", "kind", "outcome", "detail", "printed",
            "score", "m_before", "m_after", "m_top", "reward", "snapshot", "ended")


def replay(path, say=print, *, data="data", sandbox="on", python=None, gpu=None, threads=1):
    """Restores every recorded state, carries out its reply again, says what differs (times masked, figures to 6 digits)
    and returns the number of differences. The rest is as for Env: what the file tells of these settings is said, where
    it is something else, and not obeyed."""
    head, steps = read_trajectory(path)
    out = next((parent for parent in Path(path).resolve().parents if (parent / "blobs").is_dir()), None)
    if out is None:
        raise ValueError(f"there is no folder `blobs` beside {path} or above it, so no state can be restored")
    refuse_links_out(out)
    for number, old in enumerate(steps):
        if missing := [name for name in ("index", "reply", "coder", "time_left_s", *COMPARED)
                       if name not in old and name != "m_top"]:
            raise ValueError(f'{path}, step {number}: its entry "{missing[0]}" is missing')
    used = {"data": str(data), "sandbox": sandbox, "python": python or sys.executable, "gpu": gpu, "threads": threads}
    for name, value in used.items():
        was = head.get(name) or {"python": sys.executable}.get(name)
        if name in head and was != value:
            say(f"it was recorded with {name} {shorten(ascii(was), 100)}; here it is {value!r}, as --{name} says")
    answers, errors, count = [], [], 0

    def coder(messages):
        if not answers:     # it raised an error when this was recorded
            raise ValueError(errors[-1].removeprefix(CANNOT_TAKE))
        return answers.pop(0)

    settings = {name: head[name] for name in ("actions", "fields", "steps", "seconds", "prompt") if name in head}
    snapshot, messages = head["snapshot"], head["messages"]
    with tempfile.TemporaryDirectory(prefix="ml-agent-replay-") as empty:     # every script is really run again
        env = Env(head["task"], data, out=out, coder=coder, cache=ResultCache(empty), sandbox=sandbox, python=python, gpu=gpu,
                  threads=threads, **settings)
        for number, old in enumerate(steps):
            top = best_before(env.task, head, steps[:number])
            env.restore(snapshot, messages, index=old["index"], m_before=old["m_before"], m_top=top,
                        seconds=old["time_left_s"])
            answers[:] = old["coder"]
            errors[:] = [old["error"]]
            new = json.loads(json.dumps(record(env.step(old["reply"]))))
            for name in COMPARED:
                before, now = _masked(old.get(name, new[name])), _masked(new[name])
                if before != now:
                    count += 1
                    say(f"step {old['index']}, {name}:\n  recorded: {shorten(repr(before), 1000)}\n"
                        f"  replayed: {shorten(repr(now), 1000)}")
            snapshot, messages = old["snapshot"], messages + old["messages"]
    say(f"{len(steps)} steps replayed, {count} differences")
    return count


def _masked(value):
    """The value, what depends on the clock masked and figures rounded to 6 digits."""
    if isinstance(value, str):
        return re.sub(r"\d[\d.,]{0,30} ?(?=(?:ms|s|sec|seconds|min|minutes)\b)", "# ", value)
    return float(f"{value:.6g}") if isinstance(value, float) else value


def main(args):
    parser = argparse.ArgumentParser("env.py", allow_abbrev=False, description="Runs a recorded trajectory again and "
                                     "says what differs. How scripts are run is said here, and never by the file.")
    parser.add_argument("command", choices=["replay"])
    parser.add_argument("file", metavar="FILE", help="a trajectory, as eval.py and sft.py write them")
    parser.add_argument("--data", default="data", help="where prepared tasks are kept (default: data)")
    parser.add_argument("--sandbox", default="on", choices=["on", "off"],
                        help="off: scripts can read the answers and all your files (default: on)")
    parser.add_argument("--python", help="the interpreter that runs the scripts (default: this one)")
    parser.add_argument("--gpu", help="CUDA_VISIBLE_DEVICES of the scripts (default: none)")
    parser.add_argument("--threads", type=int, default=1, help="that a script may use for numerics (default: 1)")
    try:
        settings = vars(parser.parse_args(args))
        settings.pop("command")
        if settings["threads"] < 1:
            parser.error(f"--threads must be at least 1, found {settings['threads']}")
    except SystemExit as end:
        return end.code
    try:
        return 1 if replay(settings.pop("file"), **settings) else 0
    except (ValueError, OSError, Unprotected) as error:
        print(f"env.py replay: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
