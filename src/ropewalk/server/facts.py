"""What machines and doubters read: /facts.json of a workspace, /llms.txt, and the method with its last self-test."""

from __future__ import annotations

from dataclasses import dataclass

from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import BaseRoute, Route

from ropewalk.compare import candidates, promotions, records
from ropewalk.compare.last_selftest import last
from ropewalk.compare.rule import RULE, RULE_VERSION
from ropewalk.compare.state import State
from ropewalk.database import now, timestamp
from ropewalk.server import wire_comparisons, words
from ropewalk.server.auth import admit, caller_of
from ropewalk.server.visitors import Visitor, show, signed_in, signed_in_or_not, store_of
from ropewalk.server.wire import JSON
from ropewalk.server.words import Moment
from ropewalk.tenants.caller import Caller

MOST = 1000  # of each kind
MEANINGS = {
    State.SHIP: "better, nothing that must hold broke, the price is within its limits",
    State.SHIP_CHEAPER: "the same within the margin, and at least a fifth cheaper or faster on the same machine",
    State.TIE: "the same within the margin: keep what is served",
    State.SKIP: "worse, or something that must hold broke, or dearer than the limit",
    State.NOT_ENOUGH: "the interval reaches both ways: about N more prompts would tell",
    State.NO_VERDICT: "the run cannot carry one: leakage, a judge that is kin or unfit, unlike conditions",
    State.OPINION_ONLY: "nothing was run",
}
LLMS = f"""\
# Ropewalk: verdicts

A verdict is a statement about a recorded run: the same prompts, answered by what is served and by a candidate, decided by a written
rule (version {RULE_VERSION}). Measured, claimed and opinion are keys of their own and are never mixed.

- /facts.json: every candidate, verdict and promotion of a workspace; send a key as `x-api-key`, or open it in a session
- /v1/comparisons, /v1/candidates, /v1/suites: the same in parts; /openapi.json describes them
- /method: the rule, its states and its last self-test
- /badge/CANDIDATE.svg?t=TOKEN: the last verdict as a picture; its page gives the address

## How to cite
Give the state word for word with its interval, the number of prompts, the date, and the comparison's address. Never quote a claim or a
panel's opinion as a measurement. OPINION ONLY means that nothing was run.

## States
{chr(10).join(f"- {state}: {meaning}" for state, meaning in MEANINGS.items())}
"""


@dataclass(frozen=True)
class Tried:
    """One planted fault of the self-test."""

    what: str
    rate: str
    bound: str
    held: bool


@dataclass(frozen=True)
class MethodPage:
    """/method"""

    version: str
    rule: str
    states: tuple[tuple[str, int, str], ...]
    selftest_at: Moment | None
    selftest: str
    tried: tuple[Tried, ...]


async def method(request: Request, visitor: Visitor | None) -> Response:
    """The rule in words and what the last self-test found; public."""
    kept = last(store_of(request).settings.data.expanduser())
    tried, said = list[Tried](), ""
    if kept is not None:
        found = kept.found
        said = f"rule {found['rule_version']}, {found['runs']:,} runs of each, seed {found['seed']}"
        for key, what, bound, most in RATES:
            tried.append(
                Tried(
                    what,
                    f"{found[key]:.2%}",
                    f"{'at most' if most else 'at least'} {bound:.0%}",
                    (found[key] <= bound) is most or found[key] == bound,
                )
            )
        for entry in found.values():
            if isinstance(entry, dict):
                tried.append(Tried(entry["what"], f"{entry['rate']:.2%}", f"at most {entry['bound']:.1%}", entry["held"]))
    page = MethodPage(
        RULE_VERSION,
        RULE,
        tuple((str(state), state.exit_code, meaning) for state, meaning in MEANINGS.items()),
        None if kept is None else words.moment(kept.at),
        said,
        tuple(tried),
    )
    return await show(request, visitor, "compare/method.html", "Method", page)


RATES = (
    ("identical_shipped", "identical candidates: SHIP", 0.01, True),
    ("identical_different", "identical candidates: called different", 0.05, True),
    ("minus10_skipped", "10 points worse: SKIP", 0.95, False),
    ("plus8_shipped", "8 points better: SHIP", 0.88, False),
)


async def facts_by_session(request: Request, visitor: Visitor) -> Response:
    return await _facts(request, visitor.caller)


async def facts(request: Request) -> Response:
    """By a key, as programs send one, or by a session."""
    if "x-api-key" in request.headers or "authorization" in request.headers:
        await admit(request)
        return await _facts(request, caller_of(request))
    return await signed_in(facts_by_session)(request)


async def llms(request: Request) -> Response:
    return PlainTextResponse(LLMS)


async def _facts(request: Request, caller: Caller) -> Response:
    store = store_of(request)
    known = await candidates.list_candidates(store, caller, MOST)
    compared = await records.list_comparisons(store, caller, MOST)
    body = {
        "type": "facts",
        "at": timestamp(now()),
        "rule_version": RULE_VERSION,
        "method": "/method",
        "states": {str(state): meaning for state, meaning in MEANINGS.items()},
        "candidates": [
            wire_comparisons.candidate(one, await candidates.card_claims(store, caller, one.id) if one.card else ())
            for one in known
        ],
        "comparisons": [wire_comparisons.comparison(one, await records.latest(store, caller, one.id)) for one in compared],
        "promotions": [one.as_dict() for one in await promotions.list_promotions(store, caller, limit=MOST)],
    }
    return JSON(body)


routes: list[BaseRoute] = [
    Route("/method", signed_in_or_not(method), methods=["GET"]),
    Route("/facts.json", facts, methods=["GET"]),
    Route("/llms.txt", llms, methods=["GET"]),
]
