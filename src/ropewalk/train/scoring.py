"""What a step of a reward model minimises: pairs of answers told apart (Bradley-Terry), or steps of answers judged right or wrong."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from ropewalk.config.run import Run
from ropewalk.data.dataset import Batch
from ropewalk.train.distributed import World
from ropewalk.train.preference_losses import bradley_terry, process_rewards
from ropewalk.train.pupil import Pupil

Measures = dict[str, float]


class Scoring:
    """What both have in common: the scores of a micro-batch, and sums of what is measured."""

    names: tuple[str, ...] = ()

    def __init__(self, pupil: Pupil, device: torch.device, world: World, run: Run) -> None:
        self.pupil, self.device, self.world, self.run = pupil, device, world, run
        self.sums: dict[str, float] = {}

    def weight(self, batch: Batch) -> int:
        assert batch.compared is not None
        return batch.compared.units

    def begin(self, batches: Iterable[Batch], idle: Iterable[Batch] = ()) -> None:
        self.sums = {}

    @contextmanager
    def unheard(self) -> Iterator[None]:
        """Within it nothing is measured."""
        kept = dict(self.sums)
        try:
            yield
        finally:
            self.sums = kept

    def scores(self, batch: Batch) -> Tensor:
        """[N, L]: of the answers or steps of the micro-batch, in their order."""
        ids, labels, positions = (torch.from_numpy(a).to(self.device) for a in (batch.ids, batch.labels, batch.position_ids))
        return self.pupil.scores(ids, labels, positions)

    def add(self, name: str, values: Tensor) -> None:
        self.sums[name] = self.sums.get(name, 0.0) + float(values.detach().double().sum())

    def summed(self) -> Measures:
        """Over all processes."""
        return dict(zip(self.names, self.world.sum([self.sums.get(name, 0.0) for name in self.names])))


class Ranking(Scoring):
    """A reward model: of two answers the chosen one is to score higher."""

    names = ("units", "rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies")

    def loss(self, batch: Batch) -> Tensor:
        assert batch.compared is not None
        assert batch.compared.margins is not None
        scores = self.scores(batch)[:, 0]
        chosen, rejected = scores[0::2], scores[1::2]
        difference = chosen - rejected
        for name, values in zip(self.names, (torch.ones_like(chosen), chosen, rejected, difference, difference > 0)):
            self.add(name, values)
        margins = torch.from_numpy(batch.compared.margins).to(self.device)
        return bradley_terry(chosen, rejected, margins, self.run.center_rewards_coefficient or 0.0).sum()

    def measured(self) -> Measures:
        """Means over pairs: the scores, their difference, and the share of pairs that are told apart rightly."""
        found = self.summed()
        units = max(1.0, found.pop("units"))
        return {name: total / units for name, total in found.items()}


class StepJudging(Scoring):
    """A process reward model: the probability that a step is right, of two outputs at its last token."""

    names = ("right", "wrong", "rewards/right", "rewards/wrong", "well")

    def loss(self, batch: Batch) -> Tensor:
        assert batch.compared is not None
        assert batch.compared.wanted is not None
        outputs = self.scores(batch)
        odds = outputs[:, 1] - outputs[:, 0]  # the cross entropy of two outputs is that of their difference
        right = torch.from_numpy(batch.compared.wanted).to(self.device)
        sure = torch.sigmoid(odds)
        for name, values in zip(self.names, (right, ~right, sure[right], sure[~right], (odds > 0) == right)):
            self.add(name, values)
        return process_rewards(odds, right).sum()

    def measured(self) -> Measures:
        """The mean probability given to right and to wrong steps, their difference, and the share of steps that are judged rightly."""
        found = self.summed()
        means = {f"rewards/{kind}": found[f"rewards/{kind}"] / max(1.0, found[kind]) for kind in ("right", "wrong")}
        means["rewards/margins"] = means["rewards/right"] - means["rewards/wrong"]
        return means | {"rewards/accuracies": found["well"] / max(1.0, found["right"] + found["wrong"])}
