"""What a model has read: immutable segments that requests share, and each request's own tail.

    Segment     a span of ids whose keys and values are final: read once, used by every request that begins with it
    Reading     one request's way through a model: the segments it stands on, and what it has read since

A model's layers keep the past in one of three ways. Full attention keeps every key and value: a segment holds those of its own
span. Sliding attention keeps the last window, recurrent layers a state of fixed size: a segment holds them as they were at its end.
Legend: K key-value heads, T tokens, D head size, W window.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import DynamicCache, PretrainedConfig
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer, LinearAttentionCacheLayerMixin

from ropewalk.errors import ModelError

GROWTH = 256  # tokens by which a tail's buffer grows

Kind = Literal["full", "sliding", "recurrent"]
Pair = tuple[Tensor, Tensor]  # keys and values [1, K, T, D]


@dataclass(frozen=True)
class Layout:
    """How each layer of a model keeps the past."""

    config: PretrainedConfig
    kinds: tuple[Kind, ...]
    windows: tuple[int, ...]  # W of sliding layers; 0 elsewhere

    @classmethod
    def of(cls, config: PretrainedConfig) -> Layout:
        """Read off the cache that transformers makes for this configuration (of the text model)."""
        kinds: list[Kind] = []
        windows: list[int] = []
        for number, layer in enumerate(DynamicCache(config=config).layers):
            name = type(layer).__name__
            if isinstance(layer, LinearAttentionCacheLayerMixin) and not isinstance(layer, DynamicLayer):
                kinds.append("recurrent")
            elif type(layer) is DynamicSlidingWindowLayer:
                kinds.append("sliding")
            elif type(layer) is DynamicLayer:
                kinds.append("full")
            else:
                raise ModelError(
                    f"layer {number} of {config.model_type} keeps its past as {name}, which this engine does not know; "
                    "serve the model through another engine: a remote model"
                )
            windows.append(int(getattr(layer, "sliding_window", 0) or 0) if kinds[-1] == "sliding" else 0)
        if "chunked_attention" in (getattr(config, "layer_types", None) or ()):
            raise ModelError(f"{config.model_type} attends in chunks, which this engine does not know; use a remote model")
        return cls(config, tuple(kinds), tuple(windows))


@dataclass(frozen=True)
class State:
    """The fixed-size state of a recurrent layer; never changed in place."""

    convolutions: tuple[Tensor | None, ...]
    recurrents: tuple[Tensor | None, ...]
    kernel_sizes: tuple[Any, ...]


@dataclass(frozen=True, eq=False)
class Segment:
    """Ids that have been read, and what each layer keeps of them."""

    key: str
    start: int  # position of its first id
    ids: tuple[int, ...]
    layers: tuple[Pair | State, ...]  # full: its own span; sliding: the last W - 1 or fewer at its end; recurrent: its end

    @property
    def end(self) -> int:
        return self.start + len(self.ids)

    @property
    def nbytes(self) -> int:
        """Bytes of its tensors."""
        return sum(tensor.nbytes for layer in self.layers for tensor in tensors_of(layer))


def tensors_of(layer: Pair | State) -> list[Tensor]:
    """All tensors of what a layer keeps."""
    if isinstance(layer, State):
        return [tensor for tensor in (*layer.convolutions, *layer.recurrents) if tensor is not None]
    return list(layer)


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
class Reading:
    """One request's way through a model."""

    layout: Layout
    segments: list[Segment] = field(default_factory=list)
    position: int = 0  # ids read so far
    tails: list[Tail | None] = field(default_factory=list)  # per layer; of full layers: since the last segment
    states: DynamicCache | None = None  # of recurrent layers

    @classmethod
    def after(cls, layout: Layout, segments: Sequence[Segment]) -> Reading:
        """A reading that stands at the end of these segments, which follow one another."""
        last = segments[-1] if segments else None
        tails: list[Tail | None] = []
        states = DynamicCache(config=layout.config) if "recurrent" in layout.kinds else None
        for number, kind in enumerate(layout.kinds):
            kept = last.layers[number] if last else None
            if kind == "recurrent":
                tails.append(None)
                if isinstance(kept, State):
                    assert states is not None
                    _restore(states.layers[number], kept)
            else:
                tails.append(Tail(kept if kind == "sliding" and not isinstance(kept, State) else None))
        return cls(layout, list(segments), last.end if last else 0, tails, states)

    def close(self, key: str, ids: Sequence[int]) -> Segment:
        """What was read since the last segment becomes a segment of its own, on which this reading goes on."""
        start = self.segments[-1].end if self.segments else 0
        assert start + len(ids) == self.position
        layers: list[Pair | State] = []
        for number, kind in enumerate(self.layout.kinds):
            if kind == "recurrent":
                assert self.states is not None
                layers.append(_state_of(self.states.layers[number]))
                continue
            tail = self.tails[number]
            assert tail is not None
            count = len(ids) if kind == "full" else min(len(tail), self.layout.windows[number] - 1)
            keys, values = tail.last(count)
            layers.append((keys.contiguous().clone(), values.contiguous().clone()))
            if kind == "full":
                self.tails[number] = Tail()
        segment = Segment(key, start, tuple(ids), tuple(layers))
        self.segments.append(segment)
        return segment


def _state_of(layer: Any) -> State:
    def copies(tensors: Any) -> tuple[Tensor | None, ...]:
        return tuple(None if tensor is None else tensor.clone() for tensor in _listed(tensors, layer.number_of_states))

    return State(
        copies(layer.conv_states),
        copies(layer.recurrent_states),
        tuple(_listed(layer.conv_kernel_size, layer.number_of_states)),
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


@dataclass(frozen=True)
class Part:
    """The ids of one request in one step: rows [begin, end) of everything that the model computes."""

    reading: Reading
    begin: int
    end: int


class Batch:
    """What a model is given as `past_key_values`: the ids of several requests, one after another, without padding."""

    is_compileable = False

    def __init__(self, parts: Sequence[Part]) -> None:
        self.parts = tuple(parts)
        self._joined: DynamicCache | None = None

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return 0  # positions are given

    @contextmanager
    def joined(self, parts: Sequence[Part], layer_idx: int) -> Iterator[DynamicCache]:
        """The recurrent states of several readings beside each other; what becomes of them is theirs again afterwards."""
        layers: list[Any] = [part.reading.states.layers[layer_idx] for part in parts if part.reading.states is not None]
        if self._joined is None:
            self._joined = DynamicCache(config=parts[0].reading.layout.config)
        together: Any = self._joined.layers[layer_idx]
        for name in ("conv_states", "recurrent_states"):
            for index in range(together.number_of_states):
                own = [getattr(layer, name)[index] for layer in layers]
                if own[0] is not None:
                    getattr(together, name)[index] = torch.cat(own)
                    getattr(together, f"is_{name}_initialized")[index] = True
        for index in range(together.number_of_states):
            together.conv_kernel_size[index] = layers[0].conv_kernel_size[index]
            together.has_previous_state[index] = True
        together.dtype, together.device = layers[0].dtype, layers[0].device
        yield self._joined
        for name in ("conv_states", "recurrent_states"):
            for index in range(together.number_of_states):
                tensor = getattr(together, name)[index]
                for row, layer in enumerate(layers):
                    if tensor is not None:
                        getattr(layer, name)[index] = tensor[row : row + 1]

    def update(self, keys: Tensor, values: Tensor, layer_idx: int, *_: Any, **__: Any) -> Pair:
        """Appends new keys and values [1, K, T, D] to each request's tail; attention reads them from there."""
        for part in self.parts:
            tail = part.reading.tails[layer_idx]
            assert tail is not None
            tail.append(keys[:, :, part.begin : part.end], values[:, :, part.begin : part.end])
        return keys, values


focus: list[Sequence[Part]] = []  # the parts whose rows a recurrent layer is working on, if it is


@contextmanager
def focused(parts: Sequence[Part]) -> Iterator[None]:
    """Within it, the rows that layers see are those of these parts alone."""
    focus.append(parts)
    try:
        yield
    finally:
        focus.pop()


def per_request(module: Any) -> None:
    """Makes a recurrent layer run each request of a batch on that request's own state."""
    plain = module.forward

    def forward(hidden_states: Tensor, cache_params: Any = None, attention_mask: Any = None, **more: Any) -> Tensor:
        if not isinstance(cache_params, Batch):
            return plain(hidden_states, cache_params=cache_params, attention_mask=attention_mask, **more)  # type: ignore[no-any-return]
        outs = [hidden_states[:, :0]] * len(cache_params.parts)
        single = [n for n, part in enumerate(cache_params.parts) if part.end - part.begin == 1]
        if len(single) > 1:  # they decode: one call with their states beside each other
            parts = [cache_params.parts[n] for n in single]
            own = torch.cat([hidden_states[:, part.begin : part.end] for part in parts])
            with cache_params.joined(parts, module.layer_idx) as states, focused(parts):
                for n, out in zip(single, plain(own, cache_params=states, attention_mask=None, **more).split(1)):
                    outs[n] = out
        for n, part in enumerate(cache_params.parts):
            if n in single and len(single) > 1:
                continue
            with focused([part]):
                own = hidden_states[:, part.begin : part.end]
                outs[n] = plain(own, cache_params=part.reading.states, attention_mask=None, **more)
        return torch.cat(outs, dim=1)

    module.forward = forward
