"""Samples of a step -> micro-batches of one row, with or without a prompt read once for all answers to it.

Plain: every sample is laid out whole, with positions from 0. Shared: [prompt less its last id][last id + answer 1][last id + answer
2]...; every branch goes on from the prompt's positions and sees the prompt and itself (models/branching.py). What stands between the
replies of a longer conversation belongs to its branch: only the first prompt is shared. As each branch begins with the last id of the
prompt, what is predicted for any id stands one before it, as in a plain row.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ropewalk.data.packing import best_fit
from ropewalk.kernels.branching import Piece
from ropewalk.kernels.cross_entropy import IGNORED
from ropewalk.train.environment import Episode

# What a token of a branch costs beyond a token of a plain row, in such tokens, since its attention is made of two parts that are joined.
# On one CPU thread with LoRA in training: 0.11 at hidden size 256 (4 layers), 0.36 at 64 (2 layers), for 4 groups of 8 answers of 32
# tokens to prompts of 16. On a GPU it has not been measured.
JOINING = 0.3


@dataclass(frozen=True)
class SharedPrompts:
    """Which tokens of a row branch off which: its pieces from left to right; padding lengthens the last branch.  lay_out -> pupil"""

    pieces: tuple[Piece, ...]


@dataclass(frozen=True)
class PolicyBatch:
    """One micro-batch of policy training; arrays are [1, T].  lay_out -> trainer, pupil"""

    ids: NDArray[np.int64]
    labels: NDArray[np.int64]  # unshifted; IGNORED where not sampled
    position_ids: NDArray[np.int64]
    sample: NDArray[np.int64]  # index into `samples`; of padding that of the sample before it
    behaviour: NDArray[np.float32]  # log-prob of each label as it was sampled; 0 elsewhere
    samples: tuple[int, ...]  # numbers of the step's samples in it, in the order in which they lie
    tokens: int  # without padding
    trained: int
    shared: SharedPrompts | None = None  # None: no prompt is shared
    routing: Tensor | None = None  # int16 [T, layers, k]: experts that read each id; -1 where nobody wrote it down


@dataclass(frozen=True)
class _Laid:
    """Samples that lie together: branches of one prompt, or one sample whole."""

    prompt: int  # ids that are laid out once, before the branches
    episodes: tuple[tuple[int, Episode], ...]  # with their numbers

    @property
    def branches(self) -> tuple[int, ...]:
        return tuple(len(episode.ids) - self.prompt for _, episode in self.episodes)

    @property
    def length(self) -> int:
        return self.prompt + sum(self.branches)


def lay_out(groups: Sequence[Sequence[Episode]], *, tokens: int, shared: bool, pad: int, multiple: int) -> list[PolicyBatch]:
    """Every sample of the groups that trains anything, in rows of at most `tokens`; a longer sample has a row of its own.

    Samples are numbered in the order given. A group that is longer than a row is divided, and its prompt laid out in each part.
    """
    pieces: list[_Laid] = []
    number = 0
    for group in groups:
        numbered = _numbered(group, number)
        number += len(group)
        pieces += _together(numbered, tokens) if shared and _is_shared(numbered) else _alone(numbered)
    return [_row([pieces[at] for at in row], pad, multiple) for row in _fitted([p.length for p in pieces], tokens)]


def sharing_pays(groups: Sequence[Sequence[Episode]]) -> bool:
    """Whether laying the prompts of these groups out once costs less than as often as there are answers."""
    saved = joined = 0
    for group in groups:
        numbered = _numbered(group)
        if _is_shared(numbered):
            prompt = numbered[0][1].prompt - 1
            saved += prompt * (len(numbered) - 1)
            joined += sum(len(episode.ids) - prompt for _, episode in numbered)
    return saved > JOINING * joined


def _numbered(group: Sequence[Episode], first: int = 0) -> list[tuple[int, Episode]]:
    """Every sequence that trains anything, with its episode's number."""
    return [(at, one) for at, episode in enumerate(group, first) for one in episode.sequences if any(one.trained)]


def _is_shared(numbered: Sequence[tuple[int, Episode]]) -> bool:
    """Whether these are several answers to the same prompt, of which more than the last id can be laid out once."""
    if len(numbered) < 2:
        return False
    first = numbered[0][1]
    prompt = first.ids[: first.prompt]
    return first.prompt > 1 and all(episode.ids[: episode.prompt] == prompt for _, episode in numbered)


def _alone(numbered: Sequence[tuple[int, Episode]]) -> Iterator[_Laid]:
    return (_Laid(0, (entry,)) for entry in numbered)


def _together(numbered: Sequence[tuple[int, Episode]], tokens: int) -> Iterator[_Laid]:
    """The group in as few parts as fit into rows; a part of one sample is laid out whole."""
    prompt = numbered[0][1].prompt - 1
    room = tokens - prompt
    lengths = np.array([len(episode.ids) - prompt for _, episode in numbered], np.int32)
    for part in _fitted(lengths.tolist(), max(room, 1)):
        chosen = tuple(numbered[at] for at in part)
        yield _Laid(prompt if len(chosen) > 1 else 0, chosen)


def _fitted(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """What goes into each row, in the order given; rows in the order of their first entry."""
    fitting = [at for at, length in enumerate(lengths) if length <= capacity]
    rows = [[at] for at, length in enumerate(lengths) if length > capacity]
    found: dict[int, list[int]] = {}
    for at, row in zip(fitting, best_fit(np.array([lengths[at] for at in fitting], np.int32), capacity).tolist()):
        found.setdefault(row, []).append(at)
    return sorted([*rows, *found.values()])


def _row(pieces: Sequence[_Laid], pad: int, multiple: int) -> PolicyBatch:
    used = sum(piece.length for piece in pieces)
    length = -(-used // multiple) * multiple
    ids = np.full((1, length), pad, np.int64)
    labels = np.full((1, length), IGNORED, np.int64)
    positions = np.empty((1, length), np.int64)
    sample = np.zeros((1, length), np.int64)
    behaviour = np.zeros((1, length), np.float32)
    routing = _no_routing(pieces, length)
    numbers: list[int] = []
    at = 0
    for piece in pieces:
        cut = piece.prompt
        for index, (number, episode) in enumerate(piece.episodes):
            begin = cut if index else 0  # with the first branch comes the prompt
            end = at + len(episode.ids) - begin
            labelled = np.where(np.asarray(episode.trained[begin:], bool), np.asarray(episode.ids[begin:], np.int64), IGNORED)
            labelled[0] = IGNORED  # nothing stands before it to predict it from
            ids[0, at:end] = episode.ids[begin:]
            labels[0, at:end] = labelled
            # To the end of the row: what follows, if anything does, starts anew over it.
            positions[0, at:] = np.arange(begin, begin + length - at)
            sample[0, at:] = len(numbers)
            behaviour[0, at:end] = np.where(labelled != IGNORED, np.asarray(episode.logprobs[begin:], np.float32), 0.0)
            if routing is not None and episode.routing is not None:
                known = episode.routing[begin : len(episode.ids)]
                routing[at : at + len(known)] = known
            numbers.append(number)
            at = end
    shared = None
    if any(piece.prompt for piece in pieces):
        shared = SharedPrompts(tuple(Piece(piece.prompt, piece.branches) for piece in pieces))
    trained = int((labels != IGNORED).sum())
    return PolicyBatch(ids, labels, positions, sample, behaviour, tuple(numbers), used, trained, shared, routing)


def _no_routing(pieces: Sequence[_Laid], length: int) -> Tensor | None:
    """Room for the routing of a row, where that of any sample is known."""
    known = [episode.routing for piece in pieces for _, episode in piece.episodes if episode.routing is not None]
    return torch.full((length, *known[0].shape[1:]), -1, dtype=torch.int16) if known else None
