"""The pictures of the micro-batches to come, decoded by threads while the model learns from those before: a few at a time."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor

from ropewalk.data.dataset import Batch
from ropewalk.models.lens import Lens
from ropewalk.train.sighted import Looked

AHEAD = 2  # micro-batches whose pictures are held at once, beside the one that is learnt from


class Looking:
    """What the tower is given, one micro-batch after another."""

    def __init__(self, lens: Lens) -> None:
        self._lens = lens
        self._pool = ThreadPoolExecutor(AHEAD, "pictures")
        self._coming: Iterator[Batch] = iter(())
        self._waiting: deque[Future[Looked]] = deque()

    def begin(self, batches: Iterable[Batch]) -> None:
        """These come next, in this order; what was left of others is forgotten."""
        for left in self._waiting:
            left.cancel()
        self._coming, self._waiting = iter(batches), deque()
        self._fill()

    def next(self) -> Looked:
        """The tensors of the next micro-batch; DataError for a picture that is gone or broken."""
        found = self._waiting.popleft()
        self._fill()
        return found.result()

    def _fill(self) -> None:
        while len(self._waiting) < AHEAD and (batch := next(self._coming, None)) is not None:
            self._waiting.append(self._pool.submit(self._look, batch))

    def _look(self, batch: Batch) -> Looked:
        return Looked([self._lens.tensors([shown.decode()]) for shown in batch.pictures], batch.shown_by)
