"""The JSON of the Messages API on its way in: a body -> MessagesRequest, or the sentence that says what is wrong with it, and where.

What goes out is written by wire_replies.py. Version 2026-10-21 differs from 2023-06-01 in three things: it takes no documents in
assistant turns, no citations in user turns, and no temperature, top_p and top_k.
"""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, cast

from ropewalk.chat.messages import (
    Block,
    Bytes,
    Cited,
    Document,
    FileId,
    Image,
    MessagesRequest,
    Pieces,
    Source,
    Text,
    Thinking,
    Tool,
    ToolChoice,
    ToolResult,
    ToolUse,
    Turn,
    Url,
)
from ropewalk.server.node import Node

FIRST_VERSION = "2023-06-01"
MAX_MESSAGES = 100_000
MAX_BREAKPOINTS = 4
MAX_STOPS, MAX_STOP = 256, 1_000
MAX_TITLE = 500
LEAST_BUDGET = 1_024
TOOL_NAME = re.compile(r"[a-zA-Z0-9_-]{1,128}")
TOOL_ID = re.compile(r"[a-zA-Z0-9_-]{1,256}")
PICTURES = ("image/jpeg", "image/png", "image/gif", "image/webp")
BILLING = (
    "x-anthropic-billing-header:"  # a block that a client puts first and changes with every request: no prefix would be equal
)

SAMPLING = {"temperature", "top_p", "top_k"}
COUNTED = {"messages", "model", "system", "tools", "tool_choice", "thinking", "output_config", "output_format", "cache_control"}
# Understood, and of no effect here: they choose among Anthropic's machines, prices and reports.
WITHOUT_EFFECT = {"service_tier", "inference_geo", "speed", "diagnostics", "context_management", "betas", "anthropic_beta"} | {
    "billing_policy",
    "fallbacks",
    "fallback_credit_token",
}
ASKED = COUNTED | SAMPLING | WITHOUT_EFFECT | {"max_tokens", "stop_sequences", "stream", "metadata"}
ELSEWHERE = {
    "container": "no code is executed here; leave it out, and give the model tools of your own",
    "compaction": "conversations are not summarised here; send a shorter one",
    "thread": "conversations are not kept here; send all of their messages",
    "mcp_servers": "this server does not call MCP servers; call them yourself and send what they answer as tool results",
}
SERVER_BLOCKS = re.compile(r"server_tool_use|mcp_tool_\w+|\w+_tool_result|compaction|tool_reference|browser_state")


def read_request(body: Node, version: str, *, counting: bool = False) -> MessagesRequest:
    """The request of a body; `counting`: only what count_tokens takes."""
    return _Reader(version, counting).request(body)


@dataclass
class _Reader:
    """One request on its way in, and what can only be said of it as a whole."""

    version: str
    counting: bool
    breakpoints: list[tuple[str, str]] = field(default_factory=list)  # (path, ttl)
    cited: list[tuple[str, bool]] = field(default_factory=list)  # (path of a document, whether it is to be cited)

    @property
    def newer(self) -> bool:
        return self.version > FIRST_VERSION

    def request(self, body: Node) -> MessagesRequest:
        for key, why in ELSEWHERE.items():
            if (found := body.get(key)) is not None and found.value != []:
                raise found.fail(why)
        body.only((COUNTED | WITHOUT_EFFECT if self.counting else ASKED) - (SAMPLING if self.newer else set()) - {*ELSEWHERE})
        model = body.need("model").text(1, 256)
        most = 1 if self.counting else body.need("max_tokens").integer(0)
        tools = self.tools(body.get("tools"))
        system = self.system(body.get("system"))
        turns = self.turns(body.need("messages"))
        schema = self.schema(body)
        thinking = self.thinking(body, most)
        self.check_citations(schema is not None)
        temperature, top_p, top_k = body.get("temperature"), body.get("top_p"), body.get("top_k")
        if (metadata := body.get("metadata")) is not None:
            metadata.only({"user_id"})
            if (user := metadata.get("user_id")) is not None:
                user.text(0, 512)
        stream = body.get("stream")
        return MessagesRequest(
            model,
            most,
            turns,
            system,
            tools,
            self.tool_choice(body, tools, thinking),
            1.0 if temperature is None else temperature.number(0, 1),
            1.0 if top_p is None else top_p.number(0, 1),
            0 if top_k is None else top_k.integer(0),
            self.stops(body.get("stop_sequences")),
            thinking,
            schema,
            False if stream is None else stream.boolean(),
            self.caching(body),
            body.value["thinking"].get("budget_tokens", 0) if thinking else 0,
        )

    # -- what stands beside the conversation

    def system(self, found: Node | None) -> tuple[Text, ...]:
        if found is None:
            return ()
        if isinstance(found.value, str):
            return (Text(found.text()),) if found.value else ()
        blocks = [self.text_block(block, "system") for block in found.items()]
        return tuple(block for block in blocks if not block.text.startswith(BILLING))

    def tools(self, found: Node | None) -> tuple[Tool, ...]:
        tools = [self.tool(tool) for tool in found.items()] if found is not None else []
        if found is not None and len({tool.name for tool in tools}) < len(tools):
            raise found.fail("Tool names must be unique.")
        return tuple(tools)

    def tool(self, found: Node) -> Tool:
        kind = found.get("type")
        if kind is not None and kind.text() != "custom":
            raise kind.fail(
                f"'{kind.value[:60]}' is a tool that Anthropic defines; expected 'custom', with the tool's own name and input_schema"
            )
        found.only(
            {"type", "name", "description", "input_schema", "strict", "cache_control", "defer_loading", "eager_input_streaming"}
            | {"allowed_callers", "input_examples"}
        )
        self.breakpoint(found)
        name, schema, description = found.need("name"), found.need("input_schema"), found.get("description")
        if not TOOL_NAME.fullmatch(name.text()):
            raise name.fail(f"String should match pattern '^{TOOL_NAME.pattern}$'")
        if schema.mapping().get("type") != "object":
            raise Node(schema.value.get("type"), schema.at("type")).fail("Input should be 'object'")
        strict = found.get("strict")
        told = "" if description is None else description.text()
        return Tool(name.value, told, schema.value, strict is not None and strict.boolean())

    def tool_choice(self, body: Node, tools: Sequence[Tool], thinking: bool) -> ToolChoice:
        found = body.get("tool_choice")
        if found is None:
            return ToolChoice()
        kind = cast(Literal["auto", "any", "tool", "none"], found.need("type").choice(("auto", "any", "tool", "none")))
        found.only({"type", *(["name"] if kind == "tool" else []), *(["disable_parallel_tool_use"] if kind != "none" else [])})
        if not tools and kind != "none":
            raise found.fail("tool_choice may only be specified while providing tools.")
        if thinking and kind in ("any", "tool"):
            raise found.fail("Thinking may not be enabled when tool_choice forces tool use.")
        alone, name = found.get("disable_parallel_tool_use"), None
        if kind == "tool":
            name = found.need("name").text()
            if name not in {tool.name for tool in tools}:
                raise found.need("name").fail(f"Tool '{name[:128]}' not found in provided tools.")
        return ToolChoice(kind, name, alone is None or not alone.boolean())

    def thinking(self, body: Node, most: int) -> bool:
        found = body.get("thinking")
        if found is None:
            return False
        kind = found.need("type").choice(("enabled", "disabled", "adaptive", "between_tools"))
        if kind == "enabled":
            found.only({"type", "budget_tokens", "display", "block_binding"})
            budget = found.need("budget_tokens")
            if budget.integer(LEAST_BUDGET) >= most and not self.counting:
                raise body.fail("`max_tokens` must be greater than `thinking.budget_tokens`.")
        else:
            found.only({"type"} if kind == "disabled" else {"type", "display", "block_binding"})
        return kind != "disabled"

    def schema(self, body: Node) -> dict[str, Any] | None:
        found = body.get("output_format")
        if (config := body.get("output_config")) is not None:
            config.only({"effort", "format", "task_budget"})
            if (effort := config.get("effort")) is not None:
                effort.choice(("low", "medium", "high", "xhigh", "max"))
            if (inner := config.get("format")) is not None:
                if found is not None:
                    raise inner.fail("output_format says it already; give one of them")
                found = inner
        if found is None:
            return None
        found.only({"type", "schema", "name"})
        found.need("type").choice(("json_schema",))
        return found.need("schema").mapping()

    def stops(self, found: Node | None) -> tuple[str, ...]:
        stops = list(found.items(MAX_STOPS)) if found is not None else []
        for stop in stops:
            if not stop.text(1, MAX_STOP).strip():
                raise stop.fail("each stop sequence must contain non-whitespace")
        return tuple(stop.value for stop in stops)

    # -- the conversation

    def turns(self, found: Node) -> tuple[Turn, ...]:
        turns: list[Turn] = []
        entries = list(found.items(MAX_MESSAGES))
        if not entries:
            raise found.fail("at least one message is required")
        for number, entry in enumerate(entries):
            turn = self.turn(entry, last=number == len(entries) - 1)
            if turns and turns[-1].role == turn.role:  # several in a row are one
                turn = Turn(turn.role, (*turns.pop().blocks, *turn.blocks))
            turns.append(turn)
        if not any(turn.role == "user" for turn in turns):
            raise found.fail("at least one message is expected with the role 'user'")
        self.check_tools(entries)
        return tuple(turns)

    def turn(self, found: Node, last: bool) -> Turn:
        found.only({"role", "content", "prefill"})
        role = cast(Literal["user", "assistant", "system"], found.need("role").choice(("user", "assistant", "system")))
        content = found.need("content")
        if isinstance(content.value, str):
            blocks: list[Block] = [Text(content.text())] if content.value else []
        else:
            blocks = [block for entry in content.items() for block in self.block(entry, role)]
        if not content.value and not (last and role == "assistant"):
            raise found.fail("all messages must have non-empty content except for the optional final assistant message")
        if last and role == "assistant" and blocks and isinstance(blocks[-1], Text) and blocks[-1].text[-1:].isspace():
            raise found.fail("final assistant content cannot end with trailing whitespace")
        return Turn(role, tuple(blocks))

    def block(self, found: Node, role: str) -> tuple[Block, ...]:
        kind = found.need("type").text()
        if kind == "redacted_thinking":  # what another server thought and has sealed: nothing that a model here could read
            found.only({"type", "data"})
            found.need("data").text()
            return ()
        if kind == "container_upload":
            raise found.fail(
                "no code is executed here, so that there is no container to upload to; send the file as a document block"
            )
        if SERVER_BLOCKS.fullmatch(kind) and kind != "tool_result":
            raise found.fail(f"`{kind[:60]}` blocks are of tools that run on Anthropic's servers; there are none here")
        read = BLOCKS.get(kind)
        if read is None:
            raise found.need("type").fail(
                f"Input tag '{kind[:60]}' does not match any of the expected tags: {', '.join(BLOCKS)}"
            )
        if role == "system" and kind != "text":
            raise found.fail("a system message holds only text blocks")
        return (read(self, found, role),)

    def text_block(self, found: Node, role: str) -> Text:
        found.need("type").choice(("text",))
        found.only({"type", "text", "cache_control", "citations"})
        self.breakpoint(found)
        text = found.need("text")
        if not text.text():
            raise text.fail("text content blocks must be non-empty")
        citations = found.get("citations")
        if citations is None:
            return Text(text.value)
        cited = tuple(c for entry in citations.items() if (c := _citation(entry)) is not None)
        if self.newer and role == "user" and citations.value:
            raise citations.fail("a text of a user message has no citations")
        return Text(text.value, cited)

    def document(self, found: Node, role: str) -> Document:
        if role == "assistant" and self.newer:
            raise found.fail("a `document` block stands in user messages, or within a `tool_result`")
        found.only({"type", "source", "title", "context", "citations", "cache_control"})
        self.breakpoint(found)
        title, context = found.get("title"), found.get("context")
        cited = self.wants_citations(found)
        self.cited.append((found.path, cited))
        return Document(
            self.document_source(found.need("source")),
            None if title is None else title.text(1, MAX_TITLE),
            None if context is None else context.text(1),
            cited,
        )

    def document_source(self, found: Node) -> Source:
        match found.need("type").choice(("base64", "text", "content", "url", "file")):
            case "base64":
                found.only({"type", "media_type", "data"})
                return Bytes(found.need("media_type").choice(("application/pdf",)), _bytes(found.need("data")))
            case "text":
                found.only({"type", "media_type", "data"})
                found.need("media_type").choice(("text/plain",))
                return Bytes("text/plain", found.need("data").text(1).encode())
            case "content":
                found.only({"type", "content"})
                content = found.need("content")
                if isinstance(content.value, str):
                    return Pieces((content.text(1),))
                pieces = [self.piece(block) for block in content.items()]
                if not pieces:
                    raise content.fail("List should have at least 1 item")
                return Pieces(tuple(pieces))
            case _:
                return _elsewhere(found)

    def piece(self, found: Node) -> str:
        if found.need("type").choice(("text", "image")) == "image":
            raise found.fail("a picture within a document cannot be read here; send its text")
        return self.text_block(found, "user").text

    def search_result(self, found: Node, role: str) -> Document:
        found.only({"type", "source", "title", "content", "citations", "cache_control"})
        self.breakpoint(found)
        title, source = found.need("title").text(), found.need("source").text()
        pieces = tuple(self.text_block(block, role).text for block in found.need("content").items())
        cited = self.wants_citations(found)
        self.cited.append((found.path, cited))
        return Document(Pieces(pieces), title, None, cited, source)

    def image(self, found: Node, role: str) -> Image:
        found.only({"type", "source", "cache_control", "transformations"})
        self.breakpoint(found)
        source = found.need("source")
        if source.need("type").choice(("base64", "url", "file")) != "base64":
            return Image(_elsewhere(source))
        source.only({"type", "media_type", "data"})
        return Image(Bytes(source.need("media_type").choice(PICTURES), _bytes(source.need("data"))))

    def tool_use(self, found: Node, role: str) -> ToolUse:
        if role != "assistant":
            raise found.fail("`tool_use` blocks can only be in `assistant` messages")
        found.only({"type", "id", "name", "input", "cache_control", "caller", "toolset_name"})
        self.breakpoint(found)
        return ToolUse(_tool_id(found.need("id")), found.need("name").text(1, 200), found.need("input").mapping())

    def tool_result(self, found: Node, role: str) -> ToolResult:
        if role != "user":
            raise found.fail("`tool_result` blocks can only be in `user` messages")
        found.only({"type", "tool_use_id", "content", "is_error", "cache_control", "toolset_name"})
        self.breakpoint(found)
        content, failed = found.get("content"), found.get("is_error")
        inner: list[Text | Document | Image] = []
        if content is not None and isinstance(content.value, str):
            inner = [Text(content.text())] if content.value else []
        elif content is not None:
            inner = [self.inner_block(block) for block in content.items()]
        return ToolResult(_tool_id(found.need("tool_use_id")), tuple(inner), failed is not None and failed.boolean())

    def inner_block(self, found: Node) -> Text | Document | Image:
        kind = found.need("type").text()
        if kind not in ("text", "document", "image", "search_result"):
            raise found.fail(
                f"`{kind[:60]}` cannot stand in a tool result here; expected text, document, image or search_result"
            )
        return cast("Text | Document | Image", BLOCKS[kind](self, found, "user"))

    def thought(self, found: Node, role: str) -> Thinking:
        if role != "assistant":
            raise found.fail("`thinking` blocks can only be in `assistant` messages")
        found.only({"type", "thinking", "signature"})
        return Thinking(found.need("thinking").text(), found.need("signature").text())

    # -- what holds for the whole

    def breakpoint(self, found: Node) -> None:
        marked = found.get("cache_control")
        if marked is None:
            return
        marked.only({"type", "ttl"})
        marked.need("type").choice(("ephemeral",))
        ttl = marked.get("ttl")
        self.breakpoints.append((marked.path, "5m" if ttl is None else ttl.choice(("5m", "1h"))))

    def caching(self, body: Node) -> Literal["", "5m", "1h"]:
        inner = list(self.breakpoints)
        self.breakpoint(body)
        if len(self.breakpoints) > MAX_BREAKPOINTS:
            raise body.fail(
                f"A maximum of {MAX_BREAKPOINTS} blocks with cache_control may be provided. Found {len(self.breakpoints)}."
            )
        for (path, ttl), (_, before) in zip(inner[1:], inner):
            if ttl == "1h" and before == "5m":
                raise Node(None, f"{path}.ttl").fail(
                    "a ttl='1h' cache_control block must not come after a ttl='5m' cache_control block"
                )
        ttls = {ttl for _, ttl in self.breakpoints}
        return "" if not ttls else "1h" if "1h" in ttls else "5m"

    def wants_citations(self, found: Node) -> bool:
        citations = found.get("citations")
        if citations is None:
            return False
        citations.only({"enabled"})
        enabled = citations.get("enabled")
        return enabled is not None and enabled.boolean()

    def check_citations(self, structured: bool) -> None:
        wanted = [path for path, cited in self.cited if cited]
        if wanted and len(wanted) < len(self.cited):
            path = next(path for path, cited in self.cited if not cited)
            raise Node(None, path).fail("citations are enabled for other documents; enable them for all, or for none")
        if wanted and structured:
            raise Node(None, "output_config.format").fail(
                "citations cannot be enabled for documents together with a format of the output"
            )

    def check_tools(self, entries: Sequence[Node]) -> None:
        """Each call is answered in the message that follows, and each answer answers a call of the message before."""
        called: dict[str, str] = {}  # id -> path of its message
        for entry in entries:
            content = entry.value["content"]
            blocks = [Node(b, f"{entry.path}.content.{i}") for i, b in enumerate(content)] if isinstance(content, list) else []
            answered = [block for block in blocks if block.value["type"] == "tool_result"]
            for block in answered:
                if block.value["tool_use_id"] not in called:
                    raise block.fail(
                        f"unexpected `tool_use_id` found in `tool_result` blocks: {block.value['tool_use_id']}. Each `tool_result` "
                        "block must have a corresponding `tool_use` block in the previous message."
                    )
            left = sorted({*called} - {block.value["tool_use_id"] for block in answered})
            if left and entry.value["role"] == "user":
                raise Node(None, called[left[0]]).fail(
                    f"`tool_use` ids were found without `tool_result` blocks immediately after: {', '.join(left)[:500]}."
                )
            if entry.value["role"] == "user":
                called = {}
            elif entry.value["role"] == "assistant":
                ids = [block.value["id"] for block in blocks if block.value["type"] == "tool_use"]
                if len({*ids}) < len(ids) or any(id in called for id in ids):
                    raise entry.fail("`tool_use` ids must be unique")
                called |= dict.fromkeys(ids, entry.path)


BLOCKS: dict[str, Callable[[_Reader, Node, str], Block]] = {
    "text": _Reader.text_block,
    "document": _Reader.document,
    "image": _Reader.image,
    "search_result": _Reader.search_result,
    "tool_use": _Reader.tool_use,
    "tool_result": _Reader.tool_result,
    "thinking": _Reader.thought,
}


def _elsewhere(found: Node) -> Url | FileId:
    """A source that is named."""
    if found.value["type"] == "url":
        found.only({"type", "url"})
        url = found.need("url")
        if not re.match(r"https?://[^/]", url.text(1, 8_192)):
            raise url.fail("Only HTTP and HTTPS URLs are supported.")
        return Url(url.value)
    found.only({"type", "file_id"})
    return FileId(found.need("file_id").text(1, 200))


def _bytes(found: Node) -> bytes:
    try:
        return base64.b64decode(found.text(1), validate=True)
    except (binascii.Error, ValueError):
        raise found.fail("Input should be valid base64") from None


def _tool_id(found: Node) -> str:
    if not TOOL_ID.fullmatch(found.text()):
        raise found.fail("String should match pattern '^[a-zA-Z0-9_-]+$'")
    return found.text()


LOCATIONS = {
    "char_location": ("start_char_index", "end_char_index"),
    "page_location": ("start_page_number", "end_page_number"),
    "content_block_location": ("start_block_index", "end_block_index"),
    "search_result_location": ("start_block_index", "end_block_index"),
}


def _citation(found: Node) -> Cited | None:
    """A citation of an earlier reply; None for one of another server's search."""
    kind = found.need("type").choice((*LOCATIONS, "web_search_result_location"))
    if kind not in LOCATIONS:
        return None
    start, end = LOCATIONS[kind]
    searched = kind == "search_result_location"
    title = found.get("title" if searched else "document_title")
    number = found.need("search_result_index" if searched else "document_index")
    file_id = found.get("file_id")
    return Cited(
        cast(Any, kind),
        found.need("cited_text").text(),
        number.integer(0),
        None if title is None else title.text(),
        None if file_id is None else file_id.text(),
        found.need(start).integer(0),
        found.need(end).integer(0),
        found.need("source").text() if searched else None,
    )
