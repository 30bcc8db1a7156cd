"""The unified reward: hand-calculated values, and properties over values drawn from a seeded generator."""

import math
import random

import pytest

from reward import KINDS, reward

ODD = [None, math.nan, math.inf, -math.inf, 0.0, -0.0, 1e308, -1e308, 5e-324, 1, -1, 0.3]


def test_fixed_kinds():
    assert KINDS == ("invalid", "failed", "not an edit", "limit", "scored")
    assert [reward(kind, 1.0, 9.0, m_init=1.0, m_best=2.0) for kind in KINDS[:4]] == [0.0, 0.0, 0.5, 0.5]


@pytest.mark.parametrize("before, after, init, best, direction, alpha, expected", [
    # x = alpha * sign * (after - before) / |best - init|, expected = 1 / (1 + e^-x), worked out by hand
    (0.60, 0.65, 0.60, 1.00, "up", 8.0, 0.7310585786),      # x = 1
    (0.60, 0.55, 0.60, 1.00, "up", 8.0, 0.2689414214),      # x = -1
    (0.50, 0.25, 0.50, 0.00, "down", 4.0, 0.8807970780),    # x = 2
    (0.25, 0.50, 0.50, 0.00, "down", 4.0, 0.1192029220),    # x = -2
    (10.0, 11.0, 10.0, 18.0, "up", 8.0, 0.7310585786),      # x = 1, another scale
    (3.0, 3.0, 1.0, 9.0, "down", 8.0, 0.5),
    (0.0, 0.1, 0.0, 1.0, "up", 8.0, 0.6899744811),          # x = 0.8: a tenth of the gap
    (0.0, 0.5, 0.0, 1.0, "up", 8.0, 0.9820137900),          # x = 4: half of it
])
def test_hand_calculated(before, after, init, best, direction, alpha, expected):
    found = reward("scored", before, after, m_init=init, m_best=best, direction=direction, alpha=alpha)
    assert found == pytest.approx(expected, abs=1e-9)


def test_total_and_bounded():
    draw = random.Random(0)
    for _ in range(20000):
        before, after, init, best = (draw.choice(ODD) if draw.random() < 0.5 else
                                     draw.uniform(-1, 1) * 10 ** draw.randint(-300, 300) for _ in range(4))
        r = reward(draw.choice(KINDS), before, after, m_init=init, m_best=best, direction=draw.choice(("up", "down")),
                   alpha=draw.choice((1e-9, 1.0, 8.0, 1e300)))
        assert type(r) is float and 0.0 <= r <= 1.0


def test_monotone_in_the_right_direction():
    draw = random.Random(1)
    for _ in range(5000):
        before, init, best = (draw.choice(ODD) if draw.random() < 0.2 else draw.uniform(-2, 2) for _ in range(3))
        low, high = sorted(draw.choice([math.inf, -math.inf]) if draw.random() < 0.1 else draw.uniform(-3, 3)
                           for _ in range(2))
        up = [reward("scored", before, after, m_init=init, m_best=best, direction="up") for after in (low, high)]
        down = [reward("scored", before, after, m_init=init, m_best=best, direction="down") for after in (low, high)]
        assert up[0] <= up[1] and down[0] >= down[1]


def test_strictly_monotone_inside_the_gap():
    for direction in ("up", "down"):
        rewards = [reward("scored", 0.5, i / 20, m_init=0.5, m_best=1.0, direction=direction) for i in range(21)]
        assert len(set(rewards)) == 21 and rewards == sorted(rewards, reverse=direction == "down")


def test_half_at_no_change_and_symmetric():
    draw = random.Random(2)
    for _ in range(2000):
        before, init, best, delta = (draw.uniform(-5, 5) for _ in range(4))
        for direction in ("up", "down"):
            assert reward("scored", before, before, m_init=init, m_best=best, direction=direction) == 0.5
            ahead, behind = (reward("scored", 0.0, d, m_init=init, m_best=best, direction=direction)
                             for d in (delta, -delta))
            assert ahead + behind == pytest.approx(1.0, abs=1e-12)
        both = [reward("scored", before, before + delta, m_init=init, m_best=best, direction=d) for d in ("up", "down")]
        assert sum(both) == pytest.approx(1.0, abs=1e-12)


@pytest.mark.parametrize("init, best", [(0.4, 0.4), (None, 1.0), (1.0, None), (math.nan, 1.0), (0.0, math.inf),
                                        (math.inf, math.inf), (-1e308, 1e308)])
def test_no_usable_gap_leaves_the_direction(init, best):
    assert reward("scored", 0.5, 0.6, m_init=init, m_best=best) == 1.0
    assert reward("scored", 0.5, 0.4, m_init=init, m_best=best) == 0.0
    assert reward("scored", 0.5, 0.5, m_init=init, m_best=best) == 0.5
    assert reward("scored", 0.5, 0.4, m_init=init, m_best=best, direction="down") == 1.0


def test_missing_scores():
    assert reward("scored", 0.5, None, m_init=0.5, m_best=1.0) == 0.0
    assert reward("scored", 0.5, math.nan, m_init=0.5, m_best=1.0) == 0.0
    # m_init stands in for m_before: x = 8 * 0.05 / 0.4 = 1
    assert reward("scored", None, 0.55, m_init=0.5, m_best=0.9) == pytest.approx(0.7310585786)
    assert reward("scored", math.nan, 0.55, m_init=0.5, m_best=0.9) == pytest.approx(0.7310585786)
    assert reward("scored", None, 0.55, m_best=0.9) == 0.5
    assert reward("scored", 0.5, math.inf, m_init=0.5, m_best=1.0) == 1.0
    assert reward("scored", 0.5, math.inf, m_init=0.5, m_best=1.0, direction="down") == 0.0
    assert reward("scored", math.inf, math.inf, m_init=0.5, m_best=1.0) == 0.5


@pytest.mark.parametrize("call, word", [
    (dict(kind="great"), "great"), (dict(kind="scored", direction="sideways"), "sideways"),
    (dict(kind="scored", alpha=0.0), "alpha"), (dict(kind="scored", alpha=math.nan), "alpha")])
def test_mistakes_of_the_caller_are_named(call, word):
    with pytest.raises(ValueError, match=word):
        reward(**call)
