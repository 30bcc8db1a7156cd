"""Feedback on essays of English learners: six ratings of each essay.

The split is that of MLAgentBench's feedback: the rows shuffled with seed 42, the last 2 % are the test. What differs:
rows are matched by text_id, not by position, the sample submission is one of the test rows, and the starter is a real
model where MLAgentBench's predicts random numbers.
"""
import random

import numpy as np
import pandas as pd

from tasks import Task, mcrmse, misspelt, paired, raw_csv, share_of_test, table_1, write_csv, write_tables

RATINGS = ["cohesion", "syntax", "vocabulary", "phraseology", "grammar", "conventions"]


def prepare(raw, public, private, variant):
    """3911 rated essays become 3832 to train on and 79 to test on; the publisher's three unrated ones are left out."""
    rows = raw_csv(raw, "train.csv", ["text_id", "full_text", *RATINGS], dtype=str, keep_default_na=False)
    rows = rows.iloc[np.random.RandomState(42).permutation(len(rows))]
    num_train = int((1 - share_of_test(0.02, len(rows))) * len(rows))
    train, test = rows[:num_train], rows[num_train:]
    write_tables(public, train, test, **dict.fromkeys(RATINGS, 3.0))
    write_csv(test[["text_id", *RATINGS]], private / "answer.csv")


def score(answers, submission):
    return mcrmse(*paired(answers, submission, "text_id", RATINGS))


def miniature(raw, seed):
    """750 rated essays and three unrated ones.

    Cohesion shows in linking words, syntax in joined clauses, vocabulary in rich words, phraseology in which verb goes
    with which noun, grammar in agreement of subject and verb, conventions in spelling, capitals and full stops.
    """
    rng = random.Random(seed)
    rows = []
    for id in rng.sample(range(16 ** 12), 753):
        level = rng.gauss(3.1, 0.5)
        ratings = {name: min(5, max(1, round(2 * rng.gauss(level, 0.45)) / 2)) for name in RATINGS}
        rows.append({"text_id": f"{id:012X}", "full_text": _essay(rng, ratings), **ratings})
    rows = pd.DataFrame(rows).astype({name: float for name in RATINGS})
    write_tables(raw, rows[:750], rows[750:], **dict.fromkeys(RATINGS, 3.0))


def _essay(rng, ratings):
    """About 17 sentences; the better a side's rating, the likelier each choice is made the better way."""
    def well(side):
        return rng.random() < 0.22 * ratings[side] - 0.12       # 0.1 for a rating of 1, 0.98 for 5
    nouns = rng.choice(TOPICS)
    text = ""
    for i in range(rng.randint(14, 20)):
        clauses = [_clause(rng, nouns, well)]
        if well("syntax"):
            clauses.append(rng.choice(JOINTS) + " " + _clause(rng, nouns, well))
        words = " ".join(clauses).split()
        if well("cohesion") and rng.random() < 0.7:
            words = rng.choice(LINKS).split() + words
        words = [misspelt(rng, word) if len(word) > 4 and rng.random() < 0.4 and not well("conventions") else word
                 for word in words]
        sentence = " ".join(words)
        text += (sentence[0].upper() + sentence[1:] if well("conventions") else sentence)
        text += (". " if well("conventions") else " ") if i % 8 else ".\n\n"
    return text.strip()


def _clause(rng, nouns, well):
    right, wrong = rng.choice(PHRASES)
    subject, agreeing, clashing = rng.choice(SUBJECTS)
    plain, rich = rng.choice(ADJECTIVES)
    phrase = right if well("phraseology") else wrong
    verb = agreeing if well("grammar") else clashing
    return f"{subject} {verb} {phrase} about {rich if well('vocabulary') else plain} {rng.choice(nouns)}"


TOPICS = [topic.split() for topic in """sports teams games schools trainers matches
phones computers screens teachers lessons students
parents families homes children friends meals
jobs careers dreams plans managers offices""".split("\n")]
LINKS = ["however,", "for this reason,", "in addition,", "for example,", "first of all,", "in the end,", "therefore,"]
JOINTS = ["because", "although", "so that", "while", "whenever", "unless", "even if"]
SUBJECTS = [        # with a verb that agrees and one that does not
    ("my brother", "likes to", "like to"), ("many people", "want to", "wants to"), ("she", "has to", "have to"),
    ("they", "were able to", "was able to"), ("some students", "are going to", "is going to"),
    ("everybody", "needs to", "need to"), ("we", "try to", "tries to"), ("one of them", "is ready to", "are ready to"),
]
PHRASES = [         # as English speakers say it, and as they do not
    ("make a decision", "do a decision"), ("take a break", "make a break"), ("pay attention", "give attention"),
    ("have a conversation", "do a conversation"), ("do some research", "make some research"),
    ("reach an agreement", "arrive an agreement"), ("tell the truth", "say the truth"),
    ("ask questions", "do questions"),
]
ADJECTIVES = [      # plain and rich
    ("good", "beneficial"), ("big", "enormous"), ("bad", "harmful"), ("nice", "delightful"), ("many", "numerous"),
    ("hard", "demanding"), ("old", "traditional"), ("new", "contemporary"), ("fun", "entertaining"),
]

TASK = Task(
    id="feedback-prize-english-language-learning", metric="MCRMSE",
    direction="down", split="held-in", source="MLAgentBench", key="text_id",
    targets=tuple(RATINGS), answers="answer.csv", prepare=prepare, miniature=miniature, score=score,
    kaggle="train.csv", size="9 MB",
    m_init=0.63564,
    m_best=0.43, m_best_source="the winners' score in participants' reports of the Kaggle competition",
    m_best_miniature=0.4218,    # ridge regression on runs of up to three words and measures of form
    published=table_1((0.6735, 0.6116), (0.6273, 0.5783), (0.6211, 0.5940),
                      (0.6435, 0.6098), (0.6452, 0.5973), (0.5910, 0.5777)),
)
