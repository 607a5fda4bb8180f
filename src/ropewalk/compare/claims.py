"""A claim is a number that a page states; a measurement leaves it untested, confirms it or contradicts it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import StrEnum

NEAR = 0.1  # "about 10" is a band of a tenth on either side


class ClaimStatus(StrEnum):
    """What a measurement says to a claim."""

    UNTESTED = "untested"
    CONFIRMED = "confirmed"
    CONTRADICTED = "contradicted"


@dataclass(frozen=True)
class Claim:
    """A number that a page states: "15x faster on one GPU" is 15, unit x, sense faster, metric speed."""

    id: str
    text: str  # as the page has it
    metric: str
    value: float
    unit: str
    sense: str = ""  # the direction: faster, less, cheaper, ...
    conditions: str = ""
    high: float | None = None  # of a range, whose lower end is `value`
    bound: str = ""  # at least, at most, up to, about
    negated: bool = False
    source: str = ""  # the field it stands in


def status(claim: Claim, low: float | None = None, high: float | None = None) -> ClaimStatus:
    """Confirmed when the measured interval, in the claim's unit, contains it; contradicted when it excludes it; else untested.

    A bound is confirmed when the whole interval keeps it and contradicted when none of it does. "Up to" is confirmed once the
    interval reaches the value; a lower measurement under other conditions does not contradict it. Of a range, the whole interval
    must lie inside. A negated value is confirmed when it is excluded, but no interval proves equality, so it is never contradicted.
    """
    if low is None or high is None or not (math.isfinite(low) and math.isfinite(high)):
        return ClaimStatus.UNTESTED
    if low > high:
        raise ValueError(f"a measurement's interval begins at its lower end: {low} to {high}")
    held, broken = _held(claim, low, high)
    if claim.negated:
        held, broken = broken, held and (claim.bound in ("at least", "at most") or claim.high is not None)
    return ClaimStatus.CONFIRMED if held else ClaimStatus.CONTRADICTED if broken else ClaimStatus.UNTESTED


def _held(claim: Claim, low: float, high: float) -> tuple[bool, bool]:
    value = claim.value
    if claim.high is not None:
        return value <= low and high <= claim.high, high < value or low > claim.high
    if claim.bound == "at least":
        return low >= value, high < value
    if claim.bound == "at most":
        return high <= value, low > value
    if claim.bound == "up to":
        return high >= value, False
    slack = abs(value) * NEAR if claim.bound == "about" else 0.0
    inside = low <= value + slack and high >= value - slack
    return inside, not inside
