"""One sample on its way back: ids -> text -> the events of a reply.

Engine -> Event -> Reply -> ReplyEvent -> whoever asked
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

from tokenizers.decoders import DecodeStream

from ropewalk.chat.messages import (
    BlockEnded,
    BlockStarted,
    Delta,
    Ended,
    Likely,
    MessagesRequest,
    ReplyEvent,
    Sampled,
    StopReason,
    Text,
    Token,
    Usage,
)
from ropewalk.chat.parsers import Parser, held_back
from ropewalk.chat.replies import stop_ids
from ropewalk.chat.template import Template
from ropewalk.chat.token_text import token_text
from ropewalk.engine.request import Event

Passes = Callable[[Sequence[ReplyEvent]], Iterable[ReplyEvent]]  # what events go through: citations, signatures


class Plain:
    """A parser that takes everything for text: what follows a prompt that is no conversation."""

    called = False

    def __init__(self) -> None:
        self._begun = False

    def feed(self, text: str) -> list[ReplyEvent]:
        """More of the reply."""
        if not text:
            return []
        begun: list[ReplyEvent] = [] if self._begun else [BlockStarted(Text(""))]
        self._begun = True
        return [*begun, Delta(text)]

    def finish(self) -> list[ReplyEvent]:
        """The reply is over."""
        return [BlockEnded()] if self._begun else []


class Reply:
    """One sample of a request, as it is read."""

    def __init__(
        self, template: Template, request: MessagesRequest, parser: Parser, passes: Passes = list, *, cut_short: bool = False
    ) -> None:
        """`cut_short`: the context has less room than the request allows."""
        self._template, self._request, self._parser, self._passes = template, request, parser, passes
        self._text = TextOfIds(template, request.stop_sequences, plain=request.raw is not None)
        self._full: StopReason = "model_context_window_exceeded" if cut_short else "max_tokens"
        self._reason: StopReason = "end_turn"
        self.produced = 0
        self.over = False  # nothing that comes of it belongs to the reply any more

    def feed(self, event: Event, versions: Sequence[int] = ()) -> list[ReplyEvent]:
        """What an event of the engine brings; `versions` of the adapter, by id, where they differ within it."""
        self.produced += len(event.ids)
        found: list[ReplyEvent] = []
        if self._request.tokens and event.ids:
            found.append(Sampled(tuple(self._tokens(event, versions or [event.version] * len(event.ids)))))
        found += self._passes(self._parser.feed(self._text.feed(event.ids)))
        if self._text.stopped_by is not None:
            self._reason, self.over = "stop_sequence", True
        elif self._parser.called and not self._request.tool_choice.parallel:
            self.over = True
        elif event.finish:
            self._reason = self._full if event.finish == "length" else self._reason
            self.over = True
        return found

    def finish(self, usage: Usage) -> list[ReplyEvent]:
        """What was held back, and the end; `usage` of the prompt."""
        found = list(self._passes(self._parser.feed(self._text.finish()) + self._parser.finish()))
        reason = "tool_use" if self._parser.called and self._reason == "end_turn" else self._reason
        return [*found, Ended(reason, self._text.stopped_by, replace(usage, output=self.produced))]

    def _tokens(self, event: Event, versions: Sequence[int]) -> Iterable[Token]:
        tops = event.top or [()] * len(event.ids)
        for id, logprob, version, top in zip(event.ids, event.logprobs, versions, tops, strict=True):
            likely = tuple(Likely(other, chance, *_told(self._template, other)) for other, chance in top)
            yield Token(id, logprob, *_told(self._template, id), version, likely)


@lru_cache(maxsize=1 << 16)
def _told(template: Template, id: int) -> tuple[str, bytes | None]:
    return token_text(template.tokenizer, id)


@dataclass(frozen=True)
class Stops:
    """Texts at which a sample ends."""

    template: Template
    texts: tuple[str, ...]
    plain: bool = False  # as TextOfIds's

    def begin(self) -> TextOfIds:
        """What looks for them in one sample."""
        return TextOfIds(self.template, self.texts, plain=self.plain)


class TextOfIds:
    """Ids as text while they come; ends before a stop sequence."""

    def __init__(self, template: Template, stops: Sequence[str], *, plain: bool = False) -> None:
        """`plain`: control tokens are left out, since nobody reads them."""
        self._tokenizer, self._stop_ids, self._stops = template.tokenizer, set(stop_ids(template)), [s for s in stops if s]
        self._stream = DecodeStream(skip_special_tokens=plain)
        self._held = ""
        self.stopped_by: str | None = None

    def feed(self, ids: Sequence[int]) -> str:
        """What can be said now: whole characters that are no beginning of a stop sequence."""
        for id in ids:
            if id not in self._stop_ids:
                self._held += self._stream.step(self._tokenizer, id) or ""
        places = [(place, stop) for stop in self._stops if (place := self._held.find(stop)) >= 0]
        if places:
            place, self.stopped_by = min(places)
            said, self._held = self._held[:place], ""
            return said
        kept = held_back(self._held, self._stops)
        said, self._held = self._held[: len(self._held) - kept], self._held[len(self._held) - kept :]
        return said

    def finish(self) -> str:
        """What was held back."""
        said, self._held = self._held, ""
        return said
