"""House prices in Ames, Iowa, from 79 mixed features.

The split is that of MLAgentBench's house-price: by position, the last 20 % of the labelled rows are the test. What
differs:
- The publisher's .gz copies are not shown, because train.csv.gz holds the prices of the test rows.
- The sample submission is one of the test rows, not the publisher's own for other rows.
- Rows are matched by Id, not by position.
- Cells stay as the publisher wrote them: MLAgentBench leaves "NA" blank.
"""
import numpy as np
import pandas as pd

from tasks import Task, copy_raw, mae, paired, raw_csv, share_of_test, table_1, write_csv, write_tables


def prepare(raw, public, private, variant):
    """1460 labelled rows become 1168 to train on and 292 to test on, in their order; the unlabelled rows are left out.
    """
    rows = raw_csv(raw, "train.csv", ["Id", "SalePrice"], dtype=str, keep_default_na=False)
    num_train = int((1 - share_of_test(0.2, len(rows))) * len(rows))
    train, test = rows[:num_train], rows[num_train:]
    write_tables(public, train, test, SalePrice=pd.to_numeric(train["SalePrice"]).mean().round())
    copy_raw(raw, "data_description.txt", public / "data_description.txt")
    write_csv(test[["Id", "SalePrice"]], private / "test.csv")


def score(answers, submission):
    return mae(*paired(answers, submission, "Id", ["SalePrice"]))


def miniature(raw, seed):
    """750 labelled houses and 60 without a price, as CSV files and gzip copies of them. The price is a product of
    effects and 6 % noise; the columns that are not in it say nothing."""
    rng = np.random.default_rng(seed)
    n = 810
    house = {name: rng.choice(values.split("|"), n, p=_weights(values)) for name, values in CATEGORIES.items()}
    area = np.exp(rng.normal(7.25, 0.3, n)).astype(int)
    quality = np.clip(rng.normal(6, 1.4, n).round(), 1, 10).astype(int)
    built = np.clip(2010 - rng.gamma(1.6, 24, n), 1872, 2010).astype(int)
    second = (area * rng.uniform(0.35, 0.55, n)).astype(int) * (house["HouseStyle"] == "2Story")
    basement = ((area - second) * rng.uniform(0.5, 1.1, n)).astype(int) * (rng.random(n) >= 0.04)
    finished = (basement * rng.beta(0.7, 0.9, n)).astype(int)
    cars = np.clip(rng.normal(1.8, 0.8, n).round(), 0, 4).astype(int)
    lot = np.exp(rng.normal(9.1, 0.4, n)).astype(int)
    fireplaces = rng.choice([0, 1, 2], n, p=[0.47, 0.45, 0.08])
    baths = 1 + (rng.random(n) < area / 3000).astype(int)
    places = CATEGORIES["Neighborhood"].split("|")
    worth = dict(zip(places, rng.permutation(np.linspace(-0.28, 0.28, len(places)))))
    kitchen = pd.Series(house["KitchenQual"]).map({"Ex": 2, "Gd": 1, "TA": 0, "Fa": -1}).to_numpy()
    log_price = (11.1 + 0.5 * np.log(area / 1400) + 0.085 * quality - 0.0022 * (2010 - built) + 0.00016 * basement
                 + 0.00007 * finished + 0.05 * cars + 0.04 * fireplaces + 0.09 * np.log(lot / 9000) + 0.06 * kitchen
                 + 0.03 * (house["CentralAir"] == "Y") + np.array([worth[place] for place in house["Neighborhood"]])
                 + rng.normal(0, 0.06, n))
    house |= {
        "Id": np.arange(1, n + 1), "LotArea": lot, "OverallQual": quality, "YearBuilt": built, "GrLivArea": area,
        "1stFlrSF": area - second, "2ndFlrSF": second, "BsmtFinSF1": finished, "BsmtUnfSF": basement - finished,
        "TotalBsmtSF": basement, "FullBath": baths, "Fireplaces": fireplaces, "GarageCars": cars,
        "TotRmsAbvGrd": area // 260 + 1, "GarageYrBlt": np.where(cars > 0, built.astype(str), "NA"),
        "LotFrontage": np.where(rng.random(n) < 0.18, "NA", np.sqrt(lot).astype(int).astype(str)),
        "YearRemodAdd": np.maximum(1950, built + (rng.random(n) < 0.4) * rng.integers(0, 2011 - built)),
        "GarageArea": cars * rng.integers(220, 300, n), "MSSubClass": rng.choice([20, 30, 50, 60, 120, 160], n),
        "OverallCond": rng.integers(3, 9, n), "HalfBath": rng.integers(0, 2, n), "BedroomAbvGr": rng.integers(1, 5, n),
        "BsmtFullBath": rng.integers(0, 2, n), "KitchenAbvGr": np.ones(n, int), "MoSold": rng.integers(1, 13, n),
        "YrSold": rng.integers(2006, 2011, n), "BsmtHalfBath": (rng.random(n) < 0.05).astype(int),
        "SalePrice": (np.exp(log_price) / 100).astype(int) * 100}
    for name, share in EXTRAS.items():
        house[name] = (rng.random(n) < share) * rng.integers(20, 400, n)
    frame = pd.DataFrame(house)[COLUMNS]
    unlabelled = frame[750:].drop(columns="SalePrice")
    sample = unlabelled[["Id"]].assign(SalePrice=180000.5)
    tables = {"train": frame[:750], "test": unlabelled, "sample_submission": sample}
    for name, table in tables.items():
        write_csv(table, raw / f"{name}.csv")
        write_csv(table, raw / f"{name}.csv.gz", compression={"method": "gzip", "mtime": 0})
    described = [f"{name}: one of {CATEGORIES[name].replace('|', ', ')}" if name in CATEGORIES else f"{name}: a number"
                 for name in COLUMNS[1:-1]]
    (raw / "data_description.txt").write_text("\n\n".join(described) + "\n")


def _weights(values):
    """Probabilities of the values of a category, the first the most likely."""
    weights = 1.0 / np.arange(1, values.count("|") + 2)
    return weights / weights.sum()


COLUMNS = """Id MSSubClass MSZoning LotFrontage LotArea Street Alley LotShape LandContour Utilities LotConfig LandSlope
Neighborhood Condition1 Condition2 BldgType HouseStyle OverallQual OverallCond YearBuilt YearRemodAdd RoofStyle
RoofMatl Exterior1st Exterior2nd MasVnrType MasVnrArea ExterQual ExterCond Foundation BsmtQual BsmtCond
BsmtExposure BsmtFinType1 BsmtFinSF1 BsmtFinType2 BsmtFinSF2 BsmtUnfSF TotalBsmtSF Heating HeatingQC CentralAir
Electrical 1stFlrSF 2ndFlrSF LowQualFinSF GrLivArea BsmtFullBath BsmtHalfBath FullBath HalfBath BedroomAbvGr
KitchenAbvGr KitchenQual TotRmsAbvGrd Functional Fireplaces FireplaceQu GarageType GarageYrBlt GarageFinish
GarageCars GarageArea GarageQual GarageCond PavedDrive WoodDeckSF OpenPorchSF EnclosedPorch 3SsnPorch ScreenPorch
PoolArea PoolQC Fence MiscFeature MiscVal MoSold YrSold SaleType SaleCondition SalePrice""".split()

EXTRAS = {          # square feet or dollars of what only some houses have, and the share that do
    "MasVnrArea": 0.5, "WoodDeckSF": 0.5, "OpenPorchSF": 0.5, "BsmtFinSF2": 0.05, "LowQualFinSF": 0.05,
    "EnclosedPorch": 0.05, "3SsnPorch": 0.05, "ScreenPorch": 0.05, "PoolArea": 0.05, "MiscVal": 0.05,
}

CATEGORIES = {      # the values of each category, the most frequent first
    "MSZoning": "RL|RM|FV|RH|C (all)", "Street": "Pave|Grvl", "Alley": "NA|Grvl|Pave", "LotShape": "Reg|IR1|IR2|IR3",
    "LandContour": "Lvl|Bnk|HLS|Low", "Utilities": "AllPub|NoSeWa", "LotConfig": "Inside|Corner|CulDSac|FR2|FR3",
    "LandSlope": "Gtl|Mod|Sev",
    "Neighborhood": "NAmes|CollgCr|OldTown|Edwards|Somerst|Gilbert|NridgHt|Sawyer|NWAmes|Crawfor|Mitchel|NoRidge",
    "Condition1": "Norm|Feedr|Artery|RRAn|PosN", "Condition2": "Norm|Feedr|Artery",
    "BldgType": "1Fam|TwnhsE|Duplex|Twnhs|2fmCon", "HouseStyle": "1Story|2Story|1.5Fin|SLvl|SFoyer",
    "RoofStyle": "Gable|Hip|Flat|Gambrel", "RoofMatl": "CompShg|Tar&Grv|WdShngl",
    "Exterior1st": "VinylSd|HdBoard|MetalSd|Wd Sdng|Plywood|BrkFace",
    "Exterior2nd": "VinylSd|MetalSd|HdBoard|Wd Sdng|Plywood|Wd Shng", "MasVnrType": "None|BrkFace|Stone|BrkCmn|NA",
    "ExterQual": "TA|Gd|Ex|Fa", "ExterCond": "TA|Gd|Fa|Ex", "Foundation": "PConc|CBlock|BrkTil|Slab",
    "BsmtQual": "TA|Gd|Ex|NA|Fa", "BsmtCond": "TA|Gd|Fa|NA", "BsmtExposure": "No|Av|Gd|Mn|NA",
    "BsmtFinType1": "Unf|GLQ|ALQ|BLQ|Rec|LwQ|NA", "BsmtFinType2": "Unf|Rec|LwQ|NA|BLQ", "Heating": "GasA|GasW|Grav",
    "HeatingQC": "Ex|TA|Gd|Fa", "CentralAir": "Y|N", "Electrical": "SBrkr|FuseA|FuseF|NA",
    "KitchenQual": "TA|Gd|Ex|Fa", "Functional": "Typ|Min2|Min1|Mod|Maj1", "FireplaceQu": "NA|Gd|TA|Fa|Ex|Po",
    "GarageType": "Attchd|Detchd|BuiltIn|NA|Basment", "GarageFinish": "Unf|RFn|Fin|NA", "GarageQual": "TA|NA|Fa|Gd",
    "GarageCond": "TA|NA|Fa|Gd", "PavedDrive": "Y|N|P", "PoolQC": "NA|Gd|Ex|Fa", "Fence": "NA|MnPrv|GdPrv|GdWo|MnWw",
    "MiscFeature": "NA|Shed|Gar2|Othr", "SaleType": "WD|New|COD|ConLD|CWD",
    "SaleCondition": "Normal|Partial|Abnorml|Family",
}

TASK = Task(
    id="home-data-for-ml-course", metric="MAE", direction="down",
    split="held-in", source="MLAgentBench", key="Id",
    prepare=prepare, miniature=miniature, score=score,
    kaggle="train.csv and data_description.txt", size="1 MB",
    m_init=21895.0,
    m_best=15520.7,
    m_best_source="measured: boosting of the log price on all columns, 2000 trees of depth 4, Huber loss",
    m_best_miniature=7988.0,    # lasso of the log price on all features, sizes by their logarithm
    published=table_1((21626, 21412), (21134, 20440), (20671, 19905), (20850, 20441), (20929, 20234), (20209, 18440)),
)
