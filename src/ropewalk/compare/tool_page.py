"""The text of one tool's page: name, tagline, price, date, link, description, verdict and takes."""

from __future__ import annotations

import re
from collections.abc import Sequence

from ropewalk.compare.cards import Page
from ropewalk.compare.draft import Draft, card
from ropewalk.compare.page_lines import REVIEWED, SCORECARDS, Line, find
from ropewalk.compare.scorecard import read_scores
from ropewalk.errors import CardError

CHIP = re.compile(r"ship|skip", re.I)
COUNTS = re.compile(r"([0-9]{1,6}) ships?(?:\W{0,5}([0-9]{1,6}) skips?)?", re.I)
URL = re.compile(r"https?://[^\s<>\"]{1,2000}", re.I)


def read_tool(lines: list[Line]) -> Page:
    """The page of one tool: breadcrumb, name, tagline, price, date, link, description, verdict, takes."""
    if not lines:
        raise CardError("the text is blank; expected a comparison page 'A vs B', or the page of one tool", 1)
    crumb = next((n for n, line in enumerate(lines[:20]) if re.match(r"reviews\s?/", line.text, re.I)), None)
    verdict = next((n for n, line in enumerate(lines) if re.fullmatch(r"verdict\W{0,5}.{0,200}", line.text, re.I)), None)
    panel = find(lines, SCORECARDS)
    if verdict is None and panel is None:
        expected = "expected a title 'A vs B', or a line 'Verdict' or 'The Panel's Take'"
        raise CardError(f"the text ends without one of them; {expected}", lines[-1].number)
    end = min(n for n in (verdict, panel) if n is not None)
    start = 0 if crumb is None else crumb + 1
    category = None
    if crumb is not None:
        parts = [part.strip() for part in lines[crumb].text.split("/", 30)]
        category = next(iter(parts[1:-1][-1:]), None)
        start = next((n for n in range(start, end) if lines[n].text == parts[-1]), start)
    if start >= end:
        raise CardError(f"'{lines[end].text[:80]}'; expected the tool's name before it", lines[end].number)
    draft = Draft(lines[start].text)
    if category:
        draft.values["category"] = category
    _facts(lines[start + 1 : end], draft)
    if verdict is not None:
        # "Verdict — Ship, 3 Ships 1 Skips" on one line, or the word and the counts on lines of their own
        said = [re.sub(r"^verdict\W{0,5}", "", lines[verdict].text, flags=re.I)]
        said += [
            line.text for line in lines[verdict + 1 : verdict + 3] if CHIP.fullmatch(line.text) or COUNTS.fullmatch(line.text)
        ]
        if whole := ", ".join(part for part in said if part):
            draft.values["panel_verdict"] = whole
    if panel is not None:
        read_scores(lines[panel + 1 :], [draft])
    return Page(draft.name, None, (card(draft),))


def _facts(lines: Sequence[Line], draft: Draft) -> None:
    """Tagline, price, date and link, each known by its shape or place; the rest is the description."""
    rest: list[Line] = []
    early = True  # before the date, where the price stands
    for line in lines:
        if reviewed := REVIEWED.fullmatch(line.text):
            draft.values["date"] = reviewed[1]
            if early and len(rest) >= 2:
                draft.put("pricing", [rest.pop()])
            early = False
        elif URL.fullmatch(line.text) and "home_url" not in draft.values:
            draft.values["home_url"] = line.text
        else:
            rest.append(line)
    draft.put("tagline", rest[:1])
    draft.put("description", rest[1:], "\n")
