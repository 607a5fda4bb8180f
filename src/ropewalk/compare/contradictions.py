"""Where a card contradicts itself, or two cards of one tool each other."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from ropewalk.compare.cards import PERSONAS, Card, CardWarning, Identity, WarningKind, identity
from ropewalk.compare.claims import Claim

SKIPS_UP_TO, SHIPS_FROM = 45, 74  # no page seen ships a score up to the first, or skips one from the second
OPEN = re.compile(r"\bopen[\s-]?source\b|\bfree\b(?![\s-]{1,3}(?:trial|tier))", re.I)
MONEY = re.compile(r"[$€£¥]\s?[0-9]|[0-9]\s?(?:USD|EUR|GBP)\b|\b(?:paid|subscription|per month|per seat)\b", re.I)
SHARE = re.compile(r"([0-9]{1,3}(?:[.,][0-9]{1,6})?)\s?%")


def recomputed(card: Card) -> float | None:
    """The share of ships among the stances of the takes, or of the printed counts where no take has one, in percent."""
    stances = [take.stance for take in card.takes if take.stance]
    if stances:
        return 100 * stances.count("ship") / len(stances)
    ships, skips = card.panel_ships, card.panel_skips
    return 100 * ships / (ships + skips) if ships is not None and skips is not None and ships + skips else None


def warnings_of(card: Card) -> tuple[CardWarning, ...]:
    """Every contradiction within one card."""
    checks = (_price, _panel, _chip, _takes, _repeated, _claims)
    return tuple(CardWarning(kind, text) for check in checks for kind, text in check(card))


Found = Iterator[tuple[WarningKind, str]]


def _price(card: Card) -> Found:
    label, pricing = (card.entry_label or "").casefold(), card.pricing or ""
    free, paid = OPEN.search(pricing), MONEY.search(pricing)
    if (label == "paid" and free and not paid) or (label == "free" and paid and not free):
        yield WarningKind.PRICE, f"the entry is '{card.entry_label}', and the pricing is '{pricing}'"


def _panel(card: Card) -> Found:
    stances = [take.stance for take in card.takes if take.stance]
    took = stances.count("ship"), stances.count("skip")
    ships, skips, printed = card.panel_ships, card.panel_skips, card.panel_percent
    counted = ships is not None or skips is not None
    if counted and stances and ((ships or 0), (skips or 0)) != took:
        yield (
            WarningKind.PERCENT,
            f"the verdict counts {ships or 0} ship and {skips or 0} skip, and the takes are {took[0]} ship and {took[1]} skip",
        )
    if printed is None:
        return
    if printed > 100:
        yield WarningKind.SCORE, f"the panel's share is {printed:g}%, and at most 100% is possible"
    if counted and (ships or 0) + (skips or 0):
        follows = 100 * (ships or 0) / ((ships or 0) + (skips or 0))
        if not _rounds(printed, follows):
            yield (
                WarningKind.PERCENT,
                f"{printed:g}% is printed, and the counts {ships or 0} and {skips or 0} make {follows:.4g}%",
            )
    share = recomputed(card) if stances else None
    if share is not None and not _rounds(printed, share):
        yield WarningKind.PERCENT, f"{printed:g}% is printed, and the takes make {share:.4g}%"


def _rounds(printed: float, exact: float) -> bool:
    """Whether a printed percentage is the exact one, rounded to as many places as it shows."""
    places = len(f"{printed:g}".partition(".")[2])
    return abs(printed - exact) <= 0.5 * 10.0**-places + 1e-9


def _chip(card: Card) -> Found:
    stances = [take.stance for take in card.takes if take.stance]
    chip, verdict = (card.chip or "").casefold(), (card.panel_verdict or "").casefold()
    if chip and verdict in ("ship", "skip") and chip != verdict:
        yield WarningKind.CHIP, f"'{card.chip}' stands beside the name, and '{card.panel_verdict}' in the table"
    ships, skips = stances.count("ship"), stances.count("skip")
    shown = chip or verdict
    if stances and ((shown == "ship" and ships < skips) or (shown == "skip" and ships > skips)):
        yield WarningKind.CHIP, f"the verdict is '{shown}', and the scorecard has {ships} ship and {skips} skip"


def _takes(card: Card) -> Found:
    for take in card.takes:
        if take.score is not None and take.score > 100:
            yield WarningKind.SCORE, f"{take.persona}'s score is {take.score:g} of 100"
        elif take.score is not None and (
            (take.stance == "ship" and take.score <= SKIPS_UP_TO) or (take.stance == "skip" and take.score >= SHIPS_FROM)
        ):
            yield WarningKind.STANCE, f"{take.persona} says {take.stance} at {take.score:g} of 100"
    absent = [take.persona for take in card.takes if take.missing]
    absent += [p for p in PERSONAS if card.takes and p.casefold() not in {t.persona.casefold() for t in card.takes}]
    if absent:
        yield WarningKind.MISSING_TAKE, f"no panel take from {', '.join(absent)}"


def _repeated(card: Card) -> Found:
    if card.best_for and card.tagline and _plain(card.best_for) == _plain(card.tagline):
        yield WarningKind.BEST_FOR, "'best for' repeats the tagline, and so says nothing of its own"
    shares = [matched[1] for text in (card.community_share, card.community) if text and (matched := SHARE.search(text))]
    if len(shares) == 2 and float(shares[0].replace(",", ".")) != float(shares[1].replace(",", ".")):
        yield WarningKind.COMMUNITY, f"the community's share is {shares[0]}% beside the name and {shares[1]}% in the table"


def _plain(text: str) -> str:
    return " ".join(text.casefold().split()).rstrip(".!")


def _subject(claim: Claim) -> tuple[str, str, str, str, str]:
    return claim.metric.casefold(), claim.unit.casefold(), claim.sense, claim.conditions.casefold(), claim.bound


def _claims(card: Card) -> Found:
    for one, other in _differing(card.claims):
        yield WarningKind.CLAIM, f"the page says both '{one.text}' and '{other.text}'"


def _differing(claims: Sequence[Claim]) -> Iterator[tuple[Claim, Claim]]:
    """Pairs that state one thing with different values: each later claim against the first of its subject."""
    first: dict[tuple[str, str, str, str, str], Claim] = {}
    for claim in claims:
        earlier = first.setdefault(_subject(claim), claim)
        same = (earlier.value, earlier.high) == (claim.value, claim.high)
        if same == (earlier.negated != claim.negated):
            yield earlier, claim


FACTS = ("category", "entry_label", "pricing", "panel_percent", "panel_verdict", "best_for")


def conflicts(cards: Sequence[Card]) -> tuple[CardWarning, ...]:
    """One tool on several cards with different facts: the same name and version, and no two different home pages."""
    groups: dict[tuple[str, str], list[tuple[Identity, Card]]] = {}
    for card in cards:
        known = identity(card)
        groups.setdefault((known.name, known.version), []).append((known, card))
    found: list[CardWarning] = []
    for group in groups.values():
        earlier: dict[str, Card] = {}  # by home page: the first card of each
        for known, card in group:
            other = (
                earlier.get(known.home) or earlier.get("") or (next(iter(earlier.values()), None) if not known.home else None)
            )
            earlier.setdefault(known.home, card)
            if other is not None:
                found += [
                    CardWarning(WarningKind.DUPLICATE, f"'{other.name}' is on two cards: {text}")
                    for text in _facts(other, card)
                ]
    return tuple(found)


def _facts(one: Card, other: Card) -> Iterator[str]:
    for field in FACTS:
        a, b = getattr(one, field), getattr(other, field)
        if a is not None and b is not None and str(a).casefold() != str(b).casefold():
            label = field.replace("_", " ")
            yield f"{label} is '{a:g}' and '{b:g}'" if isinstance(a, float) else f"{label} is '{a}' and '{b}'"
    for left, right in _differing((*one.claims, *other.claims)):
        if left in one.claims and right in other.claims:
            yield f"it has '{left.text}' and '{right.text}'"
