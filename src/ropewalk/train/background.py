"""A generator that writes on by itself, in a thread and on a GPU stream of its own, while the trainer computes.

Between two of its steps it takes new requests and a new adapter, so that both find it in a whole state. Nothing waits without a bound:
what goes wrong in the thread is raised by whoever asks next.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch

from ropewalk.errors import TrainingStopped
from ropewalk.train.generator import Finished, Generator, Spent

PATIENCE = 600.0  # seconds in which one step of the generator must have come to its end


class Background:
    """What the rollouts need of a generator, and what they need not wait for."""

    def __init__(self, generator: Generator, device: torch.device) -> None:
        self.generator, self.device = generator, device
        on_gpu = device.type == "cuda"
        self._stream = torch.cuda.Stream(device, priority=-1) if on_gpu else None  # type: ignore[no-untyped-call]
        self._finished: list[Finished] = []
        self._error: BaseException | None = None
        self._stopping = False
        self._turn = threading.Condition()  # whoever holds it has the generator between two steps
        self._asking = 0  # so that the thread lets others in
        self._steps = 0
        self._thread = threading.Thread(target=self._run, name="generator", daemon=True)
        self._thread.start()

    @property
    def version(self) -> int:
        return self.generator.version

    @property
    def spent(self) -> Spent:
        return self.generator.spent

    @property
    def busy(self) -> bool:
        """Whether anything is being written, or has been and was not taken yet."""
        return self.generator.busy or bool(self._finished)

    def submit(self, key: str, ids: Sequence[int], **how: Any) -> None:
        """As the generator's."""
        with self._between():
            self.generator.submit(key, ids, **how)

    def cancel(self, key: str) -> None:
        """Lets go of a request."""
        with self._between():
            self.generator.cancel(key)

    def publish(self) -> None:
        """The adapter is copied behind what is computed now, on both sides."""
        with self._between():
            if self._stream is None:
                self.generator.publish()
                return
            current = torch.cuda.current_stream(self.device)
            self._stream.wait_stream(current)
            with torch.cuda.stream(self._stream):
                self.generator.publish()
            current.wait_stream(self._stream)

    def step(self, wait: bool = True) -> list[Finished]:
        """What has come to its end since; with `wait`, at least one step is waited for where there is nothing."""
        with self._between():
            seen = self._steps
            while wait and not self._finished and self.generator.busy and self._steps == seen:
                self._asking -= 1
                there = self._turn.wait(PATIENCE)
                self._asking += 1
                self._check()
                if not there:
                    raise TrainingStopped(f"the generator has not taken a step within {PATIENCE:g} seconds")
            finished, self._finished = self._finished, []
            return finished

    def close(self) -> None:
        """Ends the thread after the step under way."""
        with self._turn:
            self._stopping = True
            self._turn.notify_all()
        self._thread.join(PATIENCE)

    @contextmanager
    def _between(self) -> Iterator[None]:
        self._asking += 1
        with self._turn:
            try:
                self._check()
                yield
            finally:
                self._asking -= 1
                self._turn.notify_all()

    def _check(self) -> None:
        if self._error is not None:
            raise TrainingStopped(f"the generator has stopped: {self._error}") from self._error

    def _run(self) -> None:
        stream: Any = nullcontext() if self._stream is None else torch.cuda.stream(self._stream)
        with stream, self._turn:
            while not self._stopping:
                if self._asking or not self.generator.busy:
                    self._turn.wait(1.0)
                    continue
                try:
                    self._finished += self.generator.step()
                except BaseException as error:
                    self._error = error
                    self._turn.notify_all()
                    return
                self._steps += 1
                self._turn.notify_all()
                self._turn.wait(0)  # lets go for a moment
