"""ogbn-arxiv: the subject of computer-science papers, from their words and from who cites whom.

The split is the Open Graph Benchmark's by year, as in MLAgentBench's ogbn-arxiv. What differs:
- The labels of the test nodes are hidden. MLAgentBench leaves all labels in the data folder.
- The folder `mapping` is left out: it names the papers, and so their subjects.
- The files are plain CSV, some packed by gzip. Predictions must be whole numbers.
"""
import gzip
import io

import numpy as np
import pandas as pd

from tasks import MissingRaw, Task, accuracy, copy_raw, paired, raw_csv, write_csv

SIDES = ["train", "valid", "test"]


def prepare(raw, public, private, variant):
    """169343 nodes become 90941 to train on, 29799 to validate on and 48603 to test on, in the official order."""
    one_column = {"columns": [0], "header": None, "compression": "gzip"}
    labels = raw_csv(raw, "node-label.csv.gz", **one_column)[0]
    rows = {side: raw_csv(raw, f"{side}.csv.gz", **one_column)[0] for side in SIDES}
    nodes = pd.concat(rows.values())
    if nodes.duplicated().any() or not nodes.isin(labels.index).all():
        raise MissingRaw(f"The split in {raw} names nodes twice or beyond the {len(labels)} labels.")
    for side in ("train", "valid"):
        write_csv(pd.DataFrame({"node": rows[side], "label": labels[rows[side]].to_numpy()}), public / f"{side}.csv")
    write_csv(pd.DataFrame({"node": rows["test"]}), public / "test.csv")
    write_csv(pd.DataFrame({"0": np.zeros(len(rows["test"]), int)}), public / "sample_submission.csv")
    write_csv(pd.DataFrame({"0": labels[rows["test"]].to_numpy()}), private / "test.csv")
    for name in ("edge.csv.gz", "node-feat.csv.gz", "node_year.csv.gz"):
        copy_raw(raw, name, public / name)


def score(answers, submission):
    return accuracy(*paired(answers, submission, None, ["0"], whole=True))


def miniature(raw, seed):
    """2700 papers of ten subjects, 2000 of them to train on, 300 to validate on and 400 to test on.

    A paper cites four that are no newer, three in five of its own subject. Its 128 features lean weakly towards its
    subject's, so that they say less than those of its neighbours together.
    """
    rng = np.random.default_rng(seed)
    num_nodes, num_classes = 2700, 10
    share = np.arange(num_classes, 0, -1) + 3.0
    label = rng.choice(num_classes, num_nodes, p=share / share.sum())
    year = rng.permutation(np.repeat(range(2010, 2020), [250] * 8 + [300, 400]))
    feature = rng.normal(0, 0.05, (num_classes, 128))[label] + rng.normal(0, 0.25, (num_nodes, 128))
    edges = []
    for node in range(num_nodes):
        like = np.where(label == label[node], 1.5 / (label == label[node]).mean(), 1.0 / (label != label[node]).mean())
        weight = like * (year <= year[node]) * (np.arange(num_nodes) != node)
        with np.errstate(divide="ignore"):      # the four first arrivals, each at the rate of its weight
            first = np.argpartition(rng.exponential(size=num_nodes) / weight, 4)[:4]
        edges += [(node, cited) for cited in np.sort(first)]
    order = {"train": year < 2018, "valid": year == 2018, "test": year == 2019}
    home = raw / "ogbn_arxiv"
    files = {"raw/edge": edges, "raw/node-feat": feature.round(6), "raw/node-label": label, "raw/node_year": year,
             "raw/num-node-list": [num_nodes], "raw/num-edge-list": [len(edges)],
             **{f"split/time/{side}": np.flatnonzero(chosen) for side, chosen in order.items()}}
    for name, table in files.items():
        text = io.StringIO()
        pd.DataFrame(table).to_csv(text, index=False, header=False, lineterminator="\n")
        path = home / f"{name}.csv.gz"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(gzip.compress(text.getvalue().encode(), compresslevel=1, mtime=0))


TASK = Task(
    id="ogbn-arxiv", metric="accuracy", direction="up", split="held-in",
    source="MLAgentBench", key=None, targets=("0",),
    prepare=prepare, miniature=miniature, score=score,
    known_signal="nodes lie in the order of their ids in the Microsoft Academic Graph, which may go with the subject",
    download="arxiv.zip of the Open Graph Benchmark (data set ogbn-arxiv), packed or unpacked", size="80 MB",
    m_best=0.7803, m_best_source="language models and RevGAT (SimTeG), arXiv 2308.02565",
    m_best_miniature=0.8875,  # network of 128 units on features averaged over neighbours, learning rate 0.003
)
