"""Attention of several requests at once, without padding: what they share is read once.

Each request attends to a row of pieces: the segments it stands on, what it has read since, and the ids of this step. A piece that
several requests share is multiplied with all their queries in one call ("cascade inference", Ye et al., FlashInfer, 2025), and the
pieces' results are joined by their log-sum-exps, which is exact ("Online normalizer calculation for softmax", Milakov and
Gimelshein, 2018). Key-value heads are never repeated: the queries of a group are laid beside each other instead.
Legend: H query heads, K key-value heads, G = H / K, T new ids, N keys, D head size.
"""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface

from ropewalk.engine.cache import Batch, Pair, Part, Segment

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
    batch, layer = _running[-1], module.layer_idx
    heads, groups = key.shape[1], query.shape[1] // key.shape[1]
    scale = options.get("scaling") or query.shape[-1] ** -0.5
    softcap, sinks = options.get("softcap"), options.get("s_aux")
    queries = [_packed(query[:, :, part.begin : part.end], heads) for part in batch.parts]
    found: list[list[Partial]] = [[] for _ in batch.parts]
    sliding = batch.parts[0].reading.layout.kinds[layer] == "sliding"
    if not sliding:
        for pair, readers in _shared(batch, layer):
            together = torch.cat([queries[index] for index in readers], dim=2)
            out, lse = _attend(together, pair, None, scale, softcap)
            sizes = [queries[index].shape[2] for index in readers]
            for index, one, its in zip(readers, torch.split(out, sizes, dim=2), torch.split(lse, sizes, dim=2)):
                found[index].append((one, its))
    for index, part in enumerate(batch.parts):
        window = part.reading.layout.windows[layer] if sliding else 0
        found[index] += [
            _attend(queries[index], pair, mask, scale, softcap) for pair, mask in _own(part, layer, window, groups)
        ]
    outs = []
    for part, partials in zip(batch.parts, found):
        out = _joined(partials, None if sinks is None else _sink_rows(sinks, heads, part.end - part.begin))
        outs.append(out.to(query.dtype).reshape(1, heads * groups, part.end - part.begin, -1))
    return torch.cat(outs, dim=2).transpose(1, 2).contiguous(), None


def _shared(batch: Batch, layer: int) -> list[tuple[Pair, list[int]]]:
    """Every segment's keys and values, with the requests that stand on it, in the order in which they are read."""
    readers: dict[Segment, list[int]] = defaultdict(list)
    for index, part in enumerate(batch.parts):
        for segment in part.reading.segments:
            readers[segment].append(index)
    return [(segment.layers[layer], those) for segment, those in readers.items()]  # type: ignore[misc]


def _own(part: Part, layer: int, window: int, groups: int) -> list[tuple[Pair, Tensor | None]]:
    """What one request alone attends to, with masks [G*T, N] where not every query sees every key."""
    tail, new = part.reading.tails[layer], part.end - part.begin
    assert tail is not None
    if window:
        tail.forget_before(window - 1 + new)
        keys, values = tail.last(window - 1 + new)
        count = keys.shape[2]
        if new == 1:
            return [((keys[:, :, -window:], values[:, :, -window:]), None)]
        behind = torch.arange(count - new, count)[:, None] - torch.arange(count)[None]
        return [((keys, values), ((behind >= 0) & (behind < window)).repeat(groups, 1).to(keys.device))]
    if new == 1:
        return [(tail.last(len(tail)), None)]
    keys, values = tail.last(len(tail))
    pieces: list[tuple[Pair, Tensor | None]] = []
    if len(tail) > new:
        pieces.append(((keys[:, :, :-new], values[:, :, :-new]), None))
    causal = torch.ones(new, new, dtype=torch.bool, device=keys.device).tril()
    return [*pieces, ((keys[:, :, -new:], values[:, :, -new:]), causal.repeat(groups, 1))]


def _attend(query: Tensor, pair: Pair, mask: Tensor | None, scale: float, softcap: float | None) -> Partial:
    """query [1, K, M, D], keys [1, K, N, D], mask [M, N] -> result and log-sum-exp."""
    keys, values = pair
    if query.device.type == "cpu" and softcap is None and keys.shape[-1] == values.shape[-1]:
        bias = None
        if mask is not None:
            bias = torch.zeros(1, 1, *mask.shape, dtype=query.dtype).masked_fill_(~mask, float("-inf"))
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            query, keys, values, 0.0, False, attn_mask=bias, scale=scale
        )
        return out.float(), lse
    scores = torch.matmul(query, keys.transpose(-1, -2)).float() * scale
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf"))
    lse = torch.logsumexp(scores, dim=-1)
    return torch.matmul((scores - lse.unsqueeze(-1)).exp().to(values.dtype), values).float(), lse


def _joined(partials: list[Partial], sinks: Tensor | None) -> Tensor:
    """The softmax over all pieces' keys, and over sinks [1, K, G*T] that take weight and give nothing."""
    if len(partials) == 1 and sinks is None:
        return partials[0][0]
    lses = torch.stack([lse for _, lse in partials] + ([] if sinks is None else [sinks]))
    total = torch.logsumexp(lses, dim=0)
    out = partials[0][0] * (partials[0][1] - total).exp().unsqueeze(-1)
    for piece, lse in partials[1:]:
        out = out + piece * (lse - total).exp().unsqueeze(-1)
    return out


def _packed(query: Tensor, heads: int) -> Tensor:
    """[1, H, T, D] -> [1, K, G*T, D]."""
    return query.reshape(1, heads, -1, query.shape[-1])


def _sink_rows(sinks: Tensor, heads: int, new: int) -> Tensor:
    """One sink per query head [H] -> [1, K, G*T]."""
    return sinks.float().reshape(1, heads, -1, 1).expand(-1, -1, -1, new).reshape(1, heads, -1)
