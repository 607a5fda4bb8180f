"""How the samples of a step stand to each other, over all processes: their rewards, and the advantages that follow.

Legend: S samples of all processes, R rewards.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from ropewalk.config.run import Run
from ropewalk.train.advantages import ADVANTAGES, PER_REWARD, less_kl, overlong_penalty, per_reward, varied
from ropewalk.train.distributed import World
from ropewalk.train.policy_losses import Method
from ropewalk.train.rewards import Array, combine
from ropewalk.train.rollouts import Group


@dataclass(frozen=True)
class Standing:
    """Rewards of all samples.  rollouts -> advantages"""

    values: Array  # [S, R]; NaN: does not apply
    weights: Array  # [R]
    overlong: Array  # [S]: what their length costs; 0 or less
    total: Array  # [S], with it; NaN where no reward applies
    group: Array  # [S]: the number of each sample's prompt
    mine: slice  # those of this process

    @property
    def mean(self) -> float:
        return float(np.nanmean(self.total)) if not np.isnan(self.total).all() else 0.0

    @property
    def std(self) -> float:
        return float(np.nanstd(self.total)) if not np.isnan(self.total).all() else 0.0

    @property
    def means(self) -> list[float]:
        """Of each reward [R]; 0 for one that never applied."""
        applies = ~np.isnan(self.values)
        sums: Array = np.where(applies, self.values, 0.0).sum(0) / np.maximum(applies.sum(0), 1)
        return [float(mean) for mean in sums]

    def less(self, kl: Tensor, beta: float, world: World) -> Standing:
        """With beta KL taken off the total; kl is of this process's samples."""
        whole = torch.tensor(world.gather(kl.tolist()), dtype=torch.float64)
        return replace(self, total=less_kl(torch.from_numpy(self.total), whole, beta).numpy())

    def advantages(self, method: Method) -> Tensor:
        """[S] float64: how much better each sample is; 0 where nothing teaches."""
        group = torch.from_numpy(self.group)
        if method.advantage == PER_REWARD:
            found = per_reward(*self._apart(), group)
        else:
            total = torch.from_numpy(self.total)
            applies, found = ~total.isnan(), torch.zeros_like(total)
            found[applies] = ADVANTAGES[method.advantage](total[applies], group[applies])
        return torch.where(self.teaching(method), found, 0.0)

    def teaching(self, method: Method) -> Tensor:
        """[S] bool: samples of prompts whose completions were rewarded differently, in their sum, or (GDPO) by any reward.

        Where the whole batch is compared, without regard to prompts, it is the whole batch that must differ.
        """
        group = torch.from_numpy(self.group)
        if method.advantage == PER_REWARD:
            columns, weights = self._apart()
            counted = columns[:, weights != 0]
        else:
            counted = torch.from_numpy(self.total)[:, None]
        if method.advantage == "batch":
            group = torch.zeros_like(group)
        found = torch.zeros(len(group), dtype=torch.bool)
        for column in counted.unbind(1):
            there = ~column.isnan()
            found[there] |= varied(column[there], group[there])
        return found

    def _apart(self) -> tuple[Tensor, Tensor]:
        """What is standardised by itself [S, R + 1], with its weights [R + 1]: the rewards, and what long completions cost as one more."""
        cost = np.where(np.isnan(self.total), np.nan, self.overlong)
        return torch.from_numpy(np.column_stack([self.values, cost])), torch.from_numpy(np.append(self.weights, 1.0))


def standings(groups: Sequence[Group], run: Run, weights: Array, world: World) -> Standing:
    """All processes' samples, in the order of their ranks."""
    assert run.trl is not None
    rows = []
    for group in groups:
        for episode, scores in zip(group.episodes, group.scores):
            rows.append([float(group.number), float(episode.sampled), *scores.tolist()])
    counts = world.gather([len(rows)])
    every = np.array(world.gather(rows), dtype=np.float64).reshape(sum(counts), -1)
    first = sum(counts[: world.rank])
    values, overlong = every[:, 2:], np.zeros(len(every))
    if run.trl.overlong_tokens:
        longest, soft = run.trl.max_completion_length, run.trl.overlong_tokens
        overlong = overlong_penalty(torch.from_numpy(every[:, 1]), longest, soft).numpy()
    total = combine(values, weights) + overlong
    return Standing(values, weights, overlong, total, every[:, 0], slice(first, first + len(rows)))
