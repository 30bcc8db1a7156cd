"""The machine-learning tasks, how they are prepared and graded. tasks/README.md says what the folder of a task holds;
the environment variable ML_AGENT_TASKS names more folders of tasks, separated by ":".

    tasks.prepare("leaf-classification")                           # the miniature; raw="DIR" for the real data
    tasks.grade("leaf-classification", "submission.csv")           # a float, or tasks.InvalidSubmission with the reason
This fills `data/<id>/`: `public` (all the agent may see), `private` (the answers) and `task.json` (see `info`).
"""
import difflib
import fcntl
import functools
import hashlib
import importlib.util
import json
import math
import os
import re
import shutil
import sys
import tempfile
import threading
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Callable

from support import sandbox
from support.files import FLAG, NUMBER, TEXT, is_text, one_of, parse_json
from tasks.metrics import accuracy, auc, log_loss, mae, map5, mcrmse, pearson, qwk, rmse, rmsle
from tasks.raw import (
    MissingRaw, copy_raw, copy_raw_folder, jpeg, misspelt, raw_csv, raw_files, readable, settle, share_of_test,
    split_positions, split_rows, write_csv, write_tables, write_zip)
from tasks.submission import InvalidSubmission, matched, numbers, paired, read_submission, read_table, show

# What an idea may be about: the closed set of "kind" in ideas.json.
IDEA_KINDS = ("features", "model", "regularisation", "optimisation", "augmentation", "ensembling", "calibration",
              "validation")
MINIATURE_S = 1.5           # seconds of processor time of one script on a miniature, where ...
STARTER_S = 0.5             # ... the slowest starter takes so many: more on a slower machine, see env.Env.allowed_s
TABLE_1 = "Qwen-7B-Instruct", "Qwen-32B-Instruct", "GPT-4o-mini", "GPT-4o", "DeepSeek-R1", "ML-Agent"     # of the paper
FOLDERS = [Path(__file__).parent, *map(Path, filter(None, os.environ.get("ML_AGENT_TASKS", "").split(":")))]
GRADING = threading.Lock()  # one submission is graded at a time: tables of text can take much memory


@dataclass(frozen=True)
class Task:
    id: str
    metric: str                     # the metric's name as printed
    direction: str                  # "up": higher is better, 1 is perfect; "down": lower is better, 0 is perfect
    split: str                      # "held-in" (trained on) or "held-out" (evaluated on)
    source: str                     # whose split and grader this follows: "MLE-bench" or "MLAgentBench"
    size: str                       # of what to download
    prepare: Callable               # (raw, public, private, variant): the publisher's files -> public and private
    miniature: Callable             # (raw, seed): writes files as the publisher ships them, 300 test rows or more
    score: Callable                 # (answers, submission): two tables {column: [text]} -> float, or InvalidSubmission,
                                    # for what is in the submission, never for how it compares with the answers
    m_best: float                   # the best known score on the real data
    m_best_miniature: float         # a good model's score on the miniature of seed 0
    m_init: float | None = None     # the starter's score on the real data, first variant; None: not measured
    kaggle: str = ""                # files of the Kaggle competition of this id, or else ...
    download: str = ""              # ... what to get, from where
    key: str | None = "id"          # the submission's id column; None: rows are matched by position
    targets: tuple = ()             # the predicted columns; (): all of the sample submission's but the key
    text_targets: bool = False      # any text is a valid prediction
    answers: str = "test.csv"       # a file in private
    sample: str = "sample_submission.csv"   # a valid, poor submission, a file in public
    known_signal: str = ""          # why the publisher's own ids or order tell of the target, where they do
    known_twins: str = ""           # why train and test share rows in the publisher's own data, where they do
    variants: tuple = ()            # names of splits, the first the default; (): one, named after the source
    published: dict = field(default_factory=dict)   # Table 1: model -> (average, best) of 8, accuracies from 0 to 1
    m_best_source: str = ""         # where m_best comes from; with kaggle by default Kaggle's first place
    gold: float | None = None       # the score of Kaggle's gold medal, where it is of this metric
    alpha: float = 8.0              # the reward's slope
    time_limit_s: float = 600.0     # of one script
    memory_limit_bytes: int = 4 << 30
    entry = "train.py"              # the script that is edited, run and scored; no setting, since experts name it
    folder: Path | None = None      # where the task's files lie; filled in by load

    @property
    def problem(self):
        """The statement the agent reads."""
        return (self.folder / "problem.md").read_text()

    @property
    def starter(self):
        """The text of the script that the agent starts from."""
        return (self.folder / self.entry).read_text()

    @property
    def perfect(self):
        """The score of flawless predictions."""
        return 1.0 if self.direction == "up" else 0.0

    def better(self, a, b):
        """Whether score a beats score b."""
        return a > b if self.direction == "up" else a < b


def table_1(*scores):
    """{model: its scores}, for the models of the paper's Table 1 in its order."""
    return dict(zip(TABLE_1, scores, strict=True))


# -- The registry

def load(id):
    """The task with this id, the name of a folder that was found. ValueError with the nearest ids where there is none,
    whatever id is: it may come from someone's file."""
    folders = _folders()
    if not isinstance(id, str) or id not in folders:
        id = str(id)[:100]
        near = [name for name in folders if id in name] or difflib.get_close_matches(id, folders, cutoff=0.4)
        raise ValueError(f"There is no task {id!r}. Did you mean {' or '.join(near or folders)}?")
    return _load(folders[id])


def _folders():
    return {path.parent.name: path.parent for folder in FOLDERS for path in sorted(folder.glob("*/task.py"))}


@functools.cache
def _load(folder):
    spec = importlib.util.spec_from_file_location("tasks." + re.sub(r"\W", "_", folder.name), folder / "task.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    task = getattr(module, "TASK", None)
    if not isinstance(task, Task) or task.id != folder.name:
        raise ValueError(f"{folder / 'task.py'} must define TASK, a tasks.Task, whose id is the folder's name.")
    if task.kaggle:
        task = replace(task, download=f"{task.kaggle} of the Kaggle competition {task.id}, or its whole zip",
                       m_best_source=task.m_best_source or "first place of Kaggle's private leaderboard")
    return replace(task, folder=folder, variants=task.variants or (task.source.lower(),))


def names(which="all"):
    """The ids meant by `which`: one id, "held-in", "held-out", "paper" (the tasks of the paper's Table 1) or "all"."""
    if which not in ("all", "held-in", "held-out", "paper"):
        return [load(which).id]
    registered = sorted(map(load, _folders()), key=lambda task: (task.split, task.id))
    return [task.id for task in registered if which in ("all", task.split) or (which == "paper" and task.published)]


# -- Held-out tasks: nothing of them may be trained on

def held_out_hashes(data):
    """{sha256: id} of the files of all held-out tasks that are prepared in the folder `data`, of every seed. Sample
    submissions are left out: they hold no answer, and those of two tasks may be alike."""
    hashes = {}
    for folder in (Path(data), *Path(data).glob("seed-*")):
        for id in names("held-out"):
            if (folder / id / "task.json").exists():
                sha256 = info(id, folder)["sha256"]
                sha256.pop(f"public/{load(id).sample}", None)
                hashes |= dict.fromkeys(sha256.values(), id)
    return hashes


def refuse_held_out(id, sha256, forbidden):
    """ValueError if a task or one of its files, {name: sha256}, is held out or unknown. forbidden: see
    held_out_hashes."""
    if load(id).split != "held-in":
        raise ValueError(f"{id} is held out: it is for evaluation, and nothing of it may be trained on")
    for name, sha in sha256.items():
        if sha in forbidden:
            raise ValueError(f"{name} of {id} is a file of {forbidden[sha]}, which is held out (sha256 {sha[:16]}...): "
                             "nothing of it may be trained on")


def refuse_held_out_names(ids):
    """ValueError naming those of the tasks that are held out."""
    if refused := [id for id in ids if load(id).split != "held-in"]:
        raise ValueError(f"{', '.join(refused)}: held out, for evaluation; nothing of it may be trained on. The "
                         f"held-in tasks are: {', '.join(names('held-in'))}")


# -- Ideas

IDEA = {"title": TEXT, "kind": one_of(*IDEA_KINDS), "instruction": TEXT,
        "edits": [{"find": ("a text of some length", lambda value: is_text(value) and value), "replace": TEXT}]}


def ideas(id):
    """The ideas of the task's ideas.json, of the form IDEA; [] where there is no such file."""
    path = load(id).folder / "ideas.json"
    if not path.exists():
        return []
    found = parse_json(path.read_bytes(), [IDEA], path)
    if len({idea["title"] for idea in found if idea["edits"]}) < len(found):
        raise ValueError(f"{path}: each idea must have edits, and a title of its own")
    return found


def apply(script, idea):
    """The text `script` after the idea's edits, one after the other. ValueError: a text to find is not there once."""
    for number, edit in enumerate(idea["edits"], 1):
        if (times := script.count(edit["find"])) != 1:
            raise ValueError(f"Edit {number} of the idea {idea['title']!r} must find its text once in the script; "
                             f"it is there {times} times: {show(edit['find'])}.")
        script = script.replace(edit["find"], edit["replace"])
    return script


# -- Preparation

def seeded(data, seed):
    """The folder below `data` for miniatures of this seed; `data` itself, where real data lie too, for seed 0."""
    return Path(data) / f"seed-{seed}" if seed else Path(data)


def prepare(id, raw=None, data="data", variant=None, force=False, seed=0, log=print, python=sys.executable):
    """Prepares a task into data/id and returns that path; does nothing where that is done already.

    raw is the folder with the publisher's files; None makes the miniature of this seed, unless real data are prepared
    already. variant names one of the task's splits; None keeps the one that is there, else takes the first. The starter
    is run once with the interpreter `python` and its score recorded. ValueError: unknown task or variant; MissingRaw,
    which is one: the raw folder holds something else. RuntimeError: the starter fails, or a package is missing.
    """
    task = load(id)
    home = Path(data).resolve() / id
    if variant not in (None, *task.variants):
        raise ValueError(f"{id} has no variant {variant!r}; it has {', '.join(task.variants)}.")
    wanted = {"id": id, "miniature": raw is None, "code": hash_code(task)}
    if raw is None:
        wanted["seed"] = seed
    if variant:
        wanted["variant"] = variant
    if _may_stay(home, wanted, force, log):
        return home
    home.parent.mkdir(parents=True, exist_ok=True)
    part = home.with_name(f".{id}.part")
    with open(home.with_name(f".{id}.lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)    # several processes may want the same task: the others wait and find it done
        if _may_stay(home, wanted, force, log):
            return home
        shutil.rmtree(part, ignore_errors=True)     # of a process that was killed
        try:
            kept = info(id, home.parent)["variant"] if (home / "task.json").is_file() else None
            first = kept if kept in task.variants else task.variants[0]
            _build(task, part, raw, {"variant": first, **wanted}, log, python)
            (home / "task.json").unlink(missing_ok=True)    # first: a folder without it counts as not prepared
            if home.is_symlink():       # what it leads to stays there
                home.unlink()
            shutil.rmtree(home, ignore_errors=True)
            part.rename(home)
        finally:
            shutil.rmtree(part, ignore_errors=True)
    return home


def _may_stay(home, wanted, force, log):
    """Whether home holds what is wanted, or real data where a miniature is wanted."""
    if not (home / "task.json").is_file():
        return False
    facts = info(home.name, home.parent)
    if wanted["miniature"] and not facts["miniature"] and wanted.get("variant", facts["variant"]) != facts["variant"]:
        raise ValueError(f"{home} holds real data of the variant {facts['variant']}; to prepare {wanted['variant']} "
                         "give their publisher's files (--raw)")
    is_wanted = not force and all(facts.get(name) == value for name, value in wanted.items())
    is_kept = not facts["miniature"] and (is_wanted or wanted["miniature"])
    if is_kept:
        stale = "" if facts["code"] == wanted["code"] else ", which another version of the code has prepared"
        log(f"{home.name}: keeping the real data in {home}{stale}; give --raw and --force to prepare them again")
    if is_kept or is_wanted:
        answers = f"private/{load(home.name).answers}"
        if not (home / answers).exists() or hash_path(home / answers) != facts["sha256"].get(answers):
            raise ValueError(f"{home / answers} is not what was prepared. Delete {home} and prepare the task again.")
    return is_kept or is_wanted


def _build(task, part, raw, facts, log, python):
    """Fills the folder `part`, which is renamed when whole."""
    # 1. The data.
    public = part / "public"
    private = part / "private"
    public.mkdir(parents=True)
    private.mkdir()
    if raw is None:
        log(f"{task.id}: writing the miniature (seed {facts['seed']}); give --raw for the real data")
        with tempfile.TemporaryDirectory() as folder:
            task.miniature(Path(folder), facts["seed"])
            task.prepare(Path(folder), public, private, facts["variant"])
    else:
        log(f"{task.id}: preparing {raw} (variant {facts['variant']})")
        try:
            task.prepare(Path(raw), public, private, facts["variant"])
        except (ImportError, RuntimeError, MemoryError):
            raise
        except Exception as error:      # whatever other files than the publisher's lead to
            if isinstance(error, OSError) and error.errno in sandbox.NO_SPACE:
                raise
            raise MissingRaw(f"The files are not the publisher's: {error} ({type(error).__name__}). Get "
                             f"{task.download} ({task.size}) and put it there as it comes.") from error
    settle(public)

    # 2. The starter's score.
    log(f"{task.id}: running the starter once")
    score, seconds, _ = run_starter(task, part, python)
    log(f"{task.id}: ready; the starter scores {task.metric} {score:.5g} in {seconds:.1f} s")

    # 3. What is known of both.
    m_best = task.m_best_miniature if raw is None else task.m_best
    sha256 = {}
    for path in (*sorted(public.iterdir()), *sorted(private.iterdir())):
        sha256[str(path.relative_to(part))] = hash_path(path)
    facts = {**facts, "m_init": score, "m_best": m_best, "starter_seconds": round(seconds, 2), "sha256": sha256}
    (part / "task.json").write_text(json.dumps(facts, indent=1) + "\n")


def run_starter(task, home, python=sys.executable, script=None):
    """Runs the starter, or a script in its place, on home/public, without a sandbox: (graded score, seconds of
    processor time, stdout). RuntimeError where it fails."""
    name = f"{task.entry} of {task.id}"
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / task.entry).write_text(script or task.starter)
        (Path(folder) / "data").symlink_to((home / "public").resolve())
        result = sandbox.execute(task.entry, folder, cpu_s=task.time_limit_s, python=python,
                                 timeout_s=sandbox.wall_limit(task.time_limit_s), warm="wait",
                                 memory_bytes=task.memory_limit_bytes, sandbox="off")
        if result.outcome != "ok":
            hint = ""
            if "No module named" in result.stderr or "ImportError" in result.stderr:
                hint = f"\nInstall what the scripts use for {python}: pip install -r tasks/requirements.txt"
            raise RuntimeError(f"{name}: {result.outcome}. {result.detail}\n{result.stderr[-2000:]}{hint}")
        try:
            return _finite(score_file(task, home, Path(folder) / "submission.csv")), result.cpu_s, result.stdout
        except InvalidSubmission as error:
            raise RuntimeError(f"{name} writes a submission that is not valid. {error}") from None


# -- What is prepared

FACTS = {"miniature": FLAG, "variant": TEXT, "code": TEXT, "m_init": NUMBER, "m_best": NUMBER, "sha256": {str: TEXT}}


def _home(id, data):
    home = Path(data) / load(id).id
    if not (home / "task.json").is_file():
        raise ValueError(f"{id} is not prepared in {data}. Run: python -m tasks prepare {id} --data {data}")
    return home


def info(id, data="data"):
    """What task.json says of the prepared task, see FACTS; "m_init" is the starter's score, "sha256" {file: hash}.
    ValueError where there is none, or not what prepare has written."""
    home = _home(id, data)
    try:
        return parse_json((home / "task.json").read_bytes(), {**FACTS, "id": one_of(home.name)}, "task.json")
    except ValueError:
        raise ValueError(f"{home}/task.json is not what prepare has written. Delete {home} and prepare the task "
                         "again.") from None


def hash_files(*paths):
    """SHA-256 of the files' bytes, one after the other, in hexadecimal."""
    sha = hashlib.sha256()
    for path in paths:
        with open(path, "rb") as stream:
            hashlib.file_digest(stream, lambda: sha)
    return sha.hexdigest()


def hash_path(path):
    """The hash of a file, or of the names and contents of all files in a folder."""
    if path.is_file():
        return hash_files(path)
    names = [f"{file.relative_to(path)} {hash_files(file)}\n" for file in sorted(path.rglob("*")) if file.is_file()]
    return hashlib.sha256("".join(names).encode()).hexdigest()


def hash_code(task):
    """The hash of the code that prepares the task: what is prepared by another is stale."""
    return hash_files(task.folder / "task.py", task.folder / task.entry, Path(__file__).with_name("raw.py"))


# -- Grading

def grade(id, path, data="data"):
    """The score of the submission file at path by the prepared task's answers. InvalidSubmission, with the reason in
    one sentence, for anything at path that cannot be scored, whatever its bytes are."""
    return _finite(score_file(load(id), _home(id, data), path))


def score_file(task, home, path):
    """grade's score and errors for the task prepared in home, but NaN or infinity where the metric is not defined."""
    limit_bytes = (home / "public" / task.sample).stat().st_size * 4 + (4 << 20)    # numbers in full are 3 times longer
    with GRADING:
        submission = read_submission(path, limit_bytes)
        return float(task.score(read_answers(task, home), submission))


def _finite(score):
    if not math.isfinite(score):
        raise InvalidSubmission("The metric is not a finite number; constant predictions, for instance, have none.")
    return score


def read_answers(task, home):
    """The answers of the task prepared in home as a table; of columns only the key and the targets."""
    path = home / "private" / task.answers
    try:
        table = read_table(path)
    except InvalidSubmission as error:      # no fault of who is graded
        raise RuntimeError(f"{path} is damaged: {error}") from None
    columns = task.targets or table
    return {name: table[name] for name in table if name == task.key or name in columns}
