"""Queries or keys turned by their positions' angles, in one pass each way: nothing is kept but the cosines and sines.

    y1 = x1 * c1 - x2 * s1        y2 = x2 * c2 + x1 * s2        of a pair (x1, x2); what is beyond the pairs stays as it is

The gradient is the transposed turn, in the same roundings as autograd's own. `plain` is the twin of the kernel that runs on a GPU with
Triton (rotary_fused.py), and what runs anywhere else. Which places make a pair, and how it is rounded, is a `Form`.
Legend: B sequences, h heads, T tokens, D head width, r of it turned, p = r / 2 pairs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ropewalk.kernels.triton_kernels import refuse, usable

Pairs = Literal["halves", "neighbours", "parted"]  # i and i + p; 2i and 2i + 1; read as the latter and written as the former
Angles = Literal[
    "each", "first", "half"
]  # a cosine for every place, [r]; for each pair, in the first half of [r]; the same, [p]


@dataclass(frozen=True)
class Form:
    """What models disagree about."""

    pairs: Pairs = "halves"
    angles: Angles = "each"
    wide: bool = False  # computed in float32 and rounded once, not after each product

    def count(self, cos: Tensor) -> int:
        """p."""
        return int(cos.shape[-1]) // (1 if self.angles == "half" else 2)

    def near(self, *, back: bool) -> tuple[bool, bool]:
        """Whether pairs are neighbours where they are read, and where they are written."""
        read, written = self.pairs != "halves", self.pairs == "neighbours"
        return (written, read) if back else (read, written)


def rotary(x: Tensor, cos: Tensor, sin: Tensor, form: Form, axis: int = 1) -> Tensor:
    """x [B, h, T, D], cos and sin [B or 1, T, r or p] -> as x; `axis` says where the heads are: 1, or 2 of [B, T, h, D]."""
    out: Tensor = _Rotary.apply(x, cos, sin, form, axis)  # type: ignore[no-untyped-call]
    return out


def plain(x: Tensor, cos: Tensor, sin: Tensor, form: Form, axis: int = 1, *, back: bool = False) -> Tensor:
    """The twin; `back` turns a gradient."""
    count = form.count(cos)
    read, written = form.near(back=back)
    (c1, c2), (s1, s2) = (_angles(t.unsqueeze(axis), count, form) for t in (cos, sin))
    if back:
        s1, s2 = -s2, -s1
    c, s = _joined(c1, c2, near=read), _joined(s2, -s1, near=read)  # by which a place goes into itself, and into its other
    given = x[..., : 2 * count]
    if form.wide:
        given, c, s = given.float(), c.float(), s.float()
    # Whole heads are multiplied, since short rows cost more than the numbers in them.
    out = torch.empty_like(x) if read == written and given.dtype == x.dtype else None
    own = given * c if out is None else torch.mul(given, c, out=out[..., : 2 * count])
    crossed = given * s
    first, second = _pairs(own, count, read)
    to_second, to_first = _pairs(crossed, count, read)
    first.add_(to_first)
    second.add_(to_second)
    del crossed, to_first, to_second
    if out is None:
        out = torch.empty_like(x)
        for y, found in zip(_pairs(out[..., : 2 * count], count, written), (first, second)):
            y.copy_(found)
    if 2 * count < x.shape[-1]:
        out[..., 2 * count :] = x[..., 2 * count :]
    return out


def _pairs(x: Tensor, count: int, near: bool) -> tuple[Tensor, Tensor]:
    """The first and the second of every pair: views."""
    return (x[..., 0::2], x[..., 1::2]) if near else (x[..., :count], x[..., count:])


def _joined(first: Tensor, second: Tensor, near: bool) -> Tensor:
    """The way back."""
    return torch.stack((first, second), dim=-1).flatten(-2) if near else torch.cat((first, second), dim=-1)


def _angles(given: Tensor, count: int, form: Form) -> tuple[Tensor, Tensor]:
    if form.angles == "each":
        return _pairs(given, count, form.pairs != "halves")
    return given[..., :count], given[..., :count]


class _Rotary(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor, form: Form, axis: int) -> Tensor:
        ctx.save_for_backward(cos, sin)
        ctx.how = form, axis
        return _turn(x, cos, sin, form, axis, back=False)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None, None, None, None]:
        return _turn(upstream, *ctx.saved_tensors, *ctx.how, back=True), None, None, None, None


def _turn(x: Tensor, cos: Tensor, sin: Tensor, form: Form, axis: int, *, back: bool) -> Tensor:
    if usable(x.device):
        from ropewalk.kernels.rotary_fused import turn

        try:
            return turn(x, cos, sin, form, axis, back=back)
        except Exception as error:
            refuse(error)
    return plain(x, cos, sin, form, axis, back=back)
