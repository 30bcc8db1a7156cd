"""Trains a classifier of passengers and writes submission.csv."""
import pandas as pd
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import train_test_split
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import PolynomialFeatures, StandardScaler

SEED = 1
VALID_FRACTION = 0.2    # share of the training rows held back to measure the accuracy
NUM_CATEGORIES = 4      # the first so many of CATEGORIES are used
POWER = 1.0             # what was spent is raised to this power
DEGREE = 1              # products of up to so many features count, too
C = 1.0                 # inverse strength of the regularisation
THRESHOLD = 0.5         # a passenger with a higher probability is taken to be transported
CATEGORIES = ["HomePlanet", "CryoSleep", "Destination", "VIP", "Deck", "Side"][:NUM_CATEGORIES]
NUMBERS = ["Age", "RoomService", "FoodCourt", "ShoppingMall", "Spa", "VRDeck"]


def load(path):
    """The rows of a file and their features: a column for each value of a category, and the numbers, 0 for blanks."""
    rows = pd.read_csv(path)
    rows["Deck"] = rows["Cabin"].str[0]
    rows["Side"] = rows["Cabin"].str[-1]
    features = pd.get_dummies(rows[CATEGORIES].astype(str), dtype=float).join(rows[NUMBERS].fillna(0))
    features[NUMBERS[1:]] = features[NUMBERS[1:]] ** POWER
    return rows, features


def build_model():
    return make_pipeline(StandardScaler(), PolynomialFeatures(DEGREE, include_bias=False),
                         LogisticRegression(C=C, max_iter=300, random_state=SEED))


def predict(model, features):
    return model.predict_proba(features)[:, 1] > THRESHOLD


train, x = load("data/train.csv")
test, x_test = load("data/test.csv")
x_test = x_test.reindex(columns=x.columns, fill_value=0.0)      # a value may be in one of the files only
y = train["Transported"].astype(bool)

x_fit, x_valid, y_fit, y_valid = train_test_split(x, y, test_size=VALID_FRACTION, random_state=SEED)
model = build_model().fit(x_fit, y_fit)
print(f"validation accuracy: {(predict(model, x_valid) == y_valid).mean():.4f}")

model = build_model().fit(x, y)
submission = pd.DataFrame({"PassengerId": test["PassengerId"], "Transported": predict(model, x_test)})
submission.to_csv("submission.csv", index=False)
