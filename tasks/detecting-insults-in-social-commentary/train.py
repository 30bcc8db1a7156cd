"""Trains a classifier of comments on the words in them and writes submission.csv."""
import pandas as pd
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import accuracy_score
from sklearn.model_selection import train_test_split
from sklearn.pipeline import make_pipeline

SEED = 0
VALID_FRACTION = 0.2    # share of the training rows held back to measure the accuracy
MIN_COMMENTS = 2        # words found in fewer comments are left out
MIN_LETTERS = 2         # shorter words are left out
MAX_RUN = 1             # runs of up to so many words count, each as a word of its own
C = 0.5                 # inverse strength of the regularisation
INSULT_WEIGHT = 1.0     # how much an insult counts in training; another comment counts 1
WORD = rf"\b\w{{{MIN_LETTERS},}}\b"

train = pd.read_csv("data/train.csv")
test = pd.read_csv("data/test.csv")


def clean(comments):
    """The comments as the model reads them."""
    return comments.str.lower()


def build_model():
    words = TfidfVectorizer(min_df=MIN_COMMENTS, ngram_range=(1, MAX_RUN), token_pattern=WORD)
    return make_pipeline(words, LogisticRegression(C=C, class_weight={1: INSULT_WEIGHT}, max_iter=300,
                                                   random_state=SEED))


fit, valid = train_test_split(train, test_size=VALID_FRACTION, random_state=SEED)
model = build_model().fit(clean(fit["Comment"]), fit["Insult"])
print(f"validation accuracy: {accuracy_score(valid['Insult'], model.predict(clean(valid['Comment']))):.4f}")

model = build_model().fit(clean(train["Comment"]), train["Insult"])
submission = test[["Date", "Comment"]]
submission.insert(0, "Insult", model.predict_proba(clean(test["Comment"]))[:, 1])
submission.to_csv("submission.csv", index=False)
