"""Trains a regression of both energies on the table's columns and writes submission.csv."""
import numpy as np
import pandas as pd
from sklearn.ensemble import RandomForestRegressor
from sklearn.model_selection import train_test_split

SEED = 0
VALID_FRACTION = 0.2    # share of the training rows held back to measure the error
NUM_TREES = 50
MIN_LEAF = 3            # rows in a leaf at least
MAX_FEATURES = 1.0      # share of the features that a split chooses from
POWER = 1.0             # the trees learn the energies raised to this power
TARGETS = ["formation_energy_ev_natom", "bandgap_energy_ev"]


def load(name):
    """The rows of data/<name>.csv and their features. The geometries in data/<name>/<id>/geometry.xyz are not used."""
    rows = pd.read_csv(f"data/{name}.csv")
    features = rows.drop(columns=["id", *TARGETS], errors="ignore")
    return rows, features


def build_model():
    return RandomForestRegressor(NUM_TREES, min_samples_leaf=MIN_LEAF, max_features=MAX_FEATURES, random_state=SEED)


def predict(x_fit, y_fit, x):
    """Predictions of both targets for the rows x, none below zero."""
    model = build_model().fit(x_fit, y_fit ** POWER)
    return np.maximum(model.predict(x), 0) ** (1 / POWER)


train, x = load("train")
test, x_test = load("test")
y = train[TARGETS].to_numpy()

x_fit, x_valid, y_fit, y_valid = train_test_split(x, y, test_size=VALID_FRACTION, random_state=SEED)
errors = np.log1p(predict(x_fit, y_fit, x_valid)) - np.log1p(y_valid)
print(f"validation RMSLE: {np.sqrt((errors ** 2).mean(0)).mean():.5f}")

submission = pd.DataFrame(predict(x, y, x_test), columns=TARGETS)
submission.insert(0, "id", test["id"])
submission.to_csv("submission.csv", index=False)
