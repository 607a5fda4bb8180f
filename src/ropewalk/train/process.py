"""The process that a run lives in: its device, its threads, its randomness, its memory, and being asked to stop."""

from __future__ import annotations

import hashlib
import os
import resource
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from ropewalk.train.distributed import World
from ropewalk.train.folder import usable_cores
from ropewalk.train.prepare import Prepared


def own_device() -> torch.device:
    """This process's own GPU where there are any, else the CPU."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    return torch.device("cuda", torch.cuda.current_device())


def set_threads(prepared: Prepared, world: World) -> None:
    """The same count on every start of a run: sums over threads are not associative, and a resumed run must give the same bits."""
    recorded = prepared.folder.record.get("threads")
    asked = prepared.run.num_threads or recorded or int(os.environ.get("OMP_NUM_THREADS", "0"))
    # Half of them: two threads that share a core's units, or a busy machine, are slower than one. Never a function of the load.
    threads = asked or max(1, usable_cores() // 2 // world.size)
    torch.set_num_threads(threads)
    if world.leads and not recorded:
        prepared.folder.write_record(threads=threads)


def step_seed(*parts: int) -> int:
    """One seed for what is random in a step of a process: 63 bits that no two of them share."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:8], "big") >> 1


def peak_memory(device: torch.device) -> int:
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


@contextmanager
def asked_to_stop() -> Iterator[list[int]]:
    """A list that fills when Ctrl-C or SIGTERM arrives; the step under way is finished first. A second Ctrl-C ends at once."""
    asked: list[int] = []

    def note(number: int, frame: Any) -> None:
        if asked and number == signal.SIGINT:
            raise KeyboardInterrupt
        asked.append(number)

    try:
        old = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    except ValueError:  # not the main thread: signals are somebody else's
        yield asked
        return
    try:
        yield asked
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)
