"""Trains a regression of essay scores on the words in them and writes submission.csv."""
import numpy as np
import pandas as pd
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import Ridge
from sklearn.metrics import cohen_kappa_score
from sklearn.model_selection import train_test_split
from sklearn.pipeline import make_pipeline

SEED = 0
VALID_FRACTION = 0.2    # share of the training rows held back to measure the kappa
MIN_ESSAYS = 3          # words found in fewer essays are left out
MIN_LETTERS = 2         # shorter words are left out
MAX_RUN = 1             # runs of up to so many words count, each as a word of its own
ALPHA = 2.0             # strength of the regularisation
STRETCH = 1.0           # predictions are moved away from their mean by this factor
WORD = rf"\b\w{{{MIN_LETTERS},}}\b"

train = pd.read_csv("data/train.csv")
test = pd.read_csv("data/test.csv")


def build_model():
    words = TfidfVectorizer(min_df=MIN_ESSAYS, ngram_range=(1, MAX_RUN), token_pattern=WORD)
    return make_pipeline(words, Ridge(alpha=ALPHA, random_state=SEED))


def to_scores(values):
    """Whole scores from 1 to 6 nearest to the values, which are moved away from their mean first."""
    values = values.mean() + STRETCH * (values - values.mean())
    return np.clip(np.round(values), 1, 6).astype(int)


fit, valid = train_test_split(train, test_size=VALID_FRACTION, random_state=SEED)
model = build_model().fit(fit["full_text"], fit["score"])
scores = to_scores(model.predict(valid["full_text"]))
print(f"validation QWK: {cohen_kappa_score(valid['score'], scores, weights='quadratic'):.4f}")

model = build_model().fit(train["full_text"], train["score"])
submission = pd.DataFrame({"essay_id": test["essay_id"], "score": to_scores(model.predict(test["full_text"]))})
submission.to_csv("submission.csv", index=False)
