"""Proofs that a prepared task is sound: what would be wrong is found by trying it. `python -m tasks check` runs them.

Each of PROOFS is a function of a Case that returns a sentence for each fault it finds.
"""
import math
import re
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

import tasks

SIGMAS = 5              # a signal: a rank correlation so many standard deviations from zero
MAX_BYTES = 128 << 20   # of a public table that is searched
CHANCE_LINE = re.compile(r"\w*(SEED|VALID)\w* = ")
VALIDATION_LINE = re.compile(r"^validation .+: -?\d+(\.\d+)?\s*$", re.MULTILINE)


@dataclass
class Case:
    """A prepared task. Tables are {column: [text]}."""
    task: tasks.Task
    home: Path
    facts: dict         # what task.json says
    targets: list       # the predicted columns
    sample: dict        # the sample submission
    gold: dict          # the same, with the answers for predictions
    starter: float      # its score now
    printed: str        # by the starter

    @property
    def num_rows(self):
        return len(self.gold[self.targets[0]])

    def score(self, table):
        """The score of a table that is handed in."""
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "submission.csv"
            pd.DataFrame(table).to_csv(path, index=False)
            return tasks.score_file(self.task, self.home, path)

    def shuffled(self, columns):
        """The answers with these columns in another order of rows."""
        order = np.random.default_rng(0).permutation(self.num_rows)
        return {**self.gold, **{name: [self.gold[name][i] for i in order] for name in columns}}

    def frame(self, name):
        """A public table of texts; an empty one where there is no such file, or one too large to be searched."""
        path = self.home / "public" / name
        if not path.exists() or path.stat().st_size > MAX_BYTES:
            return pd.DataFrame()
        return pd.read_csv(path, dtype=str, keep_default_na=False)


def check(id, data, python):
    """(figures, faults) of the task prepared in data/id: a dict, and sentences."""
    task = tasks.load(id)
    home = Path(data) / id
    facts = tasks.info(id, data)
    sample = tasks.read_table(home / "public" / task.sample)
    targets = list(task.targets) or [name for name in sample if name != task.key]
    gold = {**sample, **tasks.matched(tasks.read_answers(task, home), sample, task.key, targets)}
    starter, _, printed = tasks.run_starter(task, home, python)
    case = Case(task, home, facts, targets, sample, gold, starter, printed)
    faults = [fault for proof in PROOFS for fault in proof(case)]
    return {"test rows": case.num_rows, "starter": starter, "m_best": facts["m_best"]}, faults


def changed_files(case):
    """The files are those that were prepared, by the task.py and the starter that are there now."""
    for name, sha in case.facts["sha256"].items():
        if not (case.home / name).exists() or tasks.hash_path(case.home / name) != sha:
            yield f"{name} is not what was prepared."
    if case.facts["code"] != tasks.hash_code(case.task):
        yield "It was prepared by another version of the code; prepare it again."


def changed_starter(case):
    """The starter prints its validation score and scores what is recorded."""
    if not VALIDATION_LINE.search(case.printed):
        yield "The starter prints no line such as 'validation accuracy: 0.9'."
    if not math.isclose(case.starter, case.facts["m_init"], rel_tol=1e-6):
        yield f"The starter scores {case.starter:.6g}; task.json records {case.facts['m_init']:.6g}."


def broken_ideas(case):
    """Each idea fits the starter."""
    for idea in tasks.ideas(case.task.id):
        try:
            tasks.apply(case.task.starter, idea)
        except ValueError as error:
            yield str(error)


def imperfect_answers(case):
    """The answers have the best score, in any order of rows that have ids."""
    score = case.score(case.shuffled(case.gold) if case.task.key else case.gold)
    if not math.isclose(score, case.task.perfect, abs_tol=1e-9):
        yield f"The answers score {score}, not {case.task.perfect}."


def good_guesses(case):
    """The starter is better than the sample submission and than answers of other rows, and worse than m_best."""
    guesses = {"The sample submission": case.sample, "A submission of other rows' answers": case.shuffled(case.targets)}
    for name, table in guesses.items():
        score = case.score(table)
        if not (math.isnan(score) or case.task.better(case.starter, score)):
            yield f"{name} scores {score:.5g}, no worse than the starter's {case.starter:.5g}."
    if not case.task.better(case.facts["m_best"], case.starter):
        yield f"m_best ({case.facts['m_best']:.5g}) is no better than {case.starter:.5g}."


def accepted_faults(case):
    """Submissions that cannot be scored are refused with a reason."""
    gold = case.gold
    key = case.task.key
    first = case.targets[0]
    last = case.targets[-1]
    tables = {
        "a missing column": {name: column for name, column in gold.items() if name != last},
        "a surplus row": {name: [*column, column[-1]] for name, column in gold.items()},
        "a blank": {**gold, first: ["", *gold[first][1:]]}}
    if key:
        tables["a doubled id"] = {**gold, key: [gold[key][1], *gold[key][1:]]}
    if not case.task.text_targets:
        tables["text"] = {**gold, first: ["text", *gold[first][1:]]}
        tables["NaN"] = {**gold, last: [*gold[last][:-1], "nan"]}
    for fault, table in tables.items():
        try:
            case.score(table)
            yield f"A submission with {fault} is not refused."
        except tasks.InvalidSubmission:
            pass
        except Exception as error:
            yield f"A submission with {fault} ends in {type(error).__name__}, not in InvalidSubmission."


def shown_answers(case):
    """The test file does not have a target's column."""
    if set(case.targets) & set(case.frame("test.csv")):
        yield "The public test file has the target's column."


def shared_rows(case):
    """No row is both in train and in test, unless it is so in the publisher's own data."""
    if case.task.known_twins and not case.facts["miniature"]:
        return
    for name in ("train.csv", "test.csv"):
        path = case.home / "public" / name
        if path.exists() and path.stat().st_size > MAX_BYTES:
            print(f"{case.task.id}: {name} is too large to be searched for rows of the other", file=sys.stderr)
    test = case.frame("test.csv")
    train = case.frame("train.csv")
    common = [name for name in test if name in train]
    features = [name for name in common if name not in case.sample] or common       # or what is judged is the id
    if not features:
        return
    learned = set(train[features].itertuples(index=False, name=None))
    rows = enumerate(test[features].itertuples(index=False, name=None), 1)
    if shared := [number for number, row in rows if row in learned]:
        yield f"{len(shared)} rows are in train and in test, such as row {shared[0]} of test."


def signals(case):
    """The position in the test file, the order of the ids, and places and times of the files named after them do not go
    with the target."""
    if case.task.known_signal:
        return
    orders = {"position in the test file": range(case.num_rows)}
    if case.task.key:
        orders["id"] = case.gold[case.task.key]
    orders |= file_orders(case)
    columns = pd.DataFrame({name: _numbers_or_texts(case.gold[name]) for name in case.targets})
    ranks = pd.get_dummies(columns).rank()      # a class becomes a column of its own
    for name, values in orders.items():
        strongest = ranks.corrwith(_numbers_or_texts(values).rank()).abs().max()
        # Fisher's transformation makes a correlation normal, with variance 1 / (n - 3).
        sigmas = math.atanh(min(strongest, 0.999999)) * math.sqrt(max(case.num_rows - 3, 0))
        if sigmas > SIGMAS:
            yield f"The {name} tells of the target: their rank correlation is {strongest:.2f}."


def file_orders(case):
    """{what: its values in the order of the answers} of the test's files, where there is one for each id."""
    paths = case.home.joinpath("public").rglob("*")
    facts = {name: path.stat() for path in paths for name in (path.name, path.stem)}
    ids = case.gold.get(case.task.key, ())
    if not ids or not facts.keys() >= set(ids):
        return {}
    entries = {"st_ino": "place on the disk", "st_mtime_ns": "time", "st_ctime_ns": "time of change"}
    return {f"files' {what}": [getattr(facts[id], entry) for id in ids] for entry, what in entries.items()}


def _numbers_or_texts(values):
    """A series of numbers where all values are some, else of texts."""
    try:
        return pd.to_numeric(pd.Series(values))
    except ValueError:
        return pd.Series(values)


PROOFS = (changed_files, changed_starter, broken_ideas, imperfect_answers, good_guesses, accepted_faults, shown_answers,
          shared_rows, signals)


def check_ideas(id, data, python):
    """(figures, failures) as check, of running each of the task's ideas on what is prepared in data/id: each must
    change the starter's graded score, by more than another share of validation rows or another seed; at least half
    must improve it and at least one must make it worse."""
    start = time.monotonic()
    task = tasks.load(id)
    starter = tasks.info(id, data)["m_init"]
    failures = []
    scores = []
    for idea in tasks.ideas(id):
        try:
            script = tasks.apply(task.starter, idea)
            score = tasks.run_starter(task, Path(data) / id, python, script)[0]
        except (RuntimeError, ValueError) as error:
            failures.append(f"The idea {idea['title']!r} fails. {error}")
            continue
        scores.append(score)
        changed = set(script.splitlines()) ^ set(task.starter.splitlines())
        if math.isclose(score, starter, rel_tol=1e-9):
            failures.append(f"The idea {idea['title']!r} does not change the graded score.")
        elif all(map(CHANCE_LINE.match, changed)):
            failures.append(f"The idea {idea['title']!r} is about the validation rows or a random seed alone.")
    num_better = sum(task.better(score, starter) for score in scores)
    num_worse = sum(task.better(starter, score) for score in scores)
    if 2 * num_better < len(scores):
        failures.append(f"Only {num_better} of {len(scores)} ideas improve the score.")
    if scores and num_worse == 0:
        failures.append("No idea makes the score worse; some should, as with anyone's ideas.")
    figures = {"starter": starter, "ideas": len(scores), "better": num_better, "worse": num_worse,
               "seconds": time.monotonic() - start}
    return figures, failures
