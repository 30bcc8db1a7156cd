"""Trains a classifier of forest cover on all columns and writes submission.csv."""
import numpy as np
import pandas as pd
from sklearn.model_selection import train_test_split
from sklearn.neural_network import MLPClassifier
from sklearn.preprocessing import StandardScaler

SEED = 0
VALID_FRACTION = 0.1    # share of the training rows held back to measure the accuracy
HIDDEN = 64             # units of the first hidden layer
HIDDEN_2 = 32           # and of the second
LEARNING_RATE = 1e-3
BATCH_SIZE = 512        # rows a step
EPOCHS = 100            # passes over the rows at most; fewer when the loss has stopped to fall


def load(path):
    """The rows of a file and their features as a float32 array; there can be millions of rows, so no more copies."""
    rows = pd.read_csv(path, dtype="int32")
    features = rows.drop(columns=["Id", "Cover_Type"], errors="ignore")
    x = np.empty(features.shape, "float32")
    for k, name in enumerate(features):
        x[:, k] = features[name]
    return rows, x


def build_model(num_rows):
    return MLPClassifier((HIDDEN, HIDDEN_2), learning_rate_init=LEARNING_RATE, batch_size=min(BATCH_SIZE, num_rows),
                         max_iter=EPOCHS, tol=1e-3, n_iter_no_change=2, random_state=SEED)


rows, x = load("data/train.csv")
y = rows["Cover_Type"].to_numpy(copy=True)
del rows
scaler = StandardScaler(copy=False)
x = scaler.fit_transform(x)

x_fit, x_valid, y_fit, y_valid = train_test_split(x, y, test_size=VALID_FRACTION, random_state=SEED)
model = build_model(len(x_fit)).fit(x_fit, y_fit)
print(f"validation accuracy: {model.score(x_valid, y_valid):.4f}")

test, x_test = load("data/test.csv")
submission = pd.DataFrame({"Id": test["Id"], "Cover_Type": model.predict(scaler.transform(x_test))})
submission.to_csv("submission.csv", index=False)
