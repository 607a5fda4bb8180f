"""What outside code asks of the model under training, as what is learnt from: each rollout has a session, which its key opens.

    HTTP thread: find(key) -> Session: align, ends, add            trainer's thread: begin() ... end() -> the episode

A call whose prompt goes on from all that an earlier one had and was told lengthens that sequence, with the new part of the prompt
untrained; any other begins a sequence of its own. Nothing that was sampled is tokenised again: where a prompt has the same text as ids
that stand already, those are taken.
"""

from __future__ import annotations

import secrets
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import count

from ropewalk.engine.request import Sampling
from ropewalk.train.environment import End, Episode, Generated, Record
from ropewalk.train.process import step_seed

Read = Callable[[Sequence[int]], str]  # ids -> their text, control tokens and all


@dataclass
class _Sequence:
    record: Record
    cuts: list[int] = field(default_factory=list)  # up to where each of its prompts was read for later ones

    def begins(self, ids: Sequence[int]) -> bool:
        """Whether these go on from it."""
        own = self.record.ids
        return len(own) < len(ids) and list(ids[: len(own)]) == own


@dataclass
class Session:
    """One rollout's calls."""

    key: str = field(repr=False)
    sampling: Sampling  # of this rollout, with a seed of its own
    asked: Sampling  # of the run: what a call may ask for
    most: int  # ids of one reply
    longest: int  # ids of prompt and reply
    read: Read
    open: bool = True
    _sequences: list[_Sequence] = field(default_factory=list)
    _calls: count[int] = field(default_factory=count)
    _turn: threading.Lock = field(default_factory=threading.Lock)

    def next_sampling(self) -> Sampling:
        """That of one more call."""
        return replace(self.sampling, seed=step_seed(self.sampling.seed or 0, next(self._calls)))

    def align(self, ids: Sequence[int]) -> tuple[int, ...]:
        """The ids of a prompt, in which what is worded as a sequence that stands already has that sequence's ids."""
        given = tuple(ids)
        with self._turn:
            if self._before(given) is not None:
                return given
            standing = [tuple(one.record.ids) for one in self._sequences]
        text = self.read(given)
        for one in sorted(standing, key=len, reverse=True):
            begins = self.read(one)
            if text.startswith(begins) and (cut := self._place(given, begins)) is not None:
                return (*one, *given[cut:])
        return given

    def ends(self, ids: Sequence[int]) -> list[int]:
        """Where a prompt is cut, so that what was read for earlier calls, or for others with the same prompt, is not read again."""
        with self._turn:
            before = self._before(ids)
            return [cut for cut in (*(before.cuts if before else ()), len(ids) - 1) if cut]

    def add(self, ids: Sequence[int], generated: Generated, text: str) -> None:
        """A call, and what was sampled for it; nothing any more once the rollout is over."""
        with self._turn:
            if not self.open:
                return
            found = self._before(ids)
            if found is None:
                found = _Sequence(Record.of(ids))
                self._sequences.append(found)
            else:
                found.record.said(ids[len(found.record.ids) :])
            found.cuts.append(len(ids) - 1)
            found.record.sampled(generated, text)

    def end(self, reward: float, metrics: Mapping[str, float], end: End, error: str = "") -> Episode:
        """The episode, in the order in which its sequences began."""
        with self._turn:
            self.open = False
            first, *others = [one.record.end(end, error) for one in self._sequences] or [Record.of([]).end(end, error)]
        replies = [reply for one in (first, *others) for reply in one.replies]
        worth = 0.0 if error else reward
        return replace(first, apart=tuple(others), replies=replies, reward=worth, metrics=metrics)

    def _before(self, ids: Sequence[int]) -> _Sequence | None:
        """The longest sequence that these go on from."""
        return max((one for one in self._sequences if one.begins(ids)), key=lambda one: len(one.record.ids), default=None)

    def _place(self, ids: Sequence[int], text: str) -> int | None:
        """How many of the ids have this text, with which theirs begins; None where it ends within one."""
        low, high = 0, len(ids)
        while low < high:
            middle = (low + high) // 2
            low, high = (middle + 1, high) if len(self.read(ids[:middle])) < len(text) else (low, middle)
        return low if self.read(ids[:low]) == text else None


class Sessions:
    """The rollouts under way."""

    def __init__(self, *, asked: Sampling, most: int, longest: int, read: Read) -> None:
        self.asked, self.most, self.longest, self.read = asked, most, longest, read
        self._open: dict[str, Session] = {}

    def begin(self, sampling: Sampling) -> Session:
        """A rollout's, which samples so."""
        session = Session(secrets.token_urlsafe(24), sampling, self.asked, self.most, self.longest, self.read)
        self._open[session.key] = session
        return session

    def find(self, key: str) -> Session | None:
        """The session that a key opens, if its rollout is not over."""
        return self._open.get(key)

    def end(self, session: Session) -> None:
        """Nothing more is taken for it."""
        session.open = False
        self._open.pop(session.key, None)
