"""Frozen weights in 4 bits (NF4, int4) or 8 (int8 per row), and the linear layer that computes with them.

NF4 is QLoRA's data type: each block of 64 values shares one absolute maximum and every value is one of 16 levels, the quantiles
of a normal distribution. With `double` the maxima are kept in 8 bits themselves: 4.13 bits per weight instead of 4.5.
int4 has even steps, and blocks of 32. It is symmetric, and a block keeps its largest value with its sign, which is the end of 16 steps
from -7/8 to 1 of it: the largest value is exact, and 0 too. A zero point of its own would make a block's error a twentieth smaller
for normal weights and cost another quarter of a bit.
Backward dequantises again, so that no full copy of a weight lives between forward and backward.
Legend: E experts (1 for a linear layer), n values of one expert or matrix, b blocks of it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache
from itertools import pairwise
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from ropewalk.kernels.triton_kernels import refuse, usable

BLOCK = 64
MAXIMA = 256  # block maxima that share one scale in double quantisation
AT_ONCE = 2**18  # values at a time while dequantising, which passes through float32: what a core has at hand
READ_AT_ONCE = 2**20  # and while quantising, which passes through several copies of them

# QLoRA, Dettmers et al. 2023, appendix E.
LEVELS = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)


class Quantised(nn.Module):
    """A frozen weight of any shape kept in fewer bits; a stack of experts [E, ., .] is quantised expert by expert."""

    codes: Tensor
    scales: Tensor

    def __init__(self, shape: torch.Size, dtype: torch.dtype) -> None:
        super().__init__()
        self.shape, self.dtype = shape, dtype

    @classmethod
    def of(cls, weight: Tensor) -> Self:
        """The quantised weight, on the weight's own device."""
        raise NotImplementedError

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """The weight as the compute sees it. On a GPU Triton makes it in one pass; else little is held besides."""
        out = torch.empty(self.shape, dtype=dtype, device=self.codes.device)
        flat = out.view(_experts_of(self.shape), -1)
        if usable(out.device):
            try:
                from ropewalk.kernels.dequantised import dequantised

                dequantised(self, 0, len(flat), flat)
                return out
            except Exception as error:
                refuse(error)
        self.write(flat)
        return out

    def write(self, out: Tensor, first: int = 0) -> None:
        """The experts from `first` on into out [some, n], a piece at a time."""
        for some, span in _pieces(len(out), out.shape[1], self._together(), AT_ONCE):
            out[some, span] = self._values(slice(first + some.start, first + min(some.stop, len(out))), span)

    def _together(self) -> int:
        """Values of an expert that are dequantised together; pieces of it begin at multiples of so many."""
        raise NotImplementedError

    def _values(self, experts: slice, span: slice) -> Tensor:
        """Some values of some experts in float32."""
        raise NotImplementedError

    @property
    def device(self) -> torch.device:
        return self.codes.device

    @property
    def nbytes(self) -> int:
        """Bytes kept for this weight."""
        return sum(buffer.nbytes for buffer in self.buffers())

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def requires_grad(self) -> bool:
        return False

    def numel(self) -> int:
        """How many weights it stands for."""
        return self.shape.numel()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Move with the model, but keep scales in float32 when the model is cast: `.to(bfloat16)` means the computation."""
        kept = {name: buffer.dtype for name, buffer in self._buffers.items() if buffer is not None}
        probe = fn(torch.empty(0, dtype=self.dtype, device=self.device))
        self.dtype = probe.dtype
        for name, dtype in kept.items():
            buffer = self._buffers[name]
            assert buffer is not None
            self._buffers[name] = buffer.to(device=probe.device, dtype=dtype)
        return self


class FourBits(Quantised):
    """Two weights in a byte, each one of 16 levels, and a float32 maximum for each block (8 bits for it with `double`)."""

    levels: ClassVar[tuple[float, ...]]
    block: ClassVar[int]
    offsets: Tensor

    @classmethod
    def of(cls, weight: Tensor, double: bool = True) -> Self:
        made = cls(weight.shape, weight.dtype)
        flat = weight.reshape(_experts_of(weight.shape), -1)
        block = cls.block
        count = -(-flat.shape[1] // block)
        codes = torch.empty((len(flat), count * block // 2), dtype=torch.uint8, device=weight.device)
        maxima = torch.empty((len(flat), count), dtype=torch.float32, device=weight.device)
        nearest = _nearest(cls.levels, weight.device)
        for some, span in _pieces(len(flat), flat.shape[1], block, READ_AT_ONCE):
            values = flat[some, span].float()
            blocks = _padded(values, -(-values.shape[1] // block) * block).view(len(values), -1, block)
            first = span.start // block
            own = slice(first, first + blocks.shape[1])
            maxima[some, own] = largest = cls._largest(blocks)
            shares = blocks / largest.masked_fill(largest.abs() < 1e-30, 1e-30).unsqueeze(-1)
            bits = shares.to(torch.float16).view(torch.int16).to(torch.int32).add_(32768)
            level = torch.index_select(nearest, 0, bits.flatten()).view(len(values), -1, 2)
            codes[some, first * block // 2 : own.stop * block // 2] = level[..., 0] << 4 | level[..., 1]
        made.register_buffer("codes", codes)
        made._keep(maxima, double)
        return made

    @staticmethod
    def _largest(blocks: Tensor) -> Tensor:
        """What the blocks [E, b, .] are divided by [E, b]."""
        return blocks.abs().amax(dim=-1)

    def _keep(self, maxima: Tensor, double: bool) -> None:
        """Keep the maxima [E, b]: as they are, or in 8 bits between the smallest and the largest of 256."""
        if not double:
            self.register_buffer("scales", maxima)
            return
        grouped = _padded(maxima, -(-maxima.shape[1] // MAXIMA) * MAXIMA, repeat=True).view(len(maxima), -1, MAXIMA)
        low, high = grouped.amin(dim=-1), grouped.amax(dim=-1)
        span = (high - low).clamp_min(1e-30).unsqueeze(-1)
        self.register_buffer("scales", torch.round((grouped - low.unsqueeze(-1)) / span * 255).to(torch.uint8).flatten(1))
        self.register_buffer("offsets", torch.stack([low, high], dim=-1))

    def _maxima(self, experts: slice, blocks: slice) -> Tensor:
        """Of some blocks, which begin a group of them."""
        if self.scales.dtype == torch.float32:
            return self.scales[experts, blocks]
        groups = slice(blocks.start // MAXIMA, -(-blocks.stop // MAXIMA))
        low, high = self.offsets[experts, groups].unbind(-1)
        share = self.scales[experts, groups.start * MAXIMA : groups.stop * MAXIMA].view(*low.shape, MAXIMA) / 255
        maxima = low.unsqueeze(-1) + share * (high - low).unsqueeze(-1)
        return maxima.flatten(1)[:, : blocks.stop - blocks.start]

    def _together(self) -> int:
        return self.block * MAXIMA

    def _values(self, experts: slice, span: slice) -> Tensor:
        blocks = slice(span.start // self.block, -(-span.stop // self.block))
        codes = self.codes[experts, blocks.start * self.block // 2 : blocks.stop * self.block // 2]
        pairs = torch.index_select(_pairs(self.levels, self.device), 0, codes.flatten().int())
        values = pairs.view(torch.float32).view(len(codes), -1, self.block)
        values *= self._maxima(experts, blocks).unsqueeze(-1)
        return values.flatten(1)[:, : span.stop - span.start]


class Nf4(FourBits):
    """The 16 quantiles of a normal distribution, in blocks of 64."""

    levels, block = LEVELS, BLOCK


class Int4(FourBits):
    """16 even steps, in blocks of 32 whose largest value keeps its sign."""

    levels, block = tuple(step / 8 for step in range(-7, 9)), 32

    @staticmethod
    def _largest(blocks: Tensor) -> Tensor:
        low, high = blocks.aminmax(dim=-1)
        return torch.where(high >= -low, high, low)


class Int8(Quantised):
    """One byte a weight, and a float32 scale for each row (the last dimension)."""

    @classmethod
    def of(cls, weight: Tensor) -> Self:
        made = cls(weight.shape, weight.dtype)
        rows = weight.reshape(-1, weight.shape[-1])
        codes = torch.empty(rows.shape, dtype=torch.int8, device=weight.device)
        scales = torch.empty(len(rows), dtype=torch.float32, device=weight.device)
        step = max(1, READ_AT_ONCE // max(1, rows.shape[1]))
        for start in range(0, len(rows), step):
            part = slice(start, start + step)
            wide = rows[part].float()
            scales[part] = wide.abs().amax(dim=-1) / 127
            codes[part] = torch.round(wide / scales[part].clamp_min(1e-30).unsqueeze(-1)).to(torch.int8)
        experts = _experts_of(weight.shape)
        made.register_buffer("codes", codes.view(experts, -1, weight.shape[-1]))
        made.register_buffer("scales", scales.view(experts, -1))
        return made

    def _together(self) -> int:
        return int(self.shape[-1])

    def _values(self, experts: slice, span: slice) -> Tensor:
        rows = slice(span.start // self._together(), -(-span.stop // self._together()))
        return (self.codes[experts, rows] * self.scales[experts, rows].unsqueeze(-1)).flatten(1)


FORMATS: dict[str, type[Quantised]] = {"nf4": Nf4, "int4": Int4, "int8": Int8}


class QuantLinear(nn.Linear):
    """A frozen linear layer whose weight is kept in fewer bits; its bias stays as it is."""

    def __init__(self, weight: Quantised, bias: Tensor | None = None) -> None:
        nn.Module.__init__(self)
        self.out_features, self.in_features = weight.shape
        self.weight: Any = weight  # behaves like the weight where shapes, dtypes and devices are asked for
        self.bias: Any = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = _MatmulQuantised.apply(x, self.weight, self.bias)  # type: ignore[no-untyped-call]
        return y


class _MatmulQuantised(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Quantised, bias: Tensor | None) -> Tensor:
        ctx.weight = weight
        return torch.nn.functional.linear(x, weight.dequantize(x.dtype), bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, None, Tensor | None]:
        for_x, _, for_bias = ctx.needs_input_grad
        return (
            upstream @ ctx.weight.dequantize(upstream.dtype) if for_x else None,
            None,
            upstream.reshape(-1, upstream.shape[-1]).sum(0) if for_bias else None,
        )


def _experts_of(shape: torch.Size) -> int:
    return shape[0] if len(shape) == 3 else 1


def _pieces(experts: int, values: int, together: int, most: int) -> Iterator[tuple[slice, slice]]:
    """Some experts with all of their values at a time, or some values of one, which begin at multiples of `together`."""
    if values <= most:
        step = most // max(1, values)
        yield from ((slice(start, start + step), slice(0, values)) for start in range(0, experts, step))
        return
    width = max(together, most // together * together)
    for expert in range(experts):
        for first in range(0, values, width):
            yield slice(expert, expert + 1), slice(first, min(first + width, values))


def _padded(rows: Tensor, width: int, repeat: bool = False) -> Tensor:
    """rows [E, n] -> [E, width], with zeros or with each row's last value."""
    more = width - rows.shape[1]
    if more == 0:
        return rows
    filler = rows[:, -1:].expand(-1, more) if repeat else rows.new_zeros(len(rows), more)
    return torch.cat([rows, filler], dim=1)


@cache
def _pairs(levels: tuple[float, ...], device: torch.device) -> Tensor:
    """The two values that each of the 256 bytes stands for, their bits side by side: [256] int64."""
    values = torch.tensor(levels)
    return torch.stack([values.repeat_interleave(16), values.repeat(16)], dim=1).view(torch.int64).flatten().to(device)


@cache
def _nearest(levels: tuple[float, ...], device: torch.device) -> Tensor:
    """The level of every float16, by its bits as a signed number plus 32768: [65536] uint8; a search takes twenty times as long."""
    halves = torch.arange(-32768, 32768, dtype=torch.int32).to(torch.int16).view(torch.float16).float().nan_to_num(0.0)
    edges = torch.tensor([(low + high) / 2 for low, high in pairwise(levels)])
    return torch.bucketize(halves, edges).to(torch.uint8).to(device)
