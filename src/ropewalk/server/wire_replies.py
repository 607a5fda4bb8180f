"""The JSON of the Messages API on its way out: events of a reply -> server-sent events, or one message.

message_start (content_block_start content_block_delta* content_block_stop)* message_delta message_stop
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from ropewalk.chat.messages import (
    BlockEnded,
    BlockStarted,
    CitationAdded,
    Cited,
    Delta,
    Ended,
    Excerpt,
    ReplyEvent,
    Retrieved,
    Sampled,
    Started,
    Text,
    Thinking,
    ToolUse,
    Usage,
)
from ropewalk.server.wire import failure
from ropewalk.server.wire_blocks import LOCATIONS

PING = b'event: ping\ndata: {"type":"ping"}\n\n'
RETRIEVAL = "x-ropewalk-retrieval"
Content = dict[str, Any]


@dataclass
class ReplyWriter:
    """One reply on its way out."""

    id: str
    model: str  # as it was asked for
    ttl: str = ""  # of what is kept
    content: list[Content] = field(default_factory=list)
    thought_characters: int = 0
    said_characters: int = 0
    excerpts: tuple[Excerpt, ...] = ()  # files that are shown in part
    extended: bool = False  # whether the client is told what the Claude API does not know
    _arguments: str = ""

    async def message(self, events: AsyncIterator[ReplyEvent]) -> Content:
        """The whole reply."""
        async for event in events:
            self.take(event)
            if isinstance(event, Ended):
                return self._message(event.usage, self.content, event.stop_reason, event.stop_sequence)
        raise AssertionError("a reply ends with Ended")

    def events(self, event: ReplyEvent) -> list[Content]:
        """What is sent of an event."""
        index = len(self.content)
        opened = self.take(event)
        match event:
            case Retrieved() | Sampled():
                return []
            case Started(usage):
                return [{"type": "message_start", "message": self._message(usage, [], None, None)}]
            case BlockStarted():
                return [{"type": "content_block_start", "index": index, "content_block": opened}]
            case Delta(text):
                if not text:
                    return []
                return [{"type": "content_block_delta", "index": index - 1, "delta": self._delta(text)}]
            case CitationAdded(cited):
                delta: Content = {"type": "citations_delta", "citation": citation(cited)}
                return [{"type": "content_block_delta", "index": index - 1, "delta": delta}]
            case BlockEnded(signature):
                ended = {"type": "content_block_stop", "index": index - 1}
                if not signature:
                    return [ended]
                delta = {"type": "signature_delta", "signature": signature}
                return [{"type": "content_block_delta", "index": index - 1, "delta": delta}, ended]
            case Ended(reason, stop, usage):
                delta = {"stop_reason": reason, "stop_sequence": stop, "stop_details": None, "container": None}
                whole = self._usage(usage)
                told = {name: whole[name] for name in CUMULATIVE}
                return [{"type": "message_delta", "delta": delta, "usage": told}, {"type": "message_stop"}]

    def headers(self) -> dict[str, str]:
        """What is told of a reply before it begins: FILE_ID=SHOWN/ALL chunks."""
        shown = [f"{excerpt.file_id}={excerpt.shown}/{excerpt.chunks} chunks" for excerpt in self.excerpts]
        return {RETRIEVAL: ", ".join(shown)} if shown else {}

    def take(self, event: ReplyEvent) -> Content:
        """Adds an event to the content -> the block at hand, as it was when it began."""
        match event:
            case Retrieved(excerpts):
                self.excerpts = excerpts
            case BlockStarted(block):
                self.content.append(_begun(block))
                self._arguments = ""
                return dict(self.content[-1])
            case Delta(text):
                self._add(text)
            case CitationAdded(cited):
                last = self.content[-1]
                last["citations"] = [*(last["citations"] or []), citation(cited)]
            case BlockEnded(signature):
                last = self.content[-1]
                if last["type"] == "thinking":
                    last["signature"] = signature
                if last["type"] == "tool_use" and self._arguments:
                    with suppress(ValueError):  # cut off by max_tokens: what came of it was streamed, and is no input yet
                        last["input"] = json.loads(self._arguments)
        return {}

    def _add(self, text: str) -> None:
        block = self.content[-1]
        if block["type"] == "tool_use":
            self._arguments += text
        else:
            block[block["type"]] += text
        if block["type"] == "thinking":
            self.thought_characters += len(text)
        self.said_characters += len(text)

    def _delta(self, text: str) -> Content:
        match self.content[-1]["type"]:
            case "thinking":
                return {"type": "thinking_delta", "thinking": text}
            case "tool_use":
                return {"type": "input_json_delta", "partial_json": text}
            case _:
                return {"type": "text_delta", "text": text}

    def _message(self, usage: Usage, content: list[Content], reason: str | None, stop: str | None) -> Content:
        return {
            "id": self.id,
            "type": "message",
            "role": "assistant",
            "model": self.model,
            "content": content,
            "stop_reason": reason,
            "stop_sequence": stop,
            "stop_details": None,
            "container": None,
            "diagnostics": None,
            "usage": self._usage(usage),
        }

    def _usage(self, usage: Usage) -> Content:
        hour = self.ttl == "1h"
        # Which ids were thinking is known by their text alone: its share of all that was said.
        thought = round(usage.output * self.thought_characters / self.said_characters) if self.thought_characters else 0
        shown = [{"file_id": e.file_id, "shown_chunks": e.shown, "chunks": e.chunks} for e in self.excerpts]
        return ({"retrieval": shown} if shown and self.extended else {}) | {
            "input_tokens": usage.input,
            "cache_creation_input_tokens": usage.cache_creation,
            "cache_read_input_tokens": usage.cache_read,
            "cache_creation": {
                "ephemeral_5m_input_tokens": 0 if hour else usage.cache_creation,
                "ephemeral_1h_input_tokens": usage.cache_creation if hour else 0,
            },
            "output_tokens": usage.output,
            "output_tokens_details": {"thinking_tokens": thought},
            "server_tool_use": None,
            "service_tier": "standard",
            "inference_geo": None,
            "speed": None,
        }


CUMULATIVE = (
    "input_tokens",
    "cache_creation_input_tokens",
    "cache_read_input_tokens",
    "output_tokens",
    "output_tokens_details",
    "server_tool_use",
)


def citation(cited: Cited) -> Content:
    """A citation of a reply."""
    start, end = LOCATIONS[cited.kind]
    found: Content = {"type": cited.kind, "cited_text": cited.text, start: cited.start, end: cited.end}
    if cited.kind == "search_result_location":
        return found | {"search_result_index": cited.document, "title": cited.title, "source": cited.found_at}
    return found | {"document_index": cited.document, "document_title": cited.title, "file_id": cited.file_id}


def sent(event: Content) -> bytes:
    """A server-sent event."""
    data = json.dumps(event, ensure_ascii=False, separators=(",", ":"))
    return f"event: {event['type']}\ndata: {data}\n\n".encode(errors="replace")


def sent_error(error: BaseException, request_id: str) -> bytes:
    """An error in the middle of a stream."""
    return sent(failure(error).body(request_id))


def _begun(block: Text | Thinking | ToolUse) -> Content:
    match block:
        case Text(text):
            return {"type": "text", "text": text, "citations": None}
        case Thinking(thinking, signature):
            return {"type": "thinking", "thinking": thinking, "signature": signature}
        case ToolUse(id, name, arguments):
            return {"type": "tool_use", "id": id, "name": name, "input": dict(arguments)}
