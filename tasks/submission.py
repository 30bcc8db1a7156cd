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
    rows = csv.reader(io.StringIO(text, newline=""), strict=True)
    try:
        header = [name.strip() for name in next(rows, [])]
        if not header:
            raise InvalidSubmission("The file is empty.")
        if len(set(header)) < len(header):
            raise InvalidSubmission("A column name occurs twice.")
        columns = [[] for _ in header]
        for row in rows:
            if len(row) != len(header) and row:
                raise InvalidSubmission(f"Line {rows.line_num} has {len(row)} fields; the first has {len(header)}.")
            for column, value in zip(columns, row):
                column.append(value)
    except csv.Error as error:
        raise InvalidSubmission(f"The file is not CSV at line {rows.line_num}: {error}.") from None
    return dict(zip(header, columns))


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
    found, wanted = ([re.sub(r"^(-?\d+)\.0*$", r"\1", id.strip()) for id in table[key]]     # 12.0 is 12
                     for table in (submission, answers))
    if unknown := sorted(set(found) - set(wanted)):
        raise InvalidSubmission(f"{_some(unknown, key)} not in the test set.")
    by_found, by_wanted = (sorted(range(num_rows), key=ids.__getitem__) for ids in (found, wanted))
    place = [0] * num_rows          # place[j]: the row of the submission that answers' row j asks for
    for i, j in zip(by_found, by_wanted):
        if found[i] != wanted[j]:
            raise InvalidSubmission(f"The {key} {show(min(found[i], wanted[j]))} occurs too often.")
        place[j] = i
    return {name: [submission[name][i] for i in place] for name in columns}


def numbers(table, columns, low=-math.inf, high=math.inf, whole=False, sum_to_one=False):
    """The columns of a table as float64 (rows, columns).

    InvalidSubmission for text, NaN and infinity, values outside [low, high], values that are not whole where they
    must be, and rows that do not sum to one where they must (within 1.1e-5, MLE-bench's tolerance).
    """
    values = np.empty((len(table[columns[0]]), len(columns)))
    for j, name in enumerate(columns):
        for i, text in enumerate(table[name]):
            try:
                values[i, j] = float(text)
            except ValueError:
                raise InvalidSubmission(f"{_cell(i, name)} holds {show(text)}, which is not a number.") from None
    fine = np.isfinite(values) & (values >= low) & (values <= high)
    if whole:
        fine &= values == np.floor(values)
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


def show(text):
    """Text from a file made fit for a message: short, quoted, control characters escaped."""
    return ascii(text if len(text) <= 40 else text[:37] + "...")


def _cell(row, column):
    return f"Row {row + 1} of column {show(column)}"


def _some(items, what):
    first = show(items[0])
    return f"The {what} {first} is" if len(items) == 1 else f"{len(items)} {what}s (such as {first}) are"
