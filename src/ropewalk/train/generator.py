"""The model under training, writing: an engine over a second module tree on the same frozen storage.

    pupil's base  ---- one copy of every weight ----  generator's base
    pupil's adapter  ---- publish(): copied in place ---->  generator's adapter

The trees differ in their adapters, their attention and their mode, so that neither has to be switched for the other. What is being
written when an adapter is published goes on under the new one: every id carries the version that sampled it.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import torch
from torch import Tensor

from ropewalk.engine.engine import Engine
from ropewalk.engine.replying import Stops, TextOfIds
from ropewalk.engine.request import Event, Request, Sampling, Span
from ropewalk.engine.runner import Runner
from ropewalk.engine.scheduler import Limits
from ropewalk.models.sharing import second_tree
from ropewalk.train.environment import Generated
from ropewalk.train.pupil import Pupil
from ropewalk.train.recent_prefixes import RecentPrefixes

ANY_NUMBER = 1 << 40  # of requests may wait: the rollouts bound themselves
CHUNK = 2048  # ids of prompts that are read in one step

Finished = tuple[str, int, Generated]  # whose, which sample, and what was written


@dataclass
class Spent:
    """What writing has cost."""

    tokens: int = 0
    seconds: float = 0.0


@dataclass
class _Writing:
    ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    versions: list[int] = field(default_factory=list)
    text: TextOfIds | None = None  # where it is to end at a text

    stopped: bool = False  # whether it has

    def stops(self, ids: Sequence[int]) -> bool:
        """Whether the text ends with these ids."""
        if self.text is None or self.stopped:
            return False
        self.text.feed(ids)
        self.stopped = self.text.stopped_by is not None
        return self.stopped


class Generator:
    """Completions of the model as it is."""

    def __init__(self, pupil: Pupil, *, running: int, longest: int, routing: bool = False) -> None:
        self._theirs: list[Tensor] = [*pupil.adapter.parameters()] if pupil.adapter is not None else []
        self.model, adapter = second_tree(pupil.model, pupil.adapter, pupil.config.seed)
        self._ours: list[Tensor] = [*adapter.parameters()] if adapter is not None else []
        self.version = 0  # how many adapters have been published
        self.spent = Spent()
        limits = Limits(running=running, waiting=ANY_NUMBER, chunk=CHUNK)
        runner = Runner(self.model)
        if routing:
            runner.record_routing()
        self._recent, self._whole = RecentPrefixes(), routing
        self.engine = Engine(runner, self._recent, limits=limits, longest=longest)
        self._writing: dict[tuple[str, int], _Writing] = {}

    @property
    def busy(self) -> bool:
        """Whether a step would do anything."""
        return self.engine.busy

    def submit(
        self,
        key: str,
        ids: Sequence[int],
        *,
        samples: int,
        max_tokens: int,
        sampling: Sampling,
        stop_ids: Sequence[int],
        ends: Sequence[int] = (),
        stops: Stops | None = None,
    ) -> None:
        """Goes on from these ids, in so many ways; they are read once.

        `ends`, rising and below their number, say where others asked so far: what was read up to there need not be read again.
        """
        cuts = [0, *(() if self._whole else ends)]  # whose experts are to be known is read whole
        spans = tuple(Span(tuple(ids[begin:end])) for begin, end in pairwise(cuts))
        request = Request(
            key,
            prefix=spans,
            tail=tuple(ids[cuts[-1] :]),
            max_tokens=max_tokens,
            sampling=sampling,
            stop_ids=tuple(stop_ids),
            samples=samples,
            logprobs=True,
            tempered=True,
        )
        for sample in range(samples):
            self._writing[key, sample] = _Writing(text=stops.begin() if stops else None)
        self.engine.submit(request)

    def cancel(self, key: str) -> None:
        """Lets go of a request."""
        self.engine.cancel(key)
        for sample in [mine for mine in self._writing if mine[0] == key]:
            del self._writing[sample]

    def step(self, wait: bool = True) -> list[Finished]:
        """One id more for everybody; what has come to its end."""
        begun = time.perf_counter()
        finished = [found for event in self.engine.step() if (found := self._take(event)) is not None]
        self.spent.seconds += time.perf_counter() - begun
        return finished

    @torch.no_grad()
    def publish(self) -> None:
        """From the next step on it is the pupil's present adapter that writes."""
        if self._ours:
            torch._foreach_copy_(self._ours, self._theirs)
        self._recent.forget()
        self.version += 1

    def _take(self, event: Event) -> Finished | None:
        writing = self._writing.get((event.id, event.sample))
        if writing is None:  # it was cancelled
            return None
        if writing.stops(event.ids) and not event.finish:  # the engine's last word on it comes with the next step
            self.engine.cancel(event.id, event.sample)
        writing.ids += event.ids
        writing.logprobs += event.logprobs
        writing.versions += [self.version] * len(event.ids)
        self.spent.tokens += len(event.ids)
        if not event.finish:
            return None
        del self._writing[event.id, event.sample]
        routing = None if event.routing is None else event.routing.cpu()
        ended = event.finish == "stop" or writing.stopped
        return event.id, event.sample, Generated(writing.ids, writing.logprobs, writing.versions, ended, routing)
