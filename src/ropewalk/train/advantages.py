"""From rewards to advantages, as pure functions. Legend: S samples, R reward functions.

`rewards` [S] float and `group` [S] whole numbers: samples of one prompt have one number, whatever it is and wherever they stand.
Where a statistic is of the whole batch, all samples of all ranks must be given.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

EPSILON = 1e-4  # beside a standard deviation, as in the implementations that GRPO's and DAPO's papers came with


def group_standardised(rewards: Tensor, group: Tensor) -> Tensor:
    """[S]: (R - mean_g) / (std_g + 1e-4), std with n - 1 (GRPO, arXiv 2402.03300); 0 in a group of one."""
    centred, place, count = _centred(rewards, group)
    variance = _sums(centred.square(), place, len(count)) / (count - 1).clamp(min=1)
    return centred / (variance.sqrt() + EPSILON)[place]


def group_centred(rewards: Tensor, group: Tensor) -> Tensor:
    """[S]: R - mean_g (Dr. GRPO, arXiv 2503.20783)."""
    return _centred(rewards, group)[0]


def leave_one_out(rewards: Tensor, group: Tensor) -> Tensor:
    """[S]: R less the mean of the others of its group, which is (R - mean_g) n / (n - 1) (RLOO, arXiv 2402.14740); 0 in a group of one."""
    centred, place, count = _centred(rewards, group)
    return centred * (count / (count - 1).clamp(min=1))[place]


def batch_whitened(rewards: Tensor, group: Tensor) -> Tensor:
    """[S]: (R - mean) / (std + 1e-4) over the whole batch, KL already in R (REINFORCE++, arXiv 2501.03262)."""
    return _whitened(rewards)


def group_centred_batch_whitened(rewards: Tensor, group: Tensor) -> Tensor:
    """[S]: R - mean_g, then whitened over the whole batch (REINFORCE++-baseline, arXiv 2501.03262)."""
    return _whitened(group_centred(rewards, group))


def group_centred_batch_scaled(rewards: Tensor, group: Tensor) -> Tensor:
    """[S]: R - mean_g, over the standard deviation of the whole batch (`scale_rewards: batch`, arXiv 2508.08221)."""
    centred = group_centred(rewards, group)
    return centred / (rewards.std() + EPSILON) if len(rewards) > 1 else centred


ADVANTAGES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "group_std": group_standardised,
    "group_mean": group_centred,
    "leave_one_out": leave_one_out,
    "batch": batch_whitened,
    "group_mean_batch": group_centred_batch_whitened,
    "group_mean_batch_std": group_centred_batch_scaled,
}


PER_REWARD = "per_reward"  # what takes the rewards before they are added up


def per_reward(rewards: Tensor, weights: Tensor, group: Tensor) -> Tensor:
    """rewards [S, R], NaN where one does not apply, weights [R] -> [S]: each reward standardised in its group, their weighted sum
    whitened over the batch (GDPO, arXiv 2601.05242), so that one of small spread is not drowned by one of large; 0 where none applies.
    """
    applies = ~rewards.isnan()
    total = rewards.new_zeros(len(rewards))
    for column, there, weight in zip(rewards.unbind(1), applies.unbind(1), weights):
        total[there] += weight * group_standardised(column[there], group[there])
    known = applies.any(1)
    total[known] = _whitened(total[known])
    return total


def varied(rewards: Tensor, group: Tensor, tolerance: float = 1e-6) -> Tensor:
    """[S] bool: samples of groups whose rewards are not all equal; the others teach nothing (DAPO's dynamic sampling, arXiv 2503.14476).

    It is asked of the rewards, since what is left of equal ones less their mean is rounding, and need not be 0.
    """
    _, place = torch.unique(group, return_inverse=True)
    groups = int(place.max()) + 1 if len(place) else 0
    most, least = (
        rewards.new_zeros(groups).scatter_reduce(0, place, rewards, how, include_self=False) for how in ("amax", "amin")
    )
    return (most - least > tolerance)[place]


def overlong_penalty(lengths: Tensor, longest: int, soft: int) -> Tensor:
    """[S]: 0 up to longest - soft tokens, then falling in a line to -1 at `longest` (DAPO, arXiv 2503.14476, equation 13)."""
    return ((longest - soft - lengths.to(torch.get_default_dtype())) / soft).clamp(-1.0, 0.0)


def less_kl(rewards: Tensor, kl: Tensor, beta: float) -> Tensor:
    """[S]: R - beta KL, the penalty inside the reward; kl [S] is each sample's summed k1, held constant (arXiv 2203.02155)."""
    return rewards - beta * kl.detach()


def _centred(rewards: Tensor, group: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Rewards less their group's mean [S], each sample's place among the groups [S], each group's size [groups]."""
    _, place = torch.unique(group, return_inverse=True)
    groups = int(place.max()) + 1 if len(place) else 0
    count = _sums(torch.ones_like(rewards), place, groups)
    return rewards - (_sums(rewards, place, groups) / count)[place], place, count


def _sums(values: Tensor, place: Tensor, groups: int) -> Tensor:
    return values.new_zeros(groups).index_add(0, place, values)


def _whitened(values: Tensor) -> Tensor:
    if len(values) < 2:
        return torch.zeros_like(values)
    return (values - values.mean()) / (values.std() + EPSILON)
