"""Proofs that a prepared task is sound: what would be wrong is found by trying it. `python -m tasks check` runs them.

- The files are those that were prepared (SHA-256).
- The answers get the perfect score, in any order of their rows where rows have ids.
- The sample submission is valid and worse than the starter; so are the answers dealt out to the wrong rows.
- A missing column, missing and surplus rows, an unknown and a doubled id, a blank, NaN, text, no rows and an empty file
  are refused with a reason.
- The public test file lacks the targets, and no row (nor file of a row) is both in train and in test.
- The position in the test file and the id tell nothing of the target, and in miniatures nor does the size of a row's
  file: neither its rank correlation with a target nor the likeness of neighbours is beyond 5 standard deviations of 50
  shuffles. (Where the publisher's own ids tell something the task says so in known_signal; sizes of real images do.)
- The starter prints a validation score and gets the score that was recorded when it was prepared; on real data also the
  task's m_init.
"""
import csv
import math
import re
import tempfile
import time
from pathlib import Path

import numpy as np
import pandas as pd

import tasks

SIGMAS = 5              # a signal: so many standard deviations beyond what shuffled targets give
MAX_ROWS = 20_000       # rows that are searched for signals
VALIDATION_LINE = re.compile(r"^validation .+: -?\d+(\.\d+)?\s*$", re.MULTILINE)


def check(id, data, python):
    """(row, failures) of the task prepared in data/id: a dict of figures, and a sentence for each proof that failed."""
    start, task, home, facts = time.monotonic(), tasks.load(id), Path(data) / id, tasks.info(id, data)
    sample, answers = _table(home / "public" / task.sample), _table(home / "private" / task.answers)
    targets = list(task.targets or [name for name in sample if name != task.key])
    gold = {**sample, **tasks.matched(answers, sample, task.key, targets)}
    num_rows = len(gold[targets[0]])
    order = np.random.default_rng(0).permutation(num_rows)
    dealt = {name: [gold[name][i] for i in order] for name in gold}
    starter, _, printed = tasks.run_starter(task, home, python)
    best, poor = _score(task, home, gold), _score(task, home, sample)
    chance = _score(task, home, {**gold, **{name: dealt[name] for name in targets}})

    failures = [f"{name} is not what was prepared." for name, sha in facts["sha256"].items()
                if not (home / name).exists() or tasks.hash_files(home / name) != sha]
    if not math.isclose(best, task.perfect, abs_tol=1e-9):
        failures.append(f"The answers score {best}, not {task.perfect}.")
    if task.key and not math.isclose(_score(task, home, dealt), best, abs_tol=1e-9):
        failures.append("The answers score less when their rows are in another order.")
    for what, score in (("sample submission", poor), ("dealing of the answers to the wrong rows", chance)):
        if not (math.isnan(score) or task.better(starter, score)):
            failures.append(f"The {what} scores {score:.5g}, no worse than the starter's {starter:.5g}.")
    failures += not_refused(task, home, gold, targets)
    failures += in_sight(task, home, targets, answers)
    failures += signals(task, home, gold, targets, facts["miniature"])
    if not VALIDATION_LINE.search(printed):
        failures.append("The starter prints no line such as 'validation accuracy: 0.9'.")
    recorded = {"task.json": (facts["m_init"], 1e-6 * abs(facts["m_init"]))}
    if not facts["miniature"] and facts["variant"] == task.variants[0] and task.m_init is not None:
        recorded["the task"] = task.m_init, 0.01 * abs(task.m_best - task.m_init)      # machines round differently
    failures += [f"The starter scores {starter:.6g}; {place} records {score:.6g}."
                 for place, (score, slack) in recorded.items() if abs(starter - score) > slack]
    if not task.better(facts["m_best"], starter):
        failures.append(f"m_best ({facts['m_best']:.5g}) is no better than the starter ({starter:.5g}).")
    return {"task": id, "data": "miniature" if facts["miniature"] else f"real, {facts['variant']}",
            "train": facts["rows"].get("public/train.csv"), "test": num_rows, "answers": best, "sample": poor,
            "shuffled": chance, "starter": starter, "recorded": facts["m_init"], "m_best": facts["m_best"],
            "seconds": round(time.monotonic() - start, 1), "verdict": "FAILED" if failures else "ok"}, failures


def _table(path):
    return pd.read_csv(path, dtype=str, keep_default_na=False).to_dict("list")


def _score(task, home, table):
    """The score of a table written as a submission; {} is an empty file."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "submission.csv"
        with open(path, "w", newline="", encoding="utf-8") as stream:
            if table:
                csv.writer(stream, lineterminator="\n").writerows([table, *zip(*table.values())])
        return tasks.score_file(task, home, path)


def not_refused(task, home, gold, targets):
    """What is wrong with the submissions that ought to be refused and are not."""
    def cell(name, value):
        return {**gold, name: [value, *gold[name][1:]]}
    spoilt = {"a missing column": {name: column for name, column in gold.items() if name != targets[-1]},
              "a missing row": {name: column[:-1] for name, column in gold.items()},
              "a surplus row": {name: [*column, column[-1]] for name, column in gold.items()},
              "no rows": {name: [] for name in gold}, "an empty file": {}, "a blank": cell(targets[0], "")}
    if task.key:
        spoilt |= {"an unknown id": cell(task.key, "no-such-id"), "a doubled id": cell(task.key, gold[task.key][1])}
    if not task.text_targets:
        spoilt |= {"NaN": cell(targets[0], "nan"), "text": cell(targets[0], "text")}
    failures = []
    for what, table in spoilt.items():
        try:
            _score(task, home, table)
            failures.append(f"A submission with {what} is not refused.")
        except tasks.InvalidSubmission as error:
            if not str(error):
                failures.append(f"A submission with {what} is refused without a reason.")
    return failures


def in_sight(task, home, targets, answers):
    """What the public folder gives away: targets in the test file, test rows or their files among the training ones."""
    public, failures = home / "public", []
    train, test = public / "train.csv", public / "test.csv"
    if test.exists() and set(targets) & set(_table(test)):
        failures.append("The public test file has the target's column.")
    if train.exists() and test.exists():
        train, test = (pd.read_csv(path, dtype=str, keep_default_na=False) for path in (train, test))
        features = [name for name in test if name in train and name != task.key]
        train, test = (set(rows[features].itertuples(index=False, name=None)) for rows in (train, test))
        if features and (shared := train & test):
            failures.append(f"{len(shared)} rows are in train and in test, such as {tasks.show(str(min(shared)))}.")
    if task.test_file:
        tested = [public / task.test_file.format(id) for id in answers[task.key]]
        failures += [f"{path} is missing." for path in tested if not path.exists()][:1]
        hashes = {tasks.hash_files(path) for path in tested if path.exists()}
        others = set(public.rglob(f"*{Path(task.test_file).suffix}")) - set(tested)
        same = [path for path in sorted(others) if tasks.hash_files(path) in hashes]
        failures += [f"{len(same)} files of train are in test too, such as {path}." for path in same[:1]]
    return failures


def signals(task, home, gold, targets, miniature):
    """What tells of a test row's target although it should not."""
    rows = min(len(gold[targets[0]]), MAX_ROWS)
    columns = []
    for name in targets:
        values = pd.Series(gold[name][:rows])
        number = pd.to_numeric(values, errors="coerce")
        classes = values.value_counts().index[:100]
        columns += [number] if number.notna().all() else [values == value for value in classes]
    y = np.stack([np.asarray(column, float) for column in columns], 1)
    y = (y - y.mean(0)) / np.where(y.std(0) > 0, y.std(0), 1)           # (rows, columns), each with mean 0, deviation 1
    tells = {}
    if not task.known_signal:
        tells["position in the test file"] = np.arange(rows)
        if task.key:
            ids = pd.Series(gold[task.key][:rows])
            number = pd.to_numeric(ids, errors="coerce")
            tells["id"] = (number if number.notna().all() else ids).rank().to_numpy()
    if task.test_file and miniature:
        paths = [home / "public" / task.test_file.format(id) for id in gold[task.key][:rows]]
        tells["size of the file"] = np.array([path.stat().st_size if path.exists() else 0 for path in paths])
    rng, failures = np.random.default_rng(0), []
    for what, tell in tells.items():
        if np.ptp(tell) == 0:
            continue
        order = np.argsort(tell, kind="stable")
        rank = pd.Series(tell[order]).rank().to_numpy()
        shuffles = np.array([_likeness(rank, y[rng.permutation(rows)]) for _ in range(50)])
        beyond = (_likeness(rank, y[order]) - shuffles.mean(0)) / (shuffles.std(0) + 1e-12)
        kinds = "rank correlation with it", "likeness of neighbours"
        failures += [f"The {what} tells of the target: the {kind} is {z:.0f} standard deviations beyond chance."
                     for kind, z in zip(kinds, beyond) if z > SIGMAS]
    return failures


def _likeness(rank, y):
    """(largest rank correlation with a column of y, mean product of neighbouring rows of y)."""
    return np.abs((rank - rank.mean()) @ y / (len(y) * rank.std())).max(), (y[1:] * y[:-1]).mean()
