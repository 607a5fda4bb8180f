"""Pictures in a prompt: parts of a message, which the chat template writes as it likes, and the ids that come to stand there."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from ropewalk.chat.template import Template
from ropewalk.errors import BadInput, DataError

Content: TypeAlias = "str | list[dict[str, Any]]"

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
    """The pictures of one request, in the order of `request.images()`."""

    def __init__(self, template: Template, pictures: Sequence[Pictured], token: str) -> None:
        """`token`: what a chat template writes for a picture; '' for a model that sees none."""
        self.pictures, self.token = pictures, token
        self._template = template
        self._numbers = iter(range(len(pictures)))

    def part(self) -> dict[str, Any]:
        """The next one, as a part of a message."""
        if not self.token:
            raise unseen()
        return {"type": "image", "picture": next(self._numbers)}

    def result(self, parts: Sequence[str | dict[str, Any]]) -> tuple[Content, list[str | dict[str, Any]]]:
        """What a tool answered as its message's content, and the pictures that the user's message is to show instead."""
        if all(isinstance(part, str) for part in parts) or self._shown_in_results():
            return said(parts, "", ""), []
        texts = [part if isinstance(part, str) else BELOW for part in parts]
        return "".join(texts), [part for part in parts if not isinstance(part, str)]

    def order(self, messages: Sequence[Mapping[str, Any]], text: str) -> Iterator[Pictured]:
        """The pictures as they stand in the rendered text; BadInput where the template does not show all of them."""
        contents = [message["content"] for message in messages if isinstance(message.get("content"), list)]
        numbers = [part["picture"] for content in contents for part in content if part["type"] == "image"]
        if len(numbers) != len(self.pictures) or (self.token and text.count(self.token) != len(numbers)):
            raise BadInput("image: the chat template of this model does not show pictures here; send them in a user's message")
        return iter([self.pictures[number] for number in numbers])

    def _shown_in_results(self) -> bool:
        """Whether the template shows a picture that a tool answers with, as it stands between texts."""
        call = {"id": "abcdefghi", "type": "function", "function": {"name": "see", "arguments": {}}}
        content = [{"type": "text", "text": "271828182"}, {"type": "image", "picture": 0}]
        probe = [
            {"role": "user", "content": "?"},
            {"role": "assistant", "content": "", "tool_calls": [call]},
            {"role": "tool", "tool_call_id": "abcdefghi", "name": "see", "content": content},
        ]
        try:
            text = self._template.render_text(probe)
        except DataError:
            return False
        return text.count(self.token) == 1 and "271828182" in text and "{'type'" not in text


def said(parts: Sequence[str | dict[str, Any]], begins: str, seam: str) -> Content:
    """Texts and pictures as a message's content: one text, or a list of parts where there are pictures."""
    if all(isinstance(part, str) for part in parts):
        return begins + seam.join(str(part) for part in parts)
    found: list[dict[str, Any]] = [{"type": "text", "text": begins}] if begins else []
    for part in parts:
        if not isinstance(part, str):
            found.append(part)
        elif found and found[-1]["type"] == "text":
            text = found[-1]["text"]
            found[-1] = {"type": "text", "text": text + (seam if text != begins else "") + part}
        else:
            found.append({"type": "text", "text": part})
    return found


def unseen() -> BadInput:
    """The error of a picture that nobody sees."""
    return BadInput("image: this model reads no images; send the text instead, or ask a model that does")
