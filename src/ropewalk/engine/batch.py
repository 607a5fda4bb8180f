"""The ids of several requests in one step, and what a model is given as their past.

Requests that decode have their past beside each other, in pages and joined states; each of the others has its own.
Legend: B requests that decode, K key-value heads, T ids of a step, D head size.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ropewalk.engine.cache import Kind, Pair, Reading
from ropewalk.engine.crowd import Crowd


@dataclass(frozen=True)
class Part:
    """The ids of one request in one step: rows [begin, end) of everything that the model computes."""

    reading: Reading
    begin: int
    end: int
    mutual: Mapping[Kind, Tensor] = field(
        default_factory=dict
    )  # [T, T]: which ids see which, in layers of a kind, also backwards


class Batch:
    """What a model is given as `past_key_values`: the ids of several requests, one after another, without padding."""

    is_compileable = False

    def __init__(self, parts: Sequence[Part], device: torch.device | str = "cpu", crowd: Crowd | None = None) -> None:
        self.parts, self.device, self.crowd = tuple(parts), device, crowd
        together = {id(reading) for reading in crowd.readings} if crowd is not None else set[int]()
        self.decoding = [part for part in parts if id(part.reading) in together]  # those of the crowd, in its order
        self.others = [part for part in parts if id(part.reading) not in together]
        for part in self.others:
            part.reading.gather()
        self.rows = _rows(self.decoding, device)
        self.order = _order([*self.decoding, *self.others], device)
        self._behind: Tensor | None = None
        self.attended: set[int] = set()  # layers that have asked for attention
        self.given: dict[int, Pair] = {}  # per layer: the new keys and values that it was last given

    def get_seq_length(self, layer_idx: int | None = None) -> int | Tensor:
        """0, since positions are given; to a layer that counts for itself, what every row lies behind its position [T]."""
        if layer_idx is None:
            return 0
        if self._behind is None:
            behind = [part.reading.position - part.begin for part in self.parts]
            sizes = torch.tensor([part.end - part.begin for part in self.parts])
            self._behind = torch.repeat_interleave(torch.tensor(behind), sizes).to(self.device)
        return self._behind

    def update(self, keys: Tensor, values: Tensor, layer_idx: int, *_: Any, **__: Any) -> Pair:
        """Appends new keys and values [1, K, T, D] to each request's own; attention reads them from there."""
        self.given[layer_idx] = keys, values
        kept = keys, values
        if layer_idx in self.parts[0].reading.layout.latents:
            kept = torch.cat(kept, dim=-1), keys[..., :0]
        if self.crowd is not None:
            table = self.crowd.table(layer_idx)
            table.pool.write(layer_idx, table.places, *(new[0, :, self.rows].transpose(0, 1) for new in kept))
        for part in self.others:
            tail = part.reading.tails[layer_idx]
            assert tail is not None
            tail.append(*(new[:, :, part.begin : part.end] for new in kept))
        return keys, values


def _rows(parts: Sequence[Part], device: torch.device | str) -> slice | Tensor:
    """The rows of requests that have one each."""
    begins = [part.begin for part in parts]
    if begins == list(range(len(begins))):
        return slice(0, len(begins))
    return torch.tensor(begins, device=device)


def _order(parts: Sequence[Part], device: torch.device | str) -> Tensor | None:
    """Where every row of a step is found among those of these parts, one part after another; None: where it is anyway."""
    rows = [row for part in parts for row in range(part.begin, part.end)]
    if rows == list(range(len(rows))):
        return None
    return torch.tensor(rows, device=device).argsort()
