"""Frozen weights of decoder layers that wait on the host and come to the device layer by layer, forwards and then backwards.

    experts   the stacks of experts, in whatever format they are kept
    layers    every frozen weight of a layer

A layer's tensors stay the objects that they were: while the layer computes their data lies in the ring (models/ring.py), else they
stand for it with a single number of their shape, so that asking for shape, type and device is answered as ever. What autograd would
keep of a weight is kept as its place in the layer, and fetched by that in the backward pass: nothing holds a buffer of the ring past
its layer's turn. The numbers are those of a model that lies on the device, to the bit.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, Self

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from transformers import PreTrainedModel

from ropewalk.errors import ModelError
from ropewalk.kernels.quant import Quantised
from ropewalk.models.experts import LORA, expert_modules
from ropewalk.models.recompute import decoder_layers
from ropewalk.models.ring import ALIGNED, Ring, host_block

Part = Literal["experts", "layers"]
SLOTS = 2  # the layer that computes and the next; with one more a copy may begin before the layer ends


@dataclass(frozen=True)
class Streaming:
    """What waits on the host, and how many layers of it are on the device at once."""

    part: Part
    slots: int = SLOTS


@dataclass(frozen=True)
class _Kept:
    """What is kept for the backward pass of a tensor that lies in the ring: where it lay."""

    layer: int
    offset: int
    dtype: torch.dtype
    size: torch.Size
    stride: tuple[int, ...]


class Streamed:
    """The layers of a model whose weights come and go."""

    def __init__(self, layers: Sequence[tuple[nn.Module, list[Tensor]]], streaming: Streaming, device: torch.device) -> None:
        self.slots = streaming.slots
        self._tensors = [tensors for _, tensors in layers]
        host, places = [], []
        for _, tensors in layers:
            block, offsets = _gathered(tensors, device)
            host.append(block)
            places.append(offsets)
            for tensor in tensors:
                tensor.data = _stand_in(tensor, device)  # the original goes before the next layer is copied
        self.ring = Ring(host, streaming.slots, device)
        self._views = [
            [[_view(buffer, o, t.dtype, t.shape) for o, t in zip(offsets, tensors)] for buffer in self.ring.buffers]
            for offsets, tensors in zip(places, self._tensors)
        ]
        self._absent = [[tensor.data for tensor in tensors] for tensors in self._tensors]
        self._buffers = {buffer.untyped_storage().data_ptr() for buffer in self.ring.buffers}
        self._at: int | None = None  # whose turn it is
        for number, (layer, _) in enumerate(layers):
            layer.forward = partial(self._forward, number, layer)

    def __deepcopy__(self, memo: Any) -> Self:
        return self  # a second tree over the same tensors shares their ring

    @property
    def host_bytes(self) -> int:
        """What waits on the host."""
        return sum(block.nbytes for block in self.ring.host)

    def _forward(self, number: int, layer: Any, *args: Any, **kwargs: Any) -> Any:
        backwards = torch._C._current_graph_task_id() != -1  # a layer that is computed again
        learns = torch.is_grad_enabled()
        self._visit(number, self._behind(number) if backwards else self._ahead(number, learns))
        # A layer that will be computed again keeps nothing, and its own hooks see to that.
        again = layer.gradient_checkpointing and layer.training
        hooks = torch.autograd.graph.saved_tensors_hooks(partial(self._pack, number), self._unpack)
        with hooks if learns and not again else nullcontext():
            out = type(layer).forward(layer, *args, **kwargs)
        hidden = next((leaf for leaf in tree_leaves(out) if isinstance(leaf, Tensor)), None)
        if hidden is not None and hidden.requires_grad and not backwards:
            hidden.register_hook(lambda gradient: self._visit(number, self._behind(number)))  # type: ignore[no-untyped-call]
        return out

    def _ahead(self, number: int, learns: bool) -> list[int]:
        """Who comes after a layer in the forward pass: those behind it, or where nothing is learnt the first of the next pass."""
        last = len(self._tensors) - 1
        if number == last and learns:
            return self._behind(number)
        return [(number + step) % (last + 1) for step in range(1, self.slots) if number + step <= last or not learns]

    def _behind(self, number: int) -> list[int]:
        return [number - step for step in range(1, self.slots) if number >= step]

    def _visit(self, number: int, then: Sequence[int]) -> None:
        """It is the layer's turn: its weights are there, and those that come `then` are on their way."""
        if self.ring.poisoned and self._at not in (None, number):
            self._leave(self._at)
        self._at = number
        self._bring(number)
        self.ring.wait(number)
        for other in then:
            self._bring(other)

    def _bring(self, number: int) -> None:
        was = self.ring.slot(number)
        slot, gone = self.ring.bring(number, but=self._at)
        if gone is not None:
            self._point(gone, self._absent[gone])
        if was is None:
            self._point(number, self._views[number][slot])

    def _leave(self, number: int | None) -> None:
        if number is not None and self.ring.slot(number) is not None:
            self._point(number, self._absent[number])
            self.ring.give_back(number)

    def _point(self, number: int, data: Sequence[Tensor]) -> None:
        for tensor, lies in zip(self._tensors[number], data):
            tensor.data = lies

    def _pack(self, number: int, tensor: Tensor) -> Tensor | _Kept:
        if tensor.untyped_storage().data_ptr() not in self._buffers:
            return tensor.detach()
        return _Kept(number, int(tensor.storage_offset()) * tensor.itemsize, tensor.dtype, tensor.shape, tensor.stride())

    def _unpack(self, kept: Tensor | _Kept) -> Tensor:
        if isinstance(kept, Tensor):
            return kept
        if self._at != kept.layer:
            self._visit(kept.layer, self._behind(kept.layer))
        slot = self.ring.slot(kept.layer)
        assert slot is not None
        return _view(self.ring.buffers[slot], kept.offset, kept.dtype, kept.size, kept.stride)


def stream(model: PreTrainedModel, streaming: Streaming, device: torch.device, *, besides: Collection[str] = ()) -> Streamed:
    """Takes what is to be streamed from where it lies to the host, and everything else to the device; names as of `streamed`."""
    layers: list[Any] = list(decoder_layers(model))
    found = streamed(model, streaming.part, besides)
    if not any(found):
        what = "experts" if streaming.part == "experts" else "decoder layers"
        other = "; write stream_weights: layers" if layers and streaming.part == "experts" else "; leave stream_weights out"
        raise ModelError(f"{type(model).__name__} has no frozen {what} that could be streamed from the host{other}")
    waiting = {id(tensor) for tensors in found for tensor in tensors.values()}
    for tensor in (*model.parameters(), *model.buffers()):
        if id(tensor) not in waiting:
            tensor.data = tensor.data.to(device)
    chosen = [(layer, list(tensors.values())) for layer, tensors in zip(layers, found) if tensors]
    return Streamed(chosen, streaming, device)


def streamed(model: PreTrainedModel, part: Part, besides: Collection[str] = ()) -> list[dict[str, Tensor]]:
    """For each decoder layer the tensors that would be streamed, by name; not the modules `besides`, named by the ends of their names.

    A quantised weight's tensors are named by the weight and their own name: what follows `weights_of` finds the weight.
    """
    shared = Counter(id(p) for _, p in model.named_parameters(remove_duplicate=False))
    names = {id(module): name for name, module in model.named_modules()}
    found = []
    for layer in decoder_layers(model):
        experts = [name for name, _ in expert_modules(layer)]
        there: dict[str, Tensor] = {}
        for path, module in layer.named_modules():
            inside = part == "layers" or any(path == name or path.startswith(f"{name}.") for name in experts)
            full = names[id(module)]
            if not inside or LORA in path.split(".") or any(_below(full, name) for name in besides):
                continue
            held = module.named_buffers(recurse=False) if isinstance(module, Quantised) else _frozen(module)
            there |= {f"{full}.{name}": tensor for name, tensor in held if shared[id(tensor)] < 2}
        found.append(there)
    return found


def aligned(size: float) -> int:
    """The bytes that a tensor takes in a block."""
    return -(-int(size) // ALIGNED) * ALIGNED


def _frozen(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    return ((name, p) for name, p in module.named_parameters(recurse=False) if not p.requires_grad)


def _below(full: str, name: str) -> bool:
    """Whether a module is the named one, or inside it."""
    return f".{full}.".find(f".{name}.") >= 0


def _gathered(tensors: Sequence[Tensor], device: torch.device) -> tuple[Tensor, list[int]]:
    """The tensors one behind another in a block of the host, and where each begins."""
    offsets, size = [], 0
    for tensor in tensors:
        offsets.append(size)
        size += aligned(tensor.nbytes)
    block = host_block(size, device)
    for tensor, offset in zip(tensors, offsets):
        _view(block, offset, tensor.dtype, tensor.shape).copy_(tensor)
    return block, offsets


def _stand_in(tensor: Tensor, device: torch.device) -> Tensor:
    value = float("nan") if tensor.is_floating_point() else 0
    return torch.full((), value, dtype=tensor.dtype, device=device).expand(tensor.shape)


def _view(block: Tensor, offset: int, dtype: torch.dtype, size: torch.Size, stride: Sequence[int] | None = None) -> Tensor:
    """The tensor whose bytes begin at `offset` of a block, contiguous where no stride is given."""
    empty = torch.empty(0, dtype=dtype, device=block.device)
    steps = torch.empty(size, device="meta").stride() if stride is None else stride
    begin = (block.storage_offset() + offset) // dtype.itemsize
    return empty.set_(block.untyped_storage(), begin, size, tuple(steps))
