"""Sums over the samples of packed tokens. Legend: T tokens, S samples; what the mask leaves out contributes exactly nothing."""

from __future__ import annotations

import torch
from torch import Tensor


def sum_by_sample(values: Tensor, mask: Tensor, sample: Tensor, samples: int) -> Tensor:
    """values [T], mask [T] bool, sample [T] -> [S]."""
    kept = torch.where(mask, values, 0.0)
    return values.new_zeros(samples).index_add(0, torch.where(mask, sample, 0), kept)


def mean_by_sample(values: Tensor, mask: Tensor, sample: Tensor, samples: int) -> Tensor:
    """values [T], mask [T] bool, sample [T] -> [S]; 0 for a sample without a token."""
    tokens = sum_by_sample(mask.to(values.dtype), mask, sample, samples)
    return sum_by_sample(values, mask, sample, samples) / tokens.clamp(min=1)


def tokens_by_sample(mask: Tensor, sample: Tensor, samples: int) -> Tensor:
    """mask [T] bool, sample [T] -> how many tokens of each sample it keeps [S]."""
    return torch.bincount(sample[mask], minlength=samples)
