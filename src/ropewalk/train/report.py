"""What a step by rewards tells: its rewards, lengths and ages, and some of its completions."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import numpy as np
from torch import Tensor

from ropewalk.chat.template import Template
from ropewalk.train.distributed import World
from ropewalk.train.environment import Episode
from ropewalk.train.objective import Measures
from ropewalk.train.rewards import Array
from ropewalk.train.rollouts import Group
from ropewalk.train.standing import Standing

SHOWN, CHARACTERS = 4, 2000  # samples of a step that are written down, and how much of each


class Report:
    """For the rewards of these names."""

    def __init__(self, names: Sequence[str], template: Template, world: World) -> None:
        self.names, self.template, self.world = names, template, world

    def step(self, groups: Sequence[Group], found: Standing, advantage: Tensor, version: int) -> Measures:
        """Of the completions that are learnt from by the adapter of this version; advantage [S of all processes]."""
        mine = advantage[found.mine]
        teaching = [bool((mine[place] != 0).any()) for place in _places(groups)]
        sequences = [one for group in groups for episode in group.episodes for one in episode.sequences]
        ages = [version - v for one in sequences for v, sampled in zip(one.versions, one.trained) if sampled]
        varied, count, age, tokens = self.world.sum([sum(teaching), len(groups), sum(ages), len(ages)])
        return self.rewards(groups, found) | {
            "reward_std": found.std,
            "varied": varied / max(1.0, count),
            "staleness": age / max(1.0, tokens),
            "staleness_max": self._most(ages),
        }

    def rewards(self, groups: Sequence[Group], found: Standing) -> Measures:
        """What was reached, and how long it was."""
        episodes = [episode for group in groups for episode in group.episodes]
        lengths = [episode.sampled for episode in episodes]
        ended = [all(one.ended for one in episode.sequences) for episode in episodes]
        failed = [any(errors) for group in groups for errors in group.errors]
        total, whole, lost, count = self.world.sum([sum(lengths), sum(ended), sum(failed), len(lengths)])
        return {
            "reward": found.mean,
            **{f"rewards/{name}": mean for name, mean in zip(self.names, found.means)},
            "length": total / max(1.0, count),
            "length_max": self._most(lengths),
            "ended": whole / max(1.0, count),
            "failed": lost / max(1.0, count),
            **self._metrics(episodes),
        }

    def samples(self, groups: Sequence[Group], found: Standing, advantage: Tensor) -> list[dict[str, Any]]:
        """A few completions: of some prompts the best and the worst, where there are such of prompts that teach something."""
        totals, mine = found.total[found.mine], advantage[found.mine]
        placed = sorted(zip(groups, _places(groups)), key=lambda one: not bool((mine[one[1]] != 0).any()))
        chosen = [(group, place, number) for group, place in placed[: SHOWN // 2] for number in _ends(totals[place])]
        shown = list[dict[str, Any]]()
        for group, place, number in chosen:
            episode, reward = group.episodes[number], float(totals[place][number])
            shown.append(
                {
                    "prompt": self.template.decode(episode.ids[: episode.prompt])[-CHARACTERS:],
                    "completion": "\n".join(episode.replies)[:CHARACTERS],
                    "reward": _known(reward),
                    "rewards": {name: _known(float(value)) for name, value in zip(self.names, group.scores[number])},
                    "advantage": float(mine[place][number]),
                }
            )
        return shown

    def _metrics(self, episodes: Sequence[Episode]) -> Measures:
        """What a harness told of its rollouts beside their rewards: means, over those that told it."""
        told: dict[str, list[float]] = {}
        for name, value in self.world.gather([pair for episode in episodes for pair in episode.metrics.items()]):
            told.setdefault(f"metrics/{name}", []).append(value)
        return {name: sum(values) / len(values) for name, values in told.items()}

    def _most(self, values: Sequence[int]) -> float:
        return float(max(self.world.gather([max(values, default=0)])))


def _places(groups: Sequence[Group]) -> list[slice]:
    """Where each group's samples stand among all."""
    ends = list(accumulate(len(group.episodes) for group in groups))
    return [slice(end - len(group.episodes), end) for group, end in zip(groups, ends)]


def _ends(totals: Array) -> list[int]:
    """The numbers of the best and the worst of a group; one where they are the same."""
    if np.isnan(totals).all():
        return [0]
    return sorted({int(np.nanargmax(totals)), int(np.nanargmin(totals))}, key=lambda number: -totals[number])


def _known(value: float) -> float | None:
    return None if math.isnan(value) else value
