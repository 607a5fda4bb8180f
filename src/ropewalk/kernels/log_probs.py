"""The log-probability of each row's label, straight from hidden states: the logits [N, V] never exist whole.

What a row's log-probability owes to its hidden state is taken in the forward pass, while its logits are at hand; backward scales it
row by row. Only a head that learns needs its logits once more. Legend: N rows, n rows with a label, c rows of one chunk, H hidden,
V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ropewalk.kernels.cross_entropy import IGNORED, accumulator, of_chunk, rows_at_once, whole_logits


def linear_log_probs(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    softcap: float | None = None,
    scale: float = 1.0,
    chunk: int = 2048,
) -> Tensor:
    """log p(label) of each row [N], 0 where the label is -100, over hidden [N, H], in float32 (float64 for float64 input).

    The logits are `cap(scale * (hidden @ weight.T + bias))`, weight [V, H], bias [V], `cap(z) = softcap * tanh(z / softcap)`.
    """
    rows = min(chunk, rows_at_once(weight.shape[0], on_gpu=hidden.device.type != "cpu"))
    found: Tensor = _LinearLogProbs.apply(hidden, weight, bias, labels, softcap, scale, rows, torch.is_grad_enabled())  # type: ignore[no-untyped-call]
    return found


def plain_linear_log_probs(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    softcap: float | None = None,
    scale: float = 1.0,
) -> Tensor:
    """The same values through whole logits and autograd: the twin that tests compare with."""
    return of_logits(whole_logits(hidden, weight, bias, softcap, scale), labels)


def of_logits(logits: Tensor, labels: Tensor) -> Tensor:
    """log p(label) of each row [N] from whole logits [N, V]; 0 where the label is -100."""
    return -torch.nn.functional.cross_entropy(logits, labels, ignore_index=IGNORED, reduction="none")


class _LinearLogProbs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        labels: Tensor,
        softcap: float | None,
        scale: float,
        chunk: int,
        with_grad: bool,
    ) -> Tensor:
        need_x, need_w, need_b = (with_grad and need for need in ctx.needs_input_grad[:3])
        rows = torch.nonzero(labels != IGNORED).squeeze(1)  # [n]
        found = hidden.new_zeros(len(labels), dtype=accumulator(hidden))
        grad_x = hidden.new_empty((len(rows), hidden.shape[1])) if need_x else None
        for start in range(0, len(rows), chunk):
            picked = rows[start : start + chunk]
            log_p, dz = of_chunk(_head(hidden[picked], weight, bias), labels[picked], softcap, scale, need_x)
            found[picked] = log_p
            if grad_x is not None and dz is not None:
                torch.mm(dz.to(hidden.dtype), weight, out=grad_x[start : start + chunk])
        again = need_w or need_b
        ctx.save_for_backward(rows, grad_x, *((hidden, weight, bias, labels) if again else (None,) * 4))
        ctx.shape, ctx.how, ctx.needs = hidden.shape, (softcap, scale, chunk), (need_w, need_b)
        return found

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        rows, grad_x, hidden, weight, bias, labels = ctx.saved_tensors
        d_hidden = d_weight = d_bias = None
        if grad_x is not None:
            d_hidden = grad_x.new_zeros(ctx.shape)
            d_hidden[rows] = (grad_x * -upstream[rows].unsqueeze(1)).to(grad_x.dtype)
        if any(ctx.needs):
            softcap, scale, chunk = ctx.how
            d_weight = torch.zeros_like(weight, dtype=upstream.dtype) if ctx.needs[0] else None
            d_bias = torch.zeros_like(bias, dtype=upstream.dtype) if ctx.needs[1] else None
            for start in range(0, len(rows), chunk):
                picked = rows[start : start + chunk]
                _, dz = of_chunk(_head(hidden[picked], weight, bias), labels[picked], softcap, scale, True)
                assert dz is not None
                dz = dz * -upstream[picked].unsqueeze(1)  # of log p, not of -log p
                if d_weight is not None:
                    d_weight += dz.to(hidden.dtype).T @ hidden[picked]
                if d_bias is not None:
                    d_bias += dz.sum(0)
            d_weight = None if d_weight is None else d_weight.to(weight.dtype)
            d_bias = None if d_bias is None else d_bias.to(bias.dtype)
        return d_hidden, d_weight, d_bias, None, None, None, None, None


def _head(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return torch.nn.functional.linear(x, weight, bias).to(accumulator(x))
