"""Writes a card as the text of a review page, blank lines where they are wanted: the way back from `read_page`."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from ropewalk.compare.cards import Card, Page


def render(page: Page, blank: Callable[[], int] = lambda: 0, newline: str = "\n") -> str:
    """The text of a comparison page in the order in which such pages print it, with `blank()` empty lines after each line."""
    return "".join(line + newline * (1 + blank()) for line in lines(page))


def lines(page: Page) -> Iterator[str]:
    yield from (f"Compare/{page.title}", "Side by side", page.title)
    if page.intro:
        yield page.intro
    for card in page.cards:
        yield from head(card)
    yield "Decision"
    yield from (card.name for card in page.cards)
    rows = [
        ("Panel verdict", [verdict(card) for card in page.cards]),
        ("Community", [card.community for card in page.cards]),
        ("Pricing", [card.pricing for card in page.cards]),
        ("Best for", [card.best_for for card in page.cards]),
        ("Category", [card.category for card in page.cards]),
    ]
    for label, values in rows:
        yield label
        if any(values):
            yield from (value or "—" for value in values)
    yield "Reviewer scorecard"
    for entries in zip(*(card.takes for card in page.cards)):
        yield entries[0].persona
        for take in entries:
            if take.missing:
                yield "No panel take"
                continue
            yield f"{take.score:g}/100 · {take.stance}"
            if take.text:
                yield take.text
    yield from ("Weekly news by mail", "Leave an address", "Bookmarks", "None yet")


def head(card: Card) -> Iterator[str]:
    yield card.name[0]
    if card.category:
        yield card.category
    yield card.name
    if card.tagline:
        yield card.tagline
    if card.chip:
        yield card.chip
    if card.panel_percent is not None:
        yield f"{card.panel_percent:g}%"
    yield "Panel ship"
    if card.community_share:
        yield card.community_share
    yield "Community"
    if card.entry_label:
        yield card.entry_label
    yield "Entry"
    if card.description:
        yield card.description


def verdict(card: Card) -> str | None:
    if card.panel_verdict is None:
        return None
    return f"{card.panel_verdict} · {card.panel_ships} ship / {card.panel_skips} skip"
