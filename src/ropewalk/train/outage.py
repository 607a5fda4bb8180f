"""When what fails is taken for broken: what was asked together fails together in an outage of a moment, and that ends no run."""

from __future__ import annotations

import time

from ropewalk.errors import TrainingStopped

MOST_FAILURES = 64  # in a row, of what has never worked: its mistake is told early
OUTAGE_SECONDS = 300.0  # for which what has worked may do nothing but fail


class Outage:
    """The failures in a row of a reward, an environment or a harness."""

    def __init__(self, whose: str, unit: str) -> None:
        """`unit`: what is counted, in the plural."""
        self._whose, self._unit = whose, unit
        self._has_worked = False
        self._count, self._since, self._last = 0, 0.0, ""

    def worked(self) -> None:
        """It is over."""
        self._has_worked, self._count = True, 0

    def failed(self, error: str) -> None:
        """Once more."""
        if not self._count:
            self._since = time.monotonic()
        self._count += 1
        self._last = error

    def check(self) -> None:
        """Raises where it has lasted for too long."""
        lasted = time.monotonic() - self._since
        if self._count < MOST_FAILURES or (self._has_worked and lasted < OUTAGE_SECONDS):
            return
        span = f", for {lasted:.0f} seconds" if self._has_worked else ""
        raise TrainingStopped(f"{self._whose} failed {self._count} {self._unit} in a row{span}; the last time: {self._last}")
