"""The publisher's files, found wherever they lie, split, and written so that the recorded MD5 sums hold; and what
miniatures are made of."""
import contextlib
import functools
import io
import math
import os
import shutil
import tempfile
import zipfile
from pathlib import Path

import numpy as np
import pandas as pd

from support.sandbox import NO_SPACE
from tasks.submission import listed

SETTLED = 10**9     # the time of all public files, in 2001
FEW_ROWS = 900      # every publisher's table of these tasks has more
# From pandas 3.1 on every float is read exactly and the option is deprecated.
EXACT_FLOATS = {} if tuple(map(int, pd.__version__.split(".")[:2])) >= (3, 1) else {"float_precision": "round_trip"}


class MissingRaw(ValueError):
    """The raw folder does not hold what the publisher ships."""


def write_csv(frame, path, **options):
    """Writes a data frame as the recorded MD5 sums need it: no index column, `\\n` line ends; zipped by path's end."""
    frame.to_csv(path, index=False, lineterminator="\n", **options)


def write_tables(folder, train, test, **guess):
    """Writes train.csv; test.csv, without the columns that are guessed; and sample_submission.csv, the first column of
    the test and the guesses."""
    write_csv(train, folder / "train.csv")
    write_csv(test.drop(columns=list(guess)), folder / "test.csv")
    write_csv(test.iloc[:, :1].assign(**guess), folder / "sample_submission.csv")


def write_zip(path, members):
    """Writes a zip of {name: bytes or text}, sorted by name."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in sorted(members.items()):
            archive.writestr(name, data)


def jpeg(pixels, size, step=8):
    """A JPEG of uint8 pixels (H, W) or (H, W, 3), as `size` bytes: the end is filled with zeros, which readers skip, so
    that the length of the file does not tell what is in it. step quantises all coefficients: larger is coarser."""
    from PIL import Image       # the tasks of tables and texts do without it
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "JPEG", qtables=[[step] * 64], subsampling=0)
    if stream.tell() > size:
        raise ValueError(f"The image takes {stream.tell()} bytes and cannot be padded to {size}.")
    return stream.getvalue().ljust(size, b"\0")


def settle(folder):
    """Writes a folder anew, file by file in the order of their names, read-only and all of one time. When a file was
    written, and where on the disk, may tell of the answers: publishers' archives are sorted by class."""
    settled = folder.with_name("settled")
    for path in [folder, *sorted(folder.rglob("*"))]:
        target = settled / path.relative_to(folder)
        if path.is_dir():
            target.mkdir()
            continue
        with open(path, "rb") as source, open(target, "wb") as sink:
            shutil.copyfileobj(source, sink)
        target.chmod(0o444)         # scripts see this very folder, so a slip must not write into it
        os.utime(target, (SETTLED, SETTLED))
    shutil.rmtree(folder)
    settled.rename(folder)


def misspelt(rng, word):
    """The word with two neighbouring letters swapped, one left out or one doubled."""
    i = rng.randrange(1, len(word) - 1)
    return word[:i] + rng.choice([word[i + 1] + word[i], "", word[i] * 2 + word[i + 1]]) + word[i + 2:]


def share_of_test(published, num_rows):
    """The share of the labelled rows that are the test: the published one, but two fifths of a miniature's few rows,
    because on a handful of them chance decides which of two models is better."""
    return published if num_rows >= FEW_ROWS else 0.4


def split_positions(n, fraction, seed=0):
    """Positions of the train rows and of the test rows, in the order both are written. This is scikit-learn's shuffled
    split restated, so that no version of it moves a row."""
    num_test = math.ceil(fraction * n)
    order = np.random.RandomState(seed).permutation(n)
    return order[num_test:], order[:num_test]


def split_rows(rows, published):
    """The data frames (train, test) of a shuffled split of `rows`; published: see share_of_test. For real data of
    fewer than FEW_ROWS rows use split_positions."""
    train, test = split_positions(len(rows), share_of_test(published, len(rows)))
    return rows.iloc[train], rows.iloc[test]


@contextlib.contextmanager
def readable(path):
    """Names the file in whatever error a damaged one leads to."""
    try:
        yield
    except (MissingRaw, MemoryError):
        raise
    except Exception as error:
        if isinstance(error, OSError) and error.errno in NO_SPACE:      # for what is written meanwhile
            raise
        raise MissingRaw(f"{path} cannot be read, it may be damaged: {str(error).strip()}.") from None


def raw_files(raw):
    """Yields (path, open) for every file under raw: loose ones first, then members of zips, also of zips inside them,
    with paths such as "train.csv.zip/train.csv". open() gives a binary stream and must be called before the next pair
    is asked for, because archives are closed behind it."""
    with readable(raw):
        next(Path(raw).iterdir(), None)         # rglob is silent about a folder that is not there
    files = {path.relative_to(raw).as_posix(): path for path in sorted(Path(raw).rglob("*")) if path.is_file()}
    for name, path in files.items():
        yield name, functools.partial(path.open, "rb")
    for name, path in files.items():
        if path.suffix == ".zip":
            yield from _zip_files(name, path)


def _zip_files(name, file):
    """The same for the members of a zip, a path or a binary stream."""
    with readable(name):
        archive = zipfile.ZipFile(file)
    with archive:
        members = [member for member in archive.namelist() if not member.endswith("/") and "__MACOSX" not in member]
        for member in members:
            yield f"{name}/{member}", functools.partial(archive.open, member)
        for member in members:
            if member.endswith(".zip"):
                with tempfile.TemporaryFile() as inner:     # a copy: seeking in a packed member would unpack it anew
                    with readable(f"{name}/{member}"), archive.open(member) as packed:
                        shutil.copyfileobj(packed, inner)
                    yield from _zip_files(f"{name}/{member}", inner)


@contextlib.contextmanager
def open_raw(raw, name, columns=(), **options):
    """A binary stream of the first file called `name` under raw that has these columns, or exactly these where options
    say header=None. A folder may hold other tasks' files of that name. MissingRaw says what was found instead."""
    others = []
    for path, opened in raw_files(raw):
        if path.split("/")[-1] != name:
            continue
        header = []
        if columns:
            with readable(path), opened() as stream:
                header = list(pd.read_csv(stream, **{**options, "nrows": 1, "dtype": str}))
        if header == list(columns) or "header" not in options and set(columns) <= set(header):
            with readable(path), opened() as stream:
                yield stream
            return
        others.append(f"; {path} has {listed(header)}")
    columns = f" with the columns {listed(columns)}" if columns else ""
    raise MissingRaw(f"{name}{columns} is not in {raw}, neither loose nor inside a zip{''.join(others[:1])}.")


def raw_csv(raw, name, columns=(), **options):
    """The data frame in the first file called `name` under raw that has these columns, its floats to the last digit;
    errors as open_raw's."""
    with open_raw(raw, name, columns, **options) as stream:
        return pd.read_csv(stream, **EXACT_FLOATS, **options)


def copy_raw(raw, name, target, columns=()):
    """Copies the file that open_raw finds to the path target, byte for byte."""
    with open_raw(raw, name, columns) as source, open(target, "wb") as sink:
        shutil.copyfileobj(source, sink)


def copy_raw_folder(raw, folder, target, wanted):
    """Streams the files `wanted` of a folder called `folder` under raw to the folder target. wanted: paths in that
    folder, all as deep, or {path: new path}. MissingRaw names the first of the files that were not there."""
    missing = dict(wanted if isinstance(wanted, dict) else zip(wanted, wanted))
    depth = 1 + min(missing).count("/")
    for path, opened in raw_files(raw):
        parts = path.split("/")
        name = "/".join(parts[-depth:])
        leads_out = not {"", ".."}.isdisjoint(parts)      # of the target, as a name in a zip file may
        if name in missing and not leads_out and parts[:-depth][-1:] == [folder]:
            place = Path(target, missing.pop(name))
            place.parent.mkdir(parents=True, exist_ok=True)
            with readable(path), opened() as source, open(place, "wb") as sink:
                shutil.copyfileobj(source, sink)
            if not missing:
                return
    raise MissingRaw(f"{len(missing)} of {len(wanted)} files (such as {min(missing)}) are not in a folder {folder} of "
                     f"{raw}, neither loose nor inside a zip.")
