"""Trains a classifier of passengers and writes submission.csv."""
import pandas as pd
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import train_test_split
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

SEED = 1
VALID_FRACTION = 0.2    # share of the training rows held back to measure the accuracy
C = 1.0                 # inverse strength of the regularisation
CATEGORIES = ["HomePlanet", "CryoSleep", "Destination", "VIP"]
NUMBERS = ["Age", "RoomService", "FoodCourt", "ShoppingMall", "Spa", "VRDeck"]


def load(path):
    """The rows of a file and their features: a column for each value of a category, and the numbers, 0 for blanks."""
    rows = pd.read_csv(path)
    features = pd.get_dummies(rows[CATEGORIES].astype(str), dtype=float).join(rows[NUMBERS].fillna(0))
    return rows, features


def build_model():
    return make_pipeline(StandardScaler(), LogisticRegression(C=C, random_state=SEED))


train, x = load("data/train.csv")
test, x_test = load("data/test.csv")
x_test = x_test.reindex(columns=x.columns, fill_value=0.0)      # a value may be in one of the files only
y = train["Transported"].astype(bool)

x_fit, x_valid, y_fit, y_valid = train_test_split(x, y, test_size=VALID_FRACTION, random_state=SEED)
model = build_model().fit(x_fit, y_fit)
print(f"validation accuracy: {model.score(x_valid, y_valid):.4f}")

model = build_model().fit(x, y)
submission = pd.DataFrame({"PassengerId": test["PassengerId"], "Transported": model.predict(x_test)})
submission.to_csv("submission.csv", index=False)
