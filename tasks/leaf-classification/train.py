"""Trains a classifier of leaves on the 192 measurements and writes submission.csv."""
import pandas as pd
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import log_loss
from sklearn.model_selection import train_test_split
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

SEED = 0
VALID_FRACTION = 0.25   # share of the training rows held back to measure the log loss
C = 5.0                 # inverse strength of the regularisation
MAX_ITER = 200          # steps of the solver

train = pd.read_csv("data/train.csv")
test = pd.read_csv("data/test.csv")
features = [name for name in train.columns if name.startswith(("margin", "shape", "texture"))]
species = sorted(train["species"].unique())


def build_model():
    return make_pipeline(StandardScaler(), LogisticRegression(C=C, max_iter=MAX_ITER, random_state=SEED))


# every species has few rows, so the validation part is drawn species by species
fit, valid = train_test_split(train, test_size=VALID_FRACTION, random_state=SEED, stratify=train["species"])
model = build_model().fit(fit[features], fit["species"])
print(f"validation log loss: {log_loss(valid['species'], model.predict_proba(valid[features]), labels=species):.4f}")

model = build_model().fit(train[features], train["species"])
submission = pd.DataFrame(model.predict_proba(test[features]), columns=model.classes_)
submission.insert(0, "id", test["id"])
submission.to_csv("submission.csv", index=False)
