"""Two candidates on the same rows: which one to ship, if the rows can tell."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from math import comb

LEVEL = 0.05


class Verdict(StrEnum):
    """What the rows say about the new candidate."""

    SHIP = "SHIP"  # better, and chance alone would rarely show it
    TIE = "TIE"  # enough rows differ to tell, and they do not
    SKIP = "SKIP"  # worse, and chance alone would rarely show it
    NOT_ENOUGH = "NOT ENOUGH"  # so few rows differ that even a clean sweep would prove nothing


@dataclass(frozen=True)
class Outcome:
    """Counts of rows by who passed them, and the exact p-value of the difference."""

    both: int
    only_new: int
    only_old: int
    neither: int
    p_value: float
    verdict: Verdict


def compare(old: Sequence[bool], new: Sequence[bool]) -> Outcome:
    """McNemar's exact test on paired passes: only the rows on which the two differ count, and equal ones split like coins."""
    if len(old) != len(new):
        raise ValueError(f"both candidates must answer the same rows: {len(old)} and {len(new)}")
    pairs = list(zip(old, new))
    only_new, only_old = pairs.count((False, True)), pairs.count((True, False))
    p_value = two_sided(only_new, only_old)
    return Outcome(
        pairs.count((True, True)), only_new, only_old, pairs.count((False, False)), p_value, decide(only_new, only_old, p_value)
    )


def two_sided(a: int, b: int) -> float:
    """The chance that a + b fair coins fall at least as unevenly as a to b."""
    tail = sum(comb(a + b, i) for i in range(min(a, b) + 1))
    return min(1.0, tail / (1 << (a + b - 1)) if a + b else 1.0)


def decide(only_new: int, only_old: int, p_value: float) -> Verdict:
    """SHIP or SKIP when the p-value allows it; else TIE, unless no outcome of so few rows could have allowed it."""
    if two_sided(only_new + only_old, 0) > LEVEL:
        return Verdict.NOT_ENOUGH
    if p_value > LEVEL:
        return Verdict.TIE
    return Verdict.SHIP if only_new > only_old else Verdict.SKIP
