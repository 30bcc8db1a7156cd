"""The tasks of longer texts: their splits against a plain restatement, their graders and refusals, the shipped ideas.

The publisher's files are fabricated here; where real data lie beside the checkout, recorded MD5 sums are checked too.
"""
import hashlib
import io
import math
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import sklearn.metrics

import tasks

SPOOKY, INSULTS = "spooky-author-identification", "detecting-insults-in-social-commentary"
ESSAYS, FEEDBACK = "learning-agency-lab-automated-essay-scoring-2", "feedback-prize-english-language-learning"
OURS = [SPOOKY, INSULTS, ESSAYS, FEEDBACK]
REAL = Path(__file__).parents[1] / "../shared/data"
RATINGS = ["cohesion", "syntax", "vocabulary", "phraseology", "grammar", "conventions"]
TEXTS = ['He said, "no".', "two\nlines", "two\n\nparagraphs, a comma", "caf\u00e9 \u2014 na\u00efve", "NA", "7.0",
         " spaced ", "it's; \\n \\xa0", "'''", "last,\r\nfrom Windows"]


def split(raw, id, home):
    """Runs the task's own prepare on a raw folder, without the starter: (public, private)."""
    public, private = home / id / "public", home / id / "private"
    public.mkdir(parents=True)
    private.mkdir()
    task = tasks.load(id)
    task.prepare(raw, public, private, task.variants[0])
    (home / id / "task.json").write_text("{}")
    return public, private


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A data folder with the miniatures of all four, without the starters' runs."""
    home = tmp_path_factory.mktemp("data")
    for id in OURS:
        raw = tmp_path_factory.mktemp("raw")
        tasks.load(id).miniature(raw, 0)
        split(raw, id, home)
    return home


def texts(n):
    """n different texts, with everything in them that a CSV file may garble."""
    return [TEXTS[i % len(TEXTS)] + ("" if i < len(TEXTS) else str(i)) for i in range(n)]


def text(frame):
    return frame.to_csv(index=False, lineterminator="\n").encode()


def tenth(rows):
    """The shared rule row by row: (train, test)."""
    order = np.random.RandomState(0).permutation(len(rows))
    num_test = math.ceil(0.1 * len(rows))
    return rows.iloc[order[num_test:]], rows.iloc[order[:num_test]]


def read(path):
    return pd.read_csv(path, keep_default_na=False)


def graded(id, data, frame):
    frame.to_csv(data / "submission.csv", index=False)
    return tasks.grade(id, data / "submission.csv", data)


# ---------------------------------------------------------------------------------------------------------- the splits

@pytest.mark.parametrize("form", ["loose", "zips", "zips in a zip"])
def test_spooky_sentences_are_split_row_by_row(tmp_path, form):
    rng, n, raw = np.random.default_rng(0), 203, tmp_path / "raw"
    raw.mkdir()
    rows = pd.DataFrame({"id": [f"id{i:05d}" for i in rng.permutation(n)], "text": texts(n),
                         "author": rng.choice(["EAP", "HPL", "MWS"], n)})
    inner = io.BytesIO()
    with zipfile.ZipFile(inner, "w") as archive:
        archive.writestr("train.csv", text(rows))
    if form == "loose":
        (raw / "train.csv").write_bytes(text(rows))
    elif form == "zips":
        (raw / "train.zip").write_bytes(inner.getvalue())
    else:
        with zipfile.ZipFile(raw / f"{SPOOKY}.zip", "w") as archive:
            archive.writestr("train.zip", inner.getvalue())
    public, private = split(raw, SPOOKY, tmp_path)
    train, test = tenth(rows)
    assert (public / "train.csv").read_bytes() == text(train)
    assert (public / "test.csv").read_bytes() == text(test[["id", "text"]])
    shares = "0.403493538995863,0.287808366106543,0.308698094897594"
    lines = (public / "sample_submission.csv").read_text().splitlines()
    assert lines == ["id,EAP,HPL,MWS", *(f"{id},{shares}" for id in test["id"])]
    lines = (private / "test.csv").read_text().splitlines()
    assert lines == ["id,EAP,HPL,MWS", *(f"{id},{a == 'EAP':d},{a == 'HPL':d},{a == 'MWS':d}"
                                         for id, a in zip(test["id"], test["author"]))]


def test_real_spooky_sentences_have_the_recorded_md5_sums(tmp_path):
    if not (REAL / SPOOKY).exists():
        pytest.skip(f"{REAL / SPOOKY} is not there")
    public, private = split(REAL / SPOOKY, SPOOKY, tmp_path)
    files = public / "train.csv", public / "test.csv", public / "sample_submission.csv", private / "test.csv"
    assert [hashlib.md5(path.read_bytes()).hexdigest() for path in files] == [
        "1124166bf7b8b1e337a32fe568732447", "2ea5096a8e8cf340b13a7a18d9bdd914",
        "3b754ff50b2b4416150bb00c86c34889", "fb1381c6c9a7e9efd236c625807a0c8a"]


def test_scored_essays_are_split_row_by_row(tmp_path):
    rng, n, raw = np.random.default_rng(1), 307, tmp_path / "raw"
    raw.mkdir()
    rows = pd.DataFrame({"essay_id": [f"{i:07x}" for i in rng.permutation(n)], "full_text": texts(n),
                         "score": rng.integers(1, 7, n)})
    (raw / "train.csv").write_bytes(text(rows))
    public, private = split(raw, ESSAYS, tmp_path)
    train, test = tenth(rows)
    drawn = np.random.RandomState(42).randint(1, 7, size=31)
    assert (public / "train.csv").read_bytes() == text(train)
    assert (public / "test.csv").read_bytes() == text(test.drop(columns="score"))
    assert (public / "sample_submission.csv").read_bytes() == text(test[["essay_id"]].assign(score=drawn))
    assert (private / "answers.csv").read_bytes() == text(test)


def test_rated_essays_are_split_as_pandas_shuffles_them(tmp_path):
    rng, n, raw = np.random.default_rng(2), 311, tmp_path / "raw"
    raw.mkdir()
    ratings = {name: rng.integers(2, 11, n) / 2 for name in RATINGS}
    rows = pd.DataFrame({"text_id": [f"{i:012X}" for i in rng.permutation(n)], "full_text": texts(n), **ratings})
    (raw / "train.csv").write_bytes(text(rows))
    public, private = split(raw, FEEDBACK, tmp_path)
    shuffled = rows.sample(frac=1, random_state=42).reset_index(drop=True)
    train, test = shuffled[:304], shuffled[304:]                    # int(0.98 * 311)
    assert (public / "train.csv").read_bytes() == text(train)
    assert (public / "test.csv").read_bytes() == text(test[["text_id", "full_text"]])
    assert (public / "sample_submission.csv").read_bytes() == text(
        test[["text_id"]].assign(**{name: 3.0 for name in RATINGS}))
    assert (private / "answer.csv").read_bytes() == text(test[["text_id", *RATINGS]])


def test_as_many_rows_as_the_publishers_files_give():
    assert [len(side) for side in tasks.train_test_split(19579, 0.1)] == [17621, 1958]
    assert [len(side) for side in tasks.train_test_split(17307, 0.1)] == [15576, 1731]
    assert [int(0.98 * 3911), 3911 - int(0.98 * 3911)] == [3832, 79]


@pytest.fixture
def comments(tmp_path):
    """(test_with_solutions, home) of comments with everything a CSV file may garble; one comment comes twice."""
    rng, raw = np.random.default_rng(3), tmp_path / "raw"
    raw.mkdir()
    wrapped = [f'"{comment}"' for comment in texts(60)]
    wrapped += ['"\\xe1\\u00e1\\\\n\\\\xc2\\\\xa0"', '"""', '""', '"two\\nlines"', '"NA"']
    rows = pd.DataFrame({"Insult": rng.integers(0, 2, 65), "Date": rng.choice(["", "20120618192155Z"], 65),
                         "Comment": wrapped, "Usage": rng.choice(["PublicTest", "PrivateTest"], 65)})
    train = b'Insult,Date,Comment\r\n1,20120618192155Z,"""You x."""\r\n0,,"""i don\'t\\xa0know"""'     # odd on purpose
    (raw / "train.csv").write_bytes(train)
    (raw / "test_with_solutions.csv").write_bytes(text(rows))
    for other in ("test.csv", "impermium_verification_labels.csv"):
        (raw / other).write_text("id,Insult,Date,Comment,Usage\n1,1,,x,y\n")
    public, private = split(raw, INSULTS, tmp_path)
    assert (public / "train.csv").read_bytes() == train
    return rows, tmp_path


def test_comments_are_carried_over_and_not_split(comments):
    rows, home = comments
    public, private = home / INSULTS / "public", home / INSULTS / "private"
    assert (public / "test.csv").read_bytes() == text(rows[["Date", "Comment"]])
    gold = rows[["Insult", "Date", "Comment"]]
    assert (public / "sample_submission_null.csv").read_bytes() == text(gold.assign(Insult=0))
    assert (private / "test.csv").read_bytes() == text(rows)
    assert (private / "gold_submission.csv").read_bytes() == text(gold)


@pytest.mark.parametrize("how", [{}, {"quoting": 1}, {"lineterminator": "\r\n"}, {"columns": ["Comment", "Insult"]}])
def test_comments_survive_being_read_and_written_by_a_script(comments, how):
    rows, home = comments
    test = pd.read_csv(home / INSULTS / "public/test.csv")
    assert test["Comment"].tolist() == rows["Comment"].tolist()
    test.insert(0, "Insult", rows["Insult"])
    test.to_csv(home / "submission.csv", index=False, **how)
    assert tasks.grade(INSULTS, home / "submission.csv", home) == 1
    twice = test["Comment"].duplicated(keep=False)
    shuffled = pd.concat([test[twice], test[~twice].sample(frac=1, random_state=0)])
    shuffled.to_csv(home / "submission.csv", index=False, **how)
    assert tasks.grade(INSULTS, home / "submission.csv", home) == 1


# -------------------------------------------------------------------------------------------------------------- graders

def test_insults_are_graded_by_accuracy_and_by_auc(data):
    truth = read(data / INSULTS / "private/test.csv")
    rng = np.random.default_rng(4)
    chances = np.round(0.3 * truth["Insult"] + 0.7 * rng.random(len(truth)), 1)         # many ties, some at 0.5
    score = graded(INSULTS, data, truth.assign(Insult=chances))
    assert score == np.mean([(chance > 0.5) == insult for chance, insult in zip(chances, truth["Insult"])])
    further = tasks.also(INSULTS, data / "submission.csv", data)
    assert further == {"AUC": pytest.approx(sklearn.metrics.roc_auc_score(truth["Insult"], chances))}
    graded(INSULTS, data, truth.assign(Insult=0.5))
    assert tasks.also(INSULTS, data / "submission.csv", data) == {"AUC": 0.5}


def test_spooky_is_graded_by_log_loss(data):
    truth = read(data / SPOOKY / "private/test.csv")
    chances = np.random.default_rng(5).dirichlet([1, 1, 1], len(truth))
    frame = truth[["id"]].assign(**{name: chances[:, k] for k, name in enumerate(["EAP", "HPL", "MWS"])})
    wanted = sklearn.metrics.log_loss(truth[["EAP", "HPL", "MWS"]].to_numpy().argmax(1), chances)
    assert graded(SPOOKY, data, frame.sample(frac=1, random_state=0)) == pytest.approx(wanted, rel=1e-9)


def test_scored_essays_are_graded_by_kappa(data):
    truth = read(data / ESSAYS / "private/answers.csv")
    for guess in (truth["score"].clip(2, 4), np.random.default_rng(6).choice([1, 3, 9], len(truth))):
        wanted = sklearn.metrics.cohen_kappa_score(truth["score"], guess, weights="quadratic")
        frame = pd.DataFrame({"essay_id": truth["essay_id"], "score": np.asarray(guess, float)})     # 3.0 is fine
        assert graded(ESSAYS, data, frame[::-1]) == pytest.approx(wanted)


def test_rated_essays_are_graded_column_by_column(data):
    truth = read(data / FEEDBACK / "private/answer.csv")
    frame = truth.assign(cohesion=truth["cohesion"] + 3, grammar=9.0)
    by_hand = (3 + np.sqrt(np.mean([(9 - rating) ** 2 for rating in truth["grammar"]]))) / 6
    assert graded(FEEDBACK, data, frame[::-1]) == pytest.approx(by_hand)


def put(column, value):
    return lambda rows: rows.astype(object).assign(**{column: [value, *rows[column][1:]]})


@pytest.mark.parametrize("id, change, reason", [
    (SPOOKY, put("EAP", 1.5), "from 0 to 1"), (SPOOKY, put("HPL", 0.9), "must sum to 1"),
    (SPOOKY, lambda rows: rows.assign(KING=0), "'KING' is not expected"), (SPOOKY, put("MWS", "nan"), "finite|from 0"),
    (SPOOKY, put("id", "id99999"), "not in the test set"), (SPOOKY, lambda rows: rows[1:], "49 rows; 50"),
    (SPOOKY, lambda rows: rows.drop(columns="MWS"), "'MWS' is missing"),
    (INSULTS, put("Insult", 1.01), "from 0 to 1"), (INSULTS, put("Insult", "yes"), "not a number"),
    (INSULTS, put("Insult", "nan"), "from 0 to 1"), (INSULTS, lambda rows: rows[1:], "179 rows; 180"),
    (INSULTS, lambda rows: rows.drop(columns="Insult"), "'Insult' is missing"),
    (INSULTS, lambda rows: rows.drop(columns="Comment"), "'Comment' is missing"),
    (INSULTS, lambda rows: rows.assign(Comment=rows["Comment"].str.strip('"')), "not in the test set"),
    (ESSAYS, put("score", 3.5), "whole"), (ESSAYS, put("score", "inf"), "whole"),
    (ESSAYS, put("score", ""), "not a number"), (ESSAYS, lambda rows: rows[:0], "0 rows; 50"),
    (ESSAYS, put("essay_id", "0"), "not in the test set"),
    (ESSAYS, lambda rows: rows.rename(columns={"score": "Score"}), "'score' is missing"),
    (FEEDBACK, put("syntax", "nan"), "finite"), (FEEDBACK, put("grammar", "B"), "not a number"),
    (FEEDBACK, lambda rows: rows.assign(text_id=range(len(rows))), "not in the test set"),
    (FEEDBACK, lambda rows: rows.drop(columns="vocabulary"), "'vocabulary' is missing"),
    (FEEDBACK, lambda rows: pd.concat([rows, rows[:1]]), "11 rows; 10"),
])
def test_a_spoilt_submission_is_refused_with_its_reason(data, id, change, reason):
    sample = pd.read_csv(data / id / "public" / tasks.load(id).sample)
    with pytest.raises(tasks.InvalidSubmission, match=reason):
        graded(id, data, change(sample))


# ------------------------------------------------------------------------------------------------- miniatures and ideas

@pytest.mark.parametrize("id, files", [
    (SPOOKY, ["sample_submission.zip", "test.zip", "train.zip"]),
    (ESSAYS, ["sample_submission.csv", "test.csv", "train.csv"]),
    (INSULTS, ["sample_submission_null.csv", "test.csv", "test_with_solutions.csv", "train.csv"]),
    (FEEDBACK, ["sample_submission.csv", "test.csv", "train.csv"])])
def test_a_miniature_has_the_publishers_files_and_is_the_same_each_time(id, files, tmp_path):
    for folder, seed in (("a", 0), ("b", 0), ("c", 1)):
        (tmp_path / folder).mkdir()
        tasks.load(id).miniature(tmp_path / folder, seed)
    train = files[-1]
    a, b, c = (sorted((tmp_path / folder).iterdir()) for folder in "abc")
    assert [path.name for path in a] == files
    frames = [pd.read_csv(tmp_path / folder / train) for folder in "abc"]
    assert frames[0].equals(frames[1]) and not frames[0].equals(frames[2])
    assert len(frames[0]) == (320 if id == INSULTS else 500)
    assert frames[0].drop(columns="Date", errors="ignore").notna().all(axis=None)


@pytest.mark.parametrize("id", OURS)
def test_each_idea_applies_to_the_starter(id):
    starter = (tasks.load(id).folder / "train.py").read_text()
    ideas = tasks.ideas(id)
    assert len(ideas) >= 10 and len({idea["kind"] for idea in ideas}) >= 5
    scripts = [tasks.apply(starter, idea) for idea in ideas]
    for idea, script in zip(ideas, scripts):
        compile(script, idea["title"], "exec")
    assert len({starter, *scripts}) == len(ideas) + 1


def test_an_idea_runs_and_improves_on_the_starter(data, tmp_path):
    starter = (tasks.load(SPOOKY).folder / "train.py").read_text()
    idea = next(idea for idea in tasks.ideas(SPOOKY) if idea["title"] == "Character n-grams beside words")
    os.symlink(data / SPOOKY / "public", tmp_path / "data")
    scores = []
    for script in (starter, tasks.apply(starter, idea)):
        (tmp_path / "train.py").write_text(script)
        subprocess.run([sys.executable, "train.py"], cwd=tmp_path, check=True, capture_output=True)
        scores.append(tasks.grade(SPOOKY, tmp_path / "submission.csv", data))
    assert scores[1] < 0.9 * scores[0]
