"""Frozen weights in the order in which a CPU's products read them, and products with them.

A product with few rows, when a model decodes or reads a question, costs what it takes to read the weight from memory, and a plain weight
is read badly: a kernel takes some columns of every row, which lie far apart, or puts them into blocks first, anew each time. Here that is
done once and the plain weight is let go. In float32 it lies in panels of a few columns, one after another, which memory streams; for many
rows, which compute more than they read, the plain weight is put together again. In 16 bits, or if it is large, it lies in oneDNN's blocks;
where the CPU does not compute in 16 bits, it stays as it is and each product widens it piece by piece: half the memory of float32.
`plain` is the twin. Legend: E experts (1 for a linear layer), n rows, P panels of W columns.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ropewalk.kernels.quant import QuantLinear

ROWS = 64  # for which oneDNN's blocks are chosen: best for few rows, and no worse than plain for thousands
PANEL = 32  # columns: 128 bytes of every row, which the next row's follow
LARGEST = 1 << 21  # weights of a layer; what is larger is read as well in oneDNN's blocks, and better by a single row
WIDENED = 1 << 19  # weights that are widened at once, and stay at hand while they are multiplied
FEW = 256  # rows beyond which it is quicker to put the plain weight together than to multiply panel by panel


def pays(weight: Tensor) -> bool:
    """Whether products with this weight become faster, with few rows at least."""
    if weight.device.type != "cpu" or not torch._C._has_mkldnn:
        return False
    if weight.dtype == torch.float32:
        return weight.ndim == 2 or all(size % PANEL == 0 for size in weight.shape[1:])
    return weight.dtype == torch.bfloat16 or (weight.dtype == torch.float16 and not _computes(weight.dtype))


def _computes(dtype: torch.dtype) -> bool:
    """Whether this CPU multiplies in 16 bits."""
    short = (
        torch.ops.mkldnn._is_mkldnn_bf16_supported if dtype == torch.bfloat16 else torch.ops.mkldnn._is_mkldnn_fp16_supported
    )
    return bool(short())


class Blocked(nn.Module, ABC):
    """A weight [out, in], or a stack [E, out, in] (transposed: [E, in, out]); it cannot be trained."""

    requires_grad = False

    def __init__(self, shape: torch.Size, dtype: torch.dtype, transposed: bool) -> None:
        super().__init__()
        self.shape, self.dtype, self.transposed = shape, dtype, transposed

    @staticmethod
    def of(weight: Tensor, transposed: bool = False) -> Blocked:
        """The same weight in blocks or panels."""
        rows, columns = weight.shape[-2:] if transposed else (weight.shape[-1], weight.shape[-2])
        small = columns % PANEL == 0 and rows * columns <= LARGEST
        kind: type[Blocks | Panels | Widened]
        if weight.dtype == torch.float32:
            kind = Panels if small or weight.ndim == 3 else Blocks
        else:
            kind = Blocks if _computes(weight.dtype) else Widened
        return kind.made(weight.detach(), transposed)

    @abstractmethod
    def mm(self, x: Tensor, expert: int = 0, bias: Tensor | None = None, out: Tensor | None = None) -> Tensor:
        """x [..., in] -> [..., out], written to `out` if there is one."""

    def mm_each(self, x: Tensor, sizes: list[int], out: Tensor) -> None:
        """The rows of every expert of x [N, in] into out [N, out]; sizes: so many, and so many that are nobody's, of each expert."""
        for expert, (rows, found) in enumerate(zip(torch.split(x, sizes)[::2], torch.split(out, sizes)[::2])):
            if len(rows):
                self.mm(rows, expert, out=found)

    @abstractmethod
    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """The plain weight."""

    @property
    def device(self) -> torch.device:
        return torch.device("cpu")

    @property
    def ndim(self) -> int:
        return len(self.shape)

    def numel(self) -> int:
        """How many weights there are."""
        return self.shape.numel()


class Blocks(Blocked):
    """In oneDNN's own order."""

    _blocks: list[Any]  # of each expert [out, in]

    @classmethod
    def made(cls, weight: Tensor, transposed: bool) -> Blocks:
        """Of a weight or a stack."""
        self = cls(weight.shape, weight.dtype, transposed)
        arrange = torch.ops.mkldnn._reorder_linear_weight
        experts = weight.reshape(-1, *weight.shape[-2:])
        self._blocks = [arrange((expert.t() if transposed else expert).contiguous(), ROWS) for expert in experts]
        return self

    def mm(self, x: Tensor, expert: int = 0, bias: Tensor | None = None, out: Tensor | None = None) -> Tensor:
        y: Tensor = torch.ops.mkldnn._linear_pointwise(x, self._blocks[expert], bias, "none", [], "")
        return y if out is None else out.copy_(y)

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        experts = [block.to_dense().to(dtype) for block in self._blocks]
        return torch.stack([e.t() for e in experts] if self.transposed else experts).reshape(self.shape)


class Panels(Blocked):
    """In panels of W columns: every expert [P, in, W]."""

    _panels: list[Tensor]

    @classmethod
    def made(cls, weight: Tensor, transposed: bool) -> Panels:
        """Of a weight or a stack."""
        self = cls(weight.shape, weight.dtype, transposed)
        experts = weight.reshape(-1, *weight.shape[-2:])
        self._panels = [(e if transposed else e.t()).unflatten(1, (-1, PANEL)).transpose(0, 1).contiguous() for e in experts]
        return self

    def mm(self, x: Tensor, expert: int = 0, bias: Tensor | None = None, out: Tensor | None = None) -> Tensor:
        panels, rows = self._panels[expert], x.reshape(-1, x.shape[-1])
        if len(rows) > FEW:
            y = torch.mm(rows, _columns(panels), out=out)
        else:
            y = torch.bmm(rows.expand(len(panels), -1, -1), panels).transpose(0, 1).flatten(1)  # [n, P, W]
            y = y if out is None else out.copy_(y)
        if bias is not None:
            y += bias
        return y.view(*x.shape[:-1], y.shape[-1])

    def mm_each(self, x: Tensor, sizes: list[int], out: Tensor) -> None:
        panels = len(self._panels[0])
        rows = torch.split(x.expand(panels, -1, -1), sizes, dim=1)[::2]
        found = torch.split(out.view(len(x), panels, -1).transpose(0, 1), sizes, dim=1)[::2]
        for size, taken, weight, its in zip(sizes[::2], rows, self._panels, found):
            if size:
                its.copy_(torch.bmm(taken, weight))

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        experts = torch.stack([_columns(panels) for panels in self._panels]).to(dtype)
        return (experts if self.transposed else experts.transpose(1, 2)).reshape(self.shape)


class Widened(Blocked):
    """In 16 bits as it was, for a CPU that computes in 32."""

    _experts: list[Tensor]  # of each [out, in]

    @classmethod
    def made(cls, weight: Tensor, transposed: bool) -> Widened:
        """Of a weight or a stack."""
        self = cls(weight.shape, weight.dtype, transposed)
        experts = weight.reshape(-1, *weight.shape[-2:])
        self._experts = [(expert.t() if transposed else expert).contiguous() for expert in experts]
        return self

    def mm(self, x: Tensor, expert: int = 0, bias: Tensor | None = None, out: Tensor | None = None) -> Tensor:
        weight, rows = self._experts[expert], x.reshape(-1, x.shape[-1])
        if len(rows) == 1:  # which torch reads well
            y = plain(rows, weight, bias)
        else:
            wide, step = rows.float(), max(1, WIDENED // weight.shape[1])
            y = torch.cat([torch.mm(wide, piece.float().t()) for piece in torch.split(weight, step)], dim=1)
            y = (y if bias is None else y.add_(bias)).to(x.dtype)
        y = y.view(*x.shape[:-1], y.shape[-1])
        return y if out is None else out.copy_(y)

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        experts = torch.stack(self._experts).to(dtype)
        return (experts.transpose(1, 2) if self.transposed else experts).reshape(self.shape)


def _columns(panels: Tensor) -> Tensor:
    """[P, in, W] -> [in, P * W]."""
    return panels.transpose(0, 1).flatten(1)


@dataclass(frozen=True)
class Turned:
    """A stack as rows are multiplied with it: [E, in, out], whichever way it is stored."""

    blocked: Blocked

    @property
    def shape(self) -> tuple[int, int, int]:
        experts, first, second = self.blocked.shape
        return (experts, first, second) if self.blocked.transposed else (experts, second, first)

    def mm(self, rows: Tensor, expert: int, out: Tensor | None = None) -> Tensor:
        """rows [n, in] -> [n, out]."""
        return self.blocked.mm(rows, expert, out=out)

    def mm_each(self, rows: Tensor, sizes: list[int], out: Tensor) -> None:
        """The rows of every expert of rows [N, in] into out [N, out]."""
        self.blocked.mm_each(rows, sizes, out)


class BlockedLinear(QuantLinear):
    """A frozen linear layer whose weight lies in blocks."""

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.weight.mm(x, bias=self.bias)
        return y


def plain(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """What `Blocked.of(weight).mm(x)` computes."""
    return torch.nn.functional.linear(x, weight, bias)
