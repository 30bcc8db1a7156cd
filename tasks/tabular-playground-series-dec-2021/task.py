"""Tabular playground of December 2021: seven kinds of forest cover from 54 integers. Split, files and grader are
MLE-bench's, to the byte.

The publisher's file has 4 million rows. They are whole numbers without quotes or blanks, which pandas would write back
as they stand, so its lines are moved as they are: 0.7 GB of memory instead of several.
"""
import numpy as np
import pandas as pd

from tasks import MissingRaw, Task, accuracy, matched, numbers, open_raw, share_of_test, split_positions, write_csv


def prepare(raw, public, private, variant):
    """4,000,000 labelled rows become 3,600,000 and 400,000; the publisher's own unlabelled rows are left out."""
    header, rows, starts = _read(raw)
    num_rows = len(starts) - 1
    train, test = split_positions(num_rows, share_of_test(0.1, num_rows))
    _write(public / "train.csv", header, _lines(rows, starts, train))
    _write(private / "test.csv", header, _lines(rows, starts, test))
    _write(public / "test.csv", header.rpartition(b",")[0] + b"\n",
           (bytes(line).rpartition(b",")[0] + b"\n" for line in _lines(rows, starts, test)))
    _write(public / "sample_submission.csv", b"Id,Cover_Type\n",
           (bytes(line).partition(b",")[0] + b",2\n" for line in _lines(rows, starts, test)))


def _read(raw):
    """(header, rows, starts): the first line, all others, and where each of them starts, then where the last ends."""
    with open_raw(raw, "train.csv", ["Id", "Cover_Type"]) as stream:
        return _lines_of(stream)


def _lines_of(stream):
    header = stream.readline().strip() + b"\n"
    if not (header.startswith(b"Id,") and header.endswith(b",Cover_Type\n")):
        raise MissingRaw(f"train.csv must have Id as first column and Cover_Type as last; it begins {header[:60]}.")
    rows, starts, num_commas = bytearray(), [np.zeros(1, np.int64)], 0
    while block := stream.read(1 << 24):
        if strange := block.translate(None, b"0123456789,-\r\n"):
            raise MissingRaw(f"train.csv must hold whole numbers only; it holds {strange[:20]}.")
        block = block.translate(None, b"\r")
        starts.append(np.flatnonzero(np.frombuffer(block, np.uint8) == ord("\n")) + len(rows) + 1)
        num_commas += block.count(b",")
        rows += block
    if rows and not rows.endswith(b"\n"):
        rows += b"\n"
        starts.append(np.array([len(rows)]))
    starts = np.concatenate(starts)
    if num_commas != header.count(b",") * (len(starts) - 1):
        raise MissingRaw(f"The rows of train.csv must have {header.count(b',') + 1} fields each, as the first line.")
    return header, memoryview(rows), starts


def _lines(rows, starts, wanted):
    """Yields the wanted rows in their order, as views of bytes."""
    for i in range(0, len(wanted), 100_000):
        part = wanted[i:i + 100_000]
        yield from (rows[start:end] for start, end in zip(starts[part].tolist(), starts[part + 1].tolist()))


def _write(path, header, lines):
    with open(path, "wb") as sink:
        sink.write(header)
        sink.writelines(lines)


def score(answers, submission):
    """Share of rows that are right. Kinds are whole numbers, and 2.0 is 2."""
    predicted = matched(submission, answers, "Id", ["Cover_Type"])
    return accuracy(numbers(answers, ["Cover_Type"]), numbers(predicted, ["Cover_Type"], whole=True))


def miniature(raw, seed):
    """750 labelled rows and 60 unlabelled ones."""
    rows = forest(np.random.default_rng(seed), 810)
    write_csv(rows[:750], raw / "train.csv")
    write_csv(rows[750:].drop(columns="Cover_Type"), raw / "test.csv")
    write_csv(rows[750:][["Id"]].assign(Cover_Type=2), raw / "sample_submission.csv")


def forest(rng, n):
    """A data frame of n rows with the publisher's columns.

    What grows somewhere is told by how high and dry it is: by the elevation above the nearest water, the soil (the
    higher its number, the drier), the third wilderness area, the way the slope faces, and a little chance.
    """
    area = rng.choice(4, n, p=[0.44, 0.06, 0.42, 0.08])
    soil = np.clip(rng.normal(20, 8, n).round(), 0, 39).astype(int)
    height = rng.normal(2920, 120, n)
    aspect, slope = rng.integers(0, 360, n), np.clip(rng.gamma(4, 3.6, n), 0, 60)
    facing = np.cos(np.radians(aspect - 200))
    level, away = rng.normal(0, 120, n), rng.gamma(1.6, 160, n)
    roads, fires = rng.gamma(1.8, 950, n), rng.gamma(1.9, 850, n)
    dry = height - level + 26 * (soil - 20) + 90 * facing + 60 * (area == 2) + rng.normal(0, 10, n)
    kind = np.searchsorted([2480, 2570, 2660, 2672, 2960, 3300], dry)
    frame = {"Id": np.arange(n), "Elevation": height, "Aspect": aspect, "Slope": slope,
             "Horizontal_Distance_To_Hydrology": away, "Vertical_Distance_To_Hydrology": level,
             "Horizontal_Distance_To_Roadways": roads, "Hillshade_9am": 212 - 30 * facing + rng.normal(0, 12, n),
             "Hillshade_Noon": 224 - slope / 2 + rng.normal(0, 9, n),
             "Hillshade_3pm": 140 + 40 * facing + rng.normal(0, 15, n),
             "Horizontal_Distance_To_Fire_Points": fires}
    frame = {name: column.astype(np.int64) for name, column in frame.items()}
    frame |= {f"Wilderness_Area{i + 1}": (area == i).astype(np.int64) for i in range(4)}
    frame |= {f"Soil_Type{i + 1}": (soil == i).astype(np.int64) for i in range(40)}
    frame |= {name: np.zeros(n, np.int64) for name in ("Soil_Type7", "Soil_Type15")}    # as the publisher has them
    return pd.DataFrame({**frame, "Cover_Type": np.array([4, 3, 6, 5, 2, 1, 7])[kind]})


TASK = Task(
    id="tabular-playground-series-dec-2021", metric="accuracy",
    direction="up", split="held-out", source="MLE-bench", variants=("mle-bench",), key="Id", targets=("Cover_Type",),
    prepare=prepare, miniature=miniature, score=score, time_limit_s=1200.0, memory_limit_bytes=8 << 30,
    download="train.csv of the Kaggle competition tabular-playground-series-dec-2021, or its whole zip", size="700 MB",
    m_init=None,
    m_best=0.9613, m_best_source="Table 1, ML-Agent's best of 8; Kaggle's first is of other rows, and lower",
    m_best_miniature=0.8633,
    m_best_miniature_source="logistic regression on height above water, soil number, area and compass as sine",
    published={"Qwen-7B-Instruct": (0.9594, 0.9606), "Qwen-32B-Instruct": (0.9597, 0.9612),
               "GPT-4o-mini": (0.9590, 0.9607), "GPT-4o": (0.9591, 0.9610), "DeepSeek-R1": (0.9578, 0.9612),
               "ML-Agent": (0.9609, 0.9613)},
    medals={"gold": 0.9566, "silver": 0.95658, "bronze": 0.95658, "median": 0.95342},
)
