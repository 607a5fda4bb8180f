"""Processes that begin with everything imported: a fork costs milliseconds where an interpreter costs half a second."""

from __future__ import annotations

import asyncio
import os
import pickle
import signal
import traceback
from collections.abc import Callable, Coroutine
from typing import Any


def fork(run: Callable[[], None]) -> int:
    """A child that runs this and ends; it never returns from here."""
    child = os.fork()
    if child:
        return child
    try:
        run()
        os._exit(0)
    except BaseException:
        traceback.print_exc()
        os._exit(1)


class Answer:
    """What a coroutine function returns in a process of its own."""

    def __init__(self, function: Callable[..., Coroutine[Any, Any, Any]], *arguments: Any) -> None:
        self.handle, theirs = os.pipe()

        def run() -> None:
            with os.fdopen(theirs, "wb") as out:
                pickle.dump(asyncio.run(function(*arguments)), out)

        self.child = fork(run)
        os.close(theirs)

    def wait(self) -> Any:
        with os.fdopen(self.handle, "rb") as told:
            answer = told.read()
        reap(self.child, killed=False)
        return pickle.loads(answer)


def forked(function: Callable[..., Coroutine[Any, Any, Any]], *arguments: Any) -> Any:
    """Runs a coroutine function in a process of its own, and returns what it returned."""
    return Answer(function, *arguments).wait()


def reap(child: int, killed: bool | None) -> bool:
    """Whether the child was killed; any other end than the expected one (None: either) stops the benchmark."""
    _, status = os.waitpid(child, 0)
    code = os.waitstatus_to_exitcode(status)
    if code not in {True: [-signal.SIGKILL], False: [0], None: [0, -signal.SIGKILL]}[killed]:
        raise SystemExit(f"a process of the benchmark ended with {code}; its traceback is above")
    return code != 0
