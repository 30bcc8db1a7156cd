"""Trains a regression of house prices on some numeric features and writes submission.csv."""
import pandas as pd
from sklearn.ensemble import RandomForestRegressor
from sklearn.metrics import mean_absolute_error
from sklearn.model_selection import train_test_split

SEED = 1
VALID_FRACTION = 0.25   # share of the training rows held back to measure the error
NUM_FEATURES = 25       # the first so many of FEATURES are used
NUM_TREES = 50
MIN_LEAF = 1            # houses in a leaf at least
MAX_FEATURES = 1.0      # share of the features that a split chooses from
POWER = 1.0             # the trees learn the price raised to this power
FEATURES = [
    "MSSubClass", "LotArea", "OverallQual", "OverallCond", "YearBuilt", "YearRemodAdd", "1stFlrSF", "2ndFlrSF",
    "LowQualFinSF", "GrLivArea", "FullBath", "HalfBath", "BedroomAbvGr", "KitchenAbvGr", "TotRmsAbvGrd", "Fireplaces",
    "WoodDeckSF", "OpenPorchSF", "EnclosedPorch", "3SsnPorch", "ScreenPorch", "PoolArea", "MiscVal", "MoSold", "YrSold",
    "GarageCars", "TotalBsmtSF", "GarageArea", "BsmtFinSF1", "MasVnrArea", "LotFrontage", "BsmtUnfSF", "BsmtFullBath",
    "GarageYrBlt", "BsmtFinSF2", "BsmtHalfBath",
][:NUM_FEATURES]

train = pd.read_csv("data/train.csv")
test = pd.read_csv("data/test.csv")


def build_model():
    return RandomForestRegressor(NUM_TREES, min_samples_leaf=MIN_LEAF, max_features=MAX_FEATURES, random_state=SEED)


def predict(rows, others):
    """Prices of the houses `others` by a forest that learns from the houses `rows`."""
    model = build_model().fit(rows[FEATURES].fillna(0), rows["SalePrice"] ** POWER)
    return model.predict(others[FEATURES].fillna(0)) ** (1 / POWER)


fit, valid = train_test_split(train, test_size=VALID_FRACTION, random_state=SEED)
print(f"validation MAE: {mean_absolute_error(valid['SalePrice'], predict(fit, valid)):.1f}")

submission = pd.DataFrame({"Id": test["Id"], "SalePrice": predict(train, test)})
submission.to_csv("submission.csv", index=False)
