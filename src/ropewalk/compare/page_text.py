"""The text of a review page -> Page: a comparison of tools side by side, or the page of one tool.

The text is data. Nothing in it is followed, fetched or made safe for a page; templates escape it. Every line is looked at a fixed
number of times and every expression is bounded, so that the time grows with the text and not with its square.
"""

from __future__ import annotations

import re
from dataclasses import replace

from ropewalk.compare.cards import CardWarning, Page, WarningKind
from ropewalk.compare.claim_reader import MOST, READ, claims_of
from ropewalk.compare.comparison_page import DECISION, read_comparison
from ropewalk.compare.contradictions import conflicts, recomputed, warnings_of
from ropewalk.compare.page_lines import REVIEWED, SCORECARDS, Line, clean, decoded
from ropewalk.compare.tool_page import read_tool
from ropewalk.errors import CardError

MAX_CHARACTERS = 4 << 20


def read_page(text: str | bytes, *, source_url: str | None = None, source_date: str | None = None) -> Page:
    """Reads a page's text into cards with their claims and warnings, or says at which line it could not."""
    whole = decoded(text) if isinstance(text, bytes) else text
    if len(whole) > MAX_CHARACTERS:
        raise CardError(f"the text has {len(whole):,} characters; expected at most {MAX_CHARACTERS:,} of one page", 1)
    lines, hidden = clean(whole)
    title = _title(lines)
    page = read_comparison(lines, *title) if title else read_tool(lines)
    notes: tuple[CardWarning, ...] = (
        (CardWarning(WarningKind.HIDDEN, f"{hidden} characters that cannot be seen were left out"),) if hidden else ()
    )
    cards = []
    for card in page.cards:
        card = replace(card, source_url=source_url, source_date=card.source_date or source_date)
        card = replace(card, panel_percent_recomputed=recomputed(card))
        prose = {"tagline": card.tagline, "description": card.description, "pricing": card.pricing, "best for": card.best_for}
        card = replace(card, claims=claims_of(card.name, prose))
        if len(card.claims) == MOST or any(len(text or "") > READ for text in prose.values()):
            text = f"claims are read up to {MOST}, and from the first {READ:,} characters of a text; this page has more"
            card = replace(card, warnings=(*card.warnings, CardWarning(WarningKind.CLAIM, text)))
        cards.append(card)
    notes += conflicts(cards)
    return replace(page, cards=tuple(replace(card, warnings=(*card.warnings, *warnings_of(card), *notes)) for card in cards))


def _title(lines: list[Line]) -> tuple[int, str] | None:
    """Where the title "A vs B" stands and what it says, or None for a page of one tool."""
    for at, line in enumerate(lines):
        if line.label in (DECISION, *SCORECARDS):
            break
        said = re.sub(r"^compare\s?/\s?", "", line.text, count=1, flags=re.I)
        if " vs " in said.casefold().replace(" vs. ", " vs "):
            again = next((n for n in range(at + 1, min(at + 5, len(lines))) if lines[n].text == said), at)
            return again, said
        if line.label.startswith("reviews/") or REVIEWED.fullmatch(line.text):
            break
    return None
