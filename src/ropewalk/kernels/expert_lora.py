"""The experts of a mixture-of-experts layer and their LoRA, together, with a hand-written backward.

Legend: T tokens, k experts per token, S = T*k routed rows, E experts, H hidden, I expert intermediate, r rank.
For a row of expert e with routing weight w, and with the factors' product never formed:

    gate_up = W1 x + s1 B1 (A1 x)        h = gate(gate_up)        out += W2 (w h) + s2 B2 (A2 (w h))

Kept for the backward: gate_up [S, 2I], A1 x and A2 (w h) [S, r], the order of the rows and their weights. Nothing of size [S, H]
survives the forward: rows of x are gathered again, h is computed again from gate_up, and the routing gradient is <dh, h>.
With `recompute` the first three are not kept either: x and the routing are, and the backward computes them again, the same to the bit.
Weighing h instead of the output takes the weights out of every [S, H] pass.

One text of the mathematics runs on every kind of rows: tiles on a CPU, grouped_mm on a GPU (expert_rows.py), and all together where a
CPU has few of them and nothing is trained (expert_few.py). Where Triton's kernels run, they take it over pass by pass
(expert_fused.py), keep the same, and hand back to grouped_mm if one does not compile.
`expert_lora_plain` is the twin: a loop over experts with the explicit delta, differentiated by autograd.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from ropewalk.kernels.blocked import Blocked, Turned
from ropewalk.kernels.expert_few import Few, alone, route_few
from ropewalk.kernels.expert_few import pays as few_pay
from ropewalk.kernels.expert_rows import Combine, Route, Rows, all_rows, route
from ropewalk.kernels.expert_scratch import Stored
from ropewalk.kernels.gates import ClampedGlu, Gate, Glu
from ropewalk.kernels.quant import Quantised
from ropewalk.kernels.triton_kernels import refuse, usable


class Packed(Protocol):
    """A weight stack kept in fewer bits, or in another order: [E, N, K] (or [E, K, N]) when dequantised."""

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
    recompute: bool = False  # keep x and the routing only


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
    """x [T, H], ids [T, k] below E, weights [T, k] -> [T, H]; `rows` forces "tiles", "grouped", "few" or "fused" where tests want one."""
    forced, rows = rows is not None, rows or _rows_for(x, experts)
    a1, b1, s1 = (up.A, up.B, up.scale) if up else (None, None, 0.0)
    a2, b2, s2 = (down.A, down.B, down.scale) if down else (None, None, 0.0)
    trained = (*experts.gate.parameters, *experts.post_norm_parameters)
    fused = rows == "fused" or (not forced and rows == "grouped" and _fused(x, experts))
    plan = _Plan(experts, s1, s2, rows in ("grouped", "fused"), fused=fused, forced=forced)
    given = (x, ids, weights, experts.up, experts.up_bias, experts.down, experts.down_bias, a1, b1, a2, b2, *trained)
    if torch.is_grad_enabled() and any(isinstance(t, Tensor) and t.requires_grad for t in given):
        return cast(Tensor, _ExpertLora.apply(plan, *given))  # type: ignore[no-untyped-call]
    if plan.fused and (made := _try_fused(plan, x, ids, weights, *given[3:11], keep=False)) is not None:
        return made[0]
    if rows == "few" or (rows == "tiles" and not forced and few_pay(ids, plan.num_experts)):
        plan = replace(plan, few=True)
    m = _Operands.of(plan, x, experts.up, experts.up_bias, experts.down, experts.down_bias, a1, b1, a2, b2)
    if plan.few and not (a1 is None and a2 is None and alone(m.up, x.dtype) and alone(m.down, x.dtype)):
        way = route_few(ids, weights, plan.num_experts)
    else:
        way = route(ids, weights, plan.num_experts, x.dtype, plan.grouped or plan.few)
    return _forward(plan, m, x, way, keep=False)[0]


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
    few: bool = False
    fused: bool = False
    forced: bool = False  # by a test, which wants no other way to step in

    @property
    def num_experts(self) -> int:
        return int(self.experts.up.shape[0])


@dataclass(frozen=True)
class _Operands:
    """Every stack oriented for rows @ stack[e]: up [E, H, N], down [E, I, H], a [E, in, r], b [E, r, out]."""

    up: Tensor | Turned | Stored
    up_bias: Tensor | None
    down: Tensor | Turned | Stored
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
        w1, w2 = (_oriented(stack, x.dtype, plan.experts.transposed, plan.grouped) for stack in (up, down))
        return cls(w1, up_bias, w2, down_bias, *_oriented_factors(plan, x, factors))


def _oriented(stack: Stack, dtype: torch.dtype, transposed: bool, grouped: bool) -> Tensor | Turned | Stored:
    if isinstance(stack, Blocked):
        return Turned(stack)
    if not grouped and isinstance(stack, Quantised):
        return Stored(stack, dtype, turned=not transposed)
    dense = _dense(stack, dtype)
    return dense if transposed else dense.transpose(1, 2)


def _oriented_factors(plan: _Plan, x: Tensor, factors: Sequence[Tensor | None]) -> list[Tensor | None]:
    wide = torch.float32 if plan.few and x.element_size() == 2 else x.dtype  # few rows take factors of either
    a1, b1, a2, b2 = (f if f is None or f.dtype == wide else f.to(x.dtype) for f in factors)
    if plan.grouped:
        # grouped_mm wants strides of whole 16 bytes, so ranks are padded with zeros up to 4 (float32) or 8 columns
        step = 16 // x.element_size()
        a1, a2 = (None if a is None else F.pad(a, (0, 0, 0, -a.shape[1] % step)) for a in (a1, a2))
        b1, b2 = (None if b is None else F.pad(b, (0, -b.shape[2] % step)) for b in (b1, b2))
    return [_turned(f) for f in (a1, b1, a2, b2)]


def _turned(factor: Tensor | None) -> Tensor | None:
    return None if factor is None else factor.transpose(1, 2)


def _rows_for(x: Tensor, experts: Experts) -> str:
    """Which kind of rows suits the device; grouped_mm also needs rows of whole 16 bytes and a dtype it knows."""
    widths = (*experts.up.shape[1:], *experts.down.shape[1:])
    aligned = all(n * x.element_size() % 16 == 0 for n in widths)
    known = x.dtype in (torch.bfloat16, torch.float16, torch.float32)
    return "grouped" if x.device.type == "cuda" and aligned and known else "tiles"


def _dense(stack: Stack, dtype: torch.dtype) -> Tensor:
    return stack.to(dtype) if isinstance(stack, Tensor) else stack.dequantize(dtype)


# ---------------------------------------------------------------- where Triton's kernels run


def _fused(x: Tensor, experts: Experts) -> bool:
    """Whether Triton's kernels compute this layer: a gate in closed form, frozen stacks, no norm of single rows."""
    fits = isinstance(experts.gate, Glu | ClampedGlu) and experts.post_norm is None
    given = (experts.up, experts.down, experts.up_bias, experts.down_bias)
    return fits and not any(t.requires_grad for t in given if isinstance(t, Tensor)) and usable(x.device)


def _fused_layer(plan: _Plan, x: Tensor, stacks: Sequence[Any], factors: Sequence[Tensor | None]) -> Any:
    from ropewalk.kernels.expert_fused import Layer

    (up, up_bias, down, down_bias), (a1, b1, a2, b2) = stacks, _oriented_factors(plan, x, factors)
    gate, transposed = plan.experts.gate, plan.experts.transposed
    return Layer(up, up_bias, down, down_bias, gate, transposed, a1, b1, a2, b2, plan.up_scale, plan.down_scale)


def _try_fused(
    plan: _Plan, x: Tensor, ids: Tensor, weights: Tensor, *rest: Any, keep: bool
) -> tuple[Tensor, list[Tensor | None], Route] | None:
    """-> out, what to keep, the route; or None where a kernel did not run."""
    try:
        from ropewalk.kernels import expert_fused

        way = expert_fused.route_fused(ids, weights, plan.num_experts)
        out, kept = expert_fused.forward(_fused_layer(plan, x, rest[:4], rest[4:8]), x, way)
        return out, kept if keep else [None, None, None], way
    except Exception as error:
        if plan.forced:
            raise
        refuse(error)
        return None


def _try_fused_backward(
    plan: _Plan, x: Tensor, way: Route, d_out: Tensor, kept: list[Tensor | None], rest: Sequence[Any], need: Sequence[bool]
) -> Any:
    """-> the gradients of everything but gate and norm, or None where a kernel did not run."""
    names = {"x": need[1], "weights": need[3], "a1": need[8], "b1": need[9], "a2": need[10], "b2": need[11]}
    try:
        from ropewalk.kernels import expert_fused

        layer = _fused_layer(plan, x, rest[:4], rest[4:8])
        kept = expert_fused.again(layer, x, way) if plan.experts.recompute else kept
        return expert_fused.backward(layer, x, way, d_out, kept, {name for name, wanted in names.items() if wanted})
    except Exception as error:
        if plan.forced:
            raise
        refuse(error)
        return None


# ---------------------------------------------------------------- forward


def _forward(plan: _Plan, m: _Operands, x: Tensor, way: Route, keep: bool) -> tuple[Tensor, list[Tensor | None]]:
    """-> out [T, H] and, to keep, gate_up [S, N], xa [S, r], ha [S, r]."""
    kept: list[Tensor | None] = [None, None, None]
    if keep and not way.grouped:
        widths = (m.up.shape[2], None if m.a1 is None else m.a1.shape[2], None if m.a2 is None else m.a2.shape[2])
        kept = [None if n is None else x.new_empty(way.token.numel(), n) for n in widths]
    combine = Combine(way, x)
    for rows in [Few(way)] if plan.few else all_rows(way, x):
        into = [None if t is None else t[rows.span] for t in kept]
        taken = rows.take(x, way.token[rows.span], "x")
        y, made = _forward_rows(plan, m, rows, taken, way.weight[rows.span, None], into)
        combine.add(rows, y)
        if keep and way.grouped:
            kept = made
        del y, made
    return combine.result(), kept


def _forward_rows(
    plan: _Plan, m: _Operands, rows: Rows, x: Tensor, w: Tensor, into: list[Tensor | None]
) -> tuple[Tensor, list[Tensor | None]]:
    """x [n, H] of some rows -> their weighed outputs [n, H], and what to keep (written into `into` where that is given)."""
    gate_up, xa = _up(plan, m, rows, x, into[0], into[1])
    h = plan.experts.gate.forward(gate_up)
    early = plan.experts.post_norm is None  # the weights can go in before the down projection
    if early:
        h.mul_(w)
    y, ha = _down(plan, m, rows, h, w if early else None, into[2])
    if plan.experts.post_norm is not None:
        y = plan.experts.post_norm(y) * w
    return y.to(x.dtype), [gate_up, xa, ha]


def _up(
    plan: _Plan, m: _Operands, rows: Rows, x: Tensor, into: Tensor | None = None, into_xa: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """x [n, H] -> W1 x + s1 B1 A1 x + b1 [n, N], and A1 x [n, r]."""
    xa = None
    if isinstance(rows, Few) and m.a1 is not None and m.b1 is not None:
        gate_up = rows.mm_lora(x, m.up, m.a1, m.b1, plan.up_scale)
    else:
        gate_up = rows.mm(x, m.up, rows.space("gate_up", m.up.shape[2]) if into is None else into)
        if m.a1 is not None and m.b1 is not None:
            xa = rows.mm(x, m.a1, into_xa)
            rows.mm_add_(gate_up, xa, m.b1, plan.up_scale)
    if m.up_bias is not None:
        rows.bias_(gate_up, m.up_bias)
    return gate_up, xa


def _again(plan: _Plan, m: _Operands, rows: Rows, x: Tensor, w: Tensor) -> list[Tensor | None]:
    """gate_up, A1 x and A2 h of some rows as the forward had them; h carries its weight unless it is normed first."""
    gate_up, xa = _up(plan, m, rows, x)
    if m.a2 is None:
        return [gate_up, xa, None]
    h = plan.experts.gate.forward(gate_up)
    return [gate_up, xa, rows.mm(h if plan.experts.post_norm is not None else h.mul_(w), m.a2)]


def _down(
    plan: _Plan, m: _Operands, rows: Rows, h: Tensor, w: Tensor | None, into: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """h [n, I] -> W2 h + s2 B2 A2 h + w b2 [n, H], and A2 h [n, r]."""
    ha = None
    if isinstance(rows, Few) and m.a2 is not None and m.b2 is not None:
        y = rows.mm_lora(h, m.down, m.a2, m.b2, plan.down_scale)
    else:
        y = rows.mm(h, m.down, rows.space("y", m.down.shape[2]))
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
    x: Combine | None
    weights: Tensor | None  # [rows] float32, in sorted order
    up: Tensor | None
    up_bias: Tensor | None
    down: Tensor | None
    down_bias: Tensor | None
    a1: Tensor | None
    b1: Tensor | None
    a2: Tensor | None
    b2: Tensor | None


def _trainable(stack: Tensor | Turned | Stored) -> Tensor | Stored:
    assert not isinstance(stack, Turned), "weights in blocks answer, and are not trained through"
    return stack


def _backward_rows(
    plan: _Plan, m: _Operands, rows: Rows, x: Tensor, w: Tensor, dy: Tensor, kept: list[Tensor | None], grad: _Gradients
) -> None:
    """dy [n, H] of some rows, not yet weighed -> everything in `grad`."""
    gate_up, xa, ha = kept
    assert gate_up is not None
    h, inner = plan.experts.gate.again(gate_up)
    weigh: Tensor | None = w
    if plan.experts.post_norm is not None:
        dy = _norm_backward(plan, m, rows, h, w, dy, grad)
        weigh = None  # dy carries the weight from here on
    dh = rows.mm(dy, _trainable(m.down).transpose(1, 2), rows.space("dh", m.down.shape[1]))
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


def _norm_backward(plan: _Plan, m: _Operands, rows: Rows, h: Tensor, w: Tensor, dy: Tensor, grad: _Gradients) -> Tensor:
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
    rows: Rows,
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
    plan: _Plan, m: _Operands, rows: Rows, x: Tensor, xa: Tensor | None, d_gate_up: Tensor, grad: _Gradients
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
        dx = rows.mm(d_gate_up, _trainable(m.up).transpose(1, 2), rows.space("y", m.up.shape[1]))
        if db1 is not None and m.a1 is not None:
            rows.mm_add_(dx, db1, m.a1.transpose(1, 2), plan.up_scale)
        grad.x.add(rows, dx)


class _ExpertLora(torch.autograd.Function):
    """Inputs: plan, x, ids, weights, up, up_bias, down, down_bias, a1, b1, a2, b2, then the trained tensors of gate and norm."""

    @staticmethod
    def forward(ctx: Any, plan: _Plan, x: Tensor, ids: Tensor, weights: Tensor, *rest: Any) -> Tensor:
        up, up_bias, down, down_bias, *factors = rest[:8]
        made = _try_fused(plan, x, ids, weights, *rest[:8], keep=not plan.experts.recompute) if plan.fused else None
        if made is not None:
            out, kept, way = made
        else:
            way = route(ids, weights, plan.num_experts, x.dtype, plan.grouped)
            m = _Operands.of(plan, x, up, up_bias, down, down_bias, *factors)
            out, kept = _forward(plan, m, x, way, keep=not plan.experts.recompute)
        tensors = [t if isinstance(t, Tensor) else None for t in rest]
        ctx.save_for_backward(x, way.token, way.weight, way.order, way.place, way.ends, way.row, *kept, *tensors)
        ctx.plan, ctx.k, ctx.weights_dtype = plan, way.k, weights.dtype
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out: Tensor) -> tuple[Any, ...]:
        plan: _Plan = ctx.plan
        saved = ctx.saved_tensors  # read once: a checkpointed layer unpacks each tensor a single time
        x, token, weight, order, place, ends, row, gate_up, xa, ha, up, up_bias, down, down_bias, *others = saved
        up, down = (plan.experts.up if up is None else up), (plan.experts.down if down is None else down)
        factors, trained = others[:4], others[4:]
        way = Route(token, weight, order, place, ends, ctx.k, row=row)
        if row is not None:  # the forward ran in Triton's kernels
            rest = (up, up_bias, down, down_bias, *factors)
            made = _try_fused_backward(plan, x, way, d_out, [gate_up, xa, ha], rest, ctx.needs_input_grad)
            if made is not None:
                dw = None if made.weights is None else way.to_slots(made.weights).to(ctx.weights_dtype)
                given = [None if g is None else _as(g, t) for g, t in zip((made.a1, made.b1, made.a2, made.b2), factors)]
                return None, made.x, None, dw, None, None, None, None, *given, *[None] * len(trained)
        m = _Operands.of(plan, x, up, up_bias, down, down_bias, *factors)
        need = ctx.needs_input_grad
        stacks = [
            torch.zeros(t.shape, dtype=x.dtype, device=x.device) if n and isinstance(t, Tensor) else None
            for n, t in zip(need[4:12], (up, up_bias, down, down_bias, *_padded(m, factors)))
        ]
        wide = torch.float64 if x.dtype == torch.float64 else torch.float32
        d_weights = torch.zeros(way.token.numel(), dtype=wide, device=x.device) if need[3] else None
        grad = _Gradients([torch.zeros_like(t) for t in trained], Combine(way, x) if need[1] else None, d_weights, *stacks)
        for rows in all_rows(way, x):
            token, w = way.token[rows.span], way.weight[rows.span, None]
            rows_x = rows.take(x, token, "x")
            if plan.experts.recompute:
                kept = _again(plan, m, rows, rows_x, w)
            else:
                kept = [None if t is None else t[rows.span] for t in (gate_up, xa, ha)]
            _backward_rows(plan, m, rows, rows_x, w, rows.take(d_out, token, "dy"), kept, grad)
        dw = None if d_weights is None else way.to_slots(d_weights).to(ctx.weights_dtype)
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
