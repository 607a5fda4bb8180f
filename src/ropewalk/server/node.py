"""A value of a JSON body that knows where it stands, so that what is wrong with it is told by its path: `messages.0.content.1: ...`."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Any

from ropewalk.errors import BadInput

MAX_DEPTH = 64


@dataclass(frozen=True)
class Node:
    """A value and the path to it; each method is what the value is expected to be."""

    value: Any
    path: str = ""

    def fail(self, why: str) -> BadInput:
        """The error of this value, to be raised."""
        error = BadInput(f"{self.path}: {why}" if self.path else why)
        error.param = self.path or None
        return error

    def at(self, key: str | int) -> str:
        """The path of what lies within."""
        return f"{self.path}.{key}" if self.path else str(key)

    def record(self) -> dict[str, Any]:
        if not isinstance(self.value, dict):
            raise self.fail("Input should be an object")
        return self.value

    def get(self, key: str) -> Node | None:
        """The value of a key; None where there is none, or null."""
        found = self.record().get(key)
        return None if found is None else Node(found, self.at(key))

    def need(self, key: str) -> Node:
        """The value of a key that has to be there."""
        if key not in self.record():
            raise Node(None, self.at(key)).fail("Field required")
        return Node(self.value[key], self.at(key))

    def only(self, keys: Collection[str]) -> None:
        """Refuses keys that nobody knows; one that says nothing passes."""
        for key, value in self.record().items():
            if key not in keys and value is not None:
                raise Node(None, self.at(key[:100])).fail("Extra inputs are not permitted")

    def items(self, most: int | None = None) -> Iterator[Node]:
        """The values of a list."""
        if not isinstance(self.value, list):
            raise self.fail("Input should be a valid list")
        if most is not None and len(self.value) > most:
            raise self.fail(f"List should have at most {most:,} items, not {len(self.value):,}")
        return (Node(value, self.at(number)) for number, value in enumerate(self.value))

    def text(self, least: int = 0, most: int | None = None) -> str:
        if not isinstance(self.value, str):
            raise self.fail("Input should be a valid string")
        if len(self.value) < least:
            raise self.fail(f"String should have at least {least} character{'s' if least > 1 else ''}")
        if most is not None and len(self.value) > most:
            raise self.fail(f"String should have at most {most:,} characters")
        if not self.value.isascii() and any("\ud800" <= letter <= "\udfff" for letter in self.value):
            raise self.fail("the text holds half of a surrogate pair, which is no character; send both halves, or neither")
        return self.value

    def data(self, depth: int = MAX_DEPTH) -> Any:
        """Whatever JSON can say, of a depth that can be written again."""
        if depth == 0:
            raise Node(None, self.path[:200]).fail(f"it is nested more than {MAX_DEPTH} deep")
        match self.value:
            case str():
                self.text()
            case float() if not math.isfinite(self.value):
                raise self.fail("Input should be a valid number")
            case list():
                for inner in self.items():
                    inner.data(depth - 1)
            case dict():
                for key, value in self.value.items():
                    Node(key, self.at(key[:100])).text()
                    Node(value, self.at(key[:100])).data(depth - 1)
        return self.value

    def mapping(self) -> dict[str, Any]:
        """An object of any content."""
        self.record()
        found: dict[str, Any] = self.data()
        return found

    def integer(self, least: int, most: int | None = None) -> int:
        if isinstance(self.value, float) and self.value.is_integer():
            return Node(int(self.value), self.path).integer(least, most)
        if not isinstance(self.value, int) or isinstance(self.value, bool):
            raise self.fail("Input should be a valid integer")
        self._within(self.value, least, most)
        return self.value

    def number(self, least: float, most: float) -> float:
        if not isinstance(self.value, int | float) or isinstance(self.value, bool):
            raise self.fail("Input should be a valid number")
        if isinstance(self.value, float) and not math.isfinite(self.value):  # an integer may be too large to be asked that
            raise self.fail("Input should be a valid number")
        self._within(self.value, least, most)
        return float(self.value)

    def boolean(self) -> bool:
        if not isinstance(self.value, bool):
            raise self.fail("Input should be a valid boolean")
        return self.value

    def choice(self, options: Collection[str]) -> str:
        """One of a few words."""
        if not isinstance(self.value, str) or self.value not in options:
            shown = f", not '{self.value[:40]}'" if isinstance(self.value, str) else ""
            raise self.fail(f"Input should be {' or '.join(repr(option) for option in options)}{shown}")
        return self.value

    def _within(self, value: float, least: float, most: float | None) -> None:
        if value < least:
            raise self.fail(f"Input should be greater than or equal to {least:g}")
        if most is not None and value > most:
            raise self.fail(f"Input should be less than or equal to {most:g}")
