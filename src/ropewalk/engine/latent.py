"""Multi-head latent attention over what it keeps: one compressed vector per token, never expanded.

A layer keeps latents [1, 1, T, R] and rotated keys [1, 1, T, P], from which the model expands each head's keys and values. Here a query
goes through the transpose of the keys' expansion instead, so that all heads attend to the latents themselves, and their result through
that of the values: the same numbers by associativity ("weight absorption", DeepSeek-V2, 2024).
Legend: H heads, T tokens, R latent size, P rotated size, N size of a head's unrotated keys, V of its values.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ropewalk.engine.cache import Pair

EXPANSION = "kv_b_proj"  # the layer whose weight expands latents, in every model that keeps them


def is_latent(module: Any) -> bool:
    """Whether an attention layer keeps latents."""
    return hasattr(module, "expand_kv") and hasattr(module, EXPANSION)


class Latent:
    """One layer's attention, with all heads on one latent head."""

    def __init__(self, module: Any, heads: int) -> None:
        weight = _weight(getattr(module, EXPANSION)).view(heads, -1, module.kv_lora_rank)
        self._keys, self._values = torch.split(weight, [module.qk_nope_head_dim, module.v_head_dim], dim=1)

    def query(self, query: Tensor) -> Tensor:
        """[1, H, T, N + P] -> [1, H, T, R + P]."""
        plain, rotated = torch.split(query, [self._keys.shape[1], query.shape[-1] - self._keys.shape[1]], dim=-1)
        return torch.cat([plain @ self._keys, rotated], dim=-1)

    def pair(self, kept: Pair) -> Pair:
        """Latents and rotated keys [1, 1, T, R + P] as the keys, and the latents among them as the values, of one head."""
        return kept[0], kept[0][..., : self._keys.shape[2]]

    def result(self, out: Tensor) -> Tensor:
        """[1, H, T, R] -> [1, H, T, V]."""
        return torch.matmul(out, self._values.transpose(1, 2))


def _weight(linear: Any) -> Tensor:
    weight: Tensor = linear.weight
    if weight.is_floating_point() and weight.shape == (linear.out_features, linear.in_features):
        return weight
    # of a quantized layer: what it makes of every unit vector; its bare forward, without adapters
    units = torch.eye(linear.in_features, device=weight.device, dtype=getattr(linear, "compute_dtype", None) or torch.float32)
    return type(linear).forward(linear, units).t()  # type: ignore[no-any-return]
