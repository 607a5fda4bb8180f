"""The memory that a forward and backward pass takes, measured on the meta device: every tensor is made, none of them has bytes.

The model's own code runs, so every architecture is measured and none is named. What depends on values (routing, labels) and what
a kernel hides (attention) is played by stand-ins that make and keep tensors of the same sizes. Legend: B sequences, T tokens,
S = T*k routed rows, H hidden, I expert intermediate, N = 2I with a gate, r rank, V vocabulary, h heads, d head width.
"""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import PreTrainedModel
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from ropewalk.kernels.cross_entropy import rows_at_once
from ropewalk.models.experts import LORA, expert_modules, projections, stack_sizes
from ropewalk.models.head import instead_of, nothing, run
from ropewalk.models.score_head import last_layer

NAME = "ropewalk_measured"


class Live(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the bytes of tensors while they live; `peak` is the most there were at once."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now: int = 0
        self.peak: int = 0
        tensors = [*model.parameters(), *model.buffers(), *(p.grad for p in model.parameters() if p.grad is not None)]
        self.known: set[int] = {t.untyped_storage()._cdata for t in tensors}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor):
                self._saw(leaf.untyped_storage())
        return out

    def _saw(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key not in self.known:
            size = storage.nbytes()
            self.known.add(key)
            self.now += size
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._gone, key, size)

    def _gone(self, key: int, size: int) -> None:
        self.known.discard(key)
        self.now -= size


def measure(model: PreTrainedModel, rows: int, tokens: int, *, on_gpu: bool, whole_logits: bool = False) -> int:
    """The most bytes that live at once in one forward and backward over [rows, tokens], beyond weights and gradients.

    The model lies on the meta device, carries its adapter, and is in the state (checkpointing, train mode) it will be trained in.
    """
    _register()
    before = model.get_experts_implementation() if any(True for _ in expert_modules(model)) else None
    attention = model.config._attn_implementation
    _Situation.on_gpu = on_gpu
    if attention != "eager":  # which keeps what it keeps in plain sight
        model.set_attn_implementation(NAME)
    if before is not None:
        model.set_experts_implementation(NAME)
    for parameter in model.parameters():
        if parameter.requires_grad and parameter.grad is None:
            parameter.grad = torch.empty_like(parameter)
    try:
        with Live(model) as live:
            ids = torch.zeros((rows, tokens), dtype=torch.long, device="meta")
            _loss(model, ids, whole_logits).backward()  # type: ignore[no-untyped-call]
        return int(live.peak)
    finally:
        model.set_attn_implementation(attention)
        if before is not None:
            model.set_experts_implementation(before)


def _loss(model: PreTrainedModel, ids: Tensor, whole_logits: bool) -> Tensor:
    if whole_logits:
        return run(model, ids).logits.float().log_softmax(-1).sum()  # type: ignore[no-any-return]
    head = last_layer(model)
    with instead_of(head, nothing) as seen:
        run(model, ids)
    loss: Tensor = _LossStandIn.apply(seen[0].flatten(0, 1), head.weight)  # type: ignore[no-untyped-call]
    return loss


class _Situation:
    """Where the measured run will be: kernels keep and pass different things there."""

    on_gpu = False


def _register() -> None:
    if NAME not in ALL_EXPERTS_FUNCTIONS:
        ALL_EXPERTS_FUNCTIONS.register(NAME, _experts_stand_in)
        ALL_ATTENTION_FUNCTIONS.register(NAME, _attention_stand_in)


def _experts_stand_in(module: Any, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
    lora = module._modules.get(LORA)
    factors, sizes = [], []
    for name in projections(module):
        found = None if lora is None else lora.factors(name)
        _, inputs, outputs = stack_sizes(module, name)
        sizes += [inputs, outputs, 0 if found is None else found.A.shape[1]]
        factors += [] if found is None else [found.A, found.B]
    out: Tensor = _ExpertsStandIn.apply(x, ids, weights, tuple(sizes), *factors)  # type: ignore[no-untyped-call]
    return out


class _ExpertsStandIn(torch.autograd.Function):
    """kernels/expert_lora.py in sizes: kept are x, gate_up [S, N], xa and ha [S, r] and the routing."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, ids: Tensor, weights: Tensor, sizes: tuple[int, ...], *factors: Tensor) -> Tensor:
        hidden, n, r1, inner, _, r2 = sizes
        slots = ids.numel()
        order, sorted_weights = ids.reshape(-1).clone(), weights.reshape(-1).clone()
        kept = [x.new_empty(slots, width) for width in (n, r1, r2)]
        if _Situation.on_gpu:
            gathered, h = x.new_empty(slots, hidden), x.new_empty(slots, inner)
            del gathered
            y = x.new_empty(slots, hidden)
            del h
            out = torch.empty_like(x)
            del y
        else:
            out = x.new_empty(x.shape, dtype=torch.float32).to(x.dtype)
        ctx.save_for_backward(x, order, sorted_weights, *kept)
        ctx.factors, ctx.sizes, ctx.shape = [f.shape for f in factors], sizes, weights.shape
        return out

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        x, order, _, *_ = ctx.saved_tensors
        hidden, n, _, inner, _, _ = ctx.sizes
        slots = order.numel()
        grads = [x.new_empty(shape, dtype=torch.float32) for shape in ctx.factors]
        if _Situation.on_gpu:
            rows = [x.new_empty(slots, width) for width in (hidden, hidden, inner, inner, n)]
            del rows
            dx = x.new_empty(slots, hidden)
        dx = x.new_empty(x.shape, dtype=torch.float32).to(x.dtype)
        return dx, None, upstream.new_empty(ctx.shape), None, *grads


def _attention_stand_in(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **unused: Any
) -> tuple[Tensor, None]:
    """query [B, h, T, d] -> [B, T, h, d]."""
    out: Tensor = _AttentionStandIn.apply(query, key, value)  # type: ignore[no-untyped-call]
    return out, None


class _AttentionStandIn(torch.autograd.Function):
    """Fused attention in sizes: kept are its inputs, its output and one number per row; sdpa on CPU repeats keys and values."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        ctx.shapes = key.shape, value.shape
        if not _Situation.on_gpu and key.shape[1] != query.shape[1]:
            key, value = (t.repeat_interleave(query.shape[1] // t.shape[1], dim=1) for t in (key, value))
        out = query.new_empty(*query.shape[:3], value.shape[-1])
        each = query.new_empty(query.shape[:3], dtype=torch.float32)
        if not _Situation.on_gpu and value.shape[-1] != query.shape[-1]:
            # Values of another width have no fused kernel on CPU: the attention of every pair is kept.
            each = query.new_empty(*query.shape[:3], key.shape[2])
            scores = torch.empty_like(each)
            del scores
        ctx.save_for_backward(query, key, value, out, each)
        return out.transpose(1, 2).contiguous()

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, ...]:
        query, key, value, _, each = ctx.saved_tensors
        if each.dim() == 4:
            scores = [torch.empty_like(each), torch.empty_like(each)]
            del scores
        wide = torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)
        return wide[0], *(t if t.shape == shape else t.new_empty(shape) for t, shape in zip(wide[1:], ctx.shapes))


class _LossStandIn(torch.autograd.Function):
    """kernels/cross_entropy.py in sizes, with a label on every token: a chunk of logits, and the gradient of hidden [n, H]."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor) -> Tensor:
        rows = min(len(hidden), rows_at_once(weight.shape[0], _Situation.on_gpu))
        grad = torch.empty_like(hidden)
        grad_w = weight.new_empty(weight.shape, dtype=torch.float32) if weight.requires_grad else None
        logits = hidden.new_empty(rows, weight.shape[0])
        wide = logits.float() if logits.dtype != torch.float32 else logits
        log_p = torch.empty_like(wide)
        del log_p, wide, logits
        ctx.save_for_backward(grad, grad_w)
        ctx.dtype = weight.dtype
        return hidden.new_empty((), dtype=torch.float32)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        grad, grad_w = ctx.saved_tensors
        return grad.clone(), None if grad_w is None else grad_w.to(ctx.dtype)
