"""Submissions: reading whatever bytes are there as plain text cells, matching rows with the answers', turning cells
into numbers.

A table is a dict {column: [text]}. Everything that can be wrong raises InvalidSubmission with a reason of one sentence.
"""
import csv
import errno
import io
import math
import os
import re
import stat

import numpy as np
import pandas as pd


MAX_COLUMNS = 10_000
TRUTHS = {"True": 1.0, "TRUE": 1.0, "true": 1.0, "False": 0.0, "FALSE": 0.0, "false": 0.0}


class InvalidSubmission(ValueError):
    """The submission cannot be graded; the message says why in one sentence."""


def read_submission(path, limit_bytes):
    """The table in the CSV file at path. No symbolic link is followed and no more than limit_bytes are read."""
    try:
        handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)     # a pipe must not block
    except OSError as error:
        reason = "it is a symbolic link" if error.errno == errno.ELOOP else error.strerror.lower()
        raise InvalidSubmission(f"The submission cannot be opened: {reason}.") from None
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise InvalidSubmission("The submission is not an ordinary file.")
    with open(handle, "rb") as stream:
        size = os.fstat(handle).st_size
        if size > limit_bytes:
            raise InvalidSubmission(f"The file has {size} bytes; at most {limit_bytes} are read.")
        data = stream.read(limit_bytes)
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InvalidSubmission(f"The file is not UTF-8 text: {error.reason} at byte {error.start}.") from None
    if "\0" in text:
        raise InvalidSubmission("The file is not text: it holds zero bytes.")
    header, columns = plain_columns(data) or _any_columns(text)
    header = [name.strip() for name in header]
    if len(set(header)) < len(header):
        raise InvalidSubmission("A column name occurs twice.")
    return dict(zip(header, columns))


def plain_columns(data):
    """(header, columns of text cells) of CSV bytes in UTF-8, or None where csv.reader has to look: at quotes, blank
    lines, very long fields, and lines whose number of fields differs.

    One pass over the commas and line ends shows that the cells can be had by splitting, which takes a fifth of
    csv.reader's time: it counts for millions of rows.
    """
    data = data.replace(b"\r\n", b"\n")
    data = data if data.endswith(b"\n") else data + b"\n"
    if any(mark in data for mark in (b'"', b"\r", b"\n\n")) or data.startswith(b"\n"):
        return None
    header = data[:data.index(b"\n")]
    width = header.count(b",") + 1
    if width > MAX_COLUMNS or not header.strip(b" \t"):
        return None
    data_array = np.frombuffer(data, np.uint8)
    ends = np.flatnonzero((data_array == ord(",")) | (data_array == ord("\n")))     # where each cell ends
    if len(ends) % width or np.diff(ends, prepend=-1).max() > csv.field_size_limit():
        return None
    if (data_array[ends].reshape(-1, width) != np.frombuffer(b"," * (width - 1) + b"\n", np.uint8)).any():
        return None
    del ends
    cells = data.decode("utf-8-sig").replace("\n", ",").split(",")[:-1]
    return cells[:width], [cells[width + j::width] for j in range(width)]


def _any_columns(text):
    """(header, columns of text cells) of CSV text, by csv.reader. Blank lines are skipped, as pandas does."""
    def is_blank(row):
        return len(row) < 2 and not "".join(row).strip(" \t")
    rows = csv.reader(io.StringIO(text, newline=""), strict=True)
    try:
        header = next((row for row in rows if not is_blank(row)), [])
        if not header:
            raise InvalidSubmission("The file is empty.")
        if len(header) > MAX_COLUMNS:
            raise InvalidSubmission(f"The file has {len(header)} columns; at most {MAX_COLUMNS} are read.")
        columns = [[] for _ in header]
        for row in rows:
            if len(row) != len(header):
                if is_blank(row):
                    continue
                raise InvalidSubmission(f"Line {rows.line_num} has {len(row)} fields; the first has {len(header)}.")
            for column, value in zip(columns, row):
                column.append(value)
    except csv.Error as error:
        raise InvalidSubmission(f"The file is not CSV at line {rows.line_num}: {error}.") from None
    return header, columns


def read_table(path):
    """A table {column: [text]} in a CSV file of ours."""
    with open(path, "rb") as stream:
        plain = plain_columns(stream.read())
    if plain:
        return dict(zip(*plain))
    return pd.read_csv(path, dtype=str, keep_default_na=False).to_dict("list")


def matched(submission, answers, key, columns, extra=True):
    """The table of `columns` of the submission, its rows in the order of the answers' ids.

    key is the id column, or None to take the rows as they stand. extra says whether further columns are allowed. Ids
    may occur more than once where the answers' do; such rows are taken in the order they come.
    """
    needed = [key, *columns] if key else list(columns)
    if lacking := [name for name in needed if name not in submission]:
        wanted = ", ".join(needed[:4]) + (", ..." if len(needed) > 4 else "")
        raise InvalidSubmission(f"{_some(lacking, 'column')} missing; the columns must be {wanted}.")
    if not extra and len(submission) > len(needed):
        raise InvalidSubmission(f"{_some([name for name in submission if name not in needed], 'column')} not expected.")
    num_rows, num_wanted = len(submission[needed[0]]), len(next(iter(answers.values())))
    if num_rows != num_wanted:
        raise InvalidSubmission(f"The file has {num_rows} rows; {num_wanted} were expected.")
    if key is None or submission[key] == answers[key]:
        return {name: submission[name] for name in columns}
    found, wanted = submission[key], answers[key]
    place = _places(found, wanted)
    if place is None:
        found, wanted = ([re.sub(r"^(-?\d+)\.0*$", r"\1", id.strip()) for id in ids] for ids in (found, wanted))  # 12.0
        place = _places(found, wanted)
    if place is None:
        if unknown := sorted(set(found) - set(wanted)):
            raise InvalidSubmission(f"{_some(unknown, key)} not in the test set.")
        often = next(min(pair) for pair in zip(sorted(found), sorted(wanted)) if pair[0] != pair[1])
        raise InvalidSubmission(f"The {key} {show(often)} occurs too often.")
    return {name: [submission[name][i] for i in place] for name in columns}


def _places(found, wanted):
    """place[j]: the index in found of wanted[j], equal ones in the order they come; None where the two differ."""
    by_found, by_wanted = (sorted(range(len(ids)), key=ids.__getitem__) for ids in (found, wanted))
    place = [0] * len(wanted)
    for i, j in zip(by_found, by_wanted):
        if found[i] != wanted[j]:
            return None
        place[j] = i
    return place


def numbers(table, columns, low=-math.inf, high=math.inf, whole=False, sum_to_one=False):
    """The columns of a table as float64 (rows, columns). A column may be all of True and False, as pandas has it.

    InvalidSubmission for text, NaN and infinity, values outside [low, high], values that are not whole where they
    must be, and rows that do not sum to one where they must (within 1.1e-5, MLE-bench's tolerance).
    """
    values = np.empty((len(table[columns[0]]), len(columns)))
    for j, name in enumerate(columns):
        values[:, j] = _floats(table[name], name)
    fine = np.isfinite(values) & (values >= low) & (values <= high)
    if whole:
        fine &= (values == np.floor(values)) & (np.abs(values) < 2 ** 63)       # beyond, scikit-learn sees no classes
    if not fine.all():
        i, j = np.argwhere(~fine)[0]
        bounds = f" from {low:g} to {high:g}" if high < math.inf else f" of at least {low:g}" if low > -math.inf else ""
        must = f"a {'whole' if whole else 'finite'} number{bounds}"
        raise InvalidSubmission(f"{_cell(i, columns[j])} holds {values[i, j]:g}; it must be {must}.")
    if sum_to_one and len(values):
        sums = values.sum(1)
        i = np.abs(sums - 1).argmax()
        if abs(sums[i] - 1) > 1.1e-5:
            raise InvalidSubmission(f"The values of row {i + 1} sum to {sums[i]:.6g}; each row must sum to 1.")
    return values


def _floats(column, name):
    """The cells of the column called `name` as floats."""
    if column and column[0] in TRUTHS and TRUTHS.keys() >= set(column):
        return [TRUTHS[text] for text in column]
    try:
        return np.fromiter(map(float, column), float, len(column))
    except ValueError:
        i, text = next((i, text) for i, text in enumerate(column) if not _is_number(text))
        raise InvalidSubmission(f"{_cell(i, name)} holds {show(text)}, which is not a number.") from None


def _is_number(text):
    try:
        float(text)
        return True
    except ValueError:
        return False


def show(text):
    """Text from a file made fit for a message: short, quoted, control characters escaped."""
    return ascii(text if len(text) <= 40 else text[:37] + "...")


def _cell(row, column):
    return f"Row {row + 1} of column {show(column)}"


def _some(items, what):
    first = show(items[0])
    return f"The {what} {first} is" if len(items) == 1 else f"{len(items)} {what}s (such as {first}) are"
