"""What a frozen adapter keeps between two steps of decoding: its factors as products want them.

Legend: r rank. Factors: A [.., r, in], B [.., out, r].
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class Prepared:
    """Factors as products want them, in their dtype and turned round, made anew only when a factor has changed.

    For frozen factors, which change where an adapter is published or loaded, and not between two steps of decoding.
    """

    def __init__(self) -> None:
        self._made: dict[tuple[str, torch.dtype], tuple[tuple[Any, ...], Tensor]] = {}

    def turned(self, name: str, factor: Tensor, dtype: torch.dtype, scale: float = 1.0) -> Tensor:
        """factor [.., out, in] -> scale times it [.., in, out], contiguous."""
        if factor.is_inference():  # it does not tell when it changes
            return _turned(factor, dtype, scale)
        state = (factor._version, factor.data_ptr(), scale)
        known = self._made.get((name, dtype))
        if known is None or known[0] != state:
            known = self._made[name, dtype] = state, _turned(factor, dtype, scale)
        return known[1]


def _turned(factor: Tensor, dtype: torch.dtype, scale: float) -> Tensor:
    factor = factor.detach()
    return (factor if scale == 1.0 else factor * scale).to(dtype).transpose(-1, -2).contiguous()
