"""Trains a classifier of sentences on the words in them and writes submission.csv."""
import pandas as pd
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import log_loss
from sklearn.model_selection import train_test_split
from sklearn.pipeline import make_pipeline

SEED = 0
VALID_FRACTION = 0.2    # share of the training rows held back to measure the log loss
MIN_SENTENCES = 1       # words found in fewer sentences are left out
MIN_LETTERS = 2         # shorter words are left out
MAX_RUN = 1             # runs of up to so many words count, each as a word of its own
C = 2.5                 # inverse strength of the regularisation
SHARPNESS = 1.0         # the probabilities are raised to this power
WORD = rf"\b\w{{{MIN_LETTERS},}}\b"

train = pd.read_csv("data/train.csv")
test = pd.read_csv("data/test.csv")


def build_model():
    words = TfidfVectorizer(min_df=MIN_SENTENCES, ngram_range=(1, MAX_RUN), token_pattern=WORD)
    return make_pipeline(words, LogisticRegression(C=C, max_iter=300, random_state=SEED))


def predict(model, texts):
    """Probabilities (texts, authors) that sum to one for each text."""
    chances = model.predict_proba(texts) ** SHARPNESS
    return chances / chances.sum(axis=1, keepdims=True)


fit, valid = train_test_split(train, test_size=VALID_FRACTION, random_state=SEED)
model = build_model().fit(fit["text"], fit["author"])
print(f"validation log loss: {log_loss(valid['author'], predict(model, valid['text'])):.4f}")

model = build_model().fit(train["text"], train["author"])
submission = pd.DataFrame(predict(model, test["text"]), columns=model.classes_)
submission.insert(0, "id", test["id"])
submission.to_csv("submission.csv", index=False)
