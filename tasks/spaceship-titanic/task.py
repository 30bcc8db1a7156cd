"""Spaceship Titanic: which passengers were transported to another dimension, from 12 mixed features.

The default split is MLAgentBench's, the paper's source: by position, the last 20 % of the labelled rows are the test.
The ids name travel groups in order, so hardly a group is on both sides. The variant mle-bench is MLE-bench's shuffled
split, byte for byte. What differs from MLAgentBench: rows are matched by PassengerId, and the sample submission is one
of the test rows.
"""
import numpy as np
import pandas as pd

from tasks import InvalidSubmission, Task, accuracy, matched, raw_csv, show, split_rows, write_csv, write_tables

VALUES = {"true": True, "1": True, "1.0": True, "false": False, "0": False, "0.0": False}


def prepare(raw, public, private, variant):
    """8693 labelled rows become 6954 and 1739 (mle-bench: 7823 and 870); the unlabelled rows are left out."""
    rows = raw_csv(raw, "train.csv", ["PassengerId", "Transported"], dtype=str, keep_default_na=False)
    if variant == "mle-bench":
        train, test = split_rows(rows, 0.1)
    else:
        num_train = int(0.8 * len(rows))
        train, test = rows[:num_train], rows[num_train:]
    write_tables(public, train, test, Transported=False)
    write_csv(test, private / "test.csv")


def score(answers, submission):
    """Share of passengers that are right. True and False in any case, 1 and 0 are understood."""
    return accuracy(_truths(answers), _truths(matched(submission, answers, "PassengerId", ["Transported"])))


def _truths(table):
    values = [VALUES.get(text.strip().lower()) for text in table["Transported"]]
    if None in values:
        row = values.index(None)
        found = show(table["Transported"][row])
        raise InvalidSubmission(f"Row {row + 1} of column 'Transported' holds {found}; it must be True or False.")
    return values


def miniature(raw, seed):
    """3000 labelled passengers in groups of one to four, and 60 unlabelled ones.

    Sleepers are mostly transported. Money spent on comfort speaks against it, on food and shopping for it, both by
    about its root. Planet, deck, side and childhood matter too. 2 % of the cells are blank.
    """
    rng = np.random.default_rng(seed)
    n = 3060
    group, place = np.zeros(n, int), np.zeros(n, int)
    for i in range(1, n):
        together = rng.random() < 0.3 and place[i - 1] < 3
        group[i], place[i] = (group[i - 1], place[i - 1] + 1) if together else (group[i - 1] + 1, 0)
    planet, deck, side = (rng.choice(values, group[-1] + 1, p=p)[group] for values, p in (
        (["Earth", "Europa", "Mars"], [0.53, 0.26, 0.21]),
        (list("ABCDEFG"), [0.05, 0.12, 0.12, 0.08, 0.13, 0.25, 0.25]),
        (["P", "S"], [0.5, 0.5])))
    age, asleep = np.clip(rng.gamma(4, 7.5, n), 0, 79).astype(int), rng.random(n) < 0.3
    spends = ~asleep & (age >= 13)
    spent = {name: np.exp(rng.normal(5, 1.6, n)).astype(int) * (spends & (rng.random(n) < 0.65)) for name in SPENT_ON}
    odds = 3.5 * asleep + sum(sign * (spent[name] / 50) ** 0.5 for name, sign in SPENT_ON.items())
    odds += 2.0 * asleep * (planet == "Earth") - 2.0 * asleep * (side == "P")
    odds += 1.2 * (planet == "Europa") + 2.0 * np.isin(deck, ["B", "C", "G"]) + 1.2 * (side == "S") + 1.0 * (age < 13)
    odds += rng.logistic(0, 0.8, n)
    frame = pd.DataFrame({
        "PassengerId": [f"{g + 1:04d}_{p + 1:02d}" for g, p in zip(group, place)], "HomePlanet": planet,
        "CryoSleep": asleep.astype(str), "Cabin": [f"{d}/{g}/{s}" for d, g, s in zip(deck, group, side)],
        "Destination": rng.choice(["TRAPPIST-1e", "55 Cancri e", "PSO J318.5-22"], n, p=[0.7, 0.2, 0.1]),
        "Age": age.astype(float).astype(str), "VIP": (rng.random(n) < 0.03).astype(str),
        **{name: amount.astype(float).astype(str) for name, amount in spent.items()},
        "Name": [f"{rng.choice(FIRST)} {rng.choice(LAST)}" for _ in range(n)],
        "Transported": (odds > np.median(odds)).astype(str)})
    features = frame.columns[1:-1]
    frame[features] = frame[features].mask(rng.random((n, len(features))) < 0.02, "")
    write_tables(raw, frame[:3000], frame[3000:], Transported=False)


SPENT_ON = {"RoomService": -1, "FoodCourt": 1, "ShoppingMall": 1, "Spa": -1, "VRDeck": -1}     # and what it speaks for
FIRST = "Ada Bela Cora Dario Ennis Falk Gerd Hana Ivo Jule Kimo Lotta Mats Nira Orin".split()
LAST = "Arrow Birch Clover Dunes Ember Frost Grange Harrow Inlet Juniper Kestrel Larch Moor Nettle Osier".split()

TASK = Task(
    id="spaceship-titanic", metric="accuracy", direction="up",
    split="held-in", source="MLAgentBench", variants=("mlagentbench", "mle-bench"), key="PassengerId",
    targets=("Transported",), prepare=prepare, miniature=miniature, score=score,
    known_signal="PassengerId names travel groups, whose members often share their fate, as in the publisher's data",
    kaggle="train.csv", size="1 MB",
    m_init=0.78781,
    m_best=0.82815, m_best_source="first place of Kaggle's leaderboard",
    m_best_miniature=0.8767,    # logistic regression on square roots of the amounts, deck and side
    gold=0.82066,
)
