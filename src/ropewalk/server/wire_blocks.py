"""The JSON of content blocks on their way in: what a message, a tool result or a document holds."""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal, cast

from ropewalk.chat.messages import (
    Block,
    Bytes,
    Cited,
    Document,
    FileId,
    Image,
    Pieces,
    Source,
    Text,
    Thinking,
    ToolResult,
    ToolUse,
    Url,
)
from ropewalk.server.node import Node
from ropewalk.server.wire import FIRST_VERSION

MAX_BREAKPOINTS = 4
MAX_TITLE = 500
TOOL_ID = re.compile(r"[a-zA-Z0-9_-]{1,256}")
PICTURES = ("image/jpeg", "image/png", "image/gif", "image/webp")
SERVER_BLOCKS = re.compile(r"server_tool_use|mcp_tool_\w+|\w+_tool_result|compaction|tool_reference|browser_state")


@dataclass
class BlockReader:
    """The blocks of one request, and what can only be said of all of them together."""

    version: str
    breakpoints: list[tuple[str, str]] = field(default_factory=list)  # (path, ttl)
    cited: list[tuple[str, bool]] = field(default_factory=list)  # (path of a document, whether it is to be cited)

    @property
    def newer(self) -> bool:
        return self.version > FIRST_VERSION

    def read(self, found: Node, role: str) -> tuple[Block, ...]:
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

    def text(self, found: Node, role: str) -> Text:
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
        return self.text(found, "user").text

    def search_result(self, found: Node, role: str) -> Document:
        found.only({"type", "source", "title", "content", "citations", "cache_control"})
        self.breakpoint(found)
        title, source = found.need("title").text(), found.need("source").text()
        pieces = tuple(self.text(block, role).text for block in found.need("content").items())
        cited = self.wants_citations(found)
        self.cited.append((found.path, cited))
        return Document(Pieces(pieces), title, None, cited, source)

    def image(self, found: Node, role: str) -> Image:
        found.only({"type", "source", "cache_control", "transformations"})
        self.breakpoint(found)
        source, scaled = found.need("source"), True
        if (asked := found.get("transformations")) is not None:
            asked.only({"oversized_image"})
            large = asked.get("oversized_image")
            scaled = large is None or large.choice(("downsize", "error")) == "downsize"
        if source.need("type").choice(("base64", "url", "file")) != "base64":
            return Image(_elsewhere(source), scaled)
        source.only({"type", "media_type", "data"})
        return Image(Bytes(source.need("media_type").choice(PICTURES), _bytes(source.need("data"))), scaled)

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

    def wants_citations(self, found: Node) -> bool:
        citations = found.get("citations")
        if citations is None:
            return False
        citations.only({"enabled"})
        enabled = citations.get("enabled")
        return enabled is not None and enabled.boolean()

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

    def check_citations(self, structured: bool) -> None:
        wanted = [path for path, cited in self.cited if cited]
        if wanted and len(wanted) < len(self.cited):
            path = next(path for path, cited in self.cited if not cited)
            raise Node(None, path).fail("citations are enabled for other documents; enable them for all, or for none")
        if wanted and structured:
            raise Node(None, "output_config.format").fail(
                "citations cannot be enabled for documents together with a format of the output"
            )


BLOCKS: dict[str, Callable[[BlockReader, Node, str], Block]] = {
    "text": BlockReader.text,
    "document": BlockReader.document,
    "image": BlockReader.image,
    "search_result": BlockReader.search_result,
    "tool_use": BlockReader.tool_use,
    "tool_result": BlockReader.tool_result,
    "thinking": BlockReader.thought,
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
