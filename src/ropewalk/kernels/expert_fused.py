"""An expert layer and its backward out of the Triton kernels: every pass over [S, .] is one that a product needs anyway.

    forward     X A1 (gathers) | gate_up (gathers, LoRA and bias inside) | w h and A2 h | y (LoRA and bias inside) | k rows to a token
    backward    dY B2 | dh | <dh, h>, w h, d gate_up, B1 d gate_up | four sums over each expert's rows | dx | k rows to a token

Stacks of 4 or 8 bits are dequantised some experts at a time, beside the product that reads those before. expert_lora.py decides when this runs, and keeps
what its other ways keep, so that one of them can go on where a kernel does not compile.
Legend: T tokens, k experts per token, S = T*k routed rows, E experts, H hidden, I expert intermediate, r rank.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ropewalk.kernels.dequantised import dequantised
from ropewalk.kernels.expert_combine import combine
from ropewalk.kernels.expert_gemm import Lora, expert_gemm, rows_for
from ropewalk.kernels.expert_glu import expert_glu, expert_glu_backward
from ropewalk.kernels.expert_gram import expert_gram
from ropewalk.kernels.expert_routing import Tiles, cut, route_sorted
from ropewalk.kernels.expert_rows import Route
from ropewalk.kernels.expert_scratch import some_at_a_time
from ropewalk.kernels.gates import ClampedGlu, Gate, Glu
from ropewalk.kernels.quant import Quantised


def knows(gate: Gate) -> bool:
    """Whether there is a kernel for this gate."""
    return isinstance(gate, Glu | ClampedGlu)


@dataclass(frozen=True)
class Layer:
    """Stacks as the model stores them, factors oriented for rows @ stack[e]."""

    up: Any  # [E, 2I, H], transposed [E, H, 2I]: a Tensor, or one kept in fewer bits
    up_bias: Tensor | None
    down: Any  # [E, H, I], transposed [E, I, H]
    down_bias: Tensor | None
    gate: Gate
    transposed: bool
    a1: Tensor | None  # [E, H, r]
    b1: Tensor | None  # [E, r, 2I]
    a2: Tensor | None  # [E, I, r]
    b2: Tensor | None  # [E, r, H]
    up_scale: float
    down_scale: float


def route_fused(ids: Tensor, weights: Tensor, num_experts: int) -> Route:
    """As expert_rows.route for grouped rows, with the row of each slot."""
    way = route_sorted(ids, weights, num_experts)
    return Route(way.token, way.weight, way.order, None, way.ends, way.k, row=way.place)


def forward(layer: Layer, x: Tensor, way: Route) -> tuple[Tensor, list[Tensor | None]]:
    """-> out [T, H] and, to keep, gate_up [S, 2I], X A1 [S, r], A2 (w h) [S, r]."""
    assert way.row is not None
    tiles = _tiles(way, x)
    gate_up, xa, h, ha = _until_down(layer, x.contiguous(), way, tiles)
    into = _lora(ha, layer.b2, layer.down_scale)
    how: dict[str, Any] = {"lora": into, "bias": layer.down_bias, "weight": way.weight}
    y = _product(h, layer.down, not layer.transposed, tiles, len(h), **how)
    return combine(y, way.row, way.ends, way.k), [gate_up, xa, ha]


def again(layer: Layer, x: Tensor, way: Route) -> list[Tensor | None]:
    """What the forward had to keep, computed again, the same to the bit."""
    gate_up, xa, _, ha = _until_down(layer, x.contiguous(), way, _tiles(way, x))
    return [gate_up, xa, ha]


def _until_down(layer: Layer, x: Tensor, way: Route, tiles: Tiles) -> tuple[Tensor, Tensor | None, Tensor, Tensor | None]:
    slots = way.token.numel()
    xa = None if layer.a1 is None else expert_gemm(x, layer.a1, tiles, slots, token=way.token)
    into = _lora(xa, layer.b1, layer.up_scale)
    gate_up = _product(x, layer.up, not layer.transposed, tiles, slots, token=way.token, lora=into, bias=layer.up_bias)
    return gate_up, xa, *expert_glu(gate_up, way.weight, layer.gate, tiles, layer.a2)


@dataclass
class Gradients:
    """What a backward found: None where nothing asked for it."""

    x: Tensor | None = None  # [T, H]
    weights: Tensor | None = None  # [S] float32, in the order of rows
    a1: Tensor | None = None  # [E, r, H] float32
    b1: Tensor | None = None  # [E, 2I, r]
    a2: Tensor | None = None  # [E, r, I]
    b2: Tensor | None = None  # [E, H, r]


def backward(layer: Layer, x: Tensor, way: Route, d_out: Tensor, kept: list[Tensor | None], wanted: set[str]) -> Gradients:
    """d_out [T, H] -> those of the gradients that are wanted, by their names in `Gradients`."""
    assert way.row is not None
    gate_up, xa, ha = kept
    assert gate_up is not None
    x, d_out, slots, tiles, found = x.contiguous(), d_out.contiguous(), way.token.numel(), _tiles(way, x), Gradients()
    db2 = None if layer.b2 is None else expert_gemm(d_out, layer.b2.transpose(1, 2), tiles, slots, token=way.token)
    into = _lora(db2, None if layer.a2 is None else layer.a2.transpose(1, 2), layer.down_scale)
    dh = _product(d_out, layer.down, layer.transposed, tiles, slots, token=way.token, lora=into)
    if "weights" in wanted:
        found.weights = torch.zeros(slots, dtype=torch.float32, device=x.device)
    h, d_gate_up, db1 = expert_glu_backward(gate_up, dh, way.weight, layer.gate, tiles, layer.b1, found.weights)
    if found.weights is not None and layer.down_bias is not None:
        found.weights += _biased(d_out, layer.down_bias, way)
    if "a2" in wanted and db2 is not None:
        found.a2 = expert_gram(db2, h, way.ends, layer.down_scale)
    if "b2" in wanted and ha is not None:  # A2 (w h) carries the weight
        found.b2 = expert_gram(ha, d_out, way.ends, layer.down_scale, turned=True, token=way.token)
    del h, dh  # the memory may serve dx
    if "b1" in wanted and xa is not None:
        found.b1 = expert_gram(xa, d_gate_up, way.ends, layer.up_scale, turned=True)
    if "a1" in wanted and db1 is not None:
        found.a1 = expert_gram(db1, x, way.ends, layer.up_scale, token=way.token)
    if "x" in wanted:
        into = _lora(db1, None if layer.a1 is None else layer.a1.transpose(1, 2), layer.up_scale)
        dx = _product(d_gate_up, layer.up, layer.transposed, tiles, slots, lora=into)
        found.x = combine(dx, way.row, way.ends, way.k)
    return found


def _tiles(way: Route, x: Tensor) -> Tiles:
    slots = way.token.numel()
    return cut(way.ends, slots, rows_for(slots, way.ends.numel(), x.dtype))


def _lora(low: Tensor | None, high: Tensor | None, scale: float) -> Lora | None:
    return None if low is None or high is None else Lora(low, high, scale)


def _product(x: Tensor, stack: Any, turned: bool, tiles: Tiles, slots: int, **how: Any) -> Tensor:
    """Rows of x times their experts' matrices of the stack, or of the stack turned round."""
    if not isinstance(stack, Quantised):
        dense = stack if isinstance(stack, Tensor) else stack.dequantize(x.dtype)
        return expert_gemm(x, _oriented(dense.to(x.dtype), turned), tiles, slots, **how)
    out = x.new_empty(slots, stack.shape[1] if turned else stack.shape[2])
    for first, some in some_at_a_time(stack, x.dtype, dequantised):
        expert_gemm(x, _oriented(some, turned), tiles, slots, first=first, out=out, **how)
    return out


def _oriented(stack: Tensor, turned: bool) -> Tensor:
    return stack.transpose(1, 2) if turned else stack


def _biased(d_out: Tensor, bias: Tensor, way: Route) -> Tensor:
    """<dy, bias> of every row [S]; zero behind the last expert's."""
    row = torch.arange(way.token.numel(), device=d_out.device, dtype=torch.int32)
    expert = torch.searchsorted(way.ends, row, right=True)
    products = d_out.float() @ bias.float().t()  # [T, E]
    found = products[way.token, expert.clamp(max=way.ends.numel() - 1)]
    return torch.where(expert < way.ends.numel(), found, 0.0)
