"""Phrase matching in patents: how alike two phrases are in meaning. Split, files and grader are MLE-bench's, to the
byte.

A constant prediction, such as the sample submission, has no correlation and is refused; MLE-bench gives it NaN.
"""
import numpy as np
import pandas as pd

from tasks import Task, paired, pearson, raw_csv, split_rows, table_1, write_csv, write_tables


def prepare(raw, public, private, variant):
    """36,473 labelled pairs become 32,825 and 3648; the publisher's own unlabelled ones are left out.

    The same anchor may be on both sides.
    """
    rows = raw_csv(raw, "train.csv", ["id", "anchor", "target", "score"])
    train, test = split_rows(rows, 0.1)
    write_tables(public, train, test, score=0)
    write_csv(test, private / "test.csv")


def score(answers, submission):
    truth, predicted = paired(answers, submission, "id", ["score"])
    return pearson(truth[:, 0], predicted[:, 0])


def miniature(raw, seed):
    """750 labelled pairs of 20 anchors, and 36 unlabelled ones.

    An anchor is a quality and a thing. Targets that say the same in another form score 1, with a synonym of one word
    0.75, of a wider or narrower kind 0.5, with one word in common 0.25, of other things 0. One in seven scores is a
    step off.
    """
    rng = np.random.default_rng(seed)
    qualities, things = ([group.split("/") for group in text.split()] for text in (QUALITIES, THINGS))
    pairs = rng.permutation(len(qualities) * len(things))[:20]
    anchors = [(pair // len(things), pair % len(things)) for pair in pairs]
    contexts = rng.choice(CONTEXTS, 20)
    seen, rows = set(), []
    while len(rows) < 786:
        k, level = rng.integers(20), rng.choice(5, p=[0.2, 0.3, 0.3, 0.12, 0.08])
        target = _target(rng, *anchors[k], level, qualities, things)
        if (k, target) in seen:
            continue
        seen.add((k, target))
        level = np.clip(level + rng.choice([-1, 0, 1], p=[0.07, 0.86, 0.07]), 0, 4)
        anchor = f"{qualities[anchors[k][0]][0]} {things[anchors[k][1]][0]}"
        rows.append([f"{rng.integers(1 << 62):016x}", anchor, target, contexts[k], level / 4])
    frame = pd.DataFrame(rows, columns=["id", "anchor", "target", "context", "score"])
    write_tables(raw, frame[:750], frame[750:], score=0)


def _target(rng, quality, thing, level, qualities, things):
    """A phrase that is as near to the anchor as level says, from 0 to 4."""
    def other(groups, one):
        return (one + rng.integers(1, len(groups))) % len(groups)
    def word(group, same=False):
        return group[0] if same else group[rng.integers(len(group))]
    if level == 0:
        phrase = [word(qualities[other(qualities, quality)]), word(things[other(things, thing)])]
    elif level == 1:
        phrase = [word(qualities[quality], True), word(things[other(things, thing)])] if rng.random() < 0.6 else [
            word(qualities[other(qualities, quality)]), word(things[thing], True)]
    elif level == 2:
        wider = [word(qualities[quality], True), rng.choice(WIDER)]
        narrower = [rng.choice(NARROWER), word(qualities[quality]), word(things[thing])]
        phrase = wider if rng.random() < 0.5 else narrower
    elif level == 3:
        synonyms = [[word(qualities[quality], True), word(things[thing][1:])],
                    [word(qualities[quality][1:]), word(things[thing], True)]]
        phrase = synonyms[rng.integers(2)]
    else:
        phrase = [word(qualities[quality], True), word(things[thing], True)]
        phrase = phrase[::-1] if rng.random() < 0.3 else phrase
    ending = rng.choice(["", "s", " of the", " for use"]) if level == 4 else rng.choice(["", "", "", "s", " thereof"])
    return " ".join([*rng.choice(["a", "the", "said"], int(rng.random() < 0.2)), *phrase]) + ending


# a word and its synonyms
QUALITIES = """optical/photonic/lightwave thermal/heat/caloric hydraulic/fluidic/liquid flexible/pliable/bendable
rotating/revolving/spinning wireless/radio/cordless magnetic/ferrous/magnetised porous/perforated/permeable
insulating/dielectric/nonconductive adhesive/sticky/bonding"""
THINGS = """sensor/detector/probe valve/stopcock/gate container/vessel/receptacle cable/cord/wire fastener/clip/clamp
blade/cutter/knife filter/strainer/sieve display/screen/monitor pump/compressor/impeller coating/layer/film
bearing/bushing/journal housing/casing/enclosure"""
WIDER = ["device", "apparatus", "unit", "component", "system", "means"]
NARROWER = ["miniature", "dual", "portable", "annular", "coaxial", "disposable"]
CONTEXTS = ["A47", "B01", "B29", "C08", "F16", "G01", "G06", "H01", "H04"]

TASK = Task(
    id="us-patent-phrase-to-phrase-matching", metric="Pearson correlation",
    direction="up", split="held-out", source="MLE-bench", targets=("score",), prepare=prepare,
    miniature=miniature, score=score,
    kaggle="train.csv", size="2 MB",
    m_init=0.475,
    m_best=0.8782,
    m_best_miniature=0.7796,    # ridge regression on words, pairs of words, words in common and letters in common
    published=table_1((0.4700, 0.4859), (0.4725, 0.4908), (0.4695, 0.4905),
                      (0.4882, 0.5599), (0.4651, 0.4813), (0.5117, 0.5791)),
    gold=0.87,
)
