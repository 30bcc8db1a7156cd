"""CIFAR-10: small photographs in ten classes.

The publisher's own test images are the test, as in MLAgentBench's cifar10. What differs:
- The labels of the test images are hidden. MLAgentBench leaves them in the data folder, and its starter reads them.
- Images are .npy files and labels .csv files. The publisher's file names, which begin with the class, are left out.
- The index column of a submission is called id in our sample; as in MLAgentBench any name will do, or none.
"""
import io
import pickle
import tarfile

import numpy as np
import pandas as pd

from tasks import MissingRaw, Task, accuracy, paired, raw_files, readable, table_1, write_csv

ARCHIVE, SIDE = "cifar-10-python.tar.gz", 32
TRAIN = [f"data_batch_{i}" for i in range(1, 6)]
CLASSES = "airplane automobile bird cat deer dog frog horse ship truck".split()
COLUMNS = [str(k) for k in range(len(CLASSES))]


def prepare(raw, public, private, variant):
    """50000 images to train on and 10000 to test on, in the archive's order; images are (rows, 32, 32, 3) bytes."""
    batches = _batches(raw)
    names = [_text(name) for name in batches["batches.meta"]["label_names"]]
    images, labels = zip(*(_images(name, batches[name], len(names)) for name in [*TRAIN, "test_batch"]))
    np.save(public / "train_images.npy", np.concatenate(images[:-1]))
    np.save(public / "test_images.npy", images[-1])
    train, test = np.concatenate(labels[:-1]), labels[-1]
    write_csv(pd.DataFrame({"id": np.arange(len(train)), "label": train}), public / "train.csv")
    write_csv(pd.DataFrame({"label": np.arange(len(names)), "name": names}), public / "classes.csv")
    ids = pd.DataFrame({"id": np.arange(len(test))})
    write_csv(ids.assign(**{name: 1 / len(COLUMNS) for name in COLUMNS}), public / "sample_submission.csv")
    write_csv(ids.assign(**{name: (test == int(name)).astype(int) for name in COLUMNS}), private / "test.csv")


def score(answers, submission):
    """Share of images whose largest of ten values is the true class's, the first of them where several are largest."""
    index = "id" if "id" in submission else next(iter(submission))
    named = {"id" if name == index else name: column for name, column in submission.items()}
    truth, predicted = paired(answers, named, "id", COLUMNS)
    return accuracy(truth.argmax(1), predicted.argmax(1))


class _Array:
    """What a pickled array of bytes is turned into while it is read; `.value` is the array, once its state is set."""

    def __setstate__(self, state):
        _, shape, dtype, by_column, data = state
        if not isinstance(dtype, _Dtype) or by_column or not isinstance(data, bytes):
            raise ValueError("an array in it is not made of plain bytes")
        self.value = np.frombuffer(data, np.uint8).reshape(shape)


class _Dtype:
    """What a pickled element type is turned into; only bytes are allowed."""

    def __init__(self, kind, *_):
        if _text(kind) not in ("u1", "uint8"):
            raise ValueError(f"an array in it holds {kind!r}, not bytes")

    def __setstate__(self, state):
        pass        # byte order, which a byte has none of


def _encode(text, encoding):
    """Python 3 pickles bytes as text to be encoded."""
    if _text(encoding) != "latin1":
        raise ValueError(f"it asks for the encoding {encoding!r}")
    return text.encode("latin1")


class _Unpickler(pickle.Unpickler):
    """Reads dicts, lists, numbers, text, bytes and arrays of bytes; no name in the pickle is ever looked up."""

    stand_ins = {("_codecs", "encode"): _encode, ("numpy", "ndarray"): _Array, ("numpy", "dtype"): _Dtype,
                 **{(f"numpy.{core}.multiarray", "_reconstruct"): lambda *_: _Array() for core in ("core", "_core")}}

    def find_class(self, module, name):
        if (module, name) not in self.stand_ins:
            raise ValueError(f"it asks for {module}.{name}, which data have no use for")
        return self.stand_ins[module, name]


def _batches(raw):
    """{name: dict} of the seven pickles, loose or inside the archive. MissingRaw where one is not there."""
    wanted, found = {*TRAIN, "test_batch", "batches.meta"}, {}
    for path, opened in raw_files(raw):
        name = path.split("/")[-1]
        if name in wanted:
            with opened() as stream:
                found[name] = _unpickle(name, stream)
        elif name == ARCHIVE:
            with readable(path), opened() as stream, tarfile.open(fileobj=stream, mode="r|gz") as archive:
                for member in archive:
                    name = member.name.split("/")[-1]
                    if member.isfile() and name in wanted:
                        found[name] = _unpickle(name, io.BytesIO(archive.extractfile(member).read()))
    if missing := sorted(wanted - set(found)):
        raise MissingRaw(f"{missing[0]} is not in {raw}, neither loose nor inside {ARCHIVE}.")
    return found


def _unpickle(name, stream):
    """The dict in a pickle, its keys as text."""
    with readable(name):
        return {_text(key): value for key, value in _Unpickler(stream, encoding="bytes").load().items()}


def _images(name, batch, num_classes):
    """A batch's images, uint8 (rows, 32, 32, 3), and labels, int64 (rows,)."""
    data, labels = getattr(batch.get("data"), "value", None), np.array(batch.get("labels", []))
    if data is None or data.shape != (len(labels), 3 * SIDE * SIDE) or not np.isin(labels, range(num_classes)).all():
        raise MissingRaw(
            f"{name} should hold rows of {3 * SIDE * SIDE} bytes and a label from 0 to {num_classes - 1} for each.")
    return data.reshape(-1, 3, SIDE, SIDE).transpose(0, 2, 3, 1), labels


def _text(value):
    return value.decode() if isinstance(value, bytes) else value


def miniature(raw, seed):
    """5 x 60 images to train on and 300 to test on. A class is one of five shapes in a cold or a warm colour."""
    rng = np.random.default_rng(seed)
    with tarfile.open(raw / ARCHIVE, "w:gz", compresslevel=1) as archive:
        def add(name, batch):
            data = pickle.dumps(batch, protocol=2)
            member = tarfile.TarInfo(f"cifar-10-batches-py/{name}")
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
        for i, (name, rows) in enumerate([*((name, 60) for name in TRAIN), ("test_batch", 300)]):
            labels = rng.permutation(np.arange(rows) % len(CLASSES))
            data = np.stack([_picture(rng, k).transpose(2, 0, 1).ravel() for k in labels])
            add(name, {b"batch_label": f"batch {i + 1} of 6".encode(), b"labels": labels.tolist(), b"data": data,
                       b"filenames": [f"{CLASSES[k]}_{j:04d}.png".encode() for j, k in enumerate(labels)]})
        add("batches.meta", {b"num_cases_per_batch": 60, b"num_vis": 3 * SIDE * SIDE,
                             b"label_names": [name.encode() for name in CLASSES]})


def _picture(rng, k):
    """A picture of class k, uint8 (32, 32, 3)."""
    y, x = np.mgrid[:SIDE, :SIDE] - 15.5
    x, y = x - rng.uniform(-4, 4), y - rng.uniform(-4, 4)
    turn, r = rng.uniform(-0.3, 0.3), rng.uniform(7.5, 11)
    x, y = x * np.cos(turn) + y * np.sin(turn), y * np.cos(turn) - x * np.sin(turn)
    away, far, near = np.hypot(x, y), np.maximum(abs(x), abs(y)), np.minimum(abs(x), abs(y))
    inside = [away < r, far < 0.85 * r, (y < 0.7 * r) & (1.7 * abs(x) - y < 0.9 * r),
              (away < 1.1 * r) & (away > 0.6 * r), (near < 0.3 * r) & (far < 1.1 * r)][k % 5]
    colour = np.array([[110, 140, 220], [220, 140, 110]])[k // 5] + rng.normal(0, 25, 3)
    picture = np.where(inside[..., None], colour, rng.uniform(20, 120, 3))
    picture += (rng.uniform(-2, 2) * x + rng.uniform(-2, 2) * y)[..., None] + rng.normal(0, 12, picture.shape)
    return np.clip(picture, 0, 255).astype(np.uint8)


TASK = Task(
    id="cifar-10", metric="accuracy", direction="up", split="held-in",
    source="MLAgentBench", targets=tuple(COLUMNS),
    prepare=prepare, miniature=miniature, score=score,
    download="cifar-10-python.tar.gz from https://www.cs.toronto.edu/~kriz/cifar.html", size="170 MB",
    m_best=0.995, m_best_source="vision transformer ViT-H/14, arXiv 2010.11929",
    m_best_miniature=0.933,    # three convolutions with batch normalisation, ten epochs of one-cycle AdamW, all images
    published=table_1((0.5219, 0.6155), (0.5912, 0.7605), (0.5396, 0.6382),
                      (0.6170, 0.8083), (0.6639, 0.8034), (0.6888, 0.8145)),
)
