"""The modules that hold LoRA factors, and what a linear layer computes with them.

A factor module is the child `ropewalk_lora` of the layer it adapts, so that the base's own names stay as they are.
Legend: T tokens, B sequences, E experts, r rank. Factors: A [r, in], B [out, r]; on experts A [E, r, in], B [E, out, r].
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ropewalk.kernels.expert_lora import Factors
from ropewalk.models.experts import LORA
from ropewalk.models.frozen_lora import Prepared

FEW = 64  # rows up to which a CPU multiplies narrow matrices sooner in float32 than it has brought 16 bits into order


@dataclass
class Switch:
    """What all layers of one adapter share: whether it acts, and (activated LoRA) on which positions."""

    on: bool = True
    active: Tensor | None = None  # [B, T] bool; None: everywhere


class LinearLora(nn.Module):
    """LoRA, or DoRA where there is a magnitude, on one linear layer."""

    A: nn.Parameter
    B: nn.Parameter
    magnitude: nn.Parameter | None

    def __init__(
        self, a: Tensor, b: Tensor, scale: float, dropout: float, switch: Switch, magnitude: Tensor | None = None
    ) -> None:
        super().__init__()
        self.A, self.B = nn.Parameter(a), nn.Parameter(b)
        self.magnitude = None if magnitude is None else nn.Parameter(magnitude)
        self.scale, self.dropout, self.switch = scale, dropout, switch
        self.prepared = Prepared()

    def through(self, linear: nn.Linear, x: Tensor) -> Tensor:
        """x [..., in] -> the layer's output with the adapter's part."""
        if x.dtype.itemsize == 2 and x.is_cpu and x.numel() <= FEW * x.shape[-1] and self._only_answers(linear):
            return self._few(linear, x)
        return self.add_to(linear, x, type(linear).forward(linear, x))

    def add_to(self, linear: nn.Linear, x: Tensor, y: Tensor) -> Tensor:
        """x [..., in] and the base's y [..., out] -> y plus the adapter's part; what only answers may be given back in y itself."""
        if self._only_answers(linear):
            return self._answer(x.reshape(-1, x.shape[-1]), y)
        rows = x.reshape(-1, x.shape[-1]).to(y.dtype)
        if self.dropout:
            rows = F.dropout(rows, self.dropout, linear.training)
        xa = F.linear(rows, self.A.to(y.dtype))
        if self.switch.active is not None:
            xa = xa * _rows_of(self.switch.active, xa).to(y.dtype)
        if self.magnitude is not None:
            return y + self._dora(linear, xa, y)
        flat = y.reshape(-1, y.shape[-1])
        return torch.addmm(flat, xa, self.B.to(y.dtype).t(), alpha=self.scale).view(y.shape)

    def _only_answers(self, linear: nn.Linear) -> bool:
        """Whether this is plain LoRA, and nothing of it is to be learnt."""
        if torch.is_grad_enabled() or self.magnitude is not None or self.switch.active is not None:
            return False
        a = self._parameters["A"]
        return a is not None and not a.requires_grad and not (self.dropout and linear.training)

    def _few(self, linear: nn.Linear, x: Tensor) -> Tensor:
        """Few rows of 16 bits on a CPU: the base's product is added to the adapter's part, which a pass more would cost."""
        rows = x.reshape(-1, x.shape[-1])
        a, b = self.prepared.turned("A", self.A, torch.float32), self.prepared.turned("B", self.B, torch.float32, self.scale)
        xa = torch.mm(rows.float(), a)
        weight = linear._parameters.get("weight")
        if weight is None or weight.dtype != x.dtype or type(linear) is not nn.Linear:
            y: Tensor = type(linear).forward(linear, x)
            return y.reshape(-1, y.shape[-1]).add_(torch.mm(xa, b).to(y.dtype)).view(y.shape)
        bias = linear._parameters["bias"]
        more = torch.mm(xa, b) if bias is None else torch.addmm(bias.float(), xa, b)
        return more.to(x.dtype).addmm_(rows, weight.t()).view(*x.shape[:-1], b.shape[1])

    def _answer(self, rows: Tensor, y: Tensor) -> Tensor:
        flat = y.reshape(-1, y.shape[-1])
        few = y.device.type == "cpu" and y.dtype.itemsize == 2 and len(rows) <= FEW
        dtype = torch.float32 if few else y.dtype
        a = self.prepared.turned("A", self.A, dtype)
        b = self.prepared.turned("B", self.B, dtype, self.scale)
        xa = torch.mm(rows.to(dtype), a)
        if few:
            flat.add_(torch.mm(xa, b).to(y.dtype))
        else:
            flat.addmm_(xa, b)
        return flat.view(y.shape)

    def _dora(self, linear: nn.Linear, xa: Tensor, y: Tensor) -> Tensor:
        """(m / |W + s B A| - 1) (W x) + m / |W + s B A| s B A x; the norm is held constant in the gradient, as DoRA does."""
        assert self.magnitude is not None
        ratio = (self.magnitude / self.norm(linear)).to(y.dtype)
        delta = F.linear(xa, self.B.to(y.dtype)).view(y.shape) * self.scale
        without_bias = y if linear.bias is None else y - linear.bias
        more = (ratio - 1) * without_bias
        if self.switch.active is not None:
            more = (more.reshape(-1, y.shape[-1]) * _rows_of(self.switch.active, xa).to(y.dtype)).view(y.shape)
        return more + ratio * delta

    @torch.no_grad()
    def norm(self, linear: nn.Linear) -> Tensor:
        """|W + s B A| per output [out], from |W|^2 + 2 s <W A^T, B> + s^2 <B A A^T, B>: W + s B A is never formed."""
        weight = dense_weight(linear)
        a, b = self.A.float(), self.B.float()
        cross = (weight @ a.to(weight.dtype).t()).float()
        square: Tensor = torch.linalg.vector_norm(weight, dim=1, dtype=torch.float32).square()
        square = square + 2 * self.scale * (cross * b).sum(1) + self.scale**2 * ((b @ (a @ a.t())) * b).sum(1)
        return square.clamp_min(0).sqrt()


def dense_weight(linear: nn.Module) -> Tensor:
    """The weight [out, in] of a linear layer, dequantised where it is kept in fewer bits."""
    weight: Any = linear.weight
    return cast(Tensor, weight if isinstance(weight, Tensor) else weight.dequantize(torch.float32))


def _rows_of(active: Tensor, rows: Tensor) -> Tensor:
    """active [B, T] as a column for rows [B*T, .]."""
    if active.numel() != rows.shape[0]:
        raise AssertionError(f"activated LoRA: {rows.shape[0]} rows reach a layer, but {active.numel()} positions are known")
    return active.reshape(-1, 1)


class ExpertLora(nn.Module):
    """LoRA on the stacks of one expert module, one pair of factors for each stack."""

    def __init__(self, switch: Switch) -> None:
        super().__init__()
        self.switch = switch
        self.scales: dict[str, float] = {}
        self._prepared = Prepared()

    def add(self, name: str, a: Tensor, b: Tensor, scale: float) -> None:
        """Adapt the stack `name` with A [E, r, in], B [E, out, r]."""
        self.register_parameter(f"{name}_A", nn.Parameter(a))
        self.register_parameter(f"{name}_B", nn.Parameter(b))
        self.scales[name] = scale

    def factors(self, name: str, dtype: torch.dtype | None = None) -> Factors | None:
        """What the kernel needs to compute in a dtype, or None where this stack is not adapted or the adapter is switched off."""
        if not self.switch.on or name not in self.scales:
            return None
        a, b = self.factors_of(name)
        if dtype is None or a.requires_grad or torch.is_grad_enabled():
            return Factors(a, b, self.scales[name])
        turned = (
            self._prepared.turned(f"{name}_A", a, dtype),
            self._prepared.turned(f"{name}_B", b, dtype, self.scales[name]),
        )
        return Factors(turned[0].transpose(-1, -2), turned[1].transpose(-1, -2), 1.0)

    def factors_of(self, name: str) -> tuple[nn.Parameter, nn.Parameter]:
        """A [E, r, in] and B [E, out, r] of one stack."""
        return getattr(self, f"{name}_A"), getattr(self, f"{name}_B")


def wrap(linear: nn.Linear, lora: LinearLora) -> None:
    """From now on the layer computes its own forward plus the adapter's part."""
    linear.add_module(LORA, lora)
    linear.forward = partial(_forward, linear)  # type: ignore[method-assign]


def unwrap(linear: nn.Linear) -> None:
    """The layer as it was."""
    del linear._modules[LORA]
    del linear.__dict__["forward"]


def _forward(linear: nn.Linear, x: Tensor) -> Tensor:
    lora = linear._modules[LORA]
    assert isinstance(lora, LinearLora)
    return lora.through(linear, x) if lora.switch.on else type(linear).forward(linear, x)
