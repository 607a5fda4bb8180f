"""What a process of a pool does: it loads what it is told to, then answers one call at a time until whoever asks has gone."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

from ropewalk import confinement
from ropewalk.errors import RopewalkError

TOLD = 4000  # characters of a traceback

Answer = Callable[[Any], Any]  # a call's message -> what is said to it


def serve(load: Callable[[Any], tuple[Any, Answer]]) -> None:
    """The process; `load` gives what is told of what it loaded, and what answers calls. The pool keeps the time."""
    socket, parent = (int(word) for word in sys.argv[1:])
    confinement.die_with_parent(parent)
    os.dup2(2, 1)  # what a function prints must not mix with what a command prints
    connection: Connection[Any, Any] = Connection(socket)
    try:
        loaded, answer = load(connection.recv())
    except RopewalkError as error:
        connection.send(("unusable", str(error)))
        return
    connection.send(("ready", loaded))
    while True:
        try:
            asked = connection.recv()
        except EOFError:  # whoever asks has gone
            return
        connection.send(("answer", answer(asked)))


def told(error: BaseException) -> str:
    """The traceback, without the frames of the file that caught it."""
    trace = error.__traceback__
    own = trace.tb_frame.f_code.co_filename if trace else ""
    while trace is not None and trace.tb_next is not None and trace.tb_frame.f_code.co_filename == own:
        trace = trace.tb_next
    return "".join(traceback.format_exception(type(error), error, trace)).strip()[-TOLD:]
