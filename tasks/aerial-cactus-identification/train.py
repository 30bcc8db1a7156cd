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
SIDE = 8                # the pictures are scaled down to SIDE x SIDE pixels
C = 1.0                 # inverse strength of the regularisation
MAX_ITER = 300          # steps of the solver


def load(folder, names):
    """The pictures as numbers from 0 to 1, (pictures, SIDE, SIDE, 3)."""
    pictures = []
    for name in names:
        with Image.open(f"data/{folder}/{name}") as picture:
            pictures.append(np.asarray(picture.convert("RGB").resize((SIDE, SIDE), Image.BOX)))
    return np.stack(pictures).astype(np.float32) / 255


def features(pictures):
    """What the model sees, (pictures, features)."""
    return pictures.reshape(len(pictures), -1)


def build_model():
    return make_pipeline(StandardScaler(), LogisticRegression(C=C, max_iter=MAX_ITER, random_state=SEED))


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
