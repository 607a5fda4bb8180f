"""Bugs to plant into training by rewards, each under a name; what is learnt must show them.

    sign       advantages with their sign turned round
    permuted   each sample has the advantage of another
    shifted    the log-probability of a token is taken one place too late, where it has been read already
    stale      what is learnt is never given to the generator

`plant(name)` replaces a function of the installed package in this process only.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def sign() -> None:
    _change_advantages(lambda advantage: -advantage)


def permuted() -> None:
    random = torch.Generator().manual_seed(0)
    _change_advantages(lambda advantage: advantage[torch.randperm(len(advantage), generator=random)])


def shifted() -> None:
    from ropewalk.models.head import Head

    right: Any = Head.log_probs_at

    def late(self: Head, model: Any, ids: Tensor, labels: Tensor, places: Tensor, **options: Any) -> Any:
        """What is found at place t + 1 for the label of t, which the model has read there."""
        found = right(self, model, ids, labels.roll(1, dims=1), places, **options)
        return type(found)(*(None if part is None else part.roll(-1, dims=-1) for part in found))

    Head.log_probs_at = late  # type: ignore[method-assign]


def stale() -> None:
    from ropewalk.train.generator import Generator

    def publish(self: Generator) -> None:
        self.version += 1

    Generator.publish = publish  # type: ignore[method-assign]


PLANTED: dict[str, Callable[[], None]] = {"sign": sign, "permuted": permuted, "shifted": shifted, "stale": stale}


def plant(name: str) -> None:
    PLANTED[name]()


def trust_the_beginning() -> None:
    """Switches off the comparison that stops a run whose generator and trainer disagree, so that the curve alone must tell."""
    from ropewalk.train import policy_step

    for dtype in policy_step.AGREE:
        policy_step.AGREE[dtype] = float("inf")


def _change_advantages(change: Callable[[Tensor], Tensor]) -> None:
    from ropewalk.train.advantages import ADVANTAGES

    for name, right in list(ADVANTAGES.items()):
        ADVANTAGES[name] = lambda rewards, group, right=right: change(right(rewards, group))
