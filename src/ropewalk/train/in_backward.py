"""The optimizer's step while the backward pass runs: a gradient is used as soon as it is there, and let go of.

All gradients together are never held, only so many bytes of them as are worth a step. The numbers are those of a step after the pass:
a gradient that has arrived is whole, and nothing later in the pass reads its parameter.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ropewalk.config.run import Run
from ropewalk.errors import ConfigError
from ropewalk.models.memory import AT_ONCE
from ropewalk.train.distributed import World
from ropewalk.train.optim import Optimizer


def in_backward(run: Run, optimizer: Optimizer, parameters: Sequence[nn.Parameter], world: World) -> StepInBackward | None:
    """What steps during the pass, where the run asks for that."""
    if not run.step_in_backward:
        return None
    if world.size > 1:
        raise ConfigError(
            f"step_in_backward uses gradients before those of {world.size} processes are added up; start one process, or remove it"
        )
    return StepInBackward(optimizer, parameters)


class StepInBackward:
    """Steps an optimizer from the hooks of its parameters; its rate must be set before the pass begins."""

    def __init__(self, optimizer: Optimizer, parameters: Sequence[nn.Parameter], worth: int | None = None) -> None:
        self.optimizer, self.parameters = optimizer, list(parameters)
        self.worth = AT_ONCE if worth is None else worth  # bytes of gradients
        self.arrived: list[nn.Parameter] = []
        self.held = 0
        self.norms: dict[int, Tensor] = {}  # of each parameter's gradient, by its place
        self.place = {id(parameter): number for number, parameter in enumerate(self.parameters)}
        for parameter in self.parameters:
            hook: Any = self._arrived
            parameter.register_post_accumulate_grad_hook(hook)  # type: ignore[no-untyped-call]

    def finish(self) -> float:
        """After the pass: steps what is left, and gives the 2-norm of all gradients that there were."""
        self._step()
        norms = [self.norms[number] for number in sorted(self.norms)]
        self.norms = {}
        if not norms:
            return 0.0
        return float(torch.linalg.vector_norm(torch.stack([norm.to(norms[0].device) for norm in norms])))

    def _arrived(self, parameter: nn.Parameter) -> None:
        assert parameter.grad is not None
        self.arrived.append(parameter)
        self.held += parameter.grad.nbytes
        if self.held >= self.worth:
            self._step()

    def _step(self) -> None:
        if not self.arrived:
            return
        gradients = [parameter.grad for parameter in self.arrived if parameter.grad is not None]
        for parameter, norm in zip(self.arrived, torch._foreach_norm(gradients)):
            self.norms[self.place[id(parameter)]] = norm
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.arrived, self.held = [], 0
