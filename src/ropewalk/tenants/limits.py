"""How many requests a minute a workspace may make: one token bucket each, in this process.

Several server processes each count their own requests, so N of them let through up to N times the rate: give each a share, or
limit at the load balancer that spreads the requests.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime

from ropewalk.errors import RateLimited

MOST_BUCKETS = 10_000


@dataclass(frozen=True)
class Allowance:
    """What a workspace has left."""

    limit: int | None = None  # requests a minute; None: as many as it likes
    remaining: int = 0
    reset: str = ""  # RFC 3339: when the bucket is full again

    def headers(self) -> dict[str, str]:
        """The headers of a response, named as Anthropic names them."""
        if self.limit is None:
            return {}
        values = {"limit": str(self.limit), "remaining": str(self.remaining), "reset": self.reset}
        return {f"anthropic-ratelimit-requests-{name}": value for name, value in values.items()}


class Limits:
    """The buckets of the workspaces that have asked lately."""

    def __init__(self, default: int | None = None, clock: Callable[[], float] = time.monotonic) -> None:
        self._default, self._clock = default, clock
        self._buckets: dict[str, _Bucket] = {}
        self._room = MOST_BUCKETS

    def take(self, workspace_id: str, per_minute: int | None = None) -> Allowance:
        """Counts one request; raises RateLimited, with `retry_after`, when the bucket is empty."""
        limit = per_minute if per_minute is not None else self._default
        if limit is None:
            return Allowance()
        at = self._clock()
        bucket = self._buckets.get(workspace_id)
        if bucket is None or bucket.limit != limit:
            self._make_room(at)
            bucket = self._buckets[workspace_id] = _Bucket(limit, float(limit), at)
        bucket.refill(at)
        if bucket.tokens < 1:
            wait = (1 - bucket.tokens) * 60 / limit
            raise RateLimited(
                f"this workspace may make {limit:,} requests a minute; the next one in {math.ceil(wait)} seconds", wait
            )
        bucket.tokens -= 1
        return bucket.allowance()

    def left(self, workspace_id: str) -> Allowance:
        """What a workspace has left, without counting a request: the headers of a refusal."""
        bucket = self._buckets.get(workspace_id)
        return bucket.allowance() if bucket else Allowance()

    def _make_room(self, at: float) -> None:
        if len(self._buckets) < self._room:
            return
        for bucket in self._buckets.values():
            bucket.refill(at)
        # A full bucket says no more than none does.
        self._buckets = {id: bucket for id, bucket in self._buckets.items() if bucket.tokens < bucket.limit}
        self._room = max(MOST_BUCKETS, 2 * len(self._buckets))  # all busy: look again only when there are twice as many


@dataclass
class _Bucket:
    limit: int
    tokens: float
    at: float

    def refill(self, at: float) -> None:
        self.tokens = min(float(self.limit), self.tokens + (at - self.at) * self.limit / 60)
        self.at = at

    def allowance(self) -> Allowance:
        full = time.time() + (self.limit - self.tokens) * 60 / self.limit
        reset = datetime.fromtimestamp(math.ceil(full), UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
        return Allowance(self.limit, int(self.tokens), reset)
