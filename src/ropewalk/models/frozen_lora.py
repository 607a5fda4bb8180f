"""What a frozen adapter keeps between two steps of decoding: its factors as products want them, and what layers of one input share.

Legend: n rows, r rank. Factors: A [.., r, in], B [.., out, r].
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from ropewalk.models.lora_layers import LinearLora


class Prepared:
    """Factors as products want them, in their dtype and turned round, made anew only when a factor has changed.

    For frozen factors, which change where an adapter is published or loaded, and not between two steps of decoding.
    """

    def __init__(self) -> None:
        self._made: dict[tuple[str, torch.dtype], tuple[tuple[Any, ...], Tensor]] = {}

    def turned(self, name: str, factor: Tensor, dtype: torch.dtype, scale: float = 1.0) -> Tensor:
        """factor [.., out, in] -> scale times it [.., in, out], contiguous."""
        if factor.is_inference():  # it does not tell when it changes
            return _turned([factor], dtype, scale)
        state = (factor._version, factor.data_ptr(), scale)
        known = self._made.get((name, dtype))
        if known is None or known[0] != state:
            known = self._made[name, dtype] = state, _turned([factor], dtype, scale)
        return known[1]


def _turned(factors: Sequence[Tensor], dtype: torch.dtype, scale: float) -> Tensor:
    beside = factors[0].detach() if len(factors) == 1 else torch.cat([factor.detach() for factor in factors], -2)
    return (beside if scale == 1.0 else beside * scale).to(dtype).transpose(-1, -2).contiguous()


@dataclass
class Group:
    """Layers of one input, and their factors as they were when these were prepared."""

    factors: list[Tensor]  # A and B of each in turn
    state: list[int]
    sizes: list[int]  # ranks
    a: Tensor  # [in, all r]
    bs: list[Tensor]  # [r, out] each

    def fits(self) -> bool:
        """Whether no factor has changed; those of inference mode do not tell."""
        return bool(self.state) and self.state == _state(self.factors)


def _state(factors: Sequence[Tensor]) -> list[int]:
    return [n for factor in factors for n in (factor._version, factor.data_ptr())]


class OneInput:
    """What all layers that read the same x, such as queries, keys and values, share: the first computes A x for those that follow.

    Who follows is learnt from what was called, and unlearnt where somebody was computed for and did not come.
    """

    def __init__(self) -> None:
        self._x: Tensor | None = None  # kept, so that no other tensor can be taken for it
        self._rows: Tensor | None = None
        self._read: Tensor | None = None
        self._leader: LinearLora | None = None
        self._group: Group | None = None
        self._ready: dict[LinearLora, tuple[Tensor, Tensor]] = {}

    def product(self, lora: LinearLora, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x [.., in] of 16 bits -> A x [n, r] in float32, scale B [r, out] likewise, and x [n, in]."""
        if x is self._x and self._rows is not None:
            ready = self._ready.pop(lora, None)
            if ready is not None and self._group is not None and self._group.fits():
                return *ready, self._rows
            self._learn(lora, x)
        elif self._ready and self._leader is not None:
            self._leader.followers = [one for one in self._leader.followers if one not in self._ready]
            self._leader.group = None
        return self._lead(lora, x)

    def _lead(self, lora: LinearLora, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        group = lora.group
        if group is None or not group.fits():
            group = _group([lora, *lora.followers])
            lora.group = group
        rows = x.reshape(-1, x.shape[-1])
        read = rows.float()
        xa = torch.mm(read, group.a)
        if not lora.followers and x is self._x:  # who leads may still be followed by others
            return xa, group.bs[0], rows
        self._x, self._rows, self._read, self._leader, self._group = x, rows, read, lora, group
        if not lora.followers:
            self._ready = {}
            return xa, group.bs[0], rows
        first, *others = torch.split_with_sizes(xa, group.sizes, 1)
        self._ready = dict(zip(lora.followers, zip(others, group.bs[1:])))
        return first, group.bs[0], rows

    def _learn(self, lora: LinearLora, x: Tensor) -> None:
        leader, read = self._leader, self._read
        if leader is None or read is None or lora is leader or lora in leader.followers:
            return
        # what the first one read must be what this one reads: a model might have changed x in between
        if torch.equal(x.reshape(read.shape).float(), read):
            leader.followers.append(lora)
            leader.group = None


def _group(loras: Sequence[LinearLora]) -> Group:
    factors: list[Tensor] = [factor for one in loras for factor in (one.A, one.B)]
    known = not any(factor.is_inference() for factor in factors)
    a = _turned(factors[::2], torch.float32, 1.0)
    bs = [_turned([one.B], torch.float32, one.scale) for one in loras]
    return Group(factors, _state(factors) if known else [], [len(one.A) for one in loras], a, bs)
