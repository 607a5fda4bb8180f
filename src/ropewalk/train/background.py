"""A generator that writes on by itself, in a thread and on a GPU stream of its own, while the trainer computes.

Between two of its steps it takes new requests and a new adapter, so that both find it in a whole state. Nothing waits without a bound:
what goes wrong in the thread is raised by whoever asks next, and so is a step that does not come to its end. No lock is held during a
step, so that whoever waits for one can give up.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
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
        self._stopping = self._hangs = False
        self._turn = threading.Condition()  # held for moments; guards what follows, and between two steps the generator
        self._stepping = False  # whether the thread has the generator
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
        with self._turn:
            return self._writes or bool(self._finished)

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
        with self._turn:
            self._check()
            if wait:
                seen = self._steps
                self._wait_for(lambda: bool(self._finished) or self._steps != seen or not self._writes)
            finished, self._finished = self._finished, []
            return finished

    def close(self) -> None:
        """Ends the thread after the step under way; one that has been seen to hang is left to the end of the process."""
        with self._turn:
            self._stopping = True
            self._turn.notify_all()
        self._thread.join(0 if self._hangs else PATIENCE)

    @property
    def _writes(self) -> bool:
        return self._stepping or self.generator.busy

    @contextmanager
    def _between(self) -> Iterator[None]:
        with self._turn:
            self._asking += 1
            try:
                self._wait_for(lambda: not self._stepping)
                yield
            finally:
                self._asking -= 1
                self._turn.notify_all()

    def _wait_for(self, true: Callable[[], bool]) -> None:
        """Lets go of the lock until this is so; the thread notifies after every step."""
        there = self._turn.wait_for(lambda: self._error is not None or true(), 0 if self._hangs else PATIENCE)
        self._check()
        if not there:
            self._hangs = True
            raise TrainingStopped(
                f"the generator has not come to the end of a step within {PATIENCE:g} seconds; start the run again, which goes on from "
                "its last checkpoint, and report it if it hangs there too"
            )

    def _check(self) -> None:
        if self._error is not None:
            raise TrainingStopped(f"the generator has stopped: {self._error}") from self._error

    def _run(self) -> None:
        stream: Any = nullcontext() if self._stream is None else torch.cuda.stream(self._stream)
        with stream:
            while self._takes_its_turn():
                finished: list[Finished] = []
                error: BaseException | None = None
                try:
                    finished = self.generator.step()
                except BaseException as raised:
                    error = raised
                with self._turn:
                    self._finished += finished
                    self._stepping, self._error = False, error
                    self._steps += 1
                    self._turn.notify_all()
                    if error is not None:
                        return

    def _takes_its_turn(self) -> bool:
        """Whether the thread has the generator now, once there is something to write and nobody asks; not at the end."""
        with self._turn:
            while not self._stopping and (self._asking or not self.generator.busy):
                self._turn.wait(1.0)
            self._stepping = not self._stopping
            return self._stepping
