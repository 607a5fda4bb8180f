"""What this process trains of every parameter: all of it, or its part where the model is sharded.

The optimizer knows only what lies here, as plain tensors in the parameters' own storage; checkpoints hold whole tensors, so that a run
goes on with another number of processes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from ropewalk.models.sharded import local, part, whole
from ropewalk.train.distributed import World
from ropewalk.train.optim import Optimizer, clip


class Shares:
    """The trained parameters, by name and in a fixed order."""

    def __init__(self, trained: Sequence[tuple[str, nn.Parameter]], world: World) -> None:
        self.world = world
        self._cut = {name: p for name, p in trained if isinstance(p, DTensor)}
        self.named = [(name, nn.Parameter(local(p)) if name in self._cut else p) for name, p in trained]
        self._parts = [p for name, p in self.named if name in self._cut]
        self._wholes = [p for name, p in self.named if name not in self._cut]
        self._of = {id(p): self._cut[name] for name, p in self.named if name in self._cut}

    @property
    def parameters(self) -> list[nn.Parameter]:
        """What the optimizer moves."""
        return [p for _, p in self.named]

    def collect(self) -> None:
        """Every gradient is now the sum over all processes; what is cut has been added up in the backward pass."""
        for part_, cut in zip(self._parts, self._cut.values()):
            part_.grad = torch.zeros_like(part_) if cut.grad is None else local(cut.grad).to(part_.dtype)
            cut.grad = None
        self.world.add_gradients(self._wholes)

    def clip(self, limit: float | None) -> float:
        """As optim.clip: the 2-norm of all gradients together, over all processes."""
        if not self._cut:
            return clip(self.parameters, limit)
        (squares,) = self.world.sum([clip(self._parts, None) ** 2])
        norm = math.sqrt(squares + clip(self._wholes, None) ** 2)
        if limit:
            total = torch.tensor(norm)
            for parameters in (self._parts, self._wholes):
                nn.utils.clip_grads_with_norm_(parameters, limit, total)
        return norm

    def whole(self, optimizer: Optimizer) -> WholeState:
        """The optimizer's state as checkpoints hold it."""
        return WholeState(self, optimizer)

    def turned(self, optimizer: Optimizer, state: dict[str, Any], turn: Callable[[Tensor, Tensor], Tensor]) -> dict[str, Any]:
        """The state with `turn` done to every tensor that belongs to a parameter which is cut."""
        if not self._cut:
            return state
        order = [id(p) for group in optimizer.param_groups for p in group["params"]]
        made: dict[int, dict[str, Any]] = {}
        for number, values in state["state"].items():
            cut = self._of.get(order[number])
            made[number] = {
                key: turn(value, cut) if cut is not None and isinstance(value, Tensor) and value.dim() else value
                for key, value in values.items()
            }
        return {**state, "state": made}


class WholeState:
    """An optimizer's state with whole tensors."""

    def __init__(self, shares: Shares, optimizer: Optimizer) -> None:
        self._shares, self._optimizer = shares, optimizer
        self._gathered: dict[str, Any] = {}

    def gather(self) -> WholeState:
        """Makes it ready to be saved by the leading process; asked for by all of them together."""
        leads = self._shares.world.leads
        self._gathered = self._shares.turned(
            self._optimizer, self._optimizer.state_dict(), lambda held, cut: whole(cut, held, keep=leads)
        )
        return self

    def state_dict(self) -> dict[str, Any]:
        return self._gathered

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Of every tensor this process takes its part."""
        self._optimizer.load_state_dict(self._shares.turned(self._optimizer, state, part))
