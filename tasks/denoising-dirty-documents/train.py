"""Cleans scanned pages by stretching their contrast and writes submission.csv."""
from pathlib import Path

import numpy as np
from PIL import Image

SEED = 0
LOW, HIGH = 0, 100      # percentiles of a page's brightness that become black and white


def load(folder):
    """{name: page} of a folder's images, pages from 0 (black) to 1 (white), (rows, columns)."""
    paths = sorted(Path("data", folder).glob("*.png"))
    return {path.stem: np.asarray(Image.open(path).convert("L")) / 255 for path in paths}


def restore(page):
    """The clean page for a dirty one."""
    low, high = np.percentile(page, [LOW, HIGH])
    return np.clip((page - low) / (high - low), 0, 1)


dirty, clean = load("train"), load("train_cleaned")
valid = sorted(dirty)[::4]      # pages to measure the error on; nothing should be learnt from them

errors = np.concatenate([(restore(dirty[name]) - clean[name]).ravel() for name in valid])
print(f"validation RMSE: {np.sqrt((errors ** 2).mean()):.4f}")

with open("submission.csv", "w") as stream:
    stream.write("id,value\n")
    for name, page in load("test").items():
        for i, row in enumerate(restore(page).tolist(), 1):
            stream.writelines(f"{name}_{i}_{j},{value:.4f}\n" for j, value in enumerate(row, 1))
