"""Proofs that a prepared task is sound: what would be wrong is found by trying it. `python -m tasks check` runs them.

- The files are those that were prepared (SHA-256), by the task.py and the starter that are there now.
- The answers get the perfect score, in any order of their rows where rows have ids.
- The answers file as it lies there, with its canary rows, is flagged when handed in; the answers, the sample submission
  and the starter's are not.
- The sample submission is valid and worse than the starter; so are the answers dealt out to the wrong rows.
- A missing column, missing and surplus rows, an unknown and a doubled id, a blank, NaN, text, no rows and an empty file
  are refused with a reason.
- The public test file lacks the targets, and no row (nor file of a row) is both in train and in test. (Where the
  publisher's own data have such twins, the task says so in known_twins.)
- The position in the test file and the id tell nothing of the target, and in miniatures nor does the size of a row's
  file: neither its rank correlation with a target nor the likeness of neighbours is beyond 5 standard deviations of 50
  shuffles. (Where the publisher's own ids tell something the task says so in known_signal, which excuses positions too
  where rows lie in the order of the ids; where only positions tell, in known_order. Sizes of real images do tell.)
- The starter prints a validation score and gets the score that was recorded when it was prepared; on real data also the
  task's m_init.
- Where there are ideas: at least 10 of at least 5 kinds, and each applies to the starter and compiles. `--ideas` runs
  them too: on the miniature at least half must improve the starter's score and at least one must make it worse.
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
MIN_IDEAS, MIN_KINDS = 10, 5
MAX_ROWS = 20_000       # rows that are searched for signals
VALIDATION_LINE = re.compile(r"^validation .+: -?\d+(\.\d+)?\s*$", re.MULTILINE)


def check(id, data, python):
    """(row, failures) of the task prepared in data/id: a dict of figures, and a sentence for each proof that failed."""
    start, task, home, facts = time.monotonic(), tasks.load(id), Path(data) / id, tasks.info(id, data)
    sample, answers = tasks.read_table(home / "public" / task.sample), tasks.true_answers(task, home)
    targets = tasks.target_columns(task, home)
    gold = {**sample, **tasks.matched(answers, sample, task.key, targets)}
    num_rows = len(gold[targets[0]])
    order = np.random.default_rng(0).permutation(num_rows)
    dealt = {name: [gold[name][i] for i in order] for name in gold}
    starter, _, printed, starter_p = tasks.run_starter(task, home, python)
    (best, gold_p), (poor, sample_p) = _judge(task, home, gold), _judge(task, home, sample)
    chance = _score(task, home, {**gold, **{name: dealt[name] for name in targets}})

    failures = [f"{name} is not what was prepared." for name, sha in facts["sha256"].items()
                if not (home / name).exists() or tasks.hash_files(home / name) != sha]
    if facts["code"] != tasks.hash_code(task):
        failures.append(f"It was prepared by an older task.py or {task.entry}; prepare it again.")
    if not math.isclose(best, task.perfect, abs_tol=1e-9):
        failures.append(f"The answers score {best}, not {task.perfect}.")
    if task.key and not math.isclose(_score(task, home, dealt), best, abs_tol=1e-9):
        failures.append("The answers score less when their rows are in another order.")
    for what, score in (("sample submission", poor), ("dealing of the answers to the wrong rows", chance)):
        if not (math.isnan(score) or task.better(starter, score)):
            failures.append(f"The {what} scores {score:.5g}, no worse than the starter's {starter:.5g}.")
    stolen = tasks.matched(tasks.read_table(home / "private" / task.answers), sample, task.key, targets)
    if not tasks.flagged(_judge(task, home, {**sample, **stolen})[1]):
        failures.append("A copy of the private answers is not flagged; the test set may be too small for canary rows.")
    failures += [f"The {what} are flagged as made with the private answers." for what, canary_p in (
        ("answers", gold_p), ("sample's values", sample_p), ("starter's values", starter_p)) if tasks.flagged(canary_p)]
    failures += not_refused(task, home, gold, targets)
    failures += in_sight(task, home, targets, answers, facts["miniature"])
    failures += unfit_ideas(task)
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
            "train": facts["rows"].get("public/train.csv"), "test": num_rows, "sample": poor, "shuffled": chance,
            "starter": starter, "m_best": facts["m_best"],
            "seconds": round(time.monotonic() - start, 1), "verdict": "FAILED" if failures else "ok"}, failures


def check_ideas(id, data, python):
    """(row, failures) as check, of running each of the task's ideas on what is prepared in data/id."""
    start, task, home = time.monotonic(), tasks.load(id), Path(data) / id
    script, failures = (task.folder / task.entry).read_text(), unfit_ideas(task)
    starter = tasks.info(id, data)["m_init"]
    scores = {}
    for idea in [] if failures else tasks.ideas(id):
        name = f"The idea {idea['title']!r}"
        try:
            scores[idea["title"]] = tasks.run_script(task, home, tasks.apply(script, idea), python, name)[0]
        except RuntimeError as error:
            failures.append(str(error))
    same = [title for title, score in scores.items() if math.isclose(score, starter, rel_tol=1e-9)]
    better = [title for title, score in scores.items() if title not in same and task.better(score, starter)]
    num_worse = len(scores) - len(same) - len(better)
    if scores and 2 * len(better) < len(scores):
        failures.append(f"Only {len(better)} of {len(scores)} ideas improve the score.")
    if scores and not num_worse:
        failures.append("No idea makes the score worse; some should, as with anyone's ideas.")
    best = max(scores, key=lambda title: scores[title] if task.direction == "up" else -scores[title], default=None)
    return {"task": id, "starter": starter, "best": scores.get(best), "better": len(better), "same": len(same),
            "worse": num_worse, "seconds": round(time.monotonic() - start, 1),
            "verdict": "FAILED" if failures else "ok", "best idea": best}, failures


def unfit_ideas(task):
    """What is wrong with the task's ideas as they stand, without running them. A task may have none."""
    try:
        found = tasks.ideas(task.id)
    except ValueError as error:
        return [str(error)]
    kinds, script, failures = {idea["kind"] for idea in found}, (task.folder / task.entry).read_text(), []
    if found and (len(found) < MIN_IDEAS or len(kinds) < MIN_KINDS):
        failures.append(f"There are {len(found)} ideas of {len(kinds)} kinds; at least {MIN_IDEAS} of {MIN_KINDS} are "
                        f"wanted.")
    for idea in found:
        try:
            compile(tasks.apply(script, idea), task.entry, "exec")
        except (ValueError, SyntaxError) as error:
            failures.append(f"The idea {idea['title']!r} does not fit the starter: {error}")
    return failures


def _score(task, home, table):
    return _judge(task, home, table)[0]


def _judge(task, home, table):
    """(score, canary_p) of a table written as a submission; {} is an empty file."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "submission.csv"
        with open(path, "w", newline="", encoding="utf-8") as stream:
            if table:
                csv.writer(stream, lineterminator="\n").writerows([table, *zip(*table.values())])
        return tasks.judge_file(task, home, path)


def not_refused(task, home, gold, targets):
    """What is wrong with the submissions that ought to be refused and are not."""
    def cell(name, value):
        return {**gold, name: [value, *gold[name][1:]]}

    def spoilt():       # one after the other: tables may be large
        yield "a missing column", {name: column for name, column in gold.items() if name != targets[-1]}
        yield "a missing row", {name: column[:-1] for name, column in gold.items()}
        yield "a surplus row", {name: [*column, column[-1]] for name, column in gold.items()}
        yield "no rows", {name: [] for name in gold}
        yield "an empty file", {}
        yield "a blank", cell(targets[0], "")
        if task.key:
            yield "an unknown id", cell(task.key, "no-such-id")
            yield "a doubled id", cell(task.key, gold[task.key][1])
        if not task.text_targets:
            yield "NaN", cell(targets[0], "nan")
            yield "text", cell(targets[0], "text")

    failures = []
    for what, table in spoilt():
        try:
            _score(task, home, table)
            failures.append(f"A submission with {what} is not refused.")
        except tasks.InvalidSubmission as error:
            if not str(error):
                failures.append(f"A submission with {what} is refused without a reason.")
    return failures


def in_sight(task, home, targets, answers, miniature):
    """What the public folder gives away: targets in the test file, test rows or their files among the training ones."""
    public, failures, twins = home / "public", [], []
    train, test = public / "train.csv", public / "test.csv"
    trained_on, shown = (_header(path) if path.exists() else [] for path in (train, test))
    if set(targets) & set(shown):
        failures.append("The public test file has the target's column.")
    ids = set() if task.key_is_feature else set(_header(public / task.sample)) - set(targets)      # say which row it is
    features = [name for name in shown if name in trained_on and name not in ids]
    if features:
        tested = {row: number for number, row in enumerate(_hash_rows(test, features), 1)}
        shared = {tested[row] for row in _hash_rows(train, features) if row in tested}
        twins += [f"{len(shared)} rows are in train and in test, such as row {min(shared)} of test."] if shared else []
    if task.test_file:
        tested = [public / task.test_file.format(id) for id in answers[task.key]]
        failures += [f"{path} is missing." for path in tested if not path.exists()][:1]
        hashes = {tasks.hash_files(path) for path in tested if path.exists()}
        others = {path for path in public.rglob(f"*{Path(task.test_file).suffix}") if path.is_file()} - set(tested)
        same = [path for path in sorted(others) if tasks.hash_files(path) in hashes]
        twins += [f"{len(same)} files of train are in test too, such as {path}." for path in same[:1]]
    return failures + ([] if task.known_twins and not miniature else twins)


def _header(path):
    with open(path, newline="", encoding="utf-8-sig") as stream:
        return next(csv.reader(stream))


def _hash_rows(path, columns):
    """Yields a hash of each row's cells in these columns: train files may be larger than the memory."""
    with open(path, newline="", encoding="utf-8-sig") as stream:
        rows = csv.reader(stream)
        header = next(rows)
        places = [header.index(name) for name in columns]
        for row in filter(None, rows):
            yield hash(tuple([row[place] for place in places]))


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
    tells = {} if task.known_order else {"position in the test file": np.arange(rows)}
    if task.key:
        ids = pd.Series(gold[task.key][:rows])
        number = pd.to_numeric(ids, errors="coerce")
        tells["id"] = (number if number.notna().all() else ids).rank().to_numpy()
        if task.known_signal and (np.diff(tells.pop("id")) > 0).all():
            tells = {}
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
