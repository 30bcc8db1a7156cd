"""Iceberg or ship: two radar images of 75 x 75 (in a miniature 35 x 35) and the angle they were taken at.

Split and grader are MLE-bench's, which leaves .7z files where the agent here gets the JSON and a sample submission.
"""
import json
import re
import shutil
import tempfile
from pathlib import Path

import numpy as np
import pandas as pd

from tasks import (
    MissingRaw, Task, log_loss, paired, raw_files, readable, share_of_test, split_positions, table_1, write_csv)

SIDE = 35           # of the images of a miniature, in pixels
GIVEN = ["id", "band_1", "band_2", "inc_angle"]     # what a test record keeps


def prepare(raw, public, private, variant):
    """1604 labelled records become 1283 to train on and 321 to test on; the publisher's others are left out."""
    with tempfile.TemporaryDirectory(dir=public.parent) as folder:
        records = _records(_train_json(raw, Path(folder)))
    sides = split_positions(len(records), share_of_test(0.2, len(records)))
    train, test = ([records[i] for i in side] for side in sides)
    (public / "train.json").write_text("[" + ",\n".join(train) + "]")
    ids, labels = [], []
    with open(public / "test.json", "w") as stream:
        for i, text in enumerate(test):
            record = json.loads(text)
            stream.write((",\n" if i else "[") + json.dumps({name: record[name] for name in GIVEN}))
            ids.append(record["id"])
            labels.append(record["is_iceberg"])
        stream.write("]")
    write_csv(pd.DataFrame({"id": ids, "is_iceberg": 0.5}), public / "sample_submission.csv")
    write_csv(pd.DataFrame({"id": ids, "is_iceberg": labels}), private / "test.csv")


def score(answers, submission):
    truth, predicted = paired(answers, submission, "id", ["is_iceberg"], low=0, high=1)
    return log_loss(truth[:, 0], predicted[:, 0])


def _train_json(raw, folder):
    """The path of train.json: unpacked into the folder, from wherever it lies under raw."""
    packed = None
    for path, opened in raw_files(raw):
        name = path.split("/")[-1]
        if name in ("train.json", "train.json.7z"):
            with opened() as source, open(folder / name, "wb") as sink:
                shutil.copyfileobj(source, sink)
            if name == "train.json":
                return folder / name
            packed = folder / name
    if packed is None:
        raise MissingRaw(f"Neither train.json nor train.json.7z is in {raw}, loose or inside a zip.")
    try:
        import py7zr
    except ImportError:
        raise RuntimeError("train.json.7z needs a package: pip install py7zr. Or unpack it yourself and give the "
                           "folder with train.json.") from None
    with readable(packed.name), py7zr.SevenZipFile(packed) as archive:
        archive.extractall(folder)
    found = sorted(folder.rglob("train.json"))
    if not found:
        raise MissingRaw("train.json.7z holds no train.json.")
    return found[0]


def _records(path):
    """The text of each record in a JSON file, a list of objects none of which holds another.

    As text the 200 MB are 200 MB; as Python's lists of numbers they would be five times that.
    """
    text = path.read_text().strip()
    records = re.findall(r"\{[^{}]*\}", text)
    if not (records and text.startswith("[") and text.endswith("]")):
        raise MissingRaw(f"{path.name} is damaged: it should be a list of records.")
    return records


def miniature(raw, seed):
    """750 labelled records and 40 others, unpacked.

    An object is an ellipse of echoes over speckle that weakens with the angle. Icebergs are nearly round and echo more
    in the second band; ships are long.
    """
    rng = np.random.default_rng(seed)
    n, records = 790, []
    ids = rng.choice(1 << 32, n, replace=False)
    berg = rng.permutation(np.arange(n) % 15 < 7)
    y, x = np.mgrid[:SIDE, :SIDE] - SIDE // 2
    for id, iceberg in zip(ids, berg.tolist()):
        angle, turn = rng.normal(39, 3.5), rng.uniform(0, np.pi)
        area, ratio = rng.uniform(4, 20), rng.uniform(1, 2.2) if iceberg else rng.uniform(1.4, 3.5)
        u, v = x - rng.normal(0, 2), y - rng.normal(0, 2)
        along, across = u * np.cos(turn) + v * np.sin(turn), v * np.cos(turn) - u * np.sin(turn)
        shape = np.exp(-(along ** 2 / (area * ratio) + across ** 2 / (area / ratio)))
        peak, sea = rng.normal(-2, 3), -21 - 0.4 * (angle - 39)         # decibel
        bands = [(peak, sea), (peak - rng.normal(4 if iceberg else 7.5, 2), sea - 5)]
        bands = [(10 ** (top / 10) * shape + 10 ** (low / 10)) * rng.gamma(8, 1 / 8, shape.shape) for top, low in bands]
        bands = [(10 * np.log10(power)).round().astype(int).ravel().tolist() for power in bands]
        records.append({"id": f"{id:08x}", "band_1": bands[0], "band_2": bands[1],
                        "inc_angle": "na" if rng.random() < 0.08 else round(angle, 4), "is_iceberg": int(iceberg)})
    home = raw / "data" / "processed"
    home.mkdir(parents=True)
    test = [{name: record[name] for name in GIVEN} for record in records[750:]]
    for name, part in {"train.json": records[:750], "test.json": test}.items():
        (home / name).write_text(json.dumps(part, separators=(",", ":")))


TASK = Task(
    id="statoil-iceberg-classifier-challenge", metric="log loss",
    direction="down", split="held-out", source="MLE-bench", targets=("is_iceberg",),
    prepare=prepare, miniature=miniature, score=score,
    kaggle="train.json.7z", size="300 MB",
    m_best=0.08227,
    m_best_miniature=0.265,    # logistic regression with the length, width and brightest pixels of the object
    published=table_1((0.3093, 0.2683), (0.3052, 0.2664), (0.2908, 0.2719),
                      (0.3209, 0.2914), (0.2908, 0.2701), (0.2868, 0.2617)),
    gold=0.11374,
)
