"""Trains a small convolutional network on images of ten classes and writes submission.csv."""
import numpy as np
import pandas as pd
import torch
from torch import nn
from torch.nn import functional as F

SEED = 0
VALID_FRACTION = 0.2    # share of the training images held back to measure the accuracy
EPOCHS = 5              # passes over the training images; at most 10 are allowed
BATCH_SIZE = 32
LEARNING_RATE = 0.015
MOMENTUM = 0.9

torch.manual_seed(SEED)
torch.set_num_threads(1)        # sums in one order, whatever the machine
device = "cuda" if torch.cuda.is_available() else "cpu"


def to_input(images):
    """Bytes (N, 32, 32, 3) as floats from -1 to 1 (N, 3, 32, 32)."""
    return torch.from_numpy(images).permute(0, 3, 1, 2).contiguous().float() / 127.5 - 1


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 6, 5)
        self.conv2 = nn.Conv2d(6, 16, 5)
        self.fc1 = nn.Linear(16 * 5 * 5, 120)
        self.fc2 = nn.Linear(120, 84)
        self.fc3 = nn.Linear(84, 10)

    def forward(self, x):
        x = F.max_pool2d(F.relu(self.conv1(x)), 2)
        x = F.max_pool2d(F.relu(self.conv2(x)), 2)
        x = F.relu(self.fc1(x.flatten(1)))
        x = F.relu(self.fc2(x))
        return self.fc3(x)


def predict(model, images):
    """Class probabilities (N, 10), on the CPU."""
    model.eval()
    with torch.no_grad():
        parts = np.array_split(images, len(images) // 500 + 1)
        return torch.cat([model(to_input(part).to(device)).softmax(1).cpu() for part in parts])


def train(images, labels):
    """A network trained on images (N, 32, 32, 3) with labels (N,)."""
    labels = torch.from_numpy(labels)
    model = Net().to(device)
    optimizer = torch.optim.SGD(model.parameters(), lr=LEARNING_RATE, momentum=MOMENTUM)
    for epoch in range(EPOCHS):
        model.train()
        total = 0.0
        for rows in torch.randperm(len(images)).split(BATCH_SIZE):
            x, y = to_input(images[rows.numpy()]).to(device), labels[rows].to(device)
            loss = F.cross_entropy(model(x), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            total += loss.item() * len(rows)
        print(f"epoch {epoch + 1}: training loss {total / len(images):.4f}", flush=True)
    return model


images = np.load("data/train_images.npy")
labels = pd.read_csv("data/train.csv")["label"].to_numpy()
order = np.random.default_rng(SEED).permutation(len(images))
valid, fit = np.split(order, [int(VALID_FRACTION * len(images))])

model = train(images[fit], labels[fit])
accuracy = (predict(model, images[valid]).argmax(1).numpy() == labels[valid]).mean()
print(f"validation accuracy: {accuracy:.4f}")

probabilities = predict(model, np.load("data/test_images.npy"))
submission = pd.DataFrame(probabilities.numpy(), columns=[str(k) for k in range(10)])
submission.insert(0, "id", np.arange(len(submission)))
submission.to_csv("submission.csv", index=False)
