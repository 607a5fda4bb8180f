"""The next id of each request, from its logits.

Every request has a random stream of its own, which depends on its seed and its sample alone: who else is in the batch changes nothing.
Legend: B requests, V vocabulary.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor

from ropewalk.engine.request import Sampling


def stream(sampling: Sampling, request_id: str, sample: int) -> torch.Generator:
    """The random stream of one sample."""
    origin = request_id if sampling.seed is None else f"seed {sampling.seed}"
    digest = hashlib.sha256(f"{origin} sample {sample}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)


def choose(logits: Tensor, samplings: Sequence[Sampling], streams: Sequence[torch.Generator]) -> list[int]:
    """logits [B, V] float32 -> an id for each."""
    best = logits.argmax(-1).tolist()
    return [
        best[row] if sampling.temperature == 0 else _sampled(logits[row], sampling, streams[row])
        for row, sampling in enumerate(samplings)
    ]


def _sampled(logits: Tensor, sampling: Sampling, generator: torch.Generator) -> int:
    """logits [V] -> an id. Truncation by min-p is that of Nguyen et al., 2024; by top-p that of Holtzman et al., 2020."""
    values, ids = (logits.float() / sampling.temperature).cpu().sort(descending=True, stable=True)
    if sampling.top_k:
        values = values[: sampling.top_k]
    chances = values.softmax(-1)
    keep = torch.ones_like(chances, dtype=torch.bool)
    if sampling.min_p:
        keep &= chances >= sampling.min_p * chances[0]
    if sampling.top_p < 1:
        keep &= chances.cumsum(-1) - chances < sampling.top_p  # the first id past the sum is kept
    keep[0] = True
    return int(ids[torch.multinomial(torch.where(keep, chances, 0.0), 1, generator=generator)])
