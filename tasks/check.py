"""Proofs that a prepared task is sound: what would be wrong is found by trying it. `python -m tasks check` runs them.

- The files are those that were prepared (SHA-256), by the task.py and the starter that are there now.
- The answers get the perfect score, in any order of their rows where rows have ids.
- The answers file as it lies there, with its canary rows, is flagged when handed in; the answers, the sample submission
  and the starter's are not.
- The sample submission is valid and worse than the starter; so are the answers dealt out to the wrong rows.
- A missing column, missing and surplus rows, an unknown and a doubled id, a blank, NaN in any column, text, no rows and
  an empty file are refused with a reason.
- Every predicted column and every row counts: made wrong alone, it makes the score of the answers worse. (Rows whose
  answers are Task.unscored are left out; some 20 rows are drawn.)
- No public table (CSV, TSV, JSON, NPY, in a zip, gzip or loose; matched by id or by position) has a column that is the
  answers, or other names for the classes (its trailing blanks, too), or, where train.csv lacks it, numbers in the same
  order. Of long tables the first 20,000 test rows are searched.
- No row (nor file of a row) is both in train and in test, be it with other capitals or blanks, as a hundredth of real
  rows may be. (Where the publisher's own data have such twins, the task says so in known_twins; they are printed.)
- No class of the answers lacks training rows, nor a class of those answers, unless chance may have it so: in miniatures
  the former never.
- The position in the test file and the id tell nothing of the target, and in miniatures nor do the size of a row's file
  and the blanks around texts: neither the rank correlation with a target, nor the likeness of neighbours, nor how far
  groups are apart (remainders up to 16, ends of ids) is beyond 5 standard deviations of 50 shuffles. (Where the
  publisher's own ids tell something the task says so in known_signal, which excuses positions too where rows lie in the
  order of the ids; where only positions tell, in known_order. Sizes of real images do tell.)
- The starter prints a validation score and gets the score that was recorded when it was prepared; on real data also the
  task's m_init.
- Where there are ideas: at least 10 of at least 5 kinds, and each applies to the starter and compiles. `--ideas` runs
  them too: on the miniature at least half must improve the starter's score and at least one must make it worse.
"""
import csv
import gzip
import io
import json
import math
import re
import tempfile
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pandas as pd

import tasks
from tasks.canary import _number

SIGMAS = 5              # a signal: so many standard deviations beyond what shuffled targets give
MIN_IDEAS, MIN_KINDS = 10, 5
MAX_ROWS = 20_000       # rows that are searched for signals
MAX_JSON = 64 << 20     # bytes of a JSON file that is searched
CHANCE = 1e-6           # how likely it may be that a class is missing by chance
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
    failures += not_scored(task, answers, gold, sample, targets, best)
    seen, known = in_sight(task, home, targets, answers, facts["miniature"])
    failures += seen
    failures += given_away(task, home, gold, targets)
    failures += missing_classes(task, home, gold, targets, facts["miniature"])
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
            "seconds": round(time.monotonic() - start, 1), "verdict": "FAILED" if failures else "ok",
            "known": known}, failures


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
            yield "text", cell(targets[0], "text")
            for name in targets[:10] + targets[10:][-10:]:
                yield f"NaN in the column {name!r}", cell(name, "nan")
            yield "a blank at the end", {**gold, targets[-1]: [*gold[targets[-1]][:-1], ""]}

    failures = []
    for what, table in spoilt():
        try:
            _score(task, home, table)
            failures.append(f"A submission with {what} is not refused.")
        except tasks.InvalidSubmission as error:
            if not str(error):
                failures.append(f"A submission with {what} is refused without a reason.")
        except Exception as error:
            failures.append(f"A submission with {what} ends in {type(error).__name__}, not in InvalidSubmission.")
    return failures


def not_scored(task, answers, gold, sample, targets, best):
    """Which predicted columns and rows may be wrong and the score stays the best."""
    def stays(changed):
        """Whether it does with these columns; None where the grader refuses them."""
        try:
            score = float(task.score(answers, {**gold, **changed}))
        except tasks.InvalidSubmission:
            return None
        return None if math.isnan(score) else not task.better(best, score)

    rng = np.random.default_rng(0)
    failures = []
    scored = [i for i in range(len(gold[targets[0]])) if any(gold[name][i] != task.unscored for name in targets)]
    for name, other in zip(targets, [*targets[1:], targets[0]]):
        ones = [i for i in scored if _number(gold[name][i]) == 1]
        swapped = {one: list(gold[one]) for one in (name, other)}
        for i in ones:
            swapped[name][i], swapped[other][i] = gold[other][i], gold[name][i]
        turned = list(gold[name])
        for i, j in zip(scored, [*scored[1:], scored[0]]):
            turned[i] = gold[name][j]
        for changed in ({name: turned}, {name: sample[name]}, swapped):     # the last keeps the sum of a distribution
            if any(changed[name][i] != gold[name][i] for i in scored) and (result := stays(changed)) is not None:
                if result:
                    failures.append(f"The column {name!r} must be predicted and is not scored.")
                break
    num_drawn = 20 if len(scored) <= MAX_ROWS else 8
    drawn = rng.choice(scored, min(num_drawn, len(scored)), replace=False).tolist() if scored else []
    rows = list(zip(*[gold[name] for name in targets]))
    ignored = []
    for i in drawn:
        others = (rows[j] for j in rng.permutation(scored)[:1000] if rows[j] != rows[i])
        if (other := next(others, None)) is None:
            continue
        changed = {name: [*gold[name][:i], cell, *gold[name][i + 1:]] for name, cell in zip(targets, other)}
        if stays(changed):
            ignored.append(i)
    if ignored:
        failures.append(f"{len(ignored)} of {len(drawn)} rows may be wrong and the answers score as well, "
                        f"such as row {ignored[0] + 1}.")
    return failures


def given_away(task, home, gold, targets):
    """The columns of public tables that tell a test row's answers, as sentences."""
    num_rows = len(gold[targets[0]])
    first = range(min(num_rows, MAX_ROWS))
    labels = [tuple(gold[name][i] for name in targets) for i in first]
    hot = [[name for name, text in zip(targets, label) if _number(text) == 1] for label in labels]
    if len(targets) > 1 and all(len(names) == 1 for names in hot):      # one-hot: a column alone may be one by chance
        alone = [[names[0] for names in hot]]
    else:
        alone = [gold[name][:MAX_ROWS] for name in targets]
    ids = gold[task.key][:MAX_ROWS] if task.key else None
    train = home / "public" / "train.csv"
    learned = set(_header(train)) if train.exists() else set()
    failures = []
    for path, table in _public_tables(home / "public", task.key, ids, num_rows):
        for name, cells in table.items():
            own = path == task.sample and name in targets                   # its score says how good it is
            if own or name == task.key or len(set(cells)) < 2:
                continue
            shared = name in learned and path in ("train.csv", "test.csv")
            blanks = [len(cell) - len(cell.rstrip()) for cell in cells]
            if any(_equal(cells, column) for column in alone) or any(
                    _renamed(values, column) for column in [labels, *alone] for values in (cells, blanks)) or (
                    not shared and any(_same_order(cells, column) for column in alone)):
                failures.append(f"The column {name!r} of the public file {path} tells the answers.")
    return failures


def _public_tables(public, key, ids, num_rows):
    """Yields (path, {column: cells of the test rows, the first MAX_ROWS of them}) for what can be matched with them."""
    for path, opened in tasks.raw_files(public):
        name = path.removesuffix(".gz")
        if not name.endswith((".csv", ".tsv", ".txt", ".json", ".npy")):
            continue
        try:
            with opened() as stream, (gzip.open(stream) if name != path else stream) as stream:
                rows = _rows(name, stream)
                table = _matched(rows, key, ids, num_rows)
        except (ValueError, TypeError, LookupError, AttributeError, OSError, EOFError, csv.Error):
            continue        # not a table
        if table:
            yield path, table


def _rows(name, stream):
    """The rows of a table in a binary stream, texts, the header first; the file's name says what it is."""
    if name.endswith(".npy"):
        array = np.load(io.BytesIO(stream.read()), allow_pickle=False)
        array = array.reshape(len(array), -1) if array.ndim else array.reshape(1, 1)
        return [[str(j) for j in range(array.shape[1])], *array.astype(str).tolist()] if array.shape[1] <= 100 else []
    if name.endswith(".json"):
        text = stream.read(MAX_JSON + 1)
        found = json.loads(text) if len(text) <= MAX_JSON else []
        if isinstance(found, dict):
            found = [{"": one, "value": value} for one, value in found.items()]
        records = [one if isinstance(one, dict) else {"value": one} for one in found]
        names = [one for one, value in records[0].items() if not isinstance(value, (list, dict))] if records else []
        return [names, *([str(record.get(one)) for one in names] for record in records)]
    text = io.TextIOWrapper(stream, encoding="utf-8-sig", newline="")
    return filter(None, csv.reader(text, delimiter="\t" if name.endswith(".tsv") else ","))


def _matched(rows, key, ids, num_rows):
    """{column: cells} of the rows that have the ids, or of all rows where those are num_rows; {} where neither is."""
    rows = iter(rows)
    header = next(rows, [])
    place = header.index(key) if key in header else 0
    wanted = {id: None for id in ids or ()}
    first, total = [], 0
    for row in rows:
        total += 1
        if len(first) < MAX_ROWS:
            first.append(row)
        if len(row) == len(header) and row[place] in wanted and wanted[row[place]] is None:
            wanted[row[place]] = row
    if wanted and None not in wanted.values():
        found = [wanted[id] for id in ids]
    elif num_rows in (total, total + 1):                # with or without a header
        found = first if num_rows == total else [header, *first][:MAX_ROWS]
    else:
        return {}
    return dict(zip(header, zip(*found)))


def _equal(cells, column):
    """Whether two columns hold the same texts or numbers."""
    numbers = [(_number(a), _number(b)) for a, b in zip(cells, column)]
    return all(a == b or (x is not None and y is not None and math.isclose(x, y, rel_tol=1e-6, abs_tol=1e-12))
               for a, b, (x, y) in zip(cells, column, numbers))


def _renamed(cells, labels):
    """Whether the cells are other names of the labels, and there are so many ways to deal these out that it is no
    accident: less than one in 1e9. Where all labels differ there is but one way."""
    counts = Counter(labels).values()
    if not len(set(zip(cells, labels))) == len(set(cells)) == len(counts):
        return False
    ways = math.lgamma(len(labels) + 1) - sum(math.lgamma(count + 1) for count in counts)
    return ways - sum(math.lgamma(alike + 1) for alike in Counter(counts).values()) > math.log(1e9)


def _same_order(cells, column):
    """Whether two columns of numbers go up, or one up and the other down, together."""
    a, b = (pd.to_numeric(pd.Series(list(values)), errors="coerce").rank() for values in (cells, column))
    if a.isna().any() or b.isna().any() or min(a.nunique(), b.nunique()) < 10:
        return False
    return abs(np.corrcoef(a, b)[0, 1]) > 0.9999


def missing_classes(task, home, gold, targets, miniature):
    """The classes that only the answers or only the training rows have, where that is no accident."""
    train, test = home / "public" / "train.csv", home / "public" / "test.csv"
    if task.kind != "classification" or not train.exists():
        return []
    header = _header(train)
    if set(targets) <= set(header):
        pairs = [(name, [text for text in gold[name] if text != task.unscored]) for name in targets]
    else:           # one-hot answers, and one column of train with the names of the classes
        own = [name for name in header if name not in (_header(test) if test.exists() else [task.key])]
        if len(own) != 1 or len(targets) < 2:
            return []
        pairs = [(own[0], [name for name in targets for text in gold[name] if _number(text) == 1])]
    failures = []
    for name, answers in pairs:
        place = header.index(name)
        with open(train, newline="", encoding="utf-8-sig") as stream:
            rows = csv.reader(stream)
            next(rows)
            learned = Counter(_value(row[place]) for row in rows if row)
        answers = Counter(map(_value, answers))
        if name not in targets and not set(learned) <= set(map(_value, targets)):
            continue        # not the names of the classes after all
        if 2 * len(learned) > learned.total():
            continue        # no classes
        for here, there, what in ((answers, learned, "is among the answers and in no training row"),
                                  (learned, answers, "is among the training rows and in no answer")):
            for value, count in here.items():
                accident = (1 - count / here.total()) ** there.total() if count < here.total() else 0
                if value not in there and (accident < CHANCE or (miniature and here is answers)):
                    failures.append(f"The class {value!r} of {name!r} {what}.")
    return failures


def _value(text):
    """The number that the text is, or else the text."""
    number = _number(text)
    return text if number is None else number


def in_sight(task, home, targets, answers, miniature):
    """(failures, what is known to be so): targets in the test file, test rows or their files among the training rows.
    """
    public, failures, twins = home / "public", [], []
    train, test = public / "train.csv", public / "test.csv"
    trained_on, shown = (_header(path) if path.exists() else [] for path in (train, test))
    if set(targets) & set(shown):
        failures.append("The public test file has the target's column.")
    ids = set() if task.key_is_feature else set(_header(public / task.sample)) - set(targets)      # say which row it is
    features = [name for name in shown if name in trained_on and name not in ids]
    if features:
        tested = list(_hash_rows(test, features))
        learned = {kind: set() for kind in range(2)}
        sought = [set(hashes) for hashes in zip(*tested)]
        for hashes in _hash_rows(train, features) if tested else ():
            for kind in learned:
                if hashes[kind] in sought[kind]:
                    learned[kind].add(hashes[kind])
        exact, alike = ([number for number, hashes in enumerate(tested, 1) if hashes[kind] in learned[kind]]
                        for kind in learned)
        if exact:
            twins.append(f"{len(exact)} rows are in train and in test, such as row {exact[0]} of test.")
        elif len(alike) > (0 if miniature else 0.01 * len(tested)):
            twins.append(f"{len(alike)} rows are in train and in test but for capitals and blanks, "
                         f"such as row {alike[0]} of test.")
    if task.test_file:
        tested = [public / task.test_file.format(id) for id in answers[task.key]]
        failures += [f"{path} is missing." for path in tested if not path.exists()][:1]
        hashes = {tasks.hash_files(path) for path in tested if path.exists()}
        others = {path for path in public.rglob(f"*{Path(task.test_file).suffix}") if path.is_file()} - set(tested)
        same = [path for path in sorted(others) if tasks.hash_files(path) in hashes]
        twins += [f"{len(same)} files of train are in test too, such as {path}." for path in same[:1]]
    return (failures, twins) if task.known_twins and not miniature else (failures + twins, [])


def _header(path):
    with open(path, newline="", encoding="utf-8-sig") as stream:
        return next(csv.reader(stream))


def _hash_rows(path, columns):
    """Yields two hashes of each row's cells in these columns, as they are and without capitals and blanks: train files
    may be larger than the memory."""
    with open(path, newline="", encoding="utf-8-sig") as stream:
        rows = csv.reader(stream)
        header = next(rows)
        places = [header.index(name) for name in columns]
        for row in filter(None, rows):
            cells = [row[place] for place in places]
            yield hash(tuple(cells)), hash(tuple(["".join(cell.split()).casefold() for cell in cells]))


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
    groups = _groups(task, home, gold, rows, tells, miniature)
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
    shuffled = [y[rng.permutation(rows)] for _ in range(50)] if groups else []
    for what, cells in groups.items():
        counts = Counter(cells)
        large = [value for value, count in counts.items() if count >= 5]       # the others are one group
        if len(large) < 2 and sum(counts.values()) - sum(counts[value] for value in large) < 5:
            continue
        group = pd.Series(list(cells)).map({value: number for number, value in enumerate(large)}).fillna(-1)
        member = np.stack([group == number for number in sorted(set(group))]).astype(float)
        member /= np.sqrt(member.sum(1, keepdims=True))
        chance = np.array([_apart(member, one) for one in shuffled])
        z = (_apart(member, y) - chance.mean()) / (chance.std() + 1e-12)
        if z > SIGMAS:
            failures.append(f"The {what} tells of the target: its groups are {z:.0f} standard deviations further apart "
                            f"than by chance.")
    return failures


def _groups(task, home, gold, rows, tells, miniature):
    """{what: a value for each test row} that groups the rows in a way that should tell nothing."""
    groups = {}
    for what, numbers in tells.items():
        if what == "id":
            ids = [str(id) for id in gold[task.key][:rows]]
            runs = [re.findall(r"\d+", id) for id in ids]
            numbers = [int(found[-1][-15:]) if found else -1 for found in runs]
            groups |= {"last letter of the id": [id[-1:] for id in ids], "length of the id": list(map(len, ids)),
                       "first letter of the id": [id[:1] for id in ids]}
        groups |= {f"{what} modulo {k}": [int(number) % k for number in numbers] for k in range(2, 17)}
    test = home / "public" / "test.csv"
    if miniature and test.exists():
        ids = gold[task.key][:rows] if task.key else None
        with open(test, "rb") as stream:
            table = _matched(_rows("test.csv", stream), task.key, ids, len(next(iter(gold.values()))))
        for name, cells in table.items():
            groups[f"number of blanks at the end of {name!r}"] = [len(cell) - len(cell.rstrip()) for cell in cells]
            groups[f"number of blanks at the start of {name!r}"] = [len(cell) - len(cell.lstrip()) for cell in cells]
    return groups


def _apart(member, y):
    """How far apart the groups' sums of y are: the cube root makes it nearly normal. member: (groups, rows)."""
    return ((member @ y) ** 2).sum() ** (1 / 3)


def _likeness(rank, y):
    """(largest rank correlation with a column of y, mean product of neighbouring rows of y)."""
    return np.abs((rank - rank.mean()) @ y / (len(y) * rank.std())).max(), (y[1:] * y[:-1]).mean()
