"""Trains a regression of phrase similarity on the words of both phrases and writes submission.csv."""
import numpy as np
import pandas as pd
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import Ridge
from sklearn.model_selection import train_test_split

SEED = 0
VALID_FRACTION = 0.2    # share of the training rows held back to measure the correlation
MIN_ROWS = 1            # rows a word must be in to count
MIN_LETTERS = 2         # shorter words are left out
MAX_RUN = 1             # runs of up to so many words count, each as a word of its own
TARGET_TIMES = 1        # how often the target's words count; the anchor's and the context's count once
ALPHA = 1.0             # strength of the regularisation
WORD = rf"\b\w{{{MIN_LETTERS},}}\b"

train = pd.read_csv("data/train.csv")
test = pd.read_csv("data/test.csv")


def build_texts(rows):
    """One text a row: anchor, target and context side by side."""
    return rows["anchor"] + " " + (rows["target"] + " ") * TARGET_TIMES + rows["context"]


def build_model():
    return Ridge(alpha=ALPHA)


vectorizer = TfidfVectorizer(min_df=MIN_ROWS, ngram_range=(1, MAX_RUN), token_pattern=WORD)
x = vectorizer.fit_transform(build_texts(train))
x_test = vectorizer.transform(build_texts(test))
y = train["score"].to_numpy()

x_fit, x_valid, y_fit, y_valid = train_test_split(x, y, test_size=VALID_FRACTION, random_state=SEED)
predicted = build_model().fit(x_fit, y_fit).predict(x_valid)
print(f"validation Pearson correlation: {np.corrcoef(y_valid, predicted)[0, 1]:.4f}")

submission = pd.DataFrame({"id": test["id"], "score": build_model().fit(x, y).predict(x_test)})
submission.to_csv("submission.csv", index=False)
