"""The next id of every request of a step, from its logits, all at once.

Every request has a random stream of its own, which depends on its seed and its sample alone, and every row of logits is computed for
itself: who else is in the batch changes nothing, bit for bit. An id is found by the inverse of the distribution's running sum, at one
random number per id, block by block, so that nothing has to be sorted.
Legend: B requests, V vocabulary.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from random import Random
from typing import Self

import torch
from torch import Tensor

from ropewalk.engine.request import Sampling

BLOCK = 64  # ids whose weights are summed before the running sum
NUCLEUS = 1024  # ids among which top-p is looked for first; a longer nucleus takes a sort of the whole row


def stream(sampling: Sampling, request_id: str, sample: int) -> Random:
    """The random stream of one sample."""
    origin = request_id if sampling.seed is None else f"seed {sampling.seed}"
    digest = hashlib.sha256(f"{origin} sample {sample}".encode()).digest()
    return Random(int.from_bytes(digest[:8], "big"))


def choose(
    logits: Tensor,
    samplings: Sequence[Sampling],
    streams: Sequence[Random],
    plain: Tensor | None = None,
    told: Sequence[float] = (),
) -> tuple[list[int], list[float]]:
    """logits [B, V] float32 -> an id for each, and its log-probability at the temperatures `told`, if there are any.

    Log-probabilities are those of `plain`, which logits are unless they were changed, untruncated.
    """
    ids = [0] * len(samplings)
    greedy = [row for row, sampling in enumerate(samplings) if not sampling.temperature]
    if greedy:
        for row, id in zip(greedy, _likeliest(_rows(logits, greedy))):
            ids[row] = id
    random = [row for row, sampling in enumerate(samplings) if sampling.temperature]
    known: Weighed | None = None
    if random:
        own = [samplings[row] for row in random]
        temperatures = [sampling.temperature for sampling in own]
        weighed = Weighed.of(_rows(logits, random), temperatures)
        if (plain is None or plain is logits) and list(told) == temperatures:
            known = weighed
        draws = torch.tensor([streams[row].random() for row in random], dtype=torch.float64).to(logits.device)
        for row, id in zip(random, _inverse(*_truncated(weighed, own), draws).tolist()):
            ids[row] = id
    if not told:
        return ids, []
    known = known or Weighed.of(logits if plain is None else plain, told)
    return ids, known.log_probs(torch.tensor(ids, device=logits.device))


@dataclass(frozen=True)
class Weighed:
    """Probabilities in proportion to the likeliest id's."""

    logits: Tensor  # [B, V], divided by their temperatures
    most: Tensor  # [B, 1]
    weights: Tensor  # [B, V]
    sums: Tensor  # [B, V / BLOCK] float64, of the weights

    @classmethod
    def of(cls, logits: Tensor, temperatures: Sequence[float]) -> Self:
        """logits [B, V] float32 at these temperatures."""
        if any(temperature != 1 for temperature in temperatures):
            logits = logits / torch.tensor(temperatures, dtype=logits.dtype, device=logits.device)[:, None]
        most = logits.amax(-1, keepdim=True)
        weights = (logits - most).exp_()
        return cls(logits, most, weights, _block_sums(weights))

    def log_probs(self, ids: Tensor) -> list[float]:
        """Of one id of each row [B]."""
        picked = self.logits.gather(1, ids[:, None]) - self.most
        return (picked[:, 0].double() - self.sums.sum(-1).log()).tolist()


def _likeliest(logits: Tensor) -> list[int]:
    """The likeliest id of every row; numpy looks for it at twenty times the speed of torch on a CPU."""
    ids: list[int] = (logits.numpy() if logits.is_cpu else logits).argmax(-1).tolist()
    return ids


def _rows(logits: Tensor, rows: list[int]) -> Tensor:
    return logits if len(rows) == logits.shape[0] else logits[torch.tensor(rows, device=logits.device)]


def _block_sums(weights: Tensor) -> Tensor:
    """[B, V] -> [B, V / BLOCK] float64."""
    whole = weights.shape[1] // BLOCK * BLOCK
    sums = weights[:, :whole].reshape(len(weights), -1, BLOCK).sum(-1)
    if whole < weights.shape[1]:
        sums = torch.cat([sums, weights[:, whole:].sum(-1, keepdim=True)], dim=1)
    return sums.double()


def _inverse(weights: Tensor, sums: Tensor, draws: Tensor) -> Tensor:
    """The ids at which the running sums of weights [B, V] pass these parts, in [0, 1), of all that there is."""
    until = sums.cumsum(-1)
    total = until[:, -1]
    reached = torch.minimum(draws * total, torch.nextafter(total, torch.zeros_like(total)))
    block = (until <= reached[:, None]).sum(-1, keepdim=True)
    inside = (reached - (until - sums).gather(1, block)[:, 0]) / sums.gather(1, block)[:, 0]
    places = block * BLOCK + torch.arange(BLOCK, device=weights.device)
    held = weights.gather(1, places.clamp(max=weights.shape[1] - 1)).double().masked_fill_(places >= weights.shape[1], 0)
    running = held.cumsum(-1)
    part = inside.clamp(0, 1 - 1e-12) * running[:, -1]
    return block[:, 0] * BLOCK + (running <= part[:, None]).sum(-1)


def _truncated(weighed: Weighed, samplings: Sequence[Sampling]) -> tuple[Tensor, Tensor]:
    """Weights, and their sums, without those that a request's top-k, top-p or min-p leaves out; of equals at the limit all are kept.

    Truncation by min-p is that of Nguyen et al., 2024; by top-p that of Holtzman et al., 2020, over what top-k has left.
    """
    weights, size = weighed.weights, weighed.weights.shape[1]
    rows = [row for row, one in enumerate(samplings) if 0 < one.top_k < size or one.top_p < 1 or one.min_p]
    if not rows:
        return weights, weighed.sums
    own = [samplings[row] for row in rows]
    x, held = _rows(weighed.logits, rows), _rows(weights, rows)
    limits = torch.full((len(rows),), -math.inf, dtype=x.dtype, device=x.device)
    few = [n for n, one in enumerate(own) if 0 < one.top_k < size]
    if few:
        counts = torch.tensor([own[n].top_k for n in few], device=x.device)
        top = _rows(x, few).topk(int(counts.max())).values
        limits[few] = top.gather(1, counts[:, None] - 1)[:, 0]
        held = held.masked_fill(x < limits[:, None], 0)
    nuclei = [n for n, one in enumerate(own) if one.top_p < 1]
    if nuclei:
        parts = torch.tensor([own[n].top_p for n in nuclei], dtype=torch.float64, device=x.device)
        limits[nuclei] = _nucleus(_rows(held, nuclei), _rows(x, nuclei), parts)
    smallest = torch.tensor([one.min_p for one in own], dtype=held.dtype, device=held.device)
    held = held.masked_fill((x < limits[:, None]) | (held < smallest[:, None]), 0)
    if len(rows) == len(samplings):
        return held, _block_sums(held)
    at = torch.tensor(rows, device=weights.device)
    return weights.index_copy(0, at, held), weighed.sums.index_copy(0, at, _block_sums(held))


def _nucleus(weights: Tensor, scaled: Tensor, parts: Tensor) -> Tensor:
    """The smallest logit that belongs to these parts of all weight [B]."""
    wanted = parts * _block_sums(weights).sum(-1)
    limits = scaled.new_empty(len(parts))
    rows, size = list(range(len(parts))), min(NUCLEUS, weights.shape[1])
    while rows:
        at = torch.tensor(rows, device=weights.device)
        found = weights[at].topk(size) if size < weights.shape[1] else weights[at].sort(descending=True)
        reached = found.values.double().cumsum(-1) >= wanted[at, None]
        reached[:, -1] |= size == weights.shape[1]
        first = reached.to(torch.uint8).argmax(-1, keepdim=True)
        limits[at] = scaled[at].gather(1, found.indices.gather(1, first))[:, 0]
        rows = [row for row, done in zip(rows, reached[:, -1].tolist()) if not done]
        size = weights.shape[1]
    return limits
