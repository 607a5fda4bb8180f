"""The log-probability of each row's label, straight from hidden states: the logits [N, V] never exist whole.

What a row's log-probability owes to its hidden state is taken in the forward pass, while its logits are at hand; backward scales it
row by row. Only a head that learns needs its logits once more. Legend: N rows, n rows with a label, c rows of one chunk, H hidden,
V vocabulary.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import linear

from ropewalk.kernels.cross_entropy import CHUNK, IGNORED, accumulator, of_chunk, rows_on, whole_logits

_How = tuple[float | None, float, float, int]  # softcap, scale, temperature, rows of a chunk


class LogProbs(NamedTuple):
    """Of the labels, with a gradient, and the entropy of what each was drawn from, without one."""

    of_labels: Tensor  # [N]; 0 where the label is -100
    entropy: Tensor | None  # [N] in nats; 0 where the label is -100


def linear_log_probs(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    softcap: float | None = None,
    scale: float = 1.0,
    temperature: float = 1.0,
    chunk: int = CHUNK,
    entropy: bool = False,
) -> LogProbs:
    """log p(label) of each row [N], 0 where the label is -100, over hidden [N, H], in float32 (float64 for float64 input).

    The logits are `cap(scale * (hidden @ weight.T + bias)) / temperature`, weight [V, H], bias [V], `cap(z) = softcap * tanh(z / softcap)`.
    """
    rows = min(chunk, rows_on(hidden.device, weight.shape[0]))
    entropies = hidden.new_zeros(len(labels), dtype=accumulator(hidden)) if entropy else None
    how = softcap, scale, temperature, rows
    found = _LinearLogProbs.apply(hidden, weight, bias, labels, how, entropies, torch.is_grad_enabled())  # type: ignore[no-untyped-call]
    return LogProbs(found, entropies)


def plain_linear_log_probs(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    softcap: float | None = None,
    scale: float = 1.0,
    temperature: float = 1.0,
    entropy: bool = False,
) -> LogProbs:
    """The same values through whole logits and autograd: the twin that tests compare with."""
    return of_logits(whole_logits(hidden, weight, bias, softcap, scale) / temperature, labels, entropy=entropy)


def of_logits(logits: Tensor, labels: Tensor, *, entropy: bool = False) -> LogProbs:
    """log p(label) of each row [N] from whole logits [N, V]; 0 where the label is -100."""
    found = -torch.nn.functional.cross_entropy(logits, labels, ignore_index=IGNORED, reduction="none")
    if not entropy:
        return LogProbs(found, None)
    with torch.no_grad():
        log_p = torch.log_softmax(logits, dim=-1).clamp(min=torch.finfo(logits.dtype).min)
        return LogProbs(found, torch.where(labels != IGNORED, -torch.linalg.vecdot(log_p.exp(), log_p), 0.0))


class _LinearLogProbs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        labels: Tensor,
        how: _How,
        entropies: Tensor | None,
        with_grad: bool,
    ) -> Tensor:
        softcap, scale, temperature, chunk = how
        need_x, need_w, need_b = (with_grad and need for need in ctx.needs_input_grad[:3])
        rows = torch.nonzero(labels != IGNORED).squeeze(1)  # [n]
        found = hidden.new_zeros(len(labels), dtype=accumulator(hidden))
        grad_x = hidden.new_empty((len(rows), hidden.shape[1])) if need_x else None
        for start in range(0, len(rows), chunk):
            picked = rows[start : start + chunk]
            part = None if entropies is None else found.new_empty(len(picked))
            log_p, dz = of_chunk(
                linear(hidden[picked], weight, bias),
                labels[picked],
                softcap,
                scale,
                need_x,
                temperature=temperature,
                entropy=part,
            )
            found[picked] = log_p
            if entropies is not None and part is not None:
                entropies[picked] = part
            if grad_x is not None and dz is not None:
                torch.mm(dz.to(hidden.dtype), weight, out=grad_x[start : start + chunk])
            del dz  # or the next chunk's logits would be made beside this one's
        again = need_w or need_b
        ctx.save_for_backward(rows, grad_x, *((hidden, weight, bias, labels) if again else (None,) * 4))
        ctx.shape, ctx.how, ctx.needs = hidden.shape, how, (need_w, need_b)
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
            softcap, scale, temperature, chunk = ctx.how
            d_weight = torch.zeros_like(weight, dtype=upstream.dtype) if ctx.needs[0] else None
            d_bias = torch.zeros_like(bias, dtype=upstream.dtype) if ctx.needs[1] else None
            for start in range(0, len(rows), chunk):
                picked = rows[start : start + chunk]
                _, dz = of_chunk(
                    linear(hidden[picked], weight, bias), labels[picked], softcap, scale, True, temperature=temperature
                )
                assert dz is not None
                dz *= -upstream[picked].unsqueeze(1)  # of log p, not of -log p
                if d_weight is not None:
                    d_weight += dz.to(hidden.dtype).T @ hidden[picked]
                if d_bias is not None:
                    d_bias += dz.sum(0, dtype=d_bias.dtype)
                del dz
            d_weight = None if d_weight is None else d_weight.to(weight.dtype)
            d_bias = None if d_bias is None else d_bias.to(bias.dtype)
        return d_hidden, d_weight, d_bias, None, None, None, None
