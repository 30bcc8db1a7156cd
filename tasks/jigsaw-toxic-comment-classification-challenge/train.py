"""Trains a classifier of comments for each of six kinds of toxicity and writes submission.csv."""
import numpy as np
import pandas as pd
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.model_selection import train_test_split

SEED = 0
VALID_FRACTION = 0.2    # share of the training rows held back to measure the AUC
MIN_COMMENTS = 1        # words found in fewer comments are left out
MIN_LETTERS = 2         # shorter words are left out
MAX_RUN = 1             # runs of up to so many words count, each as a word of its own
C = 1.0                 # inverse strength of the regularisation
TOXIC_WEIGHT = 1.0      # how much a comment with the label counts in training; one without it counts 1
LABELS = ["toxic", "severe_toxic", "obscene", "threat", "insult", "identity_hate"]
WORD = rf"\b\w{{{MIN_LETTERS},}}\b"


def load(path):
    """The rows of a file and their texts."""
    rows = pd.read_csv(path)
    return rows, rows["comment_text"].fillna("")


def build_model():
    return LogisticRegression(C=C, class_weight={1: TOXIC_WEIGHT}, solver="liblinear", random_state=SEED)


def predict(x_fit, y_fit, x):
    """Probabilities (rows of x, six), one model a label."""
    return np.stack([build_model().fit(x_fit, y_fit[:, k]).predict_proba(x)[:, 1] for k in range(len(LABELS))], 1)


train, texts = load("data/train.csv")
test, test_texts = load("data/test.csv")
vectorizer = TfidfVectorizer(min_df=MIN_COMMENTS, ngram_range=(1, MAX_RUN), token_pattern=WORD, max_features=20000,
                             sublinear_tf=True)
x = vectorizer.fit_transform(texts)
x_test = vectorizer.transform(test_texts)
y = train[LABELS].to_numpy()

x_fit, x_valid, y_fit, y_valid = train_test_split(x, y, test_size=VALID_FRACTION, random_state=SEED)
predicted = predict(x_fit, y_fit, x_valid)
aucs = [roc_auc_score(y_valid[:, k], predicted[:, k]) for k in range(len(LABELS)) if 0 < y_valid[:, k].mean() < 1]
print(f"validation AUC: {np.mean(aucs):.4f}")

submission = pd.DataFrame(predict(x, y, x_test), columns=LABELS)
submission.insert(0, "id", test["id"])
submission.to_csv("submission.csv", index=False)
