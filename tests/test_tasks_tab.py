"""The tasks of tables and short texts: their splits against a plain restatement, their refusals, and the shipped ideas.

The publisher's files are fabricated here; recorded MD5 sums are checked where a file does not depend on their content.
"""
import hashlib
import io
import json
import zipfile

import numpy as np
import pandas as pd
import pytest
import sklearn.model_selection

import tasks

JIGSAW = "jigsaw-toxic-comment-classification-challenge"
PATENT = "us-patent-phrase-to-phrase-matching"
FOREST = "tabular-playground-series-dec-2021"
NOMAD = "nomad2018-predict-transparent-conductors"
OURS = [JIGSAW, PATENT, FOREST, NOMAD]
KINDS = {"features", "model", "regularisation", "optimisation", "augmentation", "ensembling", "calibration",
         "validation"}


def split(raw, id, tmp):
    """Runs the task's own prepare on a raw folder: (public, private)."""
    public, private = tmp / id / "public", tmp / id / "private"
    public.mkdir(parents=True)
    private.mkdir()
    task = tasks.load(id)
    task.prepare(raw, public, private, task.variants[0])
    (tmp / id / "task.json").write_text("{}")
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


def restated(rows):
    """(train, test) as the publisher of the split makes them: shuffled by scikit-learn, a tenth for the test."""
    return sklearn.model_selection.train_test_split(rows, test_size=0.1, random_state=0)


def text(frame):
    return frame.to_csv(index=False, lineterminator="\n").encode()


def md5(data):
    return hashlib.md5(data).hexdigest()


def refused(id, data, frame):
    """The reason why a submission is refused."""
    path = data / "submission.csv"
    frame.to_csv(path, index=False)
    with pytest.raises(tasks.InvalidSubmission) as error:
        tasks.grade(id, path, data)
    return str(error.value)


def graded(id, data, frame):
    path = data / "submission.csv"
    frame.to_csv(path, index=False)
    return tasks.grade(id, path, data)


# ------------------------------------------------------------------------------------------------- tabular playground

def forest_rows(n):
    rng = np.random.default_rng(1)
    columns = {"Id": np.arange(n), "Elevation": rng.integers(1800, 3900, n), "Aspect": rng.integers(-30, 400, n),
               "Soil_Type1": rng.integers(0, 2, n), "Cover_Type": rng.integers(1, 8, n)}
    return pd.DataFrame(columns)


@pytest.mark.parametrize("form", ["loose", "zip", "windows", "cut"])
def test_the_forest_is_split_as_pandas_and_scikit_learn_would_write_it(tmp_path, form):
    rows, raw = forest_rows(1003), tmp_path / "raw"
    raw.mkdir()
    content = {"windows": text(rows).replace(b"\n", b"\r\n"), "cut": text(rows).rstrip()}.get(form, text(rows))
    if form == "zip":
        with zipfile.ZipFile(raw / f"{FOREST}.zip", "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("train.csv", content)
    else:
        (raw / "train.csv").write_bytes(content)
    public, private = split(raw, FOREST, tmp_path)
    train, test = restated(rows)
    assert (public / "train.csv").read_bytes() == text(train)
    assert (private / "test.csv").read_bytes() == text(test)
    assert (public / "test.csv").read_bytes() == text(test.drop(columns="Cover_Type"))
    assert (public / "sample_submission.csv").read_bytes() == text(test[["Id"]].assign(Cover_Type=2))


def test_the_forest_has_the_recorded_test_ids():
    _, test = tasks.train_test_split(4_000_000, 0.1)
    sample = b"Id,Cover_Type\n" + b"".join(b"%d,2\n" % id for id in test.tolist())
    assert md5(sample) == "d7b1e1f35677df7cce6942a8c053633f"


@pytest.mark.parametrize("old, new, reason", [
    ("\n5,", "\n5.0,", "whole numbers only"), ("\n5,", '\n"5",', "whole numbers only"),
    ("\n5,", "\n5,5,", "5 fields each"), ("Id,", "Key,", "Id as first column")])
def test_a_forest_that_lines_cannot_carry_over_exactly_is_refused(tmp_path, old, new, reason):
    raw = tmp_path / "raw"
    raw.mkdir()
    (raw / "train.csv").write_text(text(forest_rows(50)).decode().replace(old, new))
    with pytest.raises(ValueError, match=reason):
        split(raw, FOREST, tmp_path)
    (raw / "train.csv").unlink()
    with pytest.raises(tasks.MissingRaw, match="train.csv is not in"):
        split(raw, FOREST, tmp_path / "again")


def test_the_forest_is_graded_by_accuracy(data):
    truth = pd.read_csv(data / FOREST / "private/test.csv")[["Id", "Cover_Type"]]
    assert graded(FOREST, data, truth.sample(frac=1, random_state=1)) == 1
    assert graded(FOREST, data, truth.assign(Cover_Type=2.0)) == (truth["Cover_Type"] == 2).mean()
    assert "no-such" in refused(FOREST, data, truth.astype(str).replace({"Id": {str(truth["Id"][0]): "no-such"}}))
    assert "Cover_Type" in refused(FOREST, data, truth.drop(columns="Cover_Type"))
    assert "49 rows" in refused(FOREST, data, truth[1:])


# ---------------------------------------------------------------------------------------------------------------- nomad

@pytest.fixture(scope="module")
def crystals(tmp_path_factory):
    """(rows of the publisher's train.csv, raw folder with nested zips as the publisher ships them, in one zip)."""
    rng, n = np.random.default_rng(2), 2400
    rows = pd.DataFrame({"id": np.arange(1, n + 1), "spacegroup": rng.choice([33, 194], n),
                         "lattice_vector_1_ang": rng.uniform(5, 20, n).round(4),
                         "formation_energy_ev_natom": rng.uniform(0, 0.5, n).round(4),
                         "bandgap_energy_ev": rng.uniform(0, 5, n).round(4)})
    raw, whole, inner = tmp_path_factory.mktemp("crystals"), {}, io.BytesIO()
    for name in ("train", "test"):
        with zipfile.ZipFile(inner, "w") as archive:
            archive.writestr(f"{name}.csv", rows.to_csv(index=False, float_format="%.4f"))
        whole[f"{name}.csv.zip"], inner = inner.getvalue(), io.BytesIO()
        with zipfile.ZipFile(inner, "w") as archive:
            for id in rows["id"]:
                archive.writestr(f"{name}/{id}/geometry.xyz", f"# {name} {id}\n")
        whole[f"{name}.zip"], inner = inner.getvalue(), io.BytesIO()
    with zipfile.ZipFile(raw / f"{NOMAD}.zip", "w") as archive:
        for name, content in whole.items():
            archive.writestr(name, content)
    return rows, raw


def test_crystals_are_split_and_numbered_anew_and_their_geometries_follow(crystals, tmp_path):
    rows, raw = crystals
    public, private = split(raw, NOMAD, tmp_path)
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
    with pytest.raises(tasks.MissingRaw, match="2399 of 2400 geometries .such as train/1/geometry.xyz"):
        split(tmp_path, NOMAD, tmp_path)


def test_crystals_are_compared_by_position_and_ids_do_not_matter(data):
    truth = pd.read_csv(data / NOMAD / "private/test.csv")
    a, b = tasks.load(NOMAD).targets
    guess = truth[[a, b]] * 1.1 + 0.05
    by_hand = np.mean([np.sqrt(((np.log1p(guess[name]) - np.log1p(truth[name])) ** 2).mean()) for name in (a, b)])
    assert graded(NOMAD, data, guess) == pytest.approx(by_hand, rel=1e-9)
    assert graded(NOMAD, data, guess.assign(id=truth["id"][::-1].to_numpy())) == graded(NOMAD, data, guess)
    assert graded(NOMAD, data, guess[::-1]) > 2 * by_hand
    assert "at least 0" in refused(NOMAD, data, guess.assign(**{a: -0.001}))
    assert "finite" in refused(NOMAD, data, guess.assign(**{b: "nan"}))
    assert b in refused(NOMAD, data, guess[[a]])
    assert "51 rows" in refused(NOMAD, data, pd.concat([guess, guess[:1]]))


# --------------------------------------------------------------------------------------------------------------- patent

def test_pairs_of_phrases_are_split_row_by_row(tmp_path):
    rng, n = np.random.default_rng(3), 605
    rows = pd.DataFrame({"id": [f"{id:016x}" for id in rng.integers(1 << 62, size=n)], "anchor": 'a "quoted", phrase',
                         "target": [f"target {i}" for i in range(n)], "context": "H01",
                         "score": rng.integers(0, 5, n) / 4})
    (tmp_path / "train.csv").write_bytes(text(rows))
    public, private = split(tmp_path, PATENT, tmp_path)
    train, test = restated(rows)
    assert (public / "train.csv").read_bytes() == text(train)
    assert (private / "test.csv").read_bytes() == text(test)
    assert (public / "test.csv").read_bytes() == text(test.drop(columns="score"))
    assert (public / "sample_submission.csv").read_bytes() == text(test[["id"]].assign(score=0))


def test_a_constant_prediction_has_no_correlation_and_is_refused(data):
    truth = pd.read_csv(data / PATENT / "private/test.csv")[["id", "score"]]
    assert graded(PATENT, data, truth.assign(score=7 - 3 * truth["score"])) == pytest.approx(-1)
    noisy = truth.assign(score=truth["score"] + np.random.default_rng(0).normal(0, 0.3, len(truth)))
    expected = np.corrcoef(noisy["score"], truth["score"])[0, 1]
    assert graded(PATENT, data, noisy.sample(frac=1, random_state=0)) == pytest.approx(expected, rel=1e-12)
    assert "constant" in refused(PATENT, data, truth.assign(score=0))
    assert "not a number" in refused(PATENT, data, truth.assign(score="alike"))
    assert "finite" in refused(PATENT, data, truth.assign(score=noisy["score"].where(truth.index > 0, np.inf)))
    assert "occurs too often" in refused(PATENT, data, pd.concat([truth[:-1], truth[:1]]))


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
    public, private = split(tmp_path, JIGSAW, tmp_path)
    for name, path in (("train", public / "train.csv"), ("test", public / "test.csv"),
                       ("test_labels", private / "test.csv"), ("sample_submission", public / "sample_submission.csv")):
        assert path.read_bytes() == text(pd.read_csv(io.StringIO(raw[name])))
    assert (public / "test.csv").read_text() == f'id,comment_text\n{ids[2]},\n{ids[3]}," two\nlines "\n'


def test_comments_without_labels_must_be_there_and_are_not_scored(data):
    labels = list(tasks.load(JIGSAW).targets)
    truth = pd.read_csv(data / JIGSAW / "private/test.csv")
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
    assert "'threat'" in refused(JIGSAW, data, guess.drop(columns="threat"))
    assert "finite" in refused(JIGSAW, data, guess.assign(insult="nan"))
    assert "not in the test set" in refused(JIGSAW, data, guess.assign(id=guess["id"].str.upper() + "z"))


# ---------------------------------------------------------------------------------------------------------------- ideas

@pytest.mark.parametrize("id", [*OURS, "leaf-classification", "home-data-for-ml-course", "spaceship-titanic"])
def test_ideas_are_diverse_and_apply_to_the_starter_as_shipped(id):
    task = tasks.load(id)
    ideas = json.loads((task.folder / "ideas.json").read_text())
    assert len(ideas) >= 10 and len({idea["title"] for idea in ideas}) == len(ideas)
    assert len({idea["kind"] for idea in ideas}) >= 5 and {idea["kind"] for idea in ideas} <= KINDS
    for idea in ideas:
        assert set(idea) == {"title", "kind", "instruction", "edits"} and len(idea["instruction"]) >= 20
        compile(edited(task, idea), idea["title"], "exec")


def edited(task, idea):
    script = (task.folder / task.entry).read_text()
    for edit in idea["edits"]:
        assert script.count(edit["find"]) == 1, f"{idea['title']}: {edit['find']!r}"
        script = script.replace(edit["find"], edit["replace"])
    return script


def test_edited_scripts_run_and_half_of_them_beat_the_starter(data, tmp_path, monkeypatch, capsys):
    task = tasks.load(PATENT)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").symlink_to(data / PATENT / "public")
    ideas = json.loads((task.folder / "ideas.json").read_text())
    scores = []
    for script in [(task.folder / task.entry).read_text(), *(edited(task, idea) for idea in ideas)]:
        exec(compile(script, "train.py", "exec"), {"__name__": "__main__"})
        scores.append(tasks.grade(PATENT, "submission.csv", data))
    starter, *scores = scores
    assert capsys.readouterr().out.count("validation Pearson correlation: 0.") == len(ideas) + 1
    assert sum(score > starter for score in scores) >= len(ideas) / 2
    assert 1 <= sum(score < starter for score in scores) <= 4
