"""The likeliest ids of a step, for whoever asks to see them.

Legend: B requests, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

Likeliest = tuple[tuple[int, float], ...]  # ids with their log-probabilities, the likeliest first


def likeliest(logits: Tensor, counts: Sequence[int]) -> list[Likeliest]:
    """logits [B, V], and how many each asks for -> so many of each, under the model as it is."""
    found: list[Likeliest] = [()] * len(counts)
    rows = [row for row, count in enumerate(counts) if count]
    if rows:
        logprobs = logits[rows].float().log_softmax(-1)
        values, ids = logprobs.topk(min(max(counts), logprobs.shape[-1]))
        for row, own_ids, own_values in zip(rows, ids.tolist(), values.tolist()):
            found[row] = tuple(zip(own_ids, own_values))[: counts[row]]
    return found
