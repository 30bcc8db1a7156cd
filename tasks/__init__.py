"""The machine-learning tasks: one folder a task, found by scanning; how they are split, scored and prepared.

A task is a folder `tasks/<id>/` with three files:
    problem.md   the statement the agent reads
    train.py     the starter script the agent improves; reads `data/`, writes `submission.csv`
    task.py      `TASK = Task(...)`: the figures, and three functions: prepare, miniature, score
More folders of tasks can be named in the environment variable ML_AGENT_TASKS (separated by ":").

Prepared data lie in `data/<id>/`: `public` (all the agent may see), `private` (the answers) and `task.json` (what was prepared, from
what, with row counts, hashes and the starter's measured score). Without the publisher's files a *miniature* is prepared: data of the same
form, made up from a seed. Scores on a miniature do not compare with published ones.

    import tasks
    tasks.prepare("leaf-classification")                           # the miniature; raw="DIR" for the real data
    tasks.grade("leaf-classification", "submission.csv")           # a float, or tasks.InvalidSubmission with the reason
On the command line: `python -m tasks list | prepare | grade | check`.
"""
import csv, difflib, fcntl, functools, hashlib, importlib.util, io, json, math, os, re, shutil, stat, subprocess, sys, tempfile, time, zipfile
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Callable

import numpy as np
import pandas as pd

FOLDERS = [Path(__file__).parent, *map(Path, filter(None, os.environ.get("ML_AGENT_TASKS", "").split(":")))]


class InvalidSubmission(ValueError):
    """The submission cannot be graded; the message says why in one sentence."""


# ---------------------------------------------------------------------------------------------------- the task and the registry

@dataclass(frozen=True)
class Task:
    id: str
    modality: str                   # "tabular", "image", "text" or "graph"
    kind: str                       # "classification", "regression" or "generation"
    metric: str                     # the metric's name as printed
    direction: str                  # "up": higher is better (1 is perfect); "down": lower is better (0 is perfect)
    split: str                      # "held-in" (trained on) or "held-out" (evaluated on)
    source: str                     # whose split and grader this follows: "MLE-bench" or "MLAgentBench"
    download: str                   # what to get, from where
    size: str                       # how large the download is
    prepare: Callable               # (raw, public, private, variant): the publisher's files -> what the agent sees, and the answers
    miniature: Callable             # (raw, seed): writes files as the publisher ships them, 50 to 500 rows
    score: Callable                 # (answers, submission): two tables {column: [text]} -> float; raises InvalidSubmission
    m_init: float | None            # the starter's score on the real data, default variant, measured; None where not measured
    m_best: float                   # the best known score on the real data ...
    m_best_source: str              # ... and where that figure comes from
    m_best_miniature: float         # a good model's score on the miniature of seed 0 ...
    m_best_miniature_source: str    # ... and which model that was
    key: str | None = "id"          # the submission's id column; None: rows are matched by position
    targets: tuple = ()             # the columns that are predicted; (): all of the sample submission's but the key
    text_targets: bool = False      # the predicted values are free text, so any text is a valid prediction
    answers: str = "test.csv"       # the answers, a file in private
    sample: str = "sample_submission.csv"   # a valid, poor submission, a file in public
    test_file: str = ""             # the file that belongs to a test row, from the row's id: "images/{}.jpg"
    known_signal: str = ""          # why the order of the ids carries a signal that is the publisher's own, where it does
    variants: tuple = ("default",)  # names of splits; the first is the default
    published: dict = field(default_factory=dict)   # Table 1: model -> (average, best) over 8 trajectories, in the metric's unit (accuracy 0 to 1)
    medals: dict = field(default_factory=dict)      # "gold", "silver", "bronze", "median" -> score on Kaggle's private leaderboard
    alpha: float = 8.0              # the reward's slope
    time_limit_s: float = 600.0     # one script, seconds
    memory_limit_bytes: int = 4 << 30   # one script, bytes
    entry: str = "train.py"         # the script that is edited, run and scored
    read_only: tuple = ("data",)    # what a script may read and not write, in the workspace
    folder: Path | None = None      # where the task's three files lie; filled in by load

    @property
    def problem(self):
        """The statement the agent reads."""
        return (self.folder / "problem.md").read_text()

    @property
    def perfect(self):
        """The score of flawless predictions."""
        return 1.0 if self.direction == "up" else 0.0

    def better(self, a, b):
        """Whether score a beats score b."""
        return a > b if self.direction == "up" else a < b

    def weakest(self):
        """The weakest average of Table 1, or None where the table does not have the task."""
        averages = [average for average, _ in self.published.values()]
        return (min if self.direction == "up" else max)(averages) if averages else None


def load(id):
    """The task with this id. ValueError with the nearest ids where there is none."""
    folders = _folders()
    if id not in folders:
        near = difflib.get_close_matches(str(id), folders, n=3, cutoff=0.4)
        raise ValueError(f"There is no task {str(id)!r}. " + (f"Did you mean {' or '.join(near)}?" if near else f"There are: {', '.join(folders)}."))
    return _load(folders[id])


def names(which="all"):
    """The ids named by `which`: one id, "held-in", "held-out", "paper" (the tasks of the paper's Table 1) or "all"."""
    every = [load(id) for id in _folders()]
    groups = {"all": every, "held-in": [t for t in every if t.split == "held-in"], "held-out": [t for t in every if t.split == "held-out"],
              "paper": [t for t in every if t.published]}
    if which in groups:
        return [task.id for task in sorted(groups[which], key=lambda task: (task.split, task.id))]
    try:
        return [load(which).id]
    except ValueError as error:
        raise ValueError(f"{error} Groups of tasks are {', '.join(groups)}.") from None


def _folders():
    return {path.parent.name: path.parent for folder in FOLDERS for path in sorted(folder.glob("*/task.py"))}


@functools.cache
def _load(folder):
    spec = importlib.util.spec_from_file_location("tasks." + re.sub(r"\W", "_", folder.name), folder / "task.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if module.TASK.id != folder.name:
        raise ValueError(f"{folder / 'task.py'} calls its task {module.TASK.id!r}; the id must be the folder's name.")
    return replace(module.TASK, folder=folder)


# ---------------------------------------------------------------------------------------------------- the publisher's files

def read_csv(source, **options):
    """A data frame whose floats are written back exactly as they were read."""
    return pd.read_csv(source, float_precision="round_trip", **options)


def write_csv(frame, path):
    """Writes a data frame as the recorded MD5 sums need it: no index column, `\\n` line ends."""
    frame.to_csv(path, index=False, lineterminator="\n")


def train_test_split(n, fraction, seed=0):
    """Positions of the train rows and of the test rows, int64 (n - ceil(fraction n),) and (ceil(fraction n),), in the order both are written.

    This is scikit-learn's shuffled, unstratified split restated, so that it stays the same whatever version is installed.
    """
    num_test = math.ceil(fraction * n)
    order = np.random.RandomState(seed).permutation(n)
    return order[num_test:], order[:num_test]


class MissingRaw(ValueError):
    """A file of the publisher is not in the raw folder."""


def raw_files(raw):
    """Yields (path, open) for every file under raw: loose ones first, then the members of zips, then those of zips inside zips.

    path is text with "/" between parts, zips included ("train.csv.zip/train.csv"). open() gives a binary stream and must be called before the
    next pair is asked for, because archives are closed behind it.
    """
    loose = sorted(path for path in Path(raw).rglob("*") if path.is_file())
    for path in loose:
        yield path.relative_to(raw).as_posix(), functools.partial(path.open, "rb")
    for path in loose:
        if path.suffix == ".zip":
            with path.open("rb") as stream:
                yield from _zip_files(path.relative_to(raw).as_posix(), stream)


def _zip_files(name, stream):
    with zipfile.ZipFile(stream) as archive:
        members = [member for member in archive.namelist() if not member.endswith("/") and not member.startswith("__MACOSX")]
        for member in members:
            yield f"{name}/{member}", functools.partial(archive.open, member)
        for member in members:
            if member.endswith(".zip"):
                with tempfile.TemporaryFile() as inner:     # a copy: seeking inside a deflated member would unpack it again each time
                    with archive.open(member) as packed:
                        shutil.copyfileobj(packed, inner)
                    yield from _zip_files(f"{name}/{member}", inner)


def raw_csv(raw, name, **options):
    """The data frame in the file called `name`, wherever it lies under raw. MissingRaw where it is not there."""
    for path, opened in raw_files(raw):
        if path.split("/")[-1] == name:
            with opened() as stream:
                return read_csv(stream, **options)
    raise MissingRaw(f"{name} is not in {raw}, neither loose nor inside a zip.")


def copy_raw(raw, name, target):
    """Copies the file called `name`, wherever it lies under raw, to the path target, byte for byte."""
    copy_raw_folder(raw, None, Path(target).parent, {name: Path(target).name})


def copy_raw_folder(raw, folder, target, wanted):
    """Streams the files `wanted` (an iterable of names, or {name: new name}) that lie in a folder called `folder` under raw to the folder target.

    The names of archives do not count as folders; folder None takes files from anywhere. MissingRaw names the first files that were not there.
    """
    wanted = dict(wanted) if isinstance(wanted, dict) else {name: name for name in wanted}
    missing, total = dict(wanted), len(wanted)
    Path(target).mkdir(parents=True, exist_ok=True)
    for path, opened in raw_files(raw):
        *parents, name = path.split("/")
        if name in missing and (folder is None or parents[-1:] == [folder]):
            with opened() as source, open(Path(target) / missing.pop(name), "wb") as sink:
                shutil.copyfileobj(source, sink)
            progress(total - len(missing), total, "files copied")
            if not missing:
                return
    where = f"{raw}" if folder is None else f"a folder {folder} of {raw}"
    raise MissingRaw(f"{len(missing)} of {total} files are not in {where}, neither loose nor inside a zip: {', '.join(sorted(missing)[:3])}.")


def progress(done, total, what):
    """One line on the terminal that counts up; silent when stderr is not a terminal."""
    if sys.stderr.isatty() and (done == total or done % max(1, total // 100) == 0):
        print(f"\r{done}/{total} {what}", end="\n" if done == total else "", file=sys.stderr, flush=True)


# ---------------------------------------------------------------------------------------------------- prepare

def prepare(id, raw=None, data="data", variant=None, force=False, seed=0, say=print, python=sys.executable):
    """Prepares a task into data/id and returns that path; does nothing where that is done already.

    raw is the folder with the publisher's files; None makes the miniature of this seed, unless real data are prepared already, which are kept.
    variant names one of the task's splits. The folder is built aside and renamed when whole, so it is complete or not there. The starter is run
    once with the interpreter `python` and its score recorded. say is called with each line of progress.
    ValueError: unknown task or variant, a raw folder that lacks a file. RuntimeError: the starter fails.
    """
    task, home = load(id), Path(data).resolve() / id
    variant = task.variants[0] if variant is None else variant
    if variant not in task.variants:
        raise ValueError(f"{id} has no variant {variant!r}; it has {', '.join(task.variants)}.")
    if raw is not None and not Path(raw).is_dir():
        raise ValueError(f"The raw folder {raw} is not there. It should hold {task.download} ({task.size}).")
    made_from = {"id": id, "miniature": raw is None, "variant": variant, "seed": seed if raw is None else None,
                 "raw": None if raw is None else _fingerprint(raw), "code": _hash(task.folder / "task.py", task.folder / task.entry)}
    if _prepared(task, home, made_from, force, say):
        return home
    home.parent.mkdir(parents=True, exist_ok=True)
    part, old = (home.with_name(f".{id}.{suffix}") for suffix in ("part", "old"))
    with open(home.with_name(f".{id}.lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)            # several processes may want the same task at once: the others wait, then find it done
        if _prepared(task, home, made_from, force, say):
            return home
        shutil.rmtree(part, ignore_errors=True)     # left behind by a process that was killed
        shutil.rmtree(old, ignore_errors=True)
        try:
            _build(task, part, raw, made_from, say, python)
            if home.exists():
                home.rename(old)
            part.rename(home)
        finally:
            shutil.rmtree(part, ignore_errors=True)
            shutil.rmtree(old, ignore_errors=True)
    facts = info(id, data)
    say(f"{id}: ready in {home}; the starter scores {task.metric} {facts['m_init']:.5g} in {facts['starter_seconds']:.1f} s")
    return home


def _prepared(task, home, made_from, force, say):
    """Whether home may stay as it is."""
    if not (home / "task.json").exists():
        return False
    found = json.loads((home / "task.json").read_text())
    if made_from["miniature"] and not found["miniature"]:
        if force:
            raise ValueError(f"{home} holds real data. Give --raw to prepare them again, or delete that folder to get the miniature.")
        say(f"{task.id}: keeping the real data in {home}" + (
            "" if found["code"] == made_from["code"] else "; they were prepared by another version of the task, so prepare them again with --raw"))
        return True
    return not force and all(found.get(name) == value for name, value in made_from.items())


def _build(task, part, raw, made_from, say, python):
    """Fills the folder `part` with public, private and task.json."""
    public, private = part / "public", part / "private"
    public.mkdir(parents=True)
    private.mkdir()
    if raw is None:
        say(f"{task.id}: writing the miniature (seed {made_from['seed']}); give --raw for the real data")
        with tempfile.TemporaryDirectory() as folder:
            task.miniature(Path(folder), made_from["seed"])
            task.prepare(Path(folder), public, private, made_from["variant"])
    else:
        say(f"{task.id}: preparing {raw} (variant {made_from['variant']})")
        try:
            task.prepare(Path(raw), public, private, made_from["variant"])
        except MissingRaw as error:
            raise MissingRaw(f"{error} Get {task.download} ({task.size}) and put it there as it comes.") from None
        except zipfile.BadZipFile as error:
            raise ValueError(f"A zip in {raw} is damaged ({error}). Get {task.download} again.") from None
    for path in public.rglob("*"):
        if path.is_file():
            path.chmod(0o444)                       # scripts see the folder itself, so a slip must not write into it
    files = [path for folder in (public, private) for path in sorted(folder.iterdir()) if path.is_file()]
    say(f"{task.id}: running the starter once")
    score, seconds, _ = run_starter(task, part, python)
    facts = {**made_from, "rows": {str(path.relative_to(part)): _num_rows(path) for path in files if path.suffix == ".csv"},
             "sha256": {str(path.relative_to(part)): _hash(path) for path in files}, "m_init": score, "starter_seconds": round(seconds, 2),
             "m_best": task.m_best_miniature if raw is None else task.m_best,
             "m_best_source": task.m_best_miniature_source if raw is None else task.m_best_source}
    (part / "task.json").write_text(json.dumps(facts, indent=1) + "\n")


def run_starter(task, home, python=sys.executable):
    """Runs the starter on home/public in a temporary folder: (its graded score, seconds, what it printed). RuntimeError where it fails."""
    with tempfile.TemporaryDirectory() as folder:
        shutil.copy(task.folder / task.entry, folder)
        os.symlink(home / "public", Path(folder) / "data")
        start = time.monotonic()
        run = subprocess.run([python, task.entry], cwd=folder, capture_output=True, text=True, timeout=task.time_limit_s)
        seconds = time.monotonic() - start
        if run.returncode != 0:
            raise RuntimeError(f"The starter of {task.id} failed with exit status {run.returncode}:\n{run.stderr[-2000:]}")
        return _finite(score_file(task, home, Path(folder) / "submission.csv")), seconds, run.stdout


def info(id, data="data"):
    """What task.json says of the prepared task. ValueError where it is not prepared."""
    load(id)
    path = Path(data) / id / "task.json"
    if not path.exists():
        raise ValueError(f"{id} is not prepared in {data}. Run: python -m tasks prepare {id} --data {data}")
    return json.loads(path.read_text())


def _hash(*paths):
    sha = hashlib.sha256()
    for path in paths:
        with open(path, "rb") as stream:
            while block := stream.read(1 << 20):
                sha.update(block)
    return sha.hexdigest()


def _fingerprint(raw):
    """A short text that changes when a file under raw appears, goes or changes its size. Hashing gigabytes at every start would be too slow."""
    files = sorted((path.relative_to(raw).as_posix(), path.stat().st_size) for path in Path(raw).rglob("*") if path.is_file())
    return hashlib.sha256(json.dumps(files).encode()).hexdigest()


def _num_rows(path):
    with open(path, newline="", encoding="utf-8") as stream:
        return sum(1 for _ in csv.reader(stream)) - 1


# ---------------------------------------------------------------------------------------------------- submissions

def grade(id, path, data="data"):
    """The score of the submission file at path, by the prepared task's answers. InvalidSubmission, with the reason, for anything that cannot be scored."""
    info(id, data)
    return _finite(score_file(load(id), Path(data) / id, path))


def score_file(task, home, path):
    """As grade, for a task prepared in home; NaN where the metric is not defined for these predictions."""
    limit = (home / "public" / task.sample).stat().st_size * 8 + (4 << 20)      # no honest file is eight times as long as the sample
    submission = read_submission(path, limit)
    answers = home / "private" / task.answers
    with np.errstate(over="ignore", invalid="ignore", divide="ignore"):         # predictions near 1e308 overflow: reported as not finite
        return float(task.score(_answers(answers, answers.stat().st_mtime_ns, task.key, task.targets), submission))


def _finite(score):
    if not math.isfinite(score):
        raise InvalidSubmission("The metric is not a finite number for these predictions: they are constant or far too large.")
    return score


@functools.lru_cache(maxsize=8)
def _answers(path, mtime, key, targets):
    """The answers as a table. Only the columns that are needed: others can be many."""
    columns = None if not targets else [key, *targets] if key else list(targets)
    return pd.read_csv(path, dtype=str, keep_default_na=False, usecols=columns).to_dict("list")


def read_submission(path, limit_bytes):
    """The table {column: [text]} in the CSV file at path, whatever bytes are there. Nothing is parsed beyond text here: see numbers."""
    try:
        handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        raise InvalidSubmission(f"The submission cannot be opened as an ordinary file: {error.strerror}.") from None
    with open(handle, "rb") as stream:
        facts = os.fstat(handle)
        if not stat.S_ISREG(facts.st_mode):
            raise InvalidSubmission("The submission is not an ordinary file.")
        if facts.st_size > limit_bytes:
            raise InvalidSubmission(f"The file has {facts.st_size} bytes; at most {limit_bytes} are read.")
        data = stream.read(limit_bytes)
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InvalidSubmission(f"The file is not UTF-8 text: {error.reason} at byte {error.start}.") from None
    if "\0" in text:
        raise InvalidSubmission("The file is not text: it holds zero bytes.")
    rows = csv.reader(io.StringIO(text, newline=""), strict=True)
    try:
        header = [name.strip() for name in next(rows, [])]
        if not header:
            raise InvalidSubmission("The file is empty.")
        if len(set(header)) < len(header):
            raise InvalidSubmission("A column name occurs twice.")
        columns = [[] for _ in header]
        for row in rows:
            if len(row) != len(header) and row:
                raise InvalidSubmission(f"Line {rows.line_num} has {len(row)} fields; the first line has {len(header)}.")
            for column, value in zip(columns, row):
                column.append(value)
    except csv.Error as error:
        raise InvalidSubmission(f"The file is not CSV at line {rows.line_num}: {error}.") from None
    return dict(zip(header, columns))


def matched(submission, answers, key, columns, extra=True):
    """`columns` of the submission with its rows in the order of the answers' ids, {column: [text]}.

    key is the id column, or None to take the rows as they stand. extra says whether further columns are allowed. Ids may occur more than once
    where the answers' do: then they are taken in the order they come.
    """
    needed = [key, *columns] if key else list(columns)
    if lacking := [name for name in needed if name not in submission]:
        raise InvalidSubmission(f"{_some(lacking, 'column')} missing; the columns must be {', '.join(map(_show, needed[:4]))}{', ...' if len(needed) > 4 else ''}.")
    if not extra and len(submission) > len(needed):
        raise InvalidSubmission(f"{_some([name for name in submission if name not in needed], 'column')} not expected.")
    num_rows, num_wanted = len(submission[needed[0]]), len(answers[next(iter(answers))])
    if num_rows != num_wanted:
        raise InvalidSubmission(f"The file has {num_rows} rows; {num_wanted} were expected.")
    if key is None or submission[key] == answers[key]:
        return {name: submission[name] for name in columns}
    found, wanted = ([re.sub(r"^(-?\d+)\.0*$", r"\1", id.strip()) for id in table[key]] for table in (submission, answers))     # 12.0 is 12
    by_id, order = sorted(range(num_rows), key=found.__getitem__), sorted(range(num_rows), key=wanted.__getitem__)
    for i, j in zip(by_id, order):
        if found[i] != wanted[j]:
            unknown = sorted(set(found) - set(wanted))
            raise InvalidSubmission(f"{_some(unknown, key)} not in the test set." if unknown else f"{_show(key)} {_show(min(found[i], wanted[j]))} occurs too often.")
    place = [0] * num_rows
    for i, j in zip(by_id, order):
        place[j] = i
    return {name: [submission[name][i] for i in place] for name in columns}


def numbers(table, columns, low=-math.inf, high=math.inf, whole=False, sum_to_one=False):
    """The columns of a table as float64 (rows, columns). InvalidSubmission for text, NaN and infinity, values outside [low, high], values that are not
    whole where they must be, and rows that do not sum to one (within 1e-6 + 1e-5, as MLE-bench has it) where they must."""
    values = np.empty((len(table[columns[0]]), len(columns)))
    for j, name in enumerate(columns):
        for i, text in enumerate(table[name]):
            try:
                values[i, j] = float(text)
            except ValueError:
                raise InvalidSubmission(f"Row {i + 1} of column {_show(name)} holds {_show(text)}, which is not a number.") from None
    fine = np.isfinite(values) & (values >= low) & (values <= high) & ((values == np.floor(values)) if whole else True)
    if not fine.all():
        i, j = np.argwhere(~fine)[0]
        wanted = f"a {'whole' if whole else 'finite'} number" + (f" from {low:g} to {high:g}" if high < math.inf else f" of at least {low:g}" if low > -math.inf else "")
        raise InvalidSubmission(f"Row {i + 1} of column {_show(columns[j])} holds {values[i, j]:g}; it must be {wanted}.")
    if sum_to_one and len(values):
        sums = values.sum(1)
        i = np.abs(sums - 1).argmax()
        if abs(sums[i] - 1) > 1e-6 + 1e-5:
            raise InvalidSubmission(f"The values of row {i + 1} sum to {sums[i]:.6g}; each row must sum to 1.")
    return values


def _show(text):
    """Text from a file made fit for a message: short, quoted, control characters escaped."""
    return ascii(text if len(text) <= 40 else text[:37] + "...")


def _some(items, what):
    return f"{what} {_show(items[0])} is" if len(items) == 1 else f"{len(items)} values of {what} (such as {_show(items[0])}) are"


# ---------------------------------------------------------------------------------------------------- metrics
# y is the truth and p the prediction, arrays of one shape. ValueError where they are empty, differ in shape or hold NaN or infinity.

def _same(y, p):
    y, p = np.asarray(y, np.float64), np.asarray(p, np.float64)
    if y.shape != p.shape or y.size == 0:
        raise ValueError(f"The truth has shape {y.shape} and the prediction {p.shape}; they must be the same and not empty.")
    if not (np.isfinite(y).all() and np.isfinite(p).all()):
        raise ValueError("The truth or the prediction holds NaN or infinity.")
    return y, p


def log_loss(y, p):
    """Mean over rows of -sum y ln p, p clipped to [eps, 1 - eps]. y one-hot (N, K), or 0/1 (N,) with p the probability of 1. Rows are not rescaled."""
    y, p = _same(y, p)
    if y.ndim == 1:
        y, p = np.stack([1 - y, y], 1), np.stack([1 - p, p], 1)
    eps = np.finfo(np.float64).eps
    return float(-(y * np.log(np.clip(p, eps, 1 - eps))).sum(1).mean())


def auc(y, p):
    """Area under the ROC curve, ties counted half; of 0/1 labels (N,), or the mean over the columns of (N, K). ValueError where a column has one class."""
    y, p = _same(y, p)
    if y.ndim == 2:
        return float(np.mean([auc(y[:, k], p[:, k]) for k in range(y.shape[1])]))
    num_pos, num_neg = (y == 1).sum(), (y == 0).sum()
    if num_pos == 0 or num_neg == 0:
        raise ValueError("The AUC needs labels of both classes.")
    _, inverse, counts = np.unique(p, return_inverse=True, return_counts=True)
    ranks = (counts.cumsum() - (counts - 1) / 2)[inverse]       # 1-based, tied values share their mean rank
    return float((ranks[y == 1].sum() - num_pos * (num_pos + 1) / 2) / (num_pos * num_neg))


def accuracy(y, p):
    """Fraction equal, of any values."""
    y, p = np.asarray(y), np.asarray(p)
    if y.shape != p.shape or y.size == 0:
        raise ValueError(f"The truth has shape {y.shape} and the prediction {p.shape}; they must be the same and not empty.")
    return float((y == p).mean())


def rmse(y, p):
    """Root of the mean squared difference over all values."""
    y, p = _same(y, p)
    return float(np.sqrt(((p - y) ** 2).mean()))


def mae(y, p):
    """Mean absolute difference."""
    y, p = _same(y, p)
    return float(np.abs(p - y).mean())


def rmsle(y, p):
    """Root mean squared difference of ln(1 + value). ValueError for negative values."""
    y, p = _same(y, p)
    if (y < 0).any() or (p < 0).any():
        raise ValueError("The RMSLE is not defined for negative values.")
    return rmse(np.log1p(y), np.log1p(p))


def mcrmse(y, p):
    """Mean over the columns of (N, K) of each column's RMSE."""
    y, p = _same(y, p)
    return float(np.sqrt(((p - y) ** 2).mean(0)).mean())


def qwk(y, p):
    """Quadratic weighted kappa of two ratings (N,). The grid is the union of the labels present, so a rating absent from both closes the gap;
    NaN where only one label is present."""
    y, p = _same(y, p)
    labels, place = np.unique(np.concatenate([y, p]), return_inverse=True)
    i, j = place[:len(y)], place[len(y):]
    expected = np.bincount(i, minlength=len(labels))[:, None] * np.bincount(j, minlength=len(labels)) / len(y)
    weights = (np.arange(len(labels))[:, None] - np.arange(len(labels))) ** 2
    return float(1 - ((i - j) ** 2).sum() / (weights * expected).sum()) if len(labels) > 1 else math.nan


def pearson(y, p):
    """Pearson's correlation of (N,) with (N,); NaN where one of them is constant."""
    y, p = _same(y, p)
    if (y == y[0]).all() or (p == p[0]).all():
        return math.nan
    y, p = y - y.mean(), p - p.mean()
    return float((y * p).sum() / np.sqrt((y * y).sum() * (p * p).sum()))


def map5(y, p):
    """Mean over rows of 1 / rank of the true label y[i] among the first five of the space-separated labels p[i]; 0 where it is not there."""
    if len(y) != len(p) or len(y) == 0:
        raise ValueError(f"There are {len(y)} true labels and {len(p)} predictions; they must be as many, and not none.")
    ranked = [labels.split(" ")[:5] for labels in p]
    return float(np.mean([1 / (labels.index(truth) + 1) if truth in labels else 0.0 for truth, labels in zip(y, ranked)]))
