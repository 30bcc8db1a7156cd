"""Trains a classifier of radar images on a few statistics of each band and writes submission.csv."""
import math

import numpy as np
import pandas as pd
from sklearn.ensemble import GradientBoostingClassifier
from sklearn.metrics import log_loss
from sklearn.model_selection import train_test_split

SEED = 0
VALID_FRACTION = 0.25   # share of the training images held back to measure the log loss
NUM_TREES = 100
MAX_DEPTH = 3           # levels of a tree
LEARNING_RATE = 0.1
SUBSAMPLE = 1.0         # share of the rows that each tree sees
CENTRE = 1.0            # share of the side that the part in the middle has which is looked at


def load(path):
    """Images, float32 (rows, 2, side, side); angles, NaN where not known (rows,); and a table of the other fields."""
    table = pd.read_json(path, dtype=False)
    bands = [np.stack(table.pop(name)).astype(np.float32) for name in ("band_1", "band_2")]
    side = math.isqrt(bands[0].shape[1])
    images = np.stack(bands, 1).reshape(-1, 2, side, side)
    angles = pd.to_numeric(table.pop("inc_angle"), errors="coerce").to_numpy()
    return images, angles, table


def make_features(images, angles):
    """Statistics of the middle of each band, and the angle: (rows, features)."""
    side = images.shape[2]
    edge = int(side * max(1 - CENTRE, 0) / 2)
    pixels = images[:, :, edge:side - edge, edge:side - edge].reshape(len(images), 2, -1)
    statistics = [pixels.mean(2), pixels.std(2), pixels.min(2), pixels.max(2)]
    return np.column_stack([*statistics, np.nan_to_num(angles, nan=np.nanmean(angles))])


def build_model():
    return GradientBoostingClassifier(
        n_estimators=NUM_TREES, max_depth=MAX_DEPTH, learning_rate=LEARNING_RATE, subsample=SUBSAMPLE,
        random_state=SEED)


images, angles, train = load("data/train.json")
x, y = make_features(images, angles), train["is_iceberg"].to_numpy()
images, angles, test = load("data/test.json")
x_test = make_features(images, angles)

x_fit, x_valid, y_fit, y_valid = train_test_split(x, y, test_size=VALID_FRACTION, random_state=SEED, stratify=y)
model = build_model().fit(x_fit, y_fit)
print(f"validation log loss: {log_loss(y_valid, model.predict_proba(x_valid)[:, 1]):.4f}")

model = build_model().fit(x, y)
submission = pd.DataFrame({"id": test["id"], "is_iceberg": model.predict_proba(x_test)[:, 1]})
submission.to_csv("submission.csv", index=False)
