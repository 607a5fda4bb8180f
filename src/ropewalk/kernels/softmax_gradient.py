"""The log-probability of each row's label, and what -log p owes to the logits, written over them: two passes and no copy (Triton).

    logits = cap(scale * z) / temperature        d z = (softmax(logits) - onehot(label)) * d logits / d z

z is what a head gives, in 16 bits or 32; between reading and writing everything is float32. A row whose label is negative counts for
nothing. `softmax_gradient_plain` is the twin. Legend: c rows, V vocabulary.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

COLUMNS = 4096  # of one turn of a program, which has a row


def softmax_gradient(
    z: Tensor,
    targets: Tensor,
    softcap: float | None,
    scale: float,
    temperature: float,
    with_grad: bool,
    entropy: Tensor | None,
    columns: int = COLUMNS,
) -> Tensor:
    """z [c, V], targets [c] -> log p [c] float32; z is overwritten where its gradient is wanted, and `entropy` [c] where it is given."""
    rows, width = z.shape
    log_p = torch.empty(rows, dtype=torch.float32, device=z.device)
    if rows:
        assert z.stride(1) == 1
        _softmax_gradient[(rows,)](
            z, targets, log_p, log_p if entropy is None else entropy, width, z.stride(0), scale, softcap or 1.0, 1.0 / temperature,
            CAPPED=softcap is not None, GRADIENT=with_grad, ENTROPY=entropy is not None, COLUMNS=columns, num_warps=8,
        )  # fmt: skip
    return log_p


def softmax_gradient_plain(
    z: Tensor, targets: Tensor, softcap: float | None, scale: float, temperature: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The twin, by autograd -> log p, the gradient of -log p to z, and the entropy."""
    leaf = z.detach().float().requires_grad_()
    with torch.enable_grad():
        logits = leaf * scale if softcap is None else softcap * torch.tanh(leaf * scale / softcap)
        every = torch.log_softmax(logits / temperature, dim=-1)
        kept = targets >= 0
        log_p = torch.where(kept, every.gather(1, targets.clamp_min(0)[:, None])[:, 0], 0.0)
        (slope,) = torch.autograd.grad(-log_p.sum(), leaf)
    return log_p.detach(), slope, -(every.exp() * every).sum(-1).detach()


@triton.jit
def _capped(z, scale, softcap, rate, CAPPED: tl.constexpr):
    """-> the logits, and their slope at z."""
    scaled = z * scale
    if CAPPED:
        tanh = 1 - 2 / (tl.exp(2 * tl.minimum(scaled / softcap, 20.0)) + 1)  # beyond which it is 1
        value, slope = tanh * softcap * rate, (1 - tanh * tanh) * scale * rate
    else:
        value, slope = scaled * rate, scale * rate
    return value, slope


@triton.jit
def _softmax_gradient(
    z, targets, log_p, entropy, V, stride, scale, softcap, rate,
    CAPPED: tl.constexpr, GRADIENT: tl.constexpr, ENTROPY: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    z += row * stride
    label = tl.load(targets + row)
    kept = label >= 0
    column = tl.arange(0, COLUMNS)
    highest = -float("inf")
    total = 0.0
    weighed = 0.0
    for first in range(0, V, COLUMNS):
        inside = first + column < V
        value, _ = _capped(tl.load(z + first + column, mask=inside, other=0.0).to(tl.float32), scale, softcap, rate, CAPPED)
        value = tl.where(inside, value, -float("inf"))
        before = highest
        highest = tl.maximum(highest, tl.max(value, 0))
        shrunk = tl.exp(before - highest)
        weight = tl.exp(value - highest)
        total = total * shrunk + tl.sum(weight, 0)
        if ENTROPY:
            weighed = weighed * shrunk + tl.sum(weight * tl.where(weight > 0, value, 0.0), 0)
    whole = highest + tl.log(total)
    own, _ = _capped(tl.load(z + label, mask=kept, other=0.0).to(tl.float32), scale, softcap, rate, CAPPED)
    tl.store(log_p + row, tl.where(kept, own - whole, 0.0))
    if ENTROPY:
        tl.store(entropy + row, whole - weighed / total)
    if GRADIENT:
        for first in range(0, V, COLUMNS):
            inside = first + column < V
            raw = tl.load(z + first + column, mask=inside, other=0.0).to(tl.float32)
            value, slope = _capped(raw, scale, softcap, rate, CAPPED)
            found = (tl.exp(value - whole) - tl.where(first + column == label, 1.0, 0.0)) * slope
            tl.store(z + first + column, tl.where(kept, found, 0.0).to(z.dtype.element_ty), mask=inside)
