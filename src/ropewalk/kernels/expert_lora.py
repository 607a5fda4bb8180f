"""The experts of a mixture-of-experts layer and their LoRA, together, with a hand-written backward.

Legend: T tokens, k experts per token, S = T*k routed rows, E experts, H hidden, I expert intermediate, r rank.
For a row of expert e with routing weight w, and with the factors' product never formed:

    gate_up = W1 x + s1 B1 (A1 x)        h = gate(gate_up)        out += W2 (w h) + s2 B2 (A2 (w h))

Kept for the backward: gate_up [S, 2I], A1 x and A2 (w h) [S, r], the order of the rows and their weights. Nothing of size [S, H]
survives the forward: rows of x are gathered again, h is computed again from gate_up, and the routing gradient is <dh, h>.
Weighing h instead of the output takes the weights out of every [S, H] pass.

One text of the mathematics runs on two kinds of rows. `_Tile` holds some rows of one expert, so that on a CPU every matrix stays in
the cache from its gather to its scatter; `_Grouped` holds all rows, sorted by expert, for `grouped_mm` on a GPU, without a host sync.
`expert_lora_plain` is the twin: a loop over experts with the explicit delta, differentiated by autograd.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from ropewalk.kernels.gates import Gate

ROWS_PER_TILE = 512  # 512 rows of x, gate_up, h and y at H = 512, I = 256 in float32 are 4 MB: about one core's share of cache


class Packed(Protocol):
    """A weight stack kept in fewer bits: [E, N, K] (or [E, K, N]) when dequantised."""

    shape: Any

    def dequantize(self, dtype: torch.dtype) -> Tensor: ...


Stack = Tensor | Packed


@dataclass(frozen=True)
class Factors:
    """LoRA on one stack of experts: delta of expert e = scale * B[e] @ A[e]."""

    A: Tensor  # [E, r, in]
    B: Tensor  # [E, out, r]
    scale: float


@dataclass(frozen=True)
class Experts:
    """The frozen (or trained) part of an expert layer, as the model stores it."""

    up: Stack  # [E, 2I, H], without a gate [E, I, H]; transposed [E, H, 2I]
    down: Stack  # [E, H, I]; transposed [E, I, H]
    gate: Gate
    up_bias: Tensor | None = None  # [E, 2I]
    down_bias: Tensor | None = None  # [E, H]
    transposed: bool = False
    post_norm: Callable[[Tensor], Tensor] | None = None  # applied to each row's output before it is weighed
    post_norm_parameters: Sequence[Tensor] = field(default=())


def expert_lora(
    x: Tensor,
    ids: Tensor,
    weights: Tensor,
    experts: Experts,
    up: Factors | None = None,
    down: Factors | None = None,
    *,
    rows: str | None = None,
) -> Tensor:
    """x [T, H], ids [T, k] below E, weights [T, k] -> [T, H]; `rows` forces "tiles" or "grouped" where tests want one of them."""
    rows = rows or _rows_for(x, experts)
    a1, b1, s1 = (up.A, up.B, up.scale) if up else (None, None, 0.0)
    a2, b2, s2 = (down.A, down.B, down.scale) if down else (None, None, 0.0)
    trained = (*experts.gate.parameters, *experts.post_norm_parameters)
    plan = _Plan(experts, s1, s2, rows == "grouped")
    given = (x, ids, weights, experts.up, experts.up_bias, experts.down, experts.down_bias, a1, b1, a2, b2, *trained)
    if torch.is_grad_enabled() and any(isinstance(t, Tensor) and t.requires_grad for t in given):
        return cast(Tensor, _ExpertLora.apply(plan, *given))  # type: ignore[no-untyped-call]
    return _forward(
        plan,
        _Operands.of(plan, x, experts.up, experts.up_bias, experts.down, experts.down_bias, a1, b1, a2, b2),
        x,
        _route(ids, weights, plan.num_experts, plan.grouped),
        keep=False,
    )[0]


def expert_lora_plain(
    x: Tensor, ids: Tensor, weights: Tensor, experts: Experts, up: Factors | None = None, down: Factors | None = None
) -> Tensor:
    """The plain twin of `expert_lora`: expert by expert with W + scale * B A written out, and torch's own autograd."""
    out = torch.zeros_like(x)
    w1, w2 = _dense(experts.up, x.dtype), _dense(experts.down, x.dtype)
    for e in range(w1.shape[0]):
        token, slot = torch.where(ids == e)
        first, second = (w1[e].t(), w2[e].t()) if experts.transposed else (w1[e], w2[e])
        if up is not None:
            first = first + up.scale * (up.B[e] @ up.A[e]).to(x.dtype)
        if down is not None:
            second = second + down.scale * (down.B[e] @ down.A[e]).to(x.dtype)
        h = experts.gate.plain(F.linear(x[token], first, None if experts.up_bias is None else experts.up_bias[e]))
        y = F.linear(h, second, None if experts.down_bias is None else experts.down_bias[e])
        y = experts.post_norm(y) if experts.post_norm is not None else y
        out = out.index_add(0, token, (y * weights[token, slot, None]).to(x.dtype))
    return out


# ---------------------------------------------------------------- what runs, over what, and on which rows


@dataclass(frozen=True)
class _Plan:
    """What does not change between the forward and the backward of one call."""

    experts: Experts
    up_scale: float
    down_scale: float
    grouped: bool

    @property
    def num_experts(self) -> int:
        return int(self.experts.up.shape[0])


@dataclass(frozen=True)
class _Operands:
    """Every stack oriented for rows @ stack[e]: up [E, H, N], down [E, I, H], a [E, in, r], b [E, r, out]."""

    up: Tensor
    up_bias: Tensor | None
    down: Tensor
    down_bias: Tensor | None
    a1: Tensor | None
    b1: Tensor | None
    a2: Tensor | None
    b2: Tensor | None

    @classmethod
    def of(
        cls,
        plan: _Plan,
        x: Tensor,
        up: Stack,
        up_bias: Tensor | None,
        down: Stack,
        down_bias: Tensor | None,
        *factors: Tensor | None,
    ) -> _Operands:
        a1, b1, a2, b2 = (None if f is None else f.to(x.dtype) for f in factors)
        if plan.grouped:
            # grouped_mm wants strides of whole 16 bytes, so ranks are padded with zeros up to 4 (float32) or 8 columns
            step = 16 // x.element_size()
            a1, a2 = (None if a is None else F.pad(a, (0, 0, 0, -a.shape[1] % step)) for a in (a1, a2))
            b1, b2 = (None if b is None else F.pad(b, (0, -b.shape[2] % step)) for b in (b1, b2))
        w1, w2 = _dense(up, x.dtype), _dense(down, x.dtype)
        if not plan.experts.transposed:
            w1, w2 = w1.transpose(1, 2), w2.transpose(1, 2)
        return cls(w1, up_bias, w2, down_bias, _turned(a1), _turned(b1), _turned(a2), _turned(b2))


def _turned(factor: Tensor | None) -> Tensor | None:
    return None if factor is None else factor.transpose(1, 2)


@dataclass(frozen=True)
class _Route:
    """Rows sorted by expert: row i is slot order[i] of the T*k slots. Slots whose id is E or more come last and are never read."""

    order: Tensor  # [S] int64
    ends: Tensor  # [E] int32: where each expert's rows end
    weights: Tensor  # [S]
    k: int
    tiles: tuple[tuple[int, int, int], ...]  # (expert, start, end); empty for grouped rows, which need no numbers on the host


def _route(ids: Tensor, weights: Tensor, num_experts: int, grouped: bool) -> _Route:
    flat = ids.reshape(-1)
    ordered, order = torch.sort(flat, stable=True)
    # searchsorted and not bincount: the latter reads its length back from the device
    ends = torch.searchsorted(ordered, torch.arange(num_experts, device=ids.device, dtype=ordered.dtype), right=True)
    tiles = () if grouped else tuple(_tiles(ends.tolist()))
    return _Route(order, ends.to(torch.int32), weights.detach().reshape(-1)[order], ids.shape[1], tiles)


def _tiles(ends: Sequence[int]) -> Iterator[tuple[int, int, int]]:
    start = 0
    for expert, end in enumerate(ends):
        for first in range(start, end, ROWS_PER_TILE):
            yield expert, first, min(first + ROWS_PER_TILE, end)
        start = end


class _Rows(Protocol):
    """Some rows, and the products of their matrices with the right expert's."""

    span: slice

    def mm(self, a: Tensor, stack: Tensor, out: Tensor | None = None) -> Tensor: ...

    def mm_add_(self, y: Tensor, a: Tensor, stack: Tensor, scale: float) -> None: ...

    def gram_(self, grad: Tensor, a: Tensor, b: Tensor, scale: float) -> None: ...

    def bias_(self, y: Tensor, bias: Tensor, w: Tensor | None = None) -> None: ...

    def bias_gram_(self, grad: Tensor, dy: Tensor, w: Tensor | None = None) -> None: ...

    def dot_bias(self, dy: Tensor, bias: Tensor) -> Tensor: ...


class _Tile:
    """Rows of one expert."""

    def __init__(self, expert: int, start: int, end: int) -> None:
        self.expert, self.span = expert, slice(start, end)

    def mm(self, a: Tensor, stack: Tensor, out: Tensor | None = None) -> Tensor:
        return torch.mm(a, stack[self.expert], out=out)

    def mm_add_(self, y: Tensor, a: Tensor, stack: Tensor, scale: float) -> None:
        y.addmm_(a, stack[self.expert], alpha=scale)

    def gram_(self, grad: Tensor, a: Tensor, b: Tensor, scale: float) -> None:
        grad[self.expert].addmm_(a.t(), b, alpha=scale)

    def bias_(self, y: Tensor, bias: Tensor, w: Tensor | None = None) -> None:
        row = bias[self.expert].to(y.dtype)
        y.add_(row) if w is None else y.addcmul_(w, row)

    def bias_gram_(self, grad: Tensor, dy: Tensor, w: Tensor | None = None) -> None:
        grad[self.expert].add_((dy if w is None else dy * w).sum(0))

    def dot_bias(self, dy: Tensor, bias: Tensor) -> Tensor:
        return dy @ bias[self.expert].to(dy.dtype)


class _Grouped:
    """All rows, sorted by expert."""

    span = slice(None)

    def __init__(self, route: _Route, rows: int) -> None:
        self.ends = route.ends
        # the expert of each row, for biases; rows that belong to none borrow the last one's and are dropped later
        row = torch.arange(rows, device=route.ends.device, dtype=torch.int32)
        self.expert = torch.searchsorted(route.ends, row, right=True).clamp_(max=route.ends.numel() - 1)
        empty = torch.diff(route.ends, prepend=route.ends.new_zeros(1)) == 0
        self.empty = empty[:, None, None]

    def mm(self, a: Tensor, stack: Tensor, out: Tensor | None = None) -> Tensor:
        return F.grouped_mm(a, stack, offs=self.ends)

    def mm_add_(self, y: Tensor, a: Tensor, stack: Tensor, scale: float) -> None:
        y.add_(F.grouped_mm(a, stack, offs=self.ends), alpha=scale)

    def gram_(self, grad: Tensor, a: Tensor, b: Tensor, scale: float) -> None:
        grad.add_(F.grouped_mm(a.t(), b, offs=self.ends).masked_fill_(self.empty, 0), alpha=scale)

    def bias_(self, y: Tensor, bias: Tensor, w: Tensor | None = None) -> None:
        row = bias.to(y.dtype)[self.expert]
        y.add_(row) if w is None else y.addcmul_(w, row)

    def bias_gram_(self, grad: Tensor, dy: Tensor, w: Tensor | None = None) -> None:
        # a running sum over the sorted rows, read at each expert's end: exact order, no atomics
        total = F.pad((dy if w is None else dy * w).to(torch.float64).cumsum(0), (0, 0, 1, 0))
        grad.add_(torch.diff(total[self.ends.long()], dim=0, prepend=total[:1]))

    def dot_bias(self, dy: Tensor, bias: Tensor) -> Tensor:
        return (dy * bias.to(dy.dtype)[self.expert]).sum(-1)


def _rows_for(x: Tensor, experts: Experts) -> str:
    """Which kind of rows suits the device; grouped_mm also needs rows of whole 16 bytes and a dtype it knows."""
    widths = (*experts.up.shape[1:], *experts.down.shape[1:])
    aligned = all(n * x.element_size() % 16 == 0 for n in widths)
    known = x.dtype in (torch.bfloat16, torch.float16, torch.float32)
    return "grouped" if x.device.type == "cuda" and aligned and known else "tiles"


def _all_rows(plan: _Plan, route: _Route) -> Iterator[_Rows]:
    if plan.grouped:
        yield _Grouped(route, route.order.numel())
        return
    for tile in route.tiles:
        yield _Tile(*tile)


class _Combine:
    """Adds rows [S, H] to their tokens [T, H], in float32 at least, in an order that does not depend on timing."""

    def __init__(self, plan: _Plan, route: _Route, like: Tensor) -> None:
        self.route, self.grouped, self.like = route, plan.grouped, like
        wide = torch.float64 if like.dtype == torch.float64 else torch.float32
        self.out = None if plan.grouped else like.new_zeros(like.shape, dtype=wide)

    def add(self, rows: _Rows, y: Tensor) -> None:
        if self.out is not None:
            token = self.route.order[rows.span] // self.route.k
            self.out.index_add_(0, token, y.to(self.out.dtype))
            return
        back = torch.empty_like(self.route.order)
        back[self.route.order] = torch.arange(back.numel(), device=back.device)
        # embedding_bag reads each token's k rows where they lie and sums them in float32: no permuted copy of y, no atomics
        self.out = F.embedding_bag(back.view(-1, self.route.k), y, mode="sum")

    def result(self) -> Tensor:
        assert self.out is not None
        return self.out.to(self.like.dtype)


def _dense(stack: Stack, dtype: torch.dtype) -> Tensor:
    return stack.to(dtype) if isinstance(stack, Tensor) else stack.dequantize(dtype)


# ---------------------------------------------------------------- forward


def _forward(plan: _Plan, m: _Operands, x: Tensor, route: _Route, keep: bool) -> tuple[Tensor, list[Tensor | None]]:
    """-> out [T, H] and, to keep, gate_up [S, N], xa [S, r], ha [S, r]."""
    kept: list[Tensor | None] = [None, None, None]
    if keep and not plan.grouped:
        slots = route.order.numel()
        widths = (m.up.shape[2], None if m.a1 is None else m.a1.shape[2], None if m.a2 is None else m.a2.shape[2])
        kept = [None if n is None else x.new_empty(slots, n) for n in widths]
    combine = _Combine(plan, route, x)
    for rows in _all_rows(plan, route):
        into = [None if t is None else t[rows.span] for t in kept]
        y, made = _forward_rows(plan, m, rows, x[route.order[rows.span] // route.k], route.weights[rows.span, None], into)
        combine.add(rows, y)
        if keep and plan.grouped:
            kept = made
    return combine.result(), kept


def _forward_rows(
    plan: _Plan, m: _Operands, rows: _Rows, x: Tensor, w: Tensor, into: list[Tensor | None]
) -> tuple[Tensor, list[Tensor | None]]:
    """x [n, H] of some rows -> their weighed outputs [n, H], and what to keep (written into `into` where that is given)."""
    xa = ha = None
    gate_up = rows.mm(x, m.up, into[0])
    if m.a1 is not None and m.b1 is not None:
        xa = rows.mm(x, m.a1, into[1])
        rows.mm_add_(gate_up, xa, m.b1, plan.up_scale)
    if m.up_bias is not None:
        rows.bias_(gate_up, m.up_bias)
    h = plan.experts.gate.forward(gate_up)
    early = plan.experts.post_norm is None  # the weights can go in before the down projection
    if early:
        h.mul_(w)
    y, ha = _down(plan, m, rows, h, w if early else None, into[2])
    if plan.experts.post_norm is not None:
        y = plan.experts.post_norm(y) * w
    return y.to(x.dtype), [gate_up, xa, ha]


def _down(
    plan: _Plan, m: _Operands, rows: _Rows, h: Tensor, w: Tensor | None, into: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """h [n, I] -> W2 h + s2 B2 A2 h + w b2 [n, H], and A2 h [n, r]."""
    ha = None
    y = rows.mm(h, m.down)
    if m.a2 is not None and m.b2 is not None:
        ha = rows.mm(h, m.a2, into)
        rows.mm_add_(y, ha, m.b2, plan.down_scale)
    if m.down_bias is not None:
        rows.bias_(y, m.down_bias, w)
    return y, ha


# ---------------------------------------------------------------- backward


@dataclass
class _Gradients:
    """What the backward fills: None where nothing asked for it."""

    trained: list[Tensor]  # of the gate and the norm
    x: _Combine | None
    weights: Tensor | None  # [S] float32, in sorted order
    up: Tensor | None
    up_bias: Tensor | None
    down: Tensor | None
    down_bias: Tensor | None
    a1: Tensor | None
    b1: Tensor | None
    a2: Tensor | None
    b2: Tensor | None


def _backward_rows(
    plan: _Plan, m: _Operands, rows: _Rows, x: Tensor, w: Tensor, dy: Tensor, kept: list[Tensor | None], grad: _Gradients
) -> None:
    """dy [n, H] of some rows, not yet weighed -> everything in `grad`."""
    gate_up, xa, ha = kept
    assert gate_up is not None
    h, inner = plan.experts.gate.again(gate_up)
    weigh: Tensor | None = w
    if plan.experts.post_norm is not None:
        dy = _norm_backward(plan, m, rows, h, w, dy, grad)
        weigh = None  # dy carries the weight from here on
    dh = rows.mm(dy, m.down.transpose(1, 2))
    db2 = None
    if m.a2 is not None and m.b2 is not None:
        db2 = rows.mm(dy, m.b2.transpose(1, 2))
        rows.mm_add_(dh, db2, m.a2.transpose(1, 2), plan.down_scale)
    if grad.weights is not None and weigh is not None:
        dw = (dh * h).sum(-1, dtype=grad.weights.dtype)
        grad.weights[rows.span] = dw if m.down_bias is None else dw + rows.dot_bias(dy, m.down_bias)
    _down_gradients(plan, rows, h, ha, dy, db2, weigh, grad)
    if weigh is not None:
        dh.mul_(weigh)
    d_gate_up, extra = plan.experts.gate.backward(gate_up, dh, inner)
    for total, d in zip(grad.trained, extra):
        total.add_(d)
    _up_gradients(plan, m, rows, x, xa, d_gate_up, grad)


def _norm_backward(plan: _Plan, m: _Operands, rows: _Rows, h: Tensor, w: Tensor, dy: Tensor, grad: _Gradients) -> Tensor:
    """Through w * norm(y): y is computed again and differentiated locally -> d y [n, H]."""
    assert plan.experts.post_norm is not None
    parameters = tuple(plan.experts.post_norm_parameters)
    y = _down(plan, m, rows, h, None)[0].requires_grad_()
    with torch.enable_grad():
        normed = plan.experts.post_norm(y)
    if grad.weights is not None:
        grad.weights[rows.span] = (dy * normed.detach()).sum(-1, dtype=grad.weights.dtype)
    dy, *rest = torch.autograd.grad(normed, (y, *parameters), (dy * w).to(normed.dtype))
    for total, d in zip(grad.trained[len(plan.experts.gate.parameters) :], rest):
        total.add_(d)
    return dy.to(h.dtype)


def _down_gradients(
    plan: _Plan,
    rows: _Rows,
    h: Tensor,
    ha: Tensor | None,
    dy: Tensor,
    db2: Tensor | None,
    weigh: Tensor | None,
    grad: _Gradients,
) -> None:
    if grad.b2 is not None and ha is not None:
        rows.gram_(grad.b2, dy, ha, plan.down_scale)  # ha already carries the weight
    if grad.a2 is not None and db2 is not None:
        rows.gram_(grad.a2, db2 if weigh is None else db2.mul_(weigh), h, plan.down_scale)
    if grad.down_bias is not None:
        rows.bias_gram_(grad.down_bias, dy, weigh)
    if grad.down is not None:
        weighed = h if weigh is None else (h * weigh).to(h.dtype)
        pair = (weighed, dy) if plan.experts.transposed else (dy, weighed)
        rows.gram_(grad.down, *pair, 1.0)


def _up_gradients(
    plan: _Plan, m: _Operands, rows: _Rows, x: Tensor, xa: Tensor | None, d_gate_up: Tensor, grad: _Gradients
) -> None:
    db1 = None
    if m.b1 is not None:
        db1 = rows.mm(d_gate_up, m.b1.transpose(1, 2))
    if grad.b1 is not None and xa is not None:
        rows.gram_(grad.b1, d_gate_up, xa, plan.up_scale)
    if grad.a1 is not None and db1 is not None:
        rows.gram_(grad.a1, db1, x, plan.up_scale)
    if grad.up_bias is not None:
        rows.bias_gram_(grad.up_bias, d_gate_up)
    if grad.up is not None:
        pair = (x, d_gate_up) if plan.experts.transposed else (d_gate_up, x)
        rows.gram_(grad.up, *pair, 1.0)
    if grad.x is not None:
        dx = rows.mm(d_gate_up, m.up.transpose(1, 2))
        if db1 is not None and m.a1 is not None:
            rows.mm_add_(dx, db1, m.a1.transpose(1, 2), plan.up_scale)
        grad.x.add(rows, dx)


class _ExpertLora(torch.autograd.Function):
    """Inputs: plan, x, ids, weights, up, up_bias, down, down_bias, a1, b1, a2, b2, then the trained tensors of gate and norm."""

    @staticmethod
    def forward(ctx: Any, plan: _Plan, x: Tensor, ids: Tensor, weights: Tensor, *rest: Any) -> Tensor:
        up, up_bias, down, down_bias, *factors = rest[:8]
        route = _route(ids, weights, plan.num_experts, plan.grouped)
        m = _Operands.of(plan, x, up, up_bias, down, down_bias, *factors)
        out, kept = _forward(plan, m, x, route, keep=True)
        tensors = [t if isinstance(t, Tensor) else None for t in rest]
        ctx.save_for_backward(x, route.order, route.ends, route.weights, *kept, *tensors)
        ctx.plan, ctx.k, ctx.tiles, ctx.weights_dtype = plan, route.k, route.tiles, weights.dtype
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out: Tensor) -> tuple[Any, ...]:
        plan: _Plan = ctx.plan
        x, order, ends, w, gate_up, xa, ha, up, up_bias, down, down_bias, *others = ctx.saved_tensors
        up, down = (plan.experts.up if up is None else up), (plan.experts.down if down is None else down)
        factors, trained = others[:4], others[4:]
        route = _Route(order, ends, w, ctx.k, ctx.tiles)
        m = _Operands.of(plan, x, up, up_bias, down, down_bias, *factors)
        need = ctx.needs_input_grad
        stacks = [
            torch.zeros(t.shape, dtype=x.dtype, device=x.device) if n and isinstance(t, Tensor) else None
            for n, t in zip(need[4:12], (up, up_bias, down, down_bias, *_padded(m, factors)))
        ]
        wide = torch.float64 if x.dtype == torch.float64 else torch.float32
        d_weights = torch.zeros(order.numel(), dtype=wide, device=x.device) if need[3] else None
        grad = _Gradients(
            [torch.zeros_like(t) for t in trained], _Combine(plan, route, x) if need[1] else None, d_weights, *stacks
        )
        for rows in _all_rows(plan, route):
            token = order[rows.span] // ctx.k
            kept = [None if t is None else t[rows.span] for t in (gate_up, xa, ha)]
            _backward_rows(plan, m, rows, x[token], w[rows.span, None], d_out[token], kept, grad)
        dw = None
        if d_weights is not None:
            dw = torch.empty_like(d_weights).index_copy_(0, order, d_weights).view(-1, ctx.k).to(ctx.weights_dtype)
        originals = (up, up_bias, down, down_bias, *factors)
        given = [None if g is None else _as(g, t) for g, t in zip(stacks, originals)]
        return None, None if grad.x is None else grad.x.result(), None, dw, *given, *grad.trained


def _padded(m: _Operands, factors: Sequence[Tensor | None]) -> Iterator[Tensor | None]:
    """The factors in the shapes they were computed with: A [E, r, in], B [E, out, r], r padded."""
    for operand in (m.a1, m.b1, m.a2, m.b2):
        yield None if operand is None else operand.transpose(1, 2)


def _as(grad: Tensor, like: Tensor) -> Tensor:
    """The gradient in its tensor's own shape (padding cut off) and dtype."""
    if grad.shape != like.shape:
        grad = grad[:, : like.shape[1], : like.shape[2]]
    return grad.to(like.dtype)
