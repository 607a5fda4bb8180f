"""Samples side by side in the lines of a micro-batch. No torch."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ropewalk.data.dataset import Batch
from ropewalk.data.stream import Pair

MULTIPLE = 8  # row lengths that matrix units like


def lay_out(lines: Sequence[Sequence[Pair]], pad: int, width: int | None, multiple: int = MULTIPLE) -> Batch:
    """Samples side by side in each line, padded to `width` or to the longest line."""
    used = [sum(len(ids) for ids, _ in line) for line in lines]
    length = width or -(-max(used) // multiple) * multiple
    ids = np.full((len(lines), length), pad, np.int64)
    labels = np.full((len(lines), length), -100, np.int64)
    positions = np.empty((len(lines), length), np.int64)
    for number, line in enumerate(lines):
        at = 0
        for sample, target in line:
            ids[number, at : at + len(sample)] = sample
            labels[number, at : at + len(sample)] = target
            labels[number, at] = -100
            # To the end of the line: the next sample, if there is one, starts anew over it.
            positions[number, at:] = np.arange(length - at)
            at += len(sample)
    return Batch(ids, labels, positions, sum(used), int((labels != -100).sum()))
