"""OpenAI's chat completions as a client of them speaks: a request of ours as JSON, the chunks of a reply as our events."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any
from urllib.parse import urlsplit

from ropewalk.chat.citations import Citable
from ropewalk.chat.messages import (
    UNBOUNDED,
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
    Turn,
    Usage,
)
from ropewalk.chat.parsers import Blocks, held_back
from ropewalk.chat.pictures import unseen
from ropewalk.chat.prompt import tagged
from ropewalk.errors import BadInput

PATH = "chat/completions"
REASONS: dict[str, StopReason] = {
    "stop": "end_turn",
    "length": "max_tokens",
    "tool_calls": "tool_use",
    "function_call": "tool_use",
    "content_filter": "refusal",
}
CHOICES = {"auto": "auto", "any": "required", "none": "none"}
TOOL_ID = re.compile(r"[a-zA-Z0-9_-]{1,256}")  # what the Messages API takes back
JSON = dict[str, Any]


def body(request: MessagesRequest, model: str, url: str, citables: Sequence[Citable]) -> JSON:
    """A request to be streamed; BadInput for what this protocol cannot say."""
    if request.turns[-1].role == "assistant":
        raise BadInput(
            f"messages: '{request.model}' is asked over chat completions, where no reply can be begun for the model; "
            "expected a user message at the end"
        )
    # OpenAI itself has renamed it; the servers that speak as it does know the first name.
    most = "max_completion_tokens" if urlsplit(url).hostname == "api.openai.com" else "max_tokens"
    found: JSON = {"model": model, "messages": _messages(request, iter(citables))}
    found |= {most: request.max_tokens} if request.max_tokens < UNBOUNDED else {}
    found |= {"stream": True, "stream_options": {"include_usage": True}}
    sampling = {"temperature": (request.temperature, 1.0), "top_p": (request.top_p, 1.0), "top_k": (request.top_k, 0)}
    sampling |= {"min_p": (request.min_p, 0.0)}
    found |= {"seed": request.seed} if request.seed is not None else {}
    found |= {name: value for name, (value, default) in sampling.items() if value != default}
    if request.effort:
        found["reasoning_effort"] = "high" if request.effort in ("xhigh", "max") else request.effort
    if request.stop_sequences:
        found["stop"] = list(request.stop_sequences)
    if request.tools:
        found |= _tools(request)
    if request.schema is not None:
        form = {"name": "reply", "schema": dict(request.schema), "strict": True}
        found["response_format"] = {"type": "json_schema", "json_schema": form}
    return found


class Replies:
    """One reply as it is read."""

    def __init__(self, request: MessagesRequest) -> None:
        self._blocks = Blocks(shows_thinking=request.thinking)
        self._ids: set[str] = set()
        self._call: tuple[Any, Any] | None = None  # index and id of the call that is open
        self._usage = Usage()
        self._reason: StopReason | None = None
        self._stop: str | None = None
        self._stops, self._held = request.stop_sequences, ""  # what of the text may be the beginning of a stop sequence
        self._goes_on = False  # behind a stop sequence
        self._started = self._called = False
        self.over = False

    def feed(self, event: Mapping[str, Any]) -> list[ReplyEvent]:
        """What a chunk brings. KeyError, TypeError or ValueError: it is none of this protocol."""
        begun: list[ReplyEvent] = [] if self._started else [Started(Usage())]  # what was read is told at the end
        self._started = True
        if isinstance(told := event.get("usage"), Mapping):
            self._usage = usage(told)
        for choice in event.get("choices") or []:
            self._delta(choice.get("delta") or {})
            if reason := choice.get("finish_reason"):
                self._reason = REASONS.get(reason, "end_turn")
                stop = choice.get("stop_reason")  # vLLM: the stop sequence, or the id of a token
                if reason == "stop" and isinstance(stop, str):
                    self._stop = stop
        if self._stop is not None and self._reason in ("end_turn", "max_tokens"):
            self._reason = "stop_sequence"
        if self._goes_on:  # it would until max_tokens
            self._reason = self._reason or "stop_sequence"
            return begun + self.finish()
        return begun + self._blocks.take()

    def finish(self) -> list[ReplyEvent]:
        """The stream is over; nothing where the reply is not."""
        if self.over or self._reason is None:
            return []
        self.over = True
        self._release()
        self._blocks.end(over=True)
        reason = "tool_use" if self._called and self._reason == "end_turn" else self._reason
        return [*self._blocks.take(), Ended(reason, self._stop, self._usage)]

    def _delta(self, delta: Mapping[str, Any]) -> None:
        thought = delta.get("reasoning_content") or delta.get("reasoning")  # servers have two names for it
        for say, said in (
            (self._blocks.thinking, thought),
            (self._text, delta.get("content")),
            (self._text, delta.get("refusal")),
        ):
            if said:
                self._call = None if said.strip() else self._call
                say(said)
        for part in delta.get("tool_calls") or []:
            self._release()
            self._tool(part)

    def _release(self) -> None:
        """What was held back was no stop sequence."""
        said, self._held = self._held, ""
        if said:
            self._blocks.text(said)

    def _text(self, said: str) -> None:
        """Some servers leave the stop sequence in the text and do not say that there was one."""
        if self._stop is not None:
            self._goes_on = True
            return
        self._held += said
        places = [(place, stop) for stop in self._stops if (place := self._held.find(stop)) >= 0]
        if places:
            place, self._stop = min(places)
            self._blocks.text(self._held[:place])
            self._held = ""
            return
        count = len(self._held) - held_back(self._held, self._stops)
        self._blocks.text(self._held[:count])
        self._held = self._held[count:]

    def _tool(self, part: Mapping[str, Any]) -> None:
        function = part.get("function") or {}
        index, id, name = part.get("index"), part.get("id"), function.get("name")
        another = self._call is None or index != self._call[0] or bool(name and id and id != self._call[1])
        if another:
            if not isinstance(name, str) or not name:
                raise ValueError("a part of a call that is not open")
            self._call, self._called = (index, id), True
            id = id if isinstance(id, str) and TOOL_ID.fullmatch(id) and id not in self._ids else ""
            self._ids.add(id)
            self._blocks.call(name, id)
        self._blocks.input(function.get("arguments") or "")


def usage(found: Mapping[str, Any]) -> Usage:
    """What a server says that a reply cost; what it does not say is not made up."""
    details = found.get("prompt_tokens_details")
    prompt, read = _count(found, "prompt_tokens"), _count(details if isinstance(details, Mapping) else {}, "cached_tokens")
    return Usage(max(0, prompt - read), 0, min(prompt, read), _count(found, "completion_tokens"))


def _count(found: Mapping[str, Any], name: str) -> int:
    count = found.get(name)
    return count if isinstance(count, int) else 0


def _tools(request: MessagesRequest) -> JSON:
    choice = request.tool_choice
    tools = [
        {
            "type": "function",
            "function": {"name": tool.name, "description": tool.description, "parameters": dict(tool.schema)}
            | ({"strict": True} if tool.strict else {}),
        }
        for tool in request.tools
    ]
    wanted: Any = {"type": "function", "function": {"name": choice.name}} if choice.kind == "tool" else CHOICES[choice.kind]
    return {"tools": tools, "tool_choice": wanted} | ({} if choice.parallel else {"parallel_tool_calls": False})


def _messages(request: MessagesRequest, said: Iterator[Citable]) -> list[JSON]:
    system = "\n\n".join(block.text for block in request.system)
    found: list[JSON] = [{"role": "system", "content": system}] if system else []
    for turn in request.turns:
        found += _turn(turn, said)
    return found


def _turn(turn: Turn, said: Iterator[Citable]) -> Iterator[JSON]:
    """A turn's messages: what tools have answered comes first, each by itself. Earlier thinking is not sent: no field is agreed on."""
    texts: list[str] = []
    calls: list[JSON] = []
    for block in turn.blocks:
        match block:
            case ToolUse(id, name, arguments):
                calls.append(
                    {"id": id, "type": "function", "function": {"name": name, "arguments": json.dumps(dict(arguments))}}
                )
            case ToolResult(id, content, failed):
                told = "\n".join(_said(part, said) for part in content)
                yield {"role": "tool", "tool_call_id": id, "content": f"Error: {told}" if failed else told}
            case Thinking():
                pass
            case _:
                texts.append(_said(block, said))
    if turn.role == "assistant":
        whole = "".join(texts)
        yield {"role": "assistant", "content": whole or None, "tool_calls": calls} if calls else _message(turn.role, whole)
    elif texts:
        yield _message(turn.role, "\n".join(texts))


def _message(role: str, content: str) -> JSON:
    return {"role": role, "content": content}


def _said(block: Any, said: Iterator[Citable]) -> str:
    match block:
        case Text(text):
            return text
        case Document():
            return tagged(block, next(said).text)
        case _:
            raise unseen()
