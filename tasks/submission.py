"""Submissions: whatever bytes are there become a table {column: [text]}, rows in the answers' order, and numbers. What
is wrong raises InvalidSubmission with a reason of one sentence."""
import csv
import io
import math
import os
import re

import numpy as np

from support.storage import open_regular

MAX_COLUMNS = 10_000        # a file of commas alone would take much memory
MAX_CLASS = 2.0 ** 63       # scikit-learn takes whole numbers below this for classes
SUM_TOLERANCE = 1.1e-5      # MLE-bench's, for rows that must sum to one
TRUTHS = {"True": 1.0, "TRUE": 1.0, "true": 1.0, "False": 0.0, "FALSE": 0.0, "false": 0.0}


class InvalidSubmission(ValueError):
    """The submission cannot be graded; the message says why in one sentence."""


def read_submission(path, limit_bytes):
    """The table in the CSV file at path. No symbolic link is followed and no more than limit_bytes are read."""
    try:
        with open_regular(path) as stream:
            data = stream.read(limit_bytes + 1)
            size = os.fstat(stream.fileno()).st_size
    except OSError as error:
        reason = f"cannot be opened: {error.strerror.lower()}" if error.strerror else "is not an ordinary file"
        raise InvalidSubmission(f"The submission {reason}.") from None
    if len(data) > limit_bytes:
        raise InvalidSubmission(f"The file has {size} bytes; at most {limit_bytes} are read.")
    return _parse(data)


def read_table(path):
    """The table in a CSV file of ours."""
    with open(path, "rb") as stream:
        return _parse(stream.read())


def _parse(data):
    """The table in the bytes of a CSV file. Blank lines are skipped, as pandas does."""
    header = []
    cells = []
    try:
        rows = csv.reader(io.StringIO(data.decode("utf-8-sig"), newline=""), strict=True)
        for row in rows:
            is_blank = len(row) < 2 and not "".join(row).strip(" \t")
            if not header and not is_blank:
                header = [name.strip() for name in row]
                if len(set(header)) < len(header) or len(header) > MAX_COLUMNS:
                    raise InvalidSubmission(f"A column name occurs twice, or there are more than {MAX_COLUMNS}.")
            elif header and len(row) == len(header):
                cells += row
            elif not is_blank:
                raise InvalidSubmission(f"Line {rows.line_num} has {len(row)} fields; the first has {len(header)}.")
    except (UnicodeDecodeError, csv.Error) as error:
        raise InvalidSubmission(f"The file is not CSV in UTF-8: {error}.") from None
    if not header:
        raise InvalidSubmission("The file is empty.")
    return {name: cells[j::len(header)] for j, name in enumerate(header)}


def matched(submission, answers, key, columns, extra=True):
    """The table of `columns` of the submission, its rows in the order of the answers' ids. key: the id column; None
    takes the rows as they stand. extra: whether further columns are allowed. Rows of one id are taken as they come."""
    # 1. The columns and the number of rows are as expected.
    needed = [key, *columns] if key else list(columns)
    for name in needed:
        if name not in submission:
            raise InvalidSubmission(f"The column {show(name)} is missing; the columns must be {listed(needed)}.")
    for name in submission:
        if name not in needed and not extra:
            raise InvalidSubmission(f"The column {show(name)} is not expected.")
    num_rows = len(submission[needed[0]])
    if num_rows != len(answers[needed[0]]):
        raise InvalidSubmission(f"The file has {num_rows} rows; {len(answers[needed[0]])} were expected.")
    if key is None or submission[key] == answers[key]:
        return {name: submission[name] for name in columns}

    # 2. The ids are the answers', in any order. Scripts may have turned 12 into 12.0.
    ids = submission[key]
    wanted = answers[key]
    if set(ids) != set(wanted):
        ids = [_whole(id) for id in ids]
        wanted = [_whole(id) for id in wanted]
    if unknown := set(ids) - set(wanted):
        raise InvalidSubmission(f"The {key} {show(min(unknown))} is not in the test set.")
    rows = [0] * num_rows
    by_id = sorted(range(num_rows), key=ids.__getitem__)
    by_wanted = sorted(range(num_rows), key=wanted.__getitem__)
    for i, j in zip(by_id, by_wanted):
        if ids[i] != wanted[j]:
            fault = "occurs too often" if ids[i] < wanted[j] else "is missing"
            raise InvalidSubmission(f"The {key} {show(min(ids[i], wanted[j]))} {fault}.")
        rows[j] = i
    return {name: [submission[name][i] for i in rows] for name in columns}


def _whole(id):
    """The id without blanks around it and without a fraction of zeros."""
    return re.sub(r"^(-?\d+)\.0*$", r"\1", id.strip())


def numbers(table, columns, low=-math.inf, high=math.inf, whole=False, sum_to_one=False):
    """The columns of a table as float64 (rows, columns), all finite. A column may be all of True and False."""
    values = np.empty((len(table[columns[0]]), len(columns)))
    for j, name in enumerate(columns):
        column = table[name]
        if column and column[0] in TRUTHS and TRUTHS.keys() >= set(column):
            column = [TRUTHS[text] for text in column]
        for i, cell in enumerate(column):
            try:
                values[i, j] = float(cell)
            except ValueError:
                raise InvalidSubmission(f"{_cell(i, name)} holds {show(cell)}, which is not a number.") from None
    valid = np.isfinite(values) & (values >= low) & (values <= high)
    if whole:
        valid &= (values == np.floor(values)) & (np.abs(values) < MAX_CLASS)
    if not valid.all():
        i, j = np.argwhere(~valid)[0]
        kind = "whole" if whole else "finite"
        raise InvalidSubmission(f"{_cell(i, columns[j])} holds {values[i, j]:g}; it must be a {kind} number from "
                                f"{low:g} to {high:g}.")
    if sum_to_one:
        for i, total in enumerate(values.sum(1)):
            if abs(total - 1) > SUM_TOLERANCE:
                raise InvalidSubmission(f"The values of row {i + 1} sum to {total:.6g}; each row must sum to 1.")
    return values


def paired(answers, submission, key, columns, extra=True, **rules):
    """The columns of the answers and of the submission as numbers, row by row of the answers: two float64 arrays (rows,
    columns). See `matched`, and `numbers`, whose rules are the submission's."""
    predicted = matched(submission, answers, key, columns, extra)
    return numbers(answers, columns), numbers(predicted, columns, **rules)


def _cell(row, column):
    return f"Row {row + 1} of column {show(column)}"


def show(text, most=40):
    """Text from a file made fit for a message: short, quoted, control characters escaped."""
    return ascii(text if len(text) <= most else text[:most - 3] + "...")


def listed(names):
    """Names of columns, which may be out of any file, made fit for a message."""
    return show(", ".join(map(str, names)), 100)
