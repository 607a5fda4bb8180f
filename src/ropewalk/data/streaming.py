"""Micro-batches of a stream: packed a buffer at a time, numbered, and found again from a saved place."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import asdict
from itertools import islice
from typing import Any

import numpy as np

from ropewalk.config.run import Run
from ropewalk.data.dataset import Batch
from ropewalk.data.laying import MULTIPLE, lay_out
from ropewalk.data.packing import best_fit
from ropewalk.data.stream import Pair, Place, Stream


class StreamBatches(Sequence[Batch]):
    """Batch i of a stream, to be asked for in rising order; `seek` a saved place first, or what lies before is read again."""

    def __init__(self, stream: Stream, run: Run, *, seed: int) -> None:
        self._stream, self._run, self._seed = stream, run, seed
        self._first, self._place, self._after = 0, Place(), Place()
        self._held: list[Batch] = []

    def __len__(self) -> int:
        """As many as the run's steps take; the data itself has no end."""
        return int(self._run.max_steps or 0) * self._run.accumulation * int(os.environ.get("WORLD_SIZE", "1"))

    def __getitem__(self, number: Any) -> Any:
        if isinstance(number, slice):
            return [self[i] for i in range(*number.indices(len(self)))]
        if number < self._first:
            self.seek({})
        while number >= self._first + len(self._held):
            self._first, self._place = self._first + len(self._held), self._after
            self._held, self._after = self._buffer(self._place)
        return self._held[number - self._first]

    def position(self) -> dict[str, int]:
        """The place of the buffer that holds the last batch asked for; a checkpoint keeps it."""
        return {"batch": self._first, **asdict(self._place)}

    def seek(self, position: dict[str, int]) -> None:
        """Goes on from a saved place; an empty one is the beginning."""
        self._first = position.get("batch", 0)
        self._place = self._after = Place(*(position.get(name, 0) for name in ("epoch", "chunk", "row")))
        self._held = []

    def _buffer(self, start: Place) -> tuple[list[Batch], Place]:
        """The batches of the next rows: a function of the place alone, so that it gives the same after a restart."""
        run = self._run
        read = list(islice(self._stream.read(start), run.streaming_multipack_buffer_size))
        rows, after = [pair for _, pair in read], read[-1][0]
        if run.shuffle_merged_datasets:
            mixed = np.random.default_rng([self._seed, *asdict(start).values()]).permutation(len(rows))
            rows = [rows[i] for i in mixed]
        lines = self._lines(rows)
        size, width = run.micro_batch_size, run.sequence_len if run.pads_rows else None
        parts = [lines[at : at + size] for at in range(0, len(lines), size)]
        return [lay_out(part, self._stream.pad, width, run.pad_to_multiple_of or MULTIPLE) for part in parts], after

    def _lines(self, rows: list[Pair]) -> list[list[Pair]]:
        if not self._run.packing:
            return [[row] for row in rows]
        found = best_fit(np.array([len(ids) for ids, _ in rows], np.int32), self._run.sequence_len)
        lines: list[list[Pair]] = [[] for _ in range(int(found.max()) + 1)]
        for row, line in zip(rows, found.tolist()):
            lines[line].append(row)
        mixed = np.random.default_rng([self._seed, len(rows)]).permutation(len(lines))
        return [lines[i] for i in mixed]
