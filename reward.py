"""The unified reward: one number in [0, 1] for whatever one action led to.

    reward = 0                                            kind "invalid" or "failed"
    reward = 0.5                                          kind "not an edit" or "limit"
    reward = sigmoid(alpha * sign * (m_after - m_before) / |m_best - m_init|)     kind "scored"

This is the reward module of the ML-Agent paper (arXiv 2505.23723). `m` is the task's metric as graded, sign is +1 where
higher is better. The paper does not give alpha; 8 is ours: an edit that closes a tenth of the gap between the starter
and the best known score earns 0.69, one that closes half of it 0.98.

Every call has an answer, also where the formula has none:

    m_after missing or NaN             0      an edit whose score is unknown is an edit that failed
    m_before missing or NaN            m_init stands in; if that is missing too, 0.5: there is nothing to compare with
    m_after equal to m_before          0.5    also when both are the same infinity
    gap zero, missing, NaN, infinite   the scale is unknown, so the direction alone counts: 1 for better, 0 for worse
"""

import math

KINDS = ("invalid", "failed", "not an edit", "limit", "scored")
# invalid      no action was taken: the reply did not parse, the name is unknown, or the arguments were refused
# failed       a script ran and crashed, or left no valid submission
# not an edit  a valid action that changes no script: looking at files, running a script that works, the final answer
# limit        a corner case that says little about the edit: out of memory, out of time, disk full
# scored       an edit whose script ran to the end and was graded


def known(value):
    """True for a number that can be compared: not None and not NaN. Infinities can be compared."""
    return value is not None and not math.isnan(value)


def reward(kind, m_before=None, m_after=None, *, m_init=None, m_best=None, direction="up", alpha=8.0):
    """The reward, a float in [0, 1]; never falls when m_after gets better, is 0.5 at no change.

    kind: one of KINDS; the rest matters for "scored" only. m_before, m_after: graded score before and after the edit.
    m_init, m_best: the starter's score and the best known one. direction: "up" where higher is better, else "down".
    alpha: steepness, positive and finite. ValueError: an unknown kind or direction, a bad alpha (mistakes in the
    calling code; no value of the four scores raises).
    """
    if kind not in KINDS:
        raise ValueError(f"reward kind must be one of {', '.join(KINDS)}; found {kind!r}")
    if direction not in ("up", "down"):
        raise ValueError(f"direction must be 'up' or 'down'; found {direction!r}")
    if not 0 < alpha < math.inf:
        raise ValueError(f"alpha must be a positive, finite number; found {alpha!r}")
    if kind in ("invalid", "failed"):
        return 0.0
    if kind in ("not an edit", "limit"):
        return 0.5

    if not known(m_after):
        return 0.0
    if not known(m_before):
        m_before = m_init
    if not known(m_before) or m_after == m_before:
        return 0.5
    better = (m_after > m_before) == (direction == "up")
    gap = abs(m_best - m_init) if known(m_best) and known(m_init) else math.nan
    if not 0 < gap < math.inf:  # NaN fails both comparisons
        return 1.0 if better else 0.0
    change = alpha * (abs(m_after - m_before) / gap)
    return 0.5 * (1 + math.tanh((change if better else -change) / 2))  # sigmoid(change), without overflow for any size
