"""What a run learns from: the micro-batches of each step, and what it is examined on.

Taught      rows of data, for supervised fine-tuning and preferences: here
Rewarded    completions of its own, for training by rewards: train/reinforcement.py
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from ropewalk.config.run import Run
from ropewalk.data.dataset import Batch, Data
from ropewalk.data.packing import batches
from ropewalk.data.stream import Stream
from ropewalk.data.streaming import StreamBatches
from ropewalk.models.sharded import is_sharded
from ropewalk.train.distributed import World
from ropewalk.train.objective import Measures, Objective, objective_of
from ropewalk.train.pace import Pace, Step
from ropewalk.train.pupil import Pupil


@dataclass(frozen=True)
class Examined:
    """What an evaluation came to.  lessons -> trainer"""

    loss: float  # the less the better
    told: Measures = field(default_factory=dict)


class Lessons(Protocol):
    """What the trainer needs of them. Every call is made by all processes together."""

    total: int  # optimizer steps
    per_epoch: int
    rows: int
    examines: bool

    def start(self, pupil: Pupil, step: int, data: dict[str, Any]) -> None:
        """The model is loaded, and so many steps have been taken; `data` is what `position` gave then."""
        ...

    def begin(self, number: int) -> int:
        """Makes this process's micro-batches of a step ready; how many tokens they hold."""
        ...

    def losses(self) -> Iterator[Tensor]:
        """The losses of those micro-batches, one after another, which add up to the step's over all processes."""
        ...

    def name(self, number: int) -> str:
        """What to call a micro-batch of this step in a message."""
        ...

    def learnt(self) -> None:
        """The optimizer has taken the step."""
        ...

    def measured(self) -> Measures:
        """What was measured in the step, over all processes."""
        ...

    def told(self) -> list[tuple[str, dict[str, Any]]]:
        """Events to write down beside a step's or an evaluation's own: their names and values, each once."""
        ...

    def examine(self) -> Examined:
        """An evaluation."""
        ...

    def epoch_after(self, steps: int) -> float: ...

    def position(self) -> dict[str, Any]:
        """What a later process needs to go on from here, beside the number of steps."""
        ...

    def probe(self) -> Tensor:
        """Some ids [1, T], to compare a saved adapter with this one."""
        ...

    def close(self) -> None: ...


class Taught:
    """Rows of data, in an order that follows from the seed."""

    def __init__(self, run: Run, data: Data, device: torch.device, world: World, began: int | None = None) -> None:
        """`began`: the number of processes that the run began with, whose steps another number goes on with."""
        self.run, self.data, self.device, self.world = run, data, device, world
        self.pace: Pace[Batch] = Pace(
            lambda epoch: batches(data.train, run, seed=run.seed, epoch=epoch),
            group=run.accumulation * (began or world.size),
            num_epochs=run.num_epochs,
            max_steps=run.max_steps,
        )
        self.total, self.per_epoch, self.rows = self.pace.total, self.pace.per_epoch, len(data.train)
        self.examines = data.evaluation is not None
        endless = self.pace.batches(0) if isinstance(data.train, Stream) else None
        self.stream = endless if isinstance(endless, StreamBatches) else None
        self.objective: Objective | None = None
        self.step, self.mine = Step(0, 0, 0, 0), list[Batch]()
        self.idle: list[Batch] = []  # gone through once more so that all processes make as many passes, for nothing

    def start(self, pupil: Pupil, step: int, data: dict[str, Any]) -> None:
        if self.stream is not None:
            self.stream.seek(data)
        self.objective = objective_of(self.run, pupil, self.device, self.world)
        self.pupil = pupil

    def begin(self, number: int) -> int:
        self.step = self.pace.at(number)
        epoch = self.pace.batches(self.step.epoch)
        self.mine = [epoch[i] for i in range(self.step.first + self.world.rank, self.step.last, self.world.size)]
        self.idle = [epoch[self.step.first]] * self._missing(self.step.last - self.step.first, len(self.mine))
        self._asked.begin(self.mine, self.idle)
        return sum(batch.tokens for batch in self.mine)

    def losses(self) -> Iterator[Tensor]:
        (weight,) = self.world.sum([sum(map(self._asked.weight, self.mine))])
        for batch in self.mine:
            yield self._asked.loss(batch) / max(1.0, weight)
        for batch in self.idle:
            with self._asked.unheard():
                loss = self._asked.loss(batch)
            yield 0.0 * loss

    def name(self, number: int) -> str:
        return f"batch {self.step.first + self.world.rank + number * self.world.size} of epoch {self.step.epoch}"

    def learnt(self) -> None:
        pass

    def measured(self) -> Measures:
        return self._asked.measured()

    def told(self) -> list[tuple[str, dict[str, Any]]]:
        return []

    def examine(self) -> Examined:
        rows = self.data.evaluation
        assert rows is not None
        found = batches(rows, self.run, seed=self.run.seed, epoch=0, shuffle=False, evaluation=True)
        total = trained = weight = 0.0
        mine = range(self.world.rank, len(found), self.world.size)
        idle = [found[0]] * self._missing(len(found), len(mine))
        with self.pupil.quietly():
            self._asked.begin((found[i] for i in mine), idle)
            for batch in (found[i] for i in mine):
                total += float(self._asked.loss(batch))
                weight += self._asked.weight(batch)
                trained += batch.trained
            for batch in idle:
                with self._asked.unheard():
                    self._asked.loss(batch)
        total, trained, weight = self.world.sum([total, trained, weight])
        return Examined(total / max(1.0, weight), {"trained": int(trained), **self._asked.measured()})

    def epoch_after(self, steps: int) -> float:
        return self.pace.epoch_after(steps)

    def position(self) -> dict[str, Any]:
        return self.stream.position() if self.stream is not None else {}

    def probe(self) -> Tensor:
        return torch.from_numpy(self.pace.batches(0)[0].ids[:1, :64])

    def close(self) -> None:
        pass

    def _missing(self, batches: int, mine: int) -> int:
        """Passes that this process makes fewer than others do, where they gather weights together."""
        return -(-batches // self.world.size) - mine if is_sharded(self.pupil.model) else 0

    @property
    def _asked(self) -> Objective:
        assert self.objective is not None, "begun before the model was there"
        return self.objective
