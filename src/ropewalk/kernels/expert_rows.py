"""The rows of a routed batch, sorted by expert, and matrix products with each row's own expert.

Legend: T tokens, k experts per token, S = T*k routed rows, E experts, H hidden. Two kinds of rows share one interface:
`Tile`, some rows of one expert, so that on a CPU every matrix stays in the cache from its gather to its scatter, in buffers
used again by the next tile; `Grouped`, all rows at once, for `grouped_mm` on a GPU, without anything read back to the host.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from ropewalk.kernels.blocked import Turned
from ropewalk.kernels.expert_scratch import Stored

ROWS_PER_TILE = 512  # 512 rows of x, gate_up, h and y at H = 512, I = 256 in float32 are 4 MB: about one core's share of cache
STEP_16_BIT = 32  # oneDNN compiles a kernel for every new number of rows, so 16-bit tiles come in few sizes


@dataclass(frozen=True)
class Route:
    """Where every row comes from and goes: row i is of token `token[i]` and weighs `weight[i]`.

    Tiles are filled up with rows of weight 0, so rows are S or a few more; `place` says which row is slot `order[i]` of the T*k slots.
    Slots whose id is E or more come last in `order` and get no row: they are never read.
    """

    token: Tensor  # [rows] int64
    weight: Tensor  # [rows]
    order: Tensor  # [S] int64
    place: Tensor | None  # [rows without filling] int64; None: row i is slot order[i]
    ends: Tensor  # [E] int32: where each expert's rows end, filling included
    k: int
    counts: Tensor | None = (
        None  # [E], where rows are filled up and yet computed all at once: how many of each expert's are none of those
    )
    row: Tensor | None = None  # [S] int64: the row of each slot, where it is known

    @property
    def grouped(self) -> bool:
        return self.place is None

    def tiles(self) -> Iterator[tuple[int, int, int]]:
        """(expert, start, end) of every tile, read from the device each time: a checkpointed layer may have routed anew."""
        start = 0
        for expert, end in enumerate(self.ends.tolist()):
            for first in range(start, end, ROWS_PER_TILE):
                yield expert, first, min(first + ROWS_PER_TILE, end)
            start = end

    def to_slots(self, values: Tensor) -> Tensor:
        """values [rows] -> [T, k]; zero where a slot has no row."""
        if self.place is None:
            return torch.empty_like(values).index_copy_(0, self.order, values).view(-1, self.k)
        slots = values.new_zeros(self.order.numel())
        return slots.index_copy_(0, self.order[: self.place.numel()], values[self.place]).view(-1, self.k)


def route(ids: Tensor, weights: Tensor, num_experts: int, dtype: torch.dtype, grouped: bool) -> Route:
    """ids [T, k], weights [T, k] -> rows sorted by expert, to be computed in dtype."""
    k, weight = ids.shape[1], weights.detach().reshape(-1)
    ordered, order = torch.sort(ids.reshape(-1), stable=True)
    # searchsorted and not bincount: the latter reads its length back from the device
    ends = torch.searchsorted(ordered, torch.arange(num_experts, device=ids.device, dtype=ordered.dtype), right=True)
    if grouped:
        return Route(order // k, weight[order], order, None, ends.to(torch.int32), k)
    return _tiled(order, weight, ends, k, STEP_16_BIT if dtype.itemsize == 2 else 1)


def _tiled(order: Tensor, weight: Tensor, ends: Tensor, k: int, step: int) -> Route:
    count = torch.diff(ends, prepend=ends.new_zeros(1))
    filled = (count + step - 1) // step * step
    filled_ends = filled.cumsum(0)
    shift = (filled_ends - filled) - (ends - count)  # how far an expert's rows moved to make room for filling
    rows, used = int(filled_ends[-1]), order[: int(ends[-1])]
    place = torch.arange(used.numel(), device=order.device) + torch.repeat_interleave(shift, count)
    token = order.new_zeros(rows).index_copy_(0, place, used // k)
    row_weight = weight.new_zeros(rows).index_copy_(0, place, weight[used])
    return Route(token, row_weight, order, place, filled_ends.to(torch.int32), k)


class Rows(Protocol):
    """Some rows, and the products of their matrices [n, .] with the right expert's of a stack [E, ., .]."""

    span: slice

    def take(self, source: Tensor, token: Tensor, name: str) -> Tensor:
        """source [T, .] -> these rows of it [n, .]."""

    def space(self, name: str, width: int) -> Tensor | None:
        """Room for [n, width] that the next tile will overwrite, or None where a product makes its own."""

    def mm(self, a: Tensor, stack: Tensor | Turned | Stored, out: Tensor | None = None) -> Tensor:
        """a [n, i] with stack [E, i, o] -> [n, o]."""

    def mm_add_(self, y: Tensor, a: Tensor, stack: Tensor, scale: float) -> None:
        """y [n, o] += scale * a @ stack."""

    def gram_(self, grad: Tensor, a: Tensor, b: Tensor, scale: float) -> None:
        """grad [E, i, o] += scale * a^T b for a [n, i], b [n, o]; an expert without rows gets exactly nothing."""

    def bias_(self, y: Tensor, bias: Tensor, w: Tensor | None = None) -> None:
        """y [n, o] += w * bias, bias [E, o], w [n, 1]."""

    def bias_gram_(self, grad: Tensor, dy: Tensor, w: Tensor | None = None) -> None:
        """grad [E, o] += the sum of w * dy over each expert's rows."""

    def dot_bias(self, dy: Tensor, bias: Tensor) -> Tensor:
        """<dy, bias> of every row [n]."""


@dataclass
class Scratch:
    """Buffers that one tile leaves to the next: a fresh one each time would be paged in again and again."""

    dtype: torch.dtype
    device: torch.device
    buffers: dict[str, Tensor] = field(default_factory=dict)

    def rows(self, name: str, count: int, width: int) -> Tensor:
        """Room for [count, width]; what is in it is anybody's."""
        buffer = self.buffers.get(name)
        if buffer is None or buffer.shape[0] < count:
            buffer = self.buffers[name] = torch.empty(max(count, ROWS_PER_TILE), width, dtype=self.dtype, device=self.device)
        return buffer[:count]


class Tile:
    """Rows of one expert."""

    def __init__(self, expert: int, start: int, end: int, scratch: Scratch) -> None:
        self.expert, self.span, self.count, self.scratch = expert, slice(start, end), end - start, scratch

    def take(self, source: Tensor, token: Tensor, name: str) -> Tensor:
        return torch.index_select(source, 0, token, out=self.space(name, source.shape[1]))

    def space(self, name: str, width: int) -> Tensor:
        return self.scratch.rows(name, self.count, width)

    def mm(self, a: Tensor, stack: Tensor | Turned | Stored, out: Tensor | None = None) -> Tensor:
        if isinstance(stack, Turned):
            return stack.mm(a, self.expert, out)
        return torch.mm(a, stack[self.expert], out=out)

    def mm_add_(self, y: Tensor, a: Tensor, stack: Tensor, scale: float) -> None:
        y.addmm_(a, stack[self.expert], alpha=scale)

    def gram_(self, grad: Tensor, a: Tensor, b: Tensor, scale: float) -> None:
        grad[self.expert].addmm_(a.t(), b, alpha=scale)

    def bias_(self, y: Tensor, bias: Tensor, w: Tensor | None = None) -> None:
        row = bias[self.expert].to(y.dtype)
        y.add_(row) if w is None else y.addcmul_(w, row)

    def bias_gram_(self, grad: Tensor, dy: Tensor, w: Tensor | None = None) -> None:
        grad[self.expert].add_((dy if w is None else dy * w).sum(0))

    def dot_bias(self, dy: Tensor, bias: Tensor) -> Tensor:
        return dy @ bias[self.expert].to(dy.dtype)


class Grouped:
    """All rows, sorted by expert."""

    span = slice(None)

    def __init__(self, ends: Tensor, count: int) -> None:
        self.ends, self.count = ends, count

    @cached_property
    def expert(self) -> Tensor:
        """The expert of each row, for biases; rows that belong to none borrow the last one's and are dropped later."""
        row = torch.arange(self.count, device=self.ends.device, dtype=torch.int32)
        return torch.searchsorted(self.ends, row, right=True).clamp_(max=self.ends.numel() - 1)

    @cached_property
    def empty(self) -> Tensor:
        """The experts without rows [E, 1, 1]."""
        return (torch.diff(self.ends, prepend=self.ends.new_zeros(1)) == 0)[:, None, None]

    def take(self, source: Tensor, token: Tensor, name: str) -> Tensor:
        return source.index_select(0, token)

    def space(self, name: str, width: int) -> None:
        return None

    def mm(self, a: Tensor, stack: Tensor | Turned | Stored, out: Tensor | None = None) -> Tensor:
        assert isinstance(stack, Tensor), "blocks and weights of fewer bits are for tiles"
        return F.grouped_mm(a, stack, offs=self.ends)

    def mm_add_(self, y: Tensor, a: Tensor, stack: Tensor, scale: float) -> None:
        y.add_(F.grouped_mm(a, stack, offs=self.ends), alpha=scale)

    def gram_(self, grad: Tensor, a: Tensor, b: Tensor, scale: float) -> None:
        grad.add_(F.grouped_mm(a.t(), b, offs=self.ends).masked_fill_(self.empty, 0), alpha=scale)

    def bias_(self, y: Tensor, bias: Tensor, w: Tensor | None = None) -> None:
        row = bias.to(y.dtype)[self.expert]
        y.add_(row) if w is None else y.addcmul_(w, row)

    def bias_gram_(self, grad: Tensor, dy: Tensor, w: Tensor | None = None) -> None:
        # a running sum over the sorted rows, read at each expert's end: a fixed order, no atomics
        total = F.pad((dy if w is None else dy * w).to(torch.float64).cumsum(0), (0, 0, 1, 0))
        grad.add_(torch.diff(total[self.ends.long()], dim=0, prepend=total[:1]))

    def dot_bias(self, dy: Tensor, bias: Tensor) -> Tensor:
        return (dy * bias.to(dy.dtype)[self.expert]).sum(-1)


def all_rows(way: Route, like: Tensor) -> Iterator[Rows]:
    """Every row once, tile by tile or all together."""
    if way.grouped:
        yield Grouped(way.ends, way.order.numel())
        return
    scratch = Scratch(like.dtype, like.device)
    for expert, start, end in way.tiles():
        yield Tile(expert, start, end, scratch)


class Combine:
    """Adds rows [S, H] to their tokens [T, H], in float32 at least, in an order that does not depend on timing."""

    def __init__(self, way: Route, like: Tensor) -> None:
        self.way, self.like = way, like
        wide = torch.float64 if like.dtype == torch.float64 else torch.float32
        self.out = None if way.grouped or way.counts is not None else like.new_zeros(like.shape, dtype=wide)

    def add(self, rows: Rows, y: Tensor) -> None:
        """y [n, H] of these rows."""
        if self.out is not None:
            self.out.index_add_(0, self.way.token[rows.span], y.to(self.out.dtype))
            return
        back = torch.empty_like(self.way.order)
        back[self.way.order] = torch.arange(back.numel(), device=back.device) if self.way.place is None else self.way.place
        # embedding_bag reads each token's k rows where they lie and sums them in float32: no permuted copy of y, no atomics
        self.out = F.embedding_bag(back.view(-1, self.way.k), y, mode="sum")

    def result(self) -> Tensor:
        """[T, H] in the dtype of what came in."""
        assert self.out is not None
        return self.out.to(self.like.dtype)
