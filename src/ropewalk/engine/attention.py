"""Attention of several requests at once, without padding: what they share is read once.

Each request attends to a row of pieces: the segments it stands on, what it has read since, and the ids of this step. A piece that
several requests share is multiplied with all their queries in one call ("cascade inference", Ye et al., FlashInfer, 2025), and the
pieces' results are joined by their log-sum-exps, which is exact ("Online normalizer calculation for softmax", Milakov and
Gimelshein, 2018). Key-value heads are never repeated: the queries of a group are laid beside each other instead.
Legend: H query heads, K key-value heads, G = H / K, T new ids, N keys, D head size.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface

from ropewalk.engine.batch import Batch, Part
from ropewalk.engine.cache import ELSEWHERE, Kind, Pair, Segment
from ropewalk.engine.crowd import Table
from ropewalk.engine.latent import Latent, is_latent
from ropewalk.errors import ModelError
from ropewalk.kernels.attend import Causal, Seen, attend

NAME = "ropewalk_batch"
Partial = tuple[Tensor, Tensor]  # result [1, K, G*T, D] and log-sum-exp [1, K, G*T], both float32

_running: list[Batch] = []  # the batch of the forward pass that is running; one at a time in a process


class running:
    """Within it, attention belongs to this batch."""

    def __init__(self, batch: Batch) -> None:
        self.batch = batch

    def __enter__(self) -> None:
        _running.append(self.batch)

    def __exit__(self, *_: object) -> None:
        _running.pop()


def register() -> None:
    """Makes the implementation known to transformers."""
    AttentionInterface.register(NAME, batch_attention)


def batch_attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
) -> tuple[Tensor, None]:
    """query [1, H, T, D] of all requests -> [1, T, H, D]; keys and values are those that the batch's readings keep."""
    batch, layout = _running[-1], _running[-1].parts[0].reading.layout
    layer = layout.sources[module.layer_idx]
    own_mask = options.get("position_bias") if attention_mask is None else attention_mask
    latent = _checked(batch, layer, module, (key, value), own_mask, query.shape[1])
    if latent is not None:
        query = latent.query(query)
    heads = 1 if latent is not None else key.shape[1]
    sinks = options.get("s_aux")
    how = _How(
        heads,
        query.shape[1] // heads,
        options.get("scaling") or query.shape[-1] ** -0.5,
        options.get("softcap"),
        None if sinks is None else sinks.float().view(heads, -1),
        latent,
    )
    outs = []
    if batch.crowd is not None:
        outs.append(_decoded(batch.crowd.table(layer), layer, query[0, :, batch.rows], how))
    if batch.others:
        outs += _read(batch.others, layer, query, how)
    out = outs[0] if len(outs) == 1 else torch.cat(outs, dim=1)  # [H, T, D]
    out = out.to(query.dtype).transpose(0, 1) if latent is None else latent.result(out[None].to(query.dtype))[0].transpose(0, 1)
    return (out if batch.order is None else out[batch.order])[None].contiguous(), None


@dataclass(frozen=True)
class _How:
    """One layer's way to attend."""

    heads: int  # K
    groups: int  # G
    scale: float
    softcap: float | None
    sinks: Tensor | None  # [K, G] float32
    latent: Latent | None

    def pair(self, kept: Pair) -> Pair:
        return kept if self.latent is None else self.latent.pair(kept)

    def attend(self, query: Tensor, kept: Pair, seen: Seen) -> Partial:
        return attend(query, *self.pair(kept), seen, self.scale, self.softcap)


def _decoded(table: Table, layer: int, query: Tensor, how: _How) -> Tensor:
    """query [H, B, D] of requests that decode -> [H, B, D] float32: all their pages in one call, and every segment in one."""
    query = query.reshape(how.heads, how.groups, *query.shape[1:]).transpose(1, 2)  # [K, B, G, D]
    mine = query if table.owner is None else query[:, table.owner]
    out, lse = how.attend(mine.transpose(0, 1), table.pool.pair(layer, table.width, table.pages), table.alive)
    outs, lses = [out.transpose(0, 1)], [lse.transpose(0, 1)]  # [K, P, G, D], [K, P, G]
    for standing in table.standing:
        kept = standing.segment.pair(layer)
        assert kept is not None
        if standing.last:
            kept = kept[0][:, :, -standing.last :], kept[1][:, :, -standing.last :]
        seen = None if standing.seen is None else standing.seen.repeat_interleave(how.groups, 0)
        out, lse = how.attend(standing.select(query).flatten(1, 2)[None], kept, seen)
        outs.append(out[0].reshape(how.heads, -1, how.groups, out.shape[-1]))
        lses.append(lse[0].reshape(how.heads, -1, how.groups))
    out, lse = (outs[0], lses[0]) if len(outs) == 1 else (torch.cat(outs, dim=1), torch.cat(lses, dim=1))
    return _over_pieces(out, lse, table, how.sinks).transpose(1, 2).flatten(0, 1)


def _over_pieces(out: Tensor, lse: Tensor, table: Table, sinks: Tensor | None) -> Tensor:
    """The softmax over all keys [K, B, G, D], from what was found in pieces [K, .., G, D], and sinks that take weight and give nothing."""
    if table.order is not None:
        out, lse = out.index_select(1, table.order), lse.index_select(1, table.order)
    if table.depth == 1 and sinks is None:
        return out
    out, lse = (found.reshape(len(found), table.depth, -1, *found.shape[2:]) for found in (out, lse))  # [K, depth, B, G, ..]
    if table.lacking is not None:
        lse = lse.masked_fill(table.lacking[:, :, None], float("-inf"))
    if sinks is not None:
        lse = torch.cat([lse, sinks[:, None, None].expand(-1, 1, *lse.shape[2:])], dim=1)
    return (out * lse.softmax(1)[:, : table.depth, ..., None]).sum(1)


def _read(parts: Sequence[Part], layer: int, query: Tensor, how: _How) -> list[Tensor]:
    """Of each request that reads [H, T, D] float32: piece by piece, those that several stand on in one call."""
    heads, groups, full = how.heads, how.groups, parts[0].reading.layout.kinds[layer] == "full"
    sizes = [(part.end - part.begin) * groups for part in parts]
    packed = torch.cat([_packed(query[:, :, part.begin : part.end], heads) for part in parts], dim=2)
    queries = torch.split(packed, sizes, dim=2)
    found = _Partials(sizes)
    for kept, readers, seen in _shared(parts, layer) if full else _windows(parts, layer):
        everybody = len(readers) == len(queries)
        together = packed if everybody else torch.cat([queries[index] for index in readers], dim=2)
        found.add(readers, how.attend(together, kept, None if seen is None else seen.repeat_interleave(groups, 0)))
    for index, part in enumerate(parts):
        for kept, mask in _own(part, layer, groups):
            found.add([index], how.attend(queries[index], kept, mask))
    weights = None
    if how.sinks is not None:
        sinks = how.sinks[None, :, :, None]
        weights = torch.cat([sinks.expand(-1, -1, -1, part.end - part.begin).flatten(2) for part in parts], dim=2)
    outs = torch.split(found.joined(weights), sizes, dim=2)
    return [out.reshape(heads * groups, -1, out.shape[-1]) for out in outs]


def _checked(batch: Batch, layer: int, module: Any, given: Pair, mask: Tensor | None, heads: int) -> Latent | None:
    """How a layer attends to what it keeps, if it is not plainly; ModelError where that is more than this engine knows."""
    batch.attended.add(layer)
    kept, name = batch.given.get(layer), type(module).__name__
    if not getattr(module, "is_causal", True):
        raise ModelError(f"{name} looks ahead: it reads whole texts and does not write; {ELSEWHERE}")
    if mask is None and kept is not None:
        if kept[0] is given[0] and kept[1] is given[1]:
            return None
        if is_latent(module):
            return Latent(module, heads)
    own = "with a mask of its own" if mask is not None else "not plainly to what it keeps"
    raise ModelError(f"{name} attends {own}, which this engine does not know; {ELSEWHERE}")


class _Partials:
    """What every query found in its pieces, laid out so that all are joined at once: level n holds each query's n-th piece."""

    def __init__(self, sizes: Sequence[int]) -> None:
        self._sizes = sizes
        self._begins = [sum(sizes[:index]) for index in range(len(sizes))]
        self._levels: list[list[tuple[int, int, Partial]]] = []  # per level: rows [begin, end) and what they found
        self._depth = [0] * len(sizes)

    def add(self, readers: Sequence[int], partial: Partial) -> None:
        """Another piece's part, of the queries of these requests, which lie beside each other in it."""
        depths = {self._depth[index] for index in readers}
        whole = len(depths) == 1 and list(readers) == list(range(readers[0], readers[0] + len(readers)))
        offset = 0
        for index in readers[:1] if whole else readers:
            size = sum(self._sizes[i] for i in readers) if whole else self._sizes[index]
            if self._depth[index] == len(self._levels):
                self._levels.append([])
            rows = partial[0][:, :, offset : offset + size], partial[1][:, :, offset : offset + size]
            self._levels[self._depth[index]].append((self._begins[index], self._begins[index] + size, rows))
            offset += size
        for index in readers:
            self._depth[index] += 1

    def joined(self, sinks: Tensor | None) -> Tensor:
        """The softmax over all pieces' keys, and over sinks [1, K, rows] that take weight and give nothing -> [1, K, rows, D]."""
        levels = [self._filled(level) for level in self._levels]
        if len(levels) == 1 and sinks is None:
            return levels[0][0]
        total = torch.logsumexp(torch.stack([lse for _, lse in levels] + ([] if sinks is None else [sinks])), dim=0)
        out = levels[0][0] * (levels[0][1] - total).exp().unsqueeze(-1)
        for piece, lse in levels[1:]:
            out = out + piece * (lse - total).exp().unsqueeze(-1)
        return out

    def _filled(self, level: list[tuple[int, int, Partial]]) -> Partial:
        rows = sum(self._sizes)
        if sum(end - begin for begin, end, _ in level) == rows:
            level = sorted(level, key=lambda entry: entry[0])
            return torch.cat([p[0] for _, _, p in level], dim=2), torch.cat([p[1] for _, _, p in level], dim=2)
        first, lse = level[0][2]
        out, lses = first.new_zeros(*first.shape[:2], rows, first.shape[3]), lse.new_full((*lse.shape[:2], rows), float("-inf"))
        for begin, end, (values, its) in level:
            out[:, :, begin:end], lses[:, :, begin:end] = values, its
        return out, lses


Shared = tuple[Pair, list[int], Tensor | None]  # keys and values, the requests that read them, and which of them each sees


def _shared(parts: Sequence[Part], layer: int) -> list[Shared]:
    """Every segment's keys and values, with the requests that stand on it, in the order in which they are read."""
    readers: dict[Segment, list[int]] = defaultdict(list)
    for index, part in enumerate(parts):
        for segment in part.reading.segments:
            readers[segment].append(index)
    return [(pair, those, None) for segment, those in readers.items() if (pair := segment.pair(layer)) is not None]


def _windows(parts: Sequence[Part], layer: int) -> list[Shared]:
    """What requests that have one id each still see of the segment that they stand on, in a layer that sees a window."""
    readers: dict[Segment, dict[int, int]] = defaultdict(dict)  # request -> how many of the segment's last keys it sees
    for index, part in enumerate(parts):
        if part.end - part.begin == 1 and part.reading.segments:
            tail = part.reading.tails[layer]
            assert tail is not None
            left = part.reading.seen_before(layer) + 1 - len(tail)
            if left > 0:
                readers[part.reading.segments[-1]][index] = left
    found: list[Shared] = []
    for segment, those in readers.items():
        pair = segment.pair(layer)
        if pair is None or pair[0].shape[2] == 0:
            continue
        keys, values = (held[:, :, -max(those.values()) :] for held in pair)
        seen = torch.arange(keys.shape[2], 0, -1) <= torch.tensor(list(those.values()))[:, None]
        found.append(((keys, values), list(those), None if bool(seen.all()) else seen.to(keys.device)))
    return found


def _own(part: Part, layer: int, groups: int) -> list[tuple[Pair, Seen]]:
    """What one request alone attends to, and which of its queries [G*T] sees which key."""
    reading, new = part.reading, part.end - part.begin
    tail, kind, window = reading.tails[layer], reading.layout.kinds[layer], reading.layout.windows[layer]
    assert tail is not None
    if kind == "full":
        if new == 1:
            return [(tail.last(len(tail)), None)]
        keys, values = tail.last(len(tail))
        pieces: list[tuple[Pair, Seen]] = []
        if len(tail) > new:
            pieces.append(((keys[:, :, :-new], values[:, :, :-new]), None))
        own = keys[:, :, -new:], values[:, :, -new:]
        if kind not in part.mutual:
            return [*pieces, (own, Causal(new))]
        seen = _ahead(torch.ones(new, new, dtype=torch.bool, device=keys.device).tril(), part, "full")
        return [*pieces, (own, seen.repeat(groups, 1))]
    before = reading.seen_before(layer)
    tail.forget_before(before + new)
    if new == 1:
        return [(tail.last(before + 1), None)]
    keys, values = reading.window(layer, before + new)
    count = keys.shape[2]
    if kind == "sliding" and kind not in part.mutual:
        return [((keys, values), Causal(new, window))]
    at = torch.arange(count) + reading.position + new - count
    behind = at[-new:, None] - at
    seen = _ahead(behind >= 0, part, kind)
    seen &= behind < window if kind == "sliding" else at[-new:, None] // window == at // window
    return [((keys, values), seen.repeat(groups, 1).to(keys.device))]


def _ahead(seen: Tensor, part: Part, kind: Kind) -> Tensor:
    """A causal mask [T, N] of keys that end with those of the T new ids, and what these see of each other beyond it."""
    mutual = part.mutual.get(kind)
    if mutual is not None:
        seen[:, -mutual.shape[1] :] |= mutual.to(seen.device)
    return seen


def _packed(query: Tensor, heads: int) -> Tensor:
    """[1, H, T, D] -> [1, K, G*T, D]."""
    return query.reshape(1, heads, -1, query.shape[-1])
