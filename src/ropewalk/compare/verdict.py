"""A verdict: what the rule said about one candidate, with the figures and the sentences that say why."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from ropewalk.compare.state import State


@dataclass(frozen=True)
class Interval:
    """A difference between two candidates and the 95 % interval around it, as shares: 0.05 is five points."""

    effect: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{100 * self.effect:+.1f} points (95 %: {100 * self.low:+.1f} to {100 * self.high:+.1f})"


@dataclass(frozen=True)
class Reason:
    """One plain sentence, and the ids of the prompts, measurements, guardrails, judges or findings that it rests on."""

    sentence: str
    evidence: tuple[str, ...] = ()


@dataclass(frozen=True)
class Slice:
    """The prompts under one tag."""

    name: str
    interval: Interval
    n_prompts: int
    fell: bool  # worse by more than chance and margin explain, counting how many slices were looked at


@dataclass(frozen=True)
class Verdict:
    """What the rule said about one candidate; never changed afterwards."""

    candidate: str
    baseline: str
    state: State
    reasons: tuple[Reason, ...]  # the first is the headline
    rule_version: str
    interval: Interval | None = None  # None: nothing was compared
    p: float | None = None
    p_adjusted: float | None = None  # Holm over the candidates of the comparison
    method: str = ""  # the test that p is of, in words
    n_prompts: int = 0
    n_groups: int = 0
    n_more: int | None = None  # about so many more prompts would tell; None unless NOT ENOUGH
    n_judged: int = 0  # of n_prompts, those that judges scored
    worst: Slice | None = None
    regressions: tuple[str, ...] = ()  # prompts that got worse
    fixed: tuple[str, ...] = ()  # prompts that got better
    length_controlled: Interval | None = None  # the interval as it would be for answers of equal length; None without judges
    needs_confirmation: bool = False  # chosen among several: the held-back half must say the same before it is shipped
    confirmed: bool | None = None  # what the held-back half said; None: it was not needed, or not asked
    held: Interval | None = None

    @property
    def may_ship(self) -> bool:
        """Whether `ship` goes ahead without an override."""
        return self.state.ships and (not self.needs_confirmation or self.confirmed is True)

    @property
    def effect(self) -> float | None:
        return self.interval.effect if self.interval else None

    @property
    def low(self) -> float | None:
        return self.interval.low if self.interval else None

    @property
    def high(self) -> float | None:
        return self.interval.high if self.interval else None

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {**asdict(self), "effect": self.effect, "low": self.low, "high": self.high, "may_ship": self.may_ship}
