"""Keys and values of requests that decode, page by page in tensors that all of them share, so that one call attends for everybody.

While it reads, a request has its past in a tail of its own; once it decodes, in pages ("PagedAttention", Kwon et al., 2023). The pages
in use are the first ones, the last of them filling every gap, so that a layer attends to them where they lie. Layers that keep and
forget alike have the same pages, and one account of them.
Legend: K key-value heads, N tokens, D head size, P pages.
"""

from __future__ import annotations

import weakref
from collections import defaultdict
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from ropewalk.engine.cache import Held, Kind, Layout, Pair, Reading, Tail

PAGE = 128  # tokens
LEAST = 16  # pages for which there is always room


class Pool:
    """The pages of all layers that keep and forget alike."""

    def __init__(self, kind: Kind, window: int, layers: Sequence[int]) -> None:
        self.kind, self.window, self.layers = kind, window, tuple(layers)
        self.version = 0  # changes when a page goes to another, or to another place
        self._owners: list[weakref.ref[Held]] = []  # of every page in use
        self._room = LEAST
        self._keys: dict[int, Tensor] = {}  # per layer [P, PAGE, K, D]
        self._values: dict[int, Tensor] = {}

    def __len__(self) -> int:
        """Pages in use."""
        return len(self._owners)

    def lengthen(self, held: Held, count: int = 1) -> None:
        """Room for more tokens at a request's end."""
        while len(held.pages) * PAGE < held.length + count:
            held.pages.append(len(self._owners))
            self._owners.append(weakref.ref(held))
            self.version += 1
        if len(self) > self._room:
            self._room = 2 * len(self)
        held.length += count

    def shorten(self, held: Held, begin: int) -> list[int]:
        """Tokens before `begin` are not seen any more; the pages that are free for it."""
        free = []
        held.begin = max(held.begin, begin)
        while held.begin >= PAGE:
            free.append(held.pages.pop(0))
            held.begin -= PAGE
            held.length -= PAGE
        return free

    @torch.inference_mode()
    def release(self, pages: Iterable[int]) -> None:
        """Gives pages back; the last ones move to where they were."""
        gone = set(pages)
        if not gone:
            return
        self.version += 1
        before, used = len(self), len(self) - len(gone)
        movers = [page for page in range(used, len(self)) if page not in gone]
        holes = sorted(page for page in gone if page < used)
        for mover, hole in zip(movers, holes):
            owner = self._owners[hole] = self._owners[mover]
            held = owner()
            if held is not None:
                held.pages[held.pages.index(mover)] = hole
        del self._owners[used:]
        if 4 * used < self._room:
            self._room = max(LEAST, 2 * used)
        for kept in (self._keys, self._values):
            for layer, old in kept.items():
                if movers:
                    old[torch.tensor(holes, device=old.device)] = old[torch.tensor(movers, device=old.device)]
                old[used:before] = 0  # what is masked weighs nothing, but nothing times what is no number is none
                if old.shape[0] > self._room:
                    kept[layer] = old[: self._room].clone()

    def sweep(self) -> None:
        """Gives back the pages of whoever is gone."""
        self.release([page for page, owner in enumerate(self._owners) if owner() is None])

    def write(self, layer: int, places: Tensor, keys: Tensor, values: Tensor) -> None:
        """keys and values [N, K, D] of a layer to these places [N]."""
        for kept, new in ((self._keys, keys), (self._values, values)):
            if new.shape[2]:
                self._of(kept, layer, new).flatten(0, 1).index_copy_(0, places, new)

    def read(self, layer: int, places: Tensor) -> Pair:
        """The keys and values at these places [1, K, N, D]."""
        keys, values = (kept.flatten(0, 1)[places].transpose(0, 1)[None] for kept in self._both(layer))
        return keys, values

    def pair(self, layer: int, width: int, pages: Tensor | None) -> Pair:
        """The first `width` keys and values of every page in use, or of these pages [P, K, N, D]."""
        keys, values = (kept[: len(self)] if pages is None else kept[pages] for kept in self._both(layer))
        return keys[:, :width].transpose(1, 2), values[:, :width].transpose(1, 2)

    def _both(self, layer: int) -> Pair:
        keys = self._keys[layer]
        return keys, self._values.get(layer, keys[..., :0])

    def _of(self, kept: dict[int, Tensor], layer: int, like: Tensor) -> Tensor:
        old = kept.get(layer)
        if old is None or old.shape[0] < len(self):
            new = like.new_zeros(self._room, PAGE, *like.shape[1:])
            if old is not None:
                new[: old.shape[0]] = old
            kept[layer] = old = new
        return old


def _places(held: Held) -> list[int]:
    """Where a request's tokens lie, counted from the first page's first."""
    return [held.pages[token // PAGE] * PAGE + token % PAGE for token in range(held.begin, held.length)]


class Pages:
    """The pools of a model's layers."""

    def __init__(self, layout: Layout) -> None:
        alike: dict[tuple[Kind, int], list[int]] = defaultdict(list)
        for layer, (kind, window) in enumerate(zip(layout.kinds, layout.windows)):
            if kind not in ("recurrent", "none") and layout.sources[layer] == layer:
                alike[kind, window].append(layer)
        self.pools = [Pool(kind, window, layers) for (kind, window), layers in alike.items()]

    def take(self, reading: Reading) -> None:
        """What a request has read since its last segment goes from its tails into pages."""
        reading.held = [Held() for _ in self.pools]
        reading.keepers.append(self)
        for pool, held in zip(self.pools, reading.held):
            tails = {layer: tail for layer in pool.layers if (tail := reading.tails[layer]) is not None and len(tail)}
            if not tails:
                continue
            count = max(map(len, tails.values()))
            if pool.window:
                count = min(count, reading.seen_before(pool.layers[0]))
            pool.lengthen(held, count)
            for layer, tail in tails.items():
                keys, values = tail.last(count)
                places = torch.tensor(_places(held), device=keys.device)
                pool.write(layer, places, keys[0].transpose(0, 1), values[0].transpose(0, 1))
                reading.tails[layer] = Tail()

    @torch.inference_mode()
    def give_back(self, reading: Reading) -> None:
        """The other way."""
        for pool, held in zip(self.pools, reading.held):
            places = _places(held)
            for layer in pool.layers if places else ():
                if layer in pool._keys:
                    reading.tails[layer] = Tail(pool.read(layer, torch.tensor(places, device=pool._keys[layer].device)))
            pool.release(held.pages)
        reading.held = []

    def sweep(self) -> None:
        """Gives back the pages of whoever is gone."""
        for pool in self.pools:
            pool.sweep()
