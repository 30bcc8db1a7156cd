"""The environment: an agent edits a training script, runs it, and is rewarded for the score of its submission.

    env = Env("leaf-classification", out="runs/x")    # after: python -m tasks prepare leaf-classification
    env.reset()                                       # -> chat messages: the rules, then the task
    while not env.done:
        step = env.step(policy(env.prompt()))         # -> Step: the action, its observation, the reward

support/play.py plays so with a model, records every step, and goes on after an interruption.

    python env.py replay FILE                         # runs a trajectory of eval.py or sft.py again, prints differences

A state is the chat messages, what a Step records of scores and tries, and the workspace: a dict {path: sha256} over a
store of blobs (support/storage.py). It becomes a folder only while a script runs. So a recorded state comes back
exactly, and no `..`, link or daemon reaches the workspace.

After every edit the entry script runs in a copy of the workspace, and its submission is graded here, against answers
that the script cannot reach (support/sandbox.py). The agent never sees that score; it is told what the run printed
(--no-show-scores: not even that), on which no reward rests.

An action is an entry in ACTIONS and a method of Env: `_list_files` for "List Files".
"""
import dataclasses, hashlib, importlib, json, math, os, re, sys, tempfile, time
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import tasks
from reward import best_of, reward
from support import cli, prompts, scripts, storage, workspace
from support.files import is_text, shorten
from support.sandbox import NO_SPACE, SLOTS, Result, comes_again, describe, discard, execute, protection, wall_limit
from support.scripts import InvalidAction
from support.storage import Blobs, ResultCache, check_state, without_undo

OUTCOMES = {  # how a run can end -> the kind of reward (reward.KINDS), and the advice after the output
    "ok": ("scored", ""),  # exit code 0 and, where it is graded, a valid submission
    "error": ("failed", "Find the cause in the error above and change the script."),
    "killed": ("failed", "Change the script so that it does not crash."),  # by a signal that is not ours
    "too many processes": ("failed", "Use fewer processes (n_jobs, num_workers)."),
    "no submission": ("failed", "The script must write submission.csv to the current folder."),
    "invalid submission": ("failed", "Correct what the script writes to submission.csv."),
    "timeout": ("limit", "Make it faster: a smaller model, fewer rounds or folds."),
    "out of memory": ("limit", "Use less memory: smaller batches, a smaller model, smaller types."),
    "disk full": ("limit", "Write less to disk."),  # also a file above the size limit, or too much left behind
}
FIELDS = ("Reflection", "Research Plan and Status", "Fact Check", "Thought", "Action", "Action Input")
PROMPTS = ("full", "medium", "short")
SCAFFOLDS = ("ml-agent", "mlagentbench", "aide")    # ours, and those of other papers in support/
MAX_REPLY = 50_000                      # characters of a reply; a longer one is refused unread
MAX_OBSERVATION = 5_000                 # characters, about 1,500 tokens
OUTPUT_ROOM = MAX_OBSERVATION - 1_000   # of a file or an output inside an observation
NUMBERED = ("start_line_number", "end_line_number", "constant", "value")    # arguments that may be numbers
MAX_LINES = 200                         # of one Inspect Script Lines
MAX_LISTED = 100                        # names of one List Files
MAX_CODER = 20_000                      # characters that Understand File shows to the coder
WHOLE_SCRIPT = "Answer with the whole changed script in one ```python block."   # ends a question for a script
CANNOT_TAKE = "The helper cannot take this: "       # begins the error of a step whose question the coder refused


# -- Prompts

class Action(NamedTuple):
    args: dict                  # argument -> an explanation of it; a text, also a number if its name is in NUMBERED
    text: str
    needs_coder: bool = False
    example: str = ""           # a whole reply


ACTIONS = {
    "List Files": Action(
        {"dir_path": 'folder; "." is the workspace'}, "names and sizes of the files in a folder."),
    "Inspect Script Lines": Action(
        {"script_name": "file", "start_line_number": "first line, from 1", "end_line_number": "last line"},
        f"shows these lines exactly, at most {MAX_LINES}. Look before you edit."),
    "Understand File": Action(
        {"file_name": "file", "things_to_look_for": "what to look for and report"},
        "has a helper read a file and report.", needs_coder=True),
    "Edit Script (AI)": Action(
        {"script_name": "file to start from", "edit_instruction": "what to change, step by step",
         "save_name": "file to write"},
        "has a helper rewrite the script; check the difference it returns.", needs_coder=True),
    "Replace In Script": Action(
        {"script_name": "file", "find": "exact text that occurs once", "replace": "the text to put there"},
        "your own edit of a script; copy `find` exactly, spaces included.", example="""\
Reflection: The script runs; its validation score is the one to beat.
Research Plan and Status: 1. Run train.py: done. 2. **Train for more epochs.** 3. Run it again and compare.
Fact Check: The score is confirmed by the last observation. That more epochs help is guessed.
Thought: The loss was still falling at the end, so I train longer.
Action: Replace In Script
Action Input: {"script_name": "train.py", "find": "EPOCHS = 5\\n", "replace": "EPOCHS = 10\\n"}"""),
    "Set Constant": Action(
        {"constant": "its number", "value": "a number, or a factor such as *2 or /2"},
        "changes a constant of the script to improve. Its lines `NAME = number` are numbered from 1, but not those "
        "whose name has SEED or VALID in it."),
    "Set Constant Again": Action(
        {}, "changes the constant that was set last by the same factor once more."),
    "Set Constant Inversely": Action(
        {}, "takes back the Set Constant before, and sets that constant by the inverse factor: /2 where it was *2."),
    "Undo Edit Script": Action(
        {"script_name": "file"}, "takes back the last edit of this file."),
    "Copy File": Action(
        {"source": "file", "destination": "file"}, "copies a file."),
    "Execute Script": Action(
        {"script_name": "file"}, "runs a Python script; returns what it prints.", example="""\
Reflection: The work begins; there is no observation yet.
Research Plan and Status: 1. Run train.py as it is. 2. Change one thing, run, compare. Nothing is done yet.
Fact Check: Nothing is confirmed yet.
Thought: I run the script as it is, to know the score to beat.
Action: Execute Script
Action Input: {"script_name": "train.py"}"""),
    "Final Answer": Action(
        {"final_answer": "what you did and the result"},
        "ends the work. Use it once, when there is nothing left to improve."),
}
DEFAULT_ACTIONS = tuple(ACTIONS)
# They change no script, and the work goes on: support/tables.py: count_habits passes over them.
LOOKS = ("List Files", "Inspect Script Lines", "Understand File", "Execute Script")
UNDOES = ("Undo Edit Script", "Set Constant Inversely")     # take an edit back
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
- Run the script as it is first, so that you know the score to beat. {compare}
- Only scores that a run has printed count. Undo changes that do not help.
- The script must write submission.csv in the form the task asks for. Only files in the workspace can be named; data/ \
is read-only.
- Nothing can be installed or downloaded.

Answer in exactly this form, every entry on its own line and nothing after the JSON. In JSON a line break inside a \
text is written \\n, a double quote \\", a backslash \\\\.
{entries}

Examples of a reply:

{examples}"""
COMPARE = {     # show_scores -> what to do after the first run
    True: "Then change one thing at a time: every edit is run at once, and its observation says what the run printed, "
          "and whether that is better than the best score printed before.",
    False: "Then change one thing, run again, and compare the validation scores."}
PROBLEM = """Task: {task.id}

{problem}

The workspace holds {task.entry} (the script to improve) and data/ (read-only). The metric is {task.metric}; \
{better} is better. You have {steps} steps and {minutes:.0f} minutes; one run of a script may take \
{limit:g} s."""
NOTHING = {     # Env.seen, of which small models' prompts consist, at the start
    "news": "nothing", "change": {}, "best_printed": None, "best_script": None, "tried": [], "tries": []}


def system_prompt(actions=DEFAULT_ACTIONS, fields=FIELDS, show_scores=True):
    """Returns the text of the first message, the same for all tasks."""
    examples = []
    for name in actions:
        if ACTIONS[name].example:
            values = dict(line.split(": ", 1) for line in ACTIONS[name].example.splitlines())
            examples.append("\n".join(f"{field}: {values[field]}" for field in fields))
    return SYSTEM.format(
        tools="\n".join(f"- {name} {json.dumps(ACTIONS[name].args)}: {ACTIONS[name].text}" for name in actions),
        entries="\n".join(f"{name}: ({EXPLAIN[name]})" for name in fields),
        compare=COMPARE[show_scores], examples="\n\n".join(examples))


def recorded_prompt(agent, task, seen, snapshot, blobs, steps_left):
    """Returns the short or the medium prompt of a state. agent: {setting: value}."""
    sha = snapshot.get(task.entry)
    about = task, seen, workspace.script_text(blobs, sha), sha == seen["best_script"], steps_left
    if agent["prompt_format"] == "short":
        return prompts.short_prompt(*about)
    actions = {name: ACTIONS[name].args for name in agent["actions"]}
    return prompts.medium_prompt(*about, actions, {name: EXPLAIN[name] for name in agent["fields"]})


# -- Reading a reply, and what a script has printed

def parse(reply, fields=FIELDS, actions=DEFAULT_ACTIONS):
    """Reads any reply, in linear time. Returns (values, action, args, error): the texts of the entries, the name and
    the arguments of the action, and "" if it may be carried out, else one sentence.

    Entries begin a line, in the order of `fields`, in any case, with or without markdown signs. What follows a line
    "Observation:" is invented and not read. The Action Input is the first JSON object after its header.
    """
    values = {}
    action = None
    try:
        source = read_entries(reply, fields, values)
        name = values["Action"].strip("`*\"'[] \t\n")
        if name not in actions:
            raise InvalidAction(f"There is no tool {shorten(name, 60)!r}; the tools are: {', '.join(actions)}.")
        action = name
        return values, action, read_args(name, source), ""
    except InvalidAction as problem:
        return values, action, {}, str(problem)


def read_entries(reply, fields, values):
    """Puts the texts of all entries but the last into `values`; returns the text after the last header."""
    if len(reply) > MAX_REPLY:
        raise InvalidAction(f"The reply is longer than {MAX_REPLY:,} characters.")
    if not reply.strip():
        raise InvalidAction("The reply is empty.")
    text = cut_observation(reply)
    begin = 0
    for last, name in zip((None, *fields), fields):
        header = rf"^[ \t>*#-]{{0,8}}{re.escape(name)}[ \t*]{{0,8}}:[ \t*]{{0,8}}"
        match = re.compile(header, re.MULTILINE | re.IGNORECASE).search(text, begin)
        if not match:
            raise InvalidAction(f'The entry "{name}:" is missing; expected are, in this order and each on its '
                                f'own line: {", ".join(fields)}.')
        if last:
            values[last] = text[begin:match.start()].strip()
        begin = match.end()
    return text[begin:]


def read_args(name, source):
    """Returns the arguments of an action, texts all, from the text after "Action Input:"."""
    keys = ACTIONS[name].args
    expected = f"expected is {json.dumps(keys)}"
    try:
        args = json.JSONDecoder(strict=False).raw_decode("{" + source.partition("{")[2])[0]
    except (ValueError, RecursionError) as error:
        reason = shorten(str(error), 100)
        raise InvalidAction(f"The Action Input is not a JSON object ({reason}); {expected}.") from None
    if set(args) != set(keys):
        names = shorten(", ".join(map(repr, args)), 200) or "none"
        raise InvalidAction(f"The Action Input of {name} has the keys {names}; {expected}.")
    for key, value in args.items():
        if key in NUMBERED and type(value) in (int, float):
            args[key] = value = str(value)
        if not is_text(value):
            raise InvalidAction(f'"{key}" must be a text in double quotes; found {shorten(ascii(value), 60)}.')
        if key.endswith("line_number") and not re.fullmatch(r"\s*[0-9]{1,9}\s*", value):
            raise InvalidAction(f'"{key}" must be a whole number; found {shorten(ascii(value), 60)}.')
    return args


def cut_observation(reply):
    """Returns the reply up to a line that starts with "Observation:"."""
    return re.split(r"^[ \t*]{0,8}Observation[ \t*]{0,8}:", reply, maxsplit=1, flags=re.MULTILINE)[0]


def plain(text):
    """Returns the text with a question mark for each half of a surrogate pair, which no file can hold."""
    return text.encode("utf-8", "replace").decode()


# -- The environment

class Run(NamedTuple):
    """How a script ended, the graded score of its submission, and the files that it left (None: as before)."""
    result: Result
    score: float | None
    files: dict | None


@dataclass
class Step:
    """One action and its consequences."""
    index: int                      # 0 for the first
    reply: str                      # as it came, at most MAX_REPLY + 1 characters
    fields: dict = field(default_factory=dict)      # entry -> text, without the Action Input
    action: str | None = None
    args: dict = field(default_factory=dict)
    valid: bool = False             # the reply parsed and the arguments were accepted
    error: str = ""                 # the reason why not, one sentence
    observation: str = ""           # what the agent sees
    kind: str = "not an edit"       # the kind of reward, one of reward.KINDS
    outcome: str | None = None      # how the script ended, a key of OUTCOMES; None if none ran
    detail: str = ""                # one sentence about the outcome
    printed: float | None = None    # the validation score that the script printed, not to be believed
    score: float | None = None      # the graded score of the submission that this step's run wrote
    m_before: float = math.nan      # the score of the last edit before this step; at first the starter's
    m_after: float = math.nan       # the same after it
    m_top: float | None = None      # the best of the starter's score and of all edits before this step
    reward: float = 0.0
    seconds: float = 0.0            # of the whole step
    time_left_s: float = 0.0        # of the trajectory, when the step began
    seconds_left: float = 0.0       # of the trajectory, when the step ended
    script_seconds: float = 0.0     # of the run, also if its result was known already
    sandbox: str = ""               # the layers that were active in the run
    coder: list = field(default_factory=list)       # the replies of the coder, for replay
    messages: list = field(default_factory=list)    # the chat messages that this step added
    snapshot: dict = field(default_factory=dict)    # the workspace after the step
    news: str = ""                  # one line about the step for a short prompt
    change: dict = field(default_factory=dict)      # the arguments of the last Set Constant, also of this step
    best_printed: float | None = None   # the best score of the entry script that the agent was told
    best_script: str | None = None  # sha256 of the script that printed it
    tried: list = field(default_factory=list)       # the Set Constants of that script that were no better
    tries: list = field(default_factory=list)       # the last steps, a line each, for a medium prompt
    node: dict = field(default_factory=dict)        # of a scaffold that searches: see support/aide.py
    ended: str = ""                 # why the trajectory is over: "final answer", "steps", "time"; "" if it goes on


class Env(workspace.Workspace):
    """One trajectory on one task. The scaffolds of other papers are subclasses.

    task: a Task or its id. data: the folder of prepared data. out: where `blobs/` is kept; many Envs may share it.
    actions: those that need a coder are left out without one. seconds: to wait for a free slot does not count. coder:
    callable(messages) -> str for the (AI) actions; its ValueError (a text that does not fit) goes to the agent. cache:
    a ResultCache (default: one in out). The rest: see support/play.py: AgentSettings, cli.ScriptSettings.
    """
    stop = ("\nObservation:",)      # texts that end a reply
    # A subclass with more tries has is_readable(reply): where that is False another reply is asked for, up to so many,
    # with the reminder at the end of the prompt.
    num_tries = 1
    reminder = ""
    own = ()                        # names of further arguments, which are recorded

    def __init__(self, task, data="data", *, out, actions=DEFAULT_ACTIONS, fields=FIELDS, steps=15, seconds=1800,
                 coder=None, prompt_format="full", show_scores=True, python=None, gpu=None, threads=1, sandbox="on",
                 cache=None):
        self.task = tasks.load(task) if isinstance(task, str) else task
        self.info = tasks.info(self.task.id, data=data)
        modules = sorted(Path(tasks.__file__).parent.glob("*.py"))
        self.graders = tasks.hash_files(*modules, *self.task.folder.glob("task.py"))
        self.data = Path(data)
        self.public = Path(data, self.task.id, "public").resolve()
        self.blobs = Blobs(Path(out, "blobs"))
        self.cache = cache or ResultCache(Path(out, "cache"))
        self.actions = tuple(name for name in actions if coder or not ACTIONS[name].needs_coder)
        self.fields = tuple(fields)
        self.steps = steps
        self.seconds = seconds
        self.coder = coder
        self.prompt_format = prompt_format
        self.show_scores = show_scores
        self.python = python
        self.gpu = gpu
        self.threads = threads
        self.sandbox = sandbox
        self.reset()

    def reset(self):
        """Goes back to the starter; returns the messages."""
        starter = self.task.folder / self.task.entry
        if self.prompt_format == "medium":      # its script is shown as it is, so that it can be copied
            starter = scripts.without_comments(self.task.starter).encode()
        starter = {self.task.entry: self.blobs.put(starter)}
        problem = PROBLEM.format(task=self.task, limit=self.time_limit_s, problem=self.task.problem.strip(),
                                 steps=self.steps, minutes=self.seconds / 60, better=prompts.better_word(self.task))
        rules = system_prompt(self.actions, self.fields, self.show_scores)
        self.restore(starter, [{"role": "system", "content": rules}, {"role": "user", "content": problem}])
        return self.messages

    def snapshot(self):
        """Returns the workspace as {path: sha256}, what edits have replaced under `.undo/`."""
        return dict(self.files)

    def restore(self, snapshot, messages=None, *, index=0, m_before=None, m_top=None, seconds=None, seen=NOTHING,
                past=()):
        """Continues from a recorded state before step `index`. m_before: the score of the last edit (default: the
        starter's). m_top: the best score so far. seconds: that are left (default: all). seen: of the record of the last
        step. past: the records of the steps, for scaffolds that look back. ValueError: it is no snapshot. MissingBlob:
        a file is missing or damaged, or they are too large."""
        check_state(snapshot, self.blobs)
        self.files = dict(snapshot)
        self.index = index
        self.messages = [dict(message) for message in (self.messages if messages is None else messages)]
        self.m_before = self.info["m_init"] if m_before is None else m_before
        self.m_top = best_of(self.task.direction, self.info["m_init"], self.m_before, m_top)
        self.deadline = time.monotonic() + (self.seconds if seconds is None else seconds)
        self.seen = {name: seen[name] for name in NOTHING}
        self.ended = ""

    def prompt(self):
        """Returns the chat messages that the policy is shown for its next reply."""
        if self.prompt_format == "full":
            return self.messages
        return recorded_prompt(vars(self), self.task, self.seen, self.files, self.blobs, self.steps_left)

    @property
    def time_limit_s(self):
        """Seconds of an ordinary core that one run of a script may take, as the agent is told."""
        return min(self.task.time_limit_s, tasks.MINIATURE_S if self.info["miniature"] else math.inf)

    @property
    def allowed_s(self):
        """The same in seconds of this machine: more on a slow one, by what the starter of a miniature took here."""
        seconds = self.info.get("starter_seconds", 0) if self.info["miniature"] else 0
        return self.time_limit_s * max(1, seconds / tasks.STARTER_S)

    @property
    def steps_left(self):
        return self.steps - self.index

    @property
    def done(self):
        return bool(self.ended)

    def step(self, reply, tokens=None):
        """Carries out any reply and returns the Step. tokens: the sampled ids that spell the reply, which stand in the
        messages. ValueError: the trajectory is over."""
        if self.done:
            raise ValueError("the trajectory is over")
        started = time.monotonic()
        reply = plain(reply[:MAX_REPLY + 1])
        step = Step(self.index, reply, m_before=self.m_before, m_top=self.m_top, time_left_s=self.deadline - started)

        # 1. The reply becomes an action, and the action changes the workspace.
        step.fields, step.action, step.args, parse_error = self.read(reply)
        self.change_text = ""       # of a Set Constant, such as "RATE = 0.1 -> 0.2"
        self.act(step, parse_error)
        self.index += 1

        # 2. The score and the reward. Only edits that were scored move these; Execute Script is none.
        if step.kind == "scored" and step.score is not None:
            self.m_before = step.score
            self.m_top = best_of(self.task.direction, self.m_top, step.score)
        step.m_after = self.m_before
        step.reward = reward(step.kind, step.m_before, step.score, m_top=step.m_top, m_init=self.info["m_init"],
                             m_best=self.info["m_best"], direction=self.task.direction, alpha=self.task.alpha)

        # 3. The limits of the trajectory.
        step.seconds_left = self.deadline - time.monotonic()
        if not self.ended and step.seconds_left <= 0:
            self.ended = "time"
        elif not self.ended and self.steps_left <= 0:
            self.ended = "steps"

        # 4. What the agent sees next.
        step.observation = self.complete_observation(step)
        step.messages = self.messages_of(step, tokens, parse_error)
        self.messages += step.messages
        if step.valid:      # else a short prompt stays as it was: a small model that sees its own slips repeats them
            self.remember_news(step)
        for name in NOTHING:
            setattr(step, name, self.seen[name])
        step.snapshot = self.snapshot()
        step.ended = self.ended
        step.seconds = time.monotonic() - started
        return step

    def read(self, reply):
        """Returns what parse does of a reply."""
        return parse(reply, self.fields, self.actions)

    def act(self, step, parse_error):
        """Carries out the action of a step."""
        try:
            if parse_error:
                raise InvalidAction(parse_error)
            if step.time_left_s <= 0:
                step.kind = "limit"
                step.observation = "The time for this work was over before this reply."
                return
            method = step.action.lower().replace("(ai)", "ai").replace(" ", "_")
            step.observation = getattr(self, f"_{method}")(step, **step.args)
            step.valid = True
        except InvalidAction as error:
            step.kind = "invalid"
            step.error = str(error)
            step.observation = f"Nothing was done. {error}"
        except OSError as error:
            if error.errno not in NO_SPACE:
                raise
            step.kind = "limit"
            step.valid = True
            step.outcome = "disk full"
            step.detail = f"This machine could not store the files: {error.strerror}."
            step.observation = step.detail

    def complete_observation(self, step):
        """Returns the observation of a step with the steps and time that are left, cut to MAX_OBSERVATION."""
        text = shorten(step.observation, MAX_OBSERVATION)
        if not self.ended:
            text += f"\n[{self.steps_left} steps and {step.seconds_left / 60:.0f} min left]"
        return text

    def messages_of(self, step, tokens, parse_error):
        """Returns the chat messages that a step adds."""
        observation = {"role": "user", "content": step.observation}
        if parse_error:     # as in MLAgentBench it is not kept: a model that sees its own slips repeats them
            observation["content"] += "\nYour last reply is dropped. Reply again in the form of the examples."
            return [observation]
        message = {"role": "assistant", "content": cut_observation(step.reply)}
        if tokens is not None and message["content"] == step.reply:
            message["tokens"] = list(tokens)
        return [message, observation]

    def remember_news(self, step):
        """Puts what a step has brought into what short and medium prompts tell."""
        name = step.action
        if name.startswith("Set Constant") and self.seen["change"]:     # it is empty where the disk was full
            name = self.describe_change()
        outcome = " ".join((step.news or step.observation.partition("\n")[0]).split()).rstrip(".")[:prompts.SHORT_NEWS]
        self.seen["news"] = f"{outcome}, after {name[:prompts.SHORT_NEWS]}"
        title = self.change_text or step.action
        if step.action == "Replace In Script":
            title = f"{title}, {' '.join(step.fields.get('Thought', '').split())[:prompts.SHORT_NEWS]}"
        self.seen["tries"] = [*self.seen["tries"], f"{title}: {outcome}"][-prompts.NUM_TRIES:]

    def describe_change(self):
        """Returns the last Set Constant in words, and whether what goes on from it is untried: the same again after a
        better score, else the inverse."""
        change = self.seen["change"]
        best = self.seen["best_script"]
        following = {}
        if self.files[self.task.entry] == best:
            word = "again"
            following = change
        elif self.files[self._versions(self.task.entry)[-1]] == best:
            word = "inversely"
            following = scripts.inverse(change)
        text = " ".join(f"Set Constant {change['constant']} {change['value']}".split())
        if following:
            offered = scripts.untried(workspace.script_text(self.blobs, best), self.seen["tried"])
            if (int(following["constant"]), following["value"]) in offered:
                text += f", {word} is untried"
        return text

    def _edit(self, step, path, before, after):
        """Makes an edit and scores it; returns its observation."""
        if before == after:
            return f"{path} is as it was: the edit changes nothing."
        content = after.encode()
        if len(content) > workspace.MAX_SCRIPT:
            raise InvalidAction(f"{path} would have {len(content):,} bytes; a script may have "
                                f"{workspace.MAX_SCRIPT:,}.")
        self._write(path, content)
        return self._score_saved(step, path, before, after)

    def _score_saved(self, step, path, before, after):
        lines = scripts.difference(before, after)
        return "\n".join([f"{path} is saved. The difference:", *lines, *self._score_edit(step)])

    # Actions. Each takes the Step and the arguments, and returns the observation: a new edit of a text that of _edit,
    # which scores it and lets it be undone. InvalidAction refuses an action; nothing may have changed before it.

    def _list_files(self, step, dir_path):
        contents = self._contents(self._path(dir_path))
        lines = []
        for name in sorted(contents)[:MAX_LISTED]:
            lines.append(name if name.endswith("/") else f"{name}  {os.path.getsize(contents[name]):,} bytes")
        if len(contents) > MAX_LISTED:
            lines.append(f"... and {len(contents) - MAX_LISTED:,} more")
        return "\n".join(lines)

    def _inspect_script_lines(self, step, script_name, start_line_number, end_line_number):
        path = self._path(script_name)
        text, size = self._text(path)
        lines = text.splitlines()
        known = path if size <= workspace.MAX_READ else f"the first {workspace.MAX_READ >> 20} MiB of {path}"
        first = int(start_line_number)
        last = int(end_line_number)
        if not 1 <= first <= min(last, max(1, len(lines))):
            raise InvalidAction(f"Lines {first} to {last} cannot be shown: {known} has {len(lines):,} lines.")
        last = min(last, first - 1 + MAX_LINES)
        shown = [shorten(line, OUTPUT_ROOM) for line in lines[first - 1:last]]
        while len(shown) > 1 and len("\n".join(shown)) >= MAX_OBSERVATION - 200:
            shown.pop()
        return "\n".join([f"Lines {first} to {first + len(shown) - 1} of {len(lines):,} of {known}:", *shown])

    def _understand_file(self, step, file_name, things_to_look_for):
        path = self._path(file_name)
        text, size = self._text(path)
        return self._ask_coder(step, f"Read the file {path} ({size:,} bytes). Report shortly, quote the lines that "
                                     "matter, guess nothing, and say what you could not find.\n\nLook for: "
                                     f"{things_to_look_for}\n\n```\n{shorten(text, MAX_CODER)}\n```")

    def _edit_script_ai(self, step, script_name, edit_instruction, save_name):
        path = self._path(script_name)
        target = self._path(save_name, write=True)
        source = self._text(path, edit=True)[0]
        before = self._text(target, edit=True)[0] if target in self.files else ""
        answer = self._ask_coder(step, f"This is the Python script {path}:\n```python\n{source}\n```\n\nChange it as "
                                       f"follows, and nothing else:\n{edit_instruction}\n\n{WHOLE_SCRIPT}")
        parts = re.split(r"^[ \t]*```.*\n?", answer, maxsplit=2, flags=re.MULTILINE)    # before, in, after it
        if len(parts) < 3 or not parts[1].strip():
            return "The helper returned no whole script; nothing was changed. Ask for something simpler."
        return self._edit(step, target, before, parts[1].strip("\n") + "\n")

    def _ask_coder(self, step, question):
        """Returns the coder's reply, which is kept in the step for replay."""
        try:
            answer = self.coder([{"role": "user", "content": question}])
        except ValueError as error:
            raise InvalidAction(CANNOT_TAKE + shorten(plain(str(error)), 200)) from error
        step.coder.append(plain(answer[:workspace.MAX_SCRIPT + 1]))
        if len(answer) > workspace.MAX_SCRIPT:
            raise InvalidAction(f"The helper's answer is longer than {workspace.MAX_SCRIPT} characters; ask for less.")
        return step.coder[-1]

    def _replace_in_script(self, step, script_name, find, replace):
        path = self._path(script_name, write=True)
        before = self._text(path, edit=True)[0]
        start = before.find(find) if find else -1
        if start < 0:
            raise InvalidAction(f'"find" does not occur in {path}; copy it exactly as Inspect Script Lines shows it.')
        if before.find(find, start + 1) >= 0:      # also where the two overlap
            raise InvalidAction(f'"find" occurs more than once in {path}; take in more of the lines around it.')
        return self._edit(step, path, before, before[:start] + replace + before[start + len(find):])

    def _set_constant(self, step, constant, value):
        before = self._text(self.task.entry, edit=True)[0]
        number = scripts.find_constant(before, constant)
        name, old_value, start, end = scripts.constants(before)[number - 1]
        new_value = scripts.change_number(name, old_value, value)
        self.change_text = f"{name} = {old_value} -> {new_value}"
        change = {"constant": str(number), "value": "".join(value.split())}
        is_best = self.files[self.task.entry] == self.seen["best_script"]
        best_before = self.seen["best_printed"]
        if is_best and change in self.seen["tried"]:
            raise InvalidAction(f"Constant {constant} {value} was tried on this script, and is no better.")
        observation = self._edit(step, self.task.entry, before, before[:start] + new_value + before[end:])
        self.seen["change"] = change
        if is_best and self.show_scores:
            if self.seen["best_printed"] == best_before:
                self.seen["tried"] = [*self.seen["tried"], change]
            elif scripts.inverse(change):       # it leads back to a script that is no better
                self.seen["tried"] = [scripts.inverse(change)]
        return observation

    def _set_constant_again(self, step):
        if not scripts.inverse(self.seen["change"]):
            raise InvalidAction("The last edit was no Set Constant by a factor.")
        return self._set_constant(step, **self.seen["change"])

    def _set_constant_inversely(self, step):
        change = scripts.inverse(self.seen["change"])
        versions = self._versions(self.task.entry)
        if not change or not versions:
            raise InvalidAction("The last edit was no Set Constant by a factor.")
        self._path(self.task.entry, write=True)     # refused where a script has put a folder there
        files = self.snapshot()
        self.files[self.task.entry] = self.files.pop(versions[-1])
        try:
            return self._set_constant(step, **change)
        except (InvalidAction, OSError):
            self.files = files      # nothing is done
            raise

    def _undo_edit_script(self, step, script_name):
        path = self._path(script_name, write=True)
        names = self._versions(path)
        if not names:
            raise InvalidAction(f"There is no edit of {path} to undo.")
        before = workspace.script_text(self.blobs, self.files.get(path))
        self.files[path] = self.files.pop(names[-1])
        return self._score_saved(step, path, before, workspace.script_text(self.blobs, self.files[path]))

    def _copy_file(self, step, source, destination):
        origin = self._path(source)
        target = self._path(destination, write=True)
        file = self._file(origin)
        if file.stat().st_size > storage.MAX_BYTES // 2:
            raise InvalidAction(f"{origin} is too large to be copied; scripts can read it where it is.")
        is_edit = target == self.task.entry or target in self.files     # the script may import what it replaces
        self._write(target, file)
        score_lines = self._score_edit(step) if is_edit else []
        return "\n".join([f"{origin} is copied to {target}.", *score_lines])

    def _execute_script(self, step, script_name):
        path = self._path(script_name)
        if self._file(path) and path not in self.files:
            raise InvalidAction(f"{path} is data; only scripts in the workspace can be executed.")
        result, _, files = self._run_in_step(step, path)
        if files is not None:
            self.files = files | {name: self.files[name] for _, name in self._replaced()}
        if step.kind == "scored":       # a run alone earns 0.5, whatever it scores
            step.kind = "not an edit"
        return self._describe_run(path, result)

    def _describe_run(self, path, result):
        ending = "ran to the end in" if result.outcome == "ok" else f"ended with: {result.outcome}, after"
        parts = [f"{path} {ending} {result.seconds:.1f} s."]
        stdout = result.stdout.strip()
        stderr = result.stderr.strip()
        if result.exit_code == 0:
            parts.append(shorten(stdout or stderr or "It printed nothing.", OUTPUT_ROOM))
        else:  # the output before the error stays
            parts += [shorten(output, OUTPUT_ROOM // 2) for output in (stdout, stderr) if output]
        if result.outcome != "ok":
            parts.append(f"{shorten(result.detail, 300)} {OUTCOMES[result.outcome][1]}".strip())
        return "\n".join(parts)

    def _final_answer(self, step, final_answer):
        self.ended = "final answer"
        return "The work is ended."

    # Running and scoring

    def score(self):
        """Runs the entry script in a copy of the workspace. Returns (graded score or None, Result)."""
        result, score, _ = self._cached_run(self.task.entry, wall_limit(self.allowed_s))
        return score, result

    def _score_edit(self, step):
        """Scores the workspace after an edit. Returns the lines that tell the agent of it."""
        entry = self.task.entry
        self.seen["change"] = {}        # _set_constant puts it back
        if entry in self.files:
            self._run_in_step(step, entry)
        else:       # a script has removed it
            step.kind = "failed"
            step.detail = f"There is no {entry}."
            step.news = f"failed, {step.detail}"
        if not self.show_scores:
            step.news = ""
            return []
        return [f"The run of {entry}: {step.news}"]

    def _run_in_step(self, step, script):
        """Runs a script in the time that is left, with the results in the step; returns the Run."""
        time_left = self.deadline - time.monotonic()
        run = self._cached_run(script, max(0.0, min(wall_limit(self.allowed_s), time_left)))
        step.outcome = run.result.outcome
        step.detail = run.result.detail
        step.kind = OUTCOMES[run.result.outcome][0]
        step.score = run.score
        step.printed = scripts.printed_metric(run.result.stdout, self.task.metric)
        step.script_seconds = run.result.seconds
        step.sandbox = run.result.sandbox
        if script == self.task.entry and (self.show_scores or step.action == "Execute Script"):
            step.news = self._judge(step)
        return run

    def _judge(self, step):
        """Returns what a run of the entry script printed, compared with the best before, or how it failed. A new best
        score is remembered."""
        if step.outcome != "ok":
            return f"failed, {shorten(step.detail, 300)}"
        if step.printed is None:
            return "no score was printed"
        best = self.seen["best_printed"]
        comparison = "equal to" if step.printed == best else "worse than"
        if best is None or best_of(self.task.direction, best, step.printed) != best:
            self.seen |= {"best_printed": step.printed, "best_script": self.files[self.task.entry], "tried": []}
            comparison = "better than"
        if best is None:
            return f"{step.printed:.5g}"
        return f"{step.printed:.5g}, {comparison} {best:.5g}"

    def _cached_run(self, script, timeout_s):
        """Returns the Run of a script in a copy of the workspace; the entry starts without a submission.csv."""
        before = without_undo(self.files)
        if script == self.task.entry:
            before.pop("submission.csv", None)
        key = self._key(script, before)
        waiting = time.monotonic()
        with self.cache.key_lock(key):
            self.deadline += time.monotonic() - waiting
            run = self._recall(key)
            self.cache.count("hits" if run else "runs")
            if not run:
                run = self._run(script, before, timeout_s)
                if comes_again(run.result, self.gpu):
                    entry = {"result": dataclasses.asdict(run.result), "score": run.score, "after": run.files}
                    self.cache.put(key, entry)
            return run

    def _key(self, script, before):
        """Returns a hash of all that a run depends on."""
        data = {name: value for name, value in self.info.items() if name not in ("m_init", "starter_seconds")}
        parts = [script, sorted(before.items()), data, self.graders, [self.time_limit_s, "cpu"],
                 self.task.memory_limit_bytes, describe(self.python or sys.executable)[2], self.threads,
                 bool(self.gpu), protection() if self.sandbox == "on" else self.sandbox]
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()

    def _recall(self, key):
        """Returns the Run in the cache; None if there is none, or of another version, or if files are gone."""
        try:
            entry = self.cache.get(key)
            run = Run(Result(**entry["result"]), entry["score"], entry["after"])
            if run.files is not None:
                check_state(run.files, self.blobs)
            return run
        except (TypeError, LookupError, ValueError):
            return None

    def _run(self, script, before, timeout_s):
        """Runs a script on the files `before` and grades its submission."""
        score = None
        files = None
        folder = Path(tempfile.gettempdir(), f"ml-agent-run-{os.urandom(8).hex()}").resolve()   # as the script sees it
        try:
            # 1. The script runs in a folder of its own. All else, such as to wait for a core, does not count.
            started = time.monotonic()
            with SLOTS.take(self.threads, self.gpu) as gpu:
                stamps = storage.stamps_of(self.public)
                folder.mkdir(0o700)
                storage.build_folder(folder, before, self.blobs, self.public)
                result = execute(script, folder, python=self.python, timeout_s=timeout_s, gpu=gpu, warm="wait",
                                 cpu_s=self.allowed_s * self.threads,
                                 memory_bytes=self.task.memory_limit_bytes, threads=self.threads,
                                 sandbox=self.sandbox, readable=[self.public], hidden=[self.public.parent / "private"])
                if storage.stamps_of(self.public) != stamps:
                    raise RuntimeError(f"{script} has changed the public data in {self.public}; prepare them again: "
                                       f"python -m tasks prepare {self.task.id} --force")
            outcome = result.outcome
            detail = result.detail
            # 2. The files that it left are stored.
            if outcome in ("ok", "error"):
                files = storage.collect_folder(folder, self.blobs)
                if files is None:
                    outcome = "disk full"
                    detail = f"It left more than {storage.MAX_FILES} files or {storage.MAX_BYTES >> 20} MiB."
            # 3. A submission is graded; of another script than the entry script only a new one.
            if outcome == "ok" and (
                    script == self.task.entry or files.get("submission.csv") != before.get("submission.csv")):
                outcome, detail, score = self._grade(folder / "submission.csv")
            self.deadline += time.monotonic() - started - result.seconds
        finally:
            discard(folder)
        texts = {"stdout": result.stdout, "stderr": result.stderr, "detail": detail}
        for name, text in texts.items():    # without the random name of the folder
            texts[name] = text.replace(f"{folder}/", "").replace(str(folder), ".")
        return Run(dataclasses.replace(result, outcome=outcome, **texts), score, files)

    def _grade(self, submission):
        """Returns (outcome, detail, graded score or None)."""
        if not os.path.lexists(submission):
            return "no submission", "The script ended without writing submission.csv.", None
        try:
            return "ok", "", tasks.grade(self.task.id, submission, data=self.data)
        except tasks.InvalidSubmission as error:
            return "invalid submission", f"submission.csv is not valid: {error}", None


if __name__ == "__main__":       # replay is in support/records.py, which stands on this file
    cli.run_main(lambda: importlib.import_module("support.records").main(sys.argv[1:]))
