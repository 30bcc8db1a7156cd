"""Tasks of photographs, radar images, dirty pages and papers that cite: their splits on made-up raw files against the
rules restated, their graders, and what they refuse.

Where they are only copied the made-up files hold no pictures: each holds its own name, which shows what went where.
"""
import gzip
import io
import json
import math
import os
import pickle
import re
import sys
import tarfile
import zipfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from sklearn.model_selection import train_test_split as sklearn_split

import tasks
from common import md5, sides
from tasks import InvalidSubmission

CACTUS = "aerial-cactus-identification"
DOGS = "dogs-vs-cats-redux-kernels-edition"
PLANT = "plant-pathology-2020-fgvc7"
WHALE = "whale-categorization-playground"
CIFAR = "cifar-10"
ARXIV = "ogbn-arxiv"
STATOIL = "statoil-iceberg-classifier-challenge"
DIRTY = "denoising-dirty-documents"
REAL = Path(__file__).parent.parent.parent / "shared" / "data"
BATCHES = [f"data_batch_{i}" for i in range(1, 6)]
NAMES = "airplane automobile bird cat deer dog frog horse ship truck".split()


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
    """As sides, but nothing is copied: (public, private, {raw name: place under public})."""
    copies = {}

    def copy(raw, _, target, wanted):
        target = target.relative_to(folder / "public")
        copies.update({name: (target / place).as_posix() for name, place in wanted.items()})
    monkeypatch.setitem(tasks.load(id).prepare.__globals__, "copy_raw_folder", copy)
    return *sides(id, raw, folder), copies


def table(path):
    return pd.read_csv(path, dtype=str, keep_default_na=False).to_dict("list")


def refused(id, answers, submission, words):
    with pytest.raises(InvalidSubmission, match=words):
        tasks.load(id).score(answers, submission)


@pytest.mark.parametrize("id", [CACTUS, CIFAR, DIRTY, DOGS, PLANT, STATOIL, WHALE])
def test_starters_have_four_settings_that_a_factor_can_change_and_miniatures_300_test_rows(id, data):
    settings = dict(re.findall(r"^([A-Z_]+) = ([\d.]+) *(?:#.*)?$", tasks.load(id).starter, re.MULTILINE))
    settings = {name for name, value in settings.items() if float(value) and not re.search("SEED|VALID", name)}
    assert len(settings) >= 4
    assert len(pd.read_csv(data / id / "private" / tasks.load(id).answers)) >= 300


# -- splits of photographs

def test_cactus_split(tmp_path):
    rng = np.random.default_rng(0)
    rows = [[f"{rng.bytes(16).hex()}.jpg", int(rng.integers(2))] for _ in range(903)]
    raw = tmp_path / "raw"
    raw.mkdir()
    pd.DataFrame(rows, columns=["id", "has_cactus"]).to_csv(raw / "train.csv", index=False)
    with zipfile.ZipFile(raw / "train.zip", "w") as archive:
        for name, _ in rows:
            archive.writestr(f"train/{name}", name)
    with zipfile.ZipFile(raw / "test.zip", "w") as archive:
        archive.writestr("test/unlabelled.jpg", "x")
    public, private = sides(CACTUS, raw, tmp_path)
    train, test = split(rows, 0.19)
    assert len(test) == 172
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
    assert md5((public / "sample_submission.csv").read_bytes()) == "cfe8f41567220b6fcbbdc4eb4df7230f"  # of MLE-bench
    assert md5((private / "answers.csv").read_bytes()) == "98f293fd3f37f967c17aa9263e866c30"
    train, test = split(sorted(names), 0.1)
    cats, dogs = ([name for name in train if name.startswith(kind)] for kind in ("cat", "dog"))
    assert (len(cats), len(dogs), len(test)) == (11242, 11258, 2500)
    assert copies == {**{name: f"train/cat.{i}.jpg" for i, name in enumerate(cats)},
                      **{name: f"train/dog.{i}.jpg" for i, name in enumerate(dogs)},
                      **{name: f"test/{i + 1}.jpg" for i, name in enumerate(test)}}


def test_dogs_without_pictures(tmp_path):
    (tmp_path / "raw").mkdir()
    with pytest.raises(ValueError, match="in no folder train"):
        sides(DOGS, tmp_path / "raw", tmp_path)


def test_plant_split_from_the_publishers_names(tmp_path, monkeypatch):
    (tmp_path / "raw").mkdir()
    rng = np.random.default_rng(0)
    columns = ["image_id", "healthy", "multiple_diseases", "rust", "scab"]
    rows = [[f"Train_{i}", *np.eye(4, dtype=int)[rng.integers(4)].tolist()] for i in range(1821)]
    pd.DataFrame(rows, columns=columns).to_csv(tmp_path / "raw" / "train.csv", index=False)
    public, private, copies = planned(PLANT, tmp_path / "raw", tmp_path, monkeypatch)
    assert md5((public / "test.csv").read_bytes()) == "4a6cc8292989880ba253a124634efff1"               # of MLE-bench
    assert md5((public / "sample_submission.csv").read_bytes()) == "7a67fc684abd73d9d1afc554e8d5cf07"
    train, test = split(rows, 0.1)
    assert (len(train), len(test)) == (1638, 183)
    assert csv(public / "train.csv") == [[f"Train_{i}", *row[1:]] for i, row in enumerate(train)]
    assert csv(private / "test.csv") == [[f"Test_{i}", *row[1:]] for i, row in enumerate(test)]
    assert list(pd.read_csv(private / "test.csv")) == columns
    assert copies == {**{f"{row[0]}.jpg": f"images/Train_{i}.jpg" for i, row in enumerate(train)},
                      **{f"{row[0]}.jpg": f"images/Test_{i}.jpg" for i, row in enumerate(test)}}


def test_whale_split(tmp_path, monkeypatch):
    rng = np.random.default_rng(0)
    several = 2 + np.bincount(rng.integers(0, 2030, 2760), minlength=2030)      # the publisher's counts of pictures
    ids = np.repeat(["new_whale", *[f"w_{i:07x}" for i in range(4250)]], [810, *several, *[1] * 2220])
    frame = pd.DataFrame({"Image": [f"{i:08x}.jpg" for i in rng.permutation(9850)], "Id": rng.permutation(ids)})
    (tmp_path / "raw").mkdir()
    frame.to_csv(tmp_path / "raw" / "train.csv", index=False)
    public, private, copies = planned(WHALE, tmp_path / "raw", tmp_path, monkeypatch)

    draws = np.random.default_rng(0)
    test = set()
    remaining = []
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
        sides(WHALE, tmp_path / "raw", tmp_path)


# -- grading photographs

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


@pytest.mark.parametrize("id, change, reason", [        # beside what every task refuses, see test_tasks
    (CACTUS, {"has_cactus": ["0", "1", "1.01"]}, "must be a finite number from 0 to 1"),
    (CACTUS, {"has_cactus": ["0", "-0.1", "1"]}, "must be a finite number from 0 to 1"),
    (DOGS, {"label": ["0", "1", "2"]}, "must be a finite number from 0 to 1"),
    (PLANT, {"more": ["0"] * 4}, "not expected"),
    (WHALE, {"Id": ["w_1", " ", "w_2"]}, "at least one whale"), (WHALE, {"more": ["0"] * 3}, "not expected")])
def test_refusals(id, change, reason):
    refused(id, LABELS[id], {**LABELS[id], **change}, reason)


# -- cifar-10

def python2_pickle(batch):
    """A dict of lists, text and an array of bytes as Python 2 and its numpy pickled it: text and bytes are one kind."""
    def text(value):
        return b"U" + bytes([len(value)]) + value.encode()

    def item(value):
        if isinstance(value, np.ndarray):
            data = value.tobytes()
            shape = b"".join(b"M" + n.to_bytes(2, "little") for n in value.shape)
            empty = b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(K\x00t" + text("b") + b"tR"
            minus_one = b"J\xff\xff\xff\xff"
            dtype = b"cnumpy\ndtype\n(" + text("u1") + b"K\x00K\x01tR"
            dtype += b"(K\x03" + text("|") + b"NNN" + 2 * minus_one + b"K\x00tb"
            return empty + b"(K\x01(" + shape + b"t" + dtype + b"\x89T" + len(data).to_bytes(4, "little") + data + b"tb"
        if isinstance(value, list):
            return b"](" + b"".join(map(item, value)) + b"e"
        return text(value) if isinstance(value, str) else b"K" + bytes([value])
    return b"\x80\x02}(" + b"".join(text(key) + item(value) for key, value in batch.items()) + b"u."


def cifar_batches(pickled, rows=3):
    """{name: pickle} of small batches, and the images (6, rows, 32, 32, 3) and labels (6, rows) in them."""
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (6, rows, 32, 32, 3), np.uint8)
    labels = rng.integers(0, 10, (6, rows))
    files = {"batches.meta": pickled({"label_names": NAMES})}
    for name, pixels, classes in zip([*BATCHES, "test_batch"], images, labels):
        planes = np.stack([pixels[..., c] for c in range(3)], 1).reshape(rows, 3072)    # all red, all green, all blue
        files[name] = pickled({"batch_label": "one of six", "labels": classes.tolist(), "data": planes,
                               "filenames": [f"{NAMES[k]}.png" for k in classes]})
    return files, images, labels


def write_cifar(files, raw):
    with tarfile.open(raw / "cifar-10-python.tar.gz", "w:gz") as archive:
        for name, data in files.items():
            member = tarfile.TarInfo(f"cifar-10-batches-py/{name}")
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))


def test_cifar_python2_pickles_are_read_by_python_as_meant():
    files, images, _ = cifar_batches(python2_pickle)
    batch = pickle.loads(files["data_batch_2"], encoding="bytes")
    assert batch[b"data"].dtype == np.uint8 and (batch[b"data"][1, :32] == images[1, 1, 0, :, 0]).all()


@pytest.mark.parametrize("pickled", [
    python2_pickle, lambda batch: pickle.dumps(batch, 2), lambda batch: pickle.dumps(batch, 4)],
    ids=["python 2", "protocol 2", "protocol 4"])
def test_cifar_keeps_the_archives_order_and_hides_the_test_labels(tmp_path, pickled):
    files, images, labels = cifar_batches(pickled)
    write_cifar(files, tmp_path)
    public, private = sides(CIFAR, tmp_path, tmp_path)
    assert (np.load(public / "train_images.npy", allow_pickle=False) == images[:5].reshape(15, 32, 32, 3)).all()
    assert (np.load(public / "test_images.npy", allow_pickle=False) == images[5]).all()
    train = pd.read_csv(public / "train.csv")
    assert train.to_dict("list") == {"id": list(range(15)), "label": labels[:5].ravel().tolist()}
    assert pd.read_csv(public / "classes.csv")["name"].tolist() == NAMES
    answers = pd.read_csv(private / "test.csv")
    assert answers["id"].tolist() == [0, 1, 2]
    assert answers.drop(columns="id").to_numpy().tolist() == [[int(k == y) for k in range(10)] for y in labels[5]]
    assert (pd.read_csv(public / "sample_submission.csv").drop(columns="id") == 0.1).all(axis=None)
    assert sorted(path.name for path in public.iterdir()) == [
        "classes.csv", "sample_submission.csv", "test_images.npy", "train.csv", "train_images.npy"]


def test_cifar_unpacked_folder_does_as_well(tmp_path):
    files, images, _ = cifar_batches(python2_pickle)
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    for name, data in files.items():
        (folder / name).write_bytes(data)
    public, _ = sides(CIFAR, tmp_path, tmp_path)
    assert (np.load(public / "test_images.npy") == images[5]).all()


class Touch:
    """An object whose pickle runs a command when it is loaded."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


def test_cifar_pickle_that_asks_for_code_is_refused_and_not_run(tmp_path):
    files, *_ = cifar_batches(python2_pickle)
    for bad, words in ((pickle.dumps({"data": Touch(tmp_path / "ran")}), "asks for (posix|nt).system"),
                       (pickle.dumps({"data": np.array([{}], object)}), "not bytes"),
                       (pickle.dumps([]), "data_batch_3 cannot be read"),
                       (files["data_batch_1"][:-100], "data_batch_3"), (b"", "data_batch_3"),
                       (python2_pickle({"labels": [1], "data": np.zeros((2, 3072), np.uint8)}), "a label from 0 to 9")):
        write_cifar({**files, "data_batch_3": bad}, tmp_path)
        with pytest.raises(ValueError, match=words):
            tasks.load(CIFAR).prepare(tmp_path, tmp_path, tmp_path, "mlagentbench")
    assert not (tmp_path / "ran").exists()


def test_cifar_incomplete_and_damaged_archives_say_what_is_wrong(tmp_path):
    files, *_ = cifar_batches(python2_pickle)
    del files["test_batch"]
    write_cifar(files, tmp_path)
    with pytest.raises(tasks.MissingRaw, match="test_batch"):
        tasks.load(CIFAR).prepare(tmp_path, tmp_path, tmp_path, "mlagentbench")
    archive = tmp_path / "cifar-10-python.tar.gz"
    archive.write_bytes(archive.read_bytes()[:5000])
    with pytest.raises(tasks.MissingRaw, match="cifar-10-python.tar.gz cannot be read"):
        tasks.load(CIFAR).prepare(tmp_path, tmp_path, tmp_path, "mlagentbench")


def test_cifar_counts_the_first_largest_value_under_any_name_of_the_index():
    task = tasks.load(CIFAR)
    onehot = {"id": ["0", "1", "2"], **{str(k): ["1" if y == k else "0" for y in (3, 0, 9)] for k in range(10)}}
    values = {str(k): ["0.5", "0.5", "-7"] for k in range(10)}          # ties: the first column, here 0
    assert task.score(onehot, {"": ["0", "1", "2"], **values}) == pytest.approx(1 / 3)
    values["3"][0] = "0.6"
    values["9"][2] = "12"                        # neither range nor sums are checked
    assert task.score(onehot, {"": ["0", "1", "2"], **values}) == 1.0
    assert task.score(onehot, {"index": ["2", "1", "0"], **{k: column[::-1] for k, column in values.items()}}) == 1.0
    assert task.score(onehot, {**values, "id": ["0", "1", "2"]}) == 1.0         # a column named id is it wherever it is
    with pytest.raises(tasks.InvalidSubmission):        # the first column, "0", would be the index
        task.score(onehot, {**values, "index": ["0", "1", "2"]})


def test_cifar_real_archive_matches_plain_unpickling(tmp_path):
    archive = REAL / CIFAR / "cifar-10-python.tar.gz"
    if not archive.exists():
        pytest.skip(f"the publisher's archive is not at {archive}")
    public, private = sides(CIFAR, archive.parent, tmp_path)
    with tarfile.open(archive) as files:
        members = [files.extractfile(f"cifar-10-batches-py/{name}") for name in [*BATCHES, "test_batch"]]
        batches = [pickle.load(member, encoding="bytes") for member in members]
    batches = [{key.decode(): value for key, value in batch.items()} for batch in batches]
    images = np.load(public / "train_images.npy", mmap_mode="r")
    assert (images[5, 2, 7] == batches[0]["data"][5].reshape(3, 32, 32)[:, 2, 7]).all()
    assert len(images) == sum(len(batch["labels"]) for batch in batches[:5])
    assert pd.read_csv(public / "train.csv")["label"].tolist() == sum((batch["labels"] for batch in batches[:5]), [])
    assert pd.read_csv(private / "test.csv").drop(columns="id").to_numpy().argmax(1).tolist() == batches[5]["labels"]


# -- ogbn-arxiv

ARXIV_FILES = {     # nine papers; the index files are not in the order of the nodes
    "raw/edge.csv.gz": "0,1\n8,2\n", "raw/node-feat.csv.gz": "".join(f"{i}.5,-{i}\n" for i in range(9)),
    "raw/node-label.csv.gz": "".join(f"{10 + i}\n" for i in range(9)), "raw/node_year.csv.gz": "2017\n" * 9,
    "split/time/train.csv.gz": "7\n0\n3\n5\n", "split/time/valid.csv.gz": "8\n1\n",
    "split/time/test.csv.gz": "6\n2\n4\n"}


def write_arxiv(raw, files=ARXIV_FILES):
    for name, text in files.items():
        path = raw / "arxiv" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(gzip.compress(text.encode()))


@pytest.mark.parametrize("packed", [False, True])
def test_arxiv_keeps_the_official_split_and_hides_the_test_labels(tmp_path, packed):
    write_arxiv(tmp_path)
    if packed:
        with zipfile.ZipFile(tmp_path / "arxiv.zip", "w") as archive:
            for name in ARXIV_FILES:
                archive.write(tmp_path / "arxiv" / name, f"arxiv/{name}")
                (tmp_path / "arxiv" / name).unlink()
    public, private = sides(ARXIV, tmp_path, tmp_path)
    assert (public / "train.csv").read_text() == "node,label\n7,17\n0,10\n3,13\n5,15\n"
    assert (public / "valid.csv").read_text() == "node,label\n8,18\n1,11\n"
    assert (public / "test.csv").read_text() == "node\n6\n2\n4\n"
    assert (public / "sample_submission.csv").read_text() == "0\n0\n0\n0\n"
    assert (private / "test.csv").read_text() == "0\n16\n12\n14\n"
    for name in ("edge", "node-feat", "node_year"):
        assert gzip.decompress((public / f"{name}.csv.gz").read_bytes()).decode() == ARXIV_FILES[f"raw/{name}.csv.gz"]
    assert not [path for path in public.iterdir() if "label" in path.name or "mapping" in path.name]


def test_arxiv_raw_files_that_contradict_or_are_cut_short_are_refused(tmp_path):
    for bad in ("6\n2\n7\n", "6\n2\n9\n"):       # 7 is to train on; there is no node 9
        write_arxiv(tmp_path, {**ARXIV_FILES, "split/time/test.csv.gz": bad})
        with pytest.raises(ValueError, match="twice or beyond the 9 labels"):
            tasks.load(ARXIV).prepare(tmp_path, tmp_path, tmp_path, "mlagentbench")
    path = tmp_path / "arxiv/raw/node-label.csv.gz"
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(ValueError, match="node-label.csv.gz cannot be read"):
        tasks.load(ARXIV).prepare(tmp_path, tmp_path, tmp_path, "mlagentbench")


def test_arxiv_scores_whole_classes_by_position():
    answers = {"0": ["4", "39", "0", "7"]}
    score = tasks.load(ARXIV).score
    assert score(answers, {"0": ["4", "39.0", "1", "7"]}) == 0.75
    assert score(answers, {"0": ["39", "4", "7", "0"]}) == 0.0
    refused(ARXIV, answers, {"0": ["4", "39", "0.5", "7"]}, "whole")


# -- statoil

def radar_records(n=1000):      # of fewer a miniature holds back a larger share
    return [{"id": f"{i * 2654435761 % 2 ** 32:08x}", "band_1": [-27.878360999999998 - i, -1e-05] * 3,
             "band_2": [i / 7] * 6, "inc_angle": "na" if i % 4 == 1 else 30 + i / 3, "is_iceberg": i % 2}
            for i in range(n)]


def is_radar_split(public, private):
    train, test = sklearn_split(radar_records(), test_size=0.2, random_state=0)
    assert json.loads((public / "train.json").read_text()) == train
    assert json.loads((public / "test.json").read_text()) == [
        {name: record[name] for name in ("id", "band_1", "band_2", "inc_angle")} for record in test]
    ids = [record["id"] for record in test]
    assert table(private / "test.csv") == {"id": ids, "is_iceberg": [str(record["is_iceberg"]) for record in test]}
    assert table(public / "sample_submission.csv") == {"id": ids, "is_iceberg": ["0.5"] * len(ids)}
    assert sorted(path.name for path in public.parent.iterdir() if path.is_dir()) == ["private", "public", "raw"]


@pytest.fixture
def radar(tmp_path):
    """A raw folder and the text of its train.json, which is not in it yet."""
    raw = tmp_path / "raw"
    (raw / "data" / "processed").mkdir(parents=True)
    return raw, json.dumps(radar_records())


def test_statoil_split_of_the_unpacked_file(radar, tmp_path):
    raw, text = radar
    (raw / "data/processed/train.json").write_text(text)
    (raw / "data/processed/test.json").write_text("[]")
    is_radar_split(*sides(STATOIL, raw, tmp_path))


def test_statoil_split_of_the_archive_by_py7zr(radar, tmp_path):
    py7zr = pytest.importorskip("py7zr", reason="py7zr is not installed")
    raw, text = radar
    with py7zr.SevenZipFile(tmp_path / "train.json.7z", "w") as archive:
        archive.writestr(text, "data/processed/train.json")
    with zipfile.ZipFile(raw / "statoil.zip", "w") as whole:
        whole.write(tmp_path / "train.json.7z", "train.json.7z")
    is_radar_split(*sides(STATOIL, raw, tmp_path))


def test_statoil_damaged_archive_is_refused_without_a_trace(radar, tmp_path):
    py7zr = pytest.importorskip("py7zr", reason="py7zr is not installed")
    raw, text = radar
    path = raw / "train.json.7z"
    with py7zr.SevenZipFile(path, "w") as archive:
        archive.writestr(text, "data/processed/train.json")
    whole = path.read_bytes()
    for bad in (whole[:200], whole[:40] + b"\0" * 20 + whole[60:], b"", b"no archive"):
        path.write_bytes(bad)
        with pytest.raises(tasks.MissingRaw, match="train.json.7z cannot be read"):
            tasks.load(STATOIL).prepare(raw, tmp_path, tmp_path, "mle-bench")


def test_statoil_split_of_the_archive_by_a_stand_in(radar, tmp_path, monkeypatch):
    raw, text = radar
    with zipfile.ZipFile(raw / "train.json.7z", "w") as archive:
        archive.writestr("data/processed/train.json", text)
    monkeypatch.setitem(sys.modules, "py7zr", SimpleNamespace(SevenZipFile=zipfile.ZipFile))
    is_radar_split(*sides(STATOIL, raw, tmp_path))
    (raw / "train.json.7z").write_bytes(b"no archive")
    with pytest.raises(tasks.MissingRaw, match="train.json.7z cannot be read"):
        tasks.load(STATOIL).prepare(raw, tmp_path, tmp_path, "mle-bench")


def test_statoil_without_an_unpacker_says_what_to_install(radar, tmp_path, monkeypatch):
    raw, _ = radar
    with pytest.raises(tasks.MissingRaw, match="Neither train.json nor train.json.7z"):
        tasks.load(STATOIL).prepare(raw, tmp_path, tmp_path, "mle-bench")
    (raw / "train.json.7z").write_bytes(b"")
    monkeypatch.setitem(sys.modules, "py7zr", None)
    with pytest.raises(RuntimeError, match="pip install py7zr"):
        tasks.load(STATOIL).prepare(raw, tmp_path, tmp_path, "mle-bench")


def test_statoil_file_cut_short_is_refused(radar, tmp_path):
    raw, text = radar
    for bad in (text[:-30], "", "{}"):
        (raw / "train.json").write_text(bad)
        with pytest.raises(ValueError, match="train.json is damaged"):
            tasks.load(STATOIL).prepare(raw, tmp_path, tmp_path, "mle-bench")


def test_statoil_is_graded_by_log_loss():
    answers = {"id": ["aa", "bb", "cc"], "is_iceberg": ["1", "0", "1"]}
    score = tasks.load(STATOIL).score
    by_hand = -(np.log(0.9) + np.log(0.8) + np.log(0.5)) / 3
    assert score(answers, {"id": ["cc", "aa", "bb"], "is_iceberg": ["0.5", "0.9", "0.2"]}) == pytest.approx(by_hand)
    refused(STATOIL, answers, {"id": answers["id"], "is_iceberg": ["1", "0", "1.01"]}, "from 0 to 1")


# -- dirty documents

def write_pages(raw, numbers, shape=(2, 3)):
    """train.zip and train_cleaned.zip with pages of random grays; {number: clean page}."""
    image = pytest.importorskip("PIL.Image", reason="Pillow is not installed")
    rng = np.random.default_rng(0)
    clean = {}
    for folder in ("train", "train_cleaned"):
        with zipfile.ZipFile(raw / f"{folder}.zip", "w") as archive:
            for n in numbers:
                clean[n] = rng.integers(0, 256, shape, np.uint8)
                data = io.BytesIO()
                image.fromarray(clean[n]).save(data, "PNG")
                archive.writestr(f"{folder}/{n}.png", data.getvalue())
    return clean


def test_dirty_documents_split_is_the_published_one(tmp_path):
    numbers = [n for n in range(1, 217) if n % 3 != 1]
    clean = write_pages(tmp_path, numbers)
    public, private = sides(DIRTY, tmp_path, tmp_path)
    test = [6, 8, 26, 35, 36, 42, 54, 62, 68, 77, 78, 80, 95, 110, 111, 122, 131, 134, 137, 146, 150, 155, 159, 162,
            170, 174, 180, 186, 216]
    names = {path.name: {int(page.stem) for page in path.iterdir()} for path in public.iterdir() if path.is_dir()}
    assert names == {"train": set(numbers) - set(test), "train_cleaned": set(numbers) - set(test), "test": set(test)}
    expected = [(f"{n}_{i + 1}_{j + 1}", clean[n][i, j] / 255)
                for n in sorted(test, key=str) for i in range(2) for j in range(3)]
    answers = pd.read_csv(private / "answers.csv")
    sample = pd.read_csv(public / "sampleSubmission.csv")
    assert answers["id"].tolist() == sample["id"].tolist() == [id for id, _ in expected]
    assert answers["value"].tolist() == [value for _, value in expected] and (sample["value"] == 1).all()
    assert (private / "answers.csv").read_text() == answers.to_csv(index=False, lineterminator="\n")    # pandas' floats
    assert sorted(path.name for path in private.iterdir()) == ["answers.csv"]


def test_dirty_documents_copies_pages_byte_for_byte_and_names_what_is_missing(tmp_path):
    write_pages(tmp_path, range(2, 12))
    public, _ = sides(DIRTY, tmp_path, tmp_path)
    with zipfile.ZipFile(tmp_path / "train.zip") as archive:
        for path in [*(public / "train").iterdir(), *(public / "test").iterdir()]:
            assert path.read_bytes() == archive.read(f"train/{path.name}")
    (tmp_path / "train_cleaned.zip").unlink()
    with pytest.raises(tasks.MissingRaw, match="train_cleaned"):
        tasks.load(DIRTY).prepare(tmp_path, tmp_path / "public", tmp_path / "private", "mle-bench")
    (tmp_path / "train.zip").unlink()
    with pytest.raises(tasks.MissingRaw, match="folder train "):
        tasks.load(DIRTY).prepare(tmp_path / "private", tmp_path / "public", tmp_path / "private", "mle-bench")


def test_dirty_documents_pools_all_pixels_in_any_order():
    answers = {"id": ["1_1_1", "1_1_2", "20_1_1"], "value": ["0.0", "1.0", "0.5"]}
    score = tasks.load(DIRTY).score
    submission = {"id": ["20_1_1", "1_1_1", "1_1_2"], "value": ["0.5", "-0.3", "1.4"]}      # not clipped
    assert score(answers, submission) == pytest.approx(((0.3 ** 2 + 0.4 ** 2) / 3) ** 0.5)
