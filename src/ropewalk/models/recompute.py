"""What each decoder layer keeps for the backward pass, and what it computes again: a way per layer.

    keep      everything that autograd and the experts' kernel keep
    experts   the experts keep their input and their routing; gate_up and what follows from it is computed again
    layer     the layer keeps its input and its routing; all of it is computed again
    offload   the same, and the input waits in the host's memory

None of them changes a bit of the result: what is computed again runs the same kernels on the same numbers, and the choice of experts is
kept, because a near tie could fall the other way.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from ropewalk.errors import ModelError
from ropewalk.models.experts import RECOMPUTE, expert_modules

Way = Literal["keep", "experts", "layer", "offload"]
WAYS: tuple[Way, ...] = ("keep", "experts", "layer", "offload")  # from the fastest to the leanest

ROUTING = frozenset({torch.ops.aten.topk.default, torch.ops.aten.sort.default, torch.ops.aten.sort.stable})

Wrap = Callable[[AbstractContextManager[Any]], AbstractContextManager[Any]]


def decoder_layers(model: nn.Module) -> nn.ModuleList:
    """The layers that can be computed again one by one, of the part that writes where a model also sees; the longest list of them."""
    part = model.get_decoder() if isinstance(model, PreTrainedModel) else model
    found = [m for m in part.modules() if isinstance(m, nn.ModuleList) and m and all(map(_again_possible, m))]
    return max(found, key=len, default=nn.ModuleList())


def _again_possible(module: nn.Module) -> bool:
    return isinstance(module, GradientCheckpointingLayer)


def recompute(model: nn.Module, ways: Sequence[Way] | Way, *, wrap: Wrap | None = None) -> None:
    """Sets the way of every layer, or one for all; `wrap` goes around the context of what is computed again."""
    layers = decoder_layers(model)
    each = [ways] * len(layers) if isinstance(ways, str) else list(ways)
    assert len(each) == len(layers), "a way for every layer"
    if not layers and ways != "keep":
        raise ModelError(f"{type(model).__name__} has no layers that can be computed again; leave gradient_checkpointing out")
    for number, way in enumerate(each):
        layer: Any = layers[number]
        layer.gradient_checkpointing = way in ("layer", "offload")
        layer._gradient_checkpointing_func = _Again(wrap, on_host=way == "offload")
        for _, module in expert_modules(layer):
            module.__dict__[RECOMPUTE] = way == "experts"


class _Again:
    """Calls a layer so that it keeps nothing but its input and its routing."""

    def __init__(self, wrap: Wrap | None, *, on_host: bool) -> None:
        self.wrap, self.on_host = wrap, on_host

    def __call__(self, layer: Callable[..., Any], *inputs: Any) -> Any:
        if not self.on_host:
            return checkpoint(layer, *inputs, use_reentrant=False, context_fn=self.contexts)
        on_gpu = any(isinstance(t, Tensor) and t.is_cuda for t in inputs)
        with torch.autograd.graph.save_on_cpu(pin_memory=on_gpu):
            return checkpoint(layer, *inputs, use_reentrant=False, context_fn=self.contexts)

    def contexts(self) -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
        """For the first time and for the second."""
        first = _Routed()
        again = _Rerouted(first)
        return first, again if self.wrap is None else self.wrap(again)


class _Watching(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """A mode beneath which what is compiled stays so: attention would hold all scores otherwise. No choice is made in there."""

    supports_higher_order_operators = True

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        return True


class _Routed(_Watching):
    """Keeps which values were chosen, in the order of the choices."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.chosen: list[Tensor] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func in ROUTING:
            self.chosen.append(out[1])
        return out


class _Rerouted(_Watching):
    """Gives the same choices again, with the values that stand there now: a model may have changed its own in place since."""

    def __init__(self, first: _Routed) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.first = first
        self.left: Iterator[Tensor] = iter(())

    def __enter__(self) -> Any:
        self.left = iter(self.first.chosen)
        return super().__enter__()  # type: ignore[no-untyped-call]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func not in ROUTING:
            return func(*args, **(kwargs or {}))
        chosen = next(self.left)
        return args[0].gather(_dimension(func, args, kwargs or {}), chosen), chosen


def _dimension(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> int:
    """Along which dimension topk(x, k, dim), sort(x, dim) and sort.stable(x, *, stable, dim) choose."""
    if "dim" in kwargs:
        return int(kwargs["dim"])
    place = 2 if func is torch.ops.aten.topk.default else 1
    return int(args[place]) if len(args) > place else -1
