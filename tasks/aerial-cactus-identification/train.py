"""Trains a classifier of small aerial photographs and writes submission.csv."""
import numpy as np
import pandas as pd
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.model_selection import train_test_split
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

try:
    from PIL import Image
except ImportError:
    raise SystemExit("This script reads JPEG files with pillow, which is not installed: pip install pillow")

SEED = 0
VALID_FRACTION = 0.25   # share of the training pictures held back to measure the AUC
SIDE = 16               # the pictures are scaled down to SIDE x SIDE pixels
CELLS = 2               # each is cut into CELLS x CELLS parts
NUM_DIRECTIONS = 2      # of edges that are told apart
C = 0.01                # inverse strength of the regularisation


def load(folder, names):
    """The pictures as numbers from 0 to 1, (pictures, SIDE, SIDE, 3)."""
    pictures = []
    for name in names:
        with Image.open(f"data/{folder}/{name}") as picture:
            pictures.append(np.asarray(picture.convert("RGB").resize((SIDE, SIDE), Image.BOX)))
    return np.stack(pictures).astype(np.float32) / 255


def features(pictures):
    """The colour and the strength of the edges of each direction, in every part, (pictures, features)."""
    down, across = np.gradient(pictures.mean(3), axis=(1, 2))
    direction = np.round(np.arctan2(down, across) / np.pi * NUM_DIRECTIONS) % NUM_DIRECTIONS
    edges = [np.hypot(down, across) * (direction == k) for k in range(NUM_DIRECTIONS)]
    layers = np.concatenate([pictures, np.stack(edges, 3)], 3)
    bands = np.array_split(layers, CELLS, 1)
    return np.hstack([part.mean((1, 2)) for band in bands for part in np.array_split(band, CELLS, 2)])


def build_model():
    return make_pipeline(StandardScaler(), LogisticRegression(C=C, max_iter=1000))


train = pd.read_csv("data/train.csv")
test = pd.read_csv("data/sample_submission.csv")
x, y = features(load("train", train["id"])), train["has_cactus"].to_numpy()
x_test = features(load("test", test["id"]))

x_fit, x_valid, y_fit, y_valid = train_test_split(x, y, test_size=VALID_FRACTION, random_state=SEED, stratify=y)
model = build_model().fit(x_fit, y_fit)
print(f"validation AUC: {roc_auc_score(y_valid, model.predict_proba(x_valid)[:, 1]):.4f}")

model = build_model().fit(x, y)
test["has_cactus"] = model.predict_proba(x_test)[:, 1]
test.to_csv("submission.csv", index=False)
