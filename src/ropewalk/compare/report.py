"""A comparison as text, Markdown and JSON, for the command line."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ropewalk.compare.candidates import Candidate
from ropewalk.compare.outcomes import Outcome
from ropewalk.compare.promotions import Promotion
from ropewalk.compare.records import Comparison, StoredVerdict
from ropewalk.compare.suites import Suite
from ropewalk.database import timestamp

SERVED_AT = "http://127.0.0.1:8700"  # where `ropewalk serve` is without other arguments
SHOWN = 80  # characters of a prompt


@dataclass(frozen=True)
class Told:
    """A comparison with what was said last."""

    comparison: Comparison
    verdicts: Sequence[StoredVerdict]
    candidates: Sequence[Candidate]  # the baseline first

    @property
    def names(self) -> dict[str, str]:
        return {one.id: one.name for one in self.candidates}

    @property
    def page(self) -> str:
        """Where the server shows it."""
        return page(self.comparison.id)

    def line(self) -> str:
        """It in a line."""
        states = ", ".join(f"{self.names[one.candidate_id]} {one.verdict.state}" for one in self.verdicts)
        return f"{self.comparison.id}  {self.comparison.title}  {states or self.comparison.state}"

    def text(self) -> str:
        """It for a person at a terminal."""
        lines = [f"{self.comparison.title}   {self.comparison.id}, rule {self.comparison.rule_version}"]
        for one in self.verdicts:
            lines += ["", f"{one.verdict.state}  {self.names[one.candidate_id]}"]
            lines += [f"  {reason.sentence}" for reason in one.verdict.reasons]
            if one.verdict.state.ships and not one.verdict.may_ship:
                lines.append("  may not be shipped yet: it needs confirmation on prompts that were held back")
        if not self.verdicts:
            why = f": {self.comparison.error}" if self.comparison.error else ""
            lines += ["", f"no verdict yet; the comparison is {self.comparison.state}{why}"]
        return "\n".join([*lines, "", f"page: {self.page}"])

    def markdown(self) -> str:
        """It for a comment on a pull request."""
        lines = [
            f"### {_plain(self.comparison.title)}",
            "",
            "| candidate | verdict | difference | prompts |",
            "|---|---|---|--:|",
        ]
        for one in self.verdicts:
            shown = str(one.verdict.interval) if one.verdict.interval else "-"
            name = _plain(self.names[one.candidate_id])
            lines.append(f"| {name} | **{one.verdict.state}** | {shown} | {one.verdict.n_prompts} |")
        for one in self.verdicts:
            lines += ["", f"{_plain(self.names[one.candidate_id])}:", ""]
            lines += [f"- {_plain(reason.sentence)}" for reason in one.verdict.reasons]
        return "\n".join(lines)

    def as_dict(self) -> dict[str, Any]:
        """It for a program."""
        one = self.comparison
        return {
            "id": one.id,
            "title": one.title,
            "category": one.category,
            "state": one.state,
            "error": one.error,
            "suite_id": one.suite_id,
            "rule_version": one.rule_version,
            "created_at": timestamp(one.created_at),
            "baseline": {"id": one.baseline_id, "name": self.names[one.baseline_id]},
            "candidates": [{"id": id, "name": self.names[id]} for id in one.candidate_ids],
            "verdicts": [
                {"id": given.id, **given.verdict.as_dict(), "exit_code": given.verdict.state.exit_code}
                for given in self.verdicts
            ],
            "page": self.page,
        }


def page(comparison_id: str) -> str:
    """Where a server shows a comparison, after its own address."""
    return f"/compare/{comparison_id}"


def of_candidate(one: Candidate) -> dict[str, Any]:
    return {
        "id": one.id,
        "kind": one.kind,
        "name": one.name,
        "digest": one.digest,
        "family": one.family,
        "lineage": [{"role": role, "ref": ref, "share": share} for role, ref, share in one.lineage.rows()],
        "linked_to": one.linked_to,
        "warnings": [warning.text for warning in one.card.warnings] if one.card else [],
        "created_at": timestamp(one.created_at),
    }


def candidate_line(one: Candidate) -> str:
    return f"{one.id}  {one.kind:<7}  {one.name}"


def of_suite(one: Suite) -> dict[str, Any]:
    own = ("id", "name", "file_id", "digest", "n_prompts", "n_held", "n_groups", "hold", "margin")
    return {**{name: getattr(one, name) for name in own}, "created_at": timestamp(one.created_at)}


def suite_line(one: Suite) -> str:
    held = f", {one.n_held} held back" if one.n_held else ""
    return f"{one.id}  {one.name}  {one.n_prompts} prompts of {one.n_groups} groups{held}"


def promotion_line(one: Promotion) -> str:
    replay = f"{one.replay.equal} of {one.replay.asked} recorded prompts answered letter for letter"
    if one.replay.passed:
        replay += f", {one.replay.passed} otherwise and as well"
    over = f"  OVERRIDE: {one.override_reason}" if one.override_reason else ""
    back = f"  rolled back by {one.rolled_back_by}" if one.rolled_back_at is not None else ""
    return f"{one.alias} -> {one.to_name}  (before: {one.from_name or 'new'}; {replay}){over}{back}"


def outcome_line(name: str, one: Outcome) -> str:
    text = " ".join(one.prompt.text.split())
    return f"{name}  #{one.prompt.number}  {one.change}  {text if len(text) <= SHOWN else text[: SHOWN - 3] + '...'}"


def _plain(text: str) -> str:
    """Text in which Markdown finds nothing to do."""
    return "".join(f"\\{letter}" if letter in "\\`*_{}[]<>#|~" else letter for letter in " ".join(text.split()))
