"""Proofs that a prepared task is sound: what would be wrong is found by trying it. `python -m tasks check` prints them as a table.

- The files are those that were prepared (SHA-256). The answers get the perfect score, in any order of rows where rows have ids.
- The sample submission is valid and worse than the starter; so are the answers dealt out to the wrong rows.
- A missing column, missing and surplus rows, an unknown and a doubled id, NaN, text, no rows and an empty file are refused with a reason.
- The public test file lacks the targets, and no row (nor file of a row) is both in train and in test.
- The position in the test file and the id tell nothing of the target, in miniatures nor does the size of a row's file: neither its rank
  correlation with a target nor the likeness of neighbours is beyond 6 standard deviations of 50 shuffles.
- The starter prints a validation score and gets the score that was recorded when it was prepared; on real data also the task's m_init.
"""
import csv, math, re, tempfile, time
from pathlib import Path

import numpy as np
import pandas as pd

import tasks
from tasks.submission import show


def check(id, data):
    """(row, failures): a dict of what was measured, and one sentence for each proof that failed. The task is prepared in data/id."""
    start, task, home, facts = time.monotonic(), tasks.load(id), Path(data) / id, tasks.info(id, data)
    failures = [f"{name} is not the file that was prepared." for name, sha in facts["sha256"].items() if tasks._hash(home / name) != sha]
    sample, answers = _table(home / "public" / task.sample), _table(home / "private" / task.answers)
    targets = list(task.targets or [name for name in sample if name != task.key])
    gold = {**sample, **tasks.matched(answers, sample, task.key, targets)}
    num_rows, rng = len(gold[targets[0]]), np.random.default_rng(0)

    best, poor = _score(task, home, gold), _score(task, home, sample)
    dealt = rng.permutation(num_rows)
    chance = _score(task, home, {**gold, **{name: [gold[name][i] for i in dealt] for name in targets}})
    starter, _, printed = tasks.run_starter(task, home)
    if not math.isclose(best, task.perfect, abs_tol=1e-9):
        failures.append(f"The answers score {best}, not {task.perfect}.")
    if task.key and _score(task, home, {name: [column[i] for i in dealt] for name, column in gold.items()}) != best:
        failures.append("The answers score less when their rows are in another order.")
    for what, score in (("The sample submission", poor), ("The answers dealt out to the wrong rows", chance)):
        if not (math.isnan(score) or task.better(starter, score)):
            failures.append(f"{what} scores {score:.5g}, no worse than the starter's {starter:.5g}.")
    failures += _not_refused(task, home, gold, targets)
    failures += _in_sight(task, home, targets, answers)
    failures += _signals(task, home, gold, targets, facts["miniature"])
    if not re.search(r"(?m)^validation .+: -?\d+(\.\d+)?\s*$", printed):
        failures.append("The starter prints no line such as 'validation accuracy: 0.9'.")
    recorded = {"recorded in task.json": (facts["m_init"], 1e-6 * abs(facts["m_init"]))}
    if not facts["miniature"] and facts["variant"] == task.variants[0] and task.m_init is not None:
        recorded["recorded in the task"] = task.m_init, 0.01 * abs(task.m_best - task.m_init)       # another machine may round differently
    failures += [f"The starter scores {starter:.6g}; {where} is {score:.6g}." for where, (score, slack) in recorded.items() if abs(starter - score) > slack]
    if not task.better(facts["m_best"], starter):
        failures.append(f"m_best ({facts['m_best']:.5g}) is no better than the starter ({starter:.5g}).")
    row = {"task": id, "data": "miniature" if facts["miniature"] else f"real, {facts['variant']}", "train": facts["rows"].get("public/train.csv", "-"),
           "test": num_rows, "answers": best, "sample": poor, "shuffled": chance, "starter": starter, "recorded": facts["m_init"],
           "m_best": facts["m_best"], "seconds": round(time.monotonic() - start, 1), "verdict": "FAILED" if failures else "ok"}
    return row, failures


def _table(path):
    return pd.read_csv(path, dtype=str, keep_default_na=False).to_dict("list")


def _write(path, table):
    with open(path, "w", newline="", encoding="utf-8") as stream:
        rows = csv.writer(stream, lineterminator="\n")
        rows.writerow(table)
        rows.writerows(zip(*table.values()))


def _score(task, home, table):
    with tempfile.TemporaryDirectory() as folder:
        _write(Path(folder) / "submission.csv", table)
        return tasks.score_file(task, home, Path(folder) / "submission.csv")


def _not_refused(task, home, gold, targets):
    """What is wrong with the submissions that ought to be refused and are not."""
    def cell(name, value):
        return {**gold, name: [value, *gold[name][1:]]}
    spoilt = {"a missing column": {name: column for name, column in gold.items() if name != targets[-1]},
              "a missing row": {name: column[:-1] for name, column in gold.items()}, "a surplus row": {name: [*column, column[-1]] for name, column in gold.items()},
              "no rows": {name: [] for name in gold}, "an empty file": {}, "a blank cell": cell(targets[0], "")}
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


def _in_sight(task, home, targets, answers):
    """What of the answers the public folder shows."""
    public, failures = home / "public", []
    train, test = public / "train.csv", public / "test.csv"
    if test.exists() and set(targets) & set(_table(test)):
        failures.append("The public test file has the target's column.")
    if train.exists() and test.exists():
        rows = [pd.read_csv(path, dtype=str, keep_default_na=False) for path in (train, test)]
        features = [name for name in rows[1] if name in rows[0] and name != task.key]
        if features and (shared := set(map(tuple, rows[0][features].to_numpy())) & set(map(tuple, rows[1][features].to_numpy()))):
            failures.append(f"{len(shared)} rows are in train and in test (such as {show(str(min(shared)))}).")
    if task.test_file and task.key:
        tested = {public / task.test_file.format(id) for id in answers[task.key]}
        failures += [f"{path} is missing." for path in sorted(tested) if not path.exists()][:1]
        hashes = {tasks._hash(path) for path in tested if path.exists()}
        same = [path for path in sorted(public.rglob(f"*{Path(task.test_file).suffix}")) if path not in tested and tasks._hash(path) in hashes]
        failures += [f"{len(same)} files of train are also in test (such as {same[0].relative_to(public)})."] if same else []
    return failures


def _signals(task, home, gold, targets, miniature):
    """What gives a test row's target away although it should not. At most 20,000 rows are looked at."""
    rows = min(len(gold[targets[0]]), 20_000)
    columns = []
    for name in targets:
        values = pd.Series(gold[name][:rows])
        number = pd.to_numeric(values, errors="coerce")
        columns += [number] if number.notna().all() else [values == value for value in values.value_counts().index[:100]]
    y = np.stack([np.asarray(column, float) for column in columns], 1)
    y = (y - y.mean(0)) / np.where(y.std(0) > 0, y.std(0), 1)           # (rows, columns), each with mean 0 and deviation 1
    tells = {}
    if not task.known_signal:
        tells["position in the test file"] = np.arange(rows)
        if task.key:
            ids = pd.Series(gold[task.key][:rows])
            number = pd.to_numeric(ids, errors="coerce")
            tells["id"] = (number if number.notna().all() else ids).rank().to_numpy()
    if task.test_file and miniature:
        tells["size of the file"] = np.array([(home / "public" / task.test_file.format(id)).stat().st_size for id in gold[task.key][:rows]])
    rng, failures = np.random.default_rng(0), []
    for what, tell in tells.items():
        if np.ptp(tell) == 0:
            continue
        order = np.argsort(tell, kind="stable")
        rank = pd.Series(tell[order]).rank().to_numpy()
        seen = _likeness(rank, y[order])
        shuffles = np.array([_likeness(rank, y[rng.permutation(rows)]) for _ in range(50)])
        beyond = (seen - shuffles.mean(0)) / (shuffles.std(0) + 1e-12)
        failures += [f"The {what} tells of the target: {kind} is {z:.0f} standard deviations beyond chance."
                     for kind, z in zip(("the rank correlation", "the likeness of neighbours"), beyond) if z > 6]
    return failures


def _likeness(rank, y):
    """(largest rank correlation with a column of y, mean product of neighbouring rows of y)."""
    return np.abs((rank - rank.mean()) @ y / (len(y) * rank.std())).max(), (y[1:] * y[:-1]).mean()
