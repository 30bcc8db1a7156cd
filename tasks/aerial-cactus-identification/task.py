"""Aerial cactus identification: whether a small aerial photograph shows a columnar cactus.

Split and grader are MLE-bench's, which packs the pictures into two zips.
"""
import numpy as np
import pandas as pd

from tasks import Task, auc, copy_raw_folder, jpeg, paired, raw_csv, split_rows, write_csv, write_zip


def prepare(raw, public, private, variant):
    """17500 labelled pictures become 14175 to train on and 3325 to test on; the unlabelled ones are left out."""
    rows = raw_csv(raw, "train.csv", ["id", "has_cactus"])
    train, test = split_rows(rows, 0.19)
    write_csv(train, public / "train.csv")
    write_csv(test[["id"]].assign(has_cactus=0.5), public / "sample_submission.csv")
    write_csv(test, private / "test.csv")
    places = {name: f"train/{name}" for name in train["id"]} | {name: f"test/{name}" for name in test["id"]}
    copy_raw_folder(raw, "train", public, places)


def score(answers, submission):
    return auc(*paired(answers, submission, "id", ["has_cactus"], low=0, high=1))


def miniature(raw, seed):
    """750 labelled pictures, three in four with a cactus, and 20 unlabelled ones.

    A cactus is a thin upright stem with two arms on slightly greener ground; the other pictures have a fallen trunk of
    that colour and size, turned any way.
    """
    rng = np.random.default_rng(seed)
    num_labelled, n = 750, 770
    label = np.concatenate([rng.permutation(np.arange(num_labelled) % 4 > 0), rng.random(20) < 0.75]).astype(int)
    names = [f"{rng.bytes(16).hex()}.jpg" for _ in range(n)]
    images = [jpeg(_picture(rng, has_cactus), size=3072) for has_cactus in label]
    train = pd.DataFrame({"id": names, "has_cactus": label})[:num_labelled].sort_values("id")
    sample = pd.DataFrame({"id": sorted(names[num_labelled:]), "has_cactus": 0.5})
    write_csv(train, raw / "train.csv")
    write_csv(sample, raw / "sample_submission.csv")
    for folder, side in (("train", slice(num_labelled)), ("test", slice(num_labelled, n))):
        write_zip(raw / f"{folder}.zip", {f"{folder}/{name}": data for name, data in zip(names[side], images[side])})


def _picture(rng, has_cactus, side=32):
    """uint8 (side, side, 3)."""
    y, x = np.mgrid[:side, :side] + 0.5
    shade = _smooth(rng, side, 5) * 16 + rng.normal(0, 7, (side, side))
    cover = np.zeros((side, side))
    for _ in range(rng.integers(1, 4)):                     # shrubs
        cy, cx, radius = *rng.uniform(0, side, 2), rng.uniform(1.5, 3.5)
        cover = np.maximum(cover, np.clip(radius - np.hypot(y - cy, x - cx) + 0.5, 0, 1))
    cy, cx, half = *rng.uniform(11, side - 11, 2), rng.uniform(5.5, 8)
    tilt = rng.normal(0, 0.15) if has_cactus else rng.uniform(-np.pi / 2, np.pi / 2)
    down, right = np.array([np.cos(tilt), np.sin(tilt)]), np.array([-np.sin(tilt), np.cos(tilt)])
    strokes = [(-half * down, half * down)]
    if has_cactus:
        for sign in (-1, 1):
            elbow = rng.uniform(-0.2, 0.4) * half * down + sign * 3.5 * right
            strokes.append((elbow - sign * 3.5 * right, elbow))
            strokes.append((elbow, elbow - 0.5 * half * down))
    else:
        strokes.append((strokes[0][0] + 2 * right, strokes[0][1] + 2 * right))
    for start, end in strokes:
        cover = np.maximum(cover, np.clip(1.6 - _distance(y - cy, x - cx, start, end), 0, 1))
    ground = rng.normal([152, 136, 112], 4) + rng.normal(0, 12) + has_cactus * np.array([-8, 0, -5])
    green = ground + rng.normal(-1, 0.12) * np.array([52, 30, 44])
    pixels = ground + cover[..., None] * (green - ground) + shade[..., None]
    return np.clip(pixels, 0, 255).astype(np.uint8)


def _distance(y, x, start, end):
    """Distance of each point from the segment between two points (y, x)."""
    along = end - start
    share = np.clip(((y - start[0]) * along[0] + (x - start[1]) * along[1]) / (along @ along), 0, 1)
    return np.hypot(y - start[0] - share * along[0], x - start[1] - share * along[1])


def _smooth(rng, side, knots):
    """Noise (side, side) that varies slowly: normal values at knots x knots points, linear in between."""
    at, points = np.linspace(0, knots - 1, side), np.arange(knots)
    rows = np.stack([np.interp(at, points, row) for row in rng.normal(0, 1, (knots, knots))])
    return np.stack([np.interp(at, points, column) for column in rows.T], 1)


TASK = Task(
    id="aerial-cactus-identification", metric="AUC", direction="up",
    split="held-in", source="MLE-bench",
    prepare=prepare, miniature=miniature, score=score,
    kaggle="train.csv and train.zip", size="25 MB",
    m_best=1.0,
    m_best_miniature=0.951,    # support vector machine on histograms of gradients and mean colours
    gold=1.0,
)
