"""Rows -> micro-batches. Which rows make a batch follows from (rows, run, seed, epoch), so any batch can be made again. No torch.

With packing, a batch is `micro_batch_size` rows of at most `sequence_len` tokens, each filled with samples whose positions start at
0: transformers builds its block-diagonal mask from those positions when no attention_mask is given. Padding goes on counting, so
that it belongs to the sample before it, which cannot see it. A model that carries a state from token to token (linear attention)
leaks all the same: models/head.py finds that out by trying, and lays such batches out again, a sample to a row.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ropewalk.config.preference import Held, held
from ropewalk.config.run import Run
from ropewalk.data.compared import lay_out_judged, lay_out_pairs, partners_of
from ropewalk.data.dataset import Batch, Rows
from ropewalk.data.laying import MULTIPLE, lay_out
from ropewalk.data.scored import lay_out_ranked, lay_out_steps, lengths_of
from ropewalk.data.stream import Stream

WINDOW = 1 << 15  # rows packed together: enough for a tight fit, few enough for random neighbours


class Plan(Sequence[Batch]):
    """The batches of an epoch: which rows go into each is known, their tokens are read when a batch is asked for."""

    def __init__(
        self,
        rows: Rows,
        batches: list[list[NDArray[np.int64]]],
        width: int | None,
        multiple: int,
        partners: NDArray[np.int64] | None = None,
        kind: Held | None = None,
        packed: bool = False,
        shows: bool = False,
    ) -> None:
        self._rows, self._batches, self._partners, self._kind, self._packed = rows, batches, partners, kind, packed
        self._shows = shows
        self._width, self._multiple = width, multiple

    def __len__(self) -> int:
        return len(self._batches)

    def __getitem__(self, number: Any) -> Any:
        if isinstance(number, slice):
            return [self[i] for i in range(*number.indices(len(self)))]
        if self._kind == "pairs":
            return lay_out_pairs(self._rows, self._batches[number], self._width, self._multiple, packed=self._packed)
        if self._kind == "ranked":
            return lay_out_ranked(self._rows, self._batches[number], self._width, self._multiple, packed=self._packed)
        if self._kind == "steps":
            return lay_out_steps(self._rows, self._batches[number], self._width, self._multiple)
        if self._partners is not None:
            return lay_out_judged(self._rows, self._batches[number], self._partners, self._width, self._multiple)
        lines = [[self._rows[int(row)] for row in line] for line in self._batches[number]]
        batch = lay_out(lines, self._rows.pad, self._width, self._multiple)
        if not self._shows:
            return batch
        of_samples = [self._rows.pictures(int(row)) for line in self._batches[number] for row in line]
        shown = tuple(shown for pictures in of_samples for shown in pictures)
        return replace(batch, pictures=shown, shown_by=tuple(map(len, of_samples)))


def batches(
    rows: Rows | Stream, run: Run, *, seed: int, epoch: int, shuffle: bool = True, evaluation: bool = False
) -> Sequence[Batch]:
    """The micro-batches of an epoch, for all processes together; a stream has one epoch without end."""
    if isinstance(rows, Stream):
        from ropewalk.data.streaming import StreamBatches

        return StreamBatches(rows, run, seed=seed)
    ordered = not shuffle or run.curriculum_sampling or not run.shuffle_merged_datasets
    generator = np.random.default_rng([seed, epoch])
    order = np.arange(len(rows)) if ordered else generator.permutation(len(rows))
    length = (run.eval_sequence_len if evaluation else None) or run.sequence_len
    size = (run.eval_batch_size if evaluation else None) or run.micro_batch_size
    packed = run.eval_packing if evaluation else run.packing
    kind = held(run)
    if kind in ("pairs", "ranked") and packed:
        length *= 2  # a packed line holds whole pairs, of which each answer may be as long as a row
    if packed:
        in_order = ordered or run.sample_packing_sequentially
        lines = pack(lengths_of(rows, kind), order, length, in_order=in_order, generator=generator)
    else:
        lines = [np.array([row]) for row in _by_length(order, rows, size, generator, run.group_by_length)]
    grouped = [lines[at : at + size] for at in range(0, len(lines), size)]
    width, multiple = length if run.pads_rows else None, run.pad_to_multiple_of or MULTIPLE
    partners = partners_of(rows, order) if kind == "judged" else None
    return Plan(rows, grouped, width, multiple, partners, kind, packed, run.sees)


def pack(
    lengths: NDArray[np.int32], order: NDArray[np.int64], capacity: int, *, in_order: bool, generator: np.random.Generator
) -> list[NDArray[np.int64]]:
    """The rows of each line of at most `capacity` tokens; fitted a window at a time, or, `in_order`, just filled up."""
    if in_order:
        return _filled(lengths, order, capacity)
    lines: list[NDArray[np.int64]] = []
    for at in range(0, len(order), WINDOW):
        window = order[at : at + WINDOW]
        found = best_fit(lengths[window], capacity)
        sorted_ = np.argsort(found, kind="stable")
        ends = np.cumsum(np.bincount(found))
        # The fit puts the fullest lines first; training should not.
        new = np.split(window[sorted_], ends[:-1])
        lines += [new[i] for i in generator.permutation(len(new))]
    return lines


def best_fit(lengths: NDArray[np.int32], capacity: int) -> NDArray[np.int64]:
    """The line of each row: the longest first, or as they come where that needs fewer lines, as rows of like length do."""
    if int(lengths.sum()) <= capacity:
        return np.zeros(len(lengths), np.int64)
    longest_first = np.argsort(-lengths.astype(np.int64), kind="stable")
    fits = [_fit(lengths, order, capacity) for order in (longest_first, np.arange(len(lengths)))]
    return min(fits, key=lambda found: int(found.max(initial=-1)))


def _fit(lengths: NDArray[np.int32], order: NDArray[np.int64], capacity: int) -> NDArray[np.int64]:
    """The line of each row, which goes into the fullest line that has room for it.

    Lines with equal room lie on one pile; a whole number has a bit for every pile that is not empty, so that the smallest room
    that is large enough is its lowest bit from there on.
    """
    piles: list[list[int]] = [[] for _ in range(capacity + 1)]
    room = lines = 0
    found = np.empty(len(lengths), np.int64)
    shortest = int(lengths.min()) if len(lengths) else 0
    for row, length in zip(order.tolist(), lengths[order].tolist()):
        above = room >> length
        if above:
            free = length + (above & -above).bit_length() - 1
            line = piles[free].pop()
            if not piles[free]:
                room ^= 1 << free
        else:
            line, free, lines = lines, capacity, lines + 1
        found[row] = line
        left = free - length
        if left >= shortest:
            if not piles[left]:
                room |= 1 << left
            piles[left].append(line)
    return found


def _by_length(order: NDArray[np.int64], rows: Rows, size: int, generator: np.random.Generator, grouped: bool) -> Iterable[int]:
    """Unpacked rows in their order, or with neighbours of like length and the batches among themselves shuffled."""
    if not grouped:
        return [int(row) for row in order]
    reach = 64 * size
    lists = [order[at : at + reach] for at in range(0, len(order), reach)]
    flat = np.concatenate([part[np.argsort(-rows.lengths[part], kind="stable")] for part in lists]) if lists else order
    groups = [flat[at : at + size] for at in range(0, len(flat), size)]
    # A short last group stays last, since batches are cut at fixed places.
    mixed = [groups[i] for i in generator.permutation(len(groups) - 1)] + groups[-1:]
    return [int(row) for group in mixed for row in group]


def _filled(lengths: NDArray[np.int32], order: NDArray[np.int64], capacity: int) -> list[NDArray[np.int64]]:
    lines, start, used = [], 0, 0
    for at, length in enumerate(lengths[order].tolist()):
        if used + length > capacity and at > start:
            lines.append(order[start:at])
            start, used = at, 0
        used += length
    return [*lines, order[start:]] if start < len(order) else lines
