"""Numbers rounded as a format of few bits would hold them, and kept in their own type; what they are rounded to has a gradient of 1.

Legend: a row is the last dimension, a block so many neighbours in it. Everything is computed in float32.

int4, int8   integers times a scale for each block, symmetric about 0        tokens: int8 with a zero point for each row
float8       e4m3 times a scale for each row
nvfp4        e2m1 in blocks of 16, their scales e4m3 times one more           mxfp4   e2m1 in blocks of 32, their scales powers of two
ternary      -1, 0 or 1 times the mean magnitude of all (BitNet b1.58, arXiv 2402.17764); its tokens are int8 without a zero point
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

E4M3_MOST, E2M1_MOST = 448.0, 6.0
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
# Where e2m1 rounds up: halfway, and on a tie to the number whose last bit is 0.
_BELOW = [torch.nextafter(torch.tensor(tie), torch.tensor(0.0)).item() for tie in (0.75, 1.75, 3.5)]
_TIES = (0.25, _BELOW[0], 1.25, _BELOW[1], 2.5, _BELOW[2], 5.0)
TINY = 1e-12  # in the place of a scale of 0
BLOCKS = {"nvfp4": 16, "mxfp4": 32}


def straight_through(x: Tensor, rounded: Tensor) -> Tensor:
    """The rounded numbers, with the gradient of those that they were."""
    found: Tensor = x + (rounded.to(x.dtype) - x).detach()
    return found


def integers(x: Tensor, bits: int, block: int) -> Tensor:
    """Symmetric: the largest of a block lies half a step beyond the largest integer."""
    blocks = _blocks(x, block)
    scale = (blocks.abs().amax(-1, keepdim=True) / ((2**bits - 1) / 2)).clamp_min(TINY)
    most = 2 ** (bits - 1)
    found: Tensor = (blocks / scale).round().clamp(-most, most - 1) * scale
    return found.flatten(-2)


def tokens_int8(x: Tensor) -> Tensor:
    """Of each row, from its least number to its largest, 0 among them exactly."""
    x = x.float()
    low, high = x.amin(-1, keepdim=True).clamp_max(0), x.amax(-1, keepdim=True).clamp_min(0)
    scale = ((high - low) / 255).clamp_min(TINY)
    zero = -128 - (low / scale).round()
    found: Tensor = (((x / scale).round() + zero).clamp(-128, 127) - zero) * scale
    return found


def tokens_symmetric(x: Tensor) -> Tensor:
    """int8 of each row, the largest magnitude being 127."""
    x = x.float()
    scale = (x.abs().amax(-1, keepdim=True) / 127).clamp_min(TINY)
    return (x / scale).round().clamp(-128, 127) * scale


def float8(x: Tensor) -> Tensor:
    """e4m3, the largest magnitude of a row being its largest number."""
    x = x.float()
    scale = (x.abs().amax(-1, keepdim=True) / E4M3_MOST).clamp_min(TINY)
    return _e4m3(x / scale) * scale


def nvfp4(x: Tensor, by_row: bool = False) -> Tensor:
    """e2m1 in blocks of 16, with one scale above theirs for all, or for each row where no row may feel another."""
    blocks = _blocks(x, BLOCKS["nvfp4"])
    most = blocks.abs().amax((-2, -1), keepdim=True) if by_row else blocks.abs().amax()
    whole = (most / (E2M1_MOST * E4M3_MOST)).clamp_min(TINY)
    scale = _e4m3(blocks.abs().amax(-1, keepdim=True) / E2M1_MOST / whole) * whole
    return (_e2m1(blocks / scale.clamp_min(TINY)) * scale).flatten(-2)


def mxfp4(x: Tensor) -> Tensor:
    """e2m1 in blocks of 32; a scale's exponent is that of its block's largest number, less e2m1's own largest."""
    blocks = _blocks(x, BLOCKS["mxfp4"])
    exponent = blocks.abs().amax(-1, keepdim=True).clamp_min(2.0**-120).log2().floor() - 2
    scale = torch.exp2(exponent)
    return (_e2m1(blocks / scale) * scale).flatten(-2)


def ternary(x: Tensor) -> Tensor:
    """-1, 0 or 1 times the mean magnitude."""
    x = x.float()
    scale = x.abs().mean().clamp_min(1e-5)
    return (x / scale).round().clamp(-1, 1) * scale


WEIGHTS: Mapping[str, Callable[[Tensor, int], Tensor]] = {
    "int4": lambda x, block: integers(x, 4, block),
    "int8": lambda x, block: integers(x, 8, block),
    "float8": lambda x, block: float8(x),
    "nvfp4": lambda x, block: nvfp4(x),
    "mxfp4": lambda x, block: mxfp4(x),
    "ternary": lambda x, block: ternary(x),
}
TOKENS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "int8": tokens_int8,
    "int8 symmetric": tokens_symmetric,
    "float8": float8,
    "nvfp4": lambda x: nvfp4(x, by_row=True),
    "mxfp4": mxfp4,
}


def _blocks(x: Tensor, size: int) -> Tensor:
    return x.float().reshape(*x.shape[:-1], -1, size)


def _e4m3(x: Tensor) -> Tensor:
    return x.clamp(-E4M3_MOST, E4M3_MOST).to(torch.float8_e4m3fn).float()


def _e2m1(x: Tensor) -> Tensor:
    values, ties = (torch.tensor(numbers, device=x.device) for numbers in (E2M1, _TIES))
    return values[torch.bucketize(x.abs().contiguous(), ties)].copysign(x)
