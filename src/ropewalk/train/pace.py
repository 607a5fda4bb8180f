"""How many steps a run has, which batches each step takes, and after which steps it evaluates and saves. No torch."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ropewalk.train.data import Batch

Epochs = Callable[[int], Sequence[Batch]]  # epoch -> its batches, in order


@dataclass(frozen=True)
class Step:
    """One optimizer step: which epoch, and which of the epoch's batches belong to it over all processes."""

    number: int  # 0-based
    epoch: int
    first: int
    last: int  # one past


class Pace:
    """The run's steps, recomputable from any of them on: `group` micro-batches (accumulation times processes) make a step."""

    def __init__(self, epochs: Epochs, *, group: int, num_epochs: float, max_steps: int | None) -> None:
        self._epochs, self._group = epochs, group
        self._held: tuple[int, Sequence[Batch]] | None = None
        self.starts: list[int] = [0]  # the step each epoch starts at
        self.total = max_steps or self._count(num_epochs)

    def at(self, number: int) -> Step:
        """The step of that number; epochs go on for as long as `max_steps` asks."""
        while self.starts[-1] <= number:
            self.starts.append(self.starts[-1] + self._length(len(self.starts) - 1))
        epoch = next(e for e in range(len(self.starts) - 1) if self.starts[e] <= number < self.starts[e + 1])
        first = (number - self.starts[epoch]) * self._group
        return Step(number, epoch, first, min(first + self._group, len(self.batches(epoch))))

    def batches(self, epoch: int) -> Sequence[Batch]:
        """The batches of an epoch; the last epoch asked for is kept."""
        if self._held is None or self._held[0] != epoch:
            self._held = (epoch, self._epochs(epoch))
        return self._held[1]

    def epoch_after(self, steps: int) -> float:
        """How many epochs so many steps are."""
        if steps <= 0:
            return 0.0
        done = self.at(steps - 1)
        return done.epoch + (steps - self.starts[done.epoch]) / (self.starts[done.epoch + 1] - self.starts[done.epoch])

    def ends_epoch(self, steps: int) -> bool:
        return steps in self.starts[1:]

    def _length(self, epoch: int) -> int:
        return math.ceil(len(self.batches(epoch)) / self._group)

    def _count(self, num_epochs: float) -> int:
        whole = int(num_epochs)
        for epoch in range(math.ceil(num_epochs)):
            self.starts.append(self.starts[-1] + self._length(epoch))
        if whole == num_epochs:
            return self.starts[-1]
        return self.starts[whole] + math.ceil((num_epochs - whole) * (self.starts[whole + 1] - self.starts[whole]))


@dataclass(frozen=True)
class Rhythm:
    """After which steps something is due: every so many, so often an epoch, at epochs' ends, or never but at the end."""

    every: float | None = None  # steps, or a share of all steps where below 1
    per_epoch: float | None = None
    at_epoch_end: bool = False

    def due(self, steps: int, pace: Pace) -> bool:
        if steps == pace.total:
            return True
        if self.every:
            return steps % (max(1, round(self.every)) if self.every >= 1 else math.ceil(self.every * pace.total)) == 0
        if self.per_epoch:
            epoch = pace.at(steps - 1).epoch
            length = pace.starts[epoch + 1] - pace.starts[epoch]
            inside = steps - pace.starts[epoch]
            return int(inside * self.per_epoch / length) > int((inside - 1) * self.per_epoch / length)
        return self.at_epoch_end and pace.ends_epoch(steps)


def rhythm(strategy: str | None, every: float | None, per_epoch: float | None) -> Rhythm:
    """What a config says of evaluating or saving: `*_strategy`, `*_steps`, `*_per_epoch`; each epoch's end where it says nothing."""
    if strategy == "no":
        return Rhythm()
    if strategy == "epoch" or not (every or per_epoch):
        return Rhythm(at_epoch_end=True)
    return Rhythm(every=every, per_epoch=None if every else per_epoch)
