"""Blind votes: one pair of answers, four choices, names only afterwards; for who is signed in and for who was sent a link."""

from __future__ import annotations

from dataclasses import dataclass

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route

from ropewalk.compare import invites, records, votes
from ropewalk.compare.voters import Who, who
from ropewalk.errors import BadInput
from ropewalk.server.visitors import Visitor, anyone, origin, read_form, read_open_form, show, signed_in, store_of
from ropewalk.tenants.caller import Caller

LONGEST_MS = 3_600_000
CHOICES = (
    ("1", "left", "A is better"),
    ("2", "right", "B is better"),
    ("3", "same", "The same"),
    ("4", "both_bad", "Both bad"),
)


@dataclass(frozen=True)
class VotePage:
    """/compare/{id}/vote and /vote/{token}"""

    action: str
    back: str | None  # not its title, in which names may stand
    ticket: votes.Ticket | None
    revealed: str
    invited: bool
    choices: tuple[tuple[str, str, str], ...] = CHOICES


@dataclass(frozen=True)
class InvitePage:
    """A link for one colleague."""

    href: str
    back: str


async def vote_form(request: Request, visitor: Visitor) -> Response:
    id = request.path_params["id"]
    found = await records.get_comparison(store_of(request), visitor.caller, id)
    return await _pair(request, visitor, visitor.caller, found.id, who(visitor.caller), f"/compare/{id}/vote")


async def vote(request: Request, visitor: Visitor) -> Response:
    id = request.path_params["id"]
    found = await records.get_comparison(store_of(request), visitor.caller, id)
    form = await read_form(request, visitor.session)
    revealed = await _cast(request, visitor.caller, found.id, form)
    return await _pair(request, visitor, visitor.caller, found.id, who(visitor.caller), f"/compare/{id}/vote", revealed)


async def invite(request: Request, visitor: Visitor) -> Response:
    """A link that is one voter."""
    await read_form(request, visitor.session)
    id = request.path_params["id"]
    token = await invites.invite(store_of(request), visitor.caller, id)
    base = origin(request)
    return await show(
        request, visitor, "compare/invite.html", "Invitation", InvitePage(f"{base}/vote/{token}", f"/compare/{id}")
    )


async def invited_form(request: Request) -> Response:
    token = request.path_params["token"]
    found = await invites.accept(store_of(request), token)
    return await _pair(request, None, found.caller, found.comparison_id, found.who, f"/vote/{token}")


async def invited_vote(request: Request) -> Response:
    token = request.path_params["token"]
    form = await read_open_form(request)  # the link and the ticket are secrets of their own
    found = await invites.accept(store_of(request), token)
    revealed = await _cast(request, found.caller, found.comparison_id, form)
    return await _pair(request, None, found.caller, found.comparison_id, found.who, f"/vote/{token}", revealed)


async def _cast(request: Request, caller: Caller, comparison_id: str, form: dict[str, str]) -> str:
    """Counts a vote; what it was between, in words."""
    ms = form.get("ms", "") or "0"
    if not (ms.isascii() and ms.isdigit()):
        raise BadInput(f"ms: '{ms[:40]}' is no number of milliseconds")
    done = await votes.cast(
        store_of(request), caller, form.get("ticket", ""), form.get("choice", ""), min(int(ms[:9]), LONGEST_MS)
    )
    chosen = {
        "left": f"You chose {done.left}",
        "right": f"You chose {done.right}",
        "same": "The same to you",
        "both_bad": "Both bad",
    }
    return f"{chosen[done.choice]}. A was {done.left}, B was {done.right}. Thank you: vote {done.number} is counted."


async def _pair(
    request: Request, visitor: Visitor | None, caller: Caller, comparison_id: str, voter: Who, action: str, revealed: str = ""
) -> Response:
    ticket = await votes.next_ticket(store_of(request), caller, comparison_id, voter)
    back = f"/compare/{comparison_id}" if visitor is not None else None
    page = VotePage(action, back, ticket, revealed, visitor is None)
    return await show(request, visitor, "compare/vote.html", "Vote", page)


routes: list[BaseRoute] = [
    Route("/compare/{id}/vote", signed_in(vote_form), methods=["GET"]),
    Route("/compare/{id}/vote", signed_in(vote), methods=["POST"]),
    Route("/compare/{id}/invite", signed_in(invite), methods=["POST"]),
    Route("/vote/{token}", anyone(invited_form), methods=["GET"]),
    Route("/vote/{token}", anyone(invited_vote), methods=["POST"]),
]
