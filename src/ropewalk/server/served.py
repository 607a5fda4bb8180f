"""What an alias serves, as pages show it: since when, on which verdict, and whether there is a way back."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

from starlette.requests import Request

from ropewalk.compare import records
from ropewalk.compare.promotions import Promotion
from ropewalk.server import compare_views as views
from ropewalk.server import words
from ropewalk.server.visitors import Visitor, store_of
from ropewalk.server.words import Moment


@dataclass(frozen=True)
class Slot:
    """An alias."""

    alias: str
    name: str
    since: Moment | None
    verdict: str
    look: str
    href: str | None
    override: str
    may_roll_back: bool


async def slot_of(request: Request, visitor: Visitor, alias: str, name: str, by: Promotion | None) -> Slot:
    """An alias with the verdict that it got there by; `by` None: it was set by hand."""
    verdict, look, href = "", "even", None
    if by is not None and by.comparison_id is not None:
        href = f"/compare/{by.comparison_id}"
        given = await records.editions(store_of(request), visitor.caller, by.comparison_id)
        on = next((one for one in given if one.id == by.verdict_id), None)
        if on is not None:
            verdict, look = f"{on.verdict.state} {on.verdict.interval or ''}".strip(), views.state_look(on.verdict.state)
    history = await asyncio.to_thread(request.app.state.registry.history, alias)
    return Slot(
        alias,
        name,
        None if by is None else words.moment(by.created_at),
        verdict,
        look,
        href,
        (by.override_reason or "") if by else "",
        visitor.may("admin") and len(history) > 1,
    )
