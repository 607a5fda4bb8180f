"""What would be left of a difference if both answers were equally long: judges like length."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from scipy.special import stdtrit

from ropewalk.compare.evidence import Kind, Row
from ropewalk.compare.statistics import LEVEL
from ropewalk.compare.verdict import Interval

FULL = 0.5  # a log-ratio of lengths (a factor of 1.6) from which more length says little more


def length_controlled(rows: Sequence[Row], level: float = LEVEL) -> Interval | None:
    """The difference at equal length: the constant of a straight line of differences over how much longer the new answer is.

    The length term is AlpacaEval's, tanh of the log-ratio; the interval is robust to unequal variances and clustered, since the
    line is drawn through means of groups. None where no judged row has lengths or all differ alike: then nothing can be told.
    """
    if not any(row.kind is Kind.JUDGE and row.lengths for row in rows):
        return None
    sums: dict[str, list[float]] = {}
    for row in rows:
        seen = sums.setdefault(row.group, [0.0, 0.0, 0.0])
        seen[0] += row.new - row.old
        seen[1] += longer(row)
        seen[2] += 1.0
    table = np.array(list(sums.values()))
    y, x, n = table[:, 0] / table[:, 2], table[:, 1] / table[:, 2], len(table)
    spread = x - x.mean()
    total = float(spread @ spread)
    if n < 4 or total < 1e-12:
        return None
    slope = float(spread @ y) / total
    constant = float(y.mean() - slope * x.mean())
    leverage = 1 / n + spread**2 / total
    residual = (y - constant - slope * x) / np.sqrt(
        np.maximum(1 - leverage, 0.05)
    )  # HC2: each inflated by what it pulled the line
    error = math.sqrt(float(np.sum((residual * (1 / n - x.mean() * spread / total)) ** 2)))
    half = float(stdtrit(n - 2, 1 - level / 2)) * error
    return Interval(constant, max(-1.0, constant - half), min(1.0, constant + half))


def longer(row: Row) -> float:
    """How much longer the new answer is, from -1 to 1; 0 for a check, which has no taste."""
    if row.kind is not Kind.JUDGE or row.lengths is None:
        return 0.0
    old, new = row.lengths
    return math.tanh(math.log((new + 1) / (old + 1)) / FULL)
