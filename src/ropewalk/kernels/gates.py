"""What stands between an expert's two projections: gate_up [S, 2I] (or up [S, I]) -> h [S, I], with a closed backward where one is known.

Legend: S routed rows, I expert intermediate. Every gate has its plain twin, `plain`, written as the definition.
A gate works in three steps so that nothing but gate_up is kept between forward and backward:
`forward` gives h; `again` gives h once more and what `backward` needs; `backward` turns dh into d gate_up.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

aten = torch.ops.aten


class Gate(Protocol):
    """h from gate_up, and back."""

    def plain(self, gate_up: Tensor) -> Tensor: ...

    def forward(self, gate_up: Tensor) -> Tensor: ...

    def again(self, gate_up: Tensor) -> tuple[Tensor, Any]: ...

    def backward(self, gate_up: Tensor, dh: Tensor, kept: Any) -> tuple[Tensor, tuple[Tensor, ...]]: ...

    @property
    def parameters(self) -> tuple[Tensor, ...]: ...


def halves(gate_up: Tensor, interleaved: bool) -> tuple[Tensor, Tensor]:
    """gate_up [S, 2I] -> gate [S, I], up [S, I] as views: [gate | up], or gate and up in turn."""
    if interleaved:
        return gate_up[..., ::2], gate_up[..., 1::2]
    gate, up = gate_up.chunk(2, dim=-1)
    return gate, up


_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
}


@dataclass(frozen=True)
class Glu:
    """h = activation(gate) * up, with activation one of silu, gelu, gelu_tanh."""

    activation: str = "silu"
    interleaved: bool = False

    @property
    def parameters(self) -> tuple[Tensor, ...]:
        return ()

    def plain(self, gate_up: Tensor) -> Tensor:
        gate, up = halves(gate_up, self.interleaved)
        return _ACTIVATIONS[self.activation](gate) * up

    def forward(self, gate_up: Tensor) -> Tensor:
        gate, up = halves(gate_up, self.interleaved)
        return _ACTIVATIONS[self.activation](gate).mul_(up)

    def again(self, gate_up: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = halves(gate_up, self.interleaved)
        activated = _ACTIVATIONS[self.activation](gate)
        return activated * up, activated

    def backward(self, gate_up: Tensor, dh: Tensor, kept: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        gate, up = halves(gate_up, self.interleaved)
        d_gate_up = torch.empty_like(gate_up)
        d_gate, d_up = halves(d_gate_up, self.interleaved)
        torch.mul(dh, kept, out=d_up)
        d_activated = dh * up
        if self.activation == "silu":
            aten.silu_backward.grad_input(d_activated, gate, grad_input=d_gate)
        else:
            approximate = "tanh" if self.activation == "gelu_tanh" else "none"
            aten.gelu_backward.grad_input(d_activated, gate, approximate=approximate, grad_input=d_gate)
        return d_gate_up, ()


@dataclass(frozen=True)
class ClampedGlu:
    """h = (u + shift) * g * sigmoid(alpha g), where g = min(gate, limit) and u = clamp(up, -limit, limit): gpt-oss and its kin."""

    limit: float
    alpha: float = 1.0
    shift: float = 0.0
    interleaved: bool = False

    @property
    def parameters(self) -> tuple[Tensor, ...]:
        return ()

    def plain(self, gate_up: Tensor) -> Tensor:
        gate, up = halves(gate_up, self.interleaved)
        gate, up = gate.clamp(max=self.limit), up.clamp(-self.limit, self.limit)
        return (up + self.shift) * (gate * torch.sigmoid(self.alpha * gate))

    def forward(self, gate_up: Tensor) -> Tensor:
        return self.again(gate_up)[0]

    def again(self, gate_up: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor]]:
        gate, up = halves(gate_up, self.interleaved)
        gate, up = gate.clamp(max=self.limit), up.clamp(-self.limit, self.limit).add_(self.shift)
        sigmoid = torch.mul(gate, self.alpha).sigmoid_()
        activated = gate * sigmoid
        return activated * up, (up, sigmoid, activated)

    def backward(self, gate_up: Tensor, dh: Tensor, kept: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, tuple[Tensor, ...]]:
        raw_gate, raw_up = halves(gate_up, self.interleaved)
        up, sigmoid, activated = kept
        d_gate_up = torch.empty_like(gate_up)
        d_gate, d_up = halves(d_gate_up, self.interleaved)
        torch.mul(dh, activated, out=d_up)
        d_up.masked_fill_(raw_up.abs() > self.limit, 0)
        # d/dg of g sigmoid(a g) = sigmoid (1 + a g (1 - sigmoid)) = sigmoid + a activated (1 - sigmoid)
        slope = sigmoid.addcmul(activated, 1 - sigmoid, value=self.alpha)
        torch.mul(slope.mul_(up), dh, out=d_gate)
        d_gate.masked_fill_(raw_gate > self.limit, 0)
        return d_gate_up, ()


@dataclass(frozen=True)
class AnyGate:
    """Whatever a model's own function computes: its gradient is taken by a local autograd over the kept gate_up."""

    function: Callable[[Tensor], Tensor]
    trained: Sequence[Tensor] = field(default=())

    @property
    def parameters(self) -> tuple[Tensor, ...]:
        return tuple(self.trained)

    def plain(self, gate_up: Tensor) -> Tensor:
        return self.function(gate_up)

    def forward(self, gate_up: Tensor) -> Tensor:
        h = self.function(gate_up)
        return (
            h.clone() if h.data_ptr() == gate_up.data_ptr() else h
        )  # an identity must not let us scale the kept rows in place

    def again(self, gate_up: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        with torch.enable_grad():
            leaf = gate_up.detach().requires_grad_()
            h = self.function(leaf)
        return h.detach().clone(), (leaf, h)

    def backward(self, gate_up: Tensor, dh: Tensor, kept: tuple[Tensor, Tensor]) -> tuple[Tensor, tuple[Tensor, ...]]:
        leaf, h = kept
        d_leaf, *rest = torch.autograd.grad(h, (leaf, *self.trained), dh.to(h.dtype), allow_unused=True)
        given = tuple(torch.zeros_like(p) if d is None else d for d, p in zip(rest, self.trained))
        return (torch.zeros_like(gate_up) if d_leaf is None else d_leaf), given
