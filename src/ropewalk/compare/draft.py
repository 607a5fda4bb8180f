"""One tool's fields while its page is read, and the card that they become."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field

from ropewalk.compare.cards import Card, CardWarning, Take, WarningKind
from ropewalk.compare.page_lines import ABSENT, Line

LACKING = {ABSENT, "–", "-", "--", "n/a"}
PERCENT = re.compile(r"([0-9]{1,3}(?:[.,][0-9]{1,6})?)\s?%")
VERDICT = re.compile(r"(ship|skip)(?:\W{0,5}([0-9]{1,6}) ships?)?(?:\W{0,5}([0-9]{1,6}) skips?)?", re.I)


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
        if text and text.casefold() not in LACKING:
            self.values[key] = text


def card(draft: Draft) -> Card:
    """The card, with a warning where the page gives two answers or none that can be read."""
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
