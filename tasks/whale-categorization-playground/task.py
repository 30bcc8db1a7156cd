"""Whale categorization: which humpback whale a photograph of a fluke shows, the five likeliest names.

Split and grader are MLE-bench's.
"""
import numpy as np
import pandas as pd

from tasks import (
    InvalidSubmission, Task, copy_raw_folder, jpeg, map5, matched, raw_csv, show, split_positions, table_1, write_csv)

SAMPLE = "new_whale w_1287fbc w_98baff9 w_7554f44 w_1eafe46"
NUM_LABELLED = 1260     # pictures of the miniature


def prepare(raw, public, private, variant):
    """9850 labelled pictures become 7240 to train on and 2610 to test on; the unlabelled ones are left out.

    Both sides keep the order of the rows. In the answers a whale without a picture to train on is a new_whale.
    """
    rows = raw_csv(raw, "train.csv", ["Image", "Id"])
    is_test = split(rows["Id"])
    train, test = rows[~is_test], rows[is_test]
    write_csv(train, public / "train.csv")
    write_csv(test[["Image"]].assign(Id=SAMPLE), public / "sample_submission.csv")
    write_csv(test.assign(Id=test["Id"].where(test["Id"].isin(train["Id"]), "new_whale")), private / "test.csv")
    places = {name: f"train/{name}" for name in train["Image"]} | {name: f"test/{name}" for name in test["Image"]}
    copy_raw_folder(raw, "train", public, places)


def split(ids):
    """Whether each row is in the test, bool (N,), from the ids of all rows, (N,).

    Of each id with two rows or more one row drawn goes to train and one to test. An id's only row goes to test with
    probability 0.1. What remains is split at random, a tenth for test. new_whale is treated as any other id.
    """
    codes, _ = pd.factorize(np.asarray(ids))                        # numbers in order of first appearance
    rows_of = np.split(np.argsort(codes, kind="stable"), np.cumsum(np.bincount(codes))[:-1])
    is_test, remains = np.zeros(len(codes), bool), np.ones(len(codes), bool)
    rng = np.random.default_rng(0)
    for rows in rows_of:
        if len(rows) > 1:
            pair = rows[np.random.RandomState(0).permutation(len(rows))[:2]]
            remains[pair], is_test[pair[1]] = False, True
        else:
            remains[rows], is_test[rows] = False, rng.random() >= 0.9
    remains = np.flatnonzero(remains)
    if len(remains):
        is_test[remains[split_positions(len(remains), 0.1)[1]]] = True
    return is_test


def score(answers, submission):
    """Mean over the pictures of 1 / rank of the true name among the first five."""
    predicted = matched(submission, answers, "Image", ["Id"], extra=False)["Id"]
    for row, names in enumerate(predicted, 1):
        if not names.strip():
            raise InvalidSubmission(f"Row {row} of column 'Id' holds {show(names)}; it must name at least one whale.")
    return map5(answers["Id"], predicted)


def miniature(raw, seed):
    """1260 labelled pictures: 150 of 12 whales seen often, 740 of 240 seen 2 to 4 times, 250 seen once, 120 of new
    ones.

    A dark fluke before the sea, with its own outline and white marks. Each picture moves, turns and lights it anew, and
    one in three is grey. A new whale is one never seen again.
    """
    rng = np.random.default_rng(seed)
    counts = [*rng.multinomial(150 - 12 * 7, np.ones(12) / 12) + 7, *np.repeat([2, 3, 4], [70, 80, 90]), *[1] * 250]
    names = SAMPLE.split()[1:] + sorted({f"w_{rng.bytes(4).hex()[:7]}" for _ in range(2 * len(counts))})
    names = [*names[:4], *rng.permutation(names[4:])[:len(counts) - 4]]
    label = np.concatenate([np.repeat(np.arange(len(counts)), counts), np.full(NUM_LABELLED - sum(counts), -1)])
    whales = [_whale(rng) for _ in counts]
    rows = []
    (raw / "train").mkdir()
    (raw / "test").mkdir()
    for i, k in enumerate([*label, *[-1] * 20]):
        name, folder = f"{rng.bytes(4).hex()}.jpg", "train" if i < NUM_LABELLED else "test"
        whale = whales[k] if k >= 0 else _whale(rng)
        (raw / folder / name).write_bytes(jpeg(_picture(rng, *whale), step=16, size=8192))
        rows.append([folder, name, names[k] if k >= 0 else "new_whale"])
    frame = pd.DataFrame(rows, columns=["folder", "Image", "Id"]).sort_values("Image")
    write_csv(frame[frame["folder"] == "train"][["Image", "Id"]], raw / "train.csv")
    write_csv(frame[frame["folder"] == "test"][["Image"]].assign(Id=SAMPLE), raw / "sample_submission.csv")


def _whale(rng):
    """(outline, marks): the heights of the fluke's upper edge at 9 places, and 7 marks of x, y, two radii and turn."""
    outline = np.array([0.05, 0.2, 0.22, 0.18, 0.02]).repeat(2)[:9] + rng.normal(0, 0.05, 9)
    marks = np.stack([rng.uniform(-0.8, 0.8, 7), rng.uniform(-0.2, 0.25, 7), rng.uniform(0.04, 0.25, 7),
                      rng.uniform(0.02, 0.12, 7), rng.uniform(-1, 1, 7)], 1)
    return outline, marks


def _picture(rng, outline, marks, height=32, width=64):
    """uint8 (height, width, 3)."""
    y, x = (np.mgrid[:height, :width] + 0.5) / height - [[[0.5]], [[1.0]]]          # -0.5 to 0.5 down, -1 to 1 across
    sea = np.array([84, 112, 128]) * rng.uniform(0.7, 1.3) + rng.normal(0, 8, 3)
    pixels = sea + (y * rng.normal(0, 60))[..., None] + (rng.normal(0, 12, height)[:, None] * np.ones(width))[..., None]
    turn, size = rng.normal(0, 0.06), rng.uniform(0.85, 1.1)
    y, x = y - rng.normal(0, 0.05), x - rng.normal(0, 0.06)
    y, x = (y * np.cos(turn) - x * np.sin(turn)) / size, (x * np.cos(turn) + y * np.sin(turn)) / size
    top = -np.interp(x, np.linspace(-0.92, 0.92, 9), outline)
    bottom = 0.36 - 0.42 * np.abs(x) ** 1.3
    inside = np.clip(np.minimum(np.minimum(y - top, bottom - y), 0.92 - np.abs(x)) * 40, 0, 1)
    skin = np.full((height, width, 1), rng.uniform(28, 52)) * [1, 1.02, 1.08]
    for at_x, at_y, long, short, angle in marks:
        along = (x - at_x) * np.cos(angle) + (y - at_y) * np.sin(angle)
        across = (y - at_y) * np.cos(angle) - (x - at_x) * np.sin(angle)
        cover = 0.8 * np.clip((1 - np.hypot(along / long, across / short)) * 3, 0, 1)[..., None]
        skin = skin + cover * (rng.uniform(170, 200) - skin)
    pixels = (pixels + inside[..., None] * (skin - pixels)) * rng.uniform(0.75, 1.25)
    pixels = pixels + rng.normal(0, 8, (height, width, 1))
    if rng.random() < 1 / 3:
        pixels = pixels.mean(2, keepdims=True).repeat(3, 2)
    return np.clip(pixels, 0, 255).astype(np.uint8)


TASK = Task(
    id="whale-categorization-playground", metric="MAP@5", direction="up",
    split="held-out", source="MLE-bench", key="Image", targets=("Id",), text_targets=True,
    prepare=prepare, miniature=miniature, score=score,
    kaggle="train.csv and train.zip", size="700 MB",
    m_best=0.78563,
    m_best_miniature=0.525,    # discriminant directions of grey pictures of one contrast at 16 x 8 pixels
    published=table_1((0.1304, 0.2276), (0.1268, 0.2019), (0.1198, 0.1421),
                      (0.1417, 0.2185), (0.1551, 0.2456), (0.2009, 0.2524)),
    gold=0.56236,
)
