"""The text of a comparison page: a block per tool, a table with a row per fact, and a scorecard."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace

from ropewalk.compare.cards import CardWarning, Page, WarningKind
from ropewalk.compare.draft import LACKING, PERCENT, Draft, card
from ropewalk.compare.page_lines import REVIEWED, SCORECARDS, Line, find
from ropewalk.compare.scorecard import read_scores
from ropewalk.errors import CardError

MAX_TOOLS = 20
DECISION = "decision"
ROWS = {
    "panel verdict": "panel_verdict",
    "community": "community",
    "pricing": "pricing",
    "best for": "best_for",
    "category": "category",
}
HEAD_LABELS = ("panel ship", "community", "entry")
ENTRIES = {"paid", "free", "freemium", "open source", "trial", "free trial", "contact sales"}
CHIP = re.compile(r"ship|skip", re.I)


def read_comparison(lines: list[Line], at: int, title: str) -> Page:
    decision = find(lines, (DECISION,), at + 1)
    scorecard = find(lines, SCORECARDS, at + 1 if decision is None else decision + 1)
    rows = None if decision is not None else find(lines, ("panel verdict",), at + 1)
    if rows is not None and (scorecard is None or rows < scorecard):
        # The heading is missing: the table begins with its first row, after the names.
        names = [part.casefold() for part in re.split(r"\svs\.?\s", title, maxsplit=MAX_TOOLS, flags=re.I)]
        before = [line.text.casefold() for line in lines[max(at, rows - len(names)) : rows]]
        decision = rows - 1 - (len(names) if before == names else 0)
    if decision is None and scorecard is None:
        raise CardError(
            "the text ends without 'Decision' or 'Reviewer scorecard'; expected a comparison page", lines[-1].number
        )
    body_end = next(n for n in (decision, scorecard) if n is not None)
    head = lines[at + 1 : body_end if rows is None or decision is None else decision + 1]
    table = lines[decision + 1 : scorecard] if decision is not None else []
    first = next((n for n, line in enumerate(table) if line.label in ROWS), len(table))
    names = _names(title, [line.text for line in table[:first]], {line.text for line in head}, lines[at])
    drafts = [Draft(name) for name in names]
    _table(table[len(names) if first >= len(names) else first :], drafts)
    intro = _heads(head, drafts, lines[body_end])
    rest = read_scores(lines[scorecard + 1 :], drafts) if scorecard is not None else []
    date = next((m[1] for line in (*lines[:at], *rest) if (m := REVIEWED.fullmatch(line.text))), None)
    return Page(title, intro, tuple(replace(card(draft), source_date=date) for draft in drafts))


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
            labels = (find(head, (label,), at) for label in reversed(HEAD_LABELS))
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
        found = find(block, (label,), at)
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
    if "entry_label" not in draft.values and last + 1 < len(block) and block[last + 1].label in ENTRIES:
        draft.put("entry_label", block[last + 1 : last + 2])  # its own label is missing
        last += 1
    return last + 1


def _first(values: list[Line], label: str, draft: Draft) -> list[Line]:
    """The lines before a block's first label: tagline and chip, and the value of the label, which is returned."""
    value: list[Line] = []
    if values and (
        (label == "entry" and values[-1].label in ENTRIES)
        or (label != "entry" and (PERCENT.fullmatch(values[-1].text) or values[-1].label in LACKING))
    ):
        value = [values.pop()]
    if label != "panel ship" and values and PERCENT.fullmatch(values[-1].text):
        draft.put("panel_percent", [values.pop()])  # its own label is missing
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
