"""What tokens cost, and what those have saved that were not read again."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from datetime import date
from typing import Protocol

MILLION = 1_000_000
HOUR = 3600  # seconds


class Tokens(Protocol):
    """Tokens of any number of prompts and replies; the three kinds of input together are the prompts."""

    @property
    def input(self) -> int: ...

    @property
    def cache_creation(self) -> int: ...

    @property
    def cache_read(self) -> int: ...

    @property
    def output(self) -> int: ...


@dataclass(frozen=True)
class Price:
    """What a million tokens cost, to say what the prefix store saved."""

    input: float = 0.0
    output: float = 0.0
    cache_read: float = 0.0
    cache_creation: float | None = None  # None: as input
    training: float = 0.0  # for a million trained tokens, of a base
    device_hour: float = 0.0  # in which a training holds one
    currency: str = "USD"
    as_of: str = ""  # the day on which this was the price, as 2026-11-22

    def cost(self, tokens: Tokens) -> float:
        """What these tokens cost."""
        creation = self.input if self.cache_creation is None else self.cache_creation
        paid = tokens.input * self.input + tokens.cache_creation * creation
        return (paid + tokens.cache_read * self.cache_read + tokens.output * self.output) / MILLION

    def trained(self, tokens: int, device_seconds: float) -> float | None:
        """What a training costs; None where no price of one is known."""
        if not self.training and not self.device_hour:
            return None
        return tokens * self.training / MILLION + device_seconds * self.device_hour / HOUR

    def saved(self, cache_read: int) -> float:
        """What more they would have cost, had these tokens been read again."""
        return cache_read * (self.input - self.cache_read) / MILLION


@dataclass
class Money:
    """Sums, each in its currency."""

    amounts: dict[str, float] = field(default_factory=dict)

    def add(self, amount: float, currency: str) -> None:
        self.amounts[currency] = self.amounts.get(currency, 0.0) + amount

    def __str__(self) -> str:
        return " + ".join(f"{shown(amount)} {currency}" for currency, amount in sorted(self.amounts.items()))


def saved(read: Iterable[tuple[str, int]], prices: Mapping[str, Price]) -> Money:
    """What was saved by tokens that were not read again, each told with its model."""
    found = Money()
    for model, cache_read in read:
        if (price := prices.get(model)) is not None:
            found.add(price.saved(cache_read), price.currency)
    return found


def is_day(text: str) -> bool:
    """Whether it is a day as they are written here, such as 2026-11-22."""
    try:
        return date.fromisoformat(text).isoformat() == text
    except ValueError:
        return False


def shown(amount: float) -> str:
    """An amount, with as many decimals as it needs to be more than nothing."""
    decimals = 2 if abs(amount) >= 1 or not amount else 4 if abs(amount) >= 0.01 else 6
    text = f"{amount:,.{decimals}f}"
    return text if decimals == 2 else text.rstrip("0").rstrip(".") or "0"
