"""The publisher's files: found wherever they lie, streamed, split, and written so that the recorded MD5 sums hold."""
import functools
import math
import shutil
import sys
import tempfile
import zipfile
from pathlib import Path

import numpy as np
import pandas as pd


class MissingRaw(ValueError):
    """A file of the publisher is not in the raw folder."""


# From pandas 3.1 on every float is read exactly and the option is deprecated.
EXACT_FLOATS = {} if tuple(map(int, pd.__version__.split(".")[:2])) >= (3, 1) else {"float_precision": "round_trip"}


def read_csv(source, **options):
    """A data frame whose floats are written back exactly as they were read."""
    return pd.read_csv(source, **EXACT_FLOATS, **options)


def write_csv(frame, path):
    """Writes a data frame as the recorded MD5 sums need it: no index column, `\\n` line ends."""
    frame.to_csv(path, index=False, lineterminator="\n")


def train_test_split(n, fraction, seed=0):
    """Positions of the train rows and of the test rows, int64 (n - ceil(fraction n),) and (ceil(fraction n),), in the
    order both are written.

    This is scikit-learn's shuffled, unstratified split restated, so that it stays the same whatever version is
    installed.
    """
    num_test = math.ceil(fraction * n)
    order = np.random.RandomState(seed).permutation(n)
    return order[num_test:], order[:num_test]


def raw_files(raw):
    """Yields (path, open) for every file under raw: loose ones first, then members of zips, each followed by zips
    inside it.

    path is text with "/" between parts, zips included ("train.csv.zip/train.csv"). open() gives a binary stream and
    must be called before the next pair is asked for, because archives are closed behind it.
    """
    loose = sorted(path for path in Path(raw).rglob("*") if path.is_file())
    for path in loose:
        yield path.relative_to(raw).as_posix(), functools.partial(path.open, "rb")
    for path in loose:
        if path.suffix == ".zip":
            with path.open("rb") as stream:
                yield from _zip_files(path.relative_to(raw).as_posix(), stream)


def _zip_files(name, stream):
    with zipfile.ZipFile(stream) as archive:
        members = [member for member in archive.namelist() if not member.endswith("/") and "__MACOSX" not in member]
        for member in members:
            yield f"{name}/{member}", functools.partial(archive.open, member)
        for member in members:
            if member.endswith(".zip"):
                with tempfile.TemporaryFile() as inner:     # a copy: seeking in a packed member would unpack it anew
                    with archive.open(member) as packed:
                        shutil.copyfileobj(packed, inner)
                    yield from _zip_files(f"{name}/{member}", inner)


def raw_csv(raw, name, **options):
    """The data frame in the file called `name`, wherever it lies under raw. MissingRaw where it is not there."""
    for path, opened in raw_files(raw):
        if path.split("/")[-1] == name:
            with opened() as stream:
                return read_csv(stream, **options)
    raise MissingRaw(f"{name} is not in {raw}, neither loose nor inside a zip.")


def copy_raw(raw, name, target):
    """Copies the file called `name`, wherever it lies under raw, to the path target, byte for byte."""
    copy_raw_folder(raw, None, Path(target).parent, {name: Path(target).name})


def copy_raw_folder(raw, folder, target, wanted):
    """Streams the files `wanted` (names, or {name: new name}) of a folder called `folder` under raw to the folder
    target.

    folder None takes files from anywhere. MissingRaw names the first files that were not there.
    """
    missing = dict(wanted) if isinstance(wanted, dict) else {name: name for name in wanted}
    total = len(missing)
    Path(target).mkdir(parents=True, exist_ok=True)
    for path, opened in raw_files(raw):
        *parents, name = path.split("/")
        if name in missing and (folder is None or parents[-1:] == [folder]):
            with opened() as source, open(Path(target) / missing.pop(name), "wb") as sink:
                shutil.copyfileobj(source, sink)
            progress(total - len(missing), total, "files copied")
            if not missing:
                return
    where = f"{raw}" if folder is None else f"a folder {folder} of {raw}"
    some = f"{min(missing)} is" if total == 1 else f"{len(missing)} of {total} files (such as {min(missing)}) are"
    raise MissingRaw(f"{some} not in {where}, neither loose nor inside a zip.")


def progress(done, total, what):
    """One line on the terminal that counts up; silent when stderr is not a terminal or there is only one thing."""
    if total > 1 and sys.stderr.isatty() and (done == total or done % max(1, total // 100) == 0):
        print(f"\r{done}/{total} {what}", end="\n" if done == total else "", file=sys.stderr, flush=True)
