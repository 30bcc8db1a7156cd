"""Cleans scanned pages by stretching their contrast and writes submission.csv."""
from pathlib import Path

import numpy as np
from PIL import Image

SEED = 0
TILES = 1               # a page is cut into TILES x TILES parts, each of which is stretched by itself
WHITE = 100             # percentile of a part's brightness that becomes white; its darkest pixel becomes black
GAMMA = 1.0             # power of the stretched brightness: less than 1 makes grays brighter
CONTRAST = 1.0          # slope around the middle gray


def load(folder):
    """{name: page} of a folder's images, pages from 0 (black) to 1 (white), (rows, columns)."""
    paths = sorted(Path("data", folder).glob("*.png"))
    return {path.stem: np.asarray(Image.open(path).convert("L")) / 255 for path in paths}


def restore(page):
    """The clean page for a dirty one."""
    bands = np.array_split(page, TILES)
    return np.concatenate([np.hstack([stretch(part) for part in np.array_split(band, TILES, 1)]) for band in bands])


def stretch(part):
    """A part of a page with its contrast stretched, from 0 to 1."""
    low, high = part.min(), np.percentile(part, WHITE)
    gray = np.clip((part - low) / max(high - low, 1e-6), 0, 1) ** GAMMA
    return np.clip(0.5 + CONTRAST * (gray - 0.5), 0, 1)


dirty, clean = load("train"), load("train_cleaned")
valid = sorted(dirty)[::4]      # pages to measure the error on; nothing should be learnt from them

errors = np.concatenate([(restore(dirty[name]) - clean[name]).ravel() for name in valid])
print(f"validation RMSE: {np.sqrt((errors ** 2).mean()):.4f}")

with open("submission.csv", "w") as stream:
    stream.write("id,value\n")
    for name, page in load("test").items():
        for i, row in enumerate(restore(page).tolist(), 1):
            stream.writelines(f"{name}_{i}_{j},{value:.4f}\n" for j, value in enumerate(row, 1))
