"""Weights of 4 or 8 bits as the compute sees them, some experts at a time into memory used again, in one pass (Triton).

Their layouts are those of quant.py; the plain twin is expert_scratch.dequantised_plain, which passes through float32 piece by piece.
Legend: E experts, n values of one expert.
"""

from __future__ import annotations

from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from ropewalk.kernels.quant import MAXIMA, FourBits, Int8, Quantised

VALUES = 1024  # of one program


def dequantised(stack: Quantised, first: int, count: int, out: Tensor) -> Tensor:
    """Experts first to first + count of the stack [E, N, K], written over the beginning of out [some, N, K]; a matrix is one expert."""
    rows, width = stack.shape[-2:]
    values = rows * width
    assert out.is_contiguous()
    assert out.shape[1:].numel() == values
    blocks = triton.cdiv(values, VALUES)
    codes = stack.codes
    if isinstance(stack, Int8):
        _int8[(blocks, count)](codes, stack.scales, out, first, values, width, rows, VALUES=VALUES)
    elif isinstance(stack, FourBits):
        double = stack.scales.dtype == torch.uint8
        offsets = stack.offsets if double else stack.scales
        _four_bits[(blocks, count)](
            codes, stack.scales, offsets, _levels(stack.levels, codes.device), out, first, values,
            codes.shape[1], stack.scales.shape[1], stack.scales.shape[1] // MAXIMA,
            DOUBLE=double, BLOCK=stack.block, MAXIMA=MAXIMA, VALUES=VALUES,
        )  # fmt: skip
    else:
        raise TypeError(f"no kernel reads {type(stack).__name__}")
    return out[:count]


@cache
def _levels(levels: tuple[float, ...], device: torch.device) -> Tensor:
    return torch.tensor(levels, device=device)


@triton.jit
def _int8(codes, scales, out, first, values, K, N, VALUES: tl.constexpr):
    made = tl.program_id(1).to(tl.int64)
    e = first + made
    value = tl.program_id(0) * VALUES + tl.arange(0, VALUES)
    inside = value < values
    code = tl.load(codes + e * values + value, mask=inside, other=0).to(tl.float32)
    scale = tl.load(scales + e * N + value // K, mask=inside, other=0.0)
    tl.store(out + made * values + value, (code * scale).to(out.dtype.element_ty), mask=inside)


@triton.jit
def _four_bits(
    codes, scales, offsets, levels, out, first, values, bytes_each, scales_each, groups_each,
    DOUBLE: tl.constexpr, BLOCK: tl.constexpr, MAXIMA: tl.constexpr, VALUES: tl.constexpr,
):  # fmt: skip
    made = tl.program_id(1).to(tl.int64)
    e = first + made
    value = tl.program_id(0) * VALUES + tl.arange(0, VALUES)
    inside = value < values
    pair = tl.load(codes + e * bytes_each + value // 2, mask=inside, other=0).to(tl.int32)
    level = tl.load(levels + tl.where(value % 2 == 0, pair >> 4, pair & 15))
    block = value // BLOCK
    largest = tl.load(scales + e * scales_each + block, mask=inside, other=0).to(tl.float32)
    if DOUBLE:
        group = offsets + (e * groups_each + block // MAXIMA) * 2
        low = tl.load(group, mask=inside, other=0.0)
        high = tl.load(group + 1, mask=inside, other=0.0)
        largest = low + largest / 255 * (high - low)
    tl.store(out + made * values + value, (level * largest).to(out.dtype.element_ty), mask=inside)
