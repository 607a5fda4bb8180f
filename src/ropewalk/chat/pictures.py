"""Pictures in a prompt: parts of a message, which the chat template writes as it likes, and the ids that come to stand there."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ropewalk.chat.template import Template
from ropewalk.errors import BadInput, DataError

BELOW = "[The picture stands below.]"  # in a tool's result, where the template shows pictures to users only


@dataclass(frozen=True)
class Pictured:
    """A picture as the model is to read it."""

    ids: tuple[int, ...]
    digest: str  # names its content and how it is looked at
    width: int
    height: int
    file_id: str | None = None


class Gallery:
    """The pictures of one request: stand-ins in the texts of its messages, then parts beside the texts."""

    def __init__(self, template: Template, pictures: Sequence[Pictured], token: str, sow: Callable[[Pictured], str]) -> None:
        """`token`: what the chat template writes for a picture, '' for a model that sees none; `sow` makes stand-ins."""
        self._template, self._token = template, token
        self._marks = {sow(picture): picture for picture in pictures}
        self._left = iter(self._marks)

    def next(self) -> str:
        """The stand-in for the next picture, in the order of `request.images()`."""
        if not self._token:
            raise unseen()
        return next(self._left)

    def joined(self, said: Sequence[str], seam: str) -> str:
        """What a message says, with a seam between its texts, and none beside its pictures."""
        found = ""
        for number, text in enumerate(said):
            found += (seam if number and not {text, said[number - 1]} & self._marks.keys() else "") + text
        return found

    def answered(self, said: Sequence[str]) -> tuple[str, list[str]]:
        """What a tool answered, and the pictures that the user's message is to show instead of it."""
        pictures = [text for text in said if text in self._marks]
        if not pictures or self._shown_in_results():
            return "".join(said), []
        return "".join(BELOW if text in self._marks else text for text in said), pictures

    def in_parts(self, messages: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        """The same messages, those with pictures as lists of parts."""
        return [
            message | {"content": self._parts(message["content"])} if self._shows(message) else message for message in messages
        ]

    def order(self, messages: Sequence[Mapping[str, Any]], text: str) -> Iterator[Pictured]:
        """The pictures as they stand in the text rendered of these messages; BadInput where it does not show all of them."""
        said = " ".join(message["content"] for message in messages if isinstance(message.get("content"), str))
        marks = sorted((mark for mark in self._marks if mark in said), key=said.index)
        if len(marks) != len(self._marks) or (self._token and text.count(self._token) != len(marks)):
            raise BadInput("image: the chat template of this model does not show pictures here; send them in a user's message")
        return iter([self._marks[mark] for mark in marks])

    def _shows(self, message: Mapping[str, Any]) -> bool:
        content = message.get("content")
        return isinstance(content, str) and any(mark in content for mark in self._marks)

    def _parts(self, content: str) -> list[dict[str, Any]]:
        parts: list[dict[str, Any]] = []
        places = sorted((content.index(mark), mark) for mark in self._marks if mark in content)
        begin = 0
        for place, mark in places:
            parts += [{"type": "text", "text": content[begin:place]}] if content[begin:place] else []
            parts.append({"type": "image"})
            begin = place + len(mark)
        return parts + ([{"type": "text", "text": content[begin:]}] if content[begin:] else [])

    def _shown_in_results(self) -> bool:
        """Whether the template shows a picture that a tool answers with, as it stands between texts."""
        call = {"id": "abcdefghi", "type": "function", "function": {"name": "see", "arguments": {}}}
        content = [{"type": "text", "text": "271828182"}, {"type": "image"}]
        probe: list[dict[str, Any]] = [
            {"role": "user", "content": "?"},
            {"role": "assistant", "content": "", "tool_calls": [call]},
            {"role": "tool", "tool_call_id": "abcdefghi", "name": "see", "content": content},
        ]
        try:
            text = self._template.render_text(probe)
        except DataError:
            return False
        return text.count(self._token) == 1 and "271828182" in text and "{'type'" not in text and '{"type"' not in text


def unseen() -> BadInput:
    """The error of a picture that nobody sees."""
    return BadInput("image: this model reads no images; send the text instead, or ask a model that does")
