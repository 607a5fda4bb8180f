"""Cross entropy straight from hidden states: the logits [N, V] never exist whole.

Rows without a label cost nothing. While a chunk's logits are at hand, the forward pass also takes their gradient, so that
backward only has to scale it. Legend: N rows, n rows with a label, c rows of one chunk, H hidden, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ropewalk.kernels.triton_kernels import refuse, usable

IGNORED = -100

# Most logits held at a time. A GPU wants a thousand rows and more per chunk to be bound by arithmetic, and where one kernel writes the
# gradient over the logits they are held once, in 16 bits; without it twice, in 16 and in 32. A CPU wants them in its cache.
LOGITS_IN_PLACE = 2**28
LOGITS_ON_GPU = 2**27
LOGITS_ON_CPU = 2**22
CHUNK = 2048  # rows, at most


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    softcap: float | None = None,
    scale: float = 1.0,
    chunk: int = CHUNK,
) -> Tensor:
    """The sum of -log p(label) over hidden [N, H] with labels [N] that are not -100, in float32 (float64 for float64 input).

    The logits are `cap(scale * (hidden @ weight.T + bias))`, weight [V, H], bias [V], `cap(z) = softcap * tanh(z / softcap)`.
    """
    rows = min(chunk, rows_on(hidden.device, weight.shape[0]))
    loss: Tensor = _LinearCrossEntropy.apply(hidden, weight, bias, labels, softcap, scale, rows, torch.is_grad_enabled())  # type: ignore[no-untyped-call]
    return loss


def rows_on(device: torch.device, vocabulary: int) -> int:
    """How many rows' logits are held at a time."""
    return rows_at_once(vocabulary, device.type != "cpu", usable(device))


def rows_at_once(vocabulary: int, on_gpu: bool, in_place: bool) -> int:
    """The same of a device that may not be there; in_place: Triton's kernels run."""
    return max(64, (LOGITS_IN_PLACE if in_place else LOGITS_ON_GPU if on_gpu else LOGITS_ON_CPU) // vocabulary)


def plain_linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    softcap: float | None = None,
    scale: float = 1.0,
) -> Tensor:
    """The same value through whole logits and autograd: the twin that tests compare with."""
    logits = whole_logits(hidden, weight, bias, softcap, scale)
    return torch.nn.functional.cross_entropy(logits, labels, ignore_index=IGNORED, reduction="sum")


def whole_logits(hidden: Tensor, weight: Tensor, bias: Tensor | None, softcap: float | None, scale: float) -> Tensor:
    """The logits [N, V] as they are defined, for the plain twins."""
    logits = torch.nn.functional.linear(hidden, weight, bias).to(accumulator(hidden)) * scale
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


def accumulator(hidden: Tensor) -> torch.dtype:
    """What sums are kept in."""
    return torch.float64 if hidden.dtype == torch.float64 else torch.float32


class _LinearCrossEntropy(torch.autograd.Function):
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
        wide = accumulator(hidden)
        need_x, need_w, need_b = (with_grad and need for need in ctx.needs_input_grad[:3])
        rows = torch.nonzero(labels != IGNORED).squeeze(1)  # [n]
        total = hidden.new_zeros((), dtype=wide)
        grad_x = hidden.new_empty((len(rows), hidden.shape[1])) if need_x else None
        grad_w = torch.zeros_like(weight, dtype=wide) if need_w else None
        grad_b = torch.zeros_like(bias, dtype=wide) if need_b and bias is not None else None
        for start in range(0, len(rows), chunk):
            picked = rows[start : start + chunk]
            x, targets = hidden[picked], labels[picked]
            log_p, dz = of_chunk(
                torch.nn.functional.linear(x, weight, bias), targets, softcap, scale, need_x or need_w or need_b
            )
            total -= log_p.sum()
            if dz is None:
                continue
            if grad_b is not None:
                grad_b += dz.sum(0, dtype=wide)
            dz = dz.to(hidden.dtype)
            if grad_x is not None:
                torch.mm(dz, weight, out=grad_x[start : start + chunk])
            if grad_w is not None:
                grad_w += dz.T @ x
            del dz  # or the next chunk's logits would be made beside this one's
        ctx.save_for_backward(rows, grad_x, grad_w, grad_b)
        ctx.hidden_shape, ctx.weight_dtype = hidden.shape, weight.dtype
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        rows, grad_x, grad_w, grad_b = ctx.saved_tensors
        d_hidden = d_weight = d_bias = None
        if grad_x is not None:
            d_hidden = grad_x.new_zeros(ctx.hidden_shape)
            d_hidden[rows] = grad_x * upstream.to(grad_x.dtype)
        if grad_w is not None:
            d_weight = (grad_w * upstream).to(ctx.weight_dtype)
        if grad_b is not None:
            d_bias = (grad_b * upstream).to(ctx.weight_dtype)
        return d_hidden, d_weight, d_bias, None, None, None, None, None


def of_chunk(
    z: Tensor,
    targets: Tensor,
    softcap: float | None,
    scale: float,
    with_grad: bool,
    *,
    temperature: float = 1.0,
    entropy: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """log p [c] of one chunk, and the gradients of -log p to the head's output z [c, V] before scale and cap, written over z or what is
    made of it.

    The temperature divides the logits that come out of scale and cap; into `entropy` [c], where given, goes that of each row.
    """
    if usable(z.device) and z.dtype != torch.float64:
        try:
            from ropewalk.kernels.softmax_gradient import softmax_gradient

            return softmax_gradient(z, targets, softcap, scale, temperature, with_grad, entropy), z if with_grad else None
        except Exception as error:
            refuse(error)
    z = z.to(accumulator(z))
    if softcap is None:
        scale /= temperature
    if scale != 1.0:
        z *= scale
    slope = None
    if softcap is not None:
        z.div_(softcap).tanh_()
        slope = (z * z).neg_().add_(1).div_(temperature) if with_grad else None
        z *= softcap / temperature
    at = targets.unsqueeze(1)
    found, total = _softmax_(z, at, entropy)
    if not with_grad:
        return found, None
    z /= total
    z.scatter_add_(1, at, z.new_full((1, 1), -1.0).expand(at.shape))
    if slope is not None:
        z *= slope
    if scale != 1.0:
        z *= scale
    return found, z


def _softmax_(z: Tensor, at: Tensor, entropy: Tensor | None) -> tuple[Tensor, Tensor]:
    """z [c, V] becomes the exponentials of the logits that it holds, with their sums [c, 1] -> log p at [c, 1], sums."""
    z -= z.amax(-1, keepdim=True)
    own = z.gather(1, at).squeeze(1)
    if entropy is None:
        total = z.exp_().sum(-1, keepdim=True)
        return own - total.squeeze(1).log(), total
    p = z.exp()
    total = p.sum(-1, keepdim=True)
    # of p = e / total with log p = z - log total; what is ruled out weighs nothing, however far it is
    z.clamp_(min=torch.finfo(z.dtype).min)
    torch.sub(total.squeeze(1).log(), torch.linalg.vecdot(p, z).div_(total.squeeze(1)), out=entropy)
    z.copy_(p)
    return own - total.squeeze(1).log(), total
