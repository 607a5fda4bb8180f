"""The generator's thread: what it writes is heard without waiting for it, and nobody waits for ever for one that hangs."""

import threading
import time

import pytest
import torch

from ropewalk.errors import TrainingStopped
from ropewalk.train import background
from ropewalk.train.background import Background


class Slow:
    """A generator whose every step waits until it is let go on."""

    def __init__(self):
        self.goes, self.waits, self.written, self.version = threading.Event(), threading.Event(), [], 0

    @property
    def busy(self):
        return bool(self.written)

    def submit(self, key, ids, **how):
        self.written.append(key)

    def cancel(self, key):
        self.written.remove(key)

    def publish(self):
        self.version += 1

    def step(self):
        self.waits.set()
        self.goes.wait(30)
        return [(self.written.pop(), 0, "text")]


@pytest.fixture
def slow():
    """One such generator, and its thread."""
    generator = Slow()
    yield generator, (thread := Background(generator, torch.device("cpu")))
    generator.goes.set()
    thread.close()
    thread._thread.join(10)
    assert not thread._thread.is_alive()


def test_a_step_that_does_not_end_is_told_in_time_whatever_is_asked_for(slow, monkeypatch):
    generator, thread = slow
    thread.submit("a", [1])
    assert generator.waits.wait(10)
    monkeypatch.setattr(background, "PATIENCE", 0.3)
    begun = time.monotonic()
    for ask in (thread.step, thread.publish, lambda: thread.submit("b", [1]), lambda: thread.cancel("a")):
        with pytest.raises(
            TrainingStopped, match=r"has not come to the end of a step within 0\.3 seconds; start the run again"
        ):
            ask()
    thread.close()  # leaves it behind
    assert time.monotonic() - begun < 5
    assert (generator.version, generator.written) == (0, ["a"])


def test_a_step_under_way_keeps_nobody_from_hearing_what_has_come_and_others_wait_for_its_end(slow):
    generator, thread = slow
    thread.submit("a", [1])
    assert generator.waits.wait(10)
    assert thread.step(wait=False) == []
    assert thread.busy
    timer = threading.Timer(0.1, generator.goes.set)
    timer.start()
    thread.publish()
    assert (generator.version, generator.written) == (1, [])
    assert thread.step() == [("a", 0, "text")]
    assert not thread.busy
    timer.join()
