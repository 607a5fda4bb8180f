"""Cards: what a review page says about a tool. All of it is claim or opinion; nothing in a card was measured here."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from enum import StrEnum
from typing import Any
from urllib.parse import urlsplit

from ropewalk.compare.claims import Claim

PERSONAS = ("Builder", "Skeptic", "Founder", "Futurist", "Creator")
NO_TAKE = "No panel take"


class WarningKind(StrEnum):
    """What is wrong with a card."""

    PRICE = "price"  # the label beside the price contradicts the pricing
    PERCENT = "percent"  # a percentage that does not follow from the counts, or counts that do not follow from the takes
    CHIP = "chip"  # the verdict shown first is not that of the scorecard
    STANCE = "stance"  # a score that does not go with its ship or skip
    SCORE = "score"  # a number outside its scale
    MISSING_TAKE = "missing take"  # a persona of the page says nothing
    BEST_FOR = "best for"  # the tagline once more
    COMMUNITY = "community"  # two vote shares
    CATEGORY = "category"  # two categories
    CLAIM = "claim"  # two values for one claim
    UNPLACED = "unplaced"  # a value whose tool cannot be told
    DUPLICATE = "duplicate"  # one tool twice, with different facts
    HIDDEN = "hidden"  # characters that cannot be seen


@dataclass(frozen=True)
class CardWarning:
    """A contradiction or a gap, in a sentence."""

    kind: WarningKind
    text: str


@dataclass(frozen=True)
class Take:
    """What one persona of a page's panel says; without score, stance and text it is "No panel take"."""

    persona: str
    score: float | None = None  # of 100
    stance: str | None = None  # ship, skip
    text: str | None = None

    @property
    def missing(self) -> bool:
        return self.score is None and self.stance is None and self.text is None


@dataclass(frozen=True)
class Card:
    """One tool as a page describes it; what the page does not say is None."""

    name: str
    category: str | None = None
    tagline: str | None = None
    description: str | None = None  # paragraphs joined by a newline
    entry_label: str | None = None  # Paid, Free
    pricing: str | None = None
    chip: str | None = None  # Ship or Skip beside the name
    panel_verdict: str | None = None  # Ship or Skip in the table, or what stands there instead
    panel_ships: int | None = None
    panel_skips: int | None = None
    panel_percent: float | None = None  # as printed
    panel_percent_recomputed: float | None = None  # from the takes, or from the counts where there are none
    community_share: str | None = None  # beside the name
    community: str | None = None  # in the table
    best_for: str | None = None
    takes: tuple[Take, ...] = ()
    other: tuple[tuple[str, str], ...] = ()  # rows of the table under labels that are not among the usual ones
    home_url: str | None = None
    source_url: str | None = None
    source_date: str | None = None  # YYYY-MM-DD
    claims: tuple[Claim, ...] = ()
    warnings: tuple[CardWarning, ...] = ()


def stored(card: Card) -> dict[str, Any]:
    """The card as plain values, such as JSON holds."""
    return asdict(card)


def restored(values: Mapping[str, Any]) -> Card:
    """The card that was stored, also after its values went through JSON, which has lists for tuples."""
    parts = {
        "takes": tuple(Take(**take) for take in values.get("takes", ())),
        "other": tuple((label, value) for label, value in values.get("other", ())),
        "claims": tuple(Claim(**claim) for claim in values.get("claims", ())),
        "warnings": tuple(CardWarning(WarningKind(one["kind"]), one["text"]) for one in values.get("warnings", ())),
    }
    return Card(**{**values, **parts})


@dataclass(frozen=True)
class Page:
    """A page of one tool or of several side by side."""

    title: str
    intro: str | None
    cards: tuple[Card, ...]


@dataclass(frozen=True)
class Identity:
    """By what two cards are known to be of one tool."""

    name: str  # letters and digits only, folded
    version: str
    home: str  # host and path, or nothing where the page has no link


VERSION = re.compile(r"[\s(\[]+v?\.?\s?([0-9]{1,6}(?:\.[0-9]{1,6}){0,3})[)\]]?$|[\s(\[]+v([0-9]{1,6}[\w.-]{0,20})[)\]]?$", re.I)


def identity(card: Card) -> Identity:
    """Name, version and home URL, each without what people write in different ways."""
    name = unicodedata.normalize("NFKC", card.name).casefold().strip()
    version = ""
    if matched := VERSION.search(name[-64:]):
        version, name = matched[1] or matched[2], name[: len(name) - len(matched[0])]
    # Marks stay, for vowels are marks in many scripts; + and # stay, for C, C++ and C# are three.
    folded = "".join(c for c in name if unicodedata.category(c)[0] in "LNM" or c in "+#")
    return Identity(folded or name, version, _home(card.home_url))


def _home(url: str | None) -> str:
    try:
        parts = urlsplit(url.strip()) if url else None
    except ValueError:  # not a URL, such as http://[
        return ""
    if parts is None or parts.scheme not in ("http", "https"):
        return ""
    return parts.netloc.casefold().removeprefix("www.") + parts.path.rstrip("/")


def same_tool(one: Card, other: Card) -> bool:
    """Whether two cards are of one tool: same name and version, and no two different home pages."""
    a, b = identity(one), identity(other)
    return (a.name, a.version) == (b.name, b.version) and (a.home == b.home or not a.home or not b.home)
