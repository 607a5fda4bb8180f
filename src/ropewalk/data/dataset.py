"""The rows of a run: found, tokenised once, cached by content, set aside for evaluation. No torch.

sources.py files   rows.py rows with their places   formats.py + conversations.py what a row means   tokenise.py ids and mask
cache.py the memory-mapped store   workers.py the same over processes   packing.py batches   stream.py more than fits anywhere
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from itertools import groupby, islice
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ropewalk.chat.template import Template
from ropewalk.config.preference import held
from ropewalk.config.run import DataSource, Run
from ropewalk.data.cache import Tokens, open_tokens
from ropewalk.data.pictures import Lens, Shown
from ropewalk.data.rows import Chunk, chunks, streamed_chunks
from ropewalk.data.sources import content_digest, locate, size, stored_ids
from ropewalk.data.stream import Stream
from ropewalk.data.tokenise import BadRow, Block, Tokeniser
from ropewalk.data.workers import Progress, shown, tokenise
from ropewalk.errors import ConfigError, DataError, NotFound
from ropewalk.files.local import open_local
from ropewalk.home import home

VERSION = 3  # of what is cached; a change of meaning here or in formats makes a new one


class Rows:
    """Some rows of the tokenised sources, in an order; lengths are known without reading."""

    def __init__(self, parts: Sequence[Tokens], index: NDArray[np.int64], pad: int) -> None:
        self._parts, self.index, self.pad = list(parts), index, pad
        self._starts = np.cumsum([0, *(len(part) for part in parts)])
        self.lengths: NDArray[np.int32] = _joined([part.lengths for part in parts], np.int32)[index]
        self.trained: NDArray[np.int32] = _joined([part.trained for part in parts], np.int32)[index]
        self.marks: NDArray[np.int32] = _joined([part.marks for part in parts], np.int32)[index]
        self.shows = bool(_joined([part.shown for part in parts], np.int64)[index].any())  # whether one has a picture

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, number: int) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
        """Ids and labels of a row; labels are -100 where nothing is trained, and are not shifted."""
        part, at = self._place(number)
        ids, mask = part.row(at)
        return ids, np.where(mask, ids, np.int32(-100))

    def pictures(self, number: int) -> tuple[Shown, ...]:
        """The pictures that a row shows."""
        part, at = self._place(number)
        return part.pictures(at)

    def _place(self, number: int) -> tuple[Tokens, int]:
        at = int(self.index[number])
        part = int(np.searchsorted(self._starts, at, "right")) - 1
        return self._parts[part], at - int(self._starts[part])


@dataclass(frozen=True)
class Batch:
    """One micro-batch, [B, T]; a sample's positions start at 0, which keeps the samples of a row apart."""

    ids: NDArray[np.int64]
    labels: NDArray[np.int64]  # -100 where nothing is trained; labels[t] is the token at t
    position_ids: NDArray[np.int64]
    tokens: int  # without padding
    trained: int
    compared: Compared | None = None
    pictures: tuple[Shown, ...] = ()  # in the order in which their ids stand in the rows
    shown_by: tuple[int, ...] = ()  # how many of them each sample has, of a run on pictures


@dataclass(frozen=True)
class Compared:
    """Which answers of a batch are compared with what: samples 2 p and 2 p + 1 are the pair p, the chosen one first; or each is judged."""

    sample: NDArray[np.int64]  # [B, T]: which answer a token belongs to; padding belongs to the one before it
    units: int  # pairs, judged answers, or steps that are scored
    wanted: NDArray[np.bool_] | None = None  # [units], of judged answers and of steps
    mismatched: Batch | None = None  # each prompt of judged answers with the answer to another
    margins: NDArray[np.float32] | None = None  # [units], by how much the chosen of a pair is to score higher


@dataclass(frozen=True)
class Data:
    """What a run trains and evaluates on; a streamed source gives its rows as they come."""

    train: Rows | Stream
    evaluation: Rows | None
    notices: tuple[str, ...] = ()
    bad: tuple[BadRow, ...] = ()

    @property
    def shows(self) -> bool:
        """Whether a row shows a picture."""
        return any(isinstance(rows, Rows) and rows.shows for rows in (self.train, self.evaluation))

    @property
    def tokens(self) -> int:
        """Tokens of one pass over the training rows; 0 where that is not known."""
        return 0 if isinstance(self.train, Stream) else int(self.train.lengths.sum())


def open_data(
    run: Run, template: Template, *, quiet: bool = False, progress: Progress | None = None, lens: Lens | None = None
) -> Data:
    """The run's rows, tokenised and cached where they are not yet; a row that cannot be used is told before torch is imported."""
    with nullcontext(progress) if progress or quiet else shown() as told:
        tested = [_open(run, source, template, told, True, lens) for source in run.test_datasets or ()]
        pad = template.pad_id or 0
        evaluation = Rows(tested, _order(tested, run, run.test_datasets or ()), pad) if tested else None
        if run.streams:
            return Data(Stream(run, template), evaluation)
        parts = [_open(run, source, template, told, False, lens) for source in run.sources]
    index = _order(parts, run, run.sources)
    if not tested:
        index, held = _set_aside(parts, index, run)
        evaluation = Rows(parts, held, pad) if len(held) else None
    train = Rows(parts, index, pad)
    if not len(train):
        raise DataError(f"no row is left to train on: {_told(_counts(parts)) or 'the data is empty'}")
    bad = tuple(row for part in parts for row in part.bad)
    data = Data(train, evaluation, tuple(_notices(parts, train)), bad)
    if lens is None or data.shows:
        return data
    return replace(data, notices=(*data.notices, "no row shows a picture, so the text part of the model is trained alone"))


def _open(
    run: Run, source: DataSource, template: Template, progress: Progress | None, evaluation: bool, lens: Lens | None
) -> Tokens:
    tokeniser = Tokeniser(run, source, template, evaluation=evaluation, lens=lens)
    found = locate(source)
    total = size(found)
    folder = Path(run.dataset_prepared_path).expanduser() if run.dataset_prepared_path else home() / "cache" / "data"

    def blocks(done: int) -> Iterator[Block]:
        return tokenise(tokeniser, chunks(found), total, run.dataset_num_proc, skip=done, progress=progress)

    key = _key(run, source, tokeniser, content_digest(found))
    with _erased_with(stored_ids(found), folder / key, folder / f"{key}.partial"):
        return open_tokens(folder, key, blocks)


@contextmanager
def _erased_with(ids: Sequence[str], *made: Path) -> Iterator[None]:
    """What is made within dies with the files it is made from, also when one is deleted meanwhile."""
    for id in ids:
        open_local().register_path(id, "tokens", *made)
    try:
        yield
    finally:  # after an error too: a file that is gone is the reason for it
        try:
            for id in ids:
                open_local().show(id)
        except NotFound:
            for path in made:
                shutil.rmtree(path, ignore_errors=True)
            raise


def _key(run: Run, source: DataSource, tokeniser: Tokeniser, content: str) -> str:
    """A name for what the rows of a source become: its content, the template, and the keys that change the outcome."""
    meaning = source.model_dump(
        mode="json", exclude={"path", "data_files", "shards", "shards_idx", "skip", "split", "revision", "name"}
    )
    keys = (
        tokeniser.longest,
        tokeniser.shortest,
        tokeniser.excess,
        tokeniser.skips,
        run.train_on_inputs,
        run.default_system_message,
        held(run),
    )
    parts = [VERSION, content, tokeniser.template.digest, json.dumps(meaning, sort_keys=True), keys]
    if tokeniser.lens is not None:  # rows name pictures by their way from the file that they stand in
        parts += [tokeniser.lens.digest, str(Path(source.path).absolute()), source.data_files]
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:32]


def _order(parts: Sequence[Tokens], run: Run, sources: Sequence[DataSource]) -> NDArray[np.int64]:
    """Which rows of all parts are used: each source's slice, equal rows once if asked, in the order of the data."""
    chosen, start = [], 0
    for number, (part, source) in enumerate(zip(parts, sources)):
        taken = start + _slice(source, len(part))
        if run.shuffle_before_merging_datasets:
            taken = np.random.default_rng([run.seed, number]).permutation(taken)
        chosen.append(taken)
        start += len(part)
    index = _joined(chosen, np.int64)
    if run.dataset_exact_deduplication and len(index):
        digests = _joined([part.digests for part in parts], np.uint64)[index]
        _, first = np.unique(digests, axis=0, return_index=True)
        index = index[np.sort(first)]
    return index


def _slice(source: DataSource, rows: int) -> NDArray[np.int64]:
    """The rows of a source that `skip`, a sliced `split` (train[:10%]) and `shards` leave."""
    index = np.arange(rows, dtype=np.int64)[source.skip or 0 :]
    if sliced := re.search(r"\[(\d*%?):(\d*%?)\]$", source.split or ""):
        begin, end = (_place(bound, len(index)) for bound in sliced.groups())
        index = index[begin:end]
    return np.array_split(index, source.shards)[source.shards_idx or 0] if source.shards else index


def _place(bound: str, rows: int) -> int | None:
    if not bound:
        return None
    return rows * int(bound[:-1]) // 100 if bound.endswith("%") else int(bound)


def _set_aside(parts: Sequence[Tokens], index: NDArray[np.int64], run: Run) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Training and evaluation rows; which is which follows from a row's content and the seed, never from its place."""
    asked = run.val_set_size
    held = round(asked * len(index)) if asked < 1 else int(asked)
    if not asked:
        return index, index[:0]
    if not 0 < held < len(index):
        raise ConfigError(
            f"val_set_size: {asked:g} of {len(index)} rows leaves {'nothing to train on' if held else 'none'}; change it"
        )
    first, second = _joined([part.digests for part in parts], np.uint64)[index].T
    mixed = (first ^ np.uint64(run.seed)) * np.uint64(0x9E3779B97F4A7C15) + second
    rank = np.sort(mixed)[held - 1]
    # Equal rows have equal numbers, so that none is trained on and evaluated too.
    chosen = mixed <= rank
    return index[~chosen], index[chosen]


def _joined(arrays: Sequence[NDArray[Any]], dtype: Any) -> NDArray[Any]:
    return np.concatenate(arrays) if arrays else np.zeros(0, dtype)


def _counts(parts: Sequence[Tokens]) -> Counter[str]:
    return sum((part.counts for part in parts), Counter[str]())


def _told(counts: Counter[str]) -> str:
    return ", ".join(f"{number} {what}" for what, number in sorted(counts.items()) if number and what != "read")


def _notices(parts: Sequence[Tokens], train: Rows) -> Iterator[str]:
    yield f"{len(train)} rows, {int(train.lengths.sum())} tokens, {int(train.trained.sum())} of them trained"
    if left_out := _told(_counts(parts)):
        yield f"of {_counts(parts)['read']} rows read: {left_out}"
    for row in [row for part in parts for row in part.bad][:10]:
        yield f"skipped {row}"


def preview(run: Run, template: Template, n: int = 3) -> list[list[tuple[str, bool]]]:
    """The first rows as the model will see them: pieces of text, and whether they are trained."""
    return [spans for _, spans in previews(run, template, n)]


def previews(run: Run, template: Template, n: int = 3, lens: Lens | None = None) -> list[tuple[str, list[tuple[str, bool]]]]:
    """The same with what each is called; a pair is two."""
    return [shown for pair in islice(_shown_rows(run, template, lens), n) for shown in pair]


def _shown_rows(run: Run, template: Template, lens: Lens | None) -> Iterator[list[tuple[str, list[tuple[str, bool]]]]]:
    kind, number = held(run), 0
    for source in run.sources:
        tokeniser = Tokeniser(run, source, template, lens=lens)
        for chunk in streamed_chunks(locate(source)):
            for row in chunk:
                block = tokeniser.chunk(Chunk(chunk.path, row[0], None, (row,)))
                for (ids, mask), mark in zip(block.rows(), block.marks.tolist()):
                    number += 1
                    if lens is not None:
                        ids, mask = _short_pictures(ids, mask, lens.feature_id)
                    cut = mark if kind in ("pairs", "ranked", "steps") else len(ids)
                    end = len(ids) - (kind == "ranked")
                    parts = [
                        _spans(tokeniser.template, ids[p].tolist(), mask[p].tolist()) for p in (slice(cut), slice(cut, end))
                    ]
                    if kind in ("pairs", "ranked"):
                        yield [(f"pair {number}, chosen", parts[0]), (f"pair {number}, rejected", parts[1])]
                    elif kind == "steps":
                        verdicts = ", ".join("right" if right else "wrong" for right in ids[cut:])
                        yield [(f"row {number}, steps {verdicts}", parts[0])]
                    elif kind == "judged":
                        yield [(f"row {number}, {'wanted' if mark > 0 else 'not wanted'}", parts[0])]
                    else:
                        yield [(f"row {number}", parts[0])]


def _short_pictures(ids: NDArray[np.int32], mask: NDArray[np.bool_], feature: int) -> tuple[Any, Any]:
    """Each picture as one of the many ids that stand for it."""
    again = (ids[1:] == feature) & (ids[:-1] == feature)
    left = np.concatenate([[True], ~again])
    return ids[left], mask[left]


def _spans(template: Template, ids: Sequence[int], mask: Sequence[bool]) -> list[tuple[str, bool]]:
    runs = ((trained, [token for token, _ in pairs]) for trained, pairs in groupby(zip(ids, mask), key=lambda pair: pair[1]))
    return [(template.decode(tokens, skip_special_tokens=False), trained) for trained, tokens in runs]
