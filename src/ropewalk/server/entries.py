"""A JSON object with one long list, read while it comes: each entry is there as soon as it is whole, and the body never is.

Each entry is decoded by the standard library, as it would be in a request of its own: what is said about it is then the same. (Parsers
that stream token by token replace halves of characters, and refuse large integers, without leave.)
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterator
from typing import Any

from ropewalk.errors import BadInput, TooLarge

SPACE = re.compile(r"[ \t\n\r]*")
NOT_YET = object()
FOLLOWS = frozenset(", :]}\t\n\r")  # a value
SMALL = 1 << 14  # characters that may be decoded in vain again and again


class Entries:
    """The entries of the list under `key`; `others` is what else the object holds, and that key too where it is no list."""

    def __init__(self, key: str, most: int) -> None:
        """`most`: characters of one entry."""
        self.key, self.most = key, most
        self.others: dict[str, Any] = {}
        self.count = 0
        self._decoder, self._text, self._at = codecs.getincrementaldecoder("utf-8-sig")(), "", 0
        self._last = False
        self._tried = 0  # characters that were too few the last time; it is tried again when there are twice as many
        self._steps = self._object()
        self._ended = False

    def feed(self, data: bytes, last: bool = False) -> list[Any]:
        """The entries that these bytes have made whole; BadInput for what is no JSON object."""
        try:
            self._text = self._text[self._at :] + self._decoder.decode(data, last)
            self._at, self._last = 0, last
            found = []
            while not self._ended and (step := next(self._steps, None)) is not NOT_YET:
                self._ended = step is None
                found += [] if step is None else [step[0]]
            if self._ended and self._text[self._at :].strip(" \t\n\r"):
                raise BadInput("the body is not JSON: something follows its end")
        except (ValueError, RecursionError) as error:
            raise BadInput(f"the body is not JSON: {str(error)[:200]}") from error
        return found

    def _object(self) -> Iterator[Any]:
        """NOT_YET where more is needed, and each entry in a tuple of its own."""
        yield from self._until("{", "an object")
        if (yield from self._peek()) == "}":
            self._at += 1
            return
        while True:
            name = yield from self._value()
            if not isinstance(name, str):
                raise BadInput("the body is not JSON: a key is no string")
            yield from self._until(":", "':'")
            if name == self.key and name in self.others:
                raise BadInput(f"{name}: it stands in the body twice")
            if name == self.key and (yield from self._peek()) == "[":
                self.others[name] = []
                yield from self._list()
            else:
                self.others[name] = yield from self._value()
            if (yield from self._until(",}", "',' or '}'")) == "}":
                return

    def _list(self) -> Iterator[Any]:
        self._at += 1
        if (yield from self._peek()) == "]":
            self._at += 1
            return
        while True:
            entry = yield from self._value()
            self.count += 1
            yield (entry,)
            if (yield from self._until(",]", "',' or ']'")) == "]":
                return

    def _value(self) -> Any:
        """The value that begins here."""
        yield from self._peek()
        while True:
            if self._last or len(self._text) - self._at >= 2 * self._tried:
                try:
                    value, end = json.JSONDecoder().raw_decode(self._text, self._at)
                except ValueError:
                    if self._last:
                        raise
                else:
                    if end - self._at > self.most:
                        raise self._too_large()
                    # A number may go on where the text ends, and after a dot.
                    if self._last or self._text[end - 1] in '"]}' or self._text[end : end + 1] in FOLLOWS:
                        self._at, self._tried = end, 0
                        return value
                found = len(self._text) - self._at
                if found > self.most:
                    raise self._too_large()
                self._tried = found if found > SMALL else 0
            yield NOT_YET

    def _until(self, wanted: str, shown: str) -> Any:
        found = yield from self._peek()
        if found not in wanted:
            raise BadInput(f"the body is not JSON, or no object: {found!r} stands where {shown} is expected")
        self._at += 1
        return found

    def _peek(self) -> Any:
        """The next character that is no space."""
        while True:
            found = SPACE.match(self._text, self._at)
            assert found is not None
            self._at = found.end()
            if self._at < len(self._text):
                return self._text[self._at]
            if self._last:
                raise BadInput("the body is not JSON: it ends too early")
            yield NOT_YET

    def _too_large(self) -> TooLarge:
        return TooLarge(f"{self.key}.{self.count}: it has more than {self.most:,} characters; send less in one request")
