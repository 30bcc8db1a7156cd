"""The metrics of the tasks, as MLE-bench and MLAgentBench compute them.

y is the truth and p the prediction, arrays of one shape. ValueError where they are empty, differ in shape or hold NaN
or infinity. Every other prediction has a score, a finite one but for Pearson's of a constant: were huge predictions
refused when a sum overflows, then which ones would tell of the truth.
"""
import math
import sys

import numpy as np


def _same(y, p):
    y, p = np.asarray(y, np.float64), np.asarray(p, np.float64)
    if y.shape != p.shape or y.size == 0:
        raise ValueError(f"The truth has shape {y.shape}, the prediction {p.shape}; they must be equal and not empty.")
    if not (np.isfinite(y).all() and np.isfinite(p).all()):
        raise ValueError("The truth or the prediction holds NaN or infinity.")
    return y, p


def _near_one(x):
    """(x / 2**exponent, exponent), the largest magnitude from 0.5 to 1. No digit changes, and no square overflows."""
    exponent = int(np.frexp(np.abs(x).max())[1])
    return np.ldexp(x, -exponent), exponent


def _mean_error(y, p, mean):
    """mean(p - y), where mean(2 x) is 2 mean(x) and at most the largest magnitude."""
    y, p = _same(y, p)
    errors, exponent = _near_one(p - y)
    return min(float(np.ldexp(mean(errors), exponent)), sys.float_info.max)     # a mean may be rounded up


def log_loss(y, p):
    """Mean over rows of -sum y ln p, p clipped to [eps, 1 - eps].

    y one-hot (N, K), or 0/1 (N,) with p the probability of 1. Rows are not rescaled.
    """
    y, p = _same(y, p)
    if y.ndim == 1:
        y, p = np.stack([1 - y, y], 1), np.stack([1 - p, p], 1)
    eps = np.finfo(np.float64).eps
    return float(-(y * np.log(np.clip(p, eps, 1 - eps))).sum(1).mean())


def auc(y, p):
    """Area under the ROC curve, ties counted half; of 0/1 labels (N,), or the mean over the columns of (N, K).

    ValueError where a column has one class.
    """
    y, p = _same(y, p)
    if y.ndim == 2:
        return float(np.mean([auc(y[:, k], p[:, k]) for k in range(y.shape[1])]))
    num_pos, num_neg = (y == 1).sum(), (y == 0).sum()
    if num_pos == 0 or num_neg == 0:
        raise ValueError("The AUC needs labels of both classes.")
    _, inverse, counts = np.unique(p, return_inverse=True, return_counts=True)
    ranks = (counts.cumsum() - (counts - 1) / 2)[inverse]       # 1-based, tied values share their mean rank
    return float((ranks[y == 1].sum() - num_pos * (num_pos + 1) / 2) / (num_pos * num_neg))


def accuracy(y, p):
    """Fraction equal, of any values."""
    y, p = np.asarray(y), np.asarray(p)
    if y.shape != p.shape or y.size == 0:
        raise ValueError(f"The truth has shape {y.shape}, the prediction {p.shape}; they must be equal and not empty.")
    return float((y == p).mean())


def rmse(y, p):
    """Root of the mean squared difference over all values."""
    return _mean_error(y, p, lambda errors: np.sqrt((errors ** 2).mean()))


def mae(y, p):
    """Mean absolute difference."""
    return _mean_error(y, p, lambda errors: np.abs(errors).mean())


def rmsle(y, p):
    """Root mean squared difference of ln(1 + value). ValueError for negative values."""
    y, p = _same(y, p)
    if (y < 0).any() or (p < 0).any():
        raise ValueError("The RMSLE is not defined for negative values.")
    return rmse(np.log1p(y), np.log1p(p))


def mcrmse(y, p):
    """Mean over the columns of (N, K) of each column's RMSE."""
    return _mean_error(y, p, lambda errors: np.sqrt((errors ** 2).mean(0)).mean())


def qwk(y, p):
    """Quadratic weighted kappa of two ratings (N,). The grid is the union of the labels present, so a rating absent
    from both closes the gap; 1 where only one label is present, since all agree (scikit-learn has NaN)."""
    y, p = _same(y, p)
    labels, place = np.unique(np.concatenate([y, p]), return_inverse=True)
    i, j = place[:len(y)], place[len(y):]
    expected = np.bincount(i, minlength=len(labels))[:, None] * np.bincount(j, minlength=len(labels)) / len(y)
    weights = (np.arange(len(labels))[:, None] - np.arange(len(labels))) ** 2
    return float(1 - ((i - j) ** 2).sum() / (weights * expected).sum()) if len(labels) > 1 else 1.0


def pearson(y, p):
    """Pearson's correlation of (N,) with (N,); NaN where one of them is constant."""
    y, p = _same(y, p)
    if (y == y[0]).all() or (p == p[0]).all():
        return math.nan
    y, p = (_near_one(x - x.mean())[0] for x in (_near_one(y)[0], _near_one(p)[0]))
    return float((y * p).sum() / np.sqrt((y * y).sum() * (p * p).sum()))


def map5(y, p):
    """Mean over rows of 1 / rank of the true label y[i] among the first five of the space-separated labels p[i]; 0
    where it is not there.
    """
    if len(y) != len(p) or len(y) == 0:
        raise ValueError(f"There are {len(y)} true labels and {len(p)} predictions; there must be as many, and some.")
    ranked = [labels.split(" ", 5)[:5] for labels in p]
    return float(np.mean([1 / (1 + five.index(truth)) if truth in five else 0.0 for truth, five in zip(y, ranked)]))
