"""One process of a pool of rewards, and what is handed to it."""

from __future__ import annotations

import os
import signal
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from typing import Any

from ropewalk.train.reward_builtins import RewardSpec
from ropewalk.train.reward_functions import Sample, Score

START_SECONDS = 300.0  # for a reward model to load
SOCKET_SECONDS = 30  # until a process that neither reads nor writes counts as dead

Scores = list[list[Score]]  # [samples][rewards]


@dataclass
class Group:
    """Samples that were submitted together."""

    scores: list[list[Score | None]]
    left: int
    done: Future[Scores] = field(default_factory=Future)

    def put(self, rows: Sequence[int], reward: int, scores: Sequence[Score]) -> None:
        """Scores of one reward, for some rows."""
        for row, score in zip(rows, scores, strict=True):
            self.scores[row][reward] = score
        self.left -= 1
        if not self.left:
            self.done.set_result([[score for score in row if score is not None] for row in self.scores])


@dataclass(frozen=True)
class Call:
    """One call of one reward."""

    group: Group
    reward: int
    rows: tuple[int, ...]  # of the group
    samples: tuple[Sample, ...]


class RewardProcess:
    """One process, the socket to it, and what it is doing."""

    def __init__(self, number: int, rewards: Sequence[int], specs: Sequence[RewardSpec]) -> None:
        self.number, self.rewards = number, tuple(rewards)
        ours, theirs = socket.socketpair()
        bound = struct.pack("ll", SOCKET_SECONDS, 0)
        for option in (socket.SO_SNDTIMEO, socket.SO_RCVTIMEO):
            ours.setsockopt(socket.SOL_SOCKET, option, bound)
        with theirs:
            words = [sys.executable, "-m", "ropewalk.train.reward_worker", str(theirs.fileno()), str(os.getpid())]
            self.process = subprocess.Popen(
                words,
                stdin=subprocess.DEVNULL,
                pass_fds=(theirs.fileno(),),
                start_new_session=True,  # Ctrl-C is the trainer's to answer, and what a function starts ends with its process
                env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
            )
        self.connection: Connection[Any, Any] = Connection(ours.detach())
        self.call: Call | None = None
        self.ready = False
        self.until = time.monotonic() + START_SECONDS
        self.connection.send([specs[reward] for reward in self.rewards])

    @property
    def name(self) -> str:
        """As messages call it."""
        return f"reward worker {self.number} (process {self.process.pid})"

    def give(self, call: Call, seconds: float) -> None:
        """Hands it a call, which may take so long."""
        self.call, self.until = call, time.monotonic() + seconds
        self.connection.send((0, self.rewards.index(call.reward), call.samples))

    def end(self) -> None:
        """Kills it, with whatever it started."""
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        self.connection.close()
