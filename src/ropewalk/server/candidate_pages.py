"""The page of a candidate: where its weights come from, what was measured, what is claimed, every verdict; and its badge."""

from __future__ import annotations

import hmac
from dataclasses import dataclass
from hashlib import sha256

from starlette.requests import Request
from starlette.responses import RedirectResponse, Response
from starlette.routing import BaseRoute, Route

from ropewalk.compare import bookmarks, promotions, records
from ropewalk.compare import candidates as known
from ropewalk.compare.badge import badge
from ropewalk.compare.candidates import Candidate
from ropewalk.compare.fingerprint import get_fingerprint
from ropewalk.compare.measures import measurements
from ropewalk.compare.state import State
from ropewalk.files.local import is_id
from ropewalk.server import compare_views as views
from ropewalk.server import words
from ropewalk.server.visitors import Visitor, anyone, origin, read_form, show, signed_in, store_of
from ropewalk.server.words import Moment, Part

BADGE_SECONDS = 300  # that others may keep a badge
TOKEN = 22  # characters


@dataclass(frozen=True)
class Origin:
    """One thing that the weights were made with."""

    role: str
    ref: str
    href: str | None
    share: str


@dataclass(frozen=True)
class Measurement:
    """A figure with the machine it was taken on."""

    metric: str
    value: str
    interval: str
    n: str
    machine: str
    href: str  # in the comparison that it was taken for
    title: str


@dataclass(frozen=True)
class Past:
    """A verdict that it took part in."""

    href: str
    title: str
    state: str
    look: str
    interval: str
    when: Moment


@dataclass(frozen=True)
class CandidatePage:
    """/candidates/{id}"""

    id: str
    name: tuple[Part, ...]
    kind: str
    facts: tuple[tuple[str, str], ...]
    origins: tuple[Origin, ...]
    measured: tuple[Measurement, ...]
    card: views.ShownCard | None
    verdicts: tuple[Past, ...]
    comparisons: tuple[tuple[str, str], ...]  # address, title; of those without a verdict about it
    shipped: tuple[tuple[str, str], ...]  # sentence, override
    badge_at: str
    badge_text: str
    bookmarked: bool
    linkable: tuple[tuple[str, str], ...]
    may_write: bool


async def show_candidate(request: Request, visitor: Visitor) -> Response:
    store, caller = store_of(request), visitor.caller
    found = await known.get_candidate(store, caller, request.path_params["id"])
    given = await records.verdicts_of(store, caller, found.id)
    takes_part = {one.id: one for one in await records.of_candidate(store, caller, found.id)}
    others = await known.list_candidates(store, caller, 200) if found.card else []
    base = origin(request)
    at = f"/badge/{found.id}.svg?t={badge_token(request, found.id)}"
    linked = await known.get_candidate(store, caller, found.linked_to) if found.linked_to else None
    page = CandidatePage(
        id=found.id,
        name=words.parts(found.name),
        kind=found.kind,
        facts=_facts(found),
        origins=_origins(found),
        measured=await _measured(request, visitor, list(takes_part.values()), found),
        card=views.shown_card(found, await known.card_claims(store, caller, found.id), linked) if found.card else None,
        verdicts=tuple(
            Past(
                f"/compare/{one.comparison_id}",
                takes_part[one.comparison_id].title if one.comparison_id in takes_part else one.comparison_id,
                str(one.verdict.state),
                views.state_look(one.verdict.state),
                str(one.verdict.interval or ""),
                words.moment(one.created_at),
            )
            for one in given
        ),
        comparisons=tuple(
            (f"/compare/{one.id}", one.title) for one in takes_part.values() if one.id not in {v.comparison_id for v in given}
        ),
        shipped=tuple(
            (
                f"{one.alias}, {words.moment(one.created_at).exact}"
                + ("" if one.rolled_back_at is None else f", rolled back {words.moment(one.rolled_back_at).exact}"),
                one.override_reason or "",
            )
            for one in await promotions.of_candidate(store, caller, found.id)
        ),
        badge_at=at,
        badge_text=f"![{found.name}]({base}{at})",
        bookmarked=await bookmarks.is_bookmarked(store, caller, found.id),
        linkable=tuple((one.id, one.name) for one in others if one.runs),
        may_write=visitor.may("write"),
    )
    return await show(request, visitor, "compare/candidate.html", found.name, page)


async def link(request: Request, visitor: Visitor) -> Response:
    """Says what a card is about, so that its claims can be tested."""
    form = await read_form(request, visitor.session)
    found = await known.link(store_of(request), visitor.caller, request.path_params["id"], form.get("candidate", ""))
    return RedirectResponse(f"/candidates/{found.id}", 303)


# -- the badge: a picture for pages elsewhere, seen by whoever has its address


async def show_badge(request: Request) -> Response:
    """The last verdict about a candidate; a wrong address is answered like one that never was."""
    store, id = store_of(request), request.path_params["id"]
    given = request.query_params.get("t", "")
    if not hmac.compare_digest(given.encode("utf-8", "surrogatepass"), badge_token(request, id).encode()):
        raise known.missing(id)
    said = await records.badge_of(store, id)
    if said is None:
        raise known.missing(id)
    name, runs, last = said
    if last is None:
        svg = badge(name, State.NO_VERDICT, "nothing was run yet") if runs else badge(name, State.OPINION_ONLY)
    else:
        effect = last.verdict.effect
        svg = badge(name, last.verdict.state, "" if effect is None else f"{100 * effect:+.1f} points")
    headers = {"cache-control": f"public, max-age={BADGE_SECONDS}", "cross-origin-resource-policy": "cross-origin"}
    headers["content-security-policy"] = "default-src 'none'; style-src 'unsafe-inline'"
    return Response(svg, media_type="image/svg+xml", headers=headers)


def badge_token(request: Request, id: str) -> str:
    """Lets one badge be seen without a key."""
    return hmac.new(store_of(request).cursor_key, f"badge {id}".encode("utf-8", "surrogatepass"), sha256).hexdigest()[:TOKEN]


def _facts(found: Candidate) -> tuple[tuple[str, str], ...]:
    facts = [
        ("Kind", found.kind),
        ("Served as", found.target),
        ("Family", found.family),
        ("Weights", found.digest[:32] if found.runs else ""),
        ("Template", found.template_digest[:32]),
        ("Added", words.moment(found.created_at).exact),
    ]
    return tuple((label, value) for label, value in facts if value)


ROLES = {
    "train_data": "training data",
    "data_generator": "wrote training data",
    "reward_model": "was the reward",
    "teacher": "teacher",
}


def _origins(found: Candidate) -> tuple[Origin, ...]:
    return tuple(
        Origin(ROLES[role], ref, f"/files/{ref}" if is_id(ref) else None, "" if share is None else f"{share:.0%} of the data")
        for role, ref, share in found.lineage.rows()
    )


async def _measured(
    request: Request, visitor: Visitor, takes_part: list[records.Comparison], found: Candidate
) -> tuple[Measurement, ...]:
    store, shown = store_of(request), list[Measurement]()
    for made in takes_part:
        run_id = made.item(found.id).run_id
        given = [] if run_id is None else await measurements(store, visitor.caller, run_id)
        for one in sorted(given, key=lambda one: views.rank(one.metric)):
            machine = await get_fingerprint(store, one.fingerprint_id)
            ends = (views.figure(end, one.unit) for end in (one.low, one.high) if end is not None)
            shown.append(
                Measurement(
                    one.metric,
                    f"{views.figure(one.value, one.unit)} {'' if one.unit == 'share' else one.unit}".strip(),
                    " to ".join(ends),
                    f"{one.n:,}",
                    f"{machine.device}, {machine.dtype}, {machine.id.removeprefix('machine_')[:8]}",
                    f"/compare/{made.id}#{one.id}",
                    made.title,
                )
            )
    return tuple(shown)


routes: list[BaseRoute] = [
    Route("/candidates/{id}", signed_in(show_candidate), methods=["GET"]),
    Route("/candidates/{id}/link", signed_in(link), methods=["POST"]),
    Route("/badge/{id}.svg", anyone(show_badge), methods=["GET"]),
]
