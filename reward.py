"""The unified reward: one number in [0, 1] for whatever one action led to.

    reward = 0                                            kind "invalid" or "failed"
    reward = 0.5                                          kind "not an edit" or "limit"
    reward = min(1, 0.5 + s(m_after) - s(m_before))       kind "scored", an edit
    s(m)   = sigmoid(alpha * sign * (m - m_top) / |m_best - m_init|)

This is the reward module of the ML-Agent paper (arXiv 2505.23723), with one change. `m` is the task's metric as graded,
sign is +1 where higher is better. m_top is the best score that the trajectory has had before this step. An edit that
starts there has s(m_before) = 0.5, and the reward is the paper's sigmoid(alpha * sign * (m_after - m_before) / gap); so
it is for an edit that takes back a fall. Only between two scores below the best it differs: there the paper pays more
for climbing in small steps than it took for falling at once. Here what edits earn above 0.5 adds up to nothing unless
the best score rises. The paper does not give alpha; 8 is ours: an edit that closes a tenth of the gap between the
starter and the best known score earns 0.69, one that closes half of it 0.98.

Every call has an answer, also where the formula has none:

    m_after missing or NaN             0      an edit whose score is unknown is an edit that failed
    m_before missing or NaN            m_init stands in; if that is missing too, 0.5: there is nothing to compare with
    m_after equal to m_before          0.5    also when both are the same infinity
    m_top missing, NaN or not better   m_before is the best so far
    gap zero, missing, NaN, infinite   the scale is unknown, so s is 1 above m_top, 0.5 at it and 0 below it
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


def reward(kind, m_before=None, m_after=None, *, m_top=None, m_init=None, m_best=None, direction="up", alpha=8.0):
    """The reward, a float in [0, 1]; never falls when m_after gets better, is 0.5 at no change.

    kind: one of KINDS; the rest matters for "scored" only. m_before, m_after: graded score before and after the edit.
    m_top: the best score of the trajectory before the edit. m_init, m_best: the starter's score and the best known one.
    direction: "up" where higher is better, else "down". alpha: steepness, positive and finite. ValueError: an unknown
    kind or direction, a bad alpha (mistakes in the calling code; no value of the five scores raises).
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
    top = best_of(direction, m_before, m_top)
    gap = abs(m_best - m_init) if known(m_best) and known(m_init) else math.nan

    def above_half(m):
        """s(m) - 0.5, by tanh, which overflows for no size."""
        if m == top:
            return 0.0
        better = (m > top) == (direction == "up")
        if not 0 < gap < math.inf:  # NaN fails both comparisons
            return 0.5 if better else -0.5
        change = alpha * (abs(m - top) / gap)
        return 0.5 * math.tanh((change if better else -change) / 2)
    return min(1.0, 0.5 + above_half(m_after) - above_half(m_before))


def best_of(direction, *scores):
    """The best of the scores that are known; None if none is."""
    return (max if direction == "up" else min)(filter(known, scores), default=None)
