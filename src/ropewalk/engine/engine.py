"""Requests in, ids and their log-probabilities out: everybody's next step, together.

    submit -> what of the prefix is known is found -> the rest is read, span by span, each kept -> the tail is read -> ids, one a step

A prompt is cut at the ends of its spans whether they were known or not, so that an answer does not depend on what was known.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from random import Random
from typing import Any, Protocol

from torch import Tensor

from ropewalk.engine.cache import Reading, Segment
from ropewalk.engine.likeliest import Likeliest, likeliest
from ropewalk.engine.request import FORGOTTEN, Event, Finish, Grammar, Keep, Picture, Request, Span, acts_from
from ropewalk.engine.runner import Runner
from ropewalk.engine.sampling import choose, stream
from ropewalk.engine.scheduler import Limits, Scheduler, Turn
from ropewalk.errors import BadInput

Rows = tuple[str | None, int, int]  # an adapter, and the rows [begin, end) of a step that are its


class Adapters(Protocol):
    """What the engine needs of engine/adapters.py."""

    def rows(self, rows: Sequence[Rows], last: Sequence[str | None]) -> AbstractContextManager[None]: ...

    def digest(self, name: str) -> str:
        """Changes when the adapter does."""

    def invocation(self, name: str) -> tuple[int, ...] | None:
        """Of an activated adapter: the ids from whose last occurrence on it acts."""

    def version(self, name: str) -> int: ...


class Prefixes(Protocol):
    """What the engine needs of engine/prefixes.py."""

    def key(self, parent: str, adapter: str, scope: str, ids: Sequence[int], picture: str = "") -> str: ...

    def find(self, key: str, keep: Keep | None) -> Segment | None: ...

    def put(self, segment: Segment, keep: Keep | None) -> None: ...


class Sight(Protocol):
    """What the engine needs of engine/sight.py."""

    @property
    def at_once(self) -> bool:
        """Whether all ids of a picture have to be read in one pass: they see each other both ways."""

    def look(self, picture: Picture) -> Any:
        """What the model's eyes make of it."""

    def read(self, reading: Reading, seen: Any, begin: int, end: int) -> None:
        """Reads the ids [begin, end) of a picture on a reading's end."""


class Constraint(Protocol):
    """A grammar at work on one sample."""

    def mask(self, logits: Tensor) -> None:
        """Forbids, in place, every id [V] that may not come next."""

    def take(self, id: int) -> bool:
        """Goes on by an id; whether the reply is now complete and nothing may follow."""


class Grammars(Protocol):
    """What the engine needs of engine/grammar.py."""

    def begin(self, grammar: Grammar) -> Constraint: ...


@dataclass(eq=False)
class Job:
    """One sample of one request."""

    request: Request
    sample: int
    acts_from: int  # position from which the adapter acts
    reading_on: Reading
    todo: list[tuple[Span, str]]  # spans to read, with their keys
    tail: list[int]  # ids of the tail that are still to read
    leader: Job | None  # the sample that reads the prompt for all of them
    constraint: Constraint | None
    random: Random
    at_once: bool = False  # whether a picture is read in one pass
    seen: Any = None  # what the model's eyes made of the picture at hand
    inside: int = 0  # ids of the first span of `todo` that have been read
    waits: bool = False  # another reads the span that comes next
    produced: int = 0
    last: int = -1
    read: int = 0
    created: int = 0
    told: bool = False
    followers: list[Job] = field(default_factory=list)

    @property
    def scope(self) -> str:
        return self.request.scope

    @property
    def most(self) -> int:
        """Ids that it produces at most."""
        lengths = self.request.lengths
        return lengths[self.sample] if lengths else self.request.max_tokens

    @property
    def told_at(self) -> float:
        """The temperature at which log-probabilities are told."""
        return (self.request.sampling.temperature or 1.0) if self.request.tempered else 1.0

    @property
    def reading(self) -> int:
        """Ids of the piece at hand: a step never reads past the end of a span."""
        if self.shows and self.at_once:
            return 1  # the scheduler is to find a place for it, however long it is
        if self.todo:
            return len(self.todo[0][0].ids) - self.inside
        return len(self.tail)

    @property
    def shows(self) -> Picture | None:
        """The picture that comes next."""
        return self.todo[0][0].picture if self.todo else None

    @property
    def blocked(self) -> bool:
        return self.waits or self.leader is not None


class Engine:
    """One model, and everybody who asks it."""

    def __init__(
        self,
        runner: Runner,
        prefixes: Prefixes,
        adapters: Adapters | None = None,
        grammars: Grammars | None = None,
        limits: Limits = Limits(),  # noqa: B008  (frozen)
        longest: int | None = None,
        sight: Sight | None = None,
    ) -> None:
        self.runner, self.prefixes, self.adapters, self.grammars, self.sight = runner, prefixes, adapters, grammars, sight
        self.longest = longest or int(runner.layout.config.max_position_embeddings)  # ids of prompt and reply together
        self._scheduler: Scheduler[Job] = Scheduler(limits)
        self._being_read: dict[str, Job] = {}
        self._jobs: dict[str, list[Job]] = {}
        self._events: list[Event] = []

    @property
    def busy(self) -> bool:
        """Whether a step would do anything."""
        return bool(len(self._scheduler) or self._events)

    @property
    def requests(self) -> int:
        """How many are being answered, or wait."""
        return len(self._jobs)

    def submit(self, request: Request) -> None:
        """Takes a request; BadInput for one that can never be answered, Overloaded when too many wait."""
        self._check(request)
        lead = self._job(request, 0)
        jobs = [lead]
        for sample in range(1, request.samples):
            follower = self._job(request, sample, lead)
            lead.followers.append(follower)
            jobs.append(follower)
        self._scheduler.add(jobs)
        self._jobs[request.id] = jobs

    def lacking(self, request: Request) -> list[str]:
        """The digests of pictures that would have to be looked at, and came without their pixels."""
        bare = [(span, key) for span, key in self._keyed(request) if span.picture is not None and span.picture.pixels is None]
        return [span.picture.digest for span, key in bare if span.picture and self.prefixes.find(key, span.keep) is None]

    def cancel(self, id: str, sample: int | None = None) -> None:
        """Ends a request, or one sample of it, at once; what it has read is kept for others."""
        for job in list(self._jobs.get(id, ())):
            if sample in (None, job.sample):
                self._end(job, "cancelled")

    def step(self) -> list[Event]:
        """One forward pass; what it brought each sample."""
        self._scheduler.admit()
        self._look_again()
        turns = self._scheduler.next()
        if turns:
            self._run(turns)
        events, self._events = self._events, []
        return events

    # -- in

    def _check(self, request: Request) -> None:
        if request.id in self._jobs:
            raise BadInput(f"a request '{request.id}' is being answered already; ids are used once")
        if not request.tail and request.max_tokens:
            raise BadInput("a request needs at least one id that is not part of its prefix")
        if any(not span.ids for span in request.prefix):
            raise BadInput("a span of a request's prefix has no ids")
        lengths = request.lengths
        if lengths and (len(lengths) != request.samples or min(lengths) < 1 or max(lengths) != request.max_tokens):
            raise BadInput(
                f"a request for {request.samples} samples of {request.max_tokens} ids has lengths {lengths}; they are one for "
                "each sample, the longest being max_tokens"
            )
        if self.sight is None and any(span.picture for span in request.prefix):
            raise BadInput("image: this model reads no images; send the text instead, or ask a model that does")
        if request.length + min(1, request.max_tokens) > self.longest:
            raise BadInput(
                f"prompt is too long: {request.length:,} tokens, and the model reads {self.longest:,} with its reply; "
                "leave a document out or ask about a part of it"
            )
        if request.adapter is not None:
            if self.adapters is None:
                raise BadInput(f"this engine has no adapter '{request.adapter}'")
            self.adapters.digest(request.adapter)
        if request.grammar is not None and self.grammars is None:
            raise BadInput("this engine was started without a tokenizer, so that it cannot follow a grammar")

    def _job(self, request: Request, sample: int, leader: Job | None = None) -> Job:
        constraint = None
        if request.grammar is not None:
            assert self.grammars is not None
            constraint = self.grammars.begin(request.grammar)
        return Job(
            request,
            sample,
            self._acts_from(request),
            Reading.after(self.runner.layout, []),
            self._keyed(request) if leader is None else [],
            list(request.tail) if leader is None and request.max_tokens else [],
            leader,
            constraint,
            stream(request.sampling, request.id, sample),
            self.sight is not None and self.sight.at_once,
        )

    def _acts_from(self, request: Request) -> int:
        """The position from which the adapter of a request acts; without one it does not matter."""
        if request.adapter is None or self.adapters is None:
            return 0
        ids = [id for span in request.prefix for id in span.ids] + list(request.tail)
        return acts_from(ids, self.adapters.invocation(request.adapter))

    def _keyed(self, request: Request) -> list[tuple[Span, str]]:
        parent, position, found = "", 0, []
        acting = self._acts_from(request)
        for span in request.prefix:
            position += len(span.ids)
            as_base = request.adapter is None or position <= acting
            adapter = "" if as_base or self.adapters is None else self.adapters.digest(str(request.adapter))
            shown = span.picture.digest if span.picture is not None else ""
            parent = self.prefixes.key(parent, adapter, request.scope, span.ids, shown)
            found.append((span, parent))
        return found

    def _find(self, job: Job) -> None:
        """Goes past the spans that are known; waits where another is reading the next one."""
        segments = list(job.reading_on.segments)
        known, job.waits = len(segments), False
        while job.todo:
            span, key = job.todo[0]
            if self._being_read.get(key, job) is not job:
                job.waits = True
                break
            segment = self.prefixes.find(key, span.keep)
            if segment is None:
                break
            segments.append(segment)
            job.read += len(segment.ids)
            job.todo.pop(0)
        if len(segments) > known:
            job.reading_on = Reading.after(self.runner.layout, segments)

    def _look_again(self) -> None:
        """What others have read since may be what a sample at the beginning of a span is about to read."""
        for job in list(self._scheduler.running):
            if job.leader is not None:
                continue
            if job.todo and not job.inside:
                self._find(job)
                if job.todo and not job.waits:
                    self._being_read[job.todo[0][1]] = job
            if not job.todo and not job.request.max_tokens:
                self._end(job, "length")

    # -- on

    def _run(self, turns: Sequence[Turn[Job]]) -> None:
        looking = [turn for turn in turns if turn.job.shows]
        if looking:  # one at a time: the others are not to wait for long
            self._look(looking[0])
            turns = [turn for turn in turns if turn not in looking]
        if turns:
            self._pass(turns)

    def _look(self, turn: Turn[Job]) -> None:
        """Reads a picture, or a part of it, in a pass of its own."""
        job, picture = turn.job, turn.job.shows
        assert picture is not None
        assert self.sight is not None
        if picture.pixels is None:  # it was known when the request came, and is not any more
            self._end(job, "error", FORGOTTEN)
            return
        try:
            job.seen = self.sight.look(picture) if job.seen is None else job.seen
        except BadInput as error:
            self._end(job, "error", str(error))
            return
        turn = Turn(job, len(job.todo[0][0].ids)) if self.sight.at_once else turn
        with self.adapters.rows(*self._rows([turn])) if self.adapters is not None else nullcontext():
            self.sight.read(job.reading_on, job.seen, job.inside, job.inside + turn.count)
        self._has_read(turn)
        if not job.inside:
            job.seen = None

    def _pass(self, turns: Sequence[Turn[Job]]) -> None:
        turns = sorted(turns, key=lambda turn: turn.job.request.adapter or "")
        work = [(turn.job.reading_on, self._ids(turn)) for turn in turns]
        if self.adapters is None:
            logits = self.runner.forward(work)
        else:
            with self.adapters.rows(*self._rows(turns)):
                logits = self.runner.forward(work)
        ready: list[tuple[Job, int]] = []
        for row, turn in enumerate(turns):
            if self._has_read(turn):
                ready += [(job, row) for job in (turn.job, *turn.job.followers)]
                turn.job.followers = []
        if ready:
            jobs, rows = [job for job, _ in ready], [row for _, row in ready]
            self._choose(jobs, logits if rows == list(range(len(logits))) else logits[rows])

    def _ids(self, turn: Turn[Job]) -> list[int]:
        job = turn.job
        if job.todo:
            return list(job.todo[0][0].ids[job.inside : job.inside + turn.count])
        return job.tail[: turn.count] if job.tail else [job.last]

    def _rows(self, turns: Sequence[Turn[Job]]) -> tuple[list[Rows], list[str | None]]:
        """Whose each row is, and whose the last row of each turn."""
        rows: list[Rows] = []
        last: list[str | None] = []
        begin = 0
        for turn in turns:
            job, end = turn.job, begin + turn.count
            acts = min(max(begin, begin + job.acts_from - job.reading_on.position), end)
            rows += [(None, begin, acts), (job.request.adapter, acts, end)]
            last.append(job.request.adapter if acts < end else None)
            begin = end
        return [row for row in rows if row[1] < row[2]], last

    def _has_read(self, turn: Turn[Job]) -> bool:
        """Takes note of what a sample has read; whether an id is to be chosen now."""
        job = turn.job
        if not job.todo:
            del job.tail[: turn.count]
            if job.tail:
                return False
            if job.followers:  # what the prompt's end has left is shared by all samples
                shared = job.reading_on.close(f"{job.request.id} tail", job.request.tail)
                for follower in job.followers:
                    follower.leader = None
                    follower.reading_on = Reading.after(self.runner.layout, [*job.reading_on.segments[:-1], shared])
            return True
        span, key = job.todo[0]
        job.inside += turn.count
        if job.inside == len(span.ids):
            self.prefixes.put(job.reading_on.close(key, span.ids), span.keep)
            self._being_read.pop(key, None)
            job.todo.pop(0)
            job.inside = 0
            job.created += len(span.ids)
        return False

    # -- out

    def _choose(self, jobs: Sequence[Job], plain: Tensor) -> None:
        """plain [B, V]: what each one's next id is chosen by."""
        allowed = plain
        if any(job.constraint is not None for job in jobs):
            allowed = plain.clone()
            for row, job in zip(allowed, jobs):
                if job.constraint is not None:
                    job.constraint.mask(row)
        told = [job.told_at for job in jobs] if any(job.request.logprobs for job in jobs) else []
        ids, logprobs = choose(allowed, [job.request.sampling for job in jobs], [job.random for job in jobs], plain, told)
        tops = likeliest(plain, [job.request.top_logprobs for job in jobs])
        for job, id, logprob, top in zip(jobs, ids, logprobs or [0.0] * len(jobs), tops):
            self._produced(job, id, logprob, top)

    def _produced(self, job: Job, id: int, logprob: float, top: Likeliest) -> None:
        job.last = id
        job.produced += 1
        complete = job.constraint is not None and job.constraint.take(id)
        finish: Finish = ""
        if id in job.request.stop_ids or complete:
            finish = "stop"
        elif job.produced == job.most or job.reading_on.position + 1 >= self.longest:
            finish = "length"
        self._tell(job, (id,), (logprob,), finish, top=(top,) if top else ())
        if finish:
            self._forget(job)

    def _end(self, job: Job, finish: Finish, error: str = "") -> None:
        self._tell(job, (), (), finish, error)
        self._forget(job)

    def _tell(
        self,
        job: Job,
        ids: tuple[int, ...],
        logprobs: tuple[float, ...],
        finish: Finish,
        error: str = "",
        top: tuple[Likeliest, ...] = (),
    ) -> None:
        first = not job.told and job.sample == 0
        job.told = True
        self._events.append(
            Event(
                job.request.id,
                job.sample,
                ids,
                logprobs if job.request.logprobs else (),
                finish,
                read=job.read if first else None,
                created=job.created if first else None,
                version=self.adapters.version(job.request.adapter) if self.adapters and job.request.adapter else 0,
                error=error,
                top=top,
                routing=job.reading_on.routing() if finish and self.runner.routing is not None else None,
            )
        )

    def _forget(self, job: Job) -> None:
        self.runner.forget(job.reading_on)
        self._scheduler.remove(job)
        for key in [key for key, reader in self._being_read.items() if reader is job]:
            del self._being_read[key]
        for follower in job.followers:  # of a leader that was cancelled
            self._end(follower, "cancelled")
        left = self._jobs[job.request.id]
        left.remove(job)
        if not left:
            del self._jobs[job.request.id]
