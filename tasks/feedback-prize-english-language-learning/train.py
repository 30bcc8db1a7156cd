"""Trains a regression of six ratings on the words of an essay and writes submission.csv."""
import numpy as np
import pandas as pd
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import Ridge
from sklearn.model_selection import train_test_split
from sklearn.pipeline import make_pipeline

SEED = 0
VALID_FRACTION = 0.1    # share of the training rows held back to measure the error
MIN_LETTERS = 2         # shorter words are left out
MAX_RUN = 1             # runs of up to so many words count, each as a word of its own
ALPHA = 20.0            # strength of the regularisation
STRETCH = 1.0           # predictions are moved away from their mean by this factor
RATINGS = ["cohesion", "syntax", "vocabulary", "phraseology", "grammar", "conventions"]
WORD = rf"\b\w{{{MIN_LETTERS},}}\b"

train = pd.read_csv("data/train.csv")
test = pd.read_csv("data/test.csv")


def build_model():
    words = TfidfVectorizer(ngram_range=(1, MAX_RUN), token_pattern=WORD)
    return make_pipeline(words, Ridge(alpha=ALPHA, random_state=SEED))


def predict(model, texts):
    """Ratings (texts, six), none beyond 1 and 5."""
    ratings = model.predict(texts)
    mean = ratings.mean(axis=0)
    return np.clip(mean + STRETCH * (ratings - mean), 1, 5)


def mcrmse(truth, predicted):
    """The root mean squared error of each column, averaged over the columns."""
    return np.sqrt(((truth - predicted) ** 2).mean(axis=0)).mean()


fit, valid = train_test_split(train, test_size=VALID_FRACTION, random_state=SEED)
model = build_model().fit(fit["full_text"], fit[RATINGS])
print(f"validation MCRMSE: {mcrmse(valid[RATINGS].to_numpy(), predict(model, valid['full_text'])):.4f}")

model = build_model().fit(train["full_text"], train[RATINGS])
submission = pd.DataFrame(predict(model, test["full_text"]), columns=RATINGS)
submission.insert(0, "text_id", test["text_id"])
submission.to_csv("submission.csv", index=False)
