"""What stands between an expert's two projections, with the low-rank products of both sides in the same pass (Triton).

Forward: gate_up -> w h and A2 (w h).  Backward: gate_up and dh -> <dh, h>, w h (computed again, where dh was), d gate_up, B1 d gate_up.
So h is read once more by the down projection and by its factor's gradient, and nothing else of size [S, I] is made.
Everything between reading and writing is float32.
Legend: S rows, E experts, I intermediate, r rank.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ropewalk.kernels.expert_routing import Tiles
from ropewalk.kernels.gates import ClampedGlu, Gate, Glu

ACTIVATIONS = {"silu": 0, "gelu": 1, "gelu_tanh": 2}
CLAMPED = 3


def expert_glu(
    gate_up: Tensor, weight: Tensor | None, gate: Gate, tiles: Tiles, a: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """gate_up [S, 2I], weight [S], a [E, I, r] -> w h [S, I], (w h) a [S, r]."""
    slots, width = gate_up.shape[0], gate_up.shape[1] // 2
    h = torch.empty(slots, width, dtype=gate_up.dtype, device=gate_up.device)
    ha = None if a is None else torch.empty(slots, a.shape[2], dtype=gate_up.dtype, device=gate_up.device)
    if slots == 0:
        return h, ha
    rows, columns, warps = _cut(gate_up.device, tiles)
    _forward[(tiles.most * (tiles.rows // rows),)](
        gate_up, h if weight is None else weight, h, h if a is None else a, h if ha is None else ha,
        tiles.expert, tiles.start, tiles.ends, tiles.row_ends, *_numbers(gate), tiles.ends.numel(), width,
        0 if a is None else a.shape[2], gate_up.stride(0), *_strides(a),
        KIND=_kind(gate), STEP=2 if gate.interleaved else 1, ACROSS=1 if gate.interleaved else width,  # type: ignore[attr-defined]
        WEIGH=weight is not None, LORA=a is not None, TILE=tiles.rows, ROWS=rows, COLUMNS=columns, RANK=_rank(a),
        EXACT=gate_up.dtype == torch.float32, num_warps=warps,
    )  # fmt: skip
    return h, ha


def expert_glu_plain(
    gate_up: Tensor, weight: Tensor | None, gate: Gate, row_ends: Tensor, a: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """The plain twin of `expert_glu`."""
    h = gate.plain(gate_up)
    h = h if weight is None else h * weight[:, None]
    return h, None if a is None else torch.einsum("si,sir->sr", h, a[_experts(row_ends, len(h))])


def expert_glu_backward(
    gate_up: Tensor, dh: Tensor, weight: Tensor | None, gate: Gate, tiles: Tiles, b: Tensor | None, d_weight: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """dh [S, I] of the unweighed h (overwritten), b [E, r, 2I] -> w h [S, I], d gate_up [S, 2I], d gate_up b^T [S, r]; d_weight [S] filled."""
    slots, width = dh.shape
    d_gate_up = torch.empty_like(gate_up)
    db = None if b is None else torch.empty(slots, b.shape[1], dtype=dh.dtype, device=dh.device)
    if slots == 0:
        return dh, d_gate_up, db
    rows, columns, warps = _cut(dh.device, tiles)
    _backward[(tiles.most * (tiles.rows // rows),)](
        gate_up, dh, dh if weight is None else weight, d_gate_up, dh if d_weight is None else d_weight,
        dh if b is None else b, dh if db is None else db,
        tiles.expert, tiles.start, tiles.ends, tiles.row_ends, *_numbers(gate), tiles.ends.numel(), width,
        0 if b is None else b.shape[1], gate_up.stride(0), *_strides(b),
        KIND=_kind(gate), STEP=2 if gate.interleaved else 1, ACROSS=1 if gate.interleaved else width,  # type: ignore[attr-defined]
        WEIGH=weight is not None, LORA=b is not None, WANTED=d_weight is not None, TILE=tiles.rows, ROWS=rows,
        COLUMNS=columns, RANK=_rank(None if b is None else b.transpose(1, 2)), EXACT=dh.dtype == torch.float32, num_warps=warps,
    )  # fmt: skip
    return dh, d_gate_up, db


def expert_glu_backward_plain(
    gate_up: Tensor, dh: Tensor, weight: Tensor | None, gate: Gate, row_ends: Tensor, b: Tensor | None, d_weight: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The plain twin of `expert_glu_backward`, by autograd; dh is left as it is."""
    with torch.enable_grad():
        leaf = gate_up.detach().requires_grad_()
        h = gate.plain(leaf)
    w = 1 if weight is None else weight[:, None]
    (d_gate_up,) = torch.autograd.grad(h, leaf, dh * w)
    h = h.detach()
    if d_weight is not None:
        d_weight.copy_((dh * h).sum(-1))
    db = None if b is None else torch.einsum("sn,srn->sr", d_gate_up, b[_experts(row_ends, len(h))])
    return h * w, d_gate_up, db


def _experts(row_ends: Tensor, slots: int) -> Tensor:
    rows = torch.arange(slots, device=row_ends.device, dtype=row_ends.dtype)
    return torch.searchsorted(row_ends, rows, right=True).clamp_(max=row_ends.numel() - 1)


def _cut(device: torch.device, tiles: Tiles) -> tuple[int, int, int]:
    """Rows and columns of what a program holds at once, and its warps."""
    return (min(tiles.rows, 32), 64, 4) if device.type == "cuda" else (tiles.rows, 16, 1)


def _rank(factor: Tensor | None) -> int:
    return 16 if factor is None else max(16, triton.next_power_of_2(factor.shape[2]))


def _strides(factor: Tensor | None) -> tuple[int, ...]:
    return (0, 0, 0) if factor is None else factor.stride()


def _kind(gate: Gate) -> int:
    return ACTIVATIONS[gate.activation] if isinstance(gate, Glu) else CLAMPED


def _numbers(gate: Gate) -> tuple[float, float, float]:
    return (gate.limit, gate.alpha, gate.shift) if isinstance(gate, ClampedGlu) else (0.0, 1.0, 0.0)


@triton.jit
def _gated(g, u, limit, alpha, shift, KIND: tl.constexpr):
    """-> what multiplies what: h = first * second, and the slope of first at g."""
    if KIND == 0:
        sigmoid = tl.sigmoid(g)
        first = g * sigmoid
        slope = sigmoid * (1 + g - first)
        second = u
    elif KIND == 1:
        below = 0.5 * (1 + tl.erf(g * 0.7071067811865476))
        first = g * below
        slope = below + g * tl.exp(-0.5 * g * g) * 0.3989422804014327
        second = u
    elif KIND == 2:
        # tanh(z) = 2 sigmoid(2 z) - 1, so that 0.5 (1 + tanh(z)) = sigmoid(2 z)
        below = tl.sigmoid(1.5957691216057308 * (g + 0.044715 * g * g * g))
        first = g * below
        slope = below + first * (1 - below) * 1.5957691216057308 * (1 + 0.134145 * g * g)
        second = u
    else:
        held = tl.minimum(g, limit)
        sigmoid = tl.sigmoid(alpha * held)
        first = held * sigmoid
        slope = tl.where(g > limit, 0.0, sigmoid + alpha * first * (1 - sigmoid))
        second = tl.minimum(tl.maximum(u, -limit), limit) + shift
    return first, second, slope


@triton.jit
def _forward(
    gate_up, weight, h, a, ha, tile_expert, tile_start, tile_ends, row_ends, limit, alpha, shift,
    num_experts, I, rank, gs, ae, ai, ar,
    KIND: tl.constexpr, STEP: tl.constexpr, ACROSS: tl.constexpr, WEIGH: tl.constexpr, LORA: tl.constexpr,
    TILE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, RANK: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    tile = tl.program_id(0) // (TILE // ROWS)
    if tile < tl.load(tile_ends + num_experts - 1):
        e = tl.load(tile_expert + tile)
        row = tl.load(tile_start + tile) + tl.program_id(0) % (TILE // ROWS) * ROWS + tl.arange(0, ROWS)
        mine = row < tl.load(row_ends + e)
        row = row.to(tl.int64)
        r = tl.arange(0, RANK)
        low = tl.zeros([ROWS, RANK], tl.float32)
        if WEIGH:
            w = tl.load(weight + row, mask=mine, other=0.0).to(tl.float32)
        for done in range(0, I, COLUMNS):
            i = done + tl.arange(0, COLUMNS)
            here = mine[:, None] & (i < I)[None, :]
            g = tl.load(gate_up + row[:, None] * gs + i[None, :] * STEP, mask=here, other=0.0).to(tl.float32)
            u = tl.load(gate_up + row[:, None] * gs + i[None, :] * STEP + ACROSS, mask=here, other=0.0).to(tl.float32)
            first, second, _ = _gated(g, u, limit, alpha, shift, KIND)
            made = first * second
            if WEIGH:
                made = made * w[:, None]
            kept = made.to(h.dtype.element_ty)
            tl.store(h + row[:, None] * I + i[None, :], kept, mask=here)
            if LORA:
                known = (i < I)[:, None] & (r < rank)[None, :]
                factor = tl.load(a + e.to(tl.int64) * ae + i[:, None] * ai + r[None, :] * ar, mask=known, other=0.0)
                low = tl.dot(kept, factor, low, input_precision="ieee" if EXACT else "tf32")
        if LORA:
            tl.store(
                ha + row[:, None] * rank + r[None, :], low.to(ha.dtype.element_ty), mask=mine[:, None] & (r < rank)[None, :]
            )


@triton.jit
def _backward(
    gate_up, dh, weight, d_gate_up, d_weight, b, db, tile_expert, tile_start, tile_ends, row_ends, limit, alpha, shift,
    num_experts, I, rank, gs, be, br, bn,
    KIND: tl.constexpr, STEP: tl.constexpr, ACROSS: tl.constexpr, WEIGH: tl.constexpr, LORA: tl.constexpr,
    WANTED: tl.constexpr, TILE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, RANK: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    precision: tl.constexpr = "ieee" if EXACT else "tf32"
    tile = tl.program_id(0) // (TILE // ROWS)
    if tile < tl.load(tile_ends + num_experts - 1):
        e = tl.load(tile_expert + tile)
        row = tl.load(tile_start + tile) + tl.program_id(0) % (TILE // ROWS) * ROWS + tl.arange(0, ROWS)
        mine = row < tl.load(row_ends + e)
        row = row.to(tl.int64)
        r = tl.arange(0, RANK)
        low = tl.zeros([ROWS, RANK], tl.float32)
        routing = tl.zeros([ROWS], tl.float32)
        if WEIGH:
            w = tl.load(weight + row, mask=mine, other=0.0).to(tl.float32)
        for done in range(0, I, COLUMNS):
            i = done + tl.arange(0, COLUMNS)
            here = mine[:, None] & (i < I)[None, :]
            at = row[:, None] * gs + i[None, :] * STEP
            g = tl.load(gate_up + at, mask=here, other=0.0).to(tl.float32)
            u = tl.load(gate_up + at + ACROSS, mask=here, other=0.0).to(tl.float32)
            d = tl.load(dh + row[:, None] * I + i[None, :], mask=here, other=0.0).to(tl.float32)
            first, second, slope = _gated(g, u, limit, alpha, shift, KIND)
            made = first * second
            if WANTED:
                routing += tl.sum(d * made, axis=1)
            if WEIGH:
                made = made * w[:, None]
                d = d * w[:, None]
            d_gate = d * second * slope
            d_up = d * first
            if KIND == 3:
                d_up = tl.where(tl.abs(u) > limit, 0.0, d_up)
            d_gate = d_gate.to(d_gate_up.dtype.element_ty)
            d_up = d_up.to(d_gate_up.dtype.element_ty)
            tl.store(dh + row[:, None] * I + i[None, :], made.to(dh.dtype.element_ty), mask=here)
            tl.store(d_gate_up + at, d_gate, mask=here)
            tl.store(d_gate_up + at + ACROSS, d_up, mask=here)
            if LORA:
                known = (i < I)[:, None] & (r < rank)[None, :]
                factor = b + e.to(tl.int64) * be + i[:, None] * STEP * bn + r[None, :] * br
                low = tl.dot(d_gate, tl.load(factor, mask=known, other=0.0), low, input_precision=precision)
                low = tl.dot(d_up, tl.load(factor + ACROSS * bn, mask=known, other=0.0), low, input_precision=precision)
        if LORA:
            tl.store(
                db + row[:, None] * rank + r[None, :], low.to(db.dtype.element_ty), mask=mine[:, None] & (r < rank)[None, :]
            )
        if WANTED:
            tl.store(d_weight + row, routing, mask=mine)
