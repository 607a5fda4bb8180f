"""Rows sorted by expert, each times its own expert's matrix, in one persistent Triton kernel: gather, LoRA and bias inside.

    y[i] = x[token[i]] @ w[e] + scale * xa[i] @ b[e] + weight[i] * bias[e]        e the expert of row i

X A^T is the same kernel with a narrow w, made once and kept for the backward, so that the LoRA part costs r more columns of the sum.
Backward products are the same with the stacks turned round by their strides. Sums are float32, indices of rows and experts 64 bits;
ranks and widths need not fill a block. torch's grouped_mm is a loop on the host outside SM90 and SM100.
Legend: S rows, E experts, K inputs, N outputs, r rank.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from ropewalk.kernels.expert_routing import Tiles

TURN = 8  # tiles of rows beside each other in time, so that they share what they read of a stack


@dataclass(frozen=True)
class Tiling:
    """How one product is cut: columns and depth of a tile (its rows are the tiles' own), and how a program runs."""

    columns: int
    depth: int
    warps: int
    stages: int


@dataclass(frozen=True)
class Lora:
    """What a product begins with: scale * xa @ b."""

    xa: Tensor  # [S, r]
    b: Tensor  # [E, r, N]
    scale: float


def rows_for(slots: int, num_experts: int, dtype: torch.dtype) -> int:
    """Rows of a tile: at most as many as an expert has on average, in powers of two that tensor cores know."""
    average = slots // num_experts
    if dtype.itemsize == 4:
        return 32 if average >= 32 else 16  # without tensor cores a larger one takes minutes to compile
    return 128 if average >= 96 else 64 if average >= 32 else 16


def tiling_for(device: torch.device, dtype: torch.dtype, rows: int, width: int) -> Tiling:
    """What fits the shared memory: 227 KB on SM90 and SM100, 163 KB on SM80, 99 KB on SM86, SM89 and SM120."""
    if device.type != "cuda":
        return Tiling(64, 64, 1, 1)
    narrow = max(16, triton.next_power_of_2(width))
    if dtype.itemsize == 4:
        return Tiling(min(32, narrow), 16, 4, 2)
    if narrow <= 64:
        return Tiling(narrow, 64, 4, 4)
    roomy = torch.cuda.get_device_capability(device)[0] in (9, 10)
    if roomy and rows == 128 and width >= 512:
        return Tiling(256, 64, 8, 3)  # (128 + 256) * 64 * 2 bytes * 3 = 147 KB
    return Tiling(128, 64, 8 if rows == 128 else 4, 3)  # (128 + 128) * 64 * 2 bytes * 3 = 98,304 bytes


def expert_gemm(
    x: Tensor,
    w: Tensor,
    tiles: Tiles,
    slots: int,
    *,
    token: Tensor | None = None,
    lora: Lora | None = None,
    bias: Tensor | None = None,
    weight: Tensor | None = None,
    first: int = 0,
    out: Tensor | None = None,
    tiling: Tiling | None = None,
) -> Tensor:
    """x [S, K] (or [T, K] with token [S]), w [E', K, N] of the experts from `first` on -> their rows of [S, N], the others as they are."""
    count, depth, width = w.shape
    y = torch.empty(slots, width, dtype=x.dtype, device=x.device) if out is None else out
    if slots == 0:
        return y
    how = tiling or tiling_for(x.device, x.dtype, tiles.rows, width)
    rank = 0 if lora is None else lora.xa.shape[1]
    xa, b = (x, w) if lora is None else (lora.xa, lora.b)
    most = tiles.most * triton.cdiv(width, how.columns)
    _gemm[(min(most, _programs(x.device)),)](
        x, w, y, tiles.expert, tiles.start, tiles.ends, tiles.row_ends,
        y if token is None else token, xa, b, y if bias is None else bias, y if weight is None else weight,
        0.0 if lora is None else lora.scale, first, first + count, depth, width, rank,
        x.stride(0), x.stride(1), w.stride(0), w.stride(1), w.stride(2), y.stride(0),
        xa.stride(0), b.stride(0), b.stride(1), b.stride(2), 0 if bias is None else bias.stride(0),
        GATHER=token is not None, LORA=lora is not None, BIAS=bias is not None, WEIGH=weight is not None,
        ROWS=tiles.rows, COLUMNS=how.columns, DEPTH=how.depth, RANK=max(16, triton.next_power_of_2(rank)), TURN=TURN,
        WHOLE=depth % how.depth == 0, EXACT=x.dtype == torch.float32, num_warps=how.warps, num_stages=how.stages,
    )  # fmt: skip
    return y


def expert_gemm_plain(
    x: Tensor,
    w: Tensor,
    row_ends: Tensor,
    slots: int,
    *,
    token: Tensor | None = None,
    lora: Lora | None = None,
    bias: Tensor | None = None,
    weight: Tensor | None = None,
    first: int = 0,
    out: Tensor | None = None,
) -> Tensor:
    """The plain twin of `expert_gemm`: expert by expert; rows of none are zero."""
    y = torch.zeros(slots, w.shape[2], dtype=x.dtype, device=x.device) if out is None else out
    rows = x if token is None else x[token]
    bounds = [0, *row_ends.tolist()]
    for e in range(first, first + w.shape[0]):
        span = slice(bounds[e], bounds[e + 1])
        y[span] = rows[span] @ w[e - first]
        if lora is not None:
            y[span] += lora.scale * (lora.xa[span] @ lora.b[e])
        if bias is not None:
            y[span] += bias[e] if weight is None else weight[span, None] * bias[e]
    return y


def _programs(device: torch.device) -> int:
    """As many as run at once, each of which takes one tile after another."""
    if device.type != "cuda":
        return 3
    return 2 * torch.cuda.get_device_properties(device).multi_processor_count


@triton.jit
def _gemm(
    x, w, y, tile_expert, tile_start, tile_ends, row_ends, token, xa, b, bias, weight,
    scale, first, last, K, N, rank, xs, xk, we, wk, wn, ys, xas, be, br, bn, bias_e,
    GATHER: tl.constexpr, LORA: tl.constexpr, BIAS: tl.constexpr, WEIGH: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, RANK: tl.constexpr, TURN: tl.constexpr,
    WHOLE: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    precision: tl.constexpr = "ieee" if EXACT else "tf32"
    begin = tl.load(tile_ends + first - 1, mask=first > 0, other=0)
    tall = tl.load(tile_ends + last - 1) - begin
    wide = tl.cdiv(N, COLUMNS)
    for job in range(tl.program_id(0), tall * wide, tl.num_programs(0)):
        turn = job // (TURN * wide)
        beside = tl.minimum(tall - turn * TURN, TURN)
        within = job % (TURN * wide)
        tile = begin + turn * TURN + within % beside
        e = tl.load(tile_expert + tile)
        end = tl.load(row_ends + e)
        row = (tl.load(tile_start + tile) + tl.arange(0, ROWS)).to(tl.int64)
        mine = row < end
        column = within // beside * COLUMNS + tl.arange(0, COLUMNS)
        inside = column < N
        if GATHER:
            source = tl.load(token + row, mask=mine, other=0)
        else:
            source = row
        k = tl.arange(0, DEPTH)
        # scalars move, blocks stay: a block of moving pointers would take twice the registers
        left, right = x, w + (e - first).to(tl.int64) * we
        left_at = source[:, None] * xs + k[None, :] * xk
        right_at = k[:, None] * wk + column[None, :] * wn
        if LORA:
            r = tl.arange(0, RANK)
            known = r < rank
            low = tl.load(xa + row[:, None] * xas + r[None, :], mask=mine[:, None] & known[None, :], other=0.0)
            up = b + e.to(tl.int64) * be + r[:, None] * br + column[None, :] * bn
            high = tl.load(up, mask=known[:, None] & inside[None, :], other=0.0)
            total = scale * tl.dot(low, high, input_precision=precision)  # first, as a second sum would take as many registers
        else:
            total = tl.zeros([ROWS, COLUMNS], tl.float32)
        for done in range(0, K, DEPTH):
            if WHOLE:
                here = tl.load(left + left_at, mask=mine[:, None], other=0.0)
                there = tl.load(right + right_at, mask=inside[None, :], other=0.0)
            else:
                rest = k < K - done
                here = tl.load(left + left_at, mask=mine[:, None] & rest[None, :], other=0.0)
                there = tl.load(right + right_at, mask=inside[None, :] & rest[:, None], other=0.0)
            total = tl.dot(here, there, total, input_precision=precision)
            left += DEPTH * xk
            right += DEPTH * wk
        if BIAS:
            added = tl.load(bias + e.to(tl.int64) * bias_e + column, mask=inside, other=0.0).to(tl.float32)
            if WEIGH:
                total += tl.load(weight + row, mask=mine, other=0.0).to(tl.float32)[:, None] * added[None, :]
            else:
                total += added[None, :]
        written = y + row[:, None] * ys + column[None, :]
        tl.store(written, total.to(y.dtype.element_ty), mask=mine[:, None] & inside[None, :])
