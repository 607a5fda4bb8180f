"""How many steps a run has, and which batches each of them takes. No torch."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

Batch = TypeVar("Batch")


@dataclass(frozen=True)
class Step:
    """One optimizer step: which epoch, and which of the epoch's batches belong to it over all processes."""

    number: int  # 0-based
    epoch: int
    first: int
    last: int  # one past


class Pace(Generic[Batch]):
    """The run's steps, recomputable from any of them on: `group` micro-batches (accumulation times processes) make a step."""

    def __init__(
        self, epochs: Callable[[int], Sequence[Batch]], *, group: int, num_epochs: float, max_steps: int | None
    ) -> None:
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

    @property
    def per_epoch(self) -> int:
        """Steps of the first epoch."""
        self.at(0)
        return self.starts[1]

    def _length(self, epoch: int) -> int:
        return math.ceil(len(self.batches(epoch)) / self._group)

    def _count(self, num_epochs: float) -> int:
        whole = int(num_epochs)
        for epoch in range(math.ceil(num_epochs)):
            self.starts.append(self.starts[-1] + self._length(epoch))
        if whole == num_epochs:
            return self.starts[-1]
        return self.starts[whole] + math.ceil((num_epochs - whole) * (self.starts[whole + 1] - self.starts[whole]))
