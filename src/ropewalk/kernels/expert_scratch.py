"""Stacks of experts kept in 4 or 8 bits as products read them: some experts at a time, in memory that is used again.

`some_at_a_time` is for products over all rows: while some experts are multiplied, the next are made in the other half of the scratch. On a
GPU that happens on a stream of its own, so that the one hides behind the other; elsewhere it is the same work in the same order.
`Stored` is for tiles, which take one expert after another: its weights are made when they are first asked for.
Legend: E experts, N and K the sizes of a stack [E, N, K].
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import Any, Protocol

import torch
from torch import Tensor

from ropewalk.kernels.quant import Quantised

SCRATCH = 2**28  # bytes of dequantised experts, both halves together

Fill = Callable[[Any, int, int, Tensor], Tensor]  # (stack, first, count, out [some, N, K]) -> the beginning of out


def experts_at_once(shape: torch.Size, dtype: torch.dtype) -> int:
    """How many experts of a stack fit half the scratch."""
    return min(shape[0], max(1, SCRATCH // 2 // max(1, shape[1:].numel() * dtype.itemsize)))


def scratch_bytes(shape: torch.Size, dtype: torch.dtype) -> int:
    """What the scratch takes for a stack."""
    step = experts_at_once(shape, dtype)
    return min(2, -(-shape[0] // step)) * step * shape[1:].numel() * dtype.itemsize


def dequantised_plain(stack: Quantised, first: int, count: int, out: Tensor) -> Tensor:
    """The plain twin of `dequantised.dequantised`: experts first to first + count, as the stack itself makes them."""
    stack.write(out[:count].view(count, -1), first)
    return out[:count]


def some_at_a_time(
    stack: Quantised, dtype: torch.dtype, fill: Fill = dequantised_plain, lane: Lane | None = None
) -> Iterator[tuple[int, Tensor]]:
    """(first, weights [some, N, K] of the experts from first on), which hold until the next are asked for."""
    experts, step = stack.shape[0], experts_at_once(stack.shape, dtype)
    firsts = range(0, experts, step)
    halves = [torch.empty(step, *stack.shape[1:], dtype=dtype, device=stack.device) for _ in firsts[:2]]
    lane = lane or lane_of(stack.device)
    lane.begin()

    def made(number: int) -> Tensor:
        first = firsts[number]
        with lane.filling(number % 2):
            return fill(stack, first, min(step, experts - first), halves[number % 2])

    coming = made(0)
    for number, first in enumerate(firsts):
        some = coming
        lane.await_filled(number % 2)
        if number + 1 < len(firsts):
            coming = made(number + 1)
        yield first, some
        lane.was_read(number % 2)


class Lane(Protocol):
    """In which order halves of the scratch are filled and read."""

    def begin(self) -> None:
        """Whatever was asked for before comes first."""

    def filling(self, half: int) -> AbstractContextManager[Any]:
        """Within it a half is filled, when it has been read."""

    def await_filled(self, half: int) -> None:
        """What is asked for from here on reads the half as it was last filled."""

    def was_read(self, half: int) -> None:
        """All that reads the half has been asked for."""


class _InTurn:
    """One thing after another, as it is asked for."""

    def begin(self) -> None:
        return

    def filling(self, half: int) -> AbstractContextManager[Any]:
        return nullcontext()

    def await_filled(self, half: int) -> None:
        return

    def was_read(self, half: int) -> None:
        return


class _Beside:
    """Filling on a stream of its own. The halves belong to the stream that multiplies, which waits for every filling: so they may be freed there."""

    def __init__(self, device: torch.device) -> None:
        self._side, self._here = _side_stream(device), torch.cuda.current_stream(device)
        self._filled, self._read = ([torch.cuda.Event() for _ in range(2)] for _ in range(2))  # type: ignore[no-untyped-call]

    def begin(self) -> None:
        self._side.wait_stream(self._here)

    def filling(self, half: int) -> AbstractContextManager[Any]:
        return _Filling(self._side, self._read[half], self._filled[half])

    def await_filled(self, half: int) -> None:
        self._here.wait_event(self._filled[half])

    def was_read(self, half: int) -> None:
        self._read[half].record(self._here)


class _Filling(AbstractContextManager[None]):
    def __init__(self, side: Any, read: Any, filled: Any) -> None:
        self._side, self._read, self._filled = side, read, filled
        self._on = torch.cuda.stream(side)

    def __enter__(self) -> None:
        self._on.__enter__()  # type: ignore[no-untyped-call]
        self._side.wait_event(self._read)  # one that was never recorded is not waited for

    def __exit__(self, *failed: Any) -> None:
        self._filled.record(self._side)
        self._on.__exit__(*failed)


def lane_of(device: torch.device) -> Lane:
    """The device's."""
    return _Beside(device) if device.type == "cuda" else _InTurn()


@cache
def _side_stream(device: torch.device) -> Any:
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]


class Stored:
    """A stack of fewer bits as rows are multiplied with it: [E, N, K], or [E, K, N] turned round. One expert's weights are there at a time."""

    def __init__(self, stack: Quantised, dtype: torch.dtype, *, turned: bool = False, beside: Stored | None = None) -> None:
        self._stack, self._dtype, self._turned = stack, dtype, turned
        self._made: dict[str, Any] = {} if beside is None else beside._made  # both ways round are the same memory

    @property
    def shape(self) -> tuple[int, int, int]:
        experts, first, second = self._stack.shape
        return (experts, second, first) if self._turned else (experts, first, second)

    def transpose(self, first: int, second: int) -> Stored:
        assert (first, second) == (1, 2)
        return Stored(self._stack, self._dtype, turned=not self._turned, beside=self)

    def __getitem__(self, expert: int) -> Tensor:
        made = self._made
        if made.get("expert") != expert:
            if "weights" not in made:
                made["weights"] = torch.empty(1, *self._stack.shape[1:], dtype=self._dtype, device=self._stack.device)
            made["expert"] = expert
            dequantised_plain(self._stack, expert, 1, made["weights"])
        weights: Tensor = made["weights"][0]
        return weights.t() if self._turned else weights
