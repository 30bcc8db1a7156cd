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
C = 2.5                 # inverse strength of the regularisation

train = pd.read_csv("data/train.csv")
test = pd.read_csv("data/test.csv")


def build_model():
    words = TfidfVectorizer(min_df=MIN_SENTENCES)
    return make_pipeline(words, LogisticRegression(C=C, max_iter=300, random_state=SEED))


fit, valid = train_test_split(train, test_size=VALID_FRACTION, random_state=SEED)
model = build_model().fit(fit["text"], fit["author"])
print(f"validation log loss: {log_loss(valid['author'], model.predict_proba(valid['text'])):.4f}")

model = build_model().fit(train["text"], train["author"])
submission = pd.DataFrame(model.predict_proba(test["text"]), columns=model.classes_)
submission.insert(0, "id", test["id"])
submission.to_csv("submission.csv", index=False)
