"""Paired differences, group by group: interval, p-value, Holm's correction, and how many more prompts would tell.

The unit is the group (a source document, a conversation), each with one mean: prompts of one group are not independent. Two
made-up groups, in each of which one prompt differs, one for either side, join the interval: for single pass/fail prompts that is
Bonett and Price's adjusted interval (2012), and it keeps the interval honest where few groups or few differences were seen.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.special import bdtr, ndtri, stdtr, stdtrit

from ropewalk.compare.evidence import Kind, Row
from ropewalk.compare.verdict import Interval

LEVEL = 0.05  # two-sided: of "different", and of the intervals shown
POWER = 0.80


@dataclass(frozen=True)
class Counts:
    """Rows by who passed them."""

    both: int
    only_new: int
    only_old: int
    neither: int


@dataclass(frozen=True)
class Paired:
    """Two candidates on the same prompts."""

    interval: Interval
    p: float
    method: str
    n_prompts: int
    n_groups: int
    centre: float  # of the interval
    deviation: float  # standard deviation over groups, the made-up ones among them

    def at(self, level: float) -> Interval:
        """The interval at another two-sided level."""
        return around(self.interval.effect, self.centre, self.deviation, self.n_groups, level)


def counts(rows: Sequence[Row]) -> Counts:
    """Pass/fail rows by who passed them."""
    passed = [(row.old >= 1, row.new >= 1) for row in rows]
    return Counts(*(passed.count(pair) for pair in ((True, True), (False, True), (True, False), (False, False))))


def group_means(rows: Sequence[Row]) -> list[float]:
    """The mean difference of each group, in the order in which the groups first appear."""
    sums: dict[str, list[float]] = {}
    for row in rows:
        seen = sums.get(row.group)
        if seen is None:
            sums[row.group] = [row.new - row.old, 1.0]
        else:
            seen[0] += row.new - row.old
            seen[1] += 1.0
    return [total / size for total, size in sums.values()]


def paired(rows: Sequence[Row]) -> Paired | None:
    """The difference with its interval and p-value; None below two groups."""
    found = of_means(group_means(rows), len(rows))
    if found is None or found.n_groups < found.n_prompts or not all(pass_fail(row) for row in rows):
        return found
    told = counts(rows)
    p = mid_p(told.only_new, told.only_old)
    method = "mid-p McNemar"
    return Paired(found.interval, p, method, found.n_prompts, found.n_groups, found.centre, found.deviation)


def pass_fail(row: Row) -> bool:
    return row.kind is Kind.CHECK and row.old in (0.0, 1.0) and row.new in (0.0, 1.0)


def of_means(means: Sequence[float], n_prompts: int) -> Paired | None:
    """A t-interval and t-test on the means of groups, each between -1 and 1; None below two of them."""
    n = len(means)
    if n < 2:
        return None
    one = n / n_prompts  # what one prompt weighs in its group
    values = np.asarray(means, dtype=float)
    total, squares = float(values.sum()), float(values @ values) + 2 * one * one
    centre = total / (n + 2)
    deviation = math.sqrt(max(squares - (n + 2) * centre * centre, 0.0) / (n + 1))
    t = centre * math.sqrt(n + 2) / deviation
    p = min(1.0, 2 * float(stdtr(n - 1, -abs(t))))
    interval = around(total / n, centre, deviation, n, LEVEL)
    return Paired(interval, p, "t-test on groups", n_prompts, n, centre, deviation)


def around(effect: float, centre: float, deviation: float, n: int, level: float) -> Interval:
    half = float(stdtrit(n - 1, 1 - level / 2)) * deviation / math.sqrt(n + 2)
    return Interval(effect, max(-1.0, centre - half), min(1.0, centre + half))


def mid_p(only_new: int, only_old: int) -> float:
    """McNemar's exact test with the mid-p correction: how unevenly fair coins fall, half of an exact draw counted in."""
    fewer, n = min(only_new, only_old), only_new + only_old
    if not n:
        return 1.0
    return min(1.0, float(bdtr(fewer, n, 0.5)) + (float(bdtr(fewer - 1, n, 0.5)) if fewer else 0.0))


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's step-down correction: the chance of any false alarm among all of them stays at the level of one."""
    order = sorted(range(len(p_values)), key=lambda i: p_values[i])
    adjusted, least = [0.0] * len(p_values), 0.0
    for rank, i in enumerate(order):
        least = max(least, min(1.0, p_values[i] * (len(p_values) - rank)))
        adjusted[i] = least
    return adjusted


def more_prompts(found: Paired, margin: float, level_better: float, candidates: int = 1, factor: float = 1.0) -> int:
    """About how many more prompts tell, four times in five, if the truth is what was seen: a difference, or none beyond the margin."""
    effect = abs(found.interval.effect)
    level = (level_better if found.interval.effect > 0 else LEVEL) / candidates
    power = float(ndtri(POWER))
    groups = []
    if effect > 0:
        groups.append(((float(ndtri(1 - level / 2)) + power) * found.deviation / effect) ** 2)
    if effect < margin:
        groups.append(((float(ndtri(1 - LEVEL / 2)) + power) * found.deviation / (margin - effect)) ** 2)
    per_group = found.n_prompts / found.n_groups
    more = max(min(groups) * factor * per_group - found.n_prompts, 1.0)
    return two_figures(more)


def two_figures(number: float) -> int:
    """Rounded up to two figures: an estimate of an estimate deserves no more."""
    step = int(10 ** max(0, int(math.log10(number)) - 1))
    return math.ceil(number / step) * step
