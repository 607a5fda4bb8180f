"""Frozen weights in the order in which a CPU's products read them, and products with them.

oneDNN computes in blocks. A product with a plain weight arranges the blocks anew each time, which is most of its cost where few rows
are multiplied: when a model decodes, or reads a question. Here they are arranged once, and the plain weight is let go.
`plain` is the twin. Legend: E experts (1 for a linear layer), n rows.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor, nn

from ropewalk.kernels.quant import QuantLinear

ROWS = 64  # for which the blocks are chosen: best for few rows, and no worse than plain for thousands


def pays(weight: Tensor) -> bool:
    """Whether products with this weight become faster, with few rows at least."""
    if weight.device.type != "cpu" or not torch._C._has_mkldnn:
        return False
    if weight.dtype == torch.float32:
        # A stack's rows are never filled up in float32, so that a kernel would be made for every number.
        return weight.ndim == 2
    return weight.dtype == torch.bfloat16 and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


class Blocked(nn.Module):
    """A weight [out, in], or a stack [E, out, in] (transposed: [E, in, out]); it cannot be trained."""

    requires_grad = False

    def __init__(self, shape: torch.Size, dtype: torch.dtype, transposed: bool, blocks: list[Any]) -> None:
        super().__init__()
        self.shape, self.dtype, self.transposed = shape, dtype, transposed
        self._blocks = blocks  # of each expert [out, in], in oneDNN's own order

    @classmethod
    def of(cls, weight: Tensor, transposed: bool = False) -> Self:
        """The same weight in blocks."""
        experts = weight.detach().reshape(-1, *weight.shape[-2:])
        arrange = torch.ops.mkldnn._reorder_linear_weight
        blocks = [arrange((expert.t() if transposed else expert).contiguous(), ROWS) for expert in experts]
        return cls(weight.shape, weight.dtype, transposed, blocks)

    def mm(self, x: Tensor, expert: int = 0, bias: Tensor | None = None) -> Tensor:
        """x [..., in] -> [..., out]."""
        y: Tensor = torch.ops.mkldnn._linear_pointwise(x, self._blocks[expert], bias, "none", [], "")
        return y

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """The plain weight."""
        experts = [block.to_dense().to(dtype) for block in self._blocks]
        return torch.stack([e.t() for e in experts] if self.transposed else experts).reshape(self.shape)

    @property
    def device(self) -> torch.device:
        return torch.device("cpu")

    @property
    def ndim(self) -> int:
        return len(self.shape)

    def numel(self) -> int:
        """How many weights there are."""
        return self.shape.numel()


@dataclass(frozen=True)
class Turned:
    """A stack as rows are multiplied with it: [E, in, out], whichever way it is stored."""

    blocked: Blocked

    @property
    def shape(self) -> tuple[int, int, int]:
        experts, first, second = self.blocked.shape
        return (experts, first, second) if self.blocked.transposed else (experts, second, first)

    def mm(self, rows: Tensor, expert: int) -> Tensor:
        """rows [n, in] -> [n, out]."""
        return self.blocked.mm(rows, expert)


class BlockedLinear(QuantLinear):
    """A frozen linear layer whose weight lies in blocks."""

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.weight.mm(x, bias=self.bias)
        return y


def plain(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """What `Blocked.of(weight).mm(x)` computes."""
    return torch.nn.functional.linear(x, weight, bias)
