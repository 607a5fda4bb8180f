"""Attention of rows in which several branches go on from one prompt: every branch sees the prompt and itself.

Legend: T tokens of a row, P of a prompt, B of a branch.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Piece:
    """A prompt of P tokens, which may be none, and behind it its branches, of B tokens each."""

    prompt: int
    branches: tuple[int, ...]

    @property
    def length(self) -> int:
        return self.prompt + sum(self.branches)
