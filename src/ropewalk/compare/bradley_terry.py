"""Three candidates or more on one scale: Bradley and Terry's model, a tie being half a win for each, with intervals by group.

The intervals are a sandwich: matches of one prompt (and of prompts of one group) are not independent, so their scores are summed
before they are squared. With two candidates this adds nothing to their mean.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.special import expit, stdtrit

from ropewalk.compare.statistics import LEVEL

Floats = NDArray[np.float64]
STEPS, CLOSE = 200, 1e-10


@dataclass(frozen=True, slots=True)
class Match:
    """Two answers to one prompt."""

    left: str
    right: str
    score: float  # of the left one: 1 it won, 0.5 a tie, 0 it lost
    group: str


@dataclass(frozen=True)
class Strength:
    """One candidate: its log-strength (the mean over all is 0) and how often it would beat the baseline, with 95 % intervals."""

    name: str
    value: float
    low: float
    high: float
    share: float
    share_low: float
    share_high: float


def bradley_terry(matches: Sequence[Match], baseline: str) -> list[Strength]:
    """The strengths, strongest first; intervals are without end where the matches cannot bound them.

    That is so with fewer than two groups, and where some candidates never lost (or won) half a point against the others.
    """
    names = sorted({m.left for m in matches} | {m.right for m in matches} | {baseline})
    index = {name: i for i, name in enumerate(names)}
    left, right = (np.array([index[getattr(m, side)] for m in matches], dtype=int) for side in ("left", "right"))
    scores = np.array([m.score for m in matches], dtype=float)
    bounded = connected(left, right, scores, len(names))
    strengths = fit(left, right, scores, len(names), 0.0 if bounded else 1e-2)
    known = {m.group: i for i, m in enumerate(matches)}
    spread, n = covariance(left, right, scores, np.array([known[m.group] for m in matches]), strengths)
    t = float(stdtrit(n - 1, 1 - LEVEL / 2)) if n > 1 and bounded else math.inf
    base, found = index[baseline], []
    for name, i in index.items():
        half = t * math.sqrt(spread[i, i]) if math.isfinite(t) else math.inf
        apart = math.sqrt(max(spread[i, i] + spread[base, base] - 2 * spread[i, base], 0.0))
        gap, reach = float(strengths[i] - strengths[base]), 0.0 if i == base else (t * apart if math.isfinite(t) else math.inf)
        shares = (float(expit(gap)), float(expit(gap - reach)), float(expit(gap + reach)))
        found.append(Strength(name, float(strengths[i]), float(strengths[i]) - half, float(strengths[i]) + half, *shares))
    return sorted(found, key=lambda s: -s.value)


def fit(left: NDArray[np.int_], right: NDArray[np.int_], scores: Floats, k: int, ridge: float) -> Floats:
    """The likeliest strengths by Newton's steps, centred; the ridge holds together what the matches do not."""
    strengths = np.zeros(k)
    for _ in range(STEPS):
        chance = expit(strengths[left] - strengths[right])
        slope = np.bincount(left, scores - chance, k) - np.bincount(right, scores - chance, k) - ridge * strengths
        step = np.linalg.pinv(information(left, right, chance, k) + ridge * np.eye(k)) @ slope
        step /= max(1.0, float(np.abs(step).max()) / 2)  # from afar the curvature is no guide
        strengths = strengths + step
        if float(np.abs(step).max()) < CLOSE:
            break
    return np.asarray(strengths - strengths.mean(), dtype=float)


def information(left: NDArray[np.int_], right: NDArray[np.int_], chance: Floats, k: int) -> Floats:
    weight = chance * (1 - chance)
    pairs = np.zeros((k, k))
    np.add.at(pairs, (left, right), -weight)
    np.add.at(pairs, (right, left), -weight)
    return np.asarray(pairs - np.diag(pairs.sum(1)), dtype=float)


def covariance(
    left: NDArray[np.int_], right: NDArray[np.int_], scores: Floats, groups: NDArray[np.int_], strengths: Floats
) -> tuple[Floats, int]:
    """The sandwich over groups, and how many groups there are."""
    k, chance = len(strengths), expit(strengths[left] - strengths[right])
    names, group = np.unique(groups, return_inverse=True)
    n = len(names)
    summed = np.zeros((n, k))
    np.add.at(summed, (group, left), scores - chance)
    np.add.at(summed, (group, right), chance - scores)
    bread = np.linalg.pinv(information(left, right, chance, k))
    return np.asarray(bread @ (summed.T @ summed) @ bread * (n / max(n - 1, 1)), dtype=float), n


def connected(left: NDArray[np.int_], right: NDArray[np.int_], scores: Floats, k: int) -> bool:
    """Whether from each candidate a chain of half-points leads to every other; if not, some strength has no bound (Ford 1957)."""
    reach = np.eye(k, dtype=bool)
    reach[left[scores > 0], right[scores > 0]] = True
    reach[right[scores < 1], left[scores < 1]] = True
    for _ in range(k.bit_length()):
        reach = (reach.astype(int) @ reach.astype(int)) > 0
    return bool(reach.all())
