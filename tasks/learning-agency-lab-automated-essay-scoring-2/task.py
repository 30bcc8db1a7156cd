"""Essay scoring: whole scores from 1 to 6 of essays by students.

Split, files and grader are MLE-bench's.
"""
import random

import numpy as np
import pandas as pd

from tasks import Task, misspelt, paired, qwk, raw_csv, split_rows, table_1, write_csv, write_tables


def prepare(raw, public, private, variant):
    """17307 labelled essays become 15576 to train on and 1731 to test on; the three unlabelled ones are left out."""
    rows = raw_csv(raw, "train.csv", ["essay_id", "full_text", "score"], dtype=str, keep_default_na=False)
    train, test = split_rows(rows, 0.1)
    drawn = np.random.RandomState(42).randint(1, 7, size=len(test))
    write_tables(public, train, test, score=drawn)
    write_csv(test, private / "answers.csv")


def score(answers, submission):
    """Scores outside 1 to 6 count as further classes."""
    truth, predicted = paired(answers, submission, "essay_id", ["score"], whole=True)
    return qwk(truth[:, 0], predicted[:, 0])


def miniature(raw, seed):
    """750 scored essays on five topics and three without a score.

    The better an essay, the longer it is, the richer its words, the more linked its sentences, the more its paragraphs
    and the fewer its slips of spelling and of capitals.
    """
    rng = random.Random(seed)
    scores = rng.choices(range(1, 7), [0.08, 0.25, 0.33, 0.22, 0.09, 0.03], k=753)
    ids = rng.sample(range(16 ** 7), 753)
    rows = pd.DataFrame({"essay_id": [f"{id:07x}" for id in ids], "full_text": [_essay(rng, s) for s in scores],
                         "score": scores})
    write_tables(raw, rows[:750], rows[750:], score=3)


def _essay(rng, score):
    topic = rng.choice(TOPICS)
    skill = {name: score + rng.gauss(0, 0.8) for name in ("words", "links", "spelling", "paragraphs")}
    num_sentences = max(3, round(2 + 2.2 * score + rng.gauss(0, 1.8)))
    text = ""
    for i in range(num_sentences):
        words = rng.choice(TEMPLATES).split()
        if rng.random() < 0.09 * skill["links"]:
            words = rng.choice(LINKS).split() + words
        for j, word in enumerate(words):
            if word == "TOPIC":
                word = rng.choice(topic)
            elif word in WORDS:
                plain, rich = WORDS[word]
                word = rng.choice(rich if rng.random() < 0.05 + 0.11 * skill["words"] else plain)
            words[j] = misspelt(rng, word) if len(word) > 3 and rng.random() < 0.2 - 0.032 * skill["spelling"] else word
        sentence = " ".join(words) + "."
        if rng.random() > 0.35 - 0.06 * skill["spelling"]:
            sentence = sentence[0].upper() + sentence[1:]
        text += sentence + ("\n\n" if rng.random() < 0.05 * skill["paragraphs"] else " ")
    return text.strip()


TOPICS = [topic.split() for topic in """cars traffic driving roads buses cities parking fuel
planets space rockets astronauts Venus probes orbits science
phones screens messages games students teachers classes homework
votes elections states voters presidents senators laws parties
faces computers emotions cameras muscles software feelings lessons""".split("\n")]
LINKS = """however,|in addition,|for example,|on the other hand,|therefore,|as a result,|first of all,
in conclusion,""".replace("\n", "|").split("|")
TEMPLATES = """I THINK that TOPIC are GOOD for the people|many people THINK that TOPIC HELP the TOPIC
the author SAY that TOPIC are BIG for our TOPIC|this is GOOD because TOPIC and TOPIC HELP us
we should HELP the TOPIC and not only TOPIC|when TOPIC are BAD the people THINK about it
there are MANY TOPIC in the world and they are BAD|some of the TOPIC SAY a BIG thing about TOPIC
it is BAD to have MANY TOPIC without TOPIC|my friends THINK the TOPIC HELP with TOPIC
the text SAY how MANY people HELP the TOPIC|a GOOD reason is that TOPIC are BIG""".replace("\n", "|").split("|")
WORDS = {           # plain words, and rich ones for the same
    "THINK": (["think", "feel", "say"], ["believe", "maintain", "argue", "acknowledge", "suspect"]),
    "GOOD": (["good", "nice", "great"], ["beneficial", "valuable", "advantageous", "convincing", "worthwhile"]),
    "BAD": (["bad", "wrong", "sad"], ["harmful", "detrimental", "problematic", "unfortunate", "questionable"]),
    "HELP": (["help", "make", "get"], ["support", "encourage", "strengthen", "improve", "facilitate"]),
    "SAY": (["say", "tell", "show"], ["demonstrate", "illustrate", "emphasize", "suggest", "indicate"]),
    "BIG": (["big", "huge", "important"], ["significant", "essential", "crucial", "considerable", "fundamental"]),
    "MANY": (["many", "lots of", "some"], ["numerous", "countless", "various", "several", "abundant"]),
}

TASK = Task(
    id="learning-agency-lab-automated-essay-scoring-2", metric="QWK",
    direction="up", split="held-out", source="MLE-bench", key="essay_id", targets=("score",),
    answers="answers.csv", prepare=prepare, miniature=miniature, score=score,
    kaggle="train.csv", size="36 MB",
    m_best=0.84128,
    m_best_miniature=0.8481,    # ridge regression on words and measures of form, stretched
    published=table_1((0.7422, 0.7545), (0.7464, 0.7615), (0.7386, 0.7441),
                      (0.7437, 0.7484), (0.7336, 0.7488), (0.7472, 0.7693)),
    gold=0.83583,
)
