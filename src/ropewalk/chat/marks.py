"""Marks in messages: invisible characters that survive a chat template and say where a message's words ended up.

A mark is a character of a private-use plane, put beside the outermost characters of a text and beside tags in it: never where a
template would strip blanks or look for a tag. The rendering counts only if it equals the plain one when its marks are taken out.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from ropewalk.chat.rendering import BLOCK_CLOSES, BLOCK_OPENS, MARK, Message
from ropewalk.errors import DataError

Span = tuple[int, int]
SPOKEN = ("content", "reasoning_content", "reasoning", "thinking")
# What is marked: as much as the template lets through.
FIELDS = ("content", "thoughts", "calls")
TAG = re.compile(r"</?[A-Za-z_|｜][^<>\n]{0,40}>|\[/?[A-Z_|][A-Za-z_|]*\]")
_PRIVATE = re.compile("[\U000f0000-\U000ffffd]")


@dataclass
class Turn:
    """Where one message's words are in the text: (place in the text, place in the field) of each mark that survived."""

    index: int
    marks: dict[str, list[Span]] = field(default_factory=dict)
    begin: int = -1
    end: int = -1  # of the words; the end-of-turn token begins here
    closes: int = -1  # after the end-of-turn token

    @property
    def first(self) -> int:
        return min(at for places in self.marks.values() for at, _ in places)

    @property
    def first_key(self) -> str:
        """The field that the first mark stands in."""
        return min(self.marks.items(), key=lambda item: item[1][0])[0]

    def before_first(self, message: Message) -> str:
        """What the field has before its first mark: white space or a tag."""
        key, (_, place) = min(((k, places[0]) for k, places in self.marks.items()), key=lambda found: found[1])
        return message[key][:place] if key in SPOKEN else ""

    def last(self, message: Message, text: str) -> int:
        """Where the words end: after the last mark and what follows it in the field, if the template kept that."""
        key, (at, place) = max(((k, places[-1]) for k, places in self.marks.items()), key=lambda found: found[1])
        rest = message[key][place:].rstrip() if key in SPOKEN else ""
        return at + len(rest) if text.startswith(rest, at) else at


def locate(
    messages: Sequence[Message], wanted: Sequence[int], text: str, render: Callable[..., str]
) -> tuple[dict[int, Turn], list[Span]]:
    """Where marked words are: of every message, or, for templates that look into others' words, of the wanted ones."""
    if _PRIVATE.search(text):
        raise DataError("holds characters of Unicode's private plane 15, which are used to find the trained words; remove them")
    everyone = range(len(messages))
    for indices, fields in ((everyone, FIELDS), (wanted, FIELDS), (wanted, FIELDS[:2]), (wanted, FIELDS[:1]), (wanted, ())):
        marked, meaning = _mark(messages, indices, fields)
        try:
            rendered = render(marked, fencing=True)
        except DataError:
            continue
        if _PRIVATE.sub("", rendered) == text:
            return _read_marks(rendered, meaning, messages, wanted)
    raise DataError("the chat template renders this conversation differently each time, so its mask cannot be told exactly")


def _mark(messages: Sequence[Message], wanted: Sequence[int], fields: Sequence[str]) -> tuple[list[Message], list[Any]]:
    marked, meaning = list(messages), []

    def sow(index: int, key: str, text: str) -> str:
        pieces, done = [], 0
        for at in _places(text):
            meaning.append((index, key, at))
            pieces += [text[done:at], chr(MARK + len(meaning) - 1)]
            done = at
        return "".join([*pieces, text[done:]])

    for index in wanted:
        message = dict(messages[index])
        for key in SPOKEN:
            # Templates ask whether a field is empty, so an empty one is marked only where there is nothing else to mark.
            if isinstance(words := message.get(key), str) and ("content" if key == "content" else "thoughts") in fields:
                alone = key == "content" and not message.get("tool_calls")
                message[key] = sow(index, key, words) if words.strip() or alone else words
        if "calls" in fields and message.get("tool_calls"):
            message["tool_calls"] = _sow_calls(message["tool_calls"], partial(sow, index, "calls"))
        marked[index] = message
    return marked, meaning


def _sow_calls(value: Any, sow: Callable[[str], str], key: str = "") -> Any:
    """Marks in the strings of call arguments; names, ids and types stay as they are, since templates compare them."""
    if isinstance(value, Mapping):
        return {k: _sow_calls(v, sow, "arguments" if key == "arguments" else k) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_sow_calls(item, sow, key) for item in value]
    return sow(value) if isinstance(value, str) and key == "arguments" else value


def _places(text: str) -> list[int]:
    """Where marks go: beside the outermost characters and beside tags, never where a template would strip or look for a tag."""
    start, end = len(text) - len(text.lstrip()), len(text.rstrip())
    if start >= end:
        return [0]
    places, at = [], start
    for tag in TAG.finditer(text, start, end):
        if words := text[at : tag.start()].rstrip():
            places += [at, at + len(words)]
        at = tag.end() + len(text[tag.end() : end]) - len(text[tag.end() : end].lstrip())
    return [*places, at, end] if at < end else places


def _read_marks(
    rendered: str, meaning: Sequence[Any], messages: Sequence[Message], wanted: Sequence[int]
) -> tuple[dict[int, Turn], list[Span]]:
    turns = {index: Turn(index) for index in range(len(messages))}
    blocks, opened, seen = [], [], set()
    for order, match in enumerate(_PRIVATE.finditer(rendered)):
        mark, at = match.group(), match.start() - order
        if mark == BLOCK_OPENS:
            opened.append(at)
        elif mark == BLOCK_CLOSES:
            blocks.append((opened.pop(), at))
        else:
            index, key, place = meaning[ord(mark) - MARK]
            if mark in seen and index in wanted:
                raise DataError(f"the chat template writes message {index + 1} twice, so its mask cannot be told exactly")
            seen.add(mark)
            turns[index].marks.setdefault(key, []).append((at, place))
    for index in {index for index, _, _ in meaning}.intersection(wanted):
        if not turns[index].marks:
            what = "its calls" if messages[index].get("tool_calls") else "this message"
            raise DataError(f"message {index + 1}: the chat template leaves {what} out, so it cannot be trained")
    return turns, blocks
