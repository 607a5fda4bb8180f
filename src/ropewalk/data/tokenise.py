"""Rows -> ids and what of them is trained, a chunk at a time; the same code in this process and in workers. No torch."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ropewalk.chat.template import Template
from ropewalk.config.run import DataSource, Run
from ropewalk.data.formats import Conversation, Example, Ids, Pieces, Text
from ropewalk.data.pictures import Lens, Shown, content_of, find, kept
from ropewalk.data.preferences import Judged, Pair, example_reader, template_named
from ropewalk.data.rows import Chunk
from ropewalk.data.stepwise import Steps, as_ids
from ropewalk.errors import BadInput, DataError
from ropewalk.files.local import is_id

Ids32 = NDArray[np.int32]
Mask = NDArray[np.bool_]
Tokenised = tuple[list[int], list[bool], int]  # ids, mask, mark
NOTHING = b""  # of pictures


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
    """The tokenised rows of a chunk, one after another.

    A pair is one row, its answers one after the other; one that is scored has its margin behind them. Steps that are scored have their
    verdicts, 0 or 1, behind them. The mark of a row is 0; of a pair, where the second answer begins; of a judged answer, how long its
    prompt is, below 0 where the answer is not wanted; of steps, where the verdicts begin.
    """

    ids: Ids32
    mask: Mask
    lengths: NDArray[np.int32]
    trained: NDArray[np.int32]
    digests: NDArray[np.uint64]  # [rows, 2]
    marks: NDArray[np.int32]
    pictures: list[bytes]  # of each row, see pictures.py
    counts: Counter[str] = field(default_factory=Counter)
    bad: list[BadRow] = field(default_factory=list)

    def rows(self) -> Iterator[tuple[Ids32, Mask]]:
        """Ids and mask of each row."""
        ends = np.cumsum(self.lengths, dtype=np.int64)
        for begin, end in zip(ends - self.lengths, ends):
            yield self.ids[begin:end], self.mask[begin:end]


class Tokeniser:
    """What turns the rows of one source into tokens."""

    def __init__(
        self, run: Run, source: DataSource, template: Template, *, evaluation: bool = False, lens: Lens | None = None
    ) -> None:
        self.made_of = (run, source, template, evaluation, lens)
        self.lens = lens
        source = template_named(source, run)
        named = source.chat_template or source.chat_template_jinja
        self.template = template.named(source.chat_template, source.chat_template_jinja) if named else template
        self.read = example_reader(source, run)
        self.longest = (run.eval_sequence_len if evaluation else None) or run.sequence_len
        self.shortest = 2 if run.min_sample_len is None else max(run.min_sample_len, 2)
        self.excess, self.skips = run.excess_length_strategy, run.on_bad_row == "skip"
        self.source, self.scored = source, run.reward_model

    def __reduce__(self) -> tuple[Any, ...]:
        # A worker process makes its own: readers are closures, which cannot be sent.
        return _made, self.made_of

    def chunk(self, chunk: Chunk) -> Block:
        """All rows of a chunk; the first bad row is an error, unless bad rows are skipped."""
        rows: list[Tokenised] = []
        pictures: list[bytes] = []
        counts: Counter[str] = Counter()
        bad: list[BadRow] = []
        for line, raw in chunk:
            try:
                values = chunk.read(line, raw).values
                if self.lens is not None and isinstance(example := self.read(values), Conversation):
                    found = self._seeing(example, chunk.path, line, counts)
                    rows += [row for row, _ in found]
                    pictures += [blob for _, blob in found]
                else:
                    rows += self.rows(values, counts)
                    pictures += [NOTHING] * (len(rows) - len(pictures))
            except DataError as error:
                reason = str(error).removeprefix(f"{chunk.path}:{line}: ")
                if not self.skips:
                    raise _placed(error, reason, chunk.path, line) from error
                bad.append(BadRow(chunk.path, line, reason))
            counts["read"] += 1
        return _block(rows, pictures, counts, bad)

    def _seeing(self, example: Conversation, path: str, line: int, counts: Counter[str]) -> list[tuple[Tokenised, bytes]]:
        """A conversation that may show pictures, and what is kept of those; nothing where they do not fit."""
        assert self.lens is not None
        folder = None if is_id(self.source.path) or not Path(path).is_file() else Path(path).parent
        shown = [find(said, f"{path}:{line}", folder).sized() for said in example.pictures]
        ids, mask = self._expanded(example, shown)
        count, found = ids.count(self.lens.feature_id), []
        for row, trained in self._whole(Ids(ids, mask), counts):
            if row.count(self.lens.feature_id) == count:
                found.append(((row, trained, 0), kept(shown)))
            else:
                counts["pictures do not fit within sequence_len"] += 1
        return found

    def _expanded(self, example: Conversation, shown: list[Shown]) -> tuple[list[int], list[bool]]:
        """Ids and mask of a conversation with all ids of its pictures, none of which is trained."""
        assert self.lens is not None
        rendered = self.template.render(example.messages, tools=example.tools, rules=example.rules, pictured=bool(shown))
        places = [at for at, id in enumerate(rendered.ids) if id == self.lens.token_id]
        if len(places) != len(shown):
            raise DataError(
                f"shows {len(shown)} pictures, and the chat template writes {len(places)} places for one; "
                "show them in a user's message, and let no text hold the template's own token for pictures"
            )
        ids, mask, done = [], [], 0
        for at, picture in zip(places, shown):
            try:
                of_picture = self.lens.ids(picture.width, picture.height)
            except BadInput as error:
                raise DataError(f"{picture.name}: {str(error).removeprefix('image: ')}") from error
            ids += [*rendered.ids[done:at], *of_picture]
            mask += [*rendered.train_mask[done:at], *[False] * len(of_picture)]
            done = at + 1
        return ids + rendered.ids[done:], mask + rendered.train_mask[done:]

    def rows(self, values: dict[str, Any], counts: Counter[str]) -> list[Tokenised]:
        """The rows that one row of data becomes: one, none if its length does not fit, several for a long document."""
        match self.read(values):
            case Text() as example:
                ids, mask = self.tokens(example)
                cut = [slice(at, at + self.longest) for at in range(0, len(ids), self.longest)]
                return [(*row, 0) for part in cut for row in self._fitting(ids[part], mask[part], counts)]
            case Pair(chosen, rejected, margin) if self.scored:
                return self._ranked(chosen, rejected, margin, counts)
            case Pair(chosen, rejected):
                return self._pair(chosen, rejected, counts)
            case Steps() as steps:
                return self._steps(steps, counts)
            case Judged(answer, wanted):
                rows = self._whole(answer, counts)
                return [(ids, mask, mask.index(True) * (1 if wanted else -1)) for ids, mask in rows]
            case example:
                return [(*row, 0) for row in self._whole(example, counts)]

    def _pair(self, chosen: Example, rejected: Example, counts: Counter[str]) -> list[Tokenised]:
        """Both answers as one row, or nothing where one of them does not fit."""
        first = list(self._whole(chosen, counts))
        second = list(self._whole(rejected, counts)) if first else []
        if not second:
            return []
        ((ids, mask),), ((more, answer),) = first, second
        return [(ids + more, [*mask, False, *answer[1:]], len(ids))]

    def _ranked(self, chosen: Example, rejected: Example, margin: float, counts: Counter[str]) -> list[Tokenised]:
        """The same of answers that are scored: what is trained is the token where the score is read."""
        rows = self._pair(chosen, rejected, counts)
        found = []
        for ids, _, cut in rows:
            ends = {self._last(ids[:cut]), cut + self._last(ids[cut:])}
            # The margin's bits as one more number: there is no other place in a row for it.
            bits = int(np.float32(margin).view(np.int32))
            found.append(([*ids, bits], [at in ends for at in range(len(ids) + 1)], cut))
        return found

    def _last(self, ids: list[int]) -> int:
        """Where a classifier of transformers reads the score of a sequence: at its last token that is no padding."""
        return max(at for at, token in enumerate(ids) if token != self.template.pad_id or at == 0)

    def _steps(self, steps: Steps, counts: Counter[str]) -> list[Tokenised]:
        """Prompt and steps, each of them scored at its last token, or at that of the last one alone."""
        separator = "\n" if self.source.step_separator is None else self.source.step_separator
        prompt, texts = as_ids(self.template, steps.prompt, steps.texts, separator)
        ids, mask = prompt, [False] * len(prompt)
        for number, text in enumerate(texts, 1):
            ends = number == len(texts) or not self.source.train_on_last_step_only
            ids, mask = ids + text, [*mask, *[False] * (len(text) - 1), ends]
        if self.source.max_completion_length:
            most = len(prompt) + self.source.max_completion_length
            ids, mask = ids[:most], mask[:most]
        verdicts = steps.right[-1:] if self.source.train_on_last_step_only else steps.right
        if not any(mask):
            counts["no step ends within max_completion_length"] += 1
            return []
        rows = self._fitting(ids, mask, counts)
        return [([*kept, *map(int, verdicts[: sum(ends)])], [*ends, *[False] * sum(ends)], len(kept)) for kept, ends in rows]

    def _whole(self, example: Example, counts: Counter[str]) -> Iterator[tuple[list[int], list[bool]]]:
        """An example that is not cut into rows: as it is, truncated, or nothing."""
        ids, mask = self.tokens(example)
        if not any(mask[1:]):
            raise DataError("nothing of this row is trained; see roles_to_train, train_on_inputs and the row's own flags")
        mask[0] = False  # the first token has nothing before it that could predict it
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


def _made(run: Run, source: DataSource, template: Template, evaluation: bool, lens: Lens | None) -> Tokeniser:
    return Tokeniser(run, source, template, evaluation=evaluation, lens=lens)


def _block(rows: list[Tokenised], pictures: list[bytes], counts: Counter[str], bad: list[BadRow]) -> Block:
    ids, masks = [row for row, _, _ in rows], [mask for _, mask, _ in rows]
    marks = np.fromiter((mark for _, _, mark in rows), np.int32, len(rows))
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
        content = flat[begin:end].tobytes() + mask[begin:end].tobytes()
        if marks[row]:
            content += marks[row].tobytes()
        content += content_of(pictures[row])
        found = hashlib.blake2b(content, digest_size=16).digest()
        digests[row] = np.frombuffer(found, np.uint64)
    return Block(flat, mask, lengths, trained, digests, marks, pictures, counts, bad)


def _placed(error: DataError, reason: str, path: str, line: int) -> DataError:
    placed = DataError(reason, path=path, line=line)
    placed.key = error.key
    return placed
