"""Harnesses in processes of their own, many rollouts in each.

run(row, url, key) --> a call of the process that has fewest --> a future of an Outcome, or of Failed
"""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import Future
from functools import partial
from typing import Any

from ropewalk.config.run import Run
from ropewalk.errors import BadInput, ConfigError
from ropewalk.train.environment import Failed, Outcome
from ropewalk.train.harness_worker import AskedRollout, HarnessSpec
from ropewalk.train.outage import Outage
from ropewalk.train.user_code import split_name
from ropewalk.train.worker_pool import WorkerPool
from ropewalk.train.worker_process import Call, Work

WORKER = "ropewalk.train.harness_worker"
AT_ONCE = 256  # rollouts of one process
GRACE_SECONDS = 5.0  # beside the limit that a process keeps itself, until one that is blocked is ended


def harness_of(run: Run) -> HarnessSpec | None:
    """The harness that a configuration names; no code of a user's is run for it."""
    trl = run.trl
    if trl is None or trl.harness is None:
        return None
    try:
        split_name(trl.harness, kind="harness", noun="function")
    except BadInput as error:
        raise ConfigError(f"{run.where('trl', 'harness')}key 'trl.harness': {error}") from None
    return HarnessSpec(trl.harness, tuple(dict.fromkeys([run.folder, "."])), trl.harness_seconds)


class HarnessPool(WorkerPool):
    """The processes in which a run's rollouts are driven; use as a context."""

    def __init__(self, spec: HarnessSpec, workers: int = 1) -> None:
        self.spec = spec
        self.failures = 0  # rollouts that failed
        self._outage = Outage(f"harness '{spec.name}'", "rollouts")
        self._running = [0] * workers
        super().__init__("harness", WORKER, [Work((lane,), spec, spec.name, AT_ONCE) for lane in range(workers)])

    def run(self, row: Mapping[str, Any], url: str, key: str) -> Future[Outcome | Failed]:
        """What a rollout will have been worth; raises where all that ran lately failed."""
        self._outage.check()
        coming: Future[Outcome | Failed] = Future()
        with self._room:
            lane = min(range(len(self._running)), key=self._running.__getitem__)
            self._running[lane] += 1
        told = partial(self._told, lane, coming)

        def lost(what: str, seconds: float) -> None:
            told(Failed(f"harness '{self.spec.name}': {what}"))

        def ended(error: Exception) -> None:
            if not coming.done():
                coming.set_exception(error)

        self.add([Call(lane, AskedRollout(row, url, key), self.slowest(), told, lost, ended)])
        return coming

    def slowest(self) -> float:
        return self.spec.seconds + GRACE_SECONDS

    def _told(self, lane: int, coming: Future[Outcome | Failed], said: Outcome | Failed) -> None:
        with self._room:
            self._running[lane] -= 1
            if isinstance(said, Failed):
                self.failures += 1
                self._outage.failed(said.error)
            else:
                self._outage.worked()
        if not coming.done():
            coming.set_result(said)
