"""Micro-batches of answers that are compared: pairs, or judged answers with their mismatched twins. No torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from ropewalk.data.dataset import Batch, Compared, Rows
from ropewalk.data.laying import lay_out
from ropewalk.data.stream import Pair
from ropewalk.errors import DataError


def lay_out_pairs(rows: Rows, lines: Sequence[NDArray[np.int64]], width: int | None, multiple: int, *, packed: bool) -> Batch:
    """Both answers of every pair, one after the other in its line, or unpacked in lines of their own."""
    halves = [[_halves(rows, int(row)) for row in line] for line in lines]
    if packed:
        laid = [[answer for pair in line for answer in pair] for line in halves]
    else:
        laid = [[answer] for line in halves for pair in line for answer in pair]
    return numbered(laid, rows.pad, width, multiple, pairs=True)


def lay_out_judged(
    rows: Rows, lines: Sequence[NDArray[np.int64]], partners: NDArray[np.int64], width: int | None, multiple: int
) -> Batch:
    """Judged answers, and beside them each prompt with the answer of its partner, by which KTO measures how far the model has gone."""
    batch = numbered([[rows[int(row)] for row in line] for line in lines], rows.pad, width, multiple)
    twins = [[_mismatched(rows, int(row), int(partners[row]), batch.ids.shape[1]) for row in line] for line in lines]
    assert batch.compared is not None
    wanted = rows.marks[np.concatenate(lines)] > 0
    mismatched = numbered(twins, rows.pad, None, multiple)
    return replace(batch, compared=replace(batch.compared, wanted=wanted, mismatched=mismatched))


def partners_of(rows: Rows, order: NDArray[np.int64]) -> NDArray[np.int64]:
    """For every row the one that follows it in the epoch: the same in whatever batches they come."""
    if len(rows) < 2:
        raise DataError("KTO sets answers beside prompts of other rows, and there is one row alone; give it more")
    partners = np.empty(len(rows), np.int64)
    partners[order] = np.roll(order, -1)
    return partners


def _halves(rows: Rows, row: int) -> tuple[Pair, Pair]:
    ids, labels = rows[row]
    cut = int(rows.marks[row])
    return (ids[:cut], labels[:cut]), (ids[cut:], labels[cut:])


def _mismatched(rows: Rows, row: int, partner: int, longest: int) -> Pair:
    (ids, _), (other, labels) = rows[row], rows[partner]
    begin, other_begin = abs(int(rows.marks[row])), abs(int(rows.marks[partner]))
    prompt = np.full(begin, -100, labels.dtype)
    joined = np.concatenate([ids[:begin], other[other_begin:]]), np.concatenate([prompt, labels[other_begin:]])
    return joined[0][:longest], joined[1][:longest]


def numbered(lines: Sequence[Sequence[Pair]], pad: int, width: int | None, multiple: int, *, pairs: bool = False) -> Batch:
    """The laid out batch with the number of every token's answer."""
    batch = lay_out(lines, pad, width, multiple)
    sample = np.zeros_like(batch.ids)
    number = 0
    for at, line in enumerate(lines):
        begin = 0
        for ids, _ in line:
            sample[at, begin:] = number
            begin += len(ids)
            number += 1
    return replace(batch, compared=Compared(sample, number // 2 if pairs else number))
