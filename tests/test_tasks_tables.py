"""The tasks of tables and texts: their splits against a plain restatement, their graders and their refusals. The
publisher's files are fabricated here; recorded MD5 sums are checked where a file does not depend on their content, or
where the publisher's own files lie in ../shared/data.
"""
import io
import zipfile
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import sklearn.model_selection

import tasks
from common import graded, md5, refused, sides, text

JIGSAW = "jigsaw-toxic-comment-classification-challenge"
PATENT = "us-patent-phrase-to-phrase-matching"
FOREST = "tabular-playground-series-dec-2021"
NOMAD = "nomad2018-predict-transparent-conductors"
SPOOKY = "spooky-author-identification"
INSULTS = "detecting-insults-in-social-commentary"
ESSAYS = "learning-agency-lab-automated-essay-scoring-2"
FEEDBACK = "feedback-prize-english-language-learning"
REAL = Path(__file__).parents[1] / "../shared/data"
RATINGS = ["cohesion", "syntax", "vocabulary", "phraseology", "grammar", "conventions"]
TEXTS = ['He said, "no".', "two\nlines", "two\n\nparagraphs, a comma", "caf\u00e9 \u2014 na\u00efve", "NA", "7.0",
         " spaced ", "it's; \\n \\xa0", "'''", "last,\r\nfrom Windows"]


def texts(n):
    """n different texts, with everything in them that a CSV file may garble."""
    return [TEXTS[i % len(TEXTS)] + ("" if i < len(TEXTS) else str(i)) for i in range(n)]


def restated(rows):
    """(train, test) as the publishers of splits make them: shuffled by scikit-learn, a tenth for the test."""
    return sklearn.model_selection.train_test_split(rows, test_size=0.1, random_state=0)


def split_by_rows(id, rows, raw, home, hidden):
    """Prepares a task whose raw file are these rows, and compares what the agent sees: (public, private, test rows)."""
    public, private = sides(id, raw, home)
    train, test = restated(rows)
    assert (public / "train.csv").read_bytes() == text(train)
    assert (public / "test.csv").read_bytes() == text(test.drop(columns=hidden))
    return public, private, test


def read(path):
    return pd.read_csv(path, keep_default_na=False)


# ------------------------------------------------------------------------------------------------- tabular playground

def forest_rows(n):
    rng = np.random.default_rng(1)
    columns = {"Id": np.arange(n), "Elevation": rng.integers(1800, 3900, n), "Aspect": rng.integers(-30, 400, n),
               "Soil_Type1": rng.integers(0, 2, n), "Cover_Type": rng.integers(1, 8, n)}
    return pd.DataFrame(columns)


@pytest.mark.parametrize("form", ["loose", "zip", "windows", "cut"])
def test_the_forest_is_split_as_pandas_and_scikit_learn_would_write_it(tmp_path, form):
    rows = forest_rows(1003)
    raw = tmp_path / "raw"
    raw.mkdir()
    content = {"windows": text(rows).replace(b"\n", b"\r\n"), "cut": text(rows).rstrip()}.get(form, text(rows))
    if form == "zip":
        with zipfile.ZipFile(raw / f"{FOREST}.zip", "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("train.csv", content)
    else:
        (raw / "train.csv").write_bytes(content)
    public, private, test = split_by_rows(FOREST, rows, raw, tmp_path, "Cover_Type")
    assert (private / "test.csv").read_bytes() == text(test)
    assert (public / "sample_submission.csv").read_bytes() == text(test[["Id"]].assign(Cover_Type=2))


def test_the_forest_has_the_recorded_test_ids():
    _, test = tasks.split_positions(4_000_000, 0.1)
    sample = b"Id,Cover_Type\n" + b"".join(b"%d,2\n" % id for id in test.tolist())
    assert md5(sample) == "d7b1e1f35677df7cce6942a8c053633f"


@pytest.mark.parametrize("old, new, reason", [
    ("\n5,", "\n5.5,", "train.csv cannot be read"), ("\n5,", "\n,", "train.csv cannot be read"),
    ("\n5,", "\n5,5,", "train.csv cannot be read, .* Expected 5 fields in line 7, saw 6[.]$"),
    ("Id,", "Key,", "train.csv has 'Key, Elevation")])
def test_a_forest_that_is_not_of_whole_numbers_is_refused(tmp_path, old, new, reason):
    raw = tmp_path / "raw"
    raw.mkdir()
    (raw / "train.csv").write_text(text(forest_rows(50)).decode().replace(old, new))
    with pytest.raises(ValueError, match=reason):
        sides(FOREST, raw, tmp_path)
    (raw / "train.csv").unlink()
    with pytest.raises(tasks.MissingRaw, match="train.csv with the columns 'Id, Cover_Type' is not in"):
        sides(FOREST, raw, tmp_path / "again")


def test_the_forest_is_graded_by_accuracy(data):
    truth = pd.read_csv(data / FOREST / "private" / "test.csv")[["Id", "Cover_Type"]]
    assert graded(FOREST, data, truth.sample(frac=1, random_state=1)) == 1
    assert graded(FOREST, data, truth.assign(Cover_Type=2.0)) == (truth["Cover_Type"] == 2).mean()


# ---------------------------------------------------------------------------------------------------------------- nomad

@pytest.fixture(scope="module")
def crystals(tmp_path_factory):
    """(rows of the publisher's train.csv, raw folder with nested zips as the publisher ships them, in one zip)."""
    rng = np.random.default_rng(2)
    n = 2400
    rows = pd.DataFrame({"id": np.arange(1, n + 1), "spacegroup": rng.choice([33, 194], n),
                         "lattice_vector_1_ang": rng.uniform(5, 20, n).round(4),
                         "formation_energy_ev_natom": rng.uniform(0, 0.5, n).round(4),
                         "bandgap_energy_ev": rng.uniform(0, 5, n).round(4)})
    raw = tmp_path_factory.mktemp("crystals")
    whole = {}
    inner = io.BytesIO()
    for name in ("train", "test"):
        with zipfile.ZipFile(inner, "w") as archive:
            archive.writestr(f"{name}.csv", rows.to_csv(index=False, float_format="%.4f"))
        whole[f"{name}.csv.zip"] = inner.getvalue()
        inner = io.BytesIO()
        with zipfile.ZipFile(inner, "w") as archive:
            for id in rows["id"]:
                archive.writestr(f"{name}/{id}/geometry.xyz", f"# {name} {id}\n")
        whole[f"{name}.zip"] = inner.getvalue()
        inner = io.BytesIO()
    with zipfile.ZipFile(raw / f"{NOMAD}.zip", "w") as archive:
        for name, content in whole.items():
            archive.writestr(name, content)
    return rows, raw


def test_crystals_are_split_and_numbered_anew_and_their_geometries_follow(crystals, tmp_path):
    rows, raw = crystals
    public, private = sides(NOMAD, raw, tmp_path)
    targets = ["formation_energy_ev_natom", "bandgap_energy_ev"]
    for name, part in zip(("train", "test"), restated(rows)):
        renamed = part.assign(id=range(1, len(part) + 1))
        shown = renamed if name == "train" else renamed.drop(columns=targets)
        assert (public / f"{name}.csv").read_bytes() == text(shown)
        for new, old in enumerate(part["id"], start=1):
            assert (public / name / str(new) / "geometry.xyz").read_text() == f"# train {old}\n"
        assert len(list((public / name).iterdir())) == len(part)
    assert (private / "test.csv").read_bytes() == text(renamed)
    assert md5((public / "sample_submission.csv").read_bytes()) == "f6ca859f7a81041cad0594cf31f171d9"     # recorded


def test_a_crystal_without_geometry_is_named(crystals, tmp_path):
    rows, raw = crystals
    with zipfile.ZipFile(raw / f"{NOMAD}.zip") as archive:
        (tmp_path / "train.csv.zip").write_bytes(archive.read("train.csv.zip"))
    (tmp_path / "train" / "7").mkdir(parents=True)
    (tmp_path / "train" / "7" / "geometry.xyz").write_text("# 7\n")
    with pytest.raises(tasks.MissingRaw, match="2399 of 2400 files .such as 1/geometry.xyz. are not in a folder train"):
        sides(NOMAD, tmp_path, tmp_path)


def test_crystals_are_compared_by_position_and_ids_do_not_matter(data):
    truth = pd.read_csv(data / NOMAD / "private" / "test.csv")
    a, b = tasks.load(NOMAD).targets
    guess = truth[[a, b]] * 1.1 + 0.05
    by_hand = np.mean([np.sqrt(((np.log1p(guess[name]) - np.log1p(truth[name])) ** 2).mean()) for name in (a, b)])
    assert graded(NOMAD, data, guess) == pytest.approx(by_hand, rel=1e-9)
    assert graded(NOMAD, data, guess.assign(id=truth["id"][::-1].to_numpy())) == graded(NOMAD, data, guess)
    assert graded(NOMAD, data, guess[::-1]) > 2 * by_hand
    assert "from 0 to inf" in refused(NOMAD, data, guess.assign(**{a: -0.001}))


# --------------------------------------------------------------------------------------------------------------- patent

def test_pairs_of_phrases_are_split_row_by_row(tmp_path):
    rng = np.random.default_rng(3)
    n = 1205
    rows = pd.DataFrame({"id": [f"{id:016x}" for id in rng.integers(1 << 62, size=n)], "anchor": 'a "quoted", phrase',
                         "target": [f"target {i}" for i in range(n)], "context": "H01",
                         "score": rng.integers(0, 5, n) / 4})
    (tmp_path / "train.csv").write_bytes(text(rows))
    public, private, test = split_by_rows(PATENT, rows, tmp_path, tmp_path, "score")
    assert (private / "test.csv").read_bytes() == text(test)
    assert (public / "sample_submission.csv").read_bytes() == text(test[["id"]].assign(score=0))


def test_a_constant_prediction_has_no_correlation_and_is_refused(data):
    truth = pd.read_csv(data / PATENT / "private" / "test.csv")[["id", "score"]]
    assert graded(PATENT, data, truth.assign(score=7 - 3 * truth["score"])) == pytest.approx(-1)
    noisy = truth.assign(score=truth["score"] + np.random.default_rng(0).normal(0, 0.3, len(truth)))
    expected = np.corrcoef(noisy["score"], truth["score"])[0, 1]
    assert graded(PATENT, data, noisy.sample(frac=1, random_state=0)) == pytest.approx(expected, rel=1e-12)
    assert "constant" in refused(PATENT, data, truth.assign(score=0))


# --------------------------------------------------------------------------------------------------------------- jigsaw

def test_comments_are_written_as_pandas_reads_them(tmp_path):
    labels = tasks.load(JIGSAW).targets
    ids = [f"{i:015x}a" for i in range(4)]
    head = '"id","comment_text",' + ",".join(f'"{name}"' for name in labels) + "\n"
    raw = {"train": head + f'"{ids[0]}","He said ""no""\n\nand left, twice",0,0,0,0,0,0\n"{ids[1]}","fine",1,0,1,0,1,0',
           "test": f'"id","comment_text"\n"{ids[2]}","N/A"\n"{ids[3]}"," two\nlines "\n',
           "test_labels": "id," + ",".join(labels) + f"\n{ids[2]},-1,-1,-1,-1,-1,-1\n{ids[3]},0,0,1,0,0,0\n",
           "sample_submission": "id," + ",".join(labels) + "".join(f"\n{id},0.5,0.5,0.5,0.5,0.5,0.5" for id in ids[2:])}
    for name, content in raw.items():
        with zipfile.ZipFile(tmp_path / f"{name}.csv.zip", "w") as archive:
            archive.writestr(f"{name}.csv", content)
    public, private = sides(JIGSAW, tmp_path, tmp_path)
    for name, path in (("train", public / "train.csv"), ("test", public / "test.csv"),
                       ("test_labels", private / "test.csv"), ("sample_submission", public / "sample_submission.csv")):
        assert path.read_bytes() == text(pd.read_csv(io.StringIO(raw[name])))
    assert (public / "test.csv").read_text() == f'id,comment_text\n{ids[2]},\n{ids[3]}," two\nlines "\n'


def test_comments_without_labels_must_be_there_and_are_not_scored(data):
    labels = list(tasks.load(JIGSAW).targets)
    truth = pd.read_csv(data / JIGSAW / "private" / "test.csv")
    scored = truth[labels].sum(axis=1) >= 0
    assert 0 < scored.sum() < len(truth)
    rng = np.random.default_rng(4)
    guess = truth.copy()
    guess[labels] = (truth[labels] + rng.normal(0, 1, (len(truth), 6))).round(1)      # ties, and values beyond 0 and 1
    expected = sklearn.metrics.roc_auc_score(truth.loc[scored, labels], guess.loc[scored, labels])
    assert graded(JIGSAW, data, guess) == pytest.approx(expected, rel=1e-12)
    changed = guess.copy()
    changed.loc[~scored, labels] = rng.random((int((~scored).sum()), 6))
    assert graded(JIGSAW, data, changed) == graded(JIGSAW, data, guess)
    mixed = changed[[*labels[::-1], "id"]].sample(frac=1, random_state=0)       # other columns first, other rows first
    assert graded(JIGSAW, data, mixed) == graded(JIGSAW, data, guess)
    assert f"{int(scored.sum())} rows" in refused(JIGSAW, data, guess[scored])
    assert "not expected" in refused(JIGSAW, data, guess.assign(sure=1))


# ------------------------------------------------------------------------------------- sentences, essays and comments

def test_spooky_sentences_are_split_row_by_row(tmp_path):
    """From zips in a zip, as its publisher gives them."""
    rng = np.random.default_rng(0)
    n = 1203
    raw = tmp_path / "raw"
    raw.mkdir()
    rows = pd.DataFrame({"id": [f"id{i:05d}" for i in rng.permutation(n)], "text": texts(n),
                         "author": rng.choice(["EAP", "HPL", "MWS"], n)})
    inner = io.BytesIO()
    with zipfile.ZipFile(inner, "w") as archive:
        archive.writestr("train.csv", text(rows))
    with zipfile.ZipFile(raw / f"{SPOOKY}.zip", "w") as archive:
        archive.writestr("train.zip", inner.getvalue())
    public, private, test = split_by_rows(SPOOKY, rows, raw, tmp_path, "author")
    shares = "0.403493538995863,0.287808366106543,0.308698094897594"
    lines = (public / "sample_submission.csv").read_text().splitlines()
    assert lines == ["id,EAP,HPL,MWS", *(f"{id},{shares}" for id in test["id"])]
    lines = (private / "test.csv").read_text().splitlines()
    assert lines == ["id,EAP,HPL,MWS", *(f"{id},{a == 'EAP':d},{a == 'HPL':d},{a == 'MWS':d}"
                                         for id, a in zip(test["id"], test["author"]))]


def test_real_spooky_sentences_have_the_recorded_md5_sums(tmp_path):
    if not (REAL / SPOOKY).exists():
        pytest.skip(f"{REAL / SPOOKY} is not there")
    public, private = sides(SPOOKY, REAL / SPOOKY, tmp_path)
    files = public / "train.csv", public / "test.csv", public / "sample_submission.csv", private / "test.csv"
    assert [md5(path.read_bytes()) for path in files] == [
        "1124166bf7b8b1e337a32fe568732447", "2ea5096a8e8cf340b13a7a18d9bdd914",
        "3b754ff50b2b4416150bb00c86c34889", "fb1381c6c9a7e9efd236c625807a0c8a"]


def test_scored_essays_are_split_row_by_row(tmp_path):
    rng = np.random.default_rng(1)
    n = 1307
    raw = tmp_path / "raw"
    raw.mkdir()
    rows = pd.DataFrame({"essay_id": [f"{i:07x}" for i in rng.permutation(n)], "full_text": texts(n),
                         "score": rng.integers(1, 7, n)})
    (raw / "train.csv").write_bytes(text(rows))
    public, private, test = split_by_rows(ESSAYS, rows, raw, tmp_path, "score")
    drawn = np.random.RandomState(42).randint(1, 7, size=131)
    assert (public / "sample_submission.csv").read_bytes() == text(test[["essay_id"]].assign(score=drawn))
    assert (private / "answers.csv").read_bytes() == text(test)


def test_rated_essays_are_split_as_pandas_shuffles_them(tmp_path):
    rng = np.random.default_rng(2)
    n = 1311
    raw = tmp_path / "raw"
    raw.mkdir()
    ratings = {name: rng.integers(2, 11, n) / 2 for name in RATINGS}
    rows = pd.DataFrame({"text_id": [f"{i:012X}" for i in rng.permutation(n)], "full_text": texts(n), **ratings})
    (raw / "train.csv").write_bytes(text(rows))
    public, private = sides(FEEDBACK, raw, tmp_path)
    shuffled = rows.sample(frac=1, random_state=42).reset_index(drop=True)
    train = shuffled[:1284]
    test = shuffled[1284:]                  # int(0.98 * 1311)
    assert (public / "train.csv").read_bytes() == text(train)
    assert (public / "test.csv").read_bytes() == text(test[["text_id", "full_text"]])
    assert (public / "sample_submission.csv").read_bytes() == text(
        test[["text_id"]].assign(**{name: 3.0 for name in RATINGS}))
    assert (private / "answer.csv").read_bytes() == text(test[["text_id", *RATINGS]])


@pytest.fixture
def comments(tmp_path):
    """(test_with_solutions, home) of comments with everything a CSV file may garble; one comment comes twice."""
    rng = np.random.default_rng(3)
    raw = tmp_path / "raw"
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
    public, private = sides(INSULTS, raw, tmp_path / INSULTS)
    (tmp_path / INSULTS / "task.json").write_text("{}")
    assert (public / "train.csv").read_bytes() == train
    return rows, tmp_path


def test_comments_are_carried_over_and_not_split(comments):
    rows, home = comments
    public = home / INSULTS / "public"
    private = home / INSULTS / "private"
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



def test_insults_are_graded_by_accuracy(data):
    truth = read(data / INSULTS / "private" / "test.csv")
    rng = np.random.default_rng(4)
    chances = np.round(0.3 * truth["Insult"] + 0.7 * rng.random(len(truth)), 1)         # many ties, some at 0.5
    score = graded(INSULTS, data, truth.assign(Insult=chances))
    assert score == np.mean([(chance > 0.5) == insult for chance, insult in zip(chances, truth["Insult"])])


def test_spooky_is_graded_by_log_loss(data):
    truth = read(data / SPOOKY / "private" / "test.csv")
    chances = np.random.default_rng(5).dirichlet([1, 1, 1], len(truth))
    frame = truth[["id"]].assign(**{name: chances[:, k] for k, name in enumerate(["EAP", "HPL", "MWS"])})
    wanted = sklearn.metrics.log_loss(truth[["EAP", "HPL", "MWS"]].to_numpy().argmax(1), chances)
    assert graded(SPOOKY, data, frame.sample(frac=1, random_state=0)) == pytest.approx(wanted, rel=1e-9)


def test_scored_essays_are_graded_by_kappa(data):
    truth = read(data / ESSAYS / "private" / "answers.csv")
    for guess in (truth["score"].clip(2, 4), np.random.default_rng(6).choice([1, 3, 9], len(truth))):
        wanted = sklearn.metrics.cohen_kappa_score(truth["score"], guess, weights="quadratic")
        frame = pd.DataFrame({"essay_id": truth["essay_id"], "score": np.asarray(guess, float)})     # 3.0 is fine
        assert graded(ESSAYS, data, frame[::-1]) == pytest.approx(wanted)


def test_rated_essays_are_graded_column_by_column(data):
    truth = read(data / FEEDBACK / "private" / "answer.csv")
    frame = truth.assign(cohesion=truth["cohesion"] + 3, grammar=9.0)
    by_hand = (3 + np.sqrt(np.mean([(9 - rating) ** 2 for rating in truth["grammar"]]))) / 6
    assert graded(FEEDBACK, data, frame[::-1]) == pytest.approx(by_hand)


def put(column, value):
    return lambda rows: rows.astype(object).assign(**{column: [value, *rows[column][1:]]})


@pytest.mark.parametrize("id, change, reason", [        # beside what every task refuses, see test_tasks
    (SPOOKY, put("EAP", 1.5), "from 0 to 1"), (SPOOKY, put("HPL", 0.9), "must sum to 1"),
    (SPOOKY, lambda rows: rows.assign(KING=0), "'KING' is not expected"), (INSULTS, put("Insult", 1.01), "from 0 to 1"),
    (ESSAYS, put("score", 3.5), "whole"), (ESSAYS, put("score", "inf"), "whole")])
def test_a_spoilt_submission_is_refused_with_its_reason(data, id, change, reason):
    sample = pd.read_csv(data / id / "public" / tasks.load(id).sample)
    with pytest.raises(tasks.InvalidSubmission, match=reason):
        graded(id, data, change(sample))
