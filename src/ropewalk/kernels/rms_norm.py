"""A layer's norm that keeps its input and one number a row: what stands between is computed again in the backward pass.

    y = x / sqrt(mean(x^2) + eps) * w      in float32, in the order of roundings of whoever is replaced (`Form`)

`plain` is the definition, through autograd, which keeps the input in float32 besides. On a GPU with Triton both directions are compiled
to one pass each.
Legend: n rows, H columns.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ropewalk.kernels.triton_kernels import usable

log = logging.getLogger("ropewalk.kernels")


@dataclass(frozen=True)
class Form:
    """What models disagree about."""

    offset: float = 0.0  # added to the weight
    early: bool = True  # rounded to the input's type before it is multiplied by the weight, not after
    power: bool = False  # the root taken as a power of -0.5


def rms_norm(x: Tensor, weight: Tensor | None, eps: float, form: Form) -> Tensor:
    """x [..., H], weight [H], which is frozen -> [..., H]."""
    out: Tensor = _RmsNorm.apply(x, weight, eps, form)  # type: ignore[no-untyped-call]
    return out


def plain(x: Tensor, weight: Tensor | None, eps: float, form: Form) -> Tensor:
    """The twin."""
    return _forward(x, weight, eps, form)[0]


def _forward(x: Tensor, weight: Tensor | None, eps: float, form: Form) -> tuple[Tensor, Tensor]:
    """-> y, and 1 / rms [..., 1]."""
    wide = x.float()
    mean = wide.pow(2).mean(-1, keepdim=True) + eps
    rate = torch.pow(mean, -0.5) if form.power else torch.rsqrt(mean)
    normed = wide * rate
    if weight is None:
        return normed.to(x.dtype), rate
    if form.early:
        factor: Tensor = form.offset + weight if form.offset else weight
        y: Tensor = factor * normed.to(x.dtype)
        return y, rate
    wide_factor: Tensor = form.offset + weight.float() if form.offset else weight.float()
    return (normed * wide_factor).to(x.dtype), rate


def _backward(x: Tensor, weight: Tensor | None, rate: Tensor, upstream: Tensor, offset: float) -> Tensor:
    normed = x.float() * rate
    d = upstream.float()
    if weight is not None:
        d = d * (weight.float() + offset)
    slope: Tensor = ((d - normed * (d * normed).mean(-1, keepdim=True)) * rate).to(x.dtype)
    return slope


class _RmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor | None, eps: float, form: Form) -> Tensor:
        made: tuple[Tensor, Tensor] = _run(_forward, x, weight, eps, form)
        y, rate = made
        ctx.save_for_backward(x, weight, rate)
        ctx.offset = form.offset
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None, None, None]:
        x, weight, rate = ctx.saved_tensors
        slope: Tensor = _run(_backward, x, weight, rate, upstream, ctx.offset)
        return slope, None, None, None


_refused: list[Exception] = []


def _run(function: Callable[..., Any], x: Tensor, *given: Any) -> Any:
    """Compiled on a GPU, until that fails once."""
    if usable(x.device) and not _refused:
        try:
            return _compile(function)(x, *given)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            _refused.append(error)
            log.warning("norms are not compiled here: %s: %s", type(error).__name__, str(error).strip()[:500])
    return function(x, *given)


@functools.cache
def _compile(function: Callable[..., Any]) -> Callable[..., Any]:
    return torch.compile(function, dynamic=True)
