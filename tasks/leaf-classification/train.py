"""Trains a classifier of leaves on the 192 measurements and writes submission.csv."""
import numpy as np
import pandas as pd
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import log_loss
from sklearn.model_selection import train_test_split
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import FunctionTransformer, StandardScaler

SEED = 0
VALID_FRACTION = 0.25   # share of the training rows held back to measure the log loss
POWER = 1.0             # the measurements are raised to this power
SHAPE_WEIGHT = 1.0      # scaled to one spread, the measurements of the outline are multiplied by this ...
TEXTURE_WEIGHT = 1.0    # ... those of the texture by this, those of the margin by 1
C = 5.0                 # inverse strength of the regularisation

train = pd.read_csv("data/train.csv")
test = pd.read_csv("data/test.csv")
features = [name for name in train.columns if name.startswith(("margin", "shape", "texture"))]
species = sorted(train["species"].unique())

for rows in (train, test):
    rows[features] = rows[features] ** POWER
weights = np.ones(len(features))
weights[[name.startswith("shape") for name in features]] = SHAPE_WEIGHT
weights[[name.startswith("texture") for name in features]] = TEXTURE_WEIGHT


def weigh(x):
    return x * weights


def build_model():
    return make_pipeline(StandardScaler(), FunctionTransformer(weigh),
                         LogisticRegression(C=C, max_iter=200, random_state=SEED))


# every species has few rows, so the validation part is drawn species by species
fit, valid = train_test_split(train, test_size=VALID_FRACTION, random_state=SEED, stratify=train["species"])
model = build_model().fit(fit[features], fit["species"])
print(f"validation log loss: {log_loss(valid['species'], model.predict_proba(valid[features]), labels=species):.4f}")

model = build_model().fit(train[features], train["species"])
submission = pd.DataFrame(model.predict_proba(test[features]), columns=model.classes_)
submission.insert(0, "id", test["id"])
submission.to_csv("submission.csv", index=False)
