"""Micro-batches of what is scored: pairs of answers with their margins, or the steps of answers with their verdicts. No torch.

A label stands where a score is read: at the last token of an answer that is no padding, or of a step.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from ropewalk.data.compared import numbered
from ropewalk.data.dataset import Batch, Rows
from ropewalk.data.stream import Pair


def lengths_of(rows: Rows, kind: str | None) -> NDArray[np.int32]:
    """Tokens of each row, without what is kept behind them."""
    if kind == "ranked":
        return rows.lengths - 1
    return rows.marks if kind == "steps" else rows.lengths


def lay_out_ranked(rows: Rows, lines: Sequence[NDArray[np.int64]], width: int | None, multiple: int, *, packed: bool) -> Batch:
    """Both answers of every pair, one after the other in its line, or unpacked in lines of their own."""
    read = [[_ranked(rows, int(row)) for row in line] for line in lines]
    pairs = [[answers for answers, _ in line] for line in read]
    laid = [[answer for pair in line for answer in pair] for line in pairs]
    if not packed:
        laid = [[answer] for line in laid for answer in line]
    batch = numbered(laid, rows.pad, width, multiple, pairs=True)
    assert batch.compared is not None
    margins = np.array([margin for line in read for _, margin in line], np.float32)
    return replace(batch, compared=replace(batch.compared, margins=margins))


def lay_out_steps(rows: Rows, lines: Sequence[NDArray[np.int64]], width: int | None, multiple: int) -> Batch:
    """Answers side by side, and for all of their steps, in order, whether each is right."""
    read = [[_steps(rows, int(row)) for row in line] for line in lines]
    batch = numbered([[answer for answer, _ in line] for line in read], rows.pad, width, multiple)
    assert batch.compared is not None
    right = np.concatenate([verdicts for line in read for _, verdicts in line])
    return replace(batch, compared=replace(batch.compared, units=len(right), wanted=right))


def _ranked(rows: Rows, row: int) -> tuple[tuple[Pair, Pair], float]:
    ids, labels = rows[row]
    cut = int(rows.marks[row])
    margin = float(ids[-1:].view(np.float32)[0])
    return ((ids[:cut], labels[:cut]), (ids[cut:-1], labels[cut:-1])), margin


def _steps(rows: Rows, row: int) -> tuple[Pair, NDArray[np.bool_]]:
    ids, labels = rows[row]
    cut = int(rows.marks[row])
    return (ids[:cut], labels[:cut]), ids[cut:].astype(np.bool_)
