"""What travels: a request on its way into the engine, and what comes back of it, step by step. No torch.

server, judge or trainer -> Request -> engine -> Event, Event, ... -> whoever asked
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from torch import Tensor

Finish = Literal["", "stop", "length", "cancelled", "error"]
NEVER = 1 << 62  # a position that no prompt has
FORGOTTEN = "a picture that had been read was forgotten meanwhile; ask again"  # the error of one that came without its pixels


@dataclass(frozen=True)
class Keep:
    """Where a span's keys and values may lie on disk: a file of their own, sealed under a key that dies with its owners."""

    path: str
    key: bytes = field(repr=False)


@dataclass(frozen=True)
class Picture:
    """What a span shows, decoded and upright."""

    digest: str  # names its content and how it was decoded
    width: int
    height: int
    pixels: bytes | None = field(default=None, repr=False)  # rows of red, green, blue; None: only what has been read before


@dataclass(frozen=True)
class Span:
    """Ids of a prompt that are read as one segment and can be used again by whoever's prompt begins with them."""

    ids: tuple[int, ...]
    keep: Keep | None = None  # None: in memory only
    picture: Picture | None = None  # what the ids stand for, if they are not text


@dataclass(frozen=True)
class Sampling:
    """How the next id is chosen. A temperature of 0 takes the likeliest."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None


@dataclass(frozen=True)
class Grammar:
    """What the reply must look like."""

    kind: Literal["json_schema", "lark", "regex", "without"]  # without: anything, but none of the ids of `after`
    text: str
    after: tuple[int, ...] = ()  # begins once these ids have been produced; (): at once
    again: bool = False  # begins anew each time that they are; what stands between is free


@dataclass(frozen=True)
class Request:
    """Ids to go on from."""

    id: str
    prefix: tuple[Span, ...]
    tail: tuple[int, ...]  # one id or more, read anew every time
    max_tokens: int  # 0: only read the prefix
    adapter: str | None = None
    sampling: Sampling = Sampling()
    stop_ids: tuple[int, ...] = ()
    grammar: Grammar | None = None
    samples: int = 1
    scope: str = ""  # whose it is: what one scope has read is never found by another
    logprobs: bool = False
    tempered: bool = False  # log-probabilities at the temperature of sampling, not truncated; otherwise the model's own
    lengths: tuple[int, ...] = ()  # of each sample, instead of max_tokens, which is the longest
    top_logprobs: int = 0  # of so many of the likeliest ids at each place, whichever was chosen

    @property
    def length(self) -> int:
        """Ids of the whole prompt."""
        return sum(len(span.ids) for span in self.prefix) + len(self.tail)


@dataclass(frozen=True)
class Event:
    """What one step brought a sample."""

    id: str
    sample: int
    ids: tuple[int, ...] = ()
    logprobs: tuple[
        float, ...
    ] = ()  # of the ids, under the model as it is, or at the request's temperature where it is to be `tempered`
    finish: Finish = ""
    read: int | None = None  # ids of the prefix that were found; told once, with the first event
    created: int | None = None  # ids of the prefix that were read now and kept
    version: int = 0  # of the adapter
    error: str = ""
    routing: Tensor | None = None  # at the end, int16 [ids read, layers, k]: the experts of each, where they are recorded
    top: tuple[tuple[tuple[int, float], ...], ...] = ()  # of each id, where they were asked for: the likeliest in its place


def acts_from(ids: Sequence[int], invocation: tuple[int, ...] | None) -> int:
    """The position from which an adapter acts: everywhere, or, of an activated one, from the last occurrence of its invocation."""
    if invocation is None:
        return 0
    count = len(invocation)
    places = (place for place in range(len(ids) - count, -1, -1) if tuple(ids[place : place + count]) == invocation)
    return next(places, NEVER)
