"""The memory that a forward and backward pass takes, measured on the meta device: every tensor is made, none of them has bytes.

The model's own code runs, so every architecture is measured and none is named. What depends on values (routing, labels) and what
a kernel hides (attention) is played by stand-ins that make and keep tensors of the same sizes. One layer of each kind runs, however many
there are: a pass is the sum of what each of its layers keeps, and the most that one of them takes for a moment.
Legend: B sequences, T tokens, S = T*k routed rows, H hidden, I expert intermediate, N = 2I with a gate, r rank, V vocabulary, h heads,
d head width.
"""

from __future__ import annotations

import weakref
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import PreTrainedModel
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from ropewalk.kernels.cross_entropy import CHUNK, rows_at_once
from ropewalk.kernels.expert_rows import ROWS_PER_TILE
from ropewalk.kernels.expert_scratch import scratch_bytes
from ropewalk.kernels.gates import AnyGate
from ropewalk.models.experts import LORA, RECOMPUTE, expert_modules, gate_of, projections, stack_sizes
from ropewalk.models.head import instead_of, nothing, run
from ropewalk.models.recompute import Way, decoder_layers, recompute
from ropewalk.models.score_head import last_layer

NAME = "ropewalk_measured"
_aten = torch.ops.aten
POINTWISE = frozenset(
    (
        *(_aten.mul.Tensor, _aten.add.Tensor, _aten.sub.Tensor, _aten.mul.Scalar, _aten.pow.Tensor_Scalar, _aten.neg.default),
        *(_aten.gelu.default, _aten.gelu_backward.default, _aten.silu.default),
    )
)


@dataclass(frozen=True)
class Situation:
    """Where the measured run will be: kernels keep and pass different things there."""

    on_gpu: bool = False
    fused: bool = False  # Triton's kernels run
    packed: bool = False  # several samples in a row, which a mask keeps apart
    spans: bool = False  # attention by spans (train/branching.py), without masks
    stored: Collection[int] = ()  # the ids of the parameters that will be kept in fewer bits


@dataclass(frozen=True)
class Passed:
    """One layer's part of a pass, in bytes beyond what lived as it began."""

    forward: int  # the most in its forward
    kept: int  # what it leaves behind
    backward: int  # the most in its backward
    freed: int  # what is gone after it


@dataclass(frozen=True)
class Course:
    """A pass of a model with few layers."""

    begin: int  # what lives as the first layer begins
    begin_peak: int
    layers: tuple[Passed, ...]
    head: int  # the most from the last layer's end until its gradient is there, beyond what lived then
    left: int  # what of that is still there
    end: int  # the most after the first layer's backward


def _pointwise(args: Sequence[Any]) -> Tensor | None:
    """What an operation number by number gives, whose own shape function takes fifty times as long; None where it must be asked."""
    first, others = args[0], [a for a in args[1:] if isinstance(a, Tensor)]
    if not (isinstance(first, Tensor) and first.is_meta and first.is_floating_point()):
        return None
    for other in others:
        smaller = other.dim() <= first.dim() and all(a in (1, b) for a, b in zip(reversed(other.shape), reversed(first.shape)))
        if other.dtype != first.dtype or not smaller or (other.shape == first.shape and other.stride() != first.stride()):
            return None
    return torch.empty_like(first)


class Live(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the bytes of tensors while they live; `peak` is the most there were at once since it was last set."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now: int = 0
        self.peak: int = 0
        tensors = [*model.parameters(), *model.buffers(), *(p.grad for p in model.parameters() if p.grad is not None)]
        self.known: set[int] = {t.untyped_storage()._cdata for t in tensors}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default and args[0].is_meta:
            return True  # a mask asks whether positions go on without a break, and here they do
        out = _pointwise(args) if func in POINTWISE else None
        if out is None:
            out = func(*args, **(kwargs or {}))
        for leaf in (out,) if isinstance(out, Tensor) else tree_leaves(out):
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

    def lap(self) -> tuple[int, int]:
        """What lives, and the most since the last lap."""
        found = self.now, self.peak
        self.peak = self.now
        return found


class Courses:
    """What passes over [rows, tokens] take beyond weights and gradients, each way of the layers measured when it is first asked for.

    The model lies on the meta device and carries its adapter. "offload" is "layer" without the layer's input, which waits on the host.
    `situation` is where it will run.
    """

    def __init__(self, model: PreTrainedModel, rows: int, tokens: int, situation: Situation) -> None:
        self._model, self._rows, self._tokens, self._situation = model, rows, tokens, situation
        self._layers = decoder_layers(model)
        self._chosen, self._like = kinds(self._layers)
        self._known: dict[Way, Course] = {}

    def peak(
        self, ways: Sequence[Way], *, gradients: Sequence[int] = (), there: bool = True, passing: Sequence[int] = ()
    ) -> int:
        """The most bytes at once, for these ways of the model's layers.

        gradients: bytes of each layer's, which come one by one where they are not `there` before; passing: what each takes besides.
        """
        course = self._course(ways[0] if ways else "keep")
        each = [self._course(way) for way in ways]  # before what each layer is like is read: a model may have to run whole
        layers = [found.layers[kind] for found, kind in zip(each, self._like)]
        extra = list(passing) or [0] * len(layers)
        now, most = course.begin, course.begin_peak
        for layer, more in zip(layers, extra):
            most = max(most, now + layer.forward + more)
            now += layer.kept
        most = max(most, now + course.head)
        now += course.left
        for layer, more, grown in reversed(list(zip(layers, extra, list(gradients) or [0] * len(layers)))):
            most = max(most, now + layer.backward + more)
            now += (0 if there else grown) - layer.freed
        return max(most, now + course.end)

    def _course(self, way: Way) -> Course:
        if way not in self._known:
            if way == "offload" and self._layers:
                course = self._course("layer")
                course = _offloaded(course, self._model, self._rows * self._tokens) if self._situation.on_gpu else course
            else:
                course = self._measured(way)
            self._known[way] = course
        return self._known[way]

    def _measured(self, way: Way) -> Course:
        with _standing_in(self._model, self._situation):
            recompute(self._model, way)
            try:
                return _course(self._model, self._layers, self._chosen, self._rows, self._tokens)
            except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError):
                if self._known or len(self._chosen) == len(self._layers):
                    raise
                # A model that asks for a certain layer by its number runs whole, which only takes longer.
                self._chosen, self._like = [*range(len(self._layers))], [*range(len(self._layers))]
                return _course(self._model, self._layers, self._chosen, self._rows, self._tokens)


@contextmanager
def _standing_in(model: PreTrainedModel, situation: Situation) -> Iterator[None]:
    """Within it the model trains by stand-ins for what depends on values and what a kernel hides."""
    global _here
    _register()
    _here = situation
    before = model.get_experts_implementation() if any(True for _ in expert_modules(model)) else None
    attention, training = model.config._attn_implementation, model.training
    if attention != "eager" or situation.spans:  # eager attention keeps what it keeps in plain sight
        model.set_attn_implementation(NAME)
    if before is not None:
        model.set_experts_implementation(NAME)
    for parameter in model.parameters():
        if parameter.requires_grad and parameter.grad is None:
            parameter.grad = torch.empty_like(parameter)
    model.train()
    try:
        yield
    finally:
        recompute(model, "keep")
        model.train(training)
        model.set_attn_implementation(attention)
        if before is not None:
            model.set_experts_implementation(before)


def kinds(layers: nn.ModuleList) -> tuple[list[int], list[int]]:
    """The layers that stand for all, and the place among them of the one that each is like.

    The first layer is a kind of its own: nothing asks for the gradient of what goes into it.
    """
    first: dict[Any, int] = {}
    for number, layer in enumerate(layers):
        first.setdefault(_kind(layer, number == 0), number)
    chosen = sorted(first.values())
    place = {number: at for at, number in enumerate(chosen)}
    return chosen, [place[first[_kind(layer, number == 0)]] for number, layer in enumerate(layers)]


def _kind(layer: nn.Module, first: bool) -> Any:
    shapes = tuple((name, tuple(p.shape), p.requires_grad) for name, p in layer.named_parameters())
    said = tuple(
        (path, name, value if isinstance(value, str | bool | float) or value is None else type(value).__name__)
        for path, module in layer.named_modules()
        for name, value in sorted(vars(module).items())
        if not name.startswith("_")
    )
    return first, shapes, said


def _offloaded(course: Course, model: PreTrainedModel, tokens: int) -> Course:
    size = tokens * int(model.config.get_text_config().hidden_size) * model.dtype.itemsize
    layers = [Passed(p.forward, p.kept - size, p.backward + size, p.freed - size) for p in course.layers]
    return Course(course.begin, course.begin_peak, tuple(layers), course.head, course.left, course.end)


def _course(model: PreTrainedModel, layers: nn.ModuleList, chosen: list[int], rows: int, tokens: int) -> Course:
    laps: list[tuple[int, int]] = []
    with Live(model) as live, _fewer(model, layers, chosen, live, laps):
        ids = torch.zeros((rows, tokens), dtype=torch.long, device="meta")
        _loss(model, ids).backward()  # type: ignore[no-untyped-call]
        laps.append(live.lap())
    count = len(chosen)
    if not count:
        return Course(0, laps[-1][1], (), 0, 0, 0)
    (begin, begin_peak), *ahead = laps[: count + 1]
    back = laps[count + 1 :]  # as each layer's backward begins, the last layer's first, and at the end
    passed, lived = [], begin
    for at, (now, peak) in enumerate(ahead):
        start, (until, most) = back[count - 1 - at][0], back[count - at] if at else back[-1]
        # The first layer's backward and what comes after it are one: nothing marks where its input's gradient would be.
        passed.append(Passed(peak - lived, now - lived, most - start, start - until))
        lived = now
    return Course(begin, begin_peak, tuple(passed), back[0][1] - lived, back[0][0] - lived, 0)


@contextmanager
def _fewer(
    model: nn.Module, layers: nn.ModuleList, chosen: list[int], live: Live, laps: list[tuple[int, int]]
) -> Iterator[None]:
    """Within it the model has only the chosen layers, and every border between them is a lap.

    Their number in the configuration stays: some models cut what they embed into as many parts, and none asks for more than there are.
    """
    if not chosen:
        yield
        return
    owner, name = next((m, n) for m in model.modules() for n, child in m.named_children() if child is layers)
    config: Any = getattr(owner, "config", None) or getattr(model, "config")  # noqa: B009
    lists = {n: v for n, v in vars(config).items() if isinstance(v, list | tuple) and len(v) == len(layers)}
    marked = [_Marked(layers[number], live, laps, first=at == 0) for at, number in enumerate(chosen)]
    setattr(owner, name, nn.ModuleList(marked))
    try:
        for key, value in lists.items():
            setattr(config, key, [value[number] for number in chosen])
        yield
    finally:
        setattr(owner, name, layers)
        for key, value in lists.items():
            setattr(config, key, value)


class _Marked(nn.Module):
    """A layer whose beginning, end, and gradient's arrival are laps."""

    def __init__(self, layer: nn.Module, live: Live, laps: list[tuple[int, int]], *, first: bool) -> None:
        super().__init__()
        self.layer, self._live, self._laps, self._first = layer, live, laps, first

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("layer"), name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if self._first:
            self._laps.append(self._live.lap())
        out = self.layer(*args, **kwargs)
        self._laps.append(self._live.lap())
        hidden = next(leaf for leaf in tree_leaves(out) if isinstance(leaf, Tensor))
        hidden.register_hook(lambda gradient: self._laps.append(self._live.lap()))  # type: ignore[no-untyped-call]
        return out


def _loss(model: PreTrainedModel, ids: Tensor) -> Tensor:
    head = last_layer(model)
    with instead_of(head, nothing) as seen:
        run(model, ids)
    capped = bool(getattr(model.config.get_text_config(), "final_logit_softcapping", None))
    loss: Tensor = _LossStandIn.apply(seen[0].flatten(0, 1), head.weight, capped)  # type: ignore[no-untyped-call]
    return loss


_here = Situation()


def _register() -> None:
    if NAME not in ALL_EXPERTS_FUNCTIONS:
        ALL_EXPERTS_FUNCTIONS.register(NAME, _experts_stand_in)
        ALL_ATTENTION_FUNCTIONS.register(NAME, _attention_stand_in)
        ALL_MASK_ATTENTION_FUNCTIONS.register(NAME, _mask)


def _mask(*args: Any, **options: Any) -> Tensor | None:
    if _here.spans:
        return None
    made: Tensor | None = sdpa_mask(*args, **options | ({"allow_is_causal_skip": False} if _here.packed else {}))
    return made


def _experts_stand_in(module: Any, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
    lora = module._modules.get(LORA)
    factors, sizes = [], []
    for name in projections(module):
        found = None if lora is None else lora.factors(name)
        _, inputs, outputs = stack_sizes(module, name)
        sizes += [inputs, outputs, 0 if found is None else found.A.shape[1]]
        factors += [] if found is None else [found.A, found.B]
    way = _rows_of(module)
    how = _How(
        way, tuple(sizes), module.__dict__.get(RECOMPUTE, False), *(_scratch(module, n, way, x) for n in projections(module))
    )
    out: Tensor = _ExpertsStandIn.apply(x, ids, weights, how, *factors)  # type: ignore[no-untyped-call]
    return out


@dataclass(frozen=True)
class _How:
    """Of which sizes, and by which kernels."""

    way: str  # "fused", "grouped" or "tiles"
    sizes: tuple[int, ...]  # of up: inputs, outputs and rank; of down the same
    again: bool
    up: int  # bytes in which weights of fewer bits are dequantised
    down: int


def _rows_of(module: Any) -> str:
    """As kernels/expert_lora.py chooses."""
    if not _here.on_gpu:
        return "tiles"
    frozen = not any(p.requires_grad for name, p in module.named_parameters() if LORA not in name.split("."))
    closed = not isinstance(gate_of(module), AnyGate) and not getattr(module, "has_post_expert_norm", False)
    return "fused" if _here.fused and frozen and closed else "grouped"


def _scratch(module: Any, name: str, way: str, x: Tensor) -> int:
    stack = getattr(module, name)
    if id(stack) not in _here.stored:
        return 0
    if way == "fused":
        return scratch_bytes(stack.shape, x.dtype)
    return int((stack.numel() if way == "grouped" else stack[0].numel()) * x.dtype.itemsize)


class _ExpertsStandIn(torch.autograd.Function):
    """kernels/expert_lora.py in sizes: kept are x, the routing and, unless they are made again, gate_up [S, N], xa and ha [S, r]."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, ids: Tensor, weights: Tensor, how: _How, *factors: Tensor) -> Tensor:
        hidden, n, r1, inner, _, r2 = how.sizes
        slots = ids.numel()
        ordered, order = torch.sort(ids.reshape(-1), stable=True)
        more = {"fused": 2, "grouped": 1, "tiles": 2}[how.way]
        routing = [order, weights.reshape(-1).clone(), *(torch.empty_like(order) for _ in range(more))]
        del ordered
        kept = [x.new_empty(slots, width) for width in (n, r1, r2) if width and not how.again]
        turned = _turned(x, factors)
        if how.way == "fused":
            made = [x.new_empty(slots, width) for width in (n, r1, r2) if width and how.again]
            stored = _bytes(x, how.up)
            del stored
            h, y, stored = x.new_empty(slots, inner), x.new_empty(slots, hidden), _bytes(x, how.down)
            del stored
            out = torch.empty_like(x)
            del made, h, y
        elif how.way == "grouped":
            # x of the rows, gate_up, and what is added to it; then h, y, and what is added to that
            dense = _bytes(x, how.up + how.down)
            rows = x.new_empty(slots, hidden)
            again = x.new_empty(slots, n) if how.again else None
            added = x.new_empty(slots, n)
            del added
            h, y, added = (x.new_empty(slots, width) for width in (inner, hidden, hidden))
            out = torch.empty_like(x)
            del dense, rows, again, h, y, added
        else:
            wide = x.new_empty(x.shape, dtype=torch.float32)
            tile = x.new_empty(ROWS_PER_TILE, 2 * hidden + inner + (n if how.again else 0))
            stored = _bytes(x, how.up + how.down)
            del tile, stored
            out = wide.to(x.dtype)
        del turned
        ctx.save_for_backward(x, *routing, *kept, *factors)
        ctx.how, ctx.shape, ctx.factors = how, weights.shape, len(factors)
        return out

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        x, order, *others = ctx.saved_tensors
        how = ctx.how
        factors = others[len(others) - ctx.factors :]
        hidden, n, r1, inner, _, r2 = how.sizes
        slots = order.numel()
        again = n if how.again else 0
        turned = _turned(x, factors)
        if how.way == "fused":
            if again:
                made = [x.new_empty(slots, width) for width in (n, r1, r2, inner)]
                del made[-1]
            low, dh = [x.new_empty(slots, width) for width in (r2, r1)], x.new_empty(slots, inner)
            stored = _bytes(x, how.down)
            del stored
            weights = x.new_empty(slots, dtype=torch.float32)
            d_gate_up = x.new_empty(slots, n)
            grads = [torch.empty_like(f, dtype=torch.float32) for f in factors]
            del dh
            rows, stored = x.new_empty(slots, hidden), _bytes(x, how.up)
            del stored
            dx = torch.empty_like(x)
            del rows, d_gate_up, low
            grads = [wide.to(f.dtype) for wide, f in zip(grads, factors)]
        else:
            grads = [x.new_empty(f.shape) for f in factors]
            weights = x.new_empty(slots, dtype=torch.float32)
            if how.way == "grouped":
                # x and dy of the rows, gate_up where it is made again, h, what was activated, dh, d gate_up; then dx and what is added
                dense = _bytes(x, how.up + how.down)
                rows = [x.new_empty(slots, width) for width in (hidden, hidden, again, inner, inner, inner, n, hidden, hidden)]
                dx = torch.empty_like(x)
                del rows, dense
            else:
                wide = x.new_empty(x.shape, dtype=torch.float32)
                tile, stored = x.new_empty(ROWS_PER_TILE, 3 * hidden + 4 * inner + n + again), _bytes(x, how.up + how.down)
                del tile, stored
                dx = wide.to(x.dtype)
        del weights, turned
        return dx, None, upstream.new_empty(ctx.shape), None, *grads


def _turned(x: Tensor, factors: Sequence[Tensor]) -> list[Tensor]:
    """Factors as they are multiplied, where they are kept in another type."""
    return [x.new_empty(f.shape) for f in factors if f.dtype != x.dtype]


def _bytes(x: Tensor, count: int) -> Tensor:
    return x.new_empty(count, dtype=torch.uint8)


def _attention_stand_in(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None, **unused: Any
) -> tuple[Tensor, None]:
    """query [B, h, T, d] -> [B, T, h, d]."""
    # For every head, as transformers has it
    repeated = not _here.spans and (mask is not None or not key.shape[-1] == value.shape[-1] <= 256)
    if repeated and key.shape[1] != query.shape[1]:
        key, value = (t.repeat_interleave(query.shape[1] // t.shape[1], dim=1) for t in (key, value))
    out: Tensor = _AttentionStandIn.apply(query, key, value, mask)  # type: ignore[no-untyped-call]
    return out, None


class _AttentionStandIn(torch.autograd.Function):
    """Fused attention in sizes: kept are its inputs, its output, one number per row, and a mask as what is added to scores."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        out = query.new_empty(
            len(query), query.shape[2], query.shape[1], value.shape[-1]
        )  # as it is wanted: heads side by side
        each = query.new_empty(query.shape[:3], dtype=torch.float32)
        if not (_here.on_gpu or _here.spans) and value.shape[-1] != query.shape[-1]:
            # Values of another width have no fused kernel on CPU: the attention of every pair is kept.
            each = query.new_empty(*query.shape[:3], key.shape[2])
            scores = torch.empty_like(each)
            del scores
        added = None if mask is None else query.new_empty(mask.shape)
        ctx.save_for_backward(query, key, value, out, each, added)
        return out

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, _, each, _ = ctx.saved_tensors
        if each.dim() == 4:
            scores = [torch.empty_like(each), torch.empty_like(each)]
            del scores
        return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value), None


class _LossStandIn(torch.autograd.Function):
    """kernels/cross_entropy.py in sizes, with a label on every token: a chunk of logits, and the gradient of hidden [n, H]."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, capped: bool) -> Tensor:
        rows = min(len(hidden), CHUNK, rows_at_once(weight.shape[0], _here.on_gpu, _here.fused))
        grad = torch.empty_like(hidden)
        grad_w = weight.new_empty(weight.shape, dtype=torch.float32) if weight.requires_grad else None
        x = hidden.new_empty(rows, hidden.shape[1])
        given = hidden.new_empty(rows, weight.shape[0])
        if not _here.fused:
            wide = given.float()
            del given
            slope = torch.empty_like(wide) if capped else None
            del slope
            given = wide.to(hidden.dtype)
            del wide
        del given, x
        ctx.save_for_backward(grad, grad_w)
        ctx.dtype = weight.dtype
        return hidden.new_empty((), dtype=torch.float32)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        grad, grad_w = ctx.saved_tensors
        whole, scaled = torch.empty_like(grad), grad.clone()
        del scaled
        return whole, None if grad_w is None else grad_w.to(ctx.dtype), None
