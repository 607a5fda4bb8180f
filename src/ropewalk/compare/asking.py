"""Asking one model one question, as the server would: the request, the reply's text, how long it took, and how often it was tried."""

from __future__ import annotations

import asyncio
import base64
import time
from collections.abc import Mapping
from contextlib import aclosing
from dataclasses import replace
from typing import Any

from ropewalk.chat.messages import (
    Block,
    BlockStarted,
    Bytes,
    Delta,
    Document,
    Ended,
    FileId,
    Image,
    MessagesRequest,
    Source,
    Text,
    ToolResult,
    ToolUse,
    Turn,
)
from ropewalk.compare.runs import REFUSED, Answered
from ropewalk.compare.suites import Prompt
from ropewalk.engine.counted import Answers
from ropewalk.engine.models import Models
from ropewalk.errors import BadInput, EngineDied, Overloaded, RateLimited, RopewalkError, UpstreamFailed, UpstreamUnknown
from ropewalk.tenants.caller import Caller

TRIES = 4
PAUSE = 1.0  # seconds before the second try, and twice as many before each one after it
LONGEST_PAUSE = 60.0
PATIENCE = 900.0  # seconds with one who is busy, or is being loaded
KEYS = ("temperature", "top_p", "top_k", "max_tokens", "stop_sequences")
DEFAULTS: Mapping[str, Any] = {"temperature": 0.0, "max_tokens": 512}
AGAIN = (Overloaded, RateLimited, UpstreamFailed)  # worth another try


def sampling_of(plan: Mapping[str, Any]) -> dict[str, Any]:
    """The sampling of a plan, with what it leaves open filled in; greedy unless it says otherwise."""
    if unknown := [key for key in plan if key not in KEYS]:
        raise BadInput(f"sampling: '{unknown[0]}' is not known; expected {', '.join(KEYS)}")
    found = {**DEFAULTS, **plan}
    if not isinstance(found["max_tokens"], int) or found["max_tokens"] < 1:
        raise BadInput(f"sampling: max_tokens is {found['max_tokens']!r}; expected 1 or more")
    for key in ("temperature", "top_p"):
        if key in found and not (isinstance(found[key], int | float) and 0 <= found[key] <= 1):
            raise BadInput(f"sampling: {key} is {found[key]!r}; expected 0 to 1")
    if "top_k" in found and not (isinstance(found["top_k"], int) and found["top_k"] >= 0):
        raise BadInput(f"sampling: top_k is {found['top_k']!r}; expected 0 or more")
    return found


def request_for(prompt: Prompt, target: str, sampling: Mapping[str, Any]) -> MessagesRequest:
    """A prompt of a suite as it is asked."""
    return MessagesRequest(
        model=target,
        max_tokens=sampling["max_tokens"],
        turns=tuple(Turn(message["role"], _blocks(message["content"])) for message in prompt.messages),
        system=(Text(prompt.system),) if prompt.system else (),
        temperature=float(sampling["temperature"]),
        top_p=float(sampling.get("top_p", 1.0)),
        top_k=sampling.get("top_k", 0),
        stop_sequences=tuple(sampling.get("stop_sequences", ())),
    )


async def loaded(models: Models, name: str) -> Answers:
    """Who answers for a name, however long loading it takes."""
    late = time.monotonic() + PATIENCE
    while True:
        try:
            return await models.answerer(name)
        except EngineDied:  # it does not start, and will not if it is told to again and again
            raise
        except Overloaded as error:
            if time.monotonic() >= late:
                raise
            await asyncio.sleep(min(error.retry_after, PAUSE))  # it goes on loading meanwhile


async def ask(models: Models, caller: Caller, request: MessagesRequest) -> Answered:
    """The answer to one question; tries again where that may help, and returns the error that stays. Times are the last try's.

    What keeps the model itself from being loaded is raised: it is not this question's fault.
    """
    tries, begun = 0, time.monotonic()

    def failed(error: str) -> Answered:
        return Answered(error=error, retries=tries - 1, total_ms=1000 * (time.monotonic() - begun))

    while True:
        tries += 1
        answers = await loaded(models, request.model)
        try:
            found = await _once(answers, caller, request)
            return replace(found, retries=tries - 1)
        except BadInput as error:
            return failed(f"{REFUSED}{error}")
        except AGAIN as error:
            # One who is only busy is waited for: this is work that nobody waits for in front of a screen.
            busy = isinstance(error, Overloaded | RateLimited) and not isinstance(error, EngineDied)
            if isinstance(error, UpstreamUnknown) or (time.monotonic() >= begun + PATIENCE if busy else tries >= TRIES):
                return failed(_told(error))
            asked = getattr(error, "retry_after", 0.0)
            await asyncio.sleep(min(max(asked, PAUSE * 2 ** min(tries - 1, 6)), LONGEST_PAUSE))
        except RopewalkError as error:
            return failed(_told(error))


async def _once(answers: Answers, caller: Caller, request: MessagesRequest) -> Answered:
    begun, first = time.perf_counter(), None
    said: list[str] = []
    inside = False  # of a text
    ended: Ended | None = None
    async with aclosing(answers.stream(caller, request)) as events:
        async for event in events:
            match event:
                case BlockStarted(block):
                    inside = isinstance(block, Text)
                    if isinstance(block, Text):
                        said.append(block.text)
                case Delta(text):
                    first = first or time.perf_counter()
                    if inside:
                        said.append(text)
                case Ended():
                    ended = event
    done = time.perf_counter()
    if ended is None:
        raise UpstreamFailed(f"{request.model} stopped in the middle of its reply")
    usage = ended.usage
    return Answered(
        text="".join(said),
        finish=ended.stop_reason,
        tokens_in=usage.input + usage.cache_creation,
        tokens_cached=usage.cache_read,
        tokens_out=usage.output,
        ttft_ms=1000 * ((first or done) - begun),
        total_ms=1000 * (done - begun),
    )


def _told(error: RopewalkError) -> str:
    return f"{type(error).__name__}: {error}"


def _blocks(content: Any) -> tuple[Block, ...]:
    if isinstance(content, str):
        return (Text(content),)
    return tuple(_block(block) for block in content)


def _block(found: Mapping[str, Any]) -> Block:
    try:
        match found["type"]:
            case "text":
                return Text(found["text"])
            case "image":
                return Image(_source(found["source"]))
            case "document":
                return Document(_source(found["source"]), found.get("title"), found.get("context"))
            case "tool_use":
                return ToolUse(found["id"], found["name"], found["input"])
            case "tool_result":
                content = _blocks(found.get("content", ""))
                told = tuple(part for part in content if isinstance(part, Text | Document | Image))
                return ToolResult(found["tool_use_id"], told, bool(found.get("is_error")))
    except (KeyError, TypeError, ValueError):
        raise BadInput(f"a block of type '{found.get('type')}' of the prompt cannot be read; see the Messages API") from None
    raise BadInput(
        f"a block of type '{found['type']}' cannot stand in a suite's prompt; expected text, image, document or tools"
    )


def _source(found: Mapping[str, Any]) -> Source:
    match found["type"]:
        case "file":
            return FileId(found["file_id"])
        case "text":
            return Bytes("text/plain", found["data"].encode())
        case "base64":
            return Bytes(found["media_type"], base64.b64decode(found["data"], validate=True))
    raise ValueError(found["type"])
