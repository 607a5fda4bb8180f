"""A page's scorecard: a persona, then per tool a score with a take, or "No panel take"."""

from __future__ import annotations

import re
from collections.abc import Container, Sequence

from ropewalk.compare.cards import NO_TAKE, PERSONAS, CardWarning, Take, WarningKind
from ropewalk.compare.draft import Draft
from ropewalk.compare.page_lines import Line
from ropewalk.errors import CardError

TAKE = re.compile(
    r"([0-9]{1,3}(?:[.,][0-9]{1,3})?)\s?/\s?100(?:\s?[·•|–—-]\s?(ship|skip))?|(?:[—–-]\s?/\s?100\s?)?[·•]\s?(ship|skip)", re.I
)
FOOTER = re.compile(
    r"(?:weekly|get the next|subscribe|newsletter|sign up|bookmark|your bookmarks|share this|embed this|browse the)\b", re.I
)


def _begins_entry(line: Line) -> bool:
    return line.text == NO_TAKE or line.label == NO_TAKE.casefold() or TAKE.fullmatch(line.text) is not None


def read_scores(lines: Sequence[Line], drafts: list[Draft]) -> Sequence[Line]:
    """The scorecard: a persona, then per tool a score with a take, or "No panel take"; returns the lines after it."""
    known = {persona.casefold(): persona for persona in PERSONAS}
    entry = [_begins_entry(line) for line in lines]
    final = max((n for n, begins in enumerate(entry) if begins), default=-1)
    at = 0
    while at < len(lines):
        line = lines[at]
        follows = at + 1 < len(lines) and entry[at + 1]
        if entry[at]:
            raise CardError(f"'{line.text[:80]}'; expected the name of a persona before its {len(drafts)} takes", line.number)
        if line.label not in known and not follows:
            if at > final:
                break
            loose = at
            while not entry[at + 1] and lines[at].label not in known:
                at += 1
            said = "; ".join(part.text[:200] for part in lines[loose : min(at, loose + 20)])
            _warn(drafts, f"{at - loose} lines of the scorecard stand under no score: {said}")
            continue
        persona = known.get(line.label, line.text)
        at += 1
        takes: list[Take] = []
        if at + 1 < len(lines) and not entry[at] and lines[at].label not in known and entry[at + 1]:
            takes.append(Take(persona, text=lines[at].text))  # the first tool's score is missing
            at += 1
        while at < len(lines) and entry[at] and len(takes) < len(drafts):
            begin = at
            at += 1
            while at < len(lines) and not _ends_take(
                lines, entry, at, known, last=len(takes) + 1 == len(drafts), begin=begin, final=final
            ):
                at += 1
            takes.append(_take(persona, lines[begin], lines[begin + 1 : at]))
        _deal(persona, takes, drafts)
    return lines[at:]


def _ends_take(
    lines: Sequence[Line], entry: Sequence[bool], at: int, known: Container[str], *, last: bool, begin: int, final: int
) -> bool:
    """Whether a line is no more of the take: the next entry, the next persona, or what follows the scorecard."""
    if entry[at] or lines[at].label in known or lines[begin].label == NO_TAKE.casefold():
        return True
    if begin == final:
        # No entry follows, so that the page's end may: the last take is one line, or none.
        return at > begin + 1 or FOOTER.match(lines[at].text) is not None
    return last and at + 1 < len(lines) and entry[at + 1]  # a persona whose name is not among the usual ones


def _take(persona: str, line: Line, text: Sequence[Line]) -> Take:
    matched = TAKE.fullmatch(line.text)
    if matched is None:
        return Take(persona)
    stance = matched[2] or matched[3]
    score = float(matched[1].replace(",", ".")) if matched[1] else None
    return Take(persona, score, stance.lower() if stance else None, "\n".join(part.text for part in text) or None)


def _deal(persona: str, takes: list[Take], drafts: list[Draft]) -> None:
    if takes and len(takes) < len(drafts):
        said = "; ".join(_said(take) for take in takes)
        _warn(drafts, f"{persona} has {len(takes)} of {len(drafts)} takes; of which tool cannot be told: {said}")
        takes = []
    for draft, take in zip(drafts, takes or [Take(persona)] * len(drafts)):
        draft.takes.append(take)


def _said(take: Take) -> str:
    score = None if take.score is None else f"{take.score:g}/100"
    return " · ".join(part for part in (score, take.stance, take.text) if part) or NO_TAKE


def _warn(drafts: list[Draft], text: str) -> None:
    for draft in drafts:
        draft.warnings.append(CardWarning(WarningKind.UNPLACED, text))
