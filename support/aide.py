"""AIDE's tree search over whole scripts, as a scaffold (eval.py --scaffold aide).

A node is a plan, a script, its output, a verdict, a score that a reviewer reads in the output, and the node that it was
made from. A step makes one node: `choose` says whether to draft, debug or improve, the coder replies with plan and
script, the script runs once, the reviewer judges the output. The result is the working node with the best reported
score. There is no conversation: every request is a new prompt. The search is that of WecoAI's aideml; what differs:

- The reviewer's verdict is JSON in its reply, asked for up to three times, instead of a forced function call. Without
  one the outcome of the run and the printed score decide. A run that failed is not reviewed, as it is buggy anyway.
- The task knows whether higher is better; the reviewer's word on it is recorded and has no effect.
- Whole numbers are scores too, NaN and infinities are none.
- A missing or invalid submission makes a node buggy, and its output says why.
- Every script starts in a new workspace and in the sandbox: nothing is installed, downloaded, or left to later nodes.
- The output is stdout, then stderr. The prompts tell the steps and the time that are left, as in MLE-bench's fork.
- Each prompt is one user message. Scripts are not formatted.
"""
import functools, itertools, json, os, random, re, sys, threading, time, zlib
from dataclasses import dataclass
from pathlib import Path

import env
from env import InvalidAction, better_word, difference, plain, read_start, script_text, stamps_of
from reward import best_of
from support.files import is_number, shorten
from support.sandbox import describe

SEARCHES = {        # name -> num_drafts, debug_prob, max_debug_depth
    "aide": (5, 0.5, 3),
    "mle-bench": (5, 1.0, 20)}
DEFAULTS = {"temperature": 0.5, "max_new_tokens": 4096, "context": 16_384}      # a reply holds a whole script
FINAL = "the working node with the best score that the reviewer reported, of equal ones the first,"
TRIES = 3               # of the coder and of the reviewer
MAX_PREVIEW = 6_000     # characters


# ---------------------------------------------------------------------------------------------------------------------
# The search

@dataclass
class Node:
    """One solution. Node i is made by step i."""
    parent: int | None      # the node it was made from; None: a draft
    metric: float | None = None     # the score that the reviewer reported, not to be believed
    buggy: bool = True
    score: float | None = None      # as graded, which no prompt tells
    script: str | None = None       # sha256
    plan: str = ""
    summary: str = ""       # what the reviewer found
    output: str = ""


def debug_depth(nodes, i):
    """Returns how many debugging steps led to node i."""
    depth = 0
    parent = nodes[i].parent
    while parent is not None and nodes[parent].buggy:
        depth += 1
        parent = nodes[parent].parent
    return depth


def best_node(nodes, direction):
    """Returns the index of the working node with the best reported score, of equal ones the first; None: none works."""
    best = None
    for i, node in enumerate(nodes):
        if not node.buggy and (best is None or node.metric != nodes[best].metric
                               and best_of(direction, node.metric, nodes[best].metric) == node.metric):
            best = i
    return best


def choose(nodes, direction, rng, num_drafts=5, debug_prob=0.5, max_debug_depth=3):
    """Returns ("Draft", None), ("Debug", index of a node) or ("Improve", index of a node).

    The order of the draws is that of the original: past the drafts one random(), then at most one choice()."""
    if sum(node.parent is None for node in nodes) < num_drafts:     # the buggy ones too
        return "Draft", None
    if rng.random() < debug_prob:
        parents = {node.parent for node in nodes}
        broken = [i for i, node in enumerate(nodes)
                  if node.buggy and i not in parents and debug_depth(nodes, i) <= max_debug_depth]
        if broken:
            return "Debug", rng.choice(broken)
    best = best_node(nodes, direction)
    if best is None:
        return "Draft", None
    return "Improve", best


# ---------------------------------------------------------------------------------------------------------------------
# Prompts and replies

SECTIONS = {        # the headed parts of each prompt, in order
    "Draft": ("role", "task", "memory", "reply", "sketch", "rules", "packages", "data"),
    "Improve": ("role", "task", "memory", "script", "reply", "sketch", "rules"),
    "Debug": ("role", "task", "script", "output", "reply", "sketch", "rules", "data"),
    "Review": ("role", "task", "script", "output", "verdict")}
HEADINGS = {
    "role": "Introduction", "task": "Task description", "memory": "Memory", "script": "Previous solution",
    "output": "Execution output", "reply": "Response format", "sketch": "Solution sketch", "rules": "Implementation",
    "packages": "Installed packages", "data": "Data overview", "verdict": "Response format"}
CONTEST = "You are an expert in machine learning and take part in a competition that you want to win. "
ROLES = {
    "Draft": "Devise an excellent and creative plan for a solution, and implement it in Python.",
    "Improve": "Below is a solution that was developed before. Improve it, so that it performs better on the test "
               "data: first outline in words how, then implement that on the basis of the solution.",
    "Debug": "Your solution below had a bug, or wrote no valid submission. Outline in words how to fix that, then "
             "implement the fix.",
    "Review": "You have written the script below for the task, and it was run. Judge from the output whether there was "
              "a bug, and report the findings."}
SKETCHES = {
    "Draft": ["This first design is rather simple, without ensembles or a search for hyperparameters.",
              "Heed the memory: do not propose the same model again, but keep the way of evaluation.",
              "The sketch has 3 to 5 sentences.", "Choose a metric for validation that suits the task.",
              "Do not propose exploratory data analysis.", "The data are ready in `data/`; nothing is to be unpacked."],
    "Improve": ["The sketch says how the solution can be improved, in 3 to 5 sentences.",
                "Be very specific: propose a single improvement that can be carried out.",
                "It is atomic, so that an experiment can measure its effect.",
                "Heed the memory when you propose it.", "Do not propose exploratory data analysis."],
    "Debug": ["The sketch says how the problem can be fixed, in 3 to 5 sentences.",
              "Do not propose exploratory data analysis."]}
RULES = """\
- The script implements the sketch and **prints the metric on validation data that are held out from training**.
- It is one file, complete, and runs as it is; no part is left out.
- The reply holds a single code block.
- One run must end within {limit:.0f} s. After this one {steps} steps and {minutes:.0f} min are left.
- The data are in `data/`, which is read-only.
- **The script must write the predictions for the test data to `submission.csv` in the current folder**, in the form \
that the task asks for. Only that file is graded: do not forget `submission.csv`.
- Files for its own use go to the current folder as well. Every script starts in an empty one.
- Use 5-fold cross-validation where it suits the task."""
REPLY = """A short sketch of your solution in words (3 to 5 sentences), then one markdown code block (in ```) that \
implements it and prints the metric. No headings, and nothing else."""
VERDICT = """One JSON object in a ```json block:
{"is_bug": true if the output shows that the run failed or has a bug, else false,
 "summary": "2 or 3 sentences on what was found, without suggestions",
 "metric": the value of the validation metric that the script printed, null if there is none,
 "lower_is_better": true if a lower value of that metric is better, else false}"""
PACKAGES = ("numpy", "pandas", "scikit-learn", "statsmodels", "xgboost", "lightgbm", "torch", "torchvision",
            "torch-geometric", "bayesian-optimization", "timm")


def build_prompt(operator, texts):
    """Returns the messages of a prompt. texts: for names of SECTIONS what is no constant."""
    texts = texts | {"role": CONTEST + ROLES[operator], "reply": REPLY, "verdict": VERDICT,
                     "sketch": "\n".join(f"- {rule}" for rule in SKETCHES.get(operator, ()))}
    parts = [f"# {HEADINGS[name]}\n\n{texts[name]}" for name in SECTIONS[operator]]
    return [{"role": "user", "content": "\n\n".join(parts)}]


def describe_task(task):
    """Returns the statement without what it says of the starter, which this scaffold does not show."""
    parts = [part for part in task.problem.strip().split("\n\n") if not part.startswith("`train.py` is")]
    text = re.sub(r"\s*Run the script after changing it\b[^.]*\.", "", "\n\n".join(parts))
    return f"{text}\n\nThe metric is {task.metric}; {better_word(task)} is better."


def compiles(script):
    try:
        compile(script, "script", "exec", dont_inherit=True)
        return True
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return False


def plan_and_script(reply):
    """Returns (plan, script) of a reply, "" for one that is not there: the text before the first fence, and all code
    blocks that compile; without a block the whole reply, if it compiles."""
    if len(reply) > env.MAX_REPLY:
        return "", ""
    plan, fence, _ = reply.partition("```")
    blocks = re.findall(r"```(?:python)?(.*?)```", reply, re.DOTALL)        # in linear time
    blocks = blocks or [re.sub(r"^```(?:python)?|```$", "", reply)]
    blocks = [block.strip("\n") for block in blocks]
    script = "\n\n".join(filter(compiles, blocks))
    return plan.strip() if fence else "", f"{script}\n" if script.strip() else ""


def read_review(reply):
    """Returns {"is_bug", "summary", "metric", "lower_is_better"} of a reviewer's reply, None if it has no verdict: of
    the JSON objects in it the last that says whether there is a bug."""
    for match in reversed(list(re.finditer(r"\{", reply[:env.MAX_REPLY]))[-100:]):
        try:
            values = json.JSONDecoder(strict=False).raw_decode(reply, match.start())[0]
        except (ValueError, RecursionError):
            continue
        if isinstance(values.get("is_bug"), bool):
            metric = values.get("metric")
            lower = values.get("lower_is_better")
            return {"is_bug": values["is_bug"], "summary": shorten(plain(str(values.get("summary", ""))), 1000),
                    "metric": metric if is_number(metric) else None,
                    "lower_is_better": lower if isinstance(lower, bool) else None}
    return None


# ---------------------------------------------------------------------------------------------------------------------
# What the data look like

LOCK = threading.Lock()     # a large table is read once, not by every trajectory at the same time


def preview(public):
    """Returns a description of the public data in at most MAX_PREVIEW characters."""
    with LOCK:
        return _preview(public, tuple(stamps_of(public)))


@functools.cache
def _preview(public, stamps):
    import pandas
    tree = []
    details = []        # of each table and each short text
    heads = []          # of each table, in few words
    for folder, names, files in os.walk(public):
        names.sort()
        place = Path("data", os.path.relpath(folder, public))
        num_shown = 4 if len(files) > 30 else 8
        tree.append(f"{place}/")
        for i, name in enumerate(sorted(files)):
            path = Path(folder, name)
            size = f"{path.stat().st_size:,} bytes"
            if path.suffix in (".csv", ".md", ".txt"):
                with path.open(errors="replace") as file:
                    lines = list(itertools.islice(file, 30))
                    size = f"{len(lines) + sum(1 for _ in file):,} lines"
            if i < num_shown:
                tree.append(f"  {name} ({size})")
            if path.suffix == ".csv":
                try:
                    table = pandas.read_csv(path, low_memory=False, encoding_errors="replace")
                except ValueError:      # no table after all
                    continue
                head = f"{place / name} has {len(table):,} rows and {len(table.columns)} columns."
                details.append("\n".join([head, *(describe_column(column, table[column]) for column in table)]))
                heads.append(f"{head} The first: {', '.join(map(str, table.columns[:15]))}.")
            elif path.suffix == ".json":
                text = read_start(path, 1 << 20).decode("utf-8", "replace")
                try:
                    record = json.JSONDecoder().raw_decode(text, max(0, text.find("{")))[0]
                except (ValueError, RecursionError):    # no record, or a longer one
                    continue
                if not isinstance(record, dict):
                    continue
                kinds = ", ".join(f"{name} ({type(value).__name__})" for name, value in record.items())
                heads.append(f"{place / name} holds records: {kinds}.")
                details.append(heads[-1])
            elif path.suffix in (".md", ".txt") and len(lines) < 30:
                details.append(f"{place / name}:\n{''.join(lines)}")
        if len(files) > num_shown:
            tree.append(f"  ... and {len(files) - num_shown:,} other files")
    tree = shorten("\n".join(tree), MAX_PREVIEW // 3)
    text = "\n\n".join([tree, *details])
    if len(text) > MAX_PREVIEW:
        text = "\n\n".join([tree, *heads])
    return text[:MAX_PREVIEW]


def describe_column(name, column):
    """Returns a line on the values of a column."""
    values = column.value_counts()
    if column.dtype == bool:
        text = f"True in {column.mean():.1%}"
    elif len(values) < 10:
        text = "values " + ", ".join(str(value)[:100] for value in sorted(values.index, key=str))
    elif column.dtype.kind in "iuf":
        text = f"from {column.min():.6g} to {column.max():.6g}"
    else:
        text = f"{len(values):,} values, such as " + ", ".join(repr(str(value)[:100]) for value in values.index[:4])
    blank = f", {column.isna().sum():,} blank" if column.hasnans else ""
    return f"- {name}: {text}{blank}"


# ---------------------------------------------------------------------------------------------------------------------
# The scaffold

class Env(env.Env):
    """One trajectory: each reply of the coder makes a node. search: as SEARCHES. draws: a text that seeds the choices,
    so that a trajectory that goes on chooses as one that was not broken off. coder: the reviewer; None: the printed
    score counts. The snapshot of a step is the node's script alone."""
    stop = ()
    num_tries = TRIES
    own = ("search", "draws")

    def __init__(self, *args, search=SEARCHES["aide"], draws="", **options):
        if len(search) != 3:
            raise ValueError(f"the search of a record has {len(search)} settings, not 3")
        self.search = list(search)
        self.draws = draws
        super().__init__(*args, **options)

    def reset(self):
        super().reset()
        self.messages = self.prompt()
        return self.messages

    def restore(self, snapshot, messages=None, *, past=(), **options):
        super().restore(snapshot, messages, **options)
        self.nodes = [self.node_of(line) for line in past]
        self.shown = []

    def node_of(self, line):
        """Returns the Node of a recorded step."""
        node = line["node"]
        metric = node.get("metric")
        buggy = node.get("buggy", True) or metric is None or line["score"] is None
        return Node(node.get("parent"), metric, buggy, line["score"], line["snapshot"].get(self.task.entry),
                    line["fields"].get("Plan", ""), line["fields"].get("Review", ""), line["observation"])

    def choose(self):
        rng = random.Random(zlib.crc32(f"{self.draws} {self.index} search".encode()))
        return choose(self.nodes, self.task.direction, rng, *self.search)

    def prompt(self):
        operator, parent = self.choose()
        texts = {"task": describe_task(self.task)}
        left_s = self.deadline - time.monotonic()
        texts["rules"] = RULES.format(limit=min(self.time_limit_s, max(1, left_s)), steps=self.steps_left - 1,
                                      minutes=left_s / 60)
        if parent is not None:
            node = self.nodes[parent]
            texts["script"] = f"```python\n{script_text(self.blobs, node.script)}```"
            texts["output"] = f"```\n{node.output}\n```"
        if "memory" in SECTIONS[operator]:
            works = [f"Design: {node.plan}\nResults: {node.summary}\nValidation score: {node.metric:.6g}"
                     for node in self.nodes if not node.buggy]
            texts["memory"] = "\n\n---\n\n".join(works)
        if "packages" in SECTIONS[operator]:
            installed = {text.partition("==")[0].lower() for text in describe(self.python or sys.executable)[2]}
            names = ", ".join(name for name in PACKAGES if name in installed)
            texts["packages"] = f"Among others: {names}. Nothing can be installed or downloaded."
        if "data" in SECTIONS[operator]:
            texts["data"] = preview(self.public)
        self.shown = build_prompt(operator, texts)
        return self.shown

    def read(self, reply):
        operator, parent = self.choose()
        return {}, operator, {} if parent is None else {"works on": f"node {parent}"}, ""

    def is_readable(self, reply):
        return all(plan_and_script(reply))

    def complete_observation(self, step):
        return step.observation

    def step(self, reply, tokens=None):
        if self.done:
            return super().step(reply)
        # 1. What the node is compared with: the node it is made from, and the best so far.
        parent = self.choose()[1]
        m_init = self.info["m_init"]
        self.m_before = m_init
        if parent is not None and self.nodes[parent].score is not None:
            self.m_before = self.nodes[parent].score
        self.m_top = best_of(self.task.direction, m_init, *(node.score for node in self.nodes))

        # 2. The node. There is one after every step.
        step = super().step(reply)
        step.node["parent"] = parent
        self.nodes.append(self.node_of(vars(step)))
        step.node["buggy"] = self.nodes[-1].buggy
        best = best_node(self.nodes, self.task.direction)
        step.node["best"] = best
        step.m_after = m_init if best is None else self.nodes[best].score
        step.printed = None if step.node["buggy"] else step.node["metric"]
        step.messages = [*self.shown, {"role": "assistant", "content": step.reply}]
        if not self.is_readable(step.reply):
            step.valid = False
            step.error = "The reply has no plan, or no script that compiles."
        return step

    def _make_node(self, step, **works_on):
        """Makes a node of a step's reply; returns the output of its script."""
        entry = self.task.entry
        plan, script = plan_and_script(step.reply)
        if not (plan and script):       # after all tries: the reply as it is, which a run shows to be no script
            plan = ""
            script = step.reply
        before = script_text(self.blobs, self.nodes[self.choose()[1]].script) if works_on else ""
        step.fields = {"Plan": plan, "Script": "\n".join(["The difference:", *difference(before, script)])}
        self.files = {entry: self.blobs.put(script.encode())}
        result = self._run_in_step(step, entry).result
        parts = [text for text in (result.stdout.strip(), result.stderr.strip()) if text]
        parts.append(f"Execution time: {result.seconds:.1f} s (limit: {self.time_limit_s:.0f} s).")
        if step.outcome not in ("ok", "error"):     # of an error the output tells
            parts.append(result.detail)
        output = shorten("\n".join(parts), env.MAX_OBSERVATION)
        if step.outcome == "ok":
            self._review(step, script, output)
        return output

    _draft = _debug = _improve = _make_node

    def _review(self, step, script, output):
        """Asks the reviewer about a script that has run, and puts its verdict into the step."""
        question = build_prompt("Review", {"task": describe_task(self.task), "script": f"```python\n{script}```",
                                           "output": f"```\n{output}\n```"})[0]["content"]
        review = None
        while review is None and self.coder and len(step.coder) < TRIES:
            try:
                review = read_review(self._ask_coder(step, question))
            except InvalidAction:       # too long for it
                break
        judge = "model"
        if review is None:
            judge = "script"
            review = {"is_bug": False, "summary": "", "metric": step.printed, "lower_is_better": None}
        metric = review["metric"]
        step.fields["Review"] = review["summary"]
        numbers = re.findall(r"\d*\.?\d+(?:[eE][-+]?\d{1,3})?", output)
        shown = {f"{float(number):.4g}" for number in numbers}
        step.node = {
            "metric": metric, "buggy": review["is_bug"] or metric is None, "review": judge,
            "lower_is_better": review["lower_is_better"],
            "is_printed": metric is not None and f"{abs(metric):.4g}" in shown}
