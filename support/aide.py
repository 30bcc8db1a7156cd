"""AIDE's tree search over whole scripts, as a scaffold (eval.py --scaffold aide).

A step makes one node: `choose` says whether to draft, debug or improve, the coder replies with plan and script, the
script runs once, a reviewer judges the output and reports the score in it. The result is the working node with the best
reported score. Every request is a new prompt. The search is that of WecoAI's aideml; what differs:

- The reviewer's verdict is JSON in its reply, asked for up to three times, instead of a forced function call. Without
  one the outcome of the run and the printed score decide. A run that failed is buggy without a review.
- The task says whether higher is better, not the reviewer. Whole numbers are scores too, NaN and infinities are none.
- A missing or invalid submission makes a node buggy, and its output says why.
- Every script starts in a new workspace and in the sandbox: nothing is installed, downloaded, or left to later nodes.
- The output is stdout, then stderr. The prompts tell the steps and the time that are left, as in MLE-bench's fork.
- The overview of the data has the sizes of files, not their numbers of lines, and values instead of shares for
  booleans; where it is too long each table's part is cut in its middle.
- Each prompt is one user message. Scripts are not formatted.
"""
import contextlib, functools, json, os, random, re, sys, threading, time, zlib
from dataclasses import dataclass
from pathlib import Path

import env
from env import plain
from reward import best_of
from support.cli import ContextFull
from support.files import is_number, shorten
from support.prompts import better_word
from support.sandbox import describe
from support.scripts import InvalidAction, difference
from support.workspace import read_start, script_text

SEARCHES = {        # name -> num_drafts, debug_prob, max_debug_depth
    "aide": (5, 0.5, 3),
    "mle-bench": (5, 1.0, 20)}
DEFAULTS = {"temperature": 0.5, "max_new_tokens": 4096, "context": 16_384}      # a reply holds a whole script
FINAL = "the working node with the best score that the reviewer reported, of equal ones the first,"
TRIES = 3               # of the coder and of the reviewer
MAX_PREVIEW = 6_000     # characters


# -- The search

@dataclass
class Node:
    """What step i makes is node i."""
    parent: int | None      # the node it was made from; None: a draft
    metric: float | None = None     # the score that the reviewer reported, not to be believed
    buggy: bool = True
    line: dict | None = None        # the record of the step; its score is the graded one, which no prompt tells


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
    working = [i for i, node in enumerate(nodes) if not node.buggy]
    best = max if direction == "up" else min        # both take the first of equal ones
    return best(working, key=lambda i: nodes[i].metric, default=None)


def choose(nodes, direction, rng, search):
    """Returns ("Draft", None), ("Debug", index of a node) or ("Improve", index of a node). search: see SEARCHES. The
    draws are those of the original: past the drafts one random(), then at most one choice()."""
    num_drafts, debug_prob, max_debug_depth = search
    if sum(node.parent is None for node in nodes) < num_drafts:     # the buggy ones too
        return "Draft", None
    if rng.random() < debug_prob:
        parents = {node.parent for node in nodes}
        broken = [i for i, node in enumerate(nodes)
                  if node.buggy and i not in parents and debug_depth(nodes, i) <= max_debug_depth]
        if broken:
            return "Debug", rng.choice(broken)
    best = best_node(nodes, direction)
    return "Draft" if best is None else "Improve", best


# -- Prompts and replies

BEGIN = "Introduction", "Task description"
CODE = "Response format", "Solution sketch", "Implementation"
SECTIONS = {        # the headed parts of each prompt, in order
    "Draft": (*BEGIN, "Memory", *CODE, "Installed packages", "Data overview"),
    "Improve": (*BEGIN, "Memory", "Previous solution", *CODE),
    "Debug": (*BEGIN, "Previous solution", "Execution output", *CODE, "Data overview"),
    "Review": (*BEGIN, "Previous solution", "Execution output", "Response format")}
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
    "Draft": """\
- This first design is rather simple, without ensembles or a search for hyperparameters.
- Heed the memory: do not propose the same model again, but keep the way of evaluation.
- Choose a metric for validation that suits the task.""",
    "Improve": """\
- Propose a single improvement, so specific that it can be carried out and an experiment can measure its effect.
- Heed the memory when you propose it.""",
    "Debug": "- The sketch says how the problem can be fixed."}
RULES = """\
- The script implements the sketch and **prints the metric on validation data that are held out from training**.
- It is one file, complete, and runs as it is; no part is left out.
- One run must end within {limit:g} s. After this one {steps} steps and {minutes:.0f} min are left.
- The data are ready in `data/`, which is read-only. Do not propose exploratory data analysis.
- **The script must write the predictions for the test data to `submission.csv` in the current folder**, in the form \
that the task asks for. Only that file is graded. Every script starts in an empty folder.
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


def build_prompt(operator, task, script="", output="", texts={}):
    """Returns the messages of a prompt. script, output: of the node that it is about; texts: {section: text}."""
    # 1. The statement, without what it says of the starter, which this scaffold does not show.
    parts = [part for part in task.problem.strip().split("\n\n") if not part.startswith("`train.py` is")]
    problem = re.sub(r"\s*Run the script after changing it\b[^.]*\.", "", "\n\n".join(parts))

    # 2. The sections.
    texts = texts | {
        "Introduction": CONTEST + ROLES[operator],
        "Task description": f"{problem}\n\nThe metric is {task.metric}; {better_word(task)} is better.",
        "Previous solution": f"```python\n{script}```", "Execution output": f"```\n{output}\n```",
        "Response format": VERDICT if operator == "Review" else REPLY, "Solution sketch": SKETCHES.get(operator)}
    content = "\n\n".join(f"# {name}\n\n{texts[name]}" for name in SECTIONS[operator])
    return [{"role": "user", "content": content}]


def compiles(script):
    try:
        compile(script, "script", "exec", dont_inherit=True)
        return True
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return False


def plan_and_script(reply):
    """Returns (plan, script) of a reply: the text before the first fence, and all code blocks that compile; or ""."""
    blocks = re.findall(r"```(?:python)?(.*?)```", reply[:env.MAX_REPLY], re.DOTALL)        # in linear time
    script = "\n\n".join(block.strip("\n") for block in blocks if compiles(block))
    return reply.partition("```")[0].strip(), f"{script}\n" if script.strip() else ""


def read_review(reply):
    """Returns {"is_bug", "summary", "metric"} of the last JSON object in a reply that has "is_bug", or None."""
    for match in reversed(list(re.finditer(r"\{", reply[:env.MAX_REPLY]))[-100:]):
        try:
            values = json.JSONDecoder(strict=False).raw_decode(reply, match.start())[0]
        except (ValueError, RecursionError):
            continue
        if isinstance(values.get("is_bug"), bool):
            metric = values.get("metric")
            return {"is_bug": values["is_bug"], "summary": shorten(plain(str(values.get("summary", ""))), 1000),
                    "metric": metric if is_number(metric) else None}
    return None


# -- What the data look like

LOCK = threading.Lock()     # a large table is read once, not by every trajectory at the same time


@functools.cache
def preview(public):
    """Returns a description of the public data in at most MAX_PREVIEW characters."""
    import pandas
    tree = []
    details = []        # of each table and each short text
    for folder, names, files in os.walk(public):
        names.sort()
        place = Path("data", os.path.relpath(folder, public))
        tree.append(f"{place}/")
        files.sort(key=lambda name: (not name.endswith((".csv", ".json", ".md", ".txt")), name))
        num_shown = 4 if len(files) > 30 else 8
        for name in files[:num_shown]:
            path = Path(folder, name)
            tree.append(f"  {name} ({path.stat().st_size:,} bytes)")
            with contextlib.suppress(ValueError, RecursionError):       # no table or record after all, or a longer one
                if path.suffix == ".csv":
                    table = pandas.read_csv(path, low_memory=False, encoding_errors="replace")
                    head = f"{place / name} has {len(table):,} rows and {len(table.columns)} columns."
                    details.append("\n".join([head, *(describe_column(column, table[column]) for column in table)]))
                elif path.suffix == ".json":
                    text = read_start(path, 1 << 20).decode("utf-8", "replace")
                    record = json.JSONDecoder().raw_decode(text, text.index("{"))[0]
                    kinds = ", ".join(f"{name} ({type(value).__name__})" for name, value in record.items())
                    details.append(f"{place / name} holds records: {kinds}.")
                elif path.suffix in (".md", ".txt"):
                    text = read_start(path, MAX_PREVIEW).decode("utf-8", "replace")
                    if text.count("\n") < 30:
                        details.append(f"{place / name}:\n{text}")
        if len(files) > num_shown:
            tree.append(f"  ... and {len(files) - num_shown:,} other files")
    tree = shorten("\n".join(tree), MAX_PREVIEW // 3)
    text = "\n\n".join([tree, *details])
    if len(text) > MAX_PREVIEW:
        room = (MAX_PREVIEW - len(tree)) // len(details) - 40       # with the mark of what is cut out
        text = "\n\n".join([tree, *(shorten(detail, room) for detail in details)])
    return text[:MAX_PREVIEW]


def describe_column(name, column):
    """Returns a line on the values of a column."""
    values = column.value_counts()
    if column.dtype.kind in "iuf" and len(values) >= 10:
        text = f"from {column.min():.6g} to {column.max():.6g}"
    else:
        shown = values.index[:4] if len(values) >= 10 else values.index
        text = f"{len(values):,} values: {', '.join(str(value)[:100] for value in shown)}"
    blank = f", {column.isna().sum():,} blank" if column.hasnans else ""
    return f"- {name}: {text}{blank}"


# -- The scaffold

class Env(env.Env):
    """One trajectory. search: as SEARCHES. draws: a text that seeds the choices, so that a trajectory that goes on
    chooses as one that was not broken off. coder: the reviewer; None: the printed score counts. The snapshot of a step
    is the node's script alone."""
    stop = ()
    num_tries = TRIES
    own = ("search", "draws")

    def __init__(self, *args, search=SEARCHES["aide"], draws="", **options):
        self.search = list(search)
        self.draws = draws
        super().__init__(*args, **options)

    def reset(self):
        super().reset()
        self.messages = self.prompt()
        self.deadline = time.monotonic() + self.seconds     # to read the data the first time does not count
        return self.messages

    def restore(self, snapshot, messages=None, *, past=(), **options):
        super().restore(snapshot, messages, **options)
        self.nodes = [self.node_of(line) for line in past]
        self.shown = []
        self.choose()

    def node_of(self, line):
        """Returns the Node of a recorded step."""
        node = line.get("node", {})     # a record of others may have none
        metric = node.get("metric")
        buggy = node.get("buggy", True) or metric is None or line["score"] is None
        return Node(node.get("parent"), metric, buggy, line)

    def choose(self):
        """Decides what the next step does: self.operator, and self.parent with the script of that node."""
        rng = random.Random(zlib.crc32(f"{self.draws} {self.index} search".encode()))
        self.operator, self.parent = choose(self.nodes, self.task.direction, rng, self.search)
        self.parent_script = ""
        if self.parent is not None:
            sha = self.nodes[self.parent].line["snapshot"].get(self.task.entry)
            self.parent_script = script_text(self.blobs, sha)

    def prompt(self):
        left_s = self.deadline - time.monotonic()
        memory = []
        for node in self.nodes:
            if not node.buggy:
                fields = node.line["fields"]
                memory.append(f"Design: {fields.get('Plan', '')}\nResults: {fields.get('Review', '')}\n"
                              f"Validation score: {node.metric:.6g}")
        installed = {text.partition("==")[0].lower() for text in describe(self.python or sys.executable)[2]}
        names = ", ".join(name for name in PACKAGES if name in installed)
        with LOCK:
            data = preview(self.public)
        output = "" if self.parent is None else self.nodes[self.parent].line["observation"]
        self.shown = build_prompt(self.operator, self.task, self.parent_script, output, {
            "Memory": "\n\n---\n\n".join(memory), "Data overview": data,
            "Installed packages": f"Among others: {names}. Nothing can be installed or downloaded.",
            "Implementation": RULES.format(limit=min(self.time_limit_s, max(1, round(left_s))),
                                           steps=self.steps_left - 1, minutes=left_s / 60)})
        return self.shown

    def read(self, reply):
        return {}, self.operator, {} if self.parent is None else {"works on": f"node {self.parent}"}, ""

    def is_readable(self, reply):
        return all(plan_and_script(reply))

    def complete_observation(self, step):
        return step.observation

    def step(self, reply, tokens=None):
        # 1. What the node is compared with: the node it is made from, and the best so far.
        m_init = self.info["m_init"]
        scores = [node.line["score"] for node in self.nodes]
        self.m_before = m_init
        if self.parent is not None and scores[self.parent] is not None:
            self.m_before = scores[self.parent]
        self.m_top = best_of(self.task.direction, m_init, *scores)

        # 2. The node. There is one after every step.
        step = super().step(reply)
        step.node["parent"] = self.parent
        self.nodes.append(self.node_of(vars(step)))
        step.node["buggy"] = self.nodes[-1].buggy
        best = best_node(self.nodes, self.task.direction)
        step.node["best"] = best
        step.m_after = m_init if best is None else self.nodes[best].line["score"]
        step.printed = None if step.node["buggy"] else step.node["metric"]
        step.messages = [*self.shown, {"role": "assistant", "content": step.reply}]
        if not self.is_readable(step.reply):
            step.valid = False
            step.error = "The reply has no plan, or no script that compiles."
        self.choose()
        return step

    def _make_node(self, step, **works_on):
        entry = self.task.entry
        plan, script = plan_and_script(step.reply)
        if not (plan and script):       # after all tries: the reply as it is, which a run shows to be no script
            plan = ""
            script = step.reply
        lines = difference(self.parent_script, script)
        step.fields = {"Plan": plan, "Script": "\n".join(["The difference:", *lines])}
        self.files = {entry: self.blobs.put(script.encode())}
        result = self._run_in_step(step, entry).result
        parts = [text for text in (result.stdout.strip(), result.stderr.strip()) if text]
        parts.append(f"Execution time: {result.seconds:.1f} s (limit: {self.time_limit_s:g} s).")
        if step.outcome not in ("ok", "error"):     # of an error the output tells
            parts.append(result.detail)
        output = shorten("\n".join(parts), env.MAX_OBSERVATION)
        if step.outcome == "ok":
            self._review(step, script, output)
        return output

    _draft = _debug = _improve = _make_node

    def _review(self, step, script, output):
        question = build_prompt("Review", self.task, script, output)[0]["content"]
        review = None
        judge = "model"
        for _ in range(TRIES if self.coder else 0):
            try:
                review = read_review(self._ask_coder(step, question))
            except InvalidAction as error:      # no reply, or one that is too long
                if isinstance(error.__cause__, ContextFull):
                    break
            if review:
                break
        if review is None:
            judge = "script"
            review = {"is_bug": False, "summary": "", "metric": step.printed}
        metric = review["metric"]
        step.fields["Review"] = review["summary"]
        said = output.rpartition("\nExecution time: ")[0]       # what the script printed
        numbers = re.findall(r"\d*\.?\d+(?:[eE][-+]?\d{1,3})?", said)
        shown = {f"{float(number):.4g}" for number in numbers}
        step.node = {"metric": metric, "buggy": review["is_bug"] or metric is None, "review": judge,
                     "is_printed": metric is not None and f"{abs(metric):.4g}" in shown}
