"""The JSON of Compare: bodies -> what is asked, and candidates, suites, comparisons, verdicts and votes -> what programs read.

Measured, claimed and opinion are keys of their own and are never mixed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields
from typing import Any

from ropewalk.compare.candidates import Candidate, StoredClaim
from ropewalk.compare.cards import stored
from ropewalk.compare.evidence import Limits
from ropewalk.compare.judges import StoredJudge
from ropewalk.compare.measures import StoredMeasurement
from ropewalk.compare.outcomes import Outcome
from ropewalk.compare.records import Comparison, Plan, StoredVerdict
from ropewalk.compare.suites import Suite
from ropewalk.compare.votes import Ticket
from ropewalk.database import timestamp
from ropewalk.server.node import Node
from ropewalk.server.wire import list_ends

MAX_ID = 128
MAX_PAGE = 2_000_000  # characters of a page's text
SAMPLING = ("temperature", "max_tokens", "top_p", "top_k")


def page_of(items: Sequence[Mapping[str, Any]], more: bool) -> dict[str, Any]:
    """A page of a list."""
    return {"data": list(items), **list_ends([item["id"] for item in items], more)}


def candidate(found: Candidate, claims: Sequence[StoredClaim] = ()) -> dict[str, Any]:
    """What is known about a candidate; of a card, all of it is claim or opinion."""
    body: dict[str, Any] = {
        "id": found.id,
        "type": "candidate",
        "kind": found.kind,
        "name": found.name,
        "target": found.target,
        "digest": found.digest,
        "family": found.family,
        "template_digest": found.template_digest,
        "lineage": asdict(found.lineage),
        "linked_to": found.linked_to,
        "created_at": timestamp(found.created_at),
        "card": None,
    }
    if found.card is not None:
        said = stored(found.card)
        body["card"] = {key: value for key, value in said.items() if key not in ("claims", "takes", "warnings")}
        body["claimed"] = [claim(one) for one in claims]
        body["opinion"] = {"label": "imported opinion", "takes": said["takes"]}
        body["warnings"] = said["warnings"]
    return body


def claim(found: StoredClaim) -> dict[str, Any]:
    """A claim and its status."""
    return {
        "id": found.id,
        **{key: value for key, value in asdict(found.claim).items() if key != "id"},
        "status": found.status,
        "measurement_id": found.measurement_id,
        "measured": None if found.low is None and found.high is None else [found.low, found.high],
    }


def suite(found: Suite) -> dict[str, Any]:
    body = {key: value for key, value in asdict(found).items() if key not in ("workspace_id", "user_id")}
    return {**body, "type": "suite", "created_at": timestamp(found.created_at)}


def comparison(found: Comparison, verdicts: Sequence[StoredVerdict] = ()) -> dict[str, Any]:
    """A comparison with the last edition of its verdicts."""
    return {
        "id": found.id,
        "type": "comparison",
        "title": found.title,
        "category": found.category,
        "state": found.state,
        "error": found.error,
        "baseline": found.baseline_id,
        "candidates": [
            {"id": item.candidate_id, "run_id": item.run_id, "chosen_from": item.chosen_from}
            for item in found.items
            if item.number
        ],
        "suite": found.suite_id,
        "rule_version": found.rule_version,
        "plan": found.plan.as_dict(),
        "created_at": timestamp(found.created_at),
        "started_at": _moment(found.started_at),
        "finished_at": _moment(found.finished_at),
        "verdicts": [verdict(one) for one in verdicts],
    }


def verdict(found: StoredVerdict) -> dict[str, Any]:
    """A verdict as it was given."""
    own = {
        "id": found.id,
        "type": "verdict",
        "comparison_id": found.comparison_id,
        "edition": found.edition,
        "inputs_digest": found.inputs_digest,
        "created_at": timestamp(found.created_at),
        "exit_code": found.verdict.state.exit_code,
    }
    return {**own, **found.verdict.as_dict()}


def figure(found: StoredMeasurement) -> dict[str, Any]:
    return {**asdict(found), "created_at": timestamp(found.created_at)}


def judge(found: StoredJudge) -> dict[str, Any]:
    return asdict(found)


def outcome(found: Outcome) -> dict[str, Any]:
    """What became of one prompt; its text is on the prompt's page and in the suite."""
    return {
        "id": found.prompt.id,
        "number": found.prompt.number,
        "group": found.prompt.group,
        "tags": list(found.prompt.tags),
        "held": found.prompt.held,
        "must_pass": found.prompt.must_pass,
        "prompt": found.prompt.text,
        "outcome": found.change,
        "baseline_passed": found.old_passed,
        "candidate_passed": found.new_passed,
        "preference": found.preference,
    }


def ticket(found: Ticket) -> dict[str, Any]:
    """A pair to vote on; nothing in it names a candidate."""
    turns = [{"role": role, "content": text} for role, text in found.turns]
    return {
        "type": "vote_ticket",
        "ticket": found.token,
        "system": found.system,
        "turns": turns,
        "prompt": found.prompt,
        "left": found.left,
        "right": found.right,
        "number": found.number,
        "expires_at": timestamp(found.expires_at),
    }


# -- what is asked


def read_new(body: Node) -> dict[str, Any]:
    """The arguments of records.create."""
    body.only(
        {"baseline", "candidates", "suite", "title", "category", "judges", "sampling", "stop_early", "budget", "limits"}
        | {"samples", "seed", "chosen_from", "run"}
    )
    asked: dict[str, Any] = {
        "baseline_id": body.need("baseline").text(1, MAX_ID),
        "candidate_ids": [one.text(1, MAX_ID) for one in body.need("candidates").items(32)],
        "plan": read_plan(body),
    }
    for key, name in (("suite", "suite_id"), ("title", "title"), ("category", "category")):
        if (found := body.get(key)) is not None:
            asked[name] = found.text(0, 200)
    if (tried := body.get("chosen_from")) is not None:
        asked["chosen_from"] = {key: Node(value, tried.at(key)).integer(1) for key, value in tried.record().items()}
    return asked


def read_plan(body: Node) -> Plan:
    """What is decided before anything runs."""
    parts: dict[str, Any] = {}
    if (found := body.get("judges")) is not None:
        parts["judges"] = tuple(one.text(1, MAX_ID) for one in found.items(16))
    if (found := body.get("sampling")) is not None:
        found.only(SAMPLING)
        parts["sampling"] = {**Plan().sampling, **found.mapping()}
    if (found := body.get("stop_early")) is not None:
        parts["stop_early"] = found.boolean()
    if (found := body.get("budget")) is not None:
        parts["budget"] = found.number(0, 1e9)
    if (found := body.get("samples")) is not None:
        parts["samples"] = found.integer(1, 16)
    if (found := body.get("seed")) is not None:
        parts["seed"] = found.integer(0, 2**62)
    if (found := body.get("limits")) is not None:
        known = [field.name for field in fields(Limits)]
        found.only(known)
        parts["limits"] = Limits(**{key: Node(value, found.at(key)).number(0, 1e6) for key, value in found.record().items()})
    return Plan(**parts)


def _moment(at: int | None) -> str | None:
    return None if at is None else timestamp(at)
