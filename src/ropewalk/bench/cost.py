"""What a step costs and keeps, and what the device could do at best.

On a CPU a step costs CPU milliseconds of one thread, since the machine may be busy; on a GPU milliseconds between events.
"""

from __future__ import annotations

import functools
import gc
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile, record_function

FORWARD = "ropewalk_forward"


def milliseconds(work: Callable[[], Any], device: str) -> float:
    """Of one call."""
    if device == "cpu":
        before = time.process_time()
        work()
        return (time.process_time() - before) * 1e3
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    start.record()
    work()
    end.record()
    torch.cuda.synchronize()
    return float(start.elapsed_time(end))


@dataclass(frozen=True)
class Memory:
    """Bytes that a step adds to what lived before it: what waits for the backward pass, and the most at any moment."""

    held: int
    peak: int


def memory(forward: Callable[[], Tensor], backward: Callable[[Tensor], Any], device: str) -> Memory:
    """By the allocator's own events on a CPU, where memory of the host is counted with the rest, and by its counters on a GPU."""
    gc.collect()
    if device == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        made = forward()
        held = torch.cuda.memory_allocated() - before
        backward(made)
        return Memory(held, torch.cuda.max_memory_allocated() - before)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        with record_function(FORWARD):
            made = forward()
        backward(made)
    events = profiler.profiler.kineto_results.events()
    forwards = max(e.start_ns() + e.duration_ns() for e in events if e.name() == FORWARD)
    now = most = held = 0
    for at, size in sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]"):
        now += size
        most = max(most, now)
        if at <= forwards:
            held = now
    return Memory(held, most)


@dataclass(frozen=True)
class Ceiling:
    """What one large product and one large copy reach on this device."""

    flops: float  # a second
    bytes: float  # a second, read and written

    def milliseconds(self, passes: list[tuple[float, float]]) -> float:
        """The least for passes of (operations, bytes), each bound by the slower of the two."""
        return 1e3 * sum(max(operations / self.flops, size / self.bytes) for operations, size in passes)


@functools.cache
def ceiling(dtype: torch.dtype, device: str) -> Ceiling:
    """Measured: the best of some, once in a process."""
    size, count = (8192, 10) if device == "cuda" else (1024, 6)
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    product = torch.empty_like(a)
    source = torch.empty(2**28 if device == "cuda" else 2**24, dtype=torch.float32, device=device).fill_(1)
    copy = torch.empty_like(source)
    took = [milliseconds(lambda: torch.mm(a, b, out=product), device) for _ in range(count)]
    copied = [milliseconds(lambda: copy.copy_(source), device) for _ in range(count)]
    return Ceiling(2 * size**3 / min(took) * 1e3, 2 * source.nbytes / min(copied) * 1e3)
