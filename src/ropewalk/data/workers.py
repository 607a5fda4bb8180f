"""Chunks -> blocks, in order: in this process where there is little to do, else over processes. No torch."""

from __future__ import annotations

import os
import sys
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import contextmanager
from itertools import islice
from multiprocessing import get_context

from ropewalk.data.rows import Chunk
from ropewalk.data.tokenise import Block, Tokeniser

Progress = Callable[[int, int, int], None]  # bytes read, bytes in all, rows read

# Below this a worker costs more time and memory than it saves: a process does about 1 MB of chat a second, and starts in one.
ALONE, PER_WORKER, MOST, SHOWN = 6 << 20, 2 << 20, 32, 1 << 20


def tokenise(
    tokeniser: Tokeniser,
    chunks: Iterator[Chunk],
    total: int,
    asked: int | None = None,
    *,
    skip: int = 0,
    progress: Progress | None = None,
) -> Iterator[Block]:
    """The blocks of all chunks but the first `skip`; `total` is about the number of bytes, `asked` the number of processes."""
    read = rows = 0
    for passed in islice(chunks, skip):
        read += weigh(passed)
    workers = count(total, asked)
    for weight, block in _alone(tokeniser, chunks) if workers == 1 else _together(tokeniser, chunks, workers):
        read, rows = read + weight, rows + block.counts["read"]
        if progress:
            progress(read, total, rows)
        yield block


def count(total: int, asked: int | None) -> int:
    """How many processes are worth their start."""
    if total < ALONE or asked == 1:
        return 1
    return max(1, min(asked or min(len(os.sched_getaffinity(0)), MOST), total // PER_WORKER))


def weigh(chunk: Chunk) -> int:
    """About how many bytes a chunk is."""
    return (
        len(chunk.lines) + 1
        if chunk.lines is not None
        else sum(len(str(value)) for _, value in chunk.values[:8]) * len(chunk.values) // 8
    )


def _alone(tokeniser: Tokeniser, chunks: Iterator[Chunk]) -> Iterator[tuple[int, Block]]:
    for chunk in chunks:
        yield weigh(chunk), tokeniser.chunk(chunk)


def _together(tokeniser: Tokeniser, chunks: Iterator[Chunk], workers: int) -> Iterator[tuple[int, Block]]:
    # Spawned, since forking a process that has run the tokenizer's threads can hang.
    with _one_thread_each(), ProcessPoolExecutor(workers, get_context("spawn"), _begin, (tokeniser,)) as pool:
        waiting: deque[tuple[int, Future[Block]]] = deque()
        try:
            for chunk in chunks:
                waiting.append((weigh(chunk), pool.submit(_work, chunk)))
                if len(waiting) >= 3 * workers:
                    weight, block = waiting.popleft()
                    yield weight, block.result()
            while waiting:
                weight, block = waiting.popleft()
                yield weight, block.result()
        finally:
            for _, block in waiting:
                block.cancel()


@contextmanager
def shown() -> Iterator[Progress | None]:
    """A progress bar on a terminal, for work that takes long enough to wonder; nothing elsewhere."""
    if not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import BarColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bar

    columns = (
        TextColumn("tokenising"),
        BarColumn(),
        TextColumn("{task.percentage:3.0f}%"),
        TextColumn("{task.fields[rows]} rows"),
    )
    with Bar(*columns, TimeRemainingColumn(), console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("tokenising", rows=0, visible=False)

        def progress(read: int, total: int, rows: int) -> None:
            bar.update(task, total=total, completed=min(read, total), rows=rows, visible=total > SHOWN)

        yield progress


@contextmanager
def _one_thread_each() -> Iterator[None]:
    before = {name: os.environ.get(name) for name in ("OMP_NUM_THREADS", "TOKENIZERS_PARALLELISM")}
    os.environ.update(OMP_NUM_THREADS="1", TOKENIZERS_PARALLELISM="false")
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})


_mine: list[Tokeniser] = []


def _begin(tokeniser: Tokeniser) -> None:
    _mine[:] = [tokeniser]


def _work(chunk: Chunk) -> Block:
    return _mine[0].chunk(chunk)
