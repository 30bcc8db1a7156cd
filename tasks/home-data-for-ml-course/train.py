"""Trains a regression of house prices on some numeric features and writes submission.csv."""
import pandas as pd
from sklearn.ensemble import RandomForestRegressor
from sklearn.metrics import mean_absolute_error
from sklearn.model_selection import train_test_split

SEED = 1
VALID_FRACTION = 0.25   # share of the training rows held back to measure the error
NUM_TREES = 100
MAX_DEPTH = None        # levels of a tree; None: until its leaves are pure
FEATURES = [
    "MSSubClass", "LotArea", "OverallQual", "OverallCond", "YearBuilt", "YearRemodAdd", "1stFlrSF", "2ndFlrSF",
    "LowQualFinSF", "GrLivArea", "FullBath", "HalfBath", "BedroomAbvGr", "KitchenAbvGr", "TotRmsAbvGrd", "Fireplaces",
    "WoodDeckSF", "OpenPorchSF", "EnclosedPorch", "3SsnPorch", "ScreenPorch", "PoolArea", "MiscVal", "MoSold", "YrSold",
]

train = pd.read_csv("data/train.csv")
test = pd.read_csv("data/test.csv")


def build_model():
    return RandomForestRegressor(n_estimators=NUM_TREES, max_depth=MAX_DEPTH, random_state=SEED)


fit, valid = train_test_split(train, test_size=VALID_FRACTION, random_state=SEED)
model = build_model().fit(fit[FEATURES], fit["SalePrice"])
print(f"validation MAE: {mean_absolute_error(valid['SalePrice'], model.predict(valid[FEATURES])):.1f}")

model = build_model().fit(train[FEATURES], train["SalePrice"])
submission = pd.DataFrame({"Id": test["Id"], "SalePrice": model.predict(test[FEATURES])})
submission.to_csv("submission.csv", index=False)
