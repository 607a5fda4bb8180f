"""The same run on Ray: a process that starts its workers on an existing cluster, follows them, and starts them again when one is lost.

To the server this process is the run: it writes the run's events and its log here, stops at SIGTERM with a checkpoint, ends with the
exit code of the training, and when it is killed, so are its workers. To Ray it is a driver, whose actors end with it.

The leading worker is an actor with the name of the run, so that on one cluster no run is ever trained twice at once. The folder of its run
is copied here as it grows, and from here to all workers when they start again: no node needs to see the folder of another.

Plain actors in a placement group, and not Ray Train: our training joins its processes itself, as under torchrun, resumes by itself, and
writes its own checkpoints; and Ray Train would bring pandas and pyarrow to do these things once more.
"""

from __future__ import annotations

import fcntl
import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from ropewalk.errors import BadInput, MissingExtra, OutputError, TrainingStopped, UpstreamFailed
from ropewalk.folders import make_folder
from ropewalk.jobs.launch import Launch
from ropewalk.jobs.run_mirror import Mirror, say
from ropewalk.jobs.worker_group import LOOK_SECONDS, Group, Lost

SPACE = "ropewalk"  # of names on a cluster
STOP_SECONDS = 600.0  # for all workers, when they are asked to stop
OTHERS_SECONDS = 5.0  # for the others to say why, when one has failed
MOST_LOSSES = 3  # in a row, without a new checkpoint in between


def train_on_ray(launch: Launch) -> int:
    """Trains it to its end: 0. The sentence of a run that fails is raised, so that it is said last, as that of a run here is."""
    with _held(launch) as mirror:
        if mirror.finished:  # before it could be said
            return 0
        ray = _connected(launch)
        try:
            with _asked_to_stop() as asked:
                return Driver(ray, launch, mirror, asked).run()
        finally:
            ray.shutdown()


class Driver:
    """One run under way."""

    def __init__(self, ray: Any, launch: Launch, mirror: Mirror, asked: Callable[[], bool]) -> None:
        self.ray, self.launch, self.mirror, self.asked = ray, launch, mirror, asked
        self.losses = 0

    def run(self) -> int:
        while True:
            before = self.mirror.checkpoints
            try:
                with Group(self.ray, self.launch, self.asked) as group:
                    if not group.ready:
                        raise TrainingStopped("stopped before the workers were there; the same command goes on from there")
                    group.begin(self.mirror)
                    return self._follow(group)
            except Lost as error:
                self.mirror.tell_loss(str(error))
                self.losses = self.losses + 1 if self.mirror.checkpoints == before else 1
                if self.asked():
                    raise TrainingStopped("stopped, while a worker was lost; the same command goes on from there") from None
                if self.losses >= MOST_LOSSES:
                    raise TrainingStopped(f"{self.losses} times in a row a worker was lost; the last time: {error}") from None

    def _follow(self, group: Group) -> int:
        stopping, ended_at = False, 0.0
        while True:
            seen = group.look()
            for rank, one in enumerate(seen):
                self.mirror.take(rank, one)
            self.mirror.take_checkpoints(seen[0], group)
            codes = [one.code for one in seen]
            if all(code is not None for code in codes):
                break
            if any(codes) or stopping:
                ended_at = ended_at or time.monotonic()
                if time.monotonic() > ended_at + (STOP_SECONDS if stopping else OTHERS_SECONDS):
                    break
            if self.asked() and not stopping:
                stopping = True
                group.stop()
            time.sleep(LOOK_SECONDS)
        self.mirror.take_checkpoints(seen[0], group, wait=True)
        killed = any(code is not None and code < 0 for code in codes)  # and what the others say follows from that
        if (why := self.mirror.why()) and not killed:
            raise (BadInput if codes[why[0]] == BadInput.exit_code else TrainingStopped)(why[1])
        if any(code != 0 for code in codes):
            rank = min(
                range(len(codes)), key=lambda rank: 0 if codes[rank] is None else codes[rank] or 1
            )  # killed before failed
            raise Lost(f"worker {rank} ended {_how(codes[rank])}: {self.mirror.last[rank]}")
        if self.launch.config and self.mirror.checkpoints != seen[0].checkpoints:
            raise Lost("its last checkpoint could not be copied")
        self.mirror.take_result(group)
        return 0


@contextmanager
def _held(launch: Launch) -> Iterator[Mirror]:
    """The run's folder, which a job's server looks at, locked as long as this process lives."""
    if not launch.config:  # the leading worker locks it
        yield Mirror(launch)
        return
    make_folder(launch.run)
    with (launch.run / ".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise OutputError(f"{launch.run}: another process is training into it; wait for it") from None
        yield Mirror(launch)


def _connected(launch: Launch) -> Any:
    """Ray, as a driver of an existing cluster."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        import ray
    except ImportError as error:
        raise MissingExtra("ray", "cluster", "a run on Ray") from error
    address, late, told = launch.address or "auto", time.monotonic() + launch.patience, False
    while True:
        try:
            ray.init(address=address, namespace=SPACE, log_to_driver=False, logging_level="ERROR")
            return ray
        except (ConnectionError, RuntimeError, TimeoutError, ValueError) as error:
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
            if time.monotonic() > late:
                raise UpstreamFailed(
                    f"no Ray cluster answers at {address} ({reason}); start one by `ray start --head`, or say where one is: "
                    "$RAY_ADDRESS, or jobs.ray.address of what is served"
                ) from None
            if not told:
                say(f"no Ray cluster answers at {address} yet: {reason}")
            told = True
            time.sleep(LOOK_SECONDS * 10)


@contextmanager
def _asked_to_stop() -> Iterator[Callable[[], bool]]:
    """Whether SIGTERM or Ctrl-C has come; a second Ctrl-C ends at once."""
    asked: list[int] = []

    def note(number: int, frame: Any) -> None:
        if asked and number == signal.SIGINT:
            raise KeyboardInterrupt
        asked.append(number)

    before = {number: signal.signal(number, note) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield lambda: bool(asked)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _how(code: int | None) -> str:
    if code is None:
        return "not at all"
    return f"by signal {-code}" if code < 0 else f"with exit code {code}"
