"""What several files of tests share about tasks."""
import hashlib

import pytest

import tasks


def quiet(line):
    pass


def sides(id, raw, home, variant=None):
    """Runs the task's own prepare on a raw folder, without its starter: (public, private), new folders in `home`."""
    task, public, private = tasks.load(id), home / "public", home / "private"
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
