"""A reply as the chat page shows it: text with numbered sources, each source's passage, and what the tokens were."""

from __future__ import annotations

import json
from dataclasses import dataclass, field

from ropewalk.chat.messages import (
    BlockStarted,
    CitationAdded,
    Cited,
    Delta,
    Ended,
    ReplyEvent,
    Retrieved,
    Text,
    Thinking,
    ToolUse,
    Usage,
)
from ropewalk.errors import BadInput
from ropewalk.files.documents import Document, document
from ropewalk.files.store import Store
from ropewalk.server.words import Part, parts
from ropewalk.tenants.caller import Caller
from ropewalk.tenants.prices import Price

AROUND = 320  # characters of a source on each side of what is cited
ENDS = {
    "max_tokens": "The reply was cut off: it had as many tokens as a reply may have here.",
    "model_context_window_exceeded": "The reply was cut off: the model’s context was full.",
    "refusal": "The model refused to go on.",
}


@dataclass(frozen=True)
class Said:
    """Some of the reply, and the numbers of the sources it rests on."""

    text: str
    sources: tuple[int, ...]


@dataclass(frozen=True)
class Passage:
    """A source: what is cited, within what stands around it."""

    number: int
    name: tuple[Part, ...]
    where: str
    before: str
    cited: str
    after: str
    at: str | None  # its place in the file's own page


@dataclass(frozen=True)
class Tokens:
    """What a reply cost, and what it did not."""

    read_before: str
    read_now: str
    written: str
    share: int  # percent of the prompt that was read before
    saved: str  # in money; '' without a price


@dataclass(frozen=True)
class Answer:
    """One question and its reply; `number` counts them on the page."""

    number: int
    question: str
    said: tuple[Said, ...]
    passages: tuple[Passage, ...]
    notes: tuple[str, ...]
    tokens: Tokens | None

    @property
    def text(self) -> str:
        return "".join(part.text for part in self.said)


@dataclass
class Hearing:
    """Takes a reply's events."""

    said: list[tuple[str, list[Cited]]] = field(default_factory=list)
    excerpts: Retrieved = field(default_factory=lambda: Retrieved(()))
    ended: Ended | None = None
    _inside: bool = False  # of a text

    def take(self, event: ReplyEvent) -> str:
        """What of the event is text of the reply."""
        match event:
            case Retrieved():
                self.excerpts = event
            case BlockStarted(Text(text)):
                self.said.append((text, []))
                self._inside = True
                return text
            case BlockStarted(Thinking() | ToolUse()):
                self._inside = False
            case Delta(text) if self._inside:
                before, cited = self.said[-1]
                self.said[-1] = (before + text, cited)
                return text
            case CitationAdded(cited) if self._inside:
                self.said[-1][1].append(cited)
            case Ended():
                self.ended = event
        return ""

    async def answer(
        self, store: Store, caller: Caller, number: int, question: str, names: dict[str, str], price: Price | None
    ) -> Answer:
        """The whole of it; `names` are those of the files."""
        numbers: dict[Cited, int] = {}
        said = [
            Said(text, tuple(dict.fromkeys(numbers.setdefault(c, len(numbers) + 1) for c in cited)))
            for text, cited in self.said
            if text
        ]
        documents = {id: await document(store, caller, id) for id in {c.file_id for c in numbers if c.file_id is not None}}
        passages = [passage(n, cited, documents[cited.file_id]) for cited, n in numbers.items() if cited.file_id is not None]
        notes = [
            f"{names.get(e.file_id, e.file_id)} is longer than this model’s context: {e.shown} of its {e.chunks:,} chunks were read."
            for e in self.excerpts.excerpts
        ]
        if self.ended is not None and self.ended.stop_reason in ENDS:
            notes.append(ENDS[self.ended.stop_reason])
        tokens = None if self.ended is None else spent(self.ended.usage, price)
        return Answer(number, question, tuple(said), tuple(passages), tuple(notes), tokens)


def passage(number: int, cited: Cited, document: Document) -> Passage:
    """The text around a citation."""
    text = document.text
    if cited.kind == "page_location":
        pages = [s for s in document.sections if s.kind == "page" and cited.start <= s.number < cited.end]
        begin = text.find(cited.text, pages[0].start) if pages else -1
        last = cited.end - 1
        where = f"page {cited.start}" if last == cited.start else f"pages {cited.start} to {last}"
    else:
        begin, where = cited.start, f"characters {cited.start:,} to {cited.end:,}"
    end = begin + len(cited.text)
    if begin < 0 or text[begin:end] != cited.text:  # citations are checked before they go out: the file has changed since
        return Passage(number, parts(cited.title or ""), where, "", cited.text, "", None)
    first, last = max(0, begin - AROUND), min(len(text), end + AROUND)
    before, after = text[first:begin], text[end:last]
    return Passage(
        number,
        parts(cited.title or cited.file_id or ""),
        where,
        ("… " + before.partition(" ")[2] if first else before).lstrip("\n"),
        cited.text,
        (after.rpartition(" ")[0] + " …" if last < len(text) else after).rstrip("\n"),
        f"/files/{cited.file_id}?from={first}#preview",
    )


def spent(usage: Usage, price: Price | None) -> Tokens:
    """What was read and written, and what reading it once has saved."""
    now = usage.input + usage.cache_creation
    saved = ""
    if price is not None and usage.cache_read:
        money = usage.cache_read * (price.input - price.cache_read) / 1e6
        saved = f"{money:,.6f}".rstrip("0").rstrip(".") + f" {price.currency}"
    whole = now + usage.cache_read
    share = 100 * usage.cache_read // whole if whole else 0
    return Tokens(f"{usage.cache_read:,}", f"{now:,}", f"{usage.output:,}", share, saved)


def thread_of(text: str) -> list[tuple[str, str]]:
    """Questions and replies that a page's form brings back."""
    try:
        found = json.loads(text or "[]")
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, list) or not all(_is_pair(pair) for pair in found):
        raise BadInput("what was said before cannot be read: load the page again and begin anew")
    return [(question, reply) for question, reply in found]


def _is_pair(found: object) -> bool:
    return isinstance(found, list) and len(found) == 2 and all(isinstance(text, str) and text for text in found)
