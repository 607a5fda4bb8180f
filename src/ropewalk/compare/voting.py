"""Votes at the terminal: two answers, one key, and whose they were only afterwards."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from functools import partial

from rich.columns import Columns
from rich.console import Console
from rich.panel import Panel
from rich.text import Text

from ropewalk.compare.commands import Desk, Place
from ropewalk.compare.invites import invite
from ropewalk.compare.report import SERVED_AT
from ropewalk.compare.voters import who
from ropewalk.compare.votes import Revealed, Ticket, cast, next_ticket

KEYS = {"1": "left", "2": "right", "3": "same", "4": "both_bad"}
QUIT = ("q", "\x03", "\x04", "\x1b")
SHOWN = 6000  # characters of an answer


def vote(place: Place, comparison_id: str) -> int:
    """Asks for votes until no pair is left, the input ends, or `q`."""
    console, count = Console(highlight=False), 0

    async def one(desk: Desk) -> Ticket | None:
        return await next_ticket(desk.store, desk.caller, comparison_id, who(desk.caller))

    async def voted(desk: Desk, token: str, choice: str, ms: int) -> Revealed:
        return await cast(desk.store, desk.caller, token, choice, ms)

    keys = _keys()
    with place.opened() as run:
        while ticket := run(one):
            _show(console, ticket)
            began = time.monotonic()
            choice = _choice(console, keys)
            if choice is None:
                break
            ms = round(1000 * (time.monotonic() - began))
            told = run(partial(voted, token=ticket.token, choice=choice, ms=ms))
            count += 1
            console.print(f"A was {told.left}, B was {told.right}\n", style="dim", markup=False)
    console.print(f"{count} vote{'s' if count != 1 else ''}" + ("" if ticket else "; no pair is left"))
    return 0


def invite_voters(place: Place, comparison_id: str, count: int, url: str | None, as_json: bool) -> int:
    """Prints links for people without a key: one link is one voter."""

    async def work(desk: Desk) -> list[str]:
        return [await invite(desk.store, desk.caller, comparison_id) for _ in range(count)]

    links = [f"{(url or SERVED_AT).rstrip('/')}/vote/{token}" for token in place.run(work)]
    print(json.dumps(links) if as_json else "\n".join(links))
    return 0


def _show(console: Console, ticket: Ticket) -> None:
    said = [("system", ticket.system)] if ticket.system else []
    for role, text in [*said, *ticket.turns, ("asked", ticket.prompt)]:
        console.print(Panel(_text(text), title=role, title_align="left", border_style="dim"))
    panels = [Panel(_text(text), title=name) for name, text in (("A", ticket.left), ("B", ticket.right))]
    if console.width >= 120:
        console.print(Columns(panels, equal=True, expand=True))
    else:
        for panel in panels:
            console.print(panel)
    console.print("1 A   2 B   3 the same   4 both bad   q stop", style="bold", end="  ")


def _text(text: str) -> Text:
    """What a model wrote: shown, and never obeyed by the terminal."""
    cut = text if len(text) <= SHOWN else f"{text[:SHOWN]} ... ({len(text) - SHOWN:,} more characters)"
    return Text("".join(letter if letter.isprintable() or letter in "\n\t" else "\N{REPLACEMENT CHARACTER}" for letter in cut))


def _choice(console: Console, keys: Iterator[str]) -> str | None:
    for key in keys:
        if key in QUIT:
            break
        if key in KEYS:
            console.print(key)
            return KEYS[key]
    console.print()
    return None


def _keys() -> Iterator[str]:
    """Keys as they are pressed; from a pipe, the first character of each line."""
    if not sys.stdin.isatty():
        for line in sys.stdin:
            yield line.strip()[:1]
        return
    import termios
    import tty

    before = termios.tcgetattr(sys.stdin)
    while True:
        try:
            tty.setcbreak(sys.stdin)
            key = sys.stdin.read(1)
        finally:
            termios.tcsetattr(sys.stdin, termios.TCSADRAIN, before)
        yield key
