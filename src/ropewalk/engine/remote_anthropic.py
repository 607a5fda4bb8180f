"""Anthropic's Messages as a client of them speaks: a request of ours as JSON, the events of a reply as ours.

Documents travel as their text. Where citations are wanted they stay documents, so that the other server cites them; otherwise they are
text, which every server of this protocol takes. What it cites is looked up in our text, and left out where it is not there.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, cast, get_args

from ropewalk.chat.citations import Citable
from ropewalk.chat.messages import (
    Block,
    BlockEnded,
    BlockStarted,
    CitationAdded,
    Cited,
    Delta,
    Document,
    Ended,
    MessagesRequest,
    ReplyEvent,
    Started,
    StopReason,
    Text,
    Thinking,
    ToolResult,
    ToolUse,
    Usage,
)
from ropewalk.chat.pictures import unseen
from ropewalk.chat.prompt import tagged

PATH, COUNT_PATH = "messages", "messages/count_tokens"
MOST_BREAKPOINTS = 4
LOCATIONS = {
    "char_location": ("start_char_index", "end_char_index"),
    "content_block_location": ("start_block_index", "end_block_index"),
    "search_result_location": ("start_block_index", "end_block_index"),
    "page_location": ("start_page_number", "end_page_number"),  # of a copy of a PDF
}
JSON = dict[str, Any]


def body(request: MessagesRequest, model: str, citables: Sequence[Citable], copies: Mapping[str, str], *, cites: bool) -> JSON:
    """A request to be streamed; `citables`: what its documents say; `copies`: files -> their ids there."""
    found = counted(request, model, citables, copies, cites=cites) | {"max_tokens": request.max_tokens, "stream": True}
    sampling = {"temperature": (request.temperature, 1.0), "top_p": (request.top_p, 1.0), "top_k": (request.top_k, 0)}
    found |= {name: value for name, (value, default) in sampling.items() if value != default}
    if request.stop_sequences:
        found["stop_sequences"] = list(request.stop_sequences)
    return found


def counted(
    request: MessagesRequest, model: str, citables: Sequence[Citable], copies: Mapping[str, str], *, cites: bool
) -> JSON:
    """A request whose tokens are to be counted."""
    said = iter(citables)
    turns = [{"role": t.role, "content": [_block(block, said, copies, cites) for block in t.blocks]} for t in request.turns]
    found: JSON = {"model": model, "messages": turns}
    if request.system:
        found["system"] = [{"type": "text", "text": block.text} for block in request.system]
    if request.tools:
        found["tools"] = [
            {"name": tool.name, "description": tool.description, "input_schema": dict(tool.schema)}
            | ({"strict": True} if tool.strict else {})
            for tool in request.tools
        ]
        choice = request.tool_choice
        found["tool_choice"] = {"type": choice.kind} | ({"name": choice.name} if choice.kind == "tool" else {})
        if not choice.parallel and choice.kind != "none":
            found["tool_choice"]["disable_parallel_tool_use"] = True
    if request.thinking:
        budget = request.thinking_budget
        found["thinking"] = {"type": "enabled", "budget_tokens": budget} if budget else {"type": "adaptive"}
    if request.schema is not None:
        found["output_config"] = {"format": {"type": "json_schema", "schema": dict(request.schema)}}
    if request.effort:
        found["output_config"] = {**found.get("output_config", {}), "effort": request.effort}
    if request.caching:
        _mark(request, turns)
    return found


def probes(model: str) -> tuple[JSON, JSON]:
    """Two requests to be counted, the second with a document more."""
    question = {"type": "text", "text": "?"}
    source = {
        "type": "text",
        "media_type": "text/plain",
        "data": "The lighthouse was built in 1907, and its light reaches far.",
    }
    contents = [question], [{"type": "document", "source": source}, question]
    first, second = ({"model": model, "messages": [{"role": "user", "content": content}]} for content in contents)
    return first, second


def usage(found: Mapping[str, Any] | None, before: Usage | None = None) -> Usage:
    """What a server says that a reply cost, where it says it."""
    names = ("input_tokens", "cache_creation_input_tokens", "cache_read_input_tokens", "output_tokens")
    told = [(found or {}).get(name) for name in names]
    before = before or Usage()
    known = (before.input, before.cache_creation, before.cache_read, before.output)
    input, created, read, output = (count if isinstance(count, int) else old for count, old in zip(told, known, strict=True))
    return Usage(input, created, read, output)


class Replies:
    """One reply as it is read."""

    def __init__(self, request: MessagesRequest, citables: Sequence[Citable]) -> None:
        self._thinks, self._citables = request.thinking, tuple(citables)
        self._usage = Usage()
        self._reason: str | None = None
        self._stop: str | None = None
        self._block: Text | Thinking | ToolUse | None = None  # None: none is open, or one that is not shown
        self._input: Mapping[str, Any] = {}  # of a call, where it came with its beginning
        self._signature = ""
        self.over = False

    def feed(self, event: Mapping[str, Any]) -> list[ReplyEvent]:
        """What an event brings. KeyError, TypeError or ValueError: it is none of this protocol."""
        match event["type"]:
            case "message_start":
                self._usage = usage(event["message"].get("usage"))
                return [Started(self._usage)]
            case "content_block_start":
                return self._begin(event["content_block"])
            case "content_block_delta" if self._block is not None:
                return self._delta(event["delta"])
            case "content_block_stop":
                return self._end()
            case "message_delta":
                self._usage = usage(event.get("usage"), self._usage)
                self._reason = event["delta"].get("stop_reason") or self._reason
                self._stop = event["delta"].get("stop_sequence") or self._stop
            case "message_stop":
                return self.finish()
        return []

    def finish(self) -> list[ReplyEvent]:
        """The stream is over; nothing where the reply is not."""
        if self.over or self._reason is None:
            return []
        self.over = True
        reason = self._reason if self._reason in get_args(StopReason) else "end_turn"
        if self._stop is not None and reason == "end_turn":  # as llama.cpp says it
            reason = "stop_sequence"
        return [*self._end(), Ended(cast(StopReason, reason), self._stop, self._usage)]

    def _begin(self, block: Mapping[str, Any]) -> list[ReplyEvent]:
        found = self._end()
        match block["type"]:
            case "text":
                self._block = Text("")
                found.append(BlockStarted(self._block))
                said = [Delta(block["text"])] if block.get("text") else []
                cited = [c for entry in block.get("citations") or [] for c in self._cited(entry)]
                return [*found, *said, *cited]
            case "thinking" if self._thinks:
                self._block, self._signature = Thinking(""), block.get("signature") or ""
                said = [Delta(block["thinking"])] if block.get("thinking") else []
                return [*found, BlockStarted(self._block), *said]
            case "tool_use":
                self._block, self._input = ToolUse(_text(block["id"]), _text(block["name"]), {}), block.get("input") or {}
                return [*found, BlockStarted(self._block)]
        return found  # thinking that was not asked for, or of a kind that nobody here could use

    def _delta(self, delta: Mapping[str, Any]) -> list[ReplyEvent]:
        match delta["type"]:
            case "text_delta":
                return [Delta(_text(delta["text"]))]
            case "thinking_delta":
                return [Delta(_text(delta["thinking"]))]
            case "input_json_delta":
                self._input = {}
                return [Delta(_text(delta["partial_json"]))]
            case "signature_delta":
                self._signature += _text(delta["signature"])
            case "citations_delta":
                return list(self._cited(delta["citation"]))
        return []

    def _end(self) -> list[ReplyEvent]:
        if self._block is None:
            return []
        whole = [Delta(json.dumps(dict(self._input)))] if isinstance(self._block, ToolUse) and self._input else []
        ended = BlockEnded(self._signature if isinstance(self._block, Thinking) else "")
        self._block, self._input, self._signature = None, {}, ""
        return [*whole, ended]

    def _cited(self, found: Mapping[str, Any]) -> Iterator[CitationAdded]:
        """The citation in the terms of our document, if that says so."""
        kind = found["type"]
        if kind not in LOCATIONS:
            return
        searched = kind == "search_result_location"
        own = [citable for citable in self._citables if (citable.found_at is not None) == searched]
        index = found.get("search_result_index" if searched else "document_index")
        start, end = (found.get(name) for name in LOCATIONS[kind])
        if not all(isinstance(number, int) for number in (index, start, end)) or not 0 <= cast(int, index) < len(own):
            return
        text, citable = _text(found["cited_text"]), own[cast(int, index)]
        about = (citable.title, None if searched else citable.file_id, cast(int, start), cast(int, end))
        cited = Cited(kind, text, cast(int, index), *about, citable.found_at)
        if citable.holds(cited):
            # By its text is how a PDF was cited; by its pages is how it is told.
            yield CitationAdded(citable.cited(cited.start, cited.end, cited.document) if kind == "char_location" else cited)


def _block(block: Block, said: Iterator[Citable], copies: Mapping[str, str], cites: bool) -> JSON:
    match block:
        case Text(text):
            return {"type": "text", "text": text}
        case Document():
            return _document(block, next(said), copies, cites)
        case ToolUse(id, name, arguments):
            return {"type": "tool_use", "id": id, "name": name, "input": dict(arguments)}
        case ToolResult(id, content, failed):
            inner = [_block(part, said, copies, cites) for part in content]
            return {"type": "tool_result", "tool_use_id": id, "content": inner} | ({"is_error": True} if failed else {})
        case Thinking(thinking, signature):
            return {"type": "thinking", "thinking": thinking, "signature": signature}
        case _:
            raise unseen()


def _document(document: Document, citable: Citable, copies: Mapping[str, str], cites: bool) -> JSON:
    around = {"title": document.title, "context": document.context}
    about = {name: text for name, text in around.items() if text} | ({"citations": {"enabled": True}} if cites else {})
    copy = copies.get(citable.file_id or "") if document.found_at is None else None
    if copy is not None:
        return {"type": "document", "source": {"type": "file", "file_id": copy}} | about
    if not cites:
        return {"type": "text", "text": tagged(document, citable.text)}
    pieces = [{"type": "text", "text": citable.text[s.start : s.end]} for s in citable.sections("block")]
    if document.found_at is not None:
        found: JSON = {"type": "search_result", "source": document.found_at, "title": document.title or "", "content": pieces}
        return found | {"citations": {"enabled": True}}
    whole = {"type": "text", "media_type": "text/plain", "data": citable.text}
    return {"type": "document", "source": {"type": "content", "content": pieces} if pieces else whole} | about


def _mark(request: MessagesRequest, turns: Sequence[JSON]) -> None:
    """Asks to keep what is read up to the ends of the last documents, and of the conversation."""
    ends = [
        shown
        for turn, sent in zip(request.turns, turns, strict=True)
        for block, shown in zip(turn.blocks, sent["content"], strict=True)
        if isinstance(block, Document)
        or (isinstance(block, ToolResult) and any(isinstance(part, Document) for part in block.content))
    ]
    said = [b for turn in turns for b in turn["content"] if b["type"] != "thinking" and b.get("text") != ""]
    last = [shown for shown in said[-1:] if not any(shown is end for end in ends)]
    for shown in [*ends[len(last) - MOST_BREAKPOINTS :], *last]:
        shown["cache_control"] = {"type": "ephemeral"} | ({"ttl": "1h"} if request.caching == "1h" else {})


def _text(found: Any) -> str:
    if not isinstance(found, str):
        raise TypeError(f"{type(found).__name__} where a text stands")
    return found
