"""Denoising dirty documents: from a scan with stains and folds to the clean page, pixel by pixel.

Split, files and grader are MLE-bench's, to the byte.
"""
import re
import tempfile
from pathlib import Path

import numpy as np

from tasks import MissingRaw, Task, copy_raw_folder, paired, raw_files, readable, rmse, split_positions, table_1

GRAYS = [str(gray / 255) for gray in range(256)]       # as pandas would write the floats


def prepare(raw, public, private, variant):
    """144 pairs of pages become 115 to train on and 29 to test on; the publisher's pages without a pair are left out.

    The split is that of the sorted names. The answers have one row a pixel: 5789880.
    """
    paths = [path.split("/") for path, _ in raw_files(raw)]
    names = sorted({path[-1] for path in paths if path[-2:-1] == ["train"] and re.fullmatch(r"\d+\.png", path[-1])})
    if not names:
        raise MissingRaw(f"No page of a folder train is in {raw}, neither loose nor inside a zip.")
    train, test = (sorted(names[i] for i in side) for side in split_positions(len(names), 0.2))
    copy_raw_folder(raw, "train", public / "train", train)
    copy_raw_folder(raw, "train_cleaned", public / "train_cleaned", train)
    copy_raw_folder(raw, "train", public / "test", test)
    with tempfile.TemporaryDirectory(dir=private.parent) as folder, open(private / "answers.csv", "w") as answers, \
            open(public / "sampleSubmission.csv", "w") as sample:
        copy_raw_folder(raw, "train_cleaned", folder, test)
        answers.write("id,value\n")
        sample.write("id,value\n")
        for name in test:
            for i, row in enumerate(_gray(Path(folder) / name).tolist(), 1):
                ids = [f"{name[:-4]}_{i}_{j}" for j in range(1, len(row) + 1)]
                answers.writelines(f"{id},{GRAYS[gray]}\n" for id, gray in zip(ids, row))
                sample.writelines(f"{id},1\n" for id in ids)


def score(answers, submission):
    """Over the pixels of all pages together; values need not be from 0 to 1."""
    return rmse(*paired(answers, submission, "id", ["value"]))


def _gray(path):
    """The image at path as grays, uint8 (rows, columns)."""
    from PIL import Image
    with readable(f"train_cleaned/{path.name}"), Image.open(path) as page:
        return np.asarray(page.convert("L"))


def miniature(raw, seed):
    """90 small pages of words, 60 of them with their clean pair. A scan has paper of uneven brightness, a fold, the
    ring of a cup, blur and grain."""
    from PIL import Image, ImageDraw, ImageFont
    rng = np.random.default_rng(seed)
    # the bitmap font, which is the same everywhere; some versions of Pillow before 10.4 have only the smooth one
    font = getattr(ImageFont, "load_default_imagefont", ImageFont.load_default)()
    for folder in ("train", "train_cleaned", "test"):
        (raw / folder).mkdir()
    for n in range(1, 91):
        height, width = (66 if n <= 30 else 104), 136
        page = Image.new("L", (width, height), 255)
        pen = ImageDraw.Draw(page)
        for top in range(2, height - 11, 13):
            pen.text((3, top), " ".join(rng.choice(WORDS, 5)), fill=0, font=font)
        clean = np.asarray(page) / 255
        y, x = np.mgrid[:height, :width]
        waves = [rng.normal(0, 0.035) * np.cos(a * x / width + b * y / height + rng.uniform(0, 6))
                 for a, b in rng.uniform(-9, 9, (6, 2))]
        paper = rng.uniform(0.68, 0.9) + sum(waves)
        angle = rng.uniform(0, np.pi)
        fold = (x - width / 2 + rng.normal(0, 30)) * np.cos(angle) + (y - height / 2) * np.sin(angle)
        ring = np.hypot(x - rng.uniform(0, width), y - rng.uniform(0, height)) - rng.uniform(20, 45)
        paper -= rng.uniform(0.1, 0.3) * np.exp(-(fold / 2.0) ** 2) + rng.uniform(0.1, 0.4) * np.exp(-(ring / 2.5) ** 2)
        ink = np.pad(1 - clean, 1)
        ink = 0.6 * ink[1:-1, 1:-1] + 0.1 * (ink[:-2, 1:-1] + ink[2:, 1:-1] + ink[1:-1, :-2] + ink[1:-1, 2:])
        scan = paper * (1 - rng.uniform(0.7, 0.95) * ink) + rng.normal(0, 0.025, clean.shape)
        scan = Image.fromarray((255 * np.clip(scan, 0, 1)).astype(np.uint8))
        scan.save(raw / ("test" if n % 3 == 1 else "train") / f"{n}.png")
        if n % 3 != 1:
            page.save(raw / "train_cleaned" / f"{n}.png")


WORDS = "a few lines of print on a page that somebody put a cup of coffee on and folded twice before the scan".split()

TASK = Task(
    id="denoising-dirty-documents", metric="RMSE", direction="down",
    split="held-out", source="MLE-bench", targets=("value",), answers="answers.csv",
    sample="sampleSubmission.csv",
    prepare=prepare, miniature=miniature, score=score,
    known_signal="an id is a place on a page, in its order, and neighbouring pixels are alike",
    kaggle="train.zip and train_cleaned.zip", size="60 MB",
    m_init=0.13934, m_best=0.00416,
    m_best_miniature=0.0201,    # boosted trees on a window and the background, fitted to darkened pages too
    published=table_1((0.1523, 0.0926), (0.1344, 0.0829), (0.1459, 0.0662),
                      (0.1471, 0.0661), (0.1419, 0.1326), (0.0741, 0.0556)),
    gold=0.01794,
)
