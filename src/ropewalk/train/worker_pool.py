"""Processes that run a user's code: some calls at a time each, with a limit of time; one that hangs or dies is named and replaced.

    caller -- add(calls) --> waiting calls --> worker processes --> what each call does with its answer

One thread starts the processes, hands out calls and keeps the time. Nothing waits without a bound: calls have limits, so has the queue,
and a socket that nobody reads gives up.
"""

from __future__ import annotations

import os
import subprocess
import threading
import time
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future
from contextlib import suppress
from multiprocessing.connection import wait
from typing import Any, Self, TypeVar

from ropewalk.errors import BadInput, TrainingStopped
from ropewalk.train.worker_process import SOCKET_SECONDS, START_SECONDS, Call, Work, WorkerProcess

MOST_WAITING = 4096  # calls; whoever brings more waits

T = TypeVar("T")


class WorkerPool:
    """Processes of one kind, each for some lanes of calls; use as a context."""

    def __init__(self, kind: str, module: str, works: Sequence[Work]) -> None:
        self.kind = kind
        self.replaced: list[str] = []  # what became of workers that had to be replaced
        self._module, self._works = module, tuple(works)
        self._workers: list[WorkerProcess] = []
        self._waiting: deque[Call] = deque()
        self._room = threading.Condition()
        self._started: Future[None] = Future()
        self._stopping = False
        self._broken: Exception | None = None
        self._answered = 0
        self._wake_reading, self._wake_writing = os.pipe()
        os.set_blocking(self._wake_writing, False)  # a full pipe wakes as well
        self._thread = threading.Thread(target=self._run, name=f"{kind} workers", daemon=True)

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def start(self) -> None:
        """Starts the processes; raises what keeps one from loading what it is for."""
        self._thread.start()
        try:
            self._started.result(START_SECONDS + 60)
        except BaseException:
            self.close()
            raise

    def add(self, calls: Sequence[Call]) -> None:
        """Calls to be answered in turn; waits where too many do, but no longer than those may take."""
        with self._room:
            while not self._broken and len(self._waiting) >= MOST_WAITING:
                before = self._answered
                if not self._room.wait(self._patience()) and self._answered == before:
                    raise self._stuck()
            if self._broken or self._stopping:
                raise self._broken or self._ended()
            self._waiting += calls
        self._wake()

    def wait_for(self, coming: Future[T]) -> T:
        """What comes of calls that were added; raises where no call at all is answered within the time that one may take."""
        while True:
            before = self._answered
            try:
                return coming.result(self._patience())
            except TimeoutError:
                if self._answered == before:
                    raise self._stuck() from None

    def close(self) -> None:
        """Ends all processes, now."""
        with self._room:
            if self._stopping:
                return
            self._stopping = True
        self._wake()
        if self._thread.ident is not None:
            self._thread.join(SOCKET_SECONDS + 10)

    @property
    def processes(self) -> list[int]:
        """The ids of the processes."""
        return [worker.process.pid for worker in self._workers]

    # -- what a kind of pool adds

    def slowest(self) -> float:
        """Seconds that a call may take."""
        raise NotImplementedError

    def _loaded(self, worker: WorkerProcess, said: Any) -> None:
        """What a process told when it was ready."""

    def _lost(self, worker: WorkerProcess, what: str) -> None:
        """A process was replaced, with what it held."""

    # -- the thread

    def _run(self) -> None:
        try:
            for number, work in enumerate(self._works, 1):
                self._workers.append(WorkerProcess(self.kind, number, self._module, work))
            while not self._stopping:
                self._hand_out()
                handles: list[Any] = [self._wake_reading, *(worker.connection for worker in self._workers)]
                for ready in wait(handles, self._pause()):
                    if ready == self._wake_reading:
                        os.read(self._wake_reading, 4096)
                for worker in list(self._workers):
                    self._look_at(worker)
        except Exception as error:
            self._fail(error)
        finally:
            for worker in self._workers:
                worker.end()
            self._fail(self._ended())
            with self._room:
                os.close(self._wake_reading)
                os.close(self._wake_writing)
                self._wake_reading = self._wake_writing = -1

    def _hand_out(self) -> None:
        if not self._started.done():
            if all(worker.ready for worker in self._workers):
                self._started.set_result(None)
            return
        for worker in self._workers:
            while worker.free and (call := self._next(worker.work.lanes)) is not None:
                try:
                    worker.give(call)
                except OSError:
                    self._replace(worker, "could not be given a call")
                    break

    def _next(self, lanes: Sequence[int]) -> Call | None:
        with self._room:
            found = next((call for call in self._waiting if call.lane in lanes), None)
            if found is not None:
                self._waiting.remove(found)
                self._room.notify_all()
            return found

    def _look_at(self, worker: WorkerProcess) -> None:
        """Takes what a worker says, and replaces one that died or whose time is over."""
        try:
            if worker.connection.poll():
                self._take(worker, worker.connection.recv())
            elif time.monotonic() > worker.until:
                late = min(worker.asked.values(), key=lambda one: one.until, default=None)
                self._replace(worker, f"took longer than {late.call.seconds if late else START_SECONDS:g} seconds")
        except (EOFError, OSError):
            with suppress(subprocess.TimeoutExpired):
                worker.process.wait(5)
            self._replace(worker, f"died ({worker.how_it_ended})")

    def _take(self, worker: WorkerProcess, said: tuple[str, Any]) -> None:
        word, told = said
        if word == "unusable":
            raise BadInput(told)
        if word == "ready":
            worker.ready = True
            self._loaded(worker, told)
            return
        number, answer = told
        self._answered += 1
        worker.asked.pop(number).call.answered(answer)

    def _replace(self, worker: WorkerProcess, what: str) -> None:
        """Ends a worker and starts another; the calls that it had are answered with what happened."""
        name = worker.name
        worker.end()
        if not worker.ready:
            raise TrainingStopped(f"{name} {what} while it loaded {worker.work.names}")
        self.replaced.append(f"{name} {what}")
        self._workers[self._workers.index(worker)] = worker.again()
        self._lost(worker, f"{name} {what} and was replaced")
        for one in worker.asked.values():
            self._answered += 1
            one.call.lost(f"{name} {what} and was replaced", time.monotonic() - one.begun)

    def _pause(self) -> float:
        """Until the next limit of time; while all goes well, a connection or the pipe wakes the thread before."""
        return max(0.0, min([*(worker.until - time.monotonic() + 0.01 for worker in self._workers), 60.0]))

    def _wake(self) -> None:
        with self._room:
            if self._wake_writing >= 0:
                with suppress(BlockingIOError):
                    os.write(self._wake_writing, b".")

    def _fail(self, error: Exception) -> None:
        with self._room:
            self._broken = self._broken or error
            waiting, self._waiting = list(self._waiting), deque()
            self._room.notify_all()
        if not self._started.done():
            self._started.set_exception(error)
        for call in (*waiting, *(one.call for worker in self._workers for one in worker.asked.values())):
            call.ended(self._broken)

    def _patience(self) -> float:
        """Seconds within which some call must have been answered: the longest one, and a process that had to be replaced before."""
        return START_SECONDS + SOCKET_SECONDS + self.slowest()

    def _stuck(self) -> TrainingStopped:
        names = ", ".join(worker.name for worker in self._workers)
        return TrainingStopped(f"no {self.kind} answered within {self._patience():g} seconds: {names or 'nobody'}")

    def _ended(self) -> TrainingStopped:
        return TrainingStopped(f"the {self.kind} workers have been ended")
