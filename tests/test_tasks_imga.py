"""Four tasks of photographs: their splits on made-up raw files against the rules restated, refusals, and ideas.

The made-up raw files hold no pictures: each holds its own name, which shows what was copied where.
"""
import ast
import hashlib
import json
import math
import subprocess
import sys
import zipfile

import numpy as np
import pandas as pd
import pytest

import tasks
from tasks import InvalidSubmission

CACTUS, DOGS = "aerial-cactus-identification", "dogs-vs-cats-redux-kernels-edition"
PLANT, WHALE = "plant-pathology-2020-fgvc7", "whale-categorization-playground"
IDS = [CACTUS, DOGS, PLANT, WHALE]
KINDS = "features model regularisation optimisation augmentation ensembling calibration validation".split()


def prepared(id, raw, folder):
    """The task's own prepare, without the starter: (public, private)."""
    task, public, private = tasks.load(id), folder / "public", folder / "private"
    public.mkdir()
    private.mkdir()
    task.prepare(raw, public, private, task.variants[0])
    return public, private


def split(items, fraction):
    """The shared rule, item by item: (train, test)."""
    order = np.random.RandomState(0).permutation(len(items))
    num_test = math.ceil(fraction * len(items))
    return [items[i] for i in order[num_test:]], [items[i] for i in order[:num_test]]


def csv(path):
    return pd.read_csv(path).values.tolist()


def contents(folder):
    return {path.name: path.read_text() for path in folder.iterdir()}


def planned(id, raw, folder, monkeypatch):
    """As prepared, but nothing is copied: (public, private, {raw name: place under public})."""
    copies = {}

    def copy(raw, _, target, wanted):
        target = target.relative_to(folder / "public")
        copies.update({name: (target / place).as_posix() for name, place in wanted.items()})
    monkeypatch.setitem(tasks.load(id).prepare.__globals__, "copy_raw_folder", copy)
    return *prepared(id, raw, folder), copies


def md5(path):
    return hashlib.md5(path.read_bytes()).hexdigest()


# ---------------------------------------------------------------------------------------------------------- the splits

def test_cactus_split(tmp_path):
    rng = np.random.default_rng(0)
    rows = [[f"{rng.bytes(16).hex()}.jpg", int(rng.integers(2))] for _ in range(203)]
    raw = tmp_path / "raw"
    raw.mkdir()
    pd.DataFrame(rows, columns=["id", "has_cactus"]).to_csv(raw / "train.csv", index=False)
    with zipfile.ZipFile(raw / "train.zip", "w") as archive:
        for name, _ in rows:
            archive.writestr(f"train/{name}", name)
    with zipfile.ZipFile(raw / "test.zip", "w") as archive:
        archive.writestr("test/unlabelled.jpg", "x")
    public, private = prepared(CACTUS, raw, tmp_path)
    train, test = split(rows, 0.19)
    assert len(test) == 39
    assert csv(public / "train.csv") == train and csv(private / "test.csv") == test
    assert csv(public / "sample_submission.csv") == [[name, 0.5] for name, _ in test]
    assert contents(public / "train") == {name: name for name, _ in train}
    assert contents(public / "test") == {name: name for name, _ in test}


def test_dogs_split_from_the_publishers_names(tmp_path, monkeypatch):
    raw = tmp_path / "raw"
    raw.mkdir()
    names = [f"{kind}.{i}.jpg" for i in range(12500) for kind in ("dog", "cat")]
    with zipfile.ZipFile(raw / "train.zip", "w") as archive:
        for name in names:
            archive.writestr(f"train/{name}", "")
    public, private, copies = planned(DOGS, raw, tmp_path, monkeypatch)
    assert md5(public / "sample_submission.csv") == "cfe8f41567220b6fcbbdc4eb4df7230f"      # recorded by MLE-bench
    assert md5(private / "answers.csv") == "98f293fd3f37f967c17aa9263e866c30"
    train, test = split(sorted(names), 0.1)
    cats, dogs = ([name for name in train if name.startswith(kind)] for kind in ("cat", "dog"))
    assert (len(cats), len(dogs), len(test)) == (11242, 11258, 2500)
    assert copies == {**{name: f"train/cat.{i}.jpg" for i, name in enumerate(cats)},
                      **{name: f"train/dog.{i}.jpg" for i, name in enumerate(dogs)},
                      **{name: f"test/{i + 1}.jpg" for i, name in enumerate(test)}}


def test_dogs_are_copied_out_of_a_zip_in_a_zip(tmp_path):
    raw = tmp_path / "raw"
    raw.mkdir()
    names = sorted(f"{kind}.{i}.jpg" for i in range(15) for kind in ("dog", "cat"))
    for folder, inside in (("train", names), ("test", ["1.jpg", "2.jpg"])):
        with zipfile.ZipFile(tmp_path / f"{folder}.zip", "w") as archive:
            for name in inside:
                archive.writestr(f"{folder}/{name}", name)
    with zipfile.ZipFile(raw / f"{DOGS}.zip", "w") as archive:
        for folder in ("test", "train"):
            archive.write(tmp_path / f"{folder}.zip", f"{folder}.zip")
    public, private = prepared(DOGS, raw, tmp_path)
    train, test = split(names, 0.1)
    assert contents(public / "test") == {f"{i + 1}.jpg": name for i, name in enumerate(test)}
    assert csv(private / "answers.csv") == [[i + 1, int(name.startswith("dog"))] for i, name in enumerate(test)]
    assert sorted(contents(public / "train").values()) == sorted(train)


def test_dogs_without_pictures(tmp_path):
    (tmp_path / "raw").mkdir()
    with pytest.raises(ValueError, match="no pictures in a folder train"):
        prepared(DOGS, tmp_path / "raw", tmp_path)


def test_plant_split_from_the_publishers_names(tmp_path, monkeypatch):
    (tmp_path / "raw").mkdir()
    rng, columns = np.random.default_rng(0), ["image_id", "healthy", "multiple_diseases", "rust", "scab"]
    rows = [[f"Train_{i}", *np.eye(4, dtype=int)[rng.integers(4)].tolist()] for i in range(1821)]
    pd.DataFrame(rows, columns=columns).to_csv(tmp_path / "raw" / "train.csv", index=False)
    public, private, copies = planned(PLANT, tmp_path / "raw", tmp_path, monkeypatch)
    assert md5(public / "test.csv") == "4a6cc8292989880ba253a124634efff1"                   # recorded by MLE-bench
    assert md5(public / "sample_submission.csv") == "7a67fc684abd73d9d1afc554e8d5cf07"
    train, test = split(rows, 0.1)
    assert (len(train), len(test)) == (1638, 183)
    assert csv(public / "train.csv") == [[f"Train_{i}", *row[1:]] for i, row in enumerate(train)]
    assert csv(private / "test.csv") == [[f"Test_{i}", *row[1:]] for i, row in enumerate(test)]
    assert list(pd.read_csv(private / "test.csv")) == columns
    assert copies == {**{f"{row[0]}.jpg": f"images/Train_{i}.jpg" for i, row in enumerate(train)},
                      **{f"{row[0]}.jpg": f"images/Test_{i}.jpg" for i, row in enumerate(test)}}


def test_plant_names_overlap_and_are_not_chained(tmp_path):
    images = tmp_path / "raw" / "images"
    images.mkdir(parents=True)
    rows = [[f"Train_{i}", 1, 0, 0, 0] for i in range(20)]
    columns = ["image_id", "healthy", "multiple_diseases", "rust", "scab"]
    pd.DataFrame(rows, columns=columns).to_csv(tmp_path / "raw" / "train.csv", index=False)
    for name in [f"{prefix}_{i}" for prefix in ("Train", "Test") for i in range(20)]:
        (images / f"{name}.jpg").write_text(name)
    public, _ = prepared(PLANT, tmp_path / "raw", tmp_path)
    train, test = split([row[0] for row in rows], 0.1)
    assert contents(public / "images") == {**{f"Train_{i}.jpg": name for i, name in enumerate(train)},
                                           **{f"Test_{i}.jpg": name for i, name in enumerate(test)}}


def test_whale_split(tmp_path, monkeypatch):
    rng = np.random.default_rng(0)
    several = 2 + np.bincount(rng.integers(0, 2030, 2760), minlength=2030)      # the publisher's counts of pictures
    ids = np.repeat(["new_whale", *[f"w_{i:07x}" for i in range(4250)]], [810, *several, *[1] * 2220])
    frame = pd.DataFrame({"Image": [f"{i:08x}.jpg" for i in rng.permutation(9850)], "Id": rng.permutation(ids)})
    (tmp_path / "raw").mkdir()
    frame.to_csv(tmp_path / "raw" / "train.csv", index=False)
    public, private, copies = planned(WHALE, tmp_path / "raw", tmp_path, monkeypatch)

    draws, test, remaining = np.random.default_rng(0), set(), []
    for _, rows in frame.groupby("Id", sort=False):
        if len(rows) >= 2:
            pair = rows.sample(2, random_state=0).index
            test.add(pair[1])
            remaining += rows.index.difference(pair).tolist()
        elif draws.choice(["train", "test"], p=[0.9, 0.1]) == "test":
            test.add(rows.index[0])
    test |= set(split(sorted(remaining), 0.1)[1])
    known = frame[~frame.index.isin(test)]
    tested = frame[frame.index.isin(test)]
    assert (len(known), len(tested)) == (7240, 2610)
    assert csv(public / "train.csv") == known.values.tolist()
    names = set(known["Id"])
    assert csv(private / "test.csv") == [[image, id if id in names else "new_whale"] for image, id in tested.values]
    sample = "new_whale w_1287fbc w_98baff9 w_7554f44 w_1eafe46"
    assert csv(public / "sample_submission.csv") == [[image, sample] for image in tested["Image"]]
    assert copies == {**{name: f"train/{name}" for name in known["Image"]},
                      **{name: f"test/{name}" for name in tested["Image"]}}


def test_a_missing_picture_is_named(tmp_path):
    (tmp_path / "raw" / "train").mkdir(parents=True)
    (tmp_path / "raw" / "train.csv").write_text("Image,Id\na.jpg,w_1\nb.jpg,w_1\n")
    (tmp_path / "raw" / "train" / "a.jpg").write_text("a")
    with pytest.raises(tasks.MissingRaw, match="b.jpg"):
        prepared(WHALE, tmp_path / "raw", tmp_path)


# ------------------------------------------------------------------------------------------------------------- grading

LABELS = {
    CACTUS: {"id": ["a.jpg", "b.jpg", "c.jpg"], "has_cactus": ["0", "1", "1"]},
    DOGS: {"id": ["1", "2", "3"], "label": ["0", "1", "1"]},
    PLANT: {"image_id": ["Test_0", "Test_1", "Test_2", "Test_3"], "healthy": ["1", "0", "0", "0"],
            "multiple_diseases": ["0", "1", "0", "0"], "rust": ["0", "0", "1", "0"], "scab": ["0", "0", "0", "1"]},
    WHALE: {"Image": ["a.jpg", "b.jpg", "c.jpg"], "Id": ["w_1", "new_whale", "w_2"]},
}


def test_scores_by_hand():
    def score(id, name, values):
        return tasks.load(id).score(LABELS[id], {**LABELS[id], name: values})
    assert score(CACTUS, "has_cactus", ["0.4", "0.4", "0.9"]) == 0.75                   # a tie and a pair in order
    assert score(DOGS, "label", ["0.5", "0.25", "1"]) == pytest.approx(math.log(8) / 3)
    assert score(PLANT, "rust", ["-3", "9", "8", "8"]) == pytest.approx((3 + 0.5) / 4)  # rust: a win, a tie, a loss
    for names, points in ((["w_1 w_2", "w_2 w_3 new_whale", "w_1 w_3 w_4 w_5 w_6 w_2"], (1, 1 / 3, 0)),
                          (["w_2 w_2 w_1", "new_whale", "w_1 w_2 w_2"], (1 / 3, 1, 1 / 2))):
        assert score(WHALE, "Id", names) == pytest.approx(sum(points) / 3)
    for id in (CACTUS, DOGS, WHALE):
        turned = {name: values[::-1] for name, values in LABELS[id].items()}
        assert tasks.load(id).score(LABELS[id], turned) == pytest.approx(tasks.load(id).perfect)


@pytest.mark.parametrize("id, change, reason", [
    (CACTUS, {"has_cactus": ["0", "1", "1.01"]}, "must be a finite number from 0 to 1"),
    (CACTUS, {"has_cactus": ["0", "-0.1", "1"]}, "must be a finite number from 0 to 1"),
    (CACTUS, {"has_cactus": ["0", "nan", "1"]}, "must be a finite number"),
    (CACTUS, {"has_cactus": ["0", "yes", "1"]}, "not a number"),
    (CACTUS, {"has_cactus": None}, "missing"),
    (CACTUS, {"id": None}, "missing"),
    (CACTUS, {"id": ["a.jpg", "b.jpg", "d.jpg"]}, "not in the test set"),
    (CACTUS, {"id": ["a.jpg", "b.jpg"], "has_cactus": ["0", "1"]}, "2 rows; 3 were expected"),
    (DOGS, {"label": ["0", "1", "2"]}, "must be a finite number from 0 to 1"),
    (DOGS, {"label": ["0", "1", ""]}, "not a number"),
    (DOGS, {"label": ["0", "1", "nan"]}, "must be a finite number"),
    (DOGS, {"label": None}, "missing"),
    (DOGS, {"id": ["1", "2", "4"]}, "not in the test set"),
    (DOGS, {"id": ["1", "2", "2"]}, "occurs too often"),
    (PLANT, {"scab": ["0", "nan", "0", "1"]}, "must be a finite number"),
    (PLANT, {"scab": None}, "missing"),
    (PLANT, {"more": ["0"] * 4}, "not expected"),
    (PLANT, {"image_id": ["Test_0", "Test_1", "Test_2", "Train_3"]}, "not in the test set"),
    (WHALE, {"Id": ["w_1", " ", "w_2"]}, "at least one whale"),
    (WHALE, {"Id": None}, "missing"),
    (WHALE, {"more": ["0"] * 3}, "not expected"),
    (WHALE, {"Image": ["a.jpg", "b.jpg", "b.jpg"]}, "occurs too often"),
])
def test_refusals(id, change, reason):
    submission = {name: values for name, values in {**LABELS[id], **change}.items() if values is not None}
    with pytest.raises(InvalidSubmission, match=reason):
        tasks.load(id).score(LABELS[id], submission)


# ------------------------------------------------------------------------------------------------- miniature and ideas

@pytest.fixture(scope="module")
def cactus(tmp_path_factory):
    """A folder with the miniature's raw files, public and private."""
    folder = tmp_path_factory.mktemp("cactus")
    (folder / "raw").mkdir()
    tasks.load(CACTUS).miniature(folder / "raw", 0)
    prepared(CACTUS, folder / "raw", folder)
    return folder


def test_the_miniature_is_the_seeds(cactus, tmp_path):
    tasks.load(CACTUS).miniature(tmp_path, 0)
    assert all((tmp_path / path.name).read_bytes() == path.read_bytes()
               for path in (cactus / "raw").iterdir() if path.suffix == ".csv")
    one, other = ({path: opened().read() for path, opened in tasks.raw_files(raw) if path.endswith(".jpg")}
                  for raw in (cactus / "raw", tmp_path))
    assert one == other and len(one) == 520
    assert len({len(data) for data in one.values()}) == 1           # sizes of files say nothing


def edited(id, idea):
    """The starter with the idea's edits; each piece of text is there once."""
    script = (tasks.load(id).folder / "train.py").read_text()
    for edit in idea["edits"]:
        assert script.count(edit["find"]) == 1, (idea["title"], edit["find"])
        script = script.replace(edit["find"], edit["replace"])
    return script


@pytest.mark.parametrize("id", IDS)
def test_ideas_apply(id):
    ideas = json.loads((tasks.load(id).folder / "ideas.json").read_text())
    assert len(ideas) >= 10 and len({idea["title"] for idea in ideas}) == len(ideas)
    assert len({idea["kind"] for idea in ideas} & set(KINDS)) >= 5 and {idea["kind"] for idea in ideas} <= set(KINDS)
    for idea in ideas:
        assert set(idea) == {"title", "kind", "instruction", "edits"} and idea["instruction"].endswith(".")
        ast.parse(edited(id, idea))


def test_an_idea_runs_and_helps(cactus, tmp_path):
    pytest.importorskip("PIL", reason="pillow is not installed")
    task = tasks.load(CACTUS)
    starter, *_ = tasks.run_starter(task, cactus)
    (tmp_path / "data").symlink_to(cactus / "public")
    ideas = {idea["title"]: idea for idea in json.loads((task.folder / "ideas.json").read_text())}
    (tmp_path / "train.py").write_text(edited(CACTUS, ideas["Stronger regularisation"]))
    subprocess.run([sys.executable, "train.py"], cwd=tmp_path, check=True, capture_output=True)
    assert tasks.judge_file(task, cactus, tmp_path / "submission.csv")[0] > starter
