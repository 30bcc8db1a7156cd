"""Dogs versus cats: the probability that a photograph shows a dog.

Split, names and grader are MLE-bench's, which ships the pictures a second time as zips.
"""
import re

import numpy as np
import pandas as pd

from tasks import (
    MissingRaw, Task, copy_raw_folder, jpeg, log_loss, paired, raw_files, share_of_test, split_positions, write_csv,
    write_zip)


def prepare(raw, public, private, variant):
    """25000 labelled pictures become 22500 to train on and 2500 to test on; the unlabelled ones are left out.

    They are split in the order of their names as text, then named anew: train/cat.0.jpg, train/dog.0.jpg, test/1.jpg.
    """
    paths = (path.split("/") for path, _ in raw_files(raw) if re.search(r"(^|/)train/(cat|dog)\.\d+\.jpg$", path))
    names = sorted({path[-1] for path in paths})
    if not names:
        raise MissingRaw(f"Pictures such as cat.0.jpg are in no folder train of {raw}, neither loose nor inside a zip.")
    sides = split_positions(len(names), share_of_test(0.1, len(names)))
    train, test = ([names[i] for i in side] for side in sides)
    counts, places = {"cat": 0, "dog": 0}, {}
    for name in train:
        kind = "dog" if "dog" in name else "cat"
        places[name] = f"train/{kind}.{counts[kind]}.jpg"
        counts[kind] += 1
    places.update({name: f"test/{i}.jpg" for i, name in enumerate(test, 1)})
    answers = pd.DataFrame({"id": range(1, len(test) + 1), "label": [int("dog" in name) for name in test]})
    write_csv(answers.assign(label=0.5), public / "sample_submission.csv")
    write_csv(answers, private / "answers.csv")
    copy_raw_folder(raw, "train", public, places)


def score(answers, submission):
    truth, predicted = paired(answers, submission, "id", ["label"], low=0, high=1)
    return log_loss(truth[:, 0], predicted[:, 0])


def miniature(raw, seed):
    """375 cats, 375 dogs and 20 unlabelled pictures. Cats have whiskers and pointed ears that stand, dogs have a long
    snout and round ears that hang."""
    rng = np.random.default_rng(seed)
    names = [f"train/{kind}.{i}.jpg" for kind in ("cat", "dog") for i in range(375)]
    names += [f"test/{i}.jpg" for i in range(1, 21)]
    is_dog = [name.startswith("train/dog") or (name.startswith("test/") and rng.random() < 0.5) for name in names]
    images = {name: jpeg(_picture(rng, dog), step=16, size=8192) for name, dog in zip(names, is_dog)}
    for folder in ("train", "test"):
        write_zip(raw / f"{folder}.zip", {name: image for name, image in images.items() if name.startswith(folder)})
    write_csv(pd.DataFrame({"id": range(1, 21), "label": 0.5}), raw / "sample_submission.csv")


def _picture(rng, dog):
    """uint8 (height, width, 3), 40 to 64 pixels a side."""
    height, width = rng.integers(40, 65, 2)
    y, x = np.mgrid[:height, :width] / min(height, width)
    y, x = y - y.mean() + rng.normal(0, 0.06), x - x.mean() + rng.normal(0, 0.06)
    size, tilt = rng.uniform(0.75, 1.05), rng.normal(0, 0.12)
    y, x = (y * np.cos(tilt) + x * np.sin(tilt)) / size, (x * np.cos(tilt) - y * np.sin(tilt)) / size
    side = np.abs(x)
    fur, backdrop = rng.uniform([[50], [40]], [[230], [220]]) * rng.normal([1, 0.88, 0.74], 0.08, (2, 3))
    pixels = backdrop + (y * rng.normal(0, 40))[..., None]

    def paint(distance, colour):
        """Colours what lies within a negative distance, in parts of the picture."""
        nonlocal pixels
        cover = np.clip(0.5 - distance * 40, 0, 1)[..., None]
        pixels = pixels + cover * (colour - pixels)
    paint(np.hypot(x / 0.3, y / 0.27) * 0.28 - 0.28, fur)
    ear = fur * rng.uniform(0.6, 0.9)
    if dog:
        length = rng.uniform(0.13, 0.2)
        paint(np.hypot((side - 0.29) / 0.075, (y + 0.02) / length) * 0.09 - 0.09, ear)
        paint(np.hypot(x / 0.13, (y - 0.14) / 0.15) * 0.14 - 0.14, fur * 1.12 + 8)
    else:
        tip = rng.uniform(0.36, 0.44)
        paint(np.maximum(np.abs(side - 0.19) - (y + tip) * 0.5, y + 0.12), ear)
        for slope in (-0.25, 0, 0.25):
            whisker = np.maximum(np.abs(y - 0.1 - slope * (side - 0.1)) - 0.004, np.abs(side - 0.22) - 0.12)
            paint(whisker, np.full(3, 235.0))
    for at in (-0.11, 0.11):
        paint(np.hypot(x - at, y + 0.05) - 0.035, np.array([25, 25, 20]) + 60 * rng.random(3))
    paint(np.hypot(x, (y - 0.08 - 0.06 * dog) * 1.4) - (0.03 + 0.015 * dog), np.array([45, 30, 30]))
    return np.clip(pixels + rng.normal(0, 9, pixels.shape), 0, 255).astype(np.uint8)


TASK = Task(
    id="dogs-vs-cats-redux-kernels-edition", metric="log loss",
    direction="down", split="held-in", source="MLE-bench", prepare=prepare,
    miniature=miniature, score=score, answers="answers.csv",
    kaggle="train.zip", size="850 MB",
    m_best=0.03302,
    m_best_miniature=0.007,    # batch-normalised network of 16 channels on grey pictures and edges, 40 epochs, mirrored
    gold=0.03882,
)
