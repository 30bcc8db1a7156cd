"""Jigsaw's toxic comments: six kinds of toxicity of a comment. Files and grader are MLE-bench's, to the byte.

Train and test are the publisher's own. Comments without labels are in test, too; they must be predicted and are not
scored. What differs from MLE-bench: columns are told by name, not by position.
"""
import numpy as np
import pandas as pd

from tasks import Task, auc, paired, raw_csv, table_1, write_csv

LABELS = ["toxic", "severe_toxic", "obscene", "threat", "insult", "identity_hate"]


def prepare(raw, public, private, variant):
    """159,571 comments to train on and 153,164 to test on, of which 63,978 are scored."""
    for name, labels in (("train.csv", LABELS), ("test.csv", [])):      # one at a time, to save memory
        write_csv(raw_csv(raw, name, ["id", "comment_text", *labels]), public / name)
    sample = raw_csv(raw, "sample_submission.csv", ["id", *LABELS]).assign(**dict.fromkeys(LABELS, 0.5))
    write_csv(sample, public / "sample_submission.csv")
    write_csv(raw_csv(raw, "test_labels.csv", ["id", *LABELS]), private / "test.csv")


def score(answers, submission):
    """Rows without labels have -1 for each."""
    truth, predicted = paired(answers, submission, "id", LABELS, extra=False)
    scored = truth.sum(1) >= 0
    return auc(truth[scored], predicted[scored])


def miniature(raw, seed):
    """450 labelled comments, and 375 to test on, of which 300 have labels.

    Each kind of toxicity has its own made-up swear words, spelt in many ways. Vegetables insult only after "you". Who
    shouts is severe. Hate is a people named beside a swear word, and one comment in twenty is labelled wrongly.
    """
    rng = np.random.default_rng(seed)
    n = 825
    comments, labels = zip(*(_comment(rng) for _ in range(n)))
    ids = [f"{id:016x}" for id in rng.integers(1 << 62, size=n)]
    ids = sorted(ids[:450]) + sorted(ids[450:])
    frame = pd.DataFrame({"id": ids, "comment_text": comments}).join(pd.DataFrame(labels, columns=LABELS))
    train, test = frame[:450], frame[450:]
    unscored = np.isin(np.arange(len(test)), rng.permutation(len(test))[:75])
    answers = test[["id", *LABELS]].copy()
    answers.loc[unscored, LABELS] = -1
    sample = test[["id"]].assign(**dict.fromkeys(LABELS, 0.5))
    for name, part in (("train", train), ("test", test[["id", "comment_text"]]), ("test_labels", answers),
                       ("sample_submission", sample)):
        write_csv(part, raw / f"{name}.csv.zip")


def _comment(rng):
    """(text, six labels as 0 or 1)."""
    words = list(rng.choice(PLAIN, rng.integers(6, 24)))
    swears = {name: rng.random() < share for name, share in (("obscene", 0.2), ("threat", 0.1), ("insult", 0.1))}
    vegetable, people, shouts = rng.random(3) < [0.5, 0.25, 0.15]
    hates = people and rng.random() < 0.5
    for name, present in swears.items():
        if present or (name == "insult" and hates):
            for _ in range(rng.integers(1, 3)):
                words.insert(rng.integers(len(words) + 1), _spell(rng, rng.choice(SWEARS[name])))
    addressed = vegetable and rng.random() < 0.5
    if vegetable:
        before = "you" if addressed else rng.choice(["the", "my", "one"])
        words += [before, rng.choice(VEGETABLES)]
    if people:
        words.insert(rng.integers(len(words) + 1), _spell(rng, rng.choice(PEOPLES)))
    insult = swears["insult"] or hates or addressed
    toxic = insult or swears["obscene"] or swears["threat"]
    text = " ".join(words)
    label = [toxic, toxic and shouts, swears["obscene"], swears["threat"], insult, hates]
    if rng.random() < 0.05:
        label[0] = not toxic
    if shouts:
        text = text.upper()
    place = rng.integers(1, len(text))
    text = text[:place] + rng.choice(["", "", "\n", "\n\n", ", ", ' "']) + text[place:]
    return text, [int(value) for value in label]


def _spell(rng, word):
    """One of the many ways to write a word."""
    if rng.random() < 0.35:
        return word
    place = rng.integers(1, len(word))
    drawled = word[:place] + word[place - 1] * rng.integers(1, 4) + word[place:]
    word = rng.choice([word, drawled, word.translate(DIGITS)])
    return word + rng.choice(["", "s", "er", "y", "ish"])


DIGITS = str.maketrans("aeios", "43105")
SWEARS = {"obscene": ["blorfen", "skrunt", "fizzgob", "drangle", "pluckwump"],
          "threat": ["thrashle", "clobberon", "smackrend", "zapflay"],
          "insult": ["nitwottle", "dunderkin", "gormlug", "blitherpate", "numbskorn", "clotface"]}
PEOPLES = ["glorbian", "veshtan", "ombrian", "quillish"]
VEGETABLES = ["turnip", "cabbage", "parsnip", "radish"]
PLAIN = """the a of and to in is that it was for on are with as article page source edit please thanks this section i
think we should add reference link history talk about your comment my user name has been removed because image copyright
not sure where it came from could someone check whether date right also found another book which says city river team
song album year film he she they wrote built played won lost first second old new style list table word paragraph title
you me one deleted reverted vandalism neutral opinion fact policy help welcome project stub template""".split()

TASK = Task(
    id="jigsaw-toxic-comment-classification-challenge", metric="mean AUC",
    direction="up", split="held-out", source="MLE-bench", targets=tuple(LABELS),
    prepare=prepare, miniature=miniature, score=score,
    kaggle="train.csv.zip, test.csv.zip, test_labels.csv.zip and sample_submission.csv.zip", size="55 MB",
    m_best=0.98856,
    m_best_miniature=0.9714,    # logistic regression on pieces of words spelt plainly, pairs of words and capitals
    published=table_1((0.9746, 0.9752), (0.9751, 0.9753), (0.9744, 0.9752),
                      (0.9751, 0.9752), (0.9752, 0.9752), (0.9753, 0.9763)),
    gold=0.9874,
)
