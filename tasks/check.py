"""Proofs that a prepared task is sound: what would be wrong is found by trying it. `python -m tasks check` runs them.

Each of PROOFS is a function of a Case that returns a sentence for each fault. The first MAX_ROWS test rows are
searched, and public tables of up to MAX_BYTES.
"""
import functools
import gzip
import io
import itertools
import json
import math
import re
import tempfile
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

import tasks

SIGMAS = 5              # a signal: so many standard deviations beyond what shuffled targets give
NUM_SHUFFLES = 50
MIN_GROUP = 5           # rows; smaller groups count as one
MIN_IDEAS = 10
MIN_KINDS = 5
MAX_ROWS = 20_000
MAX_BYTES = 128 << 20
CHANCE = 1e-6           # how likely it may be that a class is missing by chance
TABLES = (".csv", ".tsv", ".txt", ".json", ".npy")
VALIDATION_LINE = re.compile(r"^validation .+: -?\d+(\.\d+)?\s*$", re.MULTILINE)


@dataclass
class Case:
    """A prepared task. Tables are {column: [text]}."""
    task: tasks.Task
    home: Path
    facts: dict         # what task.json says
    targets: list       # the predicted columns
    sample: dict
    answers: dict       # in the order of the private file
    gold: dict          # the answers in the columns and the order of the sample
    starter: float      # its score
    printed: str        # by the starter

    def __post_init__(self):
        self.public = self.home / "public"
        self.tables = read_public_tables(self.public)
        self.train = self.tables.get("train.csv", pd.DataFrame())
        self.test = self.tables.get("test.csv", pd.DataFrame())
        self.is_miniature = self.facts["miniature"]
        self.labels = list(zip(*[self.gold[name] for name in self.targets]))    # a tuple of texts for each row
        self.scored = [i for i, texts in enumerate(self.labels) if set(texts) != {self.task.unscored}]
        self.ids = self.gold[self.task.key][:MAX_ROWS] if self.task.key else []
        self.test_files = []
        if self.task.test_file:
            self.test_files = [self.public / self.task.test_file.format(id) for id in self.gold[self.task.key]]

    def score(self, table):
        """The score of a table that is handed in; {} is an empty file."""
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "submission.csv"
            path.write_text(pd.DataFrame(table).to_csv(index=False) if table else "")
            return tasks.score_file(self.task, self.home, path)


def read_case(id, data, python):
    task = tasks.load(id)
    home = Path(data) / id
    targets = tasks.target_columns(task, home)
    sample = tasks.read_table(home / "public" / task.sample)
    answers = tasks.read_answers(task, home)
    gold = {**sample, **tasks.matched(answers, sample, task.key, targets)}
    starter, _, printed = tasks.run_starter(task, home, python)
    return Case(task, home, tasks.info(id, data), targets, sample, answers, gold, starter, printed)


def read_public_tables(public):
    """{path: text frame} of the public files that are tables, loose, in a zip or in gzip."""
    tables = {}
    for path, opened in tasks.raw_files(public):
        name = path.removesuffix(".gz")
        if not name.endswith(TABLES):
            continue
        try:
            with opened() as stream:
                data = (gzip.open(stream) if name != path else stream).read(MAX_BYTES + 1)
            if len(data) <= MAX_BYTES:
                tables[path] = _frame(name, data)
        except (ValueError, TypeError, OSError, EOFError):
            pass            # not a table
    return tables


def _frame(name, data):
    """The bytes of a file as a text frame."""
    if name.endswith(".npy"):
        array = np.load(io.BytesIO(data))
        return pd.DataFrame(array.reshape(len(array), -1)[:, :100]).astype(str)
    if name.endswith(".json"):
        data = json.loads(data)
        return pd.DataFrame(data.items() if isinstance(data, dict) else data).astype(str)
    separator = "\t" if name.endswith(".tsv") else ","
    frame = pd.read_csv(io.BytesIO(data), sep=separator, dtype=str, keep_default_na=False, on_bad_lines="skip")
    # Where rows are longer than the header pandas takes the first cells for an index.
    return frame.reset_index(drop=isinstance(frame.index, pd.RangeIndex))


def check(id, data, python):
    """(row, failures) of the task prepared in data/id: a dict of figures, and a sentence for each proof that failed."""
    start = time.monotonic()
    case = read_case(id, data, python)
    failures = [failure for proof in PROOFS for failure in proof(case)]
    known = duplicates(case)
    if case.is_miniature or not case.task.known_twins:
        failures += known
        known = []
    return {"train": case.facts["rows"].get("public/train.csv"), "test": len(case.labels), "starter": case.starter,
            "m_best": case.facts["m_best"], "seconds": round(time.monotonic() - start, 1), "known": known}, failures


# ---------------------------------------------------------------------------------------------------------------------
# Files and scores

def changed_files(case):
    """The files are those that were prepared, by the task.py and the starter that are there now."""
    failures = [f"{name} is not what was prepared." for name, sha in case.facts["sha256"].items()
                if not (case.home / name).exists() or tasks.hash_files(case.home / name) != sha]
    if case.facts["code"] != tasks.hash_code(case.task):
        failures.append(f"It was prepared by an older task.py or {case.task.entry}; prepare it again.")
    return failures


def wrong_scores(case):
    """The answers are perfect, in any order of rows that have ids; the starter is better than the sample and than
    answers of other rows, m_best is better than the starter, and the starter does what was recorded."""
    task = case.task
    m_init = case.facts["m_init"]
    m_best = case.facts["m_best"]
    order = np.random.default_rng(0).permutation(len(case.labels))
    shuffled = {name: [case.gold[name][i] for i in order] for name in case.gold}
    best = case.score(case.gold)
    reordered = case.score(shuffled) if task.key else best
    poor = case.score(case.sample)
    chance = case.score({**case.gold, **{name: shuffled[name] for name in case.targets}})
    real_m_init = None
    if not case.is_miniature and case.facts["variant"] == task.variants[0]:
        real_m_init = task.m_init
    better = f"no worse than the starter's {case.starter:.5g}."
    scored = f"The starter scores {case.starter:.6g};"
    faults = [
        (not math.isclose(best, task.perfect, abs_tol=1e-9), f"The answers score {best}, not {task.perfect}."),
        (not math.isclose(reordered, best, abs_tol=1e-9), "The answers score less with their rows in another order."),
        (not _is_worse(case, poor), f"The sample submission scores {poor:.5g}, {better}"),
        (not _is_worse(case, chance), f"A submission of other rows' answers scores {chance:.5g}, {better}"),
        (not task.better(m_best, case.starter), f"m_best ({m_best:.5g}) is no better than {case.starter:.5g}."),
        (not VALIDATION_LINE.search(case.printed), "The starter prints no line such as 'validation accuracy: 0.9'."),
        (abs(case.starter - m_init) > 1e-6 * abs(m_init), f"{scored} task.json records {m_init:.6g}."),
        # Machines round differently.
        (real_m_init is not None and abs(case.starter - real_m_init) > 0.01 * abs(m_best - real_m_init),
         f"{scored} the task records {real_m_init}.")]
    return [sentence for is_fault, sentence in faults if is_fault]


def _is_worse(case, score):
    return math.isnan(score) or case.task.better(case.starter, score)


# ---------------------------------------------------------------------------------------------------------------------
# The grader

def spoilt_submissions(case):
    """Yields (what is wrong, table), one after the other: tables may be large."""
    gold = case.gold
    targets = case.targets
    key = case.task.key
    yield "a missing column", {name: column for name, column in gold.items() if name != targets[-1]}
    yield "a missing row", {name: column[:-1] for name, column in gold.items()}
    yield "a surplus row", {name: [*column, column[-1]] for name, column in gold.items()}
    yield "no rows", {name: [] for name in gold}
    yield "an empty file", {}
    yield "a blank", _with_first_cell(gold, targets[0], "")
    if key:
        yield "an unknown id", _with_first_cell(gold, key, "no-such-id")
        yield "a doubled id", _with_first_cell(gold, key, gold[key][1])
    if not case.task.text_targets:
        yield "text", _with_first_cell(gold, targets[0], "text")
        for name in targets[:10] + targets[10:][-10:]:
            yield f"NaN in the column {name!r}", _with_first_cell(gold, name, "nan")
        yield "a blank at the end", {**gold, targets[-1]: [*gold[targets[-1]][:-1], ""]}


def _with_first_cell(table, name, text):
    return {**table, name: [text, *table[name][1:]]}


def not_refused(case):
    """Submissions that cannot be scored are refused with a reason."""
    failures = []
    for fault, table in spoilt_submissions(case):
        try:
            case.score(table)
            failures.append(f"A submission with {fault} is not refused.")
        except tasks.InvalidSubmission as error:
            if not str(error):
                failures.append(f"A submission with {fault} is refused without a reason.")
        except Exception as error:
            failures.append(f"A submission with {fault} ends in {type(error).__name__}, not in InvalidSubmission.")
    return failures


def unscored_columns(case):
    """Every predicted column counts: made wrong alone, it makes the score of the answers worse."""
    failures = []
    for name, other in zip(case.targets, [*case.targets[1:], case.targets[0]]):
        column = case.gold[name]
        turned = {name: list(column)}
        swapped = {name: list(column), other: list(case.gold[other])}   # keeps the sum of a distribution
        for i, j in zip(case.scored, [*case.scored[1:], *case.scored[:1]]):
            turned[name][i] = column[j]
            if _number(column[i]) == 1:
                swapped[name][i] = case.gold[other][i]
                swapped[other][i] = column[i]
        stays = _stays_perfect(case, turned)
        if stays is None or turned[name] == column:
            stays = _stays_perfect(case, swapped) and swapped[name] != column
        if stays:
            failures.append(f"The column {name!r} must be predicted and is not scored.")
    return failures


def unscored_rows(case):
    """Every row that has an answer counts; some are drawn."""
    rng = np.random.default_rng(0)
    num_drawn = min(20 if len(case.labels) <= MAX_ROWS else 8, len(case.scored))
    ignored = []
    for i in rng.permutation(case.scored)[:num_drawn].tolist():
        for j in rng.permutation(case.scored)[:1000]:
            if case.labels[j] != case.labels[i]:
                changed = {name: [*case.gold[name][:i], case.gold[name][j], *case.gold[name][i + 1:]]
                           for name in case.targets}
                if _stays_perfect(case, changed):
                    ignored.append(i + 1)
                break
    return [f"{len(ignored)} of {num_drawn} rows may be wrong and the answers score as well, such as row {row}."
            for row in ignored[:1]]


def _stays_perfect(case, changed):
    """Whether the answers score as well with the changed columns; None where the grader refuses them."""
    try:
        score = float(case.task.score(case.answers, {**case.gold, **changed}))
    except tasks.InvalidSubmission:
        return None
    return None if math.isnan(score) else not case.task.better(case.task.perfect, score)


def _number(text):
    """The number that the text means, True being 1 and False 0, or None."""
    try:
        return float({"true": "1", "false": "0"}.get(text.strip().lower(), text))
    except ValueError:
        return None


# ---------------------------------------------------------------------------------------------------------------------
# What public files give away

def given_away(case):
    """No column of a public table that can be matched with the test rows is the answers, or other names for the
    classes, or, where train.csv lacks it, numbers in the same order."""
    columns = _label_columns(case)
    failures = []
    for path, table in case.tables.items():
        for name, cells in _test_rows(case, table).items():
            is_submission = path == case.task.sample and name in case.targets   # its score says how good it is
            if is_submission or name == case.task.key or cells.nunique() < 2:
                continue
            is_feature = name in case.train and path in ("train.csv", "test.csv")
            tells = _is_renamed(cells, case.labels[:MAX_ROWS]) or any(
                _is_equal(cells, column) or _is_renamed(cells, column) or not is_feature and _is_ordered(cells, column)
                for column in columns.values())
            if tells:
                failures.append(f"The column {name!r} of the public file {path} tells the answers.")
    return failures


def _label_columns(case):
    """{column: texts} of the answers of the rows that are searched. One-hot columns are one, the name of the class: a
    column alone may be like another one by chance."""
    table = pd.DataFrame({name: case.gold[name][:MAX_ROWS] for name in case.targets})
    hot = table.map(_number) == 1
    if len(case.targets) > 1 and (hot.sum(axis=1) == 1).all():
        return {"class": hot.idxmax(axis=1)}
    return dict(table.items())


def _test_rows(case, table):
    """The rows of a frame that have the test rows' ids, or all rows where there are as many; else an empty frame."""
    if table.empty:
        return table
    key = case.task.key if case.task.key in table else table.columns[0]
    with_id = table.drop_duplicates(key).set_index(key, drop=False)
    if case.ids and set(case.ids) <= set(with_id.index):
        return with_id.loc[case.ids].reset_index(drop=True)
    if len(table) == len(case.labels) - 1:          # the file has no header
        table = pd.concat([table.columns.to_frame().T.set_axis(table.columns, axis=1), table], ignore_index=True)
    return table[:MAX_ROWS] if len(table) == len(case.labels) else pd.DataFrame()


def _is_equal(cells, column):
    """Whether two columns hold the same texts or numbers."""
    same_number = np.isclose(_numeric(cells), _numeric(column), rtol=1e-6, atol=1e-12)
    return ((cells == column) | same_number).all()


def _is_renamed(cells, labels):
    """Whether the cells are other names of the labels, and there are so many ways to deal these out that it is no
    accident."""
    counts = Counter(labels)
    same_groups = len(set(zip(cells, labels))) == len(set(cells)) == len(counts)
    return same_groups and 2 * len(counts) <= len(labels) and len(labels) - max(counts.values()) >= 10


def _is_ordered(cells, column):
    """Whether two columns of numbers go up, or one up and the other down, together."""
    ranks = pd.DataFrame({"cells": _numeric(cells), "column": _numeric(column)}).rank()
    if ranks.isna().any(axis=None) or ranks.nunique().min() < 10:
        return False
    return abs(np.corrcoef(ranks.T)[0, 1]) > 0.9999


def _numeric(cells):
    """A series of numbers, True being 1 and False 0; NaN where a cell is none."""
    return pd.Series(list(cells)).map(_number).astype(float)


def shown_targets(case):
    """The test file does not have a target's column, and files that belong to test rows are there."""
    failures = [f"{path} is missing." for path in case.test_files if not path.exists()][:1]
    if set(case.targets) & set(case.test):
        failures.append("The public test file has the target's column.")
    return failures


def duplicates(case):
    """No row, and no file of a row, is both in train and in test, be it with other capitals or blanks, as a hundredth
    of real rows may be."""
    failures = []
    ids = set() if case.task.key_is_feature else set(case.sample) - set(case.targets)
    features = [name for name in case.test if name in case.train and name not in ids]
    exact = _shared_rows(case.test[features], case.train[features])
    alike = _shared_rows(case.test[features].map(_plain), case.train[features].map(_plain))
    if exact:
        failures.append(f"{len(exact)} rows are in train and in test, such as row {exact[0]} of test.")
    elif len(alike) > (0 if case.is_miniature else 0.01 * len(case.test)):
        failures.append(f"{len(alike)} rows are in train and in test but for capitals and blanks, such as row "
                        f"{alike[0]} of test.")
    if case.test_files:
        hashes = {tasks.hash_files(path) for path in case.test_files if path.exists()}
        others = set(case.public.rglob(f"*{Path(case.task.test_file).suffix}")) - set(case.test_files)
        same = [path for path in sorted(others) if path.is_file() and tasks.hash_files(path) in hashes]
        failures += [f"{len(same)} files of train are in test too, such as {path}." for path in same[:1]]
    return failures


def _shared_rows(test, train):
    """The numbers, from 1, of the rows of test that are in train too; none where they have no columns in common."""
    if len(test.columns) == 0:
        return []
    learned = set(train.itertuples(index=False, name=None))
    return [number for number, row in enumerate(test.itertuples(index=False, name=None), 1) if row in learned]


def _plain(text):
    return "".join(text.split()).casefold()


def missing_classes(case):
    """No class of the answers lacks training rows, nor a class of those answers, unless chance may have it so: in
    miniatures the former never."""
    if case.task.kind != "classification":
        return []
    failures = []
    only_learned = [name for name in case.train if name not in case.test]
    for name, texts in _label_columns(case).items():
        if name == "class" and len(only_learned) == 1:      # the answers are one-hot, train has one column
            name = only_learned[0]
        if name not in only_learned:
            continue
        learned = _classes(case.train[name])
        answers = _classes(text for text in texts if text != case.task.unscored)
        if 2 * len(learned) > learned.total():
            continue            # no classes
        failures += [f"The class {value!r} of {name!r} is among the answers and in no training row."
                     for value in _missing(answers, learned, math.inf if case.is_miniature else CHANCE)]
        failures += [f"The class {value!r} of {name!r} is among the training rows and in no answer."
                     for value in _missing(learned, answers, CHANCE)]
    return failures


def _classes(texts):
    """How often each class occurs, which is a number or else a text."""
    pairs = ((text, _number(text)) for text in texts)
    return Counter(text if number is None else number for text, number in pairs)


def _missing(here, there, chance):
    """The classes that only the first of two counters has, where that is less likely than `chance`."""
    return [value for value, count in here.items()
            if value not in there and (1 - count / here.total()) ** there.total() < chance]


# ---------------------------------------------------------------------------------------------------------------------
# Signals

def signals(case):
    """The position in the test file and the id tell nothing of the target, and in miniatures nor do the size of a row's
    file and the blanks around texts: no statistic is beyond SIGMAS standard deviations of those of shuffled targets.
    The publisher's own ids or order may tell (known_signal, known_order); sizes of real images do."""
    # 1. What may tell: orders of the rows, and groups of them.
    statistics = {}
    orders = _orders(case)
    for name, values in _groups(case, orders).items():
        weights = _group_weights(values)
        if len(weights) > 1:
            statistics[name, "distance of its groups"] = functools.partial(_distance, weights)
    if case.test_files and case.is_miniature:
        orders["size of the file"] = np.array([path.stat().st_size for path in case.test_files if path.exists()])
    for name, values in orders.items():
        if np.ptp(values) > 0:
            rank = pd.Series(values).rank().to_numpy()
            statistics[name, "rank correlation with it"] = functools.partial(_correlation, rank - rank.mean())
            statistics[name, "likeness of neighbours"] = functools.partial(_likeness, np.argsort(values, kind="stable"))

    # 2. What they tell of the target, against what they tell of shuffled ones.
    y = _standardised(case)
    rng = np.random.default_rng(0)
    targets = itertools.chain([y], (y[rng.permutation(len(y))] for _ in range(NUM_SHUFFLES)))
    value, *chance = ([statistic(target) for statistic in statistics.values()] for target in targets)
    z = (np.array(value) - np.mean(chance, 0)) / (np.std(chance, 0) + 1e-12)
    return [f"The {name} tells of the target: the {what} is {z[k]:.0f} standard deviations beyond chance."
            for k, (name, what) in enumerate(statistics) if z[k] > SIGMAS]


def _standardised(case):
    """The targets, classes one-hot, as (rows, columns), each column with mean 0 and deviation 1."""
    columns = []
    for name in case.targets:
        values = pd.Series(case.gold[name][:MAX_ROWS])
        number = pd.to_numeric(values, errors="coerce")
        if number.notna().all():
            columns.append(number)
        else:
            columns += [values == value for value in values.value_counts().index[:100]]
    y = np.stack([np.asarray(column, float) for column in columns], 1)
    return (y - y.mean(0)) / np.where(y.std(0) > 0, y.std(0), 1)


def _orders(case):
    """{name: a number for each test row} that the rows can be ordered by."""
    orders = {"position in the test file": np.arange(len(case.labels[:MAX_ROWS]))}
    if case.task.known_order:
        orders = {}
    if case.task.key:
        ids = pd.Series(case.ids)
        number = pd.to_numeric(ids, errors="coerce")
        rank = (number if number.notna().all() else ids).rank().to_numpy()
        if not case.task.known_signal:
            orders["id"] = rank
        elif (np.diff(rank) > 0).all():
            orders = {}         # positions are ids
    return orders


def _groups(case, orders):
    """{name: a value for each test row} that groups the rows in a way that should tell nothing."""
    groups = {}
    numbers = dict(orders)
    if "id" in orders:
        digits = [re.findall(r"\d+", id) for id in case.ids]
        numbers["id"] = np.array([int(runs[-1][-15:]) if runs else -1 for runs in digits])
        groups["last letter of the id"] = [id[-1:] for id in case.ids]
        groups["first letter of the id"] = [id[:1] for id in case.ids]
        groups["length of the id"] = [len(id) for id in case.ids]
    for name, values in numbers.items():
        groups |= {f"{name} modulo {k}": values % k for k in range(2, 17)}
    if case.is_miniature:
        for name, cells in _test_rows(case, case.test).items():
            length = cells.str.len()
            groups[f"number of blanks at the end of {name!r}"] = length - cells.str.rstrip().str.len()
            groups[f"number of blanks at the start of {name!r}"] = length - cells.str.lstrip().str.len()
    return groups


def _group_weights(values):
    """(groups, rows): for each group of enough rows that have one value, 1 / sqrt(its rows) in these and else 0."""
    codes, _ = pd.factorize(np.asarray(values))
    codes = np.where(np.bincount(codes)[codes] < MIN_GROUP, -1, codes)
    members = [codes == code for code in np.unique(codes)]
    return np.array([member / np.sqrt(member.sum()) for member in members if member.sum() >= MIN_GROUP])


def _distance(weights, y):
    """How far apart the groups' sums of y are: the cube root makes it nearly normal."""
    return ((weights @ y) ** 2).sum() ** (1 / 3)


def _correlation(rank, y):
    """The largest correlation of the centred ranks with a column of y."""
    return np.abs(rank @ y / (len(y) * rank.std())).max()


def _likeness(order, y):
    """The mean product of rows of y that are neighbours in the order."""
    return (y[order[1:]] * y[order[:-1]]).mean()


# ---------------------------------------------------------------------------------------------------------------------
# Ideas

def unfit_ideas(case):
    """Where there are ideas there are enough of them, and each applies to the starter and compiles."""
    task = case.task
    try:
        ideas = tasks.ideas(task.id)
    except ValueError as error:
        return [str(error)]
    failures = []
    num_kinds = len({idea["kind"] for idea in ideas})
    if ideas and (len(ideas) < MIN_IDEAS or num_kinds < MIN_KINDS):
        failures.append(f"There are {len(ideas)} ideas of {num_kinds} kinds; at least {MIN_IDEAS} of {MIN_KINDS} are "
                        "wanted.")
    for idea in ideas:
        try:
            compile(tasks.apply(task.starter, idea), task.entry, "exec")
        except (ValueError, SyntaxError) as error:
            failures.append(f"The idea {idea['title']!r} does not fit the starter: {error}")
    return failures


def check_ideas(id, data, python):
    """(row, failures) as check, of running each of the task's ideas on what is prepared in data/id: at least half must
    improve the starter's score and at least one must make it worse."""
    start = time.monotonic()
    task = tasks.load(id)
    starter = tasks.info(id, data)["m_init"]
    failures = []
    scores = {}
    for idea in tasks.ideas(id):
        name = f"The idea {idea['title']!r}"
        try:
            script = tasks.apply(task.starter, idea)
            scores[idea["title"]], _, _ = tasks.run_script(task, Path(data) / id, script, python, name)
        except (RuntimeError, ValueError) as error:
            failures.append(str(error))
    changed = [score for score in scores.values() if not math.isclose(score, starter, rel_tol=1e-9)]
    num_better = sum(task.better(score, starter) for score in changed)
    if 2 * num_better < len(scores):
        failures.append(f"Only {num_better} of {len(scores)} ideas improve the score.")
    if scores and num_better == len(changed):
        failures.append("No idea makes the score worse; some should, as with anyone's ideas.")
    highest = max if task.direction == "up" else min
    best = highest(scores, key=scores.get, default=None)
    return {"starter": starter, "best": scores.get(best), "better": num_better, "same": len(scores) - len(changed),
            "worse": len(changed) - num_better, "seconds": round(time.monotonic() - start, 1),
            "best idea": best}, failures


PROOFS = (changed_files, wrong_scores, not_refused, unscored_columns, unscored_rows, given_away, shown_targets,
          missing_classes, signals, unfit_ideas)
