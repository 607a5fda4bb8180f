"""Calls of tools while they are read: JSON that ends where its object does, within what a family writes around it."""

from __future__ import annotations

import json
import re
from collections.abc import Container
from typing import Any, NoReturn

DEEPEST = 100  # objects and lists within one another
_ESCAPED = frozenset('"\\/bfnrt')
_SCALAR = re.compile(r"true|false|null|-?(?:0|[1-9][0-9]*)(?:\.[0-9]+)?(?:[eE][+-]?[0-9]+)?")
_HIGH = re.compile(r"\\u[dD][89abAB][0-9a-fA-F]{2}")
_ESCAPE = re.compile(_HIGH.pattern + r"\\u[dD][c-fC-F][0-9a-fA-F]{2}|\\u[dD][89a-fA-F][0-9a-fA-F]{2}|\\.")
_BLANK = frozenset(" \t\n\r")


def _paired(escape: re.Match[str]) -> str:
    """An escape as it is; half a surrogate pair, which is no character, as the one that stands for none."""
    return "\\ufffd" if len(escape[0]) == 6 else escape[0]


class JsonObject:
    """A JSON object as it comes: tells whatever of it could be closed into JSON at any moment, and where it ends."""

    def __init__(self) -> None:
        self.done = self.failed = False
        self._open: list[str] = []  # '{' '[' and '"' of a value at hand
        self._held = ""  # has come and cannot be told yet: keys, numbers, halves of escapes
        self._wants = "object"  # object | first key | key | colon | value | first value | more
        self._in = ""  # what is at hand: key | string | scalar
        self._escape = self._scalar = ""

    def feed(self, text: str) -> tuple[str, int]:
        """More text -> what can be told of it, and how many of its characters belong to the object."""
        told = ""
        for place, character in enumerate(text):
            told += self._take(character)
            if self.done or self.failed:
                return told, place + 1
        return told, len(text)

    @property
    def wants_key(self) -> bool:
        return self._wants in ("first key", "key") and not self._in

    def close(self) -> str:
        """What makes JSON of all that was told."""
        ends = "".join({"{": "}", "[": "]", '"': '"'}[opening] for opening in reversed(self._open))
        return ends if self._wants != "object" else "{}"

    def _take(self, character: str) -> str:
        self._held += character
        if self._in in ("key", "string"):
            return self._in_string(character)
        if self._in == "scalar":
            if character not in _BLANK and character not in ",}]":
                self._scalar += character
                return ""
            self._in = ""
            if not _SCALAR.fullmatch(self._scalar):
                return self._fail()
            self._held = self._held[:-1]
            told = self._tell()
            self._held = character
            self._wants = "more"
            return told + self._outside(character)
        return self._outside(character)

    def _outside(self, character: str) -> str:
        wants = self._wants
        if character in _BLANK and wants != "object":
            return ""
        if wants == "object":
            if character in _BLANK:
                self._held = ""
                return ""
            return self._enter("{") if character == "{" else self._fail()
        if character == "}" and wants in ("first key", "more") and self._open[-1] == "{":
            return self._leave()
        if character == "]" and wants in ("first value", "more") and self._open[-1] == "[":
            return self._leave()
        if wants in ("first key", "key"):
            self._in = "key"
            return "" if character == '"' else self._fail()
        if wants == "colon":
            self._wants = "value"
            return "" if character == ":" else self._fail()
        if wants == "more":
            self._wants = "key" if self._open[-1] == "{" else "value"
            return "" if character == "," else self._fail()
        if character in "{[":
            return self._enter(character)
        if character == '"':
            self._in = "string"
            self._open.append('"')
            return self._tell()
        if character not in "-0123456789tfn":
            return self._fail()
        self._in, self._scalar = "scalar", character
        return ""

    def _in_string(self, character: str) -> str:
        if self._escape:
            self._escape += character
            return self._escaped()
        if character == "\\":
            self._escape = character
            return ""
        if character < " ":
            return self._fail()
        if character != '"':
            return self._tell() if self._in == "string" else ""
        if self._in == "key":
            self._in, self._wants = "", "colon"
            return ""
        self._in, self._wants = "", "more"
        self._open.pop()
        return self._tell()

    def _escaped(self) -> str:
        escape = self._escape
        if len(escape) == 2 and escape[1] in _ESCAPED:
            pass
        elif not re.fullmatch(r"\\u[0-9a-fA-F]{0,4}", escape):
            return self._fail()
        elif len(escape) < 6:
            return ""
        self._escape = ""
        half = _HIGH.fullmatch(escape) is not None  # told with the other half
        return self._tell() if self._in == "string" and not half else ""

    def _enter(self, character: str) -> str:
        self._open.append(character)
        self._wants = "first key" if character == "{" else "first value"
        return self._tell() if len(self._open) <= DEEPEST else self._fail()

    def _leave(self) -> str:
        self._open.pop()
        self._wants = "more"
        self.done = not self._open
        return self._tell()

    def _tell(self) -> str:
        told, self._held = self._held, ""
        return _ESCAPE.sub(_paired, told) if "\\" in told else told

    def _fail(self) -> str:
        self.failed = True
        return ""


class JsonCall:
    """A call whose input is JSON: `header` with the tool's name, unless that is known; the input; `footer`, decided by `until`."""

    def __init__(
        self, names: Container[str], header: str, footer: str = "", until: str = "", name: str = "", first: str = ""
    ) -> None:
        """`first`: what a header begins with."""
        self._names, self._header, self._footer, self._until = names, re.compile(header), re.compile(footer), until
        self.name = name if name in names else ""
        self._first = first
        self.input = self.rest = ""
        self.done = False
        self.failed = bool(name) and not self.name
        self._object = JsonObject()
        self._held = ""
        self._whole = ""

    def feed(self, text: str) -> None:
        """More of the text."""
        self._held += text
        if not self.name and not self.failed:
            self._find_name()
        if self.name and not self._object.done:
            self._read()
        if self._object.done and not self.done and not self.failed:
            self._find_end()

    def finish(self) -> None:
        """The text is over: what stands behind the input may be missing."""
        if not self.done and not self.failed:
            left = self._held.strip().removeprefix("}").strip()
            if self._object.done and self._until.startswith(left):
                self.done = True
            else:
                self.failed = True

    def close(self) -> str:
        """What makes the input JSON, where it is cut off."""
        return self._object.close()

    def _find_name(self) -> None:
        found = self._header.match(self._held)
        if found is not None:
            self.name = found["name"] if found["name"] in self._names else ""
            self.failed = not self.name
            self._held = self._held[found.end() :]
        elif (self._until and self._until in self._held) or not self._begins_right():
            self.failed = True

    def _begins_right(self) -> bool:
        """Whether a header may still come of what there is."""
        said = self._held.lstrip()
        return not said or said.startswith(self._first)

    def _read(self) -> None:
        told, count = self._object.feed(self._held)
        self._held = self._held[count:]
        self._add(told)

    def _add(self, told: str) -> None:
        self.input += told
        self._whole += told
        if self._object.failed or (self._object.done and not is_object(self._whole)):
            self.failed = True

    def _find_end(self) -> None:
        if self._until not in self._held:
            return
        found = self._footer.match(self._held)
        if found is None:
            self.failed = True
            return
        self.done, self.rest, self._held = True, self._held[found.end() :], ""


def is_object(text: str) -> bool:
    """Whether this is JSON of an object, as everybody reads it."""
    try:
        found: Any = json.loads(text, parse_constant=_refuse)
        json.dumps(found, ensure_ascii=False).encode()  # half a surrogate pair is no character
    except (ValueError, RecursionError):
        return False
    return isinstance(found, dict)


def _refuse(name: str) -> NoReturn:
    raise ValueError(name)
