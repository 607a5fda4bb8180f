"""Rows -> ids and what of them is trained, a chunk at a time; the same code in this process and in workers. No torch."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ropewalk.chat.template import Template
from ropewalk.config.run import DataSource, Run
from ropewalk.data.formats import Conversation, Example, Ids, Pieces, Text, reader_of
from ropewalk.data.rows import Chunk
from ropewalk.errors import DataError

Ids32 = NDArray[np.int32]
Mask = NDArray[np.bool_]


@dataclass(frozen=True)
class BadRow:
    """A row that could not be used, and why."""

    path: str
    line: int
    reason: str

    def __str__(self) -> str:
        return f"{self.path}:{self.line}: {self.reason}"


@dataclass
class Block:
    """The tokenised rows of a chunk, one after another."""

    ids: Ids32
    mask: Mask
    lengths: NDArray[np.int32]
    trained: NDArray[np.int32]
    digests: NDArray[np.uint64]  # [rows, 2]
    counts: Counter[str] = field(default_factory=Counter)
    bad: list[BadRow] = field(default_factory=list)

    def rows(self) -> Iterator[tuple[Ids32, Mask]]:
        """Ids and mask of each row."""
        ends = np.cumsum(self.lengths, dtype=np.int64)
        for begin, end in zip(ends - self.lengths, ends):
            yield self.ids[begin:end], self.mask[begin:end]


class Tokeniser:
    """What turns the rows of one source into tokens."""

    def __init__(self, run: Run, source: DataSource, template: Template, *, evaluation: bool = False) -> None:
        self.made_of = (run, source, template, evaluation)
        named = source.chat_template or source.chat_template_jinja
        self.template = template.named(source.chat_template, source.chat_template_jinja) if named else template
        self.read = reader_of(source, run)
        self.longest = (run.eval_sequence_len if evaluation else None) or run.sequence_len
        self.shortest = 2 if run.min_sample_len is None else max(run.min_sample_len, 2)
        self.excess, self.skips = run.excess_length_strategy, run.on_bad_row == "skip"

    def __reduce__(self) -> tuple[Any, ...]:
        # A worker process makes its own: readers are closures, which cannot be sent.
        return _made, self.made_of

    def chunk(self, chunk: Chunk) -> Block:
        """All rows of a chunk; the first bad row is an error, unless bad rows are skipped."""
        ids: list[list[int]] = []
        masks: list[list[bool]] = []
        counts: Counter[str] = Counter()
        bad: list[BadRow] = []
        for line, raw in chunk:
            try:
                for row, mask in self.rows(chunk.read(line, raw).values, counts):
                    ids.append(row)
                    masks.append(mask)
            except DataError as error:
                reason = str(error).removeprefix(f"{chunk.path}:{line}: ")
                if not self.skips:
                    raise _placed(error, reason, chunk.path, line) from error
                bad.append(BadRow(chunk.path, line, reason))
            counts["read"] += 1
        return _block(ids, masks, counts, bad)

    def rows(self, values: dict[str, Any], counts: Counter[str]) -> Iterator[tuple[list[int], list[bool]]]:
        """The rows that one row of data becomes: one, none if its length does not fit, several for a long document."""
        example = self.read(values)
        ids, mask = self.tokens(example)
        if isinstance(example, Text):
            for at in range(0, len(ids), self.longest):
                yield from self._fitting(ids[at : at + self.longest], mask[at : at + self.longest], counts)
            return
        if not any(mask[1:]):
            raise DataError("nothing of this row is trained; see roles_to_train, train_on_inputs and the row's own flags")
        yield from self._fitting(ids, mask, counts)

    def tokens(self, example: Example) -> tuple[list[int], list[bool]]:
        """Ids and mask of an example at its full length."""
        match example:
            case Conversation(messages, tools, rules):
                rendered = self.template.render(messages, tools=tools, rules=rules)
                return rendered.ids, rendered.train_mask
            case Pieces():
                return self._pieces(example)
            case Text(text):
                ids = self.template.encode_document(text)
                end = [] if not ids or self.template.eos_id in (None, ids[-1]) else [self.template.eos_id]
                return [*ids, *(i for i in end if i is not None)], [True] * (len(ids) + len(end))
            case Ids(ids, trained):
                return ids, trained

    def _pieces(self, example: Pieces) -> tuple[list[int], list[bool]]:
        ids: list[int] = []
        mask: list[bool] = []
        eos = self.template.eos_id
        for number, (text, trained) in enumerate(example.parts):
            first = number == 0 and example.document
            new = self.template.encode_document(text) if first else self.template.encode(text)
            if first and len(new) > 1 and new[-1] == eos:
                new = new[:-1]  # a tokenizer that ends every document would end the prompt
            ids += new
            mask += [trained] * len(new)
        if eos is not None and example.ends:
            missing = example.ends - (ids[-1] == eos)
            ids += [eos] * missing
            mask += [True] * missing
        return ids, mask

    def _fitting(self, ids: list[int], mask: list[bool], counts: Counter[str]) -> Iterator[tuple[list[int], list[bool]]]:
        if len(ids) > self.longest:
            if self.excess == "raise":
                raise DataError(
                    f"has {len(ids)} tokens, sequence_len is {self.longest}; raise it, or set excess_length_strategy: drop or truncate"
                )
            if self.excess == "drop":
                counts["too long"] += 1
                return
            counts["truncated"] += 1
            ids, mask = ids[: self.longest], mask[: self.longest]
        if len(ids) < self.shortest:
            counts["too short"] += 1
        elif not any(mask[1:]):
            counts["nothing trained within sequence_len"] += 1
        else:
            yield ids, mask


def _made(run: Run, source: DataSource, template: Template, evaluation: bool) -> Tokeniser:
    return Tokeniser(run, source, template, evaluation=evaluation)


def _block(ids: list[list[int]], masks: list[list[bool]], counts: Counter[str], bad: list[BadRow]) -> Block:
    lengths = np.fromiter(map(len, ids), np.int32, len(ids))
    total = int(lengths.sum())
    flat = np.fromiter(chain.from_iterable(ids), np.int32, total)
    mask = np.fromiter(chain.from_iterable(masks), np.bool_, total)
    ends = np.cumsum(lengths, dtype=np.int64)
    # The first token of a row has nothing before it that could predict it.
    mask[ends - lengths] = False
    trained = np.add.reduceat(mask, ends - lengths, dtype=np.int32) if len(ids) else np.zeros(0, np.int32)
    digests = np.empty((len(ids), 2), np.uint64)
    for row, (begin, end) in enumerate(zip(ends - lengths, ends)):
        found = hashlib.blake2b(flat[begin:end].tobytes() + mask[begin:end].tobytes(), digest_size=16).digest()
        digests[row] = np.frombuffer(found, np.uint64)
    return Block(flat, mask, lengths, trained, digests, counts, bad)


def _placed(error: DataError, reason: str, path: str, line: int) -> DataError:
    placed = DataError(reason, path=path, line=line)
    placed.key = error.key
    return placed
