"""What a process of a pool does: it loads what it is told to, then answers calls until whoever asks has gone.

serve               one call at a time
serve_side_by_side  coroutines, all of whose calls are under way together
"""

from __future__ import annotations

import asyncio
import os
import sys
import traceback
from collections.abc import Awaitable, Callable
from multiprocessing.connection import Connection
from typing import Any

from ropewalk import confinement
from ropewalk.errors import RopewalkError

TOLD = 4000  # characters of a traceback

Answer = Callable[[Any], Any]  # a call's message -> what is said to it
Load = Callable[
    [Any], tuple[Any, Answer]
]  # what a process was told at its start -> what it tells of that, and what answers calls


def serve(load: Load) -> None:
    """The process. The pool keeps the time."""
    begun = _begin(load)
    if begun is None:
        return
    connection, answer = begun
    while True:
        try:
            number, asked = connection.recv()
        except EOFError:  # whoever asks has gone
            return
        connection.send(("answer", (number, answer(asked))))


def serve_side_by_side(load: Load) -> None:
    """The process, whose answers are awaited; they keep their own time as long as none of them blocks."""
    begun = _begin(load)
    if begun is not None:
        asyncio.run(_answer_all(*begun))


async def _answer_all(connection: Connection[Any, Any], answer: Callable[[Any], Awaitable[Any]]) -> None:
    loop, gone, answering = asyncio.get_running_loop(), asyncio.Event(), set[asyncio.Task[None]]()

    async def say(number: int, asked: Any) -> None:
        connection.send(("answer", (number, await answer(asked))))

    def hear() -> None:
        try:
            task = loop.create_task(say(*connection.recv()))
        except (EOFError, OSError):  # whoever asks has gone
            loop.remove_reader(connection.fileno())
            gone.set()
            return
        answering.add(task)
        task.add_done_callback(answering.discard)

    loop.add_reader(connection.fileno(), hear)
    await gone.wait()


def _begin(load: Load) -> tuple[Connection[Any, Any], Answer] | None:
    """The socket to whoever asks, and what answers; None where the user's code cannot be used, which has been told."""
    socket, parent = (int(word) for word in sys.argv[1:])
    confinement.die_with_parent(parent)
    os.dup2(2, 1)  # what a function prints must not mix with what a command prints
    connection: Connection[Any, Any] = Connection(socket)
    try:
        loaded, answer = load(connection.recv())
    except RopewalkError as error:
        connection.send(("unusable", str(error)))
        return None
    connection.send(("ready", loaded))
    return connection, answer


def told(error: BaseException) -> str:
    """The traceback, without the frames of the file that caught it."""
    trace = error.__traceback__
    own = trace.tb_frame.f_code.co_filename if trace else ""
    while trace is not None and trace.tb_next is not None and trace.tb_frame.f_code.co_filename == own:
        trace = trace.tb_next
    return "".join(traceback.format_exception(type(error), error, trace)).strip()[-TOLD:]
