"""Plant pathology: which disease a photographed apple leaf has.

Split, names and grader are MLE-bench's.
"""
import numpy as np
import pandas as pd

from tasks import (
    Task, auc, copy_raw_folder, jpeg, paired, raw_csv, share_of_test, split_positions, split_rows, write_csv,
    write_tables)

TARGETS = ["healthy", "multiple_diseases", "rust", "scab"]


def prepare(raw, public, private, variant):
    """1821 labelled pictures become 1638 to train on and 183 to test on; the unlabelled ones are left out.

    Ids and pictures are named anew in the order of the split: Train_0, Train_1, ... and Test_0, Test_1, ...
    """
    rows = raw_csv(raw, "train.csv", ["image_id", *TARGETS])
    sides = {}
    places = {}
    for prefix, part in zip(("Train", "Test"), split_rows(rows, 0.1)):
        names = [f"{prefix}_{i}" for i in range(len(part))]
        places.update({f"{old}.jpg": f"{new}.jpg" for old, new in zip(part["image_id"], names)})
        sides[prefix.lower()] = part.assign(image_id=names)
    write_tables(public, **sides, **dict.fromkeys(TARGETS, 0.25))
    write_csv(sides["test"], private / "test.csv")
    copy_raw_folder(raw, "images", public / "images", places)


def score(answers, submission):
    """Only ranks matter, so values may be any numbers."""
    return auc(*paired(answers, submission, "image_id", TARGETS, extra=False))


def miniature(raw, seed):
    """750 labelled leaves (28 % healthy, 12 % with several diseases, 32 % with rust, 28 % with scab), 20 unlabelled.

    A leaf, lit and turned anyhow, before a blurred garden. Rust is a few small orange spots with a yellow rim, scab
    some brown-black blotches without an edge; several diseases are both, fewer.
    """
    rng = np.random.default_rng(seed)
    num_labelled = 750
    train, test = split_positions(num_labelled, share_of_test(0.1, num_labelled))
    kinds = np.repeat(np.arange(4), [126, 54, 144, 126])            # of the training rows; a test row is one of these
    label = np.empty(num_labelled + 20, int)
    label[train], label[test] = rng.permutation(kinds), rng.permutation(kinds)[:len(test)]
    label[test[:8]] = np.arange(8) % 4          # so that every column has both classes
    label[num_labelled:] = rng.integers(0, 4, 20)
    names = [f"Train_{i}" for i in range(num_labelled)] + [f"Test_{i}" for i in range(20)]
    (raw / "images").mkdir()
    for name, kind in zip(names, label):
        picture = jpeg(_picture(rng, rust=kind in (1, 2), scab=kind in (1, 3)), size=8192)
        (raw / "images" / f"{name}.jpg").write_bytes(picture)
    frame = pd.DataFrame({"image_id": names, **{name: (label == k).astype(int) for k, name in enumerate(TARGETS)}})
    write_tables(raw, frame[:num_labelled], frame[num_labelled:], **dict.fromkeys(TARGETS, 0.25))


def _picture(rng, rust, scab, height=48, width=72):
    """uint8 (height, width, 3)."""
    y, x = (np.mgrid[:height, :width] + 0.5) / height               # 0 to 1 down, 0 to 1.5 across
    pixels = np.array([88, 112, 62]) + rng.normal(0, 12, 3) + np.zeros((height, width, 1))
    for _ in range(6):                                              # a blurred garden: leaves, soil, sky
        spot = np.exp(-((y - rng.uniform(0, 1)) ** 2 + (x - rng.uniform(0, 1.5)) ** 2) / rng.uniform(0.02, 0.1))
        pixels = pixels + spot[..., None] * rng.normal([0, 0, -5], [30, 22, 20])
    turn, middle = rng.uniform(-0.6, 0.6), rng.uniform([0.42, 0.65], [0.58, 0.85])
    along = (x - middle[1]) * np.cos(turn) + (y - middle[0]) * np.sin(turn)
    across = (y - middle[0]) * np.cos(turn) - (x - middle[1]) * np.sin(turn)
    length, breadth = rng.uniform(0.5, 0.62), rng.uniform(0.26, 0.34)
    inside = 1 - np.hypot(along / length, across / breadth)
    leaf = np.array([92, 132, 52]) * rng.uniform(0.8, 1.2) + rng.normal(0, 7, 3)
    surface = leaf * (1 + 0.12 * np.sin(across * rng.uniform(25, 35) + np.abs(along) * 20))[..., None]
    surface = np.where((np.abs(across) < 0.012)[..., None], leaf * 1.35, surface)         # the midrib
    num_spots, num_blotches = (rng.integers(3, 6, 2) if rust and scab else rng.integers(4, 10, 2)) * [rust, scab]
    for i in range(num_spots + num_blotches):
        radius, angle = 0.75 * np.sqrt(rng.random()), rng.uniform(0, 2 * np.pi)
        dy, dx = across - radius * breadth * np.sin(angle), along - radius * length * np.cos(angle)
        if i < num_spots:
            distance = np.sqrt(dy ** 2 + dx ** 2) / rng.uniform(0.018, 0.035)
            surface = _paint(surface, np.clip(2.2 - distance, 0, 0.7), [176, 160, 52])
            surface = _paint(surface, np.clip(1.6 - distance, 0, 0.9), [186, 92, 30])
        else:
            square = (dy * rng.uniform(0.6, 1.4)) ** 2 + (dx * rng.uniform(0.6, 1.4)) ** 2
            cover = np.exp(-square / rng.uniform(0.05, 0.1) ** 2)
            surface = _paint(surface, rng.uniform(0.35, 0.6) * cover, [58, 52, 30])
    pixels = _paint(pixels, np.clip(inside * 30, 0, 1), surface)
    light = rng.uniform(0.75, 1.25) * (1 + rng.normal(0, 0.12) * (y - 0.5) + rng.normal(0, 0.12) * (x - 0.75))
    return np.clip(pixels * light[..., None] + rng.normal(0, 5, pixels.shape), 0, 255).astype(np.uint8)


def _paint(pixels, cover, colour):
    return pixels + cover[..., None] * (np.asarray(colour) - pixels)


TASK = Task(
    id="plant-pathology-2020-fgvc7", metric="mean AUC", direction="up",
    split="held-in", source="MLE-bench", key="image_id", prepare=prepare,
    miniature=miniature, score=score,
    kaggle="train.csv and images", size="800 MB",
    m_best=0.98445,
    m_best_miniature=0.92,    # 200 deep trees of a random forest on histograms of colour and relative brightness
    gold=0.97836,
)
