"""Spooky authors: which of three authors wrote a sentence.

Split, files and grader are MLE-bench's, to the byte.
"""
import random

import pandas as pd

from tasks import Task, log_loss, paired, raw_csv, split_rows, table_1, write_csv

AUTHORS = ["EAP", "HPL", "MWS"]
SAMPLE = {"EAP": 0.403493538995863, "HPL": 0.287808366106543, "MWS": 0.308698094897594}     # the publisher's


def prepare(raw, public, private, variant):
    """19579 labelled rows become 17621 to train on and 1958 to test on; the unlabelled ones are left out."""
    rows = raw_csv(raw, "train.csv", ["id", "text", "author"], dtype=str, keep_default_na=False)
    train, test = split_rows(rows, 0.1)
    write_csv(train, public / "train.csv")
    write_csv(test[["id", "text"]], public / "test.csv")
    write_csv(test[["id"]].assign(**SAMPLE), public / "sample_submission.csv")
    answers = test[["id"]].assign(**{name: (test["author"] == name).astype(int) for name in AUTHORS})
    write_csv(answers, private / "test.csv")


def score(answers, submission):
    return log_loss(*paired(answers, submission, "id", AUTHORS, extra=False, low=0, high=1, sum_to_one=True))


def miniature(raw, seed):
    """750 labelled sentences and 60 unlabelled ones, in zips.

    Each author prefers some templates and words, and with an adjective a noun. They also differ in how they punctuate
    and in how the names they invent end.
    """
    rng = random.Random(4)   # the authors are the same for every seed
    taste = {author: {kind: [rng.lognormvariate(0, 0.8) for _ in words] for kind, words in WORDS.items()}
             for author in AUTHORS}
    pairs = {author: {word: rng.choice(WORDS["NOUN"]) for word in WORDS["ADJ"]} for author in AUTHORS}
    rng = random.Random(seed)
    authors = rng.choices(AUTHORS, [0.4, 0.29, 0.31], k=810)
    texts = {}          # an ordered set
    for author in authors:
        while (text := _sentence(rng, author, taste[author], pairs[author])) in texts:
            pass
        texts[text] = None
    ids = [f"id{number:05d}" for number in rng.sample(range(1, 28000), 810)]
    rows = pd.DataFrame({"id": ids, "text": list(texts), "author": authors})
    test = rows[750:].drop(columns="author")
    tables = {"train": rows[:750], "test": test, "sample_submission": test[["id"]].assign(**SAMPLE)}
    for name, table in tables.items():
        write_csv(table, raw / f"{name}.zip", compression={"method": "zip", "archive_name": f"{name}.csv"})


def _sentence(rng, author, taste, pairs):
    ending, marks = HABITS[author]
    clauses = []
    for template in rng.choices(WORDS["TEMPLATE"], taste["TEMPLATE"], k=rng.choice([1, 2, 2, 3, 3, 4])):
        words = []
        for word in template.split():
            if word == "NOUN" and words[-1] in pairs and rng.random() < 0.6:
                words.append(pairs[words[-1]])
            else:
                words.append(rng.choices(WORDS[word], taste[word])[0] if word in WORDS else word)
        clauses.append(" ".join(words))
    text = clauses[0] + "".join(rng.choice(marks) + clause for clause in clauses[1:])
    if rng.random() < 0.45:
        name = rng.choice("BCDFGKLMNRSTVZ") + rng.choice(["a", "e", "i", "o", "u"]) + rng.choice("bdglmnrst")
        text += f" of {name}{rng.choice(ending)}"
    return text[0].upper() + text[1:] + "."


HABITS = {          # how invented names end, and what stands between clauses
    "EAP": (["ella", "onia", "ippe"], [", -- ", ", -- ", ", ", "; "]),
    "HPL": (["oth", "agga", "yth"], [", and ", ", and ", ", ", "; "]),
    "MWS": (["ert", "and", "ine"], ["; ", "; ", ", ", ", -- "]),
}
WORDS = {
    "TEMPLATE": """the ADJ NOUN VERB the NOUN|I VERB a NOUN which LINK ADJ|there LINK no NOUN in the ADJ NOUN
it LINK the NOUN that VERB my NOUN|my ADJ NOUN VERB ADV|upon the NOUN I VERB ADV|he VERB the ADJ NOUN
we VERB from the NOUN ADV|the NOUN of the NOUN LINK ADJ|a ADJ NOUN and a ADJ NOUN VERB me|this NOUN LINK ADV ADJ
her NOUN VERB the NOUN of my NOUN""".replace("\n", "|").split("|"),
    "NOUN": """heart night house sea grave shadow door friend father city dream voice hand eye stone window tower wind
soul chamber horror sorrow ship mountain cellar letter garden face lamp forest""".split(),
    "ADJ": """dark old strange pale gentle silent ancient dear bitter nameless singular cold wild lonely sweet hideous
noble grim dim faint""".split(),
    "VERB": """saw heard feared loved left found remembered touched entered beheld followed dreaded sought watched knew
crossed""".split(),
    "LINK": "was seemed became grew appeared remained".split(),
    "ADV": "slowly again alone suddenly forever scarcely indeed presently silently afar".split(),
}

TASK = Task(
    id="spooky-author-identification", metric="log loss", direction="down",
    split="held-out", source="MLE-bench", targets=tuple(AUTHORS),
    prepare=prepare, miniature=miniature, score=score,
    kaggle="train.zip", size="2 MB",
    m_init=0.4615,
    m_best=0.02467,
    m_best_miniature=0.219,    # logistic regression on runs of up to three words and character n-grams
    published=table_1((0.4515, 0.4285), (0.4660, 0.4285), (0.4443, 0.4285),
                      (0.4474, 0.4422), (0.4454, 0.4248), (0.4415, 0.4078)),
    gold=0.16506,
)
