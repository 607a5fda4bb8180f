"""Bugs to plant into training by rewards, each under a name; what is learnt must show them.

    sign       advantages with their sign turned round
    permuted   each sample has the advantage of another
    shifted    the log-probability of a token is taken one place too late, where it has been read already
    stale      what is learnt is never given to the generator

`plant(name)` replaces a function of the installed package in this process only.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor


def sign() -> None:
    _change_advantages(lambda advantage: -advantage)


def permuted() -> None:
    random = torch.Generator().manual_seed(0)
    _change_advantages(lambda advantage: advantage[torch.randperm(len(advantage), generator=random)])


def shifted() -> None:
    from ropewalk.train.pupil import Pupil

    right: Any = Pupil.policy_log_probs

    def late(self: Pupil, batch: Any, temperature: float, **options: Any) -> Any:
        """What is found at place t + 1 for the label of t, whose own input it then is."""
        found = right(self, replace(batch, labels=np.roll(batch.labels, 1, axis=1)), temperature, **options)
        return type(found)(*(None if part is None else part.roll(-1) for part in found))

    Pupil.policy_log_probs = late  # type: ignore[method-assign]


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
    from ropewalk.train import reinforcement

    for dtype in reinforcement.AGREE:
        reinforcement.AGREE[dtype] = float("inf")


def _change_advantages(change: Callable[[Tensor], Tensor]) -> None:
    from ropewalk.train.advantages import ADVANTAGES

    for name, right in list(ADVANTAGES.items()):
        ADVANTAGES[name] = lambda rewards, group, right=right: change(right(rewards, group))
