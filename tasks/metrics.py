"""The metrics of the tasks, as MLE-bench and MLAgentBench compute them.

y is the truth and p the prediction, arrays of one shape. ValueError where they are empty, differ in shape or hold NaN
or infinity. Every other prediction has a finite score, except Pearson's of a constant: if huge predictions were refused
when a sum overflows, then a refusal would tell of the truth.
"""
import math
import sys

import numpy as np

# scikit-learn is imported where it is used: to import it takes a second, and most who import the tasks grade nothing.
quiet = np.errstate(over="ignore", invalid="ignore")     # squares, sums and differences of values near 1e308


def _paired(y, p):
    y = np.asarray(y)
    p = np.asarray(p)
    if y.shape != p.shape or y.size == 0:
        raise ValueError(f"The truth has shape {y.shape}, the prediction {p.shape}; they must be equal and not empty.")
    return y, p


def _checked(y, p):
    y, p = _paired(y, p)
    if not (np.isfinite(y).all() and np.isfinite(p).all()):
        raise ValueError("The truth or the prediction holds NaN or infinity.")
    return y.astype(np.float64), p.astype(np.float64)


def log_loss(y, p):
    """Mean over rows of -sum y ln p, p clipped to [eps, 1 - eps].

    y one-hot (N, K), or 0/1 (N,) with p the probability of 1. Unlike scikit-learn's, rows are not rescaled.
    """
    y, p = _checked(y, p)
    if y.ndim == 1:
        y = np.stack([1 - y, y], 1)
        p = np.stack([1 - p, p], 1)
    eps = np.finfo(np.float64).eps
    return float(-(y * np.log(np.clip(p, eps, 1 - eps))).sum(1).mean())


@quiet
def auc(y, p):
    """Area under the ROC curve, ties counted half; of 0/1 labels (N,), or the mean over the columns of (N, K).

    ValueError where a column has one class.
    """
    from sklearn.metrics import roc_auc_score
    y, p = _checked(y, p)
    if (y == y[0]).all(0).any():
        raise ValueError("The AUC needs labels of both classes.")
    return float(roc_auc_score(y, p))


def accuracy(y, p):
    """Fraction equal, of whole numbers, truth values or texts."""
    y, p = _paired(y, p)
    return float((y == p).mean())


@quiet
def mae(y, p):
    """Mean absolute difference over all values."""
    y, p = _checked(y, p)
    return min(float(np.abs(y - p).mean()), sys.float_info.max)     # the sum of huge errors overflows


@quiet
def mcrmse(y, p):
    """Mean over the columns of (N, K) of each column's root mean squared error."""
    y, p = _checked(y, p)
    return min(float(np.sqrt(((y - p) ** 2).mean(0)).mean()), sys.float_info.max)


def rmse(y, p):
    """Root of the mean squared difference over all values."""
    y, p = _paired(y, p)
    return mcrmse(y.ravel(), p.ravel())


def rmsle(y, p):
    """Root mean squared difference of ln(1 + value), averaged over columns. ValueError for negative values."""
    y, p = _checked(y, p)
    if (y < 0).any() or (p < 0).any():
        raise ValueError("The RMSLE is not defined for negative values.")
    return mcrmse(np.log1p(y), np.log1p(p))


def qwk(y, p):
    """Quadratic weighted kappa of two ratings (N,). The grid is the union of the labels present, so a rating absent
    from both closes the gap; 1 where only one label is present, since all agree (scikit-learn has NaN)."""
    from sklearn.metrics import cohen_kappa_score
    y, p = _checked(y, p)
    if (y == y[0]).all() and (p == y[0]).all():
        return 1.0
    return float(cohen_kappa_score(y, p, weights="quadratic"))


def pearson(y, p):
    """Pearson's correlation of (N,) with (N,); NaN where one of them is constant."""
    y, p = _checked(y, p)
    if (y == y[0]).all() or (p == p[0]).all():
        return math.nan
    p = np.ldexp(p, -np.frexp(np.abs(p).max())[1])      # a power of two changes no digit, and no square overflows
    return float(np.corrcoef(y, p)[0, 1])


def map5(y, p):
    """Mean over rows of 1 / rank of the true label y[i] among the first five of the space-separated labels p[i]; 0
    where it is not there."""
    if len(y) != len(p) or len(y) == 0:
        raise ValueError(f"There are {len(y)} true labels and {len(p)} predictions; there must be as many, and some.")
    points = 0.0
    for truth, labels in zip(y, p):
        ranked = labels.split(" ", 5)[:5]
        if truth in ranked:
            points += 1 / (1 + ranked.index(truth))
    return points / len(y)
