"""Rewards computed by worker processes.

submit(samples) --> calls of each reward --> worker processes --> a future of scores, [samples][rewards], in the order given
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field

from ropewalk.train.reward_builtins import RewardSpec
from ropewalk.train.reward_functions import AT_ONCE, Form, Sample, Score
from ropewalk.train.worker_pool import MOST_WAITING, WorkerPool
from ropewalk.train.worker_process import Call, Work, WorkerProcess

GRACE_SECONDS = 5.0  # beside the limit that a process keeps itself
WORKER = "ropewalk.train.reward_worker"

Scores = list[list[Score]]  # [samples][rewards]


class RewardPool(WorkerPool):
    """Rewards, and the processes that compute them; use as a context."""

    def __init__(self, specs: Sequence[RewardSpec], workers: int = 1) -> None:
        self.specs = tuple(specs)
        self.forms: dict[int, Form] = {}  # known once it has started
        shared = tuple(number for number, spec in enumerate(self.specs) if not spec.alone)
        lone = [(number,) for number, spec in enumerate(self.specs) if spec.alone]
        super().__init__(
            "reward", WORKER, [self._work(lanes) for lanes in [shared] * (max(1, workers) if shared else 0) + lone]
        )

    def submit(self, samples: Sequence[Sample]) -> Future[Scores]:
        """The scores of samples to come; waits where too many calls do, but no longer than those may take."""
        group = _Group([[None] * len(self.specs) for _ in samples], 0)
        calls = []
        for reward in range(len(self.specs)):
            form = self.forms[reward]
            together = form.batch or form.asynchronous
            parts = [tuple(range(len(samples)))] if together else [(row,) for row in range(len(samples))]
            calls += [self._call(group, reward, rows, [samples[row] for row in rows]) for rows in parts if rows]
        group.left = len(calls)
        if not calls:
            group.done.set_result([[] for _ in samples])
        else:
            self.add(calls)
        return group.done

    def score(self, samples: Sequence[Sample]) -> Scores:
        """The scores of samples, waited for."""
        return self.wait_for(self.submit(samples))

    def slowest(self) -> float:
        return max((self._limit(reward, MOST_WAITING) for reward in range(len(self.specs))), default=0.0)

    def _loaded(self, worker: WorkerProcess, said: dict[int, Form]) -> None:
        self.forms |= said

    def _work(self, rewards: tuple[int, ...]) -> Work:
        given = {reward: self.specs[reward] for reward in rewards}
        return Work(rewards, given, ", ".join(spec.name for spec in given.values()))

    def _call(self, group: _Group, reward: int, rows: Sequence[int], samples: Sequence[Sample]) -> Call:
        name = self.specs[reward].name

        def answered(scores: Sequence[Score]) -> None:
            group.put(rows, reward, scores)

        def lost(what: str, seconds: float) -> None:
            group.put(rows, reward, [Score(0.0, f"reward '{name}': {what}", seconds)] * len(rows))

        return Call(reward, (reward, samples), self._limit(reward, len(samples)), answered, lost, group.fail)

    def _limit(self, reward: int, samples: int) -> float:
        """Seconds of one call; an asynchronous function's process keeps the time itself, and is ended only if it fails to."""
        spec, form = self.specs[reward], self.forms.get(reward)
        if form is None or not form.asynchronous:
            return spec.seconds
        rounds = 1 if form.batch else -(-samples // AT_ONCE)  # samples have a limit each
        return spec.seconds * rounds + GRACE_SECONDS


@dataclass
class _Group:
    """Samples that were submitted together."""

    scores: list[list[Score | None]]
    left: int
    done: Future[Scores] = field(default_factory=Future)

    def put(self, rows: Sequence[int], reward: int, scores: Sequence[Score]) -> None:
        """Scores of one reward, for some rows."""
        for row, score in zip(rows, scores, strict=True):
            self.scores[row][reward] = score
        self.left -= 1
        if not self.left and not self.done.done():
            self.done.set_result([[score for score in row if score is not None] for row in self.scores])

    def fail(self, error: Exception) -> None:
        """Not all of them will come."""
        if not self.done.done():
            self.done.set_exception(error)


__all__ = ["RewardPool", "Scores"]
