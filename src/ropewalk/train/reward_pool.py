"""Processes that compute rewards: one call at a time each, with a limit of time; one that hangs or dies is named and replaced.

    caller -- submit(samples) --> waiting calls --> worker processes --> a future of scores, [samples][rewards], in the order given

One thread starts the processes, hands out calls and keeps the time. Nothing waits without a bound: calls have limits, so has the queue,
and a socket that nobody reads gives up.
"""

from __future__ import annotations

import os
import signal
import subprocess
import threading
import time
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future
from contextlib import suppress
from multiprocessing.connection import wait
from typing import Any

from ropewalk.errors import BadInput, TrainingStopped
from ropewalk.train.reward_builtins import RewardSpec
from ropewalk.train.reward_functions import AT_ONCE, Form, Sample, Score
from ropewalk.train.reward_process import SOCKET_SECONDS, START_SECONDS, Call, Group, RewardProcess, Scores

GRACE_SECONDS = 5.0  # beside the limit that a process keeps itself
MOST_WAITING = 4096  # calls; whoever brings more waits


class RewardPool:
    """Rewards, and the processes that compute them; use as a context."""

    def __init__(self, specs: Sequence[RewardSpec], workers: int = 1) -> None:
        self.specs = tuple(specs)
        self.forms: dict[int, Form] = {}  # known once it has started
        self.replaced: list[str] = []  # what became of workers that had to be replaced
        shared = [number for number, spec in enumerate(self.specs) if not spec.alone]
        lone: list[tuple[int, ...]] = [(number,) for number, spec in enumerate(self.specs) if spec.alone]
        self._lanes = [tuple(shared)] * (max(1, workers) if shared else 0) + lone
        self._workers: list[RewardProcess] = []
        self._waiting: deque[Call] = deque()
        self._room = threading.Condition()
        self._started: Future[None] = Future()
        self._stopping = False
        self._broken: Exception | None = None
        self._answered = 0
        self._wake_reading, self._wake_writing = os.pipe()
        os.set_blocking(self._wake_writing, False)  # a full pipe wakes as well
        self._thread = threading.Thread(target=self._run, name="rewards", daemon=True)

    def __enter__(self) -> RewardPool:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def start(self) -> None:
        """Starts the processes; raises what keeps a reward from being loaded."""
        self._thread.start()
        try:
            self._started.result(START_SECONDS + 60)
        except BaseException:
            self.close()
            raise

    def submit(self, samples: Sequence[Sample]) -> Future[Scores]:
        """The scores of samples to come; waits where too many calls do, but no longer than those may take."""
        group = Group([[None] * len(self.specs) for _ in samples], 0)
        calls = []
        for reward in range(len(self.specs)):
            form = self.forms[reward]
            together = form.batch or form.asynchronous
            parts = [tuple(range(len(samples)))] if together else [(row,) for row in range(len(samples))]
            calls += [Call(group, reward, rows, tuple(samples[row] for row in rows)) for rows in parts if rows]
        group.left = len(calls)
        if not calls:
            group.done.set_result([[] for _ in samples])
            return group.done
        with self._room:
            while not self._broken and len(self._waiting) >= MOST_WAITING:
                before = self._answered
                if not self._room.wait(self._patience()) and self._answered == before:
                    raise self._stuck()
            if self._broken or self._stopping:
                raise self._broken or TrainingStopped("the processes of the rewards have been ended")
            self._waiting += calls
        self._wake()
        return group.done

    def score(self, samples: Sequence[Sample]) -> Scores:
        """The scores of samples, waited for."""
        return self.wait_for(self.submit(samples))

    def wait_for(self, coming: Future[Scores]) -> Scores:
        """What `submit` gave, once it is there; raises where no call at all is answered within the time that one may take."""
        while True:
            before = self._answered
            try:
                return coming.result(self._patience())
            except TimeoutError:
                if self._answered == before:
                    raise self._stuck() from None

    def _patience(self) -> float:
        """Seconds within which some call must have been answered: the longest one, and a process that had to be replaced before."""
        slowest = max((self._limit(reward, MOST_WAITING) for reward in range(len(self.specs))), default=0.0)
        return START_SECONDS + SOCKET_SECONDS + slowest

    def _stuck(self) -> TrainingStopped:
        names = ", ".join(worker.name for worker in self._workers)
        return TrainingStopped(f"no reward was computed within {self._patience():g} seconds, by {names or 'nobody'}")

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

    # -- the thread

    def _run(self) -> None:
        try:
            for number, lane in enumerate(self._lanes, 1):
                self._workers.append(RewardProcess(number, lane, self.specs))
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
            self._fail(TrainingStopped("the processes of the rewards have been ended"))
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
            if worker.ready and worker.call is None and (call := self._next(worker.rewards)) is not None:
                try:
                    worker.give(call, self._limit(call.reward, len(call.samples)))
                except OSError:
                    self._replace(worker, "could not be given a call")

    def _next(self, rewards: Sequence[int]) -> Call | None:
        with self._room:
            found = next((call for call in self._waiting if call.reward in rewards), None)
            if found is not None:
                self._waiting.remove(found)
                self._room.notify_all()
            return found

    def _look_at(self, worker: RewardProcess) -> None:
        """Takes what a worker says, and replaces one that died or whose time is over."""
        try:
            if worker.connection.poll():
                self._take(worker, worker.connection.recv())
            elif (worker.call is not None or not worker.ready) and time.monotonic() > worker.until:
                limit = (
                    f"{self._limit(worker.call.reward, len(worker.call.samples)):g}" if worker.call else f"{START_SECONDS:g}"
                )
                self._replace(worker, f"took longer than {limit} seconds")
        except (EOFError, OSError):
            with suppress(subprocess.TimeoutExpired):
                worker.process.wait(5)
            self._replace(worker, f"died ({_how(worker.process.returncode)})")

    def _take(self, worker: RewardProcess, said: tuple[Any, ...]) -> None:
        if said[0] == "unusable":
            raise BadInput(said[1])
        if said[0] == "ready":
            worker.ready = True
            self.forms |= dict(zip(worker.rewards, said[1], strict=True))
            return
        call, worker.call = worker.call, None
        assert call is not None
        self._answered += 1
        call.group.put(call.rows, call.reward, said[1])

    def _replace(self, worker: RewardProcess, what: str) -> None:
        """Ends a worker and starts another; the call that it had is answered with what happened."""
        call, name = worker.call, worker.name
        worker.end()
        if not worker.ready:
            raise TrainingStopped(f"{name} {what} while it loaded {', '.join(self.specs[r].name for r in worker.rewards)}")
        self.replaced.append(f"{name} {what}")
        self._workers[self._workers.index(worker)] = RewardProcess(worker.number, worker.rewards, self.specs)
        if call is not None:
            self._answered += 1
            spec = self.specs[call.reward]
            seconds = time.monotonic() - worker.until + self._limit(call.reward, len(call.samples))
            error = f"reward '{spec.name}': {name} {what} and was replaced"
            call.group.put(call.rows, call.reward, [Score(0.0, error, seconds)] * len(call.rows))

    def _limit(self, reward: int, samples: int = 1) -> float:
        """Seconds of one call; an asynchronous function's process keeps the time itself, and is ended only if it fails to."""
        spec, form = self.specs[reward], self.forms.get(reward)
        if form is None or not form.asynchronous:
            return spec.seconds
        rounds = 1 if form.batch else -(-samples // AT_ONCE)  # samples have a limit each
        return spec.seconds * rounds + GRACE_SECONDS

    def _pause(self) -> float:
        """Until the next limit of time; while all goes well, a connection or the pipe wakes the thread before."""
        busy = [worker.until for worker in self._workers if worker.call is not None or not worker.ready]
        return max(0.0, min([*(until - time.monotonic() + 0.01 for until in busy), 60.0]))

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
        given = [worker.call for worker in self._workers if worker.call is not None]
        for group in {id(call.group): call.group for call in (*waiting, *given)}.values():
            if not group.done.done():
                group.done.set_exception(self._broken)


def _how(code: int | None) -> str:
    if code is None:
        return "it closed its connection"
    return signal.Signals(-code).name if code < 0 else f"exit code {code}"
