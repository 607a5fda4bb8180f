"""One process of a pool, and the socket to it."""

from __future__ import annotations

import math
import os
import signal
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from itertools import count
from multiprocessing.connection import Connection
from typing import Any

START_SECONDS = 300.0  # for a reward model to load
SOCKET_SECONDS = 30  # until a process that neither reads nor writes counts as dead


@dataclass(frozen=True)
class Work:
    """What a process is there for."""

    lanes: tuple[int, ...]  # the calls that it takes
    given: Any  # what it is told at its start
    names: str  # what it loads, as messages call it
    at_once: int = 1  # calls that it answers side by side


@dataclass(frozen=True)
class Call:
    """What a process is asked once."""

    lane: int
    message: Any
    seconds: float  # that it may take
    answered: Callable[[Any], None]  # with what the process said
    lost: Callable[[str, float], None]  # with what became of the process, and after how many seconds
    ended: Callable[[Exception], None]  # with why nothing will be said: the pool has ended


@dataclass(frozen=True)
class Asked:
    """A call that a process has been given."""

    call: Call
    begun: float

    @property
    def until(self) -> float:
        return self.begun + self.call.seconds


class WorkerProcess:
    """One process, the socket to it, and what it is doing."""

    def __init__(self, kind: str, number: int, module: str, work: Work) -> None:
        self.kind, self.number, self.module, self.work = kind, number, module, work
        ours, theirs = socket.socketpair()
        bound = struct.pack("ll", SOCKET_SECONDS, 0)
        for option in (socket.SO_SNDTIMEO, socket.SO_RCVTIMEO):
            ours.setsockopt(socket.SOL_SOCKET, option, bound)
        with theirs:
            self.process = subprocess.Popen(
                [sys.executable, "-m", module, str(theirs.fileno()), str(os.getpid())],
                stdin=subprocess.DEVNULL,
                pass_fds=(theirs.fileno(),),
                start_new_session=True,  # Ctrl-C is the trainer's to answer, and what a function starts ends with its process
                env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
            )
        self.connection: Connection[Any, Any] = Connection(ours.detach())
        self.asked: dict[int, Asked] = {}  # by the numbers that their answers carry
        self.ready = False
        self._numbers = count()
        self._loads_until = time.monotonic() + START_SECONDS
        self.connection.send(work.given)

    def again(self) -> WorkerProcess:
        """Another one in its place."""
        return WorkerProcess(self.kind, self.number, self.module, self.work)

    @property
    def name(self) -> str:
        """As messages call it."""
        return f"{self.kind} worker {self.number} (process {self.process.pid})"

    @property
    def free(self) -> bool:
        """Whether it can be given a call."""
        return self.ready and len(self.asked) < self.work.at_once

    @property
    def until(self) -> float:
        """When it must have said something."""
        return min((one.until for one in self.asked.values()), default=math.inf) if self.ready else self._loads_until

    @property
    def how_it_ended(self) -> str:
        """By which signal, or with which exit code."""
        code = self.process.returncode
        if code is None:
            return "it closed its connection"
        return signal.Signals(-code).name if code < 0 else f"exit code {code}"

    def give(self, call: Call) -> None:
        """Hands it a call."""
        number = next(self._numbers)
        self.asked[number] = Asked(call, time.monotonic())
        self.connection.send((number, call.message))

    def end(self) -> None:
        """Kills it, with whatever it started."""
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        self.connection.close()
