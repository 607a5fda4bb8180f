"""Queries or keys turned by their positions' angles in one kernel (Triton), which reads and writes every number once.

To the bit what `plain` in rotary.py gives, its twin: products are rounded where that rounds them, and never fused with a sum.
Legend: B sequences, h heads, T tokens, D head width, p pairs of it turned.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor, empty_like

from ropewalk.kernels.rotary import Form

NUMBERS = 2048  # pairs of one program, which has a token and as many of its heads


def turn(x: Tensor, cos: Tensor, sin: Tensor, form: Form, axis: int, *, back: bool) -> Tensor:
    """As `plain`."""
    out, count, (read, written) = empty_like(x), form.count(cos), form.near(back=back)
    heads, tokens = (x.shape[axis], x.shape[3 - axis])
    wide = triton.next_power_of_2(count)
    some = min(triton.next_power_of_2(heads), max(1, NUMBERS // wide))
    left = x.shape[3] - 2 * count
    if x.numel():
        _turn[(len(x) * tokens, triton.cdiv(heads, some))](
            x, out, cos, sin, tokens, heads, count, left,
            *_strides(x, axis), *_strides(out, axis), *_angle_strides(cos, len(x)), *_angle_strides(sin, len(x)),
            READ_NEAR=read, WRITE_NEAR=written, EACH=form.angles == "each", ANGLES_NEAR=form.pairs != "halves",
            BACK=back, WIDE=form.wide, HEADS=some, PAIRS=wide, LEFT=triton.next_power_of_2(left) if left else 0,
            enable_fp_fusion=False,
        )  # fmt: skip
    return out


def _strides(x: Tensor, axis: int) -> tuple[int, ...]:
    """Of sequences, tokens, heads, and places."""
    return x.stride(0), x.stride(3 - axis), x.stride(axis), x.stride(3)


def _angle_strides(angles: Tensor, sequences: int) -> tuple[int, ...]:
    """The same angles for every sequence are read again for each."""
    return 0 if len(angles) == 1 and sequences > 1 else angles.stride(0), angles.stride(1), angles.stride(2)


@triton.jit
def _turn(
    x, out, cos, sin, T, h, p, left,
    xb, xt, xh, xd, yb, yt, yh, yd, cb, ct, cd, sb, st, sd,
    READ_NEAR: tl.constexpr, WRITE_NEAR: tl.constexpr, EACH: tl.constexpr, ANGLES_NEAR: tl.constexpr,
    BACK: tl.constexpr, WIDE: tl.constexpr, HEADS: tl.constexpr, PAIRS: tl.constexpr, LEFT: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    b, t = row // T, row % T
    cos += b * cb + t * ct
    sin += b * sb + t * st
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    x += b * xb + t * xt + head.to(tl.int64)[:, None] * xh
    out += b * yb + t * yt + head.to(tl.int64)[:, None] * yh
    i = tl.arange(0, PAIRS)
    inside = i < p
    if EACH and ANGLES_NEAR:
        first, second = 2 * i, 2 * i + 1
    elif EACH:
        first, second = i, i + p
    else:
        first, second = i, i
    c1 = tl.load(cos + first * cd, mask=inside, other=0.0).to(tl.float32)[None, :]
    c2 = tl.load(cos + second * cd, mask=inside, other=0.0).to(tl.float32)[None, :]
    s1 = tl.load(sin + first * sd, mask=inside, other=0.0).to(tl.float32)[None, :]
    s2 = tl.load(sin + second * sd, mask=inside, other=0.0).to(tl.float32)[None, :]
    if BACK:
        s1, s2 = -s2, -s1
    if READ_NEAR:
        first, second = 2 * i, 2 * i + 1
    else:
        first, second = i, i + p
    kept = (head < h)[:, None] & inside[None, :]
    x1 = tl.load(x + (first * xd)[None, :], mask=kept, other=0.0).to(tl.float32)
    x2 = tl.load(x + (second * xd)[None, :], mask=kept, other=0.0).to(tl.float32)
    kind = out.dtype.element_ty
    if WIDE:
        y1 = x1 * c1 - x2 * s1
        y2 = x2 * c2 + x1 * s2
    else:
        y1 = (x1 * c1).to(kind).to(tl.float32) - (x2 * s1).to(kind).to(tl.float32)
        y2 = (x2 * c2).to(kind).to(tl.float32) + (x1 * s2).to(kind).to(tl.float32)
    if WRITE_NEAR:
        first, second = 2 * i, 2 * i + 1
    else:
        first, second = i, i + p
    tl.store(out + (first * yd)[None, :], y1.to(kind), mask=kept)
    tl.store(out + (second * yd)[None, :], y2.to(kind), mask=kept)
    if LEFT > 0:
        place = tl.arange(0, LEFT)
        kept = (head < h)[:, None] & (place < left)[None, :]
        beyond = 2 * p + place
        tl.store(out + (beyond * yd)[None, :], tl.load(x + (beyond * xd)[None, :], mask=kept), mask=kept)
