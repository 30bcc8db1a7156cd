"""The unified reward: hand-calculated values, and properties over values drawn from a seeded generator."""

import math
import random

import pytest

from reward import KINDS, best_of, reward

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


# -- below the best score so far

@pytest.mark.parametrize("before, after, top, direction, expected", [
    # gap 0.4, alpha 8, so s(m) = 1 / (1 + e^(-20 (m - top))), worked out by hand
    (0.55, 0.60, 0.60, "up", 0.7310585786),     # 0.5 + 0.5 - 0.2689414214: a fall is taken back, as in the paper
    (0.55, 0.575, 0.60, "up", 0.6085992474),    # 0.5 + 0.3775406688 - 0.2689414214: half of it
    (0.575, 0.60, 0.60, "up", 0.6224593312),    # and the other half: both together earn the same as one
    (0.60, 0.55, 0.60, "up", 0.2689414214),     # from the best down: as in the paper
    (0.55, 0.65, 0.60, "up", 0.9621171573),     # 0.5 + 0.7310585786 - 0.2689414214: and beyond
    (0.40, 0.70, 0.60, "up", 1.0),              # 0.5 + 0.8807970780 - 0.0179862100 is above 1
    (0.65, 0.60, 0.60, "down", 0.7310585786),   # where lower is better
    (0.55, 0.60, 0.55, "up", 0.7310585786),     # x = 1 from the best
    (0.55, 0.60, 0.50, "up", 0.7310585786),     # a best that is worse than what the edit starts from is none
    (0.55, 0.60, None, "up", 0.7310585786), (0.55, 0.60, math.nan, "up", 0.7310585786),
])
def test_below_the_best_so_far(before, after, top, direction, expected):
    found = reward("scored", before, after, m_top=top, m_init=0.6, m_best=1.0, direction=direction)
    assert found == pytest.approx(expected, abs=1e-9)


def test_total_monotone_and_bounded_below_the_best():
    draw = random.Random(3)
    for _ in range(20000):
        before, top, init, best = (draw.choice(ODD) if draw.random() < 0.4 else draw.uniform(-2, 2) for _ in range(4))
        low, high = sorted(draw.choice([math.inf, -math.inf, 0.0]) if draw.random() < 0.2 else draw.uniform(-3, 3)
                           for _ in range(2))
        rewards = [reward("scored", before, after, m_top=top, m_init=init, m_best=best) for after in (low, high)]
        assert 0.0 <= rewards[0] <= rewards[1] <= 1.0
        if before is not None and not math.isnan(before):
            assert reward("scored", before, before, m_top=top, m_init=init, m_best=best) == 0.5


def test_nothing_but_a_better_best_score_earns_more_than_half_a_step():
    """Edits in any order, with runs, failures and steps back between them: the excess over 0.5 a step is at most what
    the rises of the best score earn, each alpha / 4 times its share of the gap at most. The paper's formula fails this:
    it pays for climbing in small steps what it never took for the fall."""
    draw = random.Random(4)
    for _ in range(3000):
        direction = draw.choice(("up", "down"))
        alpha = draw.choice((2.0, 8.0, 50.0))
        sign = 1 if direction == "up" else -1
        gap = 0.0 if draw.random() < 0.1 else draw.uniform(0.1, 2)
        start = m_before = m_top = draw.uniform(-1, 1)
        m_init = start
        m_best = start + sign * gap
        levels = [start + draw.uniform(-1, 1) for _ in range(4)] + [start]
        excess = rises = 0.0
        for _ in range(draw.randint(1, 40)):
            kind = draw.choice(("scored",) * 6 + KINDS)
            m_after = draw.choice(levels) if kind == "scored" else m_before
            fixed = dict(m_init=m_init, m_best=m_best, direction=direction, alpha=alpha)
            excess += reward(kind, m_before, m_after, m_top=m_top, **fixed) - 0.5
            rise = max(0.0, sign * (m_after - m_top))
            rises += min(0.5, alpha * rise / (4 * gap)) if gap else 0.5 * (rise > 0)
            m_before = m_after
            m_top = m_after if rise else m_top
            assert excess <= rises + 1e-9


def test_a_fall_and_a_ladder_earn_nothing():
    ladder = [0.5, 0.1, 0.2, 0.3, 0.4, 0.5]
    fixed = dict(m_init=0.5, m_best=0.9)
    ours = sum(reward("scored", *pair, m_top=0.5, **fixed) - 0.5 for pair in zip(ladder, ladder[1:]))
    papers = sum(reward("scored", *pair, **fixed) - 0.5 for pair in zip(ladder, ladder[1:]))
    assert ours == pytest.approx(0, abs=1e-12) and papers > 1


@pytest.mark.parametrize("before, after, top, expected", [
    (0.3, 0.4, 0.5, 0.5), (0.5, 0.4, 0.5, 0.0), (0.4, 0.5, 0.5, 1.0), (0.4, 0.6, 0.5, 1.0), (0.5, 0.6, 0.5, 1.0)])
def test_without_a_scale_only_reaching_or_leaving_the_best_counts(before, after, top, expected):
    assert reward("scored", before, after, m_top=top, m_init=0.5, m_best=0.5) == expected


def test_infinite_scores_below_the_best():
    fixed = dict(m_init=0.5, m_best=0.9)
    assert reward("scored", -math.inf, 0.5, m_top=0.5, **fixed) == 1.0
    assert reward("scored", 0.5, -math.inf, m_top=0.5, **fixed) == 0.0
    assert reward("scored", -math.inf, -math.inf, m_top=0.5, **fixed) == 0.5
    assert reward("scored", 0.3, 0.4, m_top=math.inf, **fixed) == 0.5
    assert reward("scored", math.inf, 0.4, m_top=math.inf, **fixed) == 0.0
    assert reward("scored", 0.3, math.inf, m_top=math.inf, **fixed) == 1.0


def test_the_best_of_scores_is_the_best_that_is_known():
    assert best_of("up", 0.3, None, math.nan, 0.5) == 0.5 and best_of("down", 0.3, None, math.nan, 0.5) == 0.3
    assert best_of("up", None, math.nan) is None
