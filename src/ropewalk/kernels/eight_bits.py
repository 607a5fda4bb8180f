"""An optimizer's moments in 8 bits between its steps, in plain torch: blocks of 256 numbers share their largest magnitude.

The code books are the dynamic ones of Dettmers et al. 2022, "8-bit Optimizers via Block-wise Quantization" (arXiv 2110.02861): seven
decades, each cut into twice as many even steps as the one below it, so that a block's largest numbers are exact to a hundredth
and those a million times smaller are still there. Half of the codes are negative for a mean, and none for a mean of squares.
A number goes to the nearest code, by way of float16: its 65,536 values are looked up in a table, which costs less than a search.
Legend: n numbers, b = n / 256 blocks of them.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

BLOCK = 256
SMALL = 4096  # tensors of fewer numbers are left in float32, as is usual: they weigh nothing
DECADES = 7


def code_book(signed: bool) -> Tensor:
    """The 256 numbers in [-1, 1], or in [0, 1], that a byte stands for, in rising order."""
    found = [0.0, 1.0]
    for decade in range(DECADES):
        steps = 2**decade if signed else 2 ** (decade + 1)
        width = 0.9 / steps
        middles = [(0.1 + width * (step + 0.5)) * 10.0 ** (decade - DECADES + 1) for step in range(steps)]
        found += middles + [-middle for middle in middles] * signed
    return torch.tensor(sorted(found), dtype=torch.float32)


@dataclass(frozen=True)
class Book:
    """A code book on a device."""

    values: Tensor  # [256] float32
    nearest: Tensor  # [65536] uint8: the code of every float16, by its bits as a signed number plus 32768
    zero: int  # the code of 0
    signed: bool


@cache
def book(signed: bool, device: torch.device) -> Book:
    """The code book of means, or of means of squares."""
    values = code_book(signed)
    halves = torch.arange(-32768, 32768, dtype=torch.int32).to(torch.int16).view(torch.float16).float()
    nearest = torch.bucketize(halves.nan_to_num(0.0), (values[1:] + values[:-1]) / 2).to(torch.uint8)
    return Book(values.to(device), nearest.to(device), int((values == 0).nonzero()), signed)


def quantise(x: Tensor, codes: Tensor, scales: Tensor, kind: Book) -> None:
    """x [n] float32 -> codes [n] uint8 and scales [b] float32; x is used up."""
    blocks = x.view(-1, BLOCK)
    largest = blocks.abs().amax(dim=-1) if kind.signed else blocks.amax(dim=-1)
    scales.copy_(largest)
    blocks.div_(largest.clamp_min_(torch.finfo(torch.float32).tiny).unsqueeze(-1))
    place = x.to(torch.float16).view(torch.int16).to(torch.int32).add_(32768)
    torch.index_select(kind.nearest, 0, place, out=codes)


def dequantise(codes: Tensor, scales: Tensor, kind: Book, out: Tensor) -> Tensor:
    """The way back: codes [n], scales [b] -> out [n] float32."""
    torch.index_select(kind.values, 0, codes.to(torch.int32), out=out)
    out.view(-1, BLOCK).mul_(scales.unsqueeze(-1))
    return out
