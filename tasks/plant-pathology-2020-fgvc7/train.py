"""Trains a forest that tells the diseases of apple leaves from small pictures and writes submission.csv."""
import numpy as np
import pandas as pd
from sklearn.ensemble import RandomForestClassifier
from sklearn.metrics import roc_auc_score
from sklearn.model_selection import train_test_split

try:
    from PIL import Image
except ImportError:
    raise SystemExit("This script reads JPEG files with pillow, which is not installed: pip install pillow")

SEED = 0
WIDTH = 12              # the pictures are scaled down to WIDTH x HEIGHT pixels
HEIGHT = 8
VALID_FRACTION = 0.25   # share of the training pictures held back to measure the AUC
NUM_TREES = 20
MAX_DEPTH = 6           # levels of a tree
MAX_FEATURES = 17       # looked at for each split of a tree
TARGETS = ["healthy", "multiple_diseases", "rust", "scab"]


def load(names):
    """The pictures as numbers from 0 to 1, (pictures, HEIGHT, WIDTH, 3)."""
    pictures = np.empty((len(names), HEIGHT, WIDTH, 3), np.float32)
    for i, name in enumerate(names):
        with Image.open(f"data/images/{name}.jpg") as picture:
            picture.draft("RGB", (4 * WIDTH, 4 * HEIGHT))   # lets the decoder skip detail that scaling down would drop
            pictures[i] = np.asarray(picture.convert("RGB").resize((WIDTH, HEIGHT), Image.BOX)) / 255
    return pictures


def features(pictures):
    """What the model sees, (pictures, features)."""
    return pictures.reshape(len(pictures), -1)


def build_model():
    return RandomForestClassifier(n_estimators=NUM_TREES, max_depth=MAX_DEPTH, max_features=MAX_FEATURES, random_state=SEED)


train = pd.read_csv("data/train.csv")
test = pd.read_csv("data/test.csv")
x, y = features(load(train["image_id"])), train[TARGETS].to_numpy().argmax(1)     # each picture has one of the four
x_test = features(load(test["image_id"]))

x_fit, x_valid, y_fit, y_valid = train_test_split(x, y, test_size=VALID_FRACTION, random_state=SEED, stratify=y)
model = build_model().fit(x_fit, y_fit)
print(f"validation mean AUC: {roc_auc_score(np.eye(4)[y_valid], model.predict_proba(x_valid)):.4f}")

model = build_model().fit(x, y)
submission = pd.DataFrame(model.predict_proba(x_test), columns=TARGETS)
submission.insert(0, "image_id", test["image_id"])
submission.to_csv("submission.csv", index=False)
