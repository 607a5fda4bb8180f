"""Evidence that may be looked at after every group: a bet against "no difference" whose winnings stay small where there is none.

The bet is a fixed mixture over stakes, both ways, on differences between -1 and 1 (Waudby-Smith and Ramdas, "Estimating means of
bounded random variables by betting", JRSS B 2024; its bound over all looks is Ville's inequality).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from scipy.special import logsumexp

from ropewalk.compare.statistics import LEVEL
from ropewalk.compare.verdict import Interval

Floats = NDArray[np.float64]
STAKES = np.geomspace(0.01, 0.9, 20)  # shares of the largest bet that cannot lose everything
SLOWER = 2.0  # about so many times the prompts of a fixed number are needed at the same power


def p_value(differences: Sequence[float]) -> float:
    """Valid however often it was looked at before: one over the winnings."""
    return float(np.exp(-max(0.0, winnings(differences, np.zeros(1))[0])))


def stops(differences: Sequence[float], level_better: float, level_worse: float = LEVEL) -> int | None:
    """After how many differences a run may stop, because a verdict is certain enough; None: go on."""
    values = np.asarray(differences, dtype=float)
    bets = np.concatenate([STAKES, -STAKES])
    wealth = np.cumsum(np.log1p(values[:, None] * bets), axis=0)
    logs = logsumexp(wealth, axis=1) - np.log(len(bets))
    up = np.cumsum(values) > 0
    enough = logs >= np.where(up, -np.log(level_better), -np.log(level_worse))
    return int(enough.argmax()) + 1 if enough.any() else None


def confidence(differences: Sequence[float], level: float = LEVEL) -> Interval:
    """The means that the bets do not rule out: an interval that holds at whatever moment the run stopped."""
    effect = float(np.mean(differences))
    candidates = np.linspace(-0.9995, 0.9995, 4001)
    kept = candidates[winnings(differences, candidates) < -np.log(level)]
    step = candidates[1] - candidates[0]
    low = min(effect, float(kept[0] - step)) if len(kept) else effect
    high = max(effect, float(kept[-1] + step)) if len(kept) else effect
    return Interval(effect, max(-1.0, low), min(1.0, high))


def winnings(differences: Sequence[float], means: Floats) -> Floats:
    """The log of what a bet of 1 against each mean has become; equal differences are counted, not repeated."""
    values, times = np.unique(np.asarray(differences, dtype=float), return_counts=True)
    up, down = STAKES / (1 + means[:, None]), -STAKES / (1 - means[:, None])
    bets = np.concatenate([up, down], axis=1)  # means x bets
    wealth = np.zeros_like(bets)
    for value, count in zip(values, times):
        wealth += count * np.log1p(bets * (value - means)[:, None])
    return np.asarray(logsumexp(wealth, axis=1) - np.log(bets.shape[1]), dtype=float)
