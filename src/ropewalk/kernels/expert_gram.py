"""Gradients of low-rank factors: for each expert the sum over its rows of narrow^T wide, exactly zero where it has none (Triton).

The wide side may be gathered from the tokens. One program holds [r, some columns] of one expert and reads all its rows, in order.
Legend: S rows, T tokens, E experts, r rank, N columns of the wide side.
"""

from __future__ import annotations

from itertools import pairwise

import torch
import triton
import triton.language as tl
from torch import Tensor


def expert_gram(
    narrow: Tensor, wide: Tensor, row_ends: Tensor, scale: float, *, turned: bool = False, token: Tensor | None = None
) -> Tensor:
    """narrow [S, r], wide [S, N] (or [T, N] with token [S]) -> scale * narrow^T wide [E, r, N], or [E, N, r] if turned, in float32."""
    experts, rank, width = row_ends.numel(), narrow.shape[1], wide.shape[1]
    shape = (experts, width, rank) if turned else (experts, rank, width)
    out = torch.empty(shape, dtype=torch.float32, device=narrow.device)
    by_rank, by_column = (out.stride(2), out.stride(1)) if turned else (out.stride(1), out.stride(2))
    rank_block = max(16, triton.next_power_of_2(rank))
    rows, columns, warps = (64, 128 if rank_block <= 32 else 64, 4) if narrow.device.type == "cuda" else (32, 32, 1)
    _gram[(triton.cdiv(width, columns), experts)](
        narrow, wide, row_ends, row_ends if token is None else token, out, scale, rank, width,
        narrow.stride(0), wide.stride(0), out.stride(0), by_rank, by_column,
        GATHER=token is not None, ROWS=rows, COLUMNS=columns, RANK=rank_block, EXACT=narrow.dtype == torch.float32,
        num_warps=warps, num_stages=3,
    )  # fmt: skip
    return out


def expert_gram_plain(
    narrow: Tensor, wide: Tensor, row_ends: Tensor, scale: float, *, turned: bool = False, token: Tensor | None = None
) -> Tensor:
    """The plain twin of `expert_gram`."""
    rows, bounds = wide if token is None else wide[token], [0, *row_ends.tolist()]
    spans = [slice(*pair) for pair in pairwise(bounds)]
    out = torch.stack([scale * (narrow[s].float().T @ rows[s].float()) for s in spans])
    return out.transpose(1, 2).contiguous() if turned else out


@triton.jit
def _gram(
    narrow, wide, row_ends, token, out, scale, rank, N, ns, ws, oe, orr, on,
    GATHER: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, RANK: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    e = tl.program_id(1)
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    r = tl.arange(0, RANK)
    begin = tl.load(row_ends + e - 1, mask=e > 0, other=0)
    end = tl.load(row_ends + e)
    total = tl.zeros([RANK, COLUMNS], tl.float32)
    for done in range(begin, end, ROWS):
        row = (done + tl.arange(0, ROWS)).to(tl.int64)
        mine = row < end
        if GATHER:
            source = tl.load(token + row, mask=mine, other=0)
        else:
            source = row
        low = tl.load(narrow + row[None, :] * ns + r[:, None], mask=(r < rank)[:, None] & mine[None, :], other=0.0)
        high = tl.load(wide + source[:, None] * ws + column[None, :], mask=mine[:, None] & (column < N)[None, :], other=0.0)
        total = tl.dot(low, high, total, input_precision="ieee" if EXACT else "tf32")
    written = out + e.to(tl.int64) * oe + r[:, None] * orr + column[None, :] * on
    tl.store(written, scale * total, mask=(r < rank)[:, None] & (column < N)[None, :])
