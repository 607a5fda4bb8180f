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
from ropewalk.train.advantages import ADVANTAGES, less_kl, overlong_penalty
from ropewalk.train.distributed import World
from ropewalk.train.policy_losses import Method
from ropewalk.train.rewards import Array, advantages, combine, standardise
from ropewalk.train.rollouts import Group


@dataclass(frozen=True)
class Standing:
    """Rewards of all samples.  rollouts -> advantages"""

    values: Array  # [S, R]; NaN: does not apply
    weights: Array  # [R]
    total: Array  # [S], NaN where no reward applies
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

    def advantages(self, method: Method, run: Run) -> Tensor:
        """[S] float64: how much better each sample is; 0 where no reward applies."""
        assert run.trl is not None
        scale, samples = run.trl.scale_rewards, run.trl.num_generations
        if run.normalises_rewards_apart:
            return torch.from_numpy(advantages(self.values, self.weights, samples, separately=True))
        applies = ~np.isnan(self.total)
        found = torch.zeros(len(self.total), dtype=torch.float64)
        if scale == "batch" and method.advantage in ("group_std", "group_mean"):
            whole = standardise(self.total, samples, "batch")
            return torch.from_numpy(np.where(applies, whole, 0.0))
        how = method.advantage
        if scale is not None and how in ("group_std", "group_mean"):
            how = "group_std" if scale == "group" else "group_mean"
        total, group = torch.from_numpy(self.total[applies]), torch.from_numpy(self.group[applies])
        found[torch.from_numpy(applies)] = ADVANTAGES[how](total, group)
        return found


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
    values = every[:, 2:]
    total = combine(values, weights)
    if run.trl.overlong_tokens:
        longest, soft = run.trl.max_completion_length, run.trl.overlong_tokens
        total = total + overlong_penalty(torch.from_numpy(every[:, 1]), longest, soft).numpy()
    return Standing(values, weights, total, every[:, 0], slice(first, first + len(rows)))
