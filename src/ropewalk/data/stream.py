"""Rows of a source that is larger than memory or disk, tokenised as they are needed, from a place that can be saved. No torch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice

import numpy as np
from numpy.typing import NDArray

from ropewalk.chat.template import Template
from ropewalk.config.run import Run
from ropewalk.data.rows import streamed_chunks
from ropewalk.data.sources import locate
from ropewalk.data.tokenise import Tokeniser
from ropewalk.errors import DataError

Pair = tuple[NDArray[np.int32], NDArray[np.int32]]


@dataclass(frozen=True)
class Place:
    """How far a stream has been read: passes over the data, chunks of this pass, rows of this chunk."""

    epoch: int = 0
    chunk: int = 0
    row: int = 0


class Stream:
    """The rows of the run's sources, one source after another, over and over."""

    def __init__(self, run: Run, template: Template) -> None:
        self.pad = template.pad_id or 0
        self._found = [(Tokeniser(run, source, template), locate(source)) for source in run.sources]
        self.counts: Counter[str] = Counter()

    def __len__(self) -> int:
        """Rows read so far; how many there are is not known."""
        return self.counts["read"]

    def read(self, start: Place = Place()) -> Iterator[tuple[Place, Pair]]:
        """Rows from a place on, without end; each with the place after it."""
        epoch = start.epoch
        while True:
            any_row = False
            for place, pair in self._once(epoch, start if epoch == start.epoch else Place(epoch)):
                any_row = True
                yield place, pair
            if not any_row and (epoch > start.epoch or start.chunk == 0):
                raise DataError("the streamed data has no row that can be trained on")
            epoch += 1

    def _once(self, epoch: int, start: Place) -> Iterator[tuple[Place, Pair]]:
        number = 0
        for tokeniser, found in self._found:
            for chunk in streamed_chunks(found):
                if number >= start.chunk:
                    block = tokeniser.chunk(chunk)
                    self.counts.update(block.counts)
                    first = start.row if number == start.chunk else 0
                    for row, (ids, mask) in enumerate(islice(block.rows(), first, None), first + 1):
                        yield Place(epoch, number, row), (ids, np.where(mask, ids, np.int32(-100)))
                number += 1
