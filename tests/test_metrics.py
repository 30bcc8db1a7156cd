"""The metrics against scikit-learn and plain loops, on random and on hostile input."""
import math

import numpy as np
import pytest
from sklearn import metrics as sk

import tasks
from tasks import metrics

RNG = np.random.default_rng(0)
PAIRED = (metrics.log_loss, metrics.auc, metrics.accuracy, metrics.rmse, metrics.mae, metrics.rmsle, metrics.mcrmse,
          metrics.qwk, metrics.pearson)


def test_log_loss_of_classes_matches_scikit_learn_and_does_not_rescale_rows():
    p = RNG.dirichlet(np.ones(5), 40)
    p[0] = [1, 0, 0, 0, 0]
    p[1] = [0, 1, 0, 0, 0]           # certainty is clipped, not infinite
    labels = RNG.integers(0, 4, 40)                         # class 4 has no row
    y = np.eye(5)[labels]
    assert metrics.log_loss(y, p) == pytest.approx(sk.log_loss(labels, p, labels=range(5)), rel=1e-12)
    assert metrics.log_loss(y, p / 2) > metrics.log_loss(y, p) + 0.5


def test_log_loss_of_a_sure_mistake_is_the_logarithm_of_the_machine_epsilon():
    assert metrics.log_loss([[0, 1]], [[1, 0]]) == pytest.approx(-math.log(2 ** -52))
    assert metrics.log_loss([1.0], [0.0]) == pytest.approx(-math.log(2 ** -52))


def test_binary_log_loss_matches_scikit_learn():
    y = RNG.integers(0, 2, 50)
    p = RNG.random(50)
    assert metrics.log_loss(y, p) == pytest.approx(sk.log_loss(y, p), rel=1e-12)
    assert metrics.log_loss([1], [0.25]) == pytest.approx(math.log(4))


def pairs_auc(y, p):
    """The share of (positive, negative) pairs in the right order, ties half."""
    pairs = [(a, b) for a, i in zip(p, y) if i for b, j in zip(p, y) if not j]
    return sum((a > b) + 0.5 * (a == b) for a, b in pairs) / len(pairs)


@pytest.mark.parametrize("p", [RNG.random(60), RNG.integers(0, 3, 60), np.full(60, 0.5), np.r_[np.zeros(59), 1]])
def test_auc_counts_pairs_with_ties_as_half(p):
    y = RNG.integers(0, 2, 60)
    assert metrics.auc(y, p) == pytest.approx(pairs_auc(y, p), abs=1e-12)
    assert metrics.auc(y, p) == pytest.approx(sk.roc_auc_score(y, p), abs=1e-12)


def test_auc_of_columns_is_their_mean_and_needs_both_classes():
    y = RNG.integers(0, 2, (60, 3))
    p = RNG.random((60, 3))
    assert metrics.auc(y, p) == pytest.approx(np.mean([pairs_auc(y[:, k], p[:, k]) for k in range(3)]))
    with pytest.raises(ValueError, match="both classes"):
        metrics.auc([1, 1], [0.1, 0.2])


def test_errors_of_numbers_match_plain_loops():
    y = RNG.gamma(2, 3, (30, 4))
    p = RNG.gamma(2, 3, (30, 4))
    squares = [[(y[i, k] - p[i, k]) ** 2 for k in range(4)] for i in range(30)]
    assert metrics.rmse(y, p) == pytest.approx(math.sqrt(sum(map(sum, squares)) / 120))
    columns = [math.sqrt(sum(row[k] for row in squares) / 30) for k in range(4)]
    assert metrics.mcrmse(y, p) == pytest.approx(sum(columns) / 4)
    assert metrics.mae(y[:, 0], p[:, 0]) == pytest.approx(sk.mean_absolute_error(y[:, 0], p[:, 0]))
    assert metrics.rmsle(y[:, 0], p[:, 0]) == pytest.approx(math.sqrt(sk.mean_squared_log_error(y[:, 0], p[:, 0])))
    with pytest.raises(ValueError, match="negative"):
        metrics.rmsle([1.0], [-0.5])


def test_accuracy_counts_equal_values_of_any_kind():
    assert metrics.accuracy(["a", "b", "c"], ["a", "x", "c"]) == pytest.approx(2 / 3)
    assert metrics.accuracy([True], [False]) == 0.0


@pytest.mark.parametrize("y, p", [
    (RNG.integers(1, 7, 80), RNG.integers(1, 7, 80)), ([1, 1, 2, 6], [1, 2, 2, 6]), ([3, 3, 3], [2, 4, 3]),
    ([1, 2, 3], [2, 2, 2])])
def test_qwk_matches_scikit_learn_on_the_union_of_the_labels(y, p):
    assert metrics.qwk(y, p) == pytest.approx(sk.cohen_kappa_score(y, p, weights="quadratic"), abs=1e-12)


def test_qwk_closes_the_gap_of_an_absent_rating_and_is_1_for_one_label():
    assert metrics.qwk([1, 1, 2, 6], [1, 2, 2, 6]) == metrics.qwk([1, 1, 2, 3], [1, 2, 2, 3])
    assert metrics.qwk([2, 2], [2, 2]) == 1.0


def test_pearson_matches_numpy_and_is_undefined_for_constants():
    y = RNG.normal(size=50)
    p = RNG.normal(size=50)
    assert metrics.pearson(y, p) == pytest.approx(np.corrcoef(y, p)[0, 1])
    assert metrics.pearson(y, -3 * y + 1) == pytest.approx(-1)
    assert math.isnan(metrics.pearson(y, np.full(50, 0.1))) and math.isnan(metrics.pearson([1.0], [2.0]))


@pytest.mark.parametrize("metric, mean", [
    (metrics.rmse, lambda errors: np.sqrt((errors ** 2).mean())), (metrics.mae, lambda errors: np.abs(errors).mean()),
    (metrics.mcrmse, lambda errors: np.sqrt((errors ** 2).mean(0)).mean())])
def test_errors_of_any_size_have_a_finite_mean_to_the_bit(metric, mean):
    y, p = RNG.normal(size=(2, 50, 3))
    assert metric(y, p) == mean(p - y)
    for exponent in (-500, -60, 60, 400):
        factor = 2.0 ** exponent
        assert metric(y * factor, p * factor) == pytest.approx(metric(y, p) * factor, rel=1e-15)
    huge = np.full((50, 3), np.finfo(float).max)
    for p in (huge, -huge, huge * RNG.choice([-1, 1], (50, 3))):
        assert metric(y, p) == pytest.approx(huge[0, 0], rel=1e-12)
    assert metric(y, y) == 0


def test_pearson_does_not_depend_on_the_size_of_the_predictions():
    y, p = RNG.normal(size=(2, 50))
    expected = (((y - y.mean()) * (p - p.mean())).sum()
                / np.sqrt(((y - y.mean()) ** 2).sum() * ((p - p.mean()) ** 2).sum()))
    assert metrics.pearson(y, p) == pytest.approx(expected, rel=1e-14)
    for factor in (1e155, 1e307, 1e-200, 1e-300):
        assert metrics.pearson(y, p * factor) == pytest.approx(expected, abs=1e-7)
    ends = np.finfo(float).max * np.sign(p)
    assert metrics.pearson(y, ends) == pytest.approx(metrics.pearson(y, np.sign(p)))
    assert np.isfinite(metrics.pearson(y, np.r_[np.zeros(49), 5e-324]))


def test_map5_takes_the_first_place_among_five():
    assert metrics.map5(["a"], ["a b c d e"]) == 1.0
    assert metrics.map5(list("aaaa"), ["b a c", "b c d e a", "b c d e f a", ""]) == pytest.approx((1 / 2 + 1 / 5) / 4)
    assert metrics.map5(["a"], ["b b a a a"]) == pytest.approx(1 / 3)       # a repeated label takes a place
    with pytest.raises(ValueError, match="0 predictions"):
        metrics.map5([], [])


@pytest.mark.parametrize("metric", PAIRED)
def test_empty_input_and_unequal_shapes_are_refused(metric):
    for y, p in (([], []), ([1.0, 0.0], [1.0]), ([[1.0, 0.0]], [1.0, 0.0])):
        with pytest.raises(ValueError, match="shape"):
            metric(y, p)


@pytest.mark.parametrize("metric", [metric for metric in PAIRED if metric is not metrics.accuracy])
def test_nan_and_infinity_are_refused(metric):
    for bad in (math.nan, math.inf):
        with pytest.raises(ValueError, match="NaN or infinity"):
            metric([1.0, 0.0], [0.5, bad])


def test_one_row():
    assert metrics.rmse([2.0], [5.0]) == metrics.mae([2.0], [5.0]) == metrics.mcrmse([[2.0]], [[5.0]]) == 3.0
    assert metrics.log_loss([[0, 1, 0]], [[0.25, 0.5, 0.25]]) == pytest.approx(math.log(2))


@pytest.mark.parametrize("n, fraction, seed", [(7, 0.5, 3), (3, 0.01, 1)])
def test_the_split_is_the_rule_restated(n, fraction, seed):
    shuffled = np.random.RandomState(seed).permutation(n)
    num_test = -int(-(fraction * n) // 1)                   # rounded up
    train, test = tasks.split_positions(n, fraction, seed)
    assert list(test) == list(shuffled[:num_test]) and list(train) == list(shuffled[num_test:])


def test_only_tables_smaller_than_any_publishers_are_split_otherwise():
    assert [tasks.share_of_test(0.1, n) for n in (750, 899, 900, 990)] == [0.4, 0.4, 0.1, 0.1]
    assert int((1 - tasks.share_of_test(0.2, 1460)) * 1460) == 1168 and int((1 - 0.02) * 3911) == 3832
