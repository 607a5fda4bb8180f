"""The messages of chat completions on their way in: system, developer, user, assistant and tool -> turns of a conversation."""

from __future__ import annotations

import base64
import binascii
import json
import mimetypes
import re
from dataclasses import dataclass, field

from ropewalk.chat.messages import Block, Bytes, Document, FileId, Image, Text, ToolResult, ToolUse, Turn, Url
from ropewalk.server.node import Node

MAX_MESSAGES = 100_000
MAX_ID = 256
ROLES = ("system", "developer", "user", "assistant", "tool")
DATA_URL = re.compile(r"data:([\w.+-]+/[\w.+-]+)?(?:;[\w=.-]+)*;base64,", re.ASCII)
PICTURES = ("image/jpeg", "image/png", "image/gif", "image/webp")
# What a client that sends a reply back as it came sends along, and says nothing that a model could be shown.
ECHOED = {"refusal", "annotations", "audio", "function_call", "reasoning_content"}


@dataclass
class TurnReader:
    """One conversation, read from its beginning."""

    system: list[Text] = field(default_factory=list)
    turns: list[Turn] = field(default_factory=list)
    waiting: dict[str, str] = field(default_factory=dict)  # calls that no tool has answered -> where they stand

    def read(self, found: Node) -> tuple[tuple[Text, ...], tuple[Turn, ...]]:
        """The system's texts, and the turns."""
        last = None
        for message in found.items(MAX_MESSAGES):
            role = message.need("role").choice(ROLES)
            if role != "tool":
                self._all_answered(message)
            getattr(self, f"_{'system' if role == 'developer' else role}")(message)
            last = message
        if last is not None:
            self._all_answered(last)
        if not any(turn.role == "user" for turn in self.turns):
            raise found.fail("at least one message is expected with the role 'user'")
        return tuple(self.system), tuple(self.turns)

    def _system(self, message: Node) -> None:
        message.only({"role", "content"})
        texts = _texts(message.need("content"))
        if self.turns:
            self._add("system", *texts)
        else:
            self.system += texts

    def _user(self, message: Node) -> None:
        message.only({"role", "content"})
        content = message.need("content")
        if isinstance(content.value, str):
            self._add("user", Text(content.text()))
            return
        parts = [_part(part) for part in content.items()]
        if not parts:
            raise content.fail("List should have at least 1 item")
        self._add("user", *parts)

    def _assistant(self, message: Node) -> None:
        message.only({"role", "content", "tool_calls", *ECHOED})
        for name in ("audio", "function_call"):
            if (found := message.get(name)) is not None:
                raise found.fail("replies are text and calls of tools here")
        if (thought := message.get("reasoning_content")) is not None:
            thought.text()  # without a signature nobody knows whose thinking it is: the model is not shown it again
        refusal, content, calls = message.get("refusal"), message.get("content"), message.get("tool_calls")
        blocks: list[Block] = [] if content is None else [*_texts(content, refusals=True)]
        if refusal is not None and refusal.text():
            blocks.append(Text(refusal.value))
        for call in calls.items() if calls is not None else ():
            made = _call(call)
            if made.id in self.waiting:
                raise call.fail(f"the id '{made.id[:100]}' is used twice")
            self.waiting[made.id] = message.path
            blocks.append(made)
        if not blocks:
            raise message.fail("an assistant message has content, or tool_calls, or both")
        self._add("assistant", *blocks)

    def _tool(self, message: Node) -> None:
        message.only({"role", "content", "tool_call_id"})
        id = message.need("tool_call_id")
        if id.text(1, MAX_ID) not in self.waiting:
            raise id.fail(f"'{id.value[:100]}' is no call of the assistant message before, or one that is answered already")
        del self.waiting[id.value]
        self._add("user", ToolResult(id.value, tuple(_texts(message.need("content")))))

    def _add(self, role: str, *blocks: Block) -> None:
        if self.turns and self.turns[-1].role == role:  # several in a row are one
            blocks = (*self.turns.pop().blocks, *blocks)
        assert role in ("user", "assistant", "system")
        self.turns.append(Turn(role, blocks))  # type: ignore[arg-type]

    def _all_answered(self, message: Node) -> None:
        if self.waiting:
            ids = ", ".join(self.waiting)[:300]
            raise message.fail(
                "an assistant message with 'tool_calls' is followed by a tool message for each of them; "
                f"without an answer are: {ids}"
            )


def _texts(found: Node, *, refusals: bool = False) -> list[Text]:
    if isinstance(found.value, str):
        return [Text(found.text())]
    kinds = ("text", "refusal") if refusals else ("text",)
    texts = []
    for part in found.items():
        kind = part.need("type").choice(kinds)
        part.only({"type", kind})
        texts.append(Text(part.need(kind).text()))
    return texts


def _part(found: Node) -> Block:
    match found.need("type").choice(("text", "image_url", "file", "input_audio")):
        case "text":
            found.only({"type", "text"})
            return Text(found.need("text").text())
        case "image_url":
            found.only({"type", "image_url"})
            return _image(found.need("image_url"))
        case "file":
            found.only({"type", "file"})
            return _file(found.need("file"))
        case _:
            raise found.fail("audio is not heard here; send its text")


def _image(found: Node) -> Image:
    found.only({"url", "detail"})
    if (detail := found.get("detail")) is not None and detail.choice(("auto", "high", "original", "low")) == "low":
        raise detail.fail("pictures are shown as large as the model takes them; send a smaller one")
    url = found.need("url")
    if not url.text(1).startswith("data:"):
        if not re.match(r"https?://[^/]", url.text(1, 8_192)):
            raise url.fail("expected a data URL in base64, or one of http or https")
        return Image(Url(url.value))
    media_type, data = _data_url(url)
    if media_type not in PICTURES:
        raise url.fail(f"'{(media_type or 'nothing')[:60]}' is no kind of picture; expected {' or '.join(PICTURES)}")
    return Image(Bytes(media_type, data))


def _file(found: Node) -> Document:
    found.only({"file_id", "file_data", "filename"})
    id, data, name = (found.get(key) for key in ("file_id", "file_data", "filename"))
    title = None if name is None else name.text(1, 500)
    if (id is None) == (data is None):
        raise found.fail("expected one of file_id and file_data")
    if id is not None:
        return Document(FileId(id.text(1, 200)), title)
    assert data is not None
    media_type, content = _data_url(data) if data.text(1).startswith("data:") else ("", _bytes(data, data.value))
    media_type = media_type or mimetypes.guess_type(title or "")[0] or ""
    if media_type == "text/plain":
        try:
            content.decode()
        except UnicodeDecodeError:
            raise data.fail("the text is not UTF-8") from None
    return Document(Bytes(media_type, content), title)


def _data_url(found: Node) -> tuple[str, bytes]:
    match = DATA_URL.match(found.value)
    if match is None:
        raise found.fail("expected a data URL in base64, such as data:image/png;base64,...")
    return (match[1] or "").lower(), _bytes(found, found.value[match.end() :])


def _bytes(found: Node, text: str) -> bytes:
    try:
        data = base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        data = b""
    if not data:
        raise found.fail("expected base64 that holds something")
    return data


def _call(found: Node) -> ToolUse:
    if found.need("type").choice(("function", "custom")) == "custom":
        raise found.fail("calls of custom tools are not written here; use functions")
    found.only({"id", "type", "function"})
    function = found.need("function")
    function.only({"name", "arguments"})
    arguments = function.need("arguments")
    try:
        told = json.loads(arguments.text() or "{}")
    except (ValueError, RecursionError):
        told = None
    if not isinstance(told, dict):
        raise arguments.fail("expected a JSON object, as text")
    return ToolUse(found.need("id").text(1, MAX_ID), function.need("name").text(1, 200), Node(told, arguments.path).mapping())
