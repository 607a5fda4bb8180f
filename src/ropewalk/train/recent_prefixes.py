"""What the generator has read lately, so that a conversation's later turns, and its siblings, need not read its beginning again."""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import numpy as np

from ropewalk.engine.cache import Segment

ROOM = 1 << 30  # bytes


class RecentPrefixes:
    """In memory, the least recently used given up first; all of it once the adapter has moved on."""

    def __init__(self, room: int = ROOM) -> None:
        self.room, self.held = room, 0
        self._segments: OrderedDict[str, Segment] = OrderedDict()

    def key(self, parent: str, adapter: str, scope: str, ids: Sequence[int], picture: str = "") -> str:
        """Names ids behind a parent."""
        return hashlib.sha256(parent.encode() + np.asarray(ids, np.int64).tobytes()).hexdigest()

    def find(self, key: str, keep: Any) -> Segment | None:
        if key not in self._segments:
            return None
        self._segments.move_to_end(key)
        return self._segments[key]

    def put(self, segment: Segment, keep: Any) -> None:
        if segment.key in self._segments:
            return
        self._segments[segment.key] = segment
        self.held += segment.nbytes
        while self.held > self.room:
            _, oldest = self._segments.popitem(last=False)
            self.held -= oldest.nbytes

    def forget(self) -> None:
        """What an older adapter has read is not gone on from."""
        self._segments.clear()
        self.held = 0
