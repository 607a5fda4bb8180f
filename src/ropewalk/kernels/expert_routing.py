"""Slots sorted by expert without anything read back to the host, and the tiles that products over the sorted rows are cut into (Triton).

A counting sort in two passes: blocks of slots count their experts, a running sum of the counts says where each block's share of each
expert begins, and every slot adds its rank among its block's. Equal experts keep their order, so that twice the same is the same.
Legend: T tokens, k experts per token, S = T*k slots and rows, E experts.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

SLOTS = 128  # of one program: each is compared with every other
EXPERTS = 64  # counted at a time


@dataclass(frozen=True)
class Routed:
    """Row i is slot `order[i]`, of token `token[i]`, and weighs `weight[i]`; slots that name no expert come last and are never read."""

    token: Tensor  # [S] int64
    weight: Tensor  # [S]
    order: Tensor  # [S] int64
    place: Tensor  # [S] int64: the row of each slot
    ends: Tensor  # [E] int32: where each expert's rows end
    k: int


@dataclass(frozen=True)
class Tiles:
    """Rows cut into tiles of at most `rows`, none of two experts; how many there are only the device knows."""

    expert: Tensor  # [most] int32
    start: Tensor  # [most] int32: the first row
    ends: Tensor  # [E] int32: where each expert's tiles end
    row_ends: Tensor  # [E] int32
    rows: int

    @property
    def most(self) -> int:
        """Tiles that there can be."""
        return self.expert.numel()


def route_sorted(ids: Tensor, weights: Tensor, num_experts: int) -> Routed:
    """ids [T, k], weights [T, k] -> rows sorted by expert."""
    slots, k = ids.numel(), ids.shape[1]
    ids, weight = ids.contiguous(), weights.detach().contiguous()
    blocks = triton.cdiv(slots, SLOTS)
    counts = torch.empty(num_experts + 1, blocks, dtype=torch.int32, device=ids.device)
    _count[(blocks,)](ids, counts, slots, blocks, num_experts, SLOTS=SLOTS, EXPERTS=EXPERTS)
    upto = counts.view(-1).cumsum(0)
    token, order, place = (torch.empty(slots, dtype=torch.int64, device=ids.device) for _ in range(3))
    row_weight = torch.empty(slots, dtype=weight.dtype, device=ids.device)
    _place[(blocks,)](ids, weight, counts, upto, token, row_weight, order, place, slots, blocks, num_experts, k, SLOTS=SLOTS)
    return Routed(token, row_weight, order, place, upto.view(num_experts + 1, blocks)[:-1, -1].to(torch.int32), k)


def route_sorted_plain(ids: Tensor, weights: Tensor, num_experts: int) -> Routed:
    """The plain twin of `route_sorted`."""
    flat = torch.where((ids < 0) | (ids >= num_experts), num_experts, ids).reshape(-1)
    ordered, order = torch.sort(flat, stable=True)
    place = torch.empty_like(order)
    place[order] = torch.arange(order.numel(), device=ids.device)
    ends = torch.searchsorted(ordered, torch.arange(num_experts, device=ids.device, dtype=ordered.dtype), right=True)
    k = ids.shape[1]
    return Routed(order // k, weights.detach().reshape(-1)[order], order, place, ends.to(torch.int32), k)


def cut(row_ends: Tensor, slots: int, rows: int) -> Tiles:
    """Tiles of `rows` rows over experts whose rows end at row_ends [E]."""
    num_experts = row_ends.numel()
    most = triton.cdiv(slots, rows) + min(num_experts, slots)
    expert, start = (torch.empty(most, dtype=torch.int32, device=row_ends.device) for _ in range(2))
    ends = torch.empty_like(row_ends)
    wide = triton.next_power_of_2(num_experts)
    _cut[(num_experts,)](row_ends, expert, start, ends, num_experts, ROWS=rows, WIDE=wide, AT_ONCE=128)
    return Tiles(expert, start, ends, row_ends, rows)


def cut_plain(row_ends: Tensor, slots: int, rows: int) -> Tiles:
    """The plain twin of `cut`; what lies past the last tile is -1 here and anything there."""
    counts = torch.diff(row_ends, prepend=row_ends.new_zeros(1)).tolist()
    expert, start, ends = [], [], []
    row = 0
    for e, count in enumerate(counts):
        for first in range(0, count, rows):
            expert.append(e)
            start.append(row + first)
        row += count
        ends.append(len(expert))
    unused = [-1] * (triton.cdiv(slots, rows) + min(len(counts), slots) - len(expert))
    lists = (expert + unused, start + unused, ends)
    of, begin, upto = (torch.tensor(v, dtype=torch.int32, device=row_ends.device) for v in lists)
    return Tiles(of, begin, upto, row_ends, rows)


@triton.jit
def _count(ids, counts, slots, blocks, num_experts, SLOTS: tl.constexpr, EXPERTS: tl.constexpr):
    block = tl.program_id(0)
    slot = block.to(tl.int64) * SLOTS + tl.arange(0, SLOTS)
    chosen = tl.load(ids + slot, mask=slot < slots, other=0)
    chosen = tl.where((chosen < 0) | (chosen >= num_experts), num_experts, chosen)
    chosen = tl.where(slot < slots, chosen, -1)
    for first in range(0, num_experts + 1, EXPERTS):
        expert = first + tl.arange(0, EXPERTS)
        found = tl.sum((chosen[:, None] == expert[None, :]).to(tl.int32), axis=0)
        tl.store(counts + expert.to(tl.int64) * blocks + block, found, mask=expert <= num_experts)


@triton.jit
def _place(ids, weight, counts, upto, token, row_weight, order, place, slots, blocks, num_experts, k, SLOTS: tl.constexpr):
    block = tl.program_id(0)
    here = tl.arange(0, SLOTS)
    slot = block.to(tl.int64) * SLOTS + here
    inside = slot < slots
    chosen = tl.load(ids + slot, mask=inside, other=0)
    chosen = tl.where((chosen < 0) | (chosen >= num_experts), num_experts, chosen)
    # the same experts read again, lying across: a program compares each slot with those before it
    across = tl.load(ids + slot[None, :] + tl.zeros([SLOTS, 1], tl.int64), mask=inside[None, :], other=0)
    across = tl.where((across < 0) | (across >= num_experts), num_experts, across)
    earlier = (across == chosen[:, None]) & (here[None, :] < here[:, None])
    rank = tl.sum(earlier.to(tl.int32), axis=1)
    share = chosen.to(tl.int64) * blocks + block
    first = tl.load(upto + share, mask=inside, other=0) - tl.load(counts + share, mask=inside, other=0)
    row = first + rank
    tl.store(token + row, slot // k, mask=inside)
    tl.store(order + row, slot, mask=inside)
    tl.store(place + slot, row, mask=inside)
    tl.store(row_weight + row, tl.load(weight + slot, mask=inside, other=0), mask=inside)


@triton.jit
def _cut(row_ends, expert, start, ends, num_experts, ROWS: tl.constexpr, WIDE: tl.constexpr, AT_ONCE: tl.constexpr):
    mine = tl.program_id(0)
    e = tl.arange(0, WIDE)
    end = tl.load(row_ends + e, mask=e < num_experts, other=0)
    begin = tl.load(row_ends + e - 1, mask=(e > 0) & (e < num_experts), other=0)
    tiles = (end - begin + ROWS - 1) // ROWS
    upto = tl.sum(tl.where(e <= mine, tiles, 0), axis=0)
    count = tl.sum(tl.where(e == mine, tiles, 0), axis=0)
    row = tl.sum(tl.where(e == mine, begin, 0), axis=0)
    tl.store(ends + mine, upto)
    for first in range(0, count, AT_ONCE):
        tile = first + tl.arange(0, AT_ONCE)
        tl.store(expert + upto - count + tile, mine + tl.zeros([AT_ONCE], tl.int32), mask=tile < count)
        tl.store(start + upto - count + tile, row + tile * ROWS, mask=tile < count)
