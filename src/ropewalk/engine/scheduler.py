"""Who runs next. Decisions only, no torch.

Each step runs every request that is decoding, one id each, and some ids of those that are still reading, so that a long prompt holds
nobody up for longer than a chunk takes. Scopes take turns: a workspace with a hundred requests waits for itself, not others for it.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

from ropewalk.errors import Overloaded


class Runnable(Protocol):
    """What is scheduled: one sample of one request."""

    @property
    def scope(self) -> str: ...

    @property
    def reading(self) -> int:
        """Ids it has still to read before it produces one; 0: it is decoding."""

    @property
    def blocked(self) -> bool:
        """Whether it waits for what another is reading."""


OLDEST = 4  # this part of what is read in a step is the oldest reader's: one in OLDEST

Job = TypeVar("Job", bound=Runnable)


@dataclass(frozen=True)
class Limits:
    """What one step, and the engine as a whole, may hold."""

    running: int = 64  # samples at once
    waiting: int = 256  # more are refused
    chunk: int = 512  # ids that are read in one step beside those that are decoded


@dataclass(frozen=True)
class Turn(Generic[Job]):
    """One sample's part of a step."""

    job: Job
    count: int  # ids it reads; 1 when it decodes


class Scheduler(Generic[Job]):
    """The order of things."""

    def __init__(self, limits: Limits = Limits()) -> None:
        self.limits = limits
        self.running: list[Job] = []
        self._waiting: OrderedDict[str, deque[Job]] = OrderedDict()  # per scope; the scope whose turn is next comes first

    def __len__(self) -> int:
        return len(self.running) + self.waiting

    @property
    def waiting(self) -> int:
        return sum(map(len, self._waiting.values()))

    def add(self, jobs: Iterable[Job]) -> None:
        """Lets the samples of a request wait for their turn, or raises Overloaded."""
        jobs = list(jobs)
        if self.waiting + len(jobs) > self.limits.waiting:
            raise Overloaded(f"{self.waiting} requests wait already, and {self.limits.waiting} is the most; try again shortly")
        for job in jobs:
            self._waiting.setdefault(job.scope, deque()).append(job)

    def remove(self, job: Job) -> None:
        """Forgets a sample that is done or was cancelled."""
        if job in self.running:
            self.running.remove(job)
            return
        queue = self._waiting.get(job.scope)
        if queue is not None and job in queue:
            queue.remove(job)
            if not queue:
                del self._waiting[job.scope]

    def admit(self) -> None:
        """Lets those that wait run, as many as may, scope after scope."""
        while self._waiting and len(self.running) < self.limits.running:
            scope, queue = next(iter(self._waiting.items()))
            self.running.append(queue.popleft())
            if queue:
                self._waiting.move_to_end(scope)
            else:
                del self._waiting[scope]

    def next(self) -> list[Turn[Job]]:
        """The turns of the next step."""
        turns = [Turn(job, 1) for job in self.running if not job.reading and not job.blocked]
        readers = [job for job in self.running if job.reading and not job.blocked]
        if not readers:
            return turns
        # The oldest always goes on; what is left goes to whoever has the least to read and is soonest out of the way.
        oldest, budget = readers[0], self.limits.chunk
        counts = {id(oldest): min(oldest.reading, max(1, budget // OLDEST))}
        budget -= counts[id(oldest)]
        for job in sorted(readers, key=lambda job: job.reading):
            more = min(job.reading - counts.get(id(job), 0), budget)
            counts[id(job)] = counts.get(id(job), 0) + more
            budget -= more
        return turns + [Turn(job, counts[id(job)]) for job in readers if counts[id(job)]]
