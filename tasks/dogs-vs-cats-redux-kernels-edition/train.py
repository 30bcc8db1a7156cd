"""Trains a small convolutional network to tell dogs from cats and writes submission.csv."""
import os

import numpy as np
import pandas as pd
import torch
import torch.nn as nn
import torch.nn.functional as F

try:
    from PIL import Image
except ImportError:
    raise SystemExit("This script reads JPEG files with pillow, which is not installed: pip install pillow")

SEED = 0
SIDE = 16               # the pictures are scaled to SIDE x SIDE pixels
VALID_FRACTION = 0.2    # share of the training pictures held back to measure the log loss
CHANNELS = 8            # of the first layer; each further layer has twice as many
EPOCHS = 6              # passes over the training pictures
BATCH_SIZE = 32
LEARNING_RATE = 0.005

torch.manual_seed(SEED)
torch.set_num_threads(1)                        # sums in one order, whatever the machine
torch.backends.cudnn.deterministic = True
device = "cuda" if torch.cuda.is_available() else "cpu"


def load(paths):
    """The pictures as uint8 (pictures, 3, SIDE, SIDE)."""
    pictures = torch.empty(len(paths), 3, SIDE, SIDE, dtype=torch.uint8)
    for i, path in enumerate(paths):
        with Image.open(path) as picture:
            picture.draft("RGB", (SIDE, SIDE))  # lets the decoder skip detail that scaling down would drop
            pixels = np.array(picture.convert("RGB").resize((SIDE, SIDE), Image.BILINEAR))
        pictures[i] = torch.from_numpy(pixels).permute(2, 0, 1)
    return pictures


def prepare(pictures):
    """What the network sees: float32 around 0."""
    return pictures.to(device).float() / 127.5 - 1


def build_model():
    return nn.Sequential(
        nn.Conv2d(3, CHANNELS, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(CHANNELS, 2 * CHANNELS, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(2 * CHANNELS, 4 * CHANNELS, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(2),
        nn.Flatten(), nn.Linear(16 * CHANNELS, 1)).to(device)


def fit(model, x, y):
    optimiser = torch.optim.Adam(model.parameters(), lr=LEARNING_RATE)
    for _ in range(EPOCHS):
        model.train()
        for batch in torch.randperm(len(x)).split(BATCH_SIZE):
            loss = F.binary_cross_entropy_with_logits(model(prepare(x[batch]))[:, 0], y[batch].to(device))
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()


@torch.no_grad()
def predict(model, x):
    """The probability of a dog for each picture."""
    model.eval()
    return torch.cat([torch.sigmoid(model(prepare(batch))[:, 0]).cpu() for batch in x.split(256)]).double()


names = sorted(os.listdir("data/train"))
x, y = load([f"data/train/{name}" for name in names]), torch.tensor([float("dog" in name) for name in names])
test = pd.read_csv("data/sample_submission.csv")
x_test = load([f"data/test/{id}.jpg" for id in test["id"]])

order = torch.randperm(len(x))
valid, train = order[:int(VALID_FRACTION * len(x))], order[int(VALID_FRACTION * len(x)):]
model = build_model()
fit(model, x[train], y[train])
print(f"validation log loss: {F.binary_cross_entropy(predict(model, x[valid]), y[valid].double()):.4f}")

test["label"] = predict(model, x_test).numpy()
test.to_csv("submission.csv", index=False)
