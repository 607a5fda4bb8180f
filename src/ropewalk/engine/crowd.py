"""Requests that decode together, and what stays the same from step to step while they do.

That is who stands on which segment, whose page is whose, and the states of recurrent layers, which lie beside each other as long as
nobody joins or leaves.
Legend: B requests, P pages, N tokens of a page, one row of a step per request.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from ropewalk.engine.cache import Held, Reading, Segment
from ropewalk.engine.pages import PAGE, Pages, Pool
from ropewalk.kernels.attend import Alive

_STATES = ("conv_states", "recurrent_states")


@dataclass(frozen=True)
class Standing:
    """A segment, and who attends to it."""

    segment: Segment
    rows: list[int]
    last: int = 0  # how many of its last keys are seen by anybody; 0: all
    seen: Tensor | None = None  # [rows, last]: who sees which of those; None: all see all

    def select(self, query: Tensor) -> Tensor:
        """query [K, B, G, D] -> that of its rows."""
        first, count = self.rows[0], len(self.rows)
        if count == query.shape[1]:
            return query
        if self.rows == list(range(first, first + count)):
            return query[:, first : first + count]
        return query[:, torch.tensor(self.rows, device=query.device)]


class Table:
    """What a step's attention has to know of one pool."""

    def __init__(self, pool: Pool, readings: Sequence[Reading], held: Sequence[Held], device: torch.device | str) -> None:
        self.pool, self._readings, self._held, self._device = pool, readings, held, device
        self._version = -1
        self.places: Tensor  # [B], where new keys go
        self.pages: Tensor | None = None  # [P], those of these requests; None: all that are in use
        self.owner: Tensor | None = None  # [P], whose they are; None: the n-th is the n-th request's
        self.width = 0  # tokens of every page that are looked at
        self.alive: Alive | None = None  # which of them there are
        self.standing = [] if pool.window else _standing(readings)
        self.order: Tensor | None = (
            None  # [depth * B]: of all pieces' rows, each request's first, second, ..; None: as they lie
        )
        self.depth = 1
        self.lacking: Tensor | None = None  # [depth, B], where a request has no so many-th piece

    def advance(self) -> None:
        """Room for one more token of each request."""
        free = []
        for reading, held in zip(self._readings, self._held):
            self.pool.lengthen(held)
            if self.pool.window:
                free += self.pool.shorten(held, held.length - reading.seen_before(self.pool.layers[0]) - 1)
        self.pool.release(free)
        places, ends = [], []
        single = True
        for held in self._held:
            last = len(held.pages) - 1
            end = held.length - last * PAGE
            places.append(held.pages[last] * PAGE + end - 1)
            ends.append(end)
            single = single and not last
        self.places = torch.tensor(places, device=self._device)
        changed = self._version != self.pool.version
        if self.pool.window:
            before = [(standing.segment, standing.rows) for standing in self.standing]
            self.standing = self._windows()
            changed = changed or before != [(standing.segment, standing.rows) for standing in self.standing]
        if changed:
            self._lay_out()
            self._version = self.pool.version
        self.width = max(ends) if single else PAGE
        self.alive = self._alive(ends)

    def _lay_out(self) -> None:
        """The order of pages and pieces."""
        owners = {page: row for row, held in enumerate(self._held) for page in held.pages}
        pages = sorted(owners)
        self.pages = None if len(pages) == len(self.pool) else torch.tensor(pages, device=self._device)
        mine = [owners[page] for page in pages]
        self.owner = None if mine == list(range(len(self._held))) else torch.tensor(mine, device=self._device)
        place = {page: n for n, page in enumerate(pages)}
        pieces = [[place[page] for page in held.pages] for held in self._held]
        self._order_of_pages = [page for page, _ in sorted(place.items(), key=lambda item: item[1])]
        count = len(pages)
        for standing in self.standing:
            for row in standing.rows:
                pieces[row].append(count)
                count += 1
        self.depth = max(map(len, pieces))
        order = [row[n] if n < len(row) else row[0] for n in range(self.depth) for row in pieces]
        lacking = [n >= len(row) for n in range(self.depth) for row in pieces]
        self.order = None if order == list(range(count)) else torch.tensor(order, device=self._device)
        self.lacking = torch.tensor(lacking, device=self._device).view(self.depth, -1) if any(lacking) else None

    def _alive(self, ends: Sequence[int]) -> Alive | None:
        spans = {}
        for held, end in zip(self._held, ends):
            for page in held.pages:
                spans[page] = (0, self.width)
            spans[held.pages[0]] = (held.begin, self.width)
            spans[held.pages[-1]] = (held.begin if len(held.pages) == 1 else 0, end)
        bounds = [spans[page] for page in self._order_of_pages]
        if all(span == (0, self.width) for span in bounds):
            return None
        begin, until = torch.tensor(bounds, device=self._device).t()[..., None]
        token = torch.arange(self.width, device=self._device)
        return Alive((token >= begin) & (token < until))

    def _windows(self) -> list[Standing]:
        """What they still see of the segments that they stand on, in layers that see a window."""
        readers: dict[Segment, dict[int, int]] = defaultdict(dict)  # row -> how many of the segment's last keys it sees
        layer = self.pool.layers[0]
        for row, (reading, held) in enumerate(zip(self._readings, self._held)):
            if reading.segments and (left := reading.seen_before(layer) + 1 - len(held)) > 0:
                readers[reading.segments[-1]][row] = left
        found = []
        for segment, those in readers.items():
            pair = segment.pair(layer)
            if pair is None or pair[0].shape[2] == 0:
                continue
            last = min(max(those.values()), pair[0].shape[2])
            seen = torch.arange(last, 0, -1) <= torch.tensor(list(those.values()))[:, None]
            found.append(Standing(segment, list(those), last, None if bool(seen.all()) else seen.to(self._device)))
        return found


def _standing(readings: Sequence[Reading]) -> list[Standing]:
    """Every segment, with the requests that stand on it, in the order in which they are read."""
    readers: dict[Segment, list[int]] = defaultdict(list)
    for row, reading in enumerate(readings):
        for segment in reading.segments:
            readers[segment].append(row)
    return [Standing(segment, rows) for segment, rows in readers.items()]


class Crowd:
    """Some readings of which each reads one id a step."""

    def __init__(self, readings: Sequence[Reading], pages: Pages, device: torch.device | str) -> None:
        self.readings = list(readings)
        pages.sweep()
        for reading in readings:
            if pages not in reading.keepers:
                pages.take(reading)
        self._tables: dict[int, Table] = {}
        for number, pool in enumerate(pages.pools):
            table = Table(pool, self.readings, [reading.held[number] for reading in readings], device)
            self._tables |= dict.fromkeys(pool.layers, table)
        self._joined: DynamicCache | None = None
        self._layers: set[int] = set()  # whose states lie beside each other

    def is_of(self, readings: Sequence[Reading]) -> bool:
        """Whether it is these, in this order."""
        return len(readings) == len(self.readings) and all(one is other for one, other in zip(readings, self.readings))

    def advance(self) -> None:
        """Another step begins."""
        for table in {id(table): table for table in self._tables.values()}.values():
            table.advance()

    def table(self, layer: int) -> Table:
        return self._tables[layer]

    def joined(self, layer: int) -> DynamicCache:
        """The recurrent states of a layer beside each other; they are the readings' own again once it is settled."""
        if self._joined is None:
            self._joined = DynamicCache(config=self.readings[0].layout.config)
            for reading in self.readings:
                reading.keepers.append(self)
        if layer not in self._layers:
            self._layers.add(layer)
            self._join(self._joined.layers[layer], self._own(layer))
        return self._joined

    def settle(self) -> None:
        """Every reading has its own states again."""
        for layer in self._layers:
            assert self._joined is not None
            together: Any = self._joined.layers[layer]
            for name in _STATES:
                for index in range(together.number_of_states):
                    tensor = getattr(together, name)[index]
                    for row, one in enumerate(self._own(layer)):
                        if tensor is not None:
                            getattr(one, name)[index] = tensor[row : row + 1]
        for reading in self.readings:
            if self in reading.keepers:
                reading.keepers.remove(self)
        self._joined, self._layers = None, set()

    def give_back(self, reading: Reading) -> None:
        self.settle()

    def _own(self, layer: int) -> list[Any]:
        return [reading.states.layers[layer] for reading in self.readings if reading.states is not None]

    @staticmethod
    def _join(together: Any, layers: Sequence[Any]) -> None:
        for name in _STATES:
            for index in range(together.number_of_states):
                own = [getattr(layer, name)[index] for layer in layers]
                if own[0] is not None:
                    getattr(together, name)[index] = torch.cat(own)
                    getattr(together, f"is_{name}_initialized")[index] = True
                    for layer in layers:
                        getattr(layer, name)[index] = None
        for index in range(together.number_of_states):
            together.conv_kernel_size[index] = layers[0].conv_kernel_size[index]
            together.has_previous_state[index] = True
        together.dtype, together.device = layers[0].dtype, layers[0].device
