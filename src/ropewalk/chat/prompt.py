"""A conversation as ids: cut at the ends of its documents, so that what was read of a document is used again.

Text that callers bring cannot speak for the template: wherever it holds words that the tokenizer takes for control tokens, they are
encoded as the plain characters they are. Documents are always encoded by themselves, so that their ids do not depend on what is
written around them.
"""

from __future__ import annotations

import secrets
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ropewalk.chat.dialects.known import dialect_of
from ropewalk.chat.framing import framing
from ropewalk.chat.messages import (
    Document,
    FileUsage,
    Image,
    MessagesRequest,
    Text,
    Thinking,
    Tool,
    ToolResult,
    ToolUse,
    Turn,
    Usage,
)
from ropewalk.chat.pictures import Gallery, Pictured
from ropewalk.chat.template import Template
from ropewalk.errors import BadInput

SEAM = "\n"


@dataclass(frozen=True)
class Shown:
    """A document's text as the model is to see it, in citable pieces or whole."""

    text: str
    file_id: str | None = None


@dataclass(frozen=True)
class Piece:
    """Ids up to a place where the prompt is cut: what stands before the documents, each document, each turn."""

    ids: tuple[int, ...]
    files: tuple[str, ...]  # of the documents up to here, in order
    kept: bool  # whether everything up to here is instructions and stored files: it may lie on disk
    picture: Pictured | None = None  # what the ids stand for, if they are not text


@dataclass(frozen=True)
class Prompt:
    """What the engine is asked."""

    prefix: tuple[Piece, ...]
    tail: tuple[int, ...]

    @property
    def length(self) -> int:
        return sum(len(piece.ids) for piece in self.prefix) + len(self.tail)

    @property
    def ids(self) -> tuple[int, ...]:
        """All of it."""
        return (*(id for piece in self.prefix for id in piece.ids), *self.tail)

    def usage(self, created: int, read: int, output: int = 0) -> Usage:
        """What the prompt cost: its first `read` ids were read before, the `created` after them now, and kept."""
        shares: dict[str, tuple[int, int]] = {}
        begin, named = 0, 0
        for piece in self.prefix:
            end = begin + len(piece.ids)
            if len(piece.files) > named:  # it ends with this document
                named = len(piece.files)
                old_created, old_read = shares.get(piece.files[-1], (0, 0))
                found = max(0, min(end, read) - begin)
                made = max(0, min(end, read + created) - max(begin, read))
                shares[piece.files[-1]] = (old_created + made, old_read + found)
            begin = end
        files = tuple(FileUsage(id, *share) for id, share in shares.items())
        return Usage(self.length - created - read, created, read, output, files)


@dataclass
class _Marks:
    """Stand-ins for what is not to be read by the template's tokenizer: sown into messages, found again in the rendered text."""

    salt: str = field(default_factory=lambda: secrets.token_hex(8))
    meant: dict[str, str | Shown | Pictured | None] = field(default_factory=dict)

    def sow(self, meant: str | Shown | Pictured | None) -> str:
        """A stand-in for a text, a document, a picture, or (None) for a place to cut."""
        # Private-use characters, which no template touches and no tokenizer joins with anything.
        mark = f"\ue000{self.salt}{len(self.meant)}\ue001"
        self.meant[mark] = meant
        return mark


def render(
    template: Template,
    request: MessagesRequest,
    documents: Sequence[Shown],
    instruction: str = "",
    pictures: Sequence[Pictured] = (),
    token: str = "",
) -> Prompt:
    """The prompt of a request whose documents and pictures read so, in the order of `request.documents()` and `request.images()`.

    `instruction`: what the system adds; `token`: what the template writes for a picture.
    """
    marks = _Marks()
    gallery = Gallery(template, pictures, token, marks.sow)
    framed = [_framed(asked, shown, template) for asked, shown in zip(request.documents(), documents, strict=True)]
    dialect = dialect_of(template)
    tools = [_tool(template, tool, marks) for tool in request.tools]
    messages = _messages(template, request, iter(framed), gallery, marks, instruction)
    messages = dialect.messages(messages if dialect.calls_in_one else _one_by_one(messages), tools)
    text = template.render_text(
        gallery.in_parts(messages),
        tools=dialect.tools(tools) or None,
        add_generation_prompt=request.turns[-1].role != "assistant",
        variables=dialect.variables(request),
    )
    if request.turns[-1].role == "assistant":
        text = _open_ended(text, messages[-1])
    return _cut(template, text, marks, token, gallery.order(messages, text))


def raw_ids(template: Template, given: str | tuple[int, ...]) -> tuple[int, ...]:
    """The ids of a prompt as it stands, which no chat template has written; BadInput for what the model does not know."""
    ids = tuple(template.encode_document(given)) if isinstance(given, str) else given
    if not ids:
        raise BadInput("prompt: it has no tokens; expected one at least")
    if wrong := [id for id in ids if not 0 <= id < template.vocabulary]:
        raise BadInput(f"prompt: {wrong[0]} is no id of this model's {template.vocabulary:,} tokens")
    return ids


def _cut(template: Template, text: str, marks: _Marks, token: str, pictures: Iterator[Pictured]) -> Prompt:
    pieces: list[Piece] = []
    ids: list[int] = []
    files: list[str] = []
    durable = True

    def end_piece() -> None:
        nonlocal ids
        if ids:
            pieces.append(Piece(tuple(ids), tuple(files), durable))
            ids = []

    def show(picture: Pictured) -> None:
        nonlocal durable
        end_piece()
        durable = durable and picture.file_id is not None
        files.extend([picture.file_id] if picture.file_id is not None else [])
        pieces.append(Piece(picture.ids, tuple(files), durable, picture))

    for plain, mark in _parts(text, marks):
        for number, words in enumerate(plain.split(token) if token else [plain]):
            if number:
                show(next(pictures))
            ids += template.encode(words) if words else []
        if mark is None:
            break
        meant = marks.meant[mark]
        if isinstance(meant, str):
            ids += template.encode_content(meant)
        elif meant is None:  # a later turn: used again while the conversation goes on, never kept on disk
            durable = False
            end_piece()
        else:
            assert isinstance(meant, Shown), "pictures have become parts of their messages"
            if not files:
                end_piece()
            durable = durable and meant.file_id is not None
            files += [meant.file_id] if meant.file_id is not None else []
            ids += template.encode_content(meant.text)
            end_piece()
    return Prompt(tuple(pieces), tuple(ids))


def _parts(text: str, marks: _Marks) -> list[tuple[str, str | None]]:
    """The rendered text between marks, each with the mark that follows it."""
    found: list[tuple[str, str | None]] = []
    while text:
        begin = text.find(f"\ue000{marks.salt}")
        if begin < 0:
            break
        end = text.index("\ue001", begin) + 1
        found.append((text[:begin], text[begin:end]))
        text = text[end:]
    return [*found, (text, None)]


def _messages(
    template: Template, request: MessagesRequest, documents: Any, gallery: Gallery, marks: _Marks, instruction: str
) -> list[dict[str, Any]]:
    messages: list[dict[str, Any]] = []
    system = "\n\n".join(text for text in (*(block.text for block in request.system), instruction) if text)
    if system:
        messages.append({"role": "system", "content": _said(template, system, marks)})
    names: dict[str, str] = {}  # of tools, by the ids of their calls
    for number, turn in enumerate(request.turns):
        begins = marks.sow(None) if number and turn.role == "user" else ""
        names |= {block.id: block.name for block in turn.blocks if isinstance(block, ToolUse)}
        messages += _of_turn(template, turn, documents, gallery, marks, begins, names)
    return messages


def _of_turn(
    template: Template,
    turn: Turn,
    documents: Any,
    gallery: Gallery,
    marks: _Marks,
    begins: str,
    names: Mapping[str, str],
) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    content: list[str] = []
    message: dict[str, Any] = {"role": turn.role}
    for block in turn.blocks:
        match block:
            case Text(text):
                content.append(_said(template, text, marks))
            case Document():
                content.append(marks.sow(next(documents)) + SEAM)
            case Thinking(thinking):
                thought = "\n\n".join(
                    [*([message["thinking"]] if "thinking" in message else []), _said(template, thinking, marks)]
                )
                message |= {"reasoning_content": thought, "thinking": thought}  # templates have two names for it
            case ToolUse(id, name, arguments):
                function = {"name": _plain(template, name, marks), "arguments": _plain(template, dict(arguments), marks)}
                call = {"id": id, "type": "function", "function": function}
                message.setdefault("tool_calls", []).append(call)
            case ToolResult(id, inner, failed):
                texts = ["Error: "] if failed else []
                for part in inner:
                    if isinstance(part, Document):
                        texts.append(marks.sow(next(documents)) + SEAM)
                    elif isinstance(part, Text):
                        texts.append(_said(template, part.text, marks))
                    else:
                        texts.append(gallery.next())
                answered, shown_to_the_user = gallery.answered(texts)
                content += shown_to_the_user
                name = _plain(template, names.get(id, ""), marks)
                found.append({"role": "tool", "tool_call_id": id, "name": name, "content": answered})
            case Image():
                if turn.role != "user":
                    raise BadInput("image: pictures stand in messages of the user, or in what a tool answers")
                content.append(gallery.next())
    if content or "tool_calls" in message or "reasoning_content" in message:
        found.append({**message, "content": begins + gallery.joined(content, "\n" if turn.role != "assistant" else "")})
    return found


def _framed(document: Document, shown: Shown, template: Template) -> Shown:
    if not framing(template.origin).tags:
        said = [document.title or "", document.context or "", shown.text.rstrip()]
        return Shown("\n".join(text for text in said if text), shown.file_id)
    return Shown(tagged(document, shown.text), shown.file_id)


def tagged(document: Document, text: str) -> str:
    """A document as a part of a message's text: between tags, so that a model can tell it from others."""
    title = f' title="{document.title}"' if document.title else ""
    context = f"<context>\n{document.context}\n</context>\n" if document.context else ""
    return f"<document{title}>\n{context}{text}\n</document>"


def _said(template: Template, text: str, marks: _Marks) -> str:
    """The text itself, or a stand-in for one that holds control tokens."""
    return marks.sow(text) if template.has_control_tokens(text) else text


def _open_ended(text: str, message: Mapping[str, Any]) -> str:
    """The text up to the end of the last message's content: a reply that the caller has begun goes on there."""
    content = str(message.get("content") or "").rstrip()
    place = text.rfind(content)
    return text[: place + len(content)] if content and place >= 0 else text


def _tool(template: Template, tool: Tool, marks: _Marks) -> dict[str, Any]:
    function = {"name": tool.name, "description": tool.description, "parameters": dict(tool.schema)}
    return {"type": "function", "function": _plain(template, function, marks)}


def _plain(template: Template, value: Any, marks: _Marks) -> Any:
    """The same value; stand-ins for the control tokens in its texts, which templates write within JSON or tags."""
    if isinstance(value, str):
        parts = template.control_parts(value)
        return value if all(part == value for part in parts) else "".join(_sown(template, part, marks) for part in parts)
    if isinstance(value, Mapping):
        return {_plain(template, key, marks): _plain(template, inner, marks) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(template, inner, marks) for inner in value]
    return value


def _sown(template: Template, part: str | int, marks: _Marks) -> str:
    return part if isinstance(part, str) else marks.sow(template.decode([part], skip_special_tokens=False))


def _one_by_one(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Messages of one call each, followed by what that call was answered: all that some templates can show."""
    found: list[dict[str, Any]] = []
    answers = {message["tool_call_id"]: message for message in messages if message["role"] == "tool"}
    told: set[str] = set()
    for message in messages:
        calls = message.get("tool_calls", [])
        if message["role"] == "tool" and message["tool_call_id"] in told:
            continue
        if len(calls) < 2:
            found.append(message)
            continue
        for number, call in enumerate(calls):
            found.append({**(message if not number else {"role": "assistant", "content": ""}), "tool_calls": [call]})
            if call["id"] in answers:
                found.append(answers[call["id"]])
                told.add(call["id"])
    return found
