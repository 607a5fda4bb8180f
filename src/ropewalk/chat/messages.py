"""A conversation and its reply, as everything here speaks of them; the JSON of the Claude API is server/wire_*.py's.

wire -> MessagesRequest -> prompt -> engine -> reply blocks -> wire
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

# -- what is asked

Effort = Literal["", "low", "medium", "high", "xhigh", "max"]


@dataclass(frozen=True)
class Bytes:
    """A source whose bytes came with the request."""

    media_type: str
    data: bytes = field(repr=False)


@dataclass(frozen=True)
class FileId:
    """A source that lies in the file store."""

    id: str


@dataclass(frozen=True)
class Url:
    """A source that is to be fetched."""

    url: str


@dataclass(frozen=True)
class Pieces:
    """A source in blocks of the caller's own: the citable pieces are these."""

    texts: tuple[str, ...]


Source: TypeAlias = Bytes | FileId | Url | Pieces


@dataclass(frozen=True)
class Cited:
    """A citation, in the terms of its document's source."""

    kind: Literal["char_location", "page_location", "content_block_location", "search_result_location"]
    text: str
    document: int  # index over all documents of the request, or over all its search results
    title: str | None
    file_id: str | None
    start: int  # characters and blocks from 0, pages from 1
    end: int  # exclusive
    found_at: str | None = None  # of a search result


@dataclass(frozen=True)
class Text:
    text: str
    citations: tuple[Cited, ...] = ()


@dataclass(frozen=True)
class Document:
    source: Source
    title: str | None = None
    context: str | None = None  # told to the model, never cited
    citations: bool = False
    found_at: str | None = None  # of a search result, which is a document in pieces: where it was found


@dataclass(frozen=True)
class Image:
    source: Source
    scaled: bool = True  # whether one that is too large may be made smaller


@dataclass(frozen=True)
class ToolUse:
    id: str
    name: str
    input: Mapping[str, Any]


@dataclass(frozen=True)
class ToolResult:
    tool_use_id: str
    content: tuple[Text | Document | Image, ...]
    is_error: bool = False


@dataclass(frozen=True)
class Thinking:
    thinking: str
    signature: str = ""


Block: TypeAlias = Text | Document | Image | ToolUse | ToolResult | Thinking


@dataclass(frozen=True)
class Turn:
    role: Literal["user", "assistant", "system"]
    blocks: tuple[Block, ...]


@dataclass(frozen=True)
class Tool:
    name: str
    description: str
    schema: Mapping[str, Any]
    strict: bool = False  # its calls must be kept to the schema, whatever it says


@dataclass(frozen=True)
class ToolChoice:
    kind: Literal["auto", "any", "tool", "none"] = "auto"
    name: str | None = None
    parallel: bool = True


UNBOUNDED = 1 << 30  # the max_tokens of a request that names none: as many as there is room for


@dataclass(frozen=True)
class MessagesRequest:
    """One question, with everything said before."""

    model: str
    max_tokens: int
    turns: tuple[Turn, ...]
    system: tuple[Text, ...] = ()
    tools: tuple[Tool, ...] = ()
    tool_choice: ToolChoice = ToolChoice()
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    stop_sequences: tuple[str, ...] = ()
    thinking: bool = False
    schema: Mapping[str, Any] | None = None  # of a structured reply
    stream: bool = False
    caching: Literal["", "5m", "1h"] = ""  # how long what is read is asked to be kept, where a cache_control stands somewhere
    thinking_budget: int = 0  # tokens; 0: as many as the model likes, or as `effort` says
    effort: Effort = ""  # '': nothing was said of it
    seed: int | None = None
    min_p: float = 0.0
    samples: int = 1  # replies; the prompt is read once
    tokens: bool = False  # whether each id of prompt and reply is told, with log-probabilities
    top: int = 0  # how many of the likeliest ids are told in the place of each, with `tokens`
    raw: str | tuple[int, ...] | None = None  # a prompt as it stands, which no chat template has written, instead of turns

    def documents(self) -> list[Document]:
        """All documents, in the order in which citations count them."""
        found: list[Document] = []
        for turn in self.turns:
            for block in turn.blocks:
                inner = block.content if isinstance(block, ToolResult) else (block,)
                found += [part for part in inner if isinstance(part, Document)]
        return found

    def files(self) -> list[str]:
        """The stored files that are asked about, each once."""
        found: dict[str, None] = {}
        for turn in self.turns:
            for block in turn.blocks:
                for part in block.content if isinstance(block, ToolResult) else (block,):
                    if isinstance(part, Document | Image) and isinstance(part.source, FileId):
                        found[part.source.id] = None
        return list(found)

    def images(self) -> list[Image]:
        """All pictures, in the order in which they stand."""
        found: list[Image] = []
        for turn in self.turns:
            for block in turn.blocks:
                inner = block.content if isinstance(block, ToolResult) else (block,)
                found += [part for part in inner if isinstance(part, Image)]
        return found


# -- what is answered

StopReason = Literal["end_turn", "max_tokens", "stop_sequence", "tool_use", "refusal", "model_context_window_exceeded"]


@dataclass(frozen=True)
class FileUsage:
    """What of a prompt's tokens is a stored file's."""

    file_id: str
    cache_creation: int = 0
    cache_read: int = 0


@dataclass(frozen=True)
class Usage:
    """Tokens. The three kinds of input together are the rendered prompt."""

    input: int = 0  # read for this question alone
    cache_creation: int = 0  # read now and kept
    cache_read: int = 0  # read before
    output: int = 0
    files: tuple[FileUsage, ...] = ()  # the share of each stored file; what another server reads is not told by file


@dataclass(frozen=True)
class Excerpt:
    """A file that was longer than the model's context: so many of its chunks are shown."""

    file_id: str
    shown: int
    chunks: int


@dataclass(frozen=True)
class Retrieved:
    """Comes before the reply begins, where files are shown in part."""

    excerpts: tuple[Excerpt, ...]


@dataclass(frozen=True)
class Started:
    """The reply begins; told once, whatever the number of samples."""

    usage: Usage
    prompt: tuple[int, ...] = ()  # its ids, where the request asks for them


@dataclass(frozen=True)
class Likely:
    """An id that might have stood in the place of another, or is it."""

    id: int
    logprob: float
    text: str
    data: bytes | None  # None: not known


@dataclass(frozen=True)
class Token:
    """An id that was sampled."""

    id: int
    logprob: float  # under the model as it is
    text: str
    data: bytes | None  # None: not known
    version: int = 0  # of the adapter that sampled it
    top: tuple[Likely, ...] = ()  # the likeliest in its place


@dataclass(frozen=True)
class Sampled:
    """Ids of the reply, ahead of what they say; where the request asks for them."""

    tokens: tuple[Token, ...]


@dataclass(frozen=True)
class BlockStarted:
    """A block of the reply begins: text or thinking that is still empty, or a tool's call without its input."""

    block: Text | Thinking | ToolUse


@dataclass(frozen=True)
class Delta:
    """More of the block at hand: text, thinking, or the JSON of a tool's input."""

    text: str


@dataclass(frozen=True)
class CitationAdded:
    """The text block at hand is supported by this."""

    citation: Cited


@dataclass(frozen=True)
class BlockEnded:
    """The block is whole; `signature` is that of a thinking block."""

    signature: str = ""


@dataclass(frozen=True)
class Ended:
    """The reply is whole."""

    stop_reason: StopReason
    stop_sequence: str | None
    usage: Usage


ReplyEvent: TypeAlias = Retrieved | Started | Sampled | BlockStarted | Delta | CitationAdded | BlockEnded | Ended
