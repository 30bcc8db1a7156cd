"""What several files of tests share: tasks prepared without their starters, tasks that run in a moment, replies."""
import hashlib
import json
import re

import pytest

import env
import tasks


def quiet(line):
    pass


def sides(id, raw, home, variant=None):
    """Runs the task's own prepare on a raw folder, without its starter: (public, private), new folders in `home`."""
    task = tasks.load(id)
    public = home / "public"
    private = home / "private"
    public.mkdir(parents=True)
    private.mkdir()
    task.prepare(raw, public, private, variant or task.variants[0])
    return public, private


def text(frame):
    """The bytes of the file that a frame is written to."""
    return frame.to_csv(index=False, lineterminator="\n").encode()


def md5(data):
    return hashlib.md5(data).hexdigest()


def graded(id, data, frame):
    """The score of a frame that is handed in."""
    path = data / "submission.csv"
    path.write_bytes(text(frame))
    return tasks.grade(id, path, data)


def refused(id, data, frame):
    """The reason why a frame that is handed in is refused."""
    with pytest.raises(tasks.InvalidSubmission) as error:
        graded(id, data, frame)
    return str(error.value)


# -- tasks that run in a moment

# The answers are all ANSWER, so a script that predicts VALUE scores |VALUE - ANSWER|; it prints nearly the same.
TASK = '''
from tasks import Task, mae, matched, numbers

def prepare(raw, public, private, variant):
    (public / "sample_submission.csv").write_text("id,y\\n1,0\\n2,0\\n")
    (private / "test.csv").write_text((raw / "truth.csv").read_text())

def miniature(raw, seed):
    (raw / "truth.csv").write_text("id,y\\n1,ANSWER\\n2,ANSWER\\n")

def score(answers, submission):
    return mae(numbers(answers, ["y"]), numbers(matched(submission, answers, "id", ["y"]), ["y"]))

TASK = Task(
    id="NAME", metric="MAE", direction="down", split="SPLIT", source="us",
    download="truth.csv from nowhere", size="1 kB", prepare=prepare, miniature=miniature, score=score,
    m_init=7.0, m_best=0.0, m_best_source="by hand", m_best_miniature=0.0,
    published=PUBLISHED)
'''


def add_task(folder, name, answer, split, starter, published="{}"):
    """Writes such a task."""
    folder = folder / name
    folder.mkdir(parents=True)
    words = {"NAME": name, "ANSWER": str(answer), "SPLIT": split, "PUBLISHED": published}
    (folder / "task.py").write_text(re.sub("|".join(words), lambda word: words[word[0]], TASK))
    (folder / "train.py").write_text(starter.replace("ANSWER", str(answer)))
    (folder / "problem.md").write_text("Predict y.\n")


def act(action, **args):
    return "".join(f"{name}: x\n" for name in env.FIELDS[:4]) + f"Action: {action}\nAction Input: {json.dumps(args)}"
