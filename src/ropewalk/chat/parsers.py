"""A reply's text as content blocks, while it comes: thinking, text, calls of tools, by the words of the model's template family.

A parser is fed text in which control tokens still stand as they are written, and says what it brings; what might be the beginning
of a marker is held back until it is known.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from ropewalk.chat.messages import BlockEnded, BlockStarted, Delta, ReplyEvent, Text, Thinking


class Parser(Protocol):
    """What answers need of every family's parser."""

    def feed(self, text: str) -> list[ReplyEvent]:
        """More of the reply."""

    def finish(self) -> list[ReplyEvent]:
        """The reply is over: whatever was held back, and the end of the block at hand."""


class Plain:
    """Thinking between two markers, if the family has them, and text."""

    def __init__(self, opening: str = "<think>", closing: str = "</think>", *, thinks_first: bool = False) -> None:
        """`thinks_first`: the prompt ends inside of thinking, so that the reply begins there."""
        self._opening, self._closing = opening, closing
        self._held = ""
        self._block: Text | Thinking | None = None
        self._inside = thinks_first

    def feed(self, text: str) -> list[ReplyEvent]:
        """More of the reply."""
        self._held += text
        events: list[ReplyEvent] = []
        while True:
            marker = self._closing if self._inside else self._opening
            place = self._held.find(marker)
            if place < 0:
                break
            events += self._say(self._held[:place])
            self._held = self._held[place + len(marker) :]
            events += self._end()
            self._inside = not self._inside
        kept = held_back(self._held, [marker])
        events += self._say(self._held[: len(self._held) - kept])
        self._held = self._held[len(self._held) - kept :]
        return events

    def finish(self) -> list[ReplyEvent]:
        """What was held back, and the end of the block at hand."""
        events = self._say(self._held) + self._end()
        self._held = ""
        return events

    def _say(self, text: str) -> list[ReplyEvent]:
        if self._block is None:
            text = text.lstrip()  # blanks between thinking and text belong to neither
            if not text:
                return []
            self._block = Thinking("") if self._inside else Text("")
            return [BlockStarted(self._block), Delta(text)]
        return [Delta(text)] if text else []

    def _end(self) -> list[ReplyEvent]:
        ended, self._block = self._block, None
        return [BlockEnded()] if ended is not None else []


def held_back(text: str, markers: Sequence[str]) -> int:
    """How many characters at the end of a text may be the beginning of a marker."""
    longest = max(map(len, markers), default=0) - 1
    for count in range(min(longest, len(text)), 0, -1):
        if any(marker.startswith(text[-count:]) for marker in markers):
            return count
    return 0
