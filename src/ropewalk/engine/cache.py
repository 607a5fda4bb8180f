"""What a model has read: immutable segments that requests share, and each request's own tail.

    Segment     a span of ids whose keys and values are final: read once, used by every request that begins with it
    Reading     one request's way through a model: the segments it stands on, and what it has read since

A model's layers keep the past in one of four ways. Full attention keeps every key and value: a segment holds those of its own
span. Sliding attention keeps the last window, chunked attention those of the chunk it is in, recurrent layers a state of fixed size: a
segment holds them as they were at its end. A layer may also attend to what an earlier one keeps, or keep nothing.
Legend: K key-value heads, T tokens, D head size, W window.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import torch
import transformers
from torch import Tensor
from transformers import DynamicCache, PretrainedConfig
from transformers.cache_utils import LinearAttentionCacheLayerMixin

from ropewalk.errors import ModelError

ELSEWHERE = "serve the model through another engine, as a remote model"
GROWTH = 256  # tokens by which a tail's buffer grows

Kind = Literal["full", "sliding", "chunked", "recurrent", "none"]
Pair = tuple[Tensor, Tensor]  # keys and values [1, K, T, D]

_KINDS: dict[str, Kind] = {  # of transformers' cache layers
    "DynamicLayer": "full",
    "DynamicSlidingWindowLayer": "sliding",
    "LinearAttentionLayer": "recurrent",
    "LinearAttentionAndFullAttentionLayer": "full",
    "LinearAttentionAndSlidingWindowAttentionLayer": "sliding",
    "DummyLayer": "none",
}


@dataclass(frozen=True)
class Layout:
    """How each layer of a model keeps the past."""

    config: PretrainedConfig
    kinds: tuple[Kind, ...]
    windows: tuple[int, ...]  # W of sliding layers, the size of a chunk of chunked ones; 0 elsewhere
    states: tuple[bool, ...]  # whether a layer has a recurrent state; some have one beside their attention
    sources: tuple[int, ...]  # the layer whose keys and values a layer attends to: nearly always itself
    latents: frozenset[int] = (
        frozenset()
    )  # layers that keep latents and rotated keys, here beside each other as keys, and no values

    @classmethod
    def of(cls, config: PretrainedConfig) -> Layout:
        """Read off the cache that transformers makes for this configuration (of the text model)."""
        kinds: list[Kind] = []
        windows: list[int] = []
        states: list[bool] = []
        types = getattr(config, "layer_types", None) or ()
        for number, layer in enumerate(DynamicCache(config=config).layers):
            kind = _KINDS.get(type(layer).__name__)
            if kind is None:
                raise ModelError(
                    f"layer {number} of {config.model_type} keeps its past as {type(layer).__name__}, which this engine does not "
                    f"know; {ELSEWHERE}"
                )
            window = int(getattr(layer, "sliding_window", 0) or 0) if kind == "sliding" else 0
            kinds.append("chunked" if window and len(types) > number and types[number] == "chunked_attention" else kind)
            windows.append(window)
            states.append(isinstance(layer, LinearAttentionCacheLayerMixin))
        return cls(config, tuple(kinds), tuple(windows), tuple(states), _sources(config, len(kinds)))


def _sources(config: PretrainedConfig, count: int) -> tuple[int, ...]:
    """Layers that share keys and values read those of the last layer of their type that stores them."""
    sources = list(range(count))
    modes = getattr(config, "kv_sharing_modes", None) or [None] * count
    shared = int(getattr(config, "num_kv_shared_layers", 0) or 0)
    if shared and "reuse" not in modes:
        raise ModelError(
            f"layers of {config.model_type} share keys and values in a way that transformers {transformers.__version__} does not "
            "tell; install transformers 5.23 or newer"
        )
    for number, mode in enumerate(modes):
        if mode == "reuse":
            alike = [n for n in range(number) if modes[n] == "store" and config.layer_types[n] == config.layer_types[number]]
            sources[number] = alike[-1]
    return tuple(sources)


@dataclass(frozen=True)
class State:
    """The fixed-size state of a recurrent layer, and what attention beside it keeps; never changed in place."""

    convolutions: tuple[Tensor | None, ...]
    recurrents: tuple[Tensor | None, ...]
    kernel_sizes: tuple[Any, ...]
    pair: Pair | None = None


Layer = Pair | State | None  # what one layer keeps


@dataclass(frozen=True, eq=False)
class Segment:
    """Ids that have been read, and what each layer keeps of them."""

    key: str
    start: int  # position of its first id
    ids: tuple[int, ...]
    layers: tuple[Layer, ...]  # full: its own span; sliding: the last W - 1 or fewer at its end; recurrent: its end
    shift: int = 0  # from the count of ids at its end to the place the model gives them: a picture's lie beside each other
    routing: Tensor | None = None  # int16 [ids, layers, k]: the experts of each id, where they are recorded

    @property
    def end(self) -> int:
        return self.start + len(self.ids)

    @property
    def nbytes(self) -> int:
        """Bytes of its tensors."""
        return sum(tensor.nbytes for layer in self.layers for tensor in tensors_of(layer))

    def pair(self, layer: int) -> Pair | None:
        """The keys and values that a layer keeps."""
        kept = self.layers[layer]
        return kept.pair if isinstance(kept, State) else kept


def tensors_of(layer: Layer) -> list[Tensor]:
    """All tensors of what a layer keeps."""
    if isinstance(layer, State):
        states = [tensor for tensor in (*layer.convolutions, *layer.recurrents) if tensor is not None]
        return states + list(layer.pair or ())
    return list(layer or ())


class Tail:
    """Keys and values of one attention layer that belong to one request alone."""

    __slots__ = ("_keys", "_values", "begin", "length")

    def __init__(self, before: Pair | None = None) -> None:
        self._keys: Tensor | None = None
        self._values: Tensor | None = None
        self.begin = self.length = 0  # [begin, length) of the buffer is alive
        if before is not None:
            self.append(*before)

    def append(self, keys: Tensor, values: Tensor) -> None:
        """More of them [1, K, T, D]."""
        more = keys.shape[2]
        if self._keys is None or self._values is None or self._keys.shape[2] < self.length + more:
            self._keys = self._grown(self._keys, keys, more)
            self._values = self._grown(self._values, values, more)
            self.begin, self.length = 0, self.length - self.begin
        self._keys[:, :, self.length : self.length + more] = keys
        self._values[:, :, self.length : self.length + more] = values
        self.length += more

    def last(self, count: int) -> Pair:
        """The last `count` of them, as views."""
        keys, values = self._keys, self._values
        assert keys is not None
        assert values is not None
        span = slice(max(self.begin, self.length - count), self.length)
        return keys[:, :, span], values[:, :, span]

    def forget_before(self, count: int) -> None:
        """Keeps the last `count`."""
        self.begin = max(self.begin, self.length - count)

    def __len__(self) -> int:
        return self.length - self.begin

    def _grown(self, old: Tensor | None, like: Tensor, more: int) -> Tensor:
        alive = self.length - self.begin
        size = alive + more + max(GROWTH, alive // 4)
        new = like.new_empty(*like.shape[:2], size, like.shape[3])
        if old is not None:
            new[:, :, :alive] = old[:, :, self.begin : self.length]
        return new


@dataclass(eq=False)
class Held:
    """What a request that decodes has in one pool of pages, oldest first; see pages.py."""

    pages: list[int] = field(default_factory=list)
    begin: int = 0  # tokens [begin, length) of its pages are alive
    length: int = 0

    def __len__(self) -> int:
        return self.length - self.begin


class Keeper(Protocol):
    """Who keeps what requests that decode have read, for all of them together."""

    def give_back(self, reading: Reading) -> None:
        """The reading has it to itself again."""


@dataclass(eq=False)
class Reading:
    """One request's way through a model."""

    layout: Layout
    segments: list[Segment] = field(default_factory=list)
    position: int = 0  # ids read so far
    tails: list[Tail | None] = field(default_factory=list)  # per layer: since the last segment
    states: DynamicCache | None = None  # of recurrent layers
    shift: int = 0  # from `position` to the place that the model gives the next id
    held: list[Held] = field(default_factory=list)  # while it decodes: per pool, instead of tails
    keepers: list[Keeper] = field(default_factory=list)
    routed: list[Tensor] = field(default_factory=list)  # int16 [ids, layers, k], since the last segment, where it is recorded

    def gather(self) -> None:
        """Everything it has read is its own again: it does not decode, or not for now."""
        keepers, self.keepers = self.keepers, []
        for keeper in keepers:
            keeper.give_back(self)

    @classmethod
    def after(cls, layout: Layout, segments: Sequence[Segment]) -> Reading:
        """A reading that stands at the end of these segments, which follow one another."""
        last = segments[-1] if segments else None
        tails: list[Tail | None] = []
        states = DynamicCache(config=layout.config) if any(layout.states) else None
        for number, kind in enumerate(layout.kinds):
            kept = last.layers[number] if last else None
            if states is not None and isinstance(kept, State):
                _restore(states.layers[number], kept)
            tails.append(None if kind in ("recurrent", "none") else Tail())
        return cls(layout, list(segments), last.end if last else 0, tails, states, last.shift if last else 0)

    def close(self, key: str, ids: Sequence[int]) -> Segment:
        """What was read since the last segment becomes a segment of its own, on which this reading goes on."""
        self.gather()
        start = self.segments[-1].end if self.segments else 0
        assert start + len(ids) == self.position
        layers: list[Layer] = []
        for number, kind in enumerate(self.layout.kinds):
            pair, tail = None, self.tails[number]
            if tail is not None:
                keys, values = tail.last(len(ids)) if kind == "full" else self.window(number, self.seen_before(number))
                pair = keys.contiguous().clone(), values.contiguous().clone()
                self.tails[number] = Tail()
            states = self.states.layers[number] if self.states is not None and self.layout.states[number] else None
            layers.append(pair if states is None else _state_of(states, pair))
        routing, self.routed = torch.cat(self.routed) if self.routed else None, []
        segment = Segment(key, start, tuple(ids), tuple(layers), self.shift, routing)
        self.segments.append(segment)
        return segment

    def routing(self) -> Tensor | None:
        """int16 [ids read so far, layers, k]: the experts of each, where they are recorded; -1 of a segment that was read before."""
        known = [*(segment.routing for segment in self.segments), *self.routed]
        like = next((rows for rows in known if rows is not None), None)
        if like is None:
            return None
        spans = [len(segment.ids) for segment in self.segments] + [len(rows) for rows in self.routed]
        return torch.cat(
            [like.new_full((span, *like.shape[1:]), -1) if rows is None else rows for span, rows in zip(spans, known)]
        )

    def window(self, layer: int, count: int) -> Pair:
        """The last `count` keys and values of a layer that keeps no more than its window, also those that its last segment holds."""
        tail = self.tails[layer]
        assert tail is not None
        before = self.segments[-1].pair(layer) if self.segments else None
        more = count - len(tail)
        if before is None or more <= 0 or before[0].shape[2] == 0:
            return tail.last(count)
        held = before[0][:, :, -more:], before[1][:, :, -more:]
        if len(tail) == 0:
            return held
        keys, values = tail.last(count)
        return torch.cat([held[0], keys], dim=2), torch.cat([held[1], values], dim=2)

    def seen_before(self, layer: int) -> int:
        """How many ids before the next one a layer sees that keeps no more than its window: the rest of it, or of its chunk."""
        window = self.layout.windows[layer]
        return window - 1 if self.layout.kinds[layer] == "sliding" else self.position % window


def _state_of(layer: Any, pair: Pair | None) -> State:
    def copies(tensors: Any) -> tuple[Tensor | None, ...]:
        return tuple(None if tensor is None else tensor.clone() for tensor in _listed(tensors, layer.number_of_states))

    return State(
        copies(layer.conv_states),
        copies(layer.recurrent_states),
        tuple(_listed(layer.conv_kernel_size, layer.number_of_states)),
        pair,
    )


def _restore(layer: Any, state: State) -> None:
    # The model writes into these states, so each reading has copies of its own.
    for index, (convolution, recurrent) in enumerate(zip(state.convolutions, state.recurrents)):
        for tensor, values, flags in (
            (convolution, layer.conv_states, layer.is_conv_states_initialized),
            (recurrent, layer.recurrent_states, layer.is_recurrent_states_initialized),
        ):
            if tensor is not None:
                values[index], flags[index] = tensor.clone(), True
                layer.dtype, layer.device = tensor.dtype, tensor.device
        layer.conv_kernel_size[index] = state.kernel_sizes[index]
        layer.has_previous_state[index] = True


def _listed(values: Any, count: int) -> list[Any]:
    return [values[index] for index in range(count)]
