"""The text of a review page -> Page: a comparison of tools side by side, or the page of one tool.

The text is data. Nothing in it is followed, fetched or made safe for a page; templates escape it. Every line is looked at a fixed
number of times and every expression is bounded, so that the time grows with the text and not with its square.
"""

from __future__ import annotations

import codecs
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from ropewalk.compare.cards import NO_TAKE, PERSONAS, Card, CardWarning, Page, Take, WarningKind
from ropewalk.compare.claims import MOST, READ, claims_of
from ropewalk.compare.contradictions import recomputed, warnings_of
from ropewalk.errors import CardError

MAX_CHARACTERS = 4 << 20
MAX_TOOLS = 20
DECISION, SCORECARD, PANEL = "decision", "reviewer scorecard", ("the panel's take", "the panel’s take")
ROWS = {
    "panel verdict": "panel_verdict",
    "community": "community",
    "pricing": "pricing",
    "best for": "best_for",
    "category": "category",
}
HEAD_LABELS = ("panel ship", "community", "entry")
ABSENT = {"—", "–", "-", "--", "n/a"}  # what a page prints for a value that it lacks
ENTRIES = {"paid", "free", "freemium", "open source", "trial", "free trial", "contact sales"}
PERCENT = re.compile(r"([0-9]{1,3}(?:[.,][0-9]{1,6})?)\s?%")
CHIP = re.compile(r"ship|skip", re.I)
VERDICT = re.compile(r"(ship|skip)(?:\W{0,5}([0-9]{1,6}) ships?)?(?:\W{0,5}([0-9]{1,6}) skips?)?", re.I)
COUNTS = re.compile(r"([0-9]{1,6}) ships?(?:\W{0,5}([0-9]{1,6}) skips?)?", re.I)
TAKE = re.compile(
    r"([0-9]{1,3}(?:[.,][0-9]{1,3})?)\s?/\s?100(?:\s?[·•|–—-]\s?(ship|skip))?|(?:[—–-]\s?/\s?100\s?)?[·•]\s?(ship|skip)", re.I
)
REVIEWED = re.compile(r"reviewed:?\s([0-9]{4}-[0-9]{2}-[0-9]{2})", re.I)
URL = re.compile(r"https?://[^\s<>\"]{1,2000}", re.I)
FOOTER = re.compile(
    r"(?:weekly|get the next|subscribe|newsletter|sign up|bookmark|your bookmarks|share this|embed this|browse the)\b", re.I
)
BREAK = re.compile(r"\r\n|\r|\n")
SPACE = re.compile(r"[\t\x0b\x0c\x1c-\x1f\x85\u2028\u2029]")
# Controls, marks that turn or hide text, and tag characters: a reader cannot see them, so a card does not carry them. The joiners
# U+200C and U+200D stay, for scripts and emoji are spelt with them.
HIDDEN = re.compile(
    "[\x00-\x08\x0e-\x1b\x7f-\x84\x86-\x9f\u00ad\u061c\u200b\u200e\u200f\u202a-\u202e\u2060-\u206f\ufeff\U000e0000-\U000e007f]"
)
SURROGATE = re.compile("[\ud800-\udfff]")


class Line(NamedTuple):
    """A line that is not blank, with its number in the text; a tuple, for a page may have half a million."""

    number: int
    text: str
    label: str  # the text, folded


@dataclass
class Draft:
    """One tool's fields while the page is read."""

    name: str
    values: dict[str, str] = field(default_factory=dict)
    takes: list[Take] = field(default_factory=list)
    other: list[tuple[str, str]] = field(default_factory=list)
    warnings: list[CardWarning] = field(default_factory=list)

    def put(self, key: str, lines: Sequence[Line], joint: str = " ") -> None:
        text = joint.join(line.text for line in lines)
        if text and text.casefold() not in ABSENT:
            self.values[key] = text


def read_page(text: str | bytes, *, source_url: str | None = None, source_date: str | None = None) -> Page:
    """Reads a page's text into cards with their claims and warnings, or says at which line it could not."""
    whole = decoded(text) if isinstance(text, bytes) else text
    if len(whole) > MAX_CHARACTERS:
        raise CardError(f"the text has {len(whole):,} characters; expected at most {MAX_CHARACTERS:,} of one page", 1)
    lines, hidden = clean(whole)
    title = _title(lines)
    page = _comparison(lines, *title) if title else _tool(lines)
    notes = (CardWarning(WarningKind.HIDDEN, f"{hidden} characters that cannot be seen were left out"),) if hidden else ()
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
    return replace(page, cards=tuple(replace(card, warnings=(*card.warnings, *warnings_of(card), *notes)) for card in cards))


def decoded(raw: bytes) -> str:
    """Bytes as text: UTF-8, or UTF-16 where they begin with its mark."""
    encoding = "utf-16" if raw.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) else "utf-8-sig"
    try:
        return raw.decode(encoding)
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise CardError(f"byte {error.start} is not {encoding}; expected a page saved as UTF-8 text", line) from error


def clean(text: str) -> tuple[list[Line], int]:
    """The lines that are not blank, without what cannot be seen, and how many such characters there were."""
    visible, hidden = HIDDEN.subn("", SPACE.sub(" ", text.removeprefix("\ufeff")))
    visible = SURROGATE.sub("\ufffd", visible)
    stripped = ((number, line.strip()) for number, line in enumerate(BREAK.split(visible), 1))
    return [Line(number, line, line.casefold()) for number, line in stripped if line], hidden


def _title(lines: list[Line]) -> tuple[int, str] | None:
    """Where the title "A vs B" stands and what it says, or None for a page of one tool."""
    for at, line in enumerate(lines):
        if line.label in (DECISION, SCORECARD, *PANEL):
            break
        said = re.sub(r"^compare\s?/\s?", "", line.text, count=1, flags=re.I)
        if " vs " in said.casefold().replace(" vs. ", " vs "):
            again = next((n for n in range(at + 1, min(at + 5, len(lines))) if lines[n].text == said), at)
            return again, said
        if line.label.startswith("reviews/") or REVIEWED.fullmatch(line.text):
            break
    return None


def _find(lines: Sequence[Line], labels: Sequence[str], start: int = 0) -> int | None:
    return next((n for n in range(start, len(lines)) if lines[n].label in labels), None)


def _comparison(lines: list[Line], at: int, title: str) -> Page:
    decision = _find(lines, (DECISION,), at + 1)
    scorecard = _find(lines, (SCORECARD, *PANEL), at + 1 if decision is None else decision + 1)
    if decision is None and scorecard is None:
        raise CardError(
            "the text ends without 'Decision' or 'Reviewer scorecard'; expected a comparison page", lines[-1].number
        )
    body_end = next(n for n in (decision, scorecard) if n is not None)
    head = lines[at + 1 : body_end]
    table = lines[decision + 1 : scorecard] if decision is not None else []
    first = next((n for n, line in enumerate(table) if line.label in ROWS), len(table))
    names = _names(title, [line.text for line in table[:first]], {line.text for line in head}, lines[at])
    drafts = [Draft(name) for name in names]
    _table(table[len(names) if first >= len(names) else first :], drafts)
    intro = _heads(head, drafts, lines[body_end])
    rest = _scores(lines[scorecard + 1 :], drafts) if scorecard is not None else []
    date = next((m[1] for line in (*lines[:at], *rest) if (m := REVIEWED.fullmatch(line.text))), None)
    return Page(title, intro, tuple(replace(_card(draft), source_date=date) for draft in drafts))


def _names(title: str, listed: list[str], known: set[str], line: Line) -> list[str]:
    """The tools' names: those listed under "Decision" if the title joins them, else the parts of the title."""
    folded = title.casefold().replace(" vs. ", " vs ")
    for count in range(2, min(len(listed), MAX_TOOLS) + 1):
        if " vs ".join(listed[:count]).casefold() == folded:
            return listed[:count]
    parts = re.split(r"\svs\.?\s", title, maxsplit=MAX_TOOLS, flags=re.I)
    if len(parts) > MAX_TOOLS:
        raise CardError(f"the title joins more than {MAX_TOOLS} names; expected 'A vs B'", line.number)
    # A name may itself hold " vs ": of two tools, the cut at which both names stand on lines of their own.
    for cut in range(1, len(parts)):
        pair = [" vs ".join(parts[:cut]), " vs ".join(parts[cut:])]
        if len(parts) > 2 and all(name in known for name in pair):
            return pair
    names = [part.strip() for part in parts]
    if not all(names):
        raise CardError(f"the title '{title[:80]}' lacks a name; expected 'A vs B'", line.number)
    return names


def _heads(head: list[Line], drafts: list[Draft], stop: Line) -> str | None:
    """The blocks before "Decision", one per tool: reads each and returns the intro before the first."""
    starts: list[int] = []
    at = 0
    for draft in drafts:
        if starts:
            labels = (_find(head, (label,), at) for label in reversed(HEAD_LABELS))
            at = next((n + 1 for n in labels if n is not None and _find_name(head, draft.name, n + 1) is not None), at)
        found = _find_name(head, draft.name, at)
        if found is None:
            raise CardError(
                f"'{stop.text[:80]}' comes before the name '{draft.name[:80]}'; expected it on a line of its own", stop.number
            )
        starts.append(found)
        at = found + 1
    intro: str | None = None
    previous = 0
    for n, (draft, start) in enumerate(zip(drafts, starts)):
        before = head[previous:start]
        kept = _opening(before, draft)
        if n == 0:
            intro = "\n".join(line.text for line in before[:kept]) or None
        else:
            drafts[n - 1].put("description", before[:kept], "\n")
        end = starts[n + 1] if n + 1 < len(starts) else len(head)
        previous = start + 1 + _block(head[start + 1 : end], draft)
    drafts[-1].put("description", head[previous:], "\n")
    return intro


def _is_letter(line: Line, name: str) -> bool:
    return len(line.text) <= 2 and name.casefold().startswith(line.label)


def _find_name(head: Sequence[Line], name: str, start: int) -> int | None:
    """Where a name stands: first where its letter and a category come before it, for a name may be one letter, or a description."""
    places = [n for n in range(start, len(head)) if head[n].text == name][:1000]
    with_both = (n for n in places if n - 2 >= start and _is_letter(head[n - 2], name))
    with_letter = (n for n in places if n - 1 >= start and _is_letter(head[n - 1], name))
    return next(with_both, next(with_letter, places[0] if places else None))


def _opening(before: Sequence[Line], draft: Draft) -> int:
    """Reads letter and category before a name; how many lines before them belong to what came earlier."""
    count = len(before)
    listed = draft.values.get("category")
    if count >= 2 and _is_letter(before[-2], draft.name):
        draft.put("head_category", before[-1:])
        return count - 2
    if count and _is_letter(before[-1], draft.name):
        return count - 1
    if count and (before[-1].text == listed or (count >= 2 and listed is None)):
        draft.put("head_category", before[-1:])
        return count - 1
    return count


def _block(block: Sequence[Line], draft: Draft) -> int:
    """Reads what stands between a name and its description; how many lines that was."""
    at = 0
    last = -1
    for label in HEAD_LABELS:
        found = _find(block, (label,), at)
        if found is None:
            continue
        values = list(block[at:found])
        if last < 0:
            values = _first(values, label, draft)
        draft.put({"panel ship": "panel_percent", "community": "community_share", "entry": "entry_label"}[label], values)
        at, last = found + 1, found
    if last < 0:
        draft.put("tagline", block[:1])
        return min(1, len(block))
    return last + 1


def _first(values: list[Line], label: str, draft: Draft) -> list[Line]:
    """The lines before a block's first label: tagline and chip, and the value of the label, which is returned."""
    value: list[Line] = []
    if values and (
        (label == "entry" and values[-1].label in ENTRIES)
        or (label != "entry" and (PERCENT.fullmatch(values[-1].text) or values[-1].label in ABSENT))
    ):
        value = [values.pop()]
    if values and CHIP.fullmatch(values[-1].text):
        draft.put("chip", [values.pop()])
    draft.put("tagline", values)
    return value


def _table(rows: Sequence[Line], drafts: list[Draft]) -> None:
    """The decision table: a label, then one line per tool."""
    width = len(drafts)
    at = 0
    while at < len(rows):
        label = rows[at]
        end = at + 1
        while end < len(rows) and rows[end].label not in ROWS:
            end += 1
        values = rows[at + 1 : end]
        key = ROWS.get(label.label)
        surplus = values[width:]
        if len(values) > width and len(surplus) % (width + 1):
            raise CardError(
                f"'{surplus[0].text[:80]}' under '{label.text[:80]}'; expected {width} values, one per tool, and then a label",
                surplus[0].number,
            )
        if key is None:
            # A first row under another label: what follows is that row, not a value of none.
            values, surplus = [], rows[at:end]
            if len(surplus) % (width + 1):
                raise CardError(f"'{label.text[:80]}'; expected one of the labels {', '.join(ROWS)}", label.number)
        for n in range(0, len(surplus), width + 1):
            for draft, value in zip(drafts, surplus[n + 1 : n + 1 + width]):
                draft.other.append((surplus[n].text, value.text))
        values = values[:width]
        if len(values) == width and key:
            for draft, value in zip(drafts, values):
                draft.put(key, [value])
        elif values:
            said = " and ".join(f"'{value.text}'" for value in values)
            text = f"'{label.text}' has {len(values)} of {width} values, {said}; of which tool cannot be told"
            for draft in drafts:
                draft.warnings.append(CardWarning(WarningKind.UNPLACED, text))
        at = end


def _begins_entry(line: Line) -> bool:
    return line.text == NO_TAKE or line.label == NO_TAKE.casefold() or TAKE.fullmatch(line.text) is not None


def _scores(lines: Sequence[Line], drafts: list[Draft]) -> Sequence[Line]:
    """The scorecard: a persona, then per tool a score with a take, or "No panel take"; returns the lines after it."""
    known = {persona.casefold() for persona in PERSONAS}
    entry = [_begins_entry(line) for line in lines]
    at = 0
    while at < len(lines):
        follows = at + 1 < len(lines) and entry[at + 1]
        if entry[at]:
            raise CardError(
                f"'{lines[at].text[:80]}'; expected the name of a persona before its {len(drafts)} takes", lines[at].number
            )
        if lines[at].label not in known and not follows:
            break
        persona = lines[at].text
        at += 1
        takes: list[Take] = []
        while at < len(lines) and entry[at] and len(takes) < len(drafts):
            begin = at
            at += 1
            while at < len(lines) and not _ends_take(lines, entry, at, known, last=len(takes) + 1 == len(drafts), begin=begin):
                at += 1
            takes.append(_take(persona, lines[begin], lines[begin + 1 : at]))
        _deal(persona, takes, drafts)
    return lines[at:]


def _ends_take(lines: Sequence[Line], entry: Sequence[bool], at: int, known: set[str], *, last: bool, begin: int) -> bool:
    """Whether a line is no more of the take: the next entry, the next persona, or the page's end matter."""
    if entry[at] or lines[at].label in known or lines[begin].label == NO_TAKE.casefold():
        return True
    if at + 1 < len(lines) and entry[at + 1] and last:
        return True  # a persona whose name is not among the usual ones
    # The last tool's take is one line: what follows it may be the end of the page.
    return (last and at > begin + 1) or FOOTER.match(lines[at].text) is not None


def _take(persona: str, line: Line, text: Sequence[Line]) -> Take:
    matched = TAKE.fullmatch(line.text)
    if matched is None:
        return Take(persona)
    stance = matched[2] or matched[3]
    score = float(matched[1].replace(",", ".")) if matched[1] else None
    return Take(persona, score, stance.lower() if stance else None, "\n".join(part.text for part in text) or None)


def _deal(persona: str, takes: list[Take], drafts: list[Draft]) -> None:
    if takes and len(takes) < len(drafts):
        text = f"{persona} has {len(takes)} of {len(drafts)} takes; of which tool cannot be told"
        said = "; ".join(f"{take.score:g}/100" if take.score is not None else take.stance or NO_TAKE for take in takes)
        for draft in drafts:
            draft.warnings.append(CardWarning(WarningKind.UNPLACED, f"{text}: {said}"))
        takes = []
    for draft, take in zip(drafts, takes or [Take(persona)] * len(drafts)):
        draft.takes.append(take)


def _card(draft: Draft) -> Card:
    values = draft.values
    warnings = list(draft.warnings)
    listed, shown = values.get("category"), values.get("head_category")
    if listed and shown and listed.casefold() != shown.casefold():
        warnings.append(
            CardWarning(WarningKind.CATEGORY, f"the category is '{shown}' above the name and '{listed}' in the table")
        )
    verdict: str | None = values.get("panel_verdict")
    ships = skips = None
    if verdict and (matched := VERDICT.fullmatch(verdict)):
        verdict = matched[1]
        ships, skips = (int(group) if group else None for group in matched.group(2, 3))
    percent = PERCENT.fullmatch(values.get("panel_percent", ""))
    if values.get("panel_percent") and percent is None:
        warnings.append(
            CardWarning(WarningKind.SCORE, f"the panel's share is '{values['panel_percent']}', which is no percentage")
        )
    return Card(
        draft.name,
        category=listed or shown,
        tagline=values.get("tagline"),
        description=values.get("description"),
        entry_label=values.get("entry_label"),
        pricing=values.get("pricing"),
        chip=values.get("chip"),
        panel_verdict=verdict,
        panel_ships=ships,
        panel_skips=skips,
        panel_percent=float(percent[1].replace(",", ".")) if percent else None,
        community_share=values.get("community_share"),
        community=values.get("community"),
        best_for=values.get("best_for"),
        takes=tuple(draft.takes),
        other=tuple(draft.other),
        home_url=values.get("home_url"),
        source_date=values.get("date"),
        warnings=tuple(warnings),
    )


def _tool(lines: list[Line]) -> Page:
    """The page of one tool: breadcrumb, name, tagline, price, date, link, description, verdict, takes."""
    if not lines:
        raise CardError("the text is blank; expected a comparison page 'A vs B', or the page of one tool", 1)
    crumb = next((n for n, line in enumerate(lines[:20]) if re.match(r"reviews\s?/", line.text, re.I)), None)
    verdict = next((n for n, line in enumerate(lines) if re.fullmatch(r"verdict\W{0,5}.{0,200}", line.text, re.I)), None)
    panel = _find(lines, (SCORECARD, *PANEL))
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
        draft.values["panel_verdict"] = ", ".join(part for part in said if part) or "—"
        if draft.values["panel_verdict"] == "—":
            del draft.values["panel_verdict"]
    if panel is not None:
        _scores(lines[panel + 1 :], [draft])
    return Page(draft.name, None, (_card(draft),))


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
