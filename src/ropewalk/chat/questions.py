"""Questions and answers out of a document, to train on: a model writes them, chunk by chunk, each with the words that bear it out.

    document -> passages -> one request each, its reply of a schema -> rows -> JSON lines

A row whose quote does not stand in its passage is left out: what a model makes up is not to be learnt from. So is a question that was
asked before.
"""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from ropewalk.chat.retrieval import Chunk, chunks
from ropewalk.files.generators import LINEAGE
from ropewalk.files.reading import Document

PROMPT = "questions-1"  # changes with the words below, and is told with the rows
SYSTEM = (
    "You write questions and answers from which somebody learns what a document says. Every answer stands in the passage you are "
    "shown. A question names what it is about, so that whoever has never seen the passage understands it; it never says "
    "'the passage', 'the text' or 'the document'. An answer is one or two full sentences. A quote is a few words of the passage, "
    "copied letter by letter, that bear the answer out."
)
ASKED = "{title}<passage>\n{text}\n</passage>\n\nWrite {each} different questions about it, each with its answer and its quote."
TOKENS_EACH, TOKENS_BESIDE = 300, 200
FEWEST_LETTERS = 8  # of a quote


@dataclass(frozen=True)
class Wanted:
    """What is to be written."""

    model: str
    each: int = 3  # questions of a chunk
    size: int = 3000  # characters of a chunk
    most: int = 500  # chunks that are shown; of a longer document, as many, evenly spread


@dataclass(frozen=True)
class Passage:
    """A part of a document, and where it stands."""

    number: int  # of its chunk, from 1
    text: str
    title: str = ""  # of the section it stands in


@dataclass
class Rows:
    """What has been written."""

    file_id: str
    rows: list[dict[str, Any]] = field(default_factory=list)
    dropped: int = 0
    _asked: set[str] = field(default_factory=set)

    def add(self, passage: Passage, reply: str) -> None:
        """The rows of a reply; one that is cut off has none."""
        try:
            found = json.loads(reply)["rows"]
        except (ValueError, KeyError, TypeError, RecursionError):
            self.dropped += 1
            return
        text = _plain(passage.text)
        for row in found if isinstance(found, list) else ():
            question, answer, quote = (_told(row, name) for name in ("question", "answer", "quote"))
            borne_out = len(_plain(quote)) >= FEWEST_LETTERS and _plain(quote) in text
            if not question or not answer or not borne_out or _plain(question) in self._asked:
                self.dropped += 1
                continue
            self._asked.add(_plain(question))
            said = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
            self.rows.append({"messages": said, "source": {"file": self.file_id, "chunk": passage.number, "quote": quote}})

    def lines(self) -> bytes:
        """As a training file."""
        return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in self.rows).encode(errors="replace")


def passages(document: Document, wanted: Wanted) -> list[Passage]:
    """What the model is shown, in order."""
    found = [chunk for chunk in chunks(document, wanted.size) if document.text[chunk.begin : chunk.end].strip()]
    if len(found) > wanted.most:
        found = [found[place * len(found) // wanted.most] for place in range(wanted.most)]
    return [Passage(chunk.number, document.text[chunk.begin : chunk.end].strip(), _title(document, chunk)) for chunk in found]


def asked(passage: Passage, wanted: Wanted) -> dict[str, Any]:
    """The question to the model, as the Messages API takes it."""
    title = f"From: {passage.title}\n" if passage.title else ""
    return {
        "model": wanted.model,
        "max_tokens": wanted.each * TOKENS_EACH + TOKENS_BESIDE,
        "system": SYSTEM,
        "messages": [{"role": "user", "content": ASKED.format(title=title, text=passage.text, each=wanted.each)}],
        "output_config": {"format": {"type": "json_schema", "schema": schema(wanted.each)}},
        "temperature": 0,
    }


def schema(each: int) -> dict[str, Any]:
    """What a reply looks like."""
    names = ["question", "answer", "quote"]
    row = {"type": "object", "properties": {name: {"type": "string", "maxLength": 1000} for name in names}}
    rows = {
        "type": "array",
        "items": {**row, "required": names, "additionalProperties": False},
        "minItems": 1,
        "maxItems": each,
    }
    return {"type": "object", "properties": {"rows": rows}, "required": ["rows"], "additionalProperties": False}


def lineage(wanted: Wanted, writer: str, resolved: str, rows: Rows, shown: Sequence[Passage]) -> Mapping[str, Any]:
    """What is told of a file of rows: who wrote them (an alias may point elsewhere tomorrow), and by which words it was asked."""
    counts = {"chunks": len(shown), "rows": len(rows.rows), "dropped": rows.dropped}
    told = {"generator": "questions", "prompt": PROMPT, LINEAGE: [writer], "answered_by": resolved}
    return {**told, **asdict(wanted), **counts}


def name_of(filename: str) -> str:
    """The name of the file of rows."""
    return f"{filename.rpartition('.')[0] or filename}-questions.jsonl"


def reply_text(message: Mapping[str, Any]) -> str:
    """What a message of the Messages API says."""
    return "".join(_texts(message.get("content") or ()))


def _texts(content: Iterable[Mapping[str, Any]]) -> Iterable[str]:
    return (str(block["text"]) for block in content if block.get("type") == "text")


def _title(document: Document, chunk: Chunk) -> str:
    within = [section for section in document.sections if section.start <= chunk.begin < section.end]
    return within[-1].title if within else ""


def _told(row: object, name: str) -> str:
    found = row.get(name) if isinstance(row, dict) else None
    return found.strip() if isinstance(found, str) else ""


def _plain(text: str) -> str:
    """As it is compared: blanks, letter case and ligatures say nothing."""
    return re.sub(r"\s+", " ", unicodedata.normalize("NFKC", text)).strip().casefold()
