"""Rows back to their tokens: each token adds its k rows where they lie, in float32 and in the order of its slots, without atomics (Triton).

Weights are optional, since most rows come weighed. Slots whose row lies behind the last expert's are not read.
Legend: T tokens, k experts per token, S = T*k slots, H hidden.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


def combine(y: Tensor, place: Tensor, row_ends: Tensor, k: int, weight: Tensor | None = None) -> Tensor:
    """y [S, H], place [S]: the row of each slot, weight [S] of each row -> [T, H] in the dtype of y."""
    tokens, width = place.numel() // k, y.shape[1]
    out = torch.empty(tokens, width, dtype=y.dtype, device=y.device)
    if tokens == 0:
        return out
    columns = min(1024 if y.device.type == "cuda" else 32, triton.next_power_of_2(width))
    _combine[(tokens, triton.cdiv(width, columns))](
        y, place, row_ends, y if weight is None else weight, out, row_ends.numel(), width, y.stride(0),
        SLOTS=k, WEIGH=weight is not None, COLUMNS=columns, num_warps=4,
    )  # fmt: skip
    return out


def combine_plain(y: Tensor, place: Tensor, row_ends: Tensor, k: int, weight: Tensor | None = None) -> Tensor:
    """The plain twin of `combine`."""
    used = place < row_ends[-1]
    row = torch.where(used, place, 0)
    taken = torch.where(used[:, None], y[row].float(), 0.0)
    if weight is not None:
        taken = taken * torch.where(used, weight[row].float(), 0.0)[:, None]
    return taken.view(-1, k, y.shape[1]).sum(1).to(y.dtype)


@triton.jit
def _combine(
    y, place, row_ends, weight, out, num_experts, H, ys, SLOTS: tl.constexpr, WEIGH: tl.constexpr, COLUMNS: tl.constexpr
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = column < H
    end = tl.load(row_ends + num_experts - 1)
    total = tl.zeros([COLUMNS], tl.float32)
    for slot in range(SLOTS):
        row = tl.load(place + token * SLOTS + slot)
        used = inside & (row + tl.zeros([COLUMNS], tl.int64) < end)
        taken = tl.load(y + row * ys + column, mask=used, other=0.0).to(tl.float32)
        if WEIGH:
            taken = tl.where(used, taken * tl.load(weight + row).to(tl.float32), 0.0)
        total += taken
    tl.store(out + token * H + column, total.to(out.dtype.element_ty), mask=inside)
