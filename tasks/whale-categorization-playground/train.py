"""Names whales by the most similar pictures and writes submission.csv."""
import numpy as np
import pandas as pd

try:
    from PIL import Image
except ImportError:
    raise SystemExit("This script reads JPEG files with pillow, which is not installed: pip install pillow")

SEED = 0
WIDTH = 8               # the pictures are scaled to WIDTH x HEIGHT pixels
HEIGHT = 4
LIGHT = 1.0             # weight of a picture's mean brightness when pictures are compared
COLOUR = 1.0            # weight of its colours, beside its grey pixels
NEW_WHALE_PLACE = 1     # of new_whale among the five names
VALID_FRACTION = 0.05   # share of the training pictures held back to measure the MAP@5, besides one of every whale
                        # that has several: about one held back picture in eight then shows a whale that is new


def load(folder, names):
    """The pictures as numbers from 0 to 1, (pictures, HEIGHT, WIDTH, 3)."""
    pictures = np.empty((len(names), HEIGHT, WIDTH, 3), np.float32)
    for i, name in enumerate(names):
        with Image.open(f"data/{folder}/{name}") as picture:
            picture.draft("RGB", (4 * WIDTH, 4 * HEIGHT))   # lets the decoder skip detail that scaling down would drop
            pictures[i] = np.asarray(picture.convert("RGB").resize((WIDTH, HEIGHT), Image.BOX)) / 255
    return pictures


def features(pictures):
    """What pictures are compared by, (pictures, features)."""
    grey = pictures.mean(3, keepdims=True)
    light = grey.mean((1, 2), keepdims=True)
    return (grey - light + LIGHT * light + COLOUR * (pictures - grey)).reshape(len(pictures), -1)


def similarity(x, x_known):
    """How much each picture of x is like each known one, (pictures, known pictures)."""
    return 2 * x @ x_known.T - (x ** 2).sum(1)[:, None] - (x_known ** 2).sum(1)     # minus the squared distance


def predict(x, x_known, known_ids):
    """Five names for each picture: the whales on the most similar known pictures, and new_whale in its place."""
    predictions = []
    for row in similarity(x, x_known):
        nearest = known_ids[np.argsort(-row, kind="stable")[:50]]
        names = [name for name in dict.fromkeys(nearest) if name != "new_whale"]
        names.insert(NEW_WHALE_PLACE - 1, "new_whale")
        predictions.append(names[:5])
    return predictions


def map5(truths, predictions):
    """Mean of 1 / rank of the true name, 0 where it is not among the five."""
    return np.mean([1 / (names.index(truth) + 1) if truth in names else 0 for truth, names in zip(truths, predictions)])


train = pd.read_csv("data/train.csv")
test = pd.read_csv("data/sample_submission.csv")
x, ids = features(load("train", train["Image"])), train["Id"].to_numpy()
x_test = features(load("test", test["Image"]))

shuffled = train["Id"].sample(frac=1, random_state=SEED)
one_of_several = shuffled[shuffled.duplicated()].drop_duplicates()
valid = np.union1d(one_of_several.index, shuffled.index[:int(VALID_FRACTION * len(x))])
known = np.setdiff1d(shuffled.index, valid)
truths = np.where(np.isin(ids[valid], ids[known]), ids[valid], "new_whale")     # nobody can name a whale not seen yet
print(f"validation MAP@5: {map5(truths, predict(x[valid], x[known], ids[known])):.4f}")

test["Id"] = [" ".join(names) for names in predict(x_test, x, ids)]
test.to_csv("submission.csv", index=False)
