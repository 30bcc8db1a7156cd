"""Insults in comments: whether a comment is meant to insult someone in the conversation.

Files are MLE-bench's: the publisher's first test set and its solutions are the test. The score is the paper's accuracy,
with probabilities above 0.5 taken as insults; MLE-bench's is the AUC. The comment itself is the key, so it must come
back unchanged.
"""
import random

import pandas as pd

from tasks import Task, accuracy, copy_raw, paired, raw_csv, table_1, write_csv


def prepare(raw, public, private, variant):
    """3947 rows to train on, byte for byte as they come, and 2647 to test on; the verification set is left out."""
    rows = raw_csv(raw, "test_with_solutions.csv", ["Insult", "Date", "Comment"], dtype=str, keep_default_na=False)
    copy_raw(raw, "train.csv", public / "train.csv", ["Insult", "Date", "Comment"])
    write_csv(rows[["Date", "Comment"]], public / "test.csv")
    gold = rows[["Insult", "Date", "Comment"]]
    write_csv(gold.assign(Insult=0), public / "sample_submission_null.csv")
    write_csv(rows, private / "test.csv")
    write_csv(gold, private / "gold_submission.csv")


def score(answers, submission):
    truth, predicted = paired(answers, submission, "Comment", ["Insult"], low=0, high=1)
    return accuracy(truth, predicted > 0.5)


def miniature(raw, seed):
    """450 comments to train on and 300 to test on, 40 % of them insults.

    An insult calls the reader rude names, the rest call others so, or speak to the reader kindly. Rude words are often
    spelt in ways that come once only.
    """
    rng = random.Random(seed)
    taste = {kind: [rng.lognormvariate(0, 1) for _ in words] for kind, words in WORDS.items()}
    seen, rows = set(), []
    while len(rows) < 750:
        insult = rng.random() < 0.4
        text = _comment(rng, insult, taste)
        if text not in seen:
            seen.add(text)
            date = f"2012{rng.randint(3, 9):02d}{rng.randint(1, 28):02d}"
            date += f"{rng.randint(0, 23):02d}{rng.randint(0, 59):02d}{rng.randint(0, 59):02d}Z"
            rows.append([int(insult), "" if rng.random() < 0.2 else date, f'"{text}"'])
    rows = pd.DataFrame(rows, columns=["Insult", "Date", "Comment"])
    train, test = rows[:450], rows[450:]
    write_csv(train, raw / "train.csv")
    usage = [rng.choice(["PublicTest", "PrivateTest"]) for _ in range(len(test))]
    write_csv(test.assign(Usage=usage), raw / "test_with_solutions.csv")
    write_csv(test.drop(columns="Insult").reset_index(names="id"), raw / "test.csv")
    write_csv(test.assign(Insult=0), raw / "sample_submission_null.csv")


def _comment(rng, insult, taste):
    """One to three sentences, one of them an insult where there should be one."""
    sentences = [_sentence(rng, rng.choice(INNOCENT), taste) for _ in range(rng.choice([0, 1, 1, 2]) + (not insult))]
    if insult:
        sentences.insert(rng.randint(0, len(sentences)), _sentence(rng, rng.choice(INSULTING), taste))
    text = sentences[0]
    for sentence in sentences[1:]:
        text += rng.choice([" ", " ", "\\n", "\\xa0", "\\\\n"]) + sentence
    return text


def _sentence(rng, template, taste):
    words = []
    for word in template.split():
        kind = word.rstrip(",.!?")
        if kind in WORDS:
            drawn = rng.choices(WORDS[kind], taste[kind])[0]
            word = (_disguised(rng, drawn) if kind in ("RUDE", "FOUL") else drawn) + word[len(kind):]
        words.append(word)
    text = " ".join(words)
    return text.upper() if rng.random() < 0.06 else text[0].upper() + text[1:] if rng.random() < 0.6 else text


def _disguised(rng, word):
    """A word as it is, or with a letter doubled, starred or changed for a digit."""
    place = rng.randrange(1, len(word) - 1)
    letter = word[place]
    digit = {"i": "1", "o": "0", "e": "3"}.get(letter, "-")
    return word[:place] + rng.choice([letter] * 6 + [letter * rng.randint(2, 5), "*", digit]) + word[place + 1:]


INSULTING = """you are a FOUL RUDE.|you RUDE, go back to your PLACE.|what a RUDE you are!
your THING is as FOUL as you are|only a RUDE like you would VERB the THING|go away, you FOUL RUDE.
you and your FOUL THING are a joke, RUDE.|nobody wants to VERB with a FOUL RUDE like you
shut up, RUDE.|you sound like a FOUL RUDE.""".replace("\n", "|").split("|")
INNOCENT = """the PERSON is a FOUL RUDE.|you are a KIND PERSON.|I VERB the THING and you VERB it too
what a FOUL THING they have in the PLACE!|would you VERB the THING with your PERSON?|your THING is as KIND as mine
that RUDE of a PERSON wants to VERB our THING|they call the PERSON a RUDE, I call him KIND.
the THING in the PLACE was KIND.|some RUDE left a FOUL THING at the PLACE|we VERB a KIND THING like you do
thank you for the KIND THING.|shut the THING, the PERSON said
my PERSON says only a RUDE would VERB there""".replace("\n", "|").split("|")
WORDS = {
    "RUDE": "idiot moron clown loser fool dunce coward liar weasel halfwit simpleton blockhead nitwit troll".split(),
    "FOUL": "stupid pathetic rotten ugly ignorant filthy brainless worthless dumb silly miserable clueless".split(),
    "KIND": "good wise fair honest great lovely decent friendly clever fine useful brave pleasant funny".split(),
    "PERSON": "referee neighbour mayor coach teacher senator singer doctor friend captain actor farmer".split(),
    "THING": "game article song team car law tax film garden phone speech recipe story goal vote bus".split(),
    "PLACE": "city stadium office school village market station studio harbour park".split(),
    "VERB": "watch read like discuss play buy share understand follow support write remember".split(),
}

TASK = Task(
    id="detecting-insults-in-social-commentary", metric="accuracy",
    direction="up", split="held-out", source="MLE-bench", key="Comment",
    targets=("Insult",), sample="sample_submission_null.csv", prepare=prepare, miniature=miniature, score=score,
    known_signal="the comment itself is the key, and how it begins tells of the target",
    known_twins="comments have no ids, so the same short one may have been written in both files",
    kaggle="train.csv and test_with_solutions.csv", size="2 MB",
    m_init=0.82168,
    m_best=0.8625, m_best_source="shipped ideas, measured; Kaggle's leaderboard has the AUC",
    m_best_miniature=0.9967,    # logistic regression on words, pairs of words and character n-grams
    published=table_1((0.8013, 0.8075), (0.8089, 0.8201), (0.8006, 0.8044),
                      (0.8033, 0.8170), (0.7992, 0.8041), (0.8111, 0.8273)),
)
