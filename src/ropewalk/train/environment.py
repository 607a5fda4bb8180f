"""Replies over several turns: an environment answers the model, and its rewards are added up.

    class Env:                                     reset(row) -> the first messages
        tools = [...]                              step(reply) -> Step(messages, reward, done), for a reply that calls no tool

Ids go in and ids come out: what was sampled is kept as it was sampled, with its log-probs, and what the environment says is added
behind it, never trained. Nothing that stands already is tokenised again, since that may give other ids than those that were sampled.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable, Generator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, Protocol

from ropewalk.train.reward_functions import Message

if TYPE_CHECKING:  # the processes of environments are light
    from torch import Tensor

    from ropewalk.train.environment_tools import ToolCall


@dataclass(frozen=True)
class Generated:
    """What was sampled behind the ids that were given.  generator -> episode"""

    ids: Sequence[int]  # the last one an end where there is one
    logprobs: Sequence[float]
    versions: Sequence[int]  # of the adapter that sampled each
    ended: bool  # by itself, rather than by a limit
    routing: Tensor | None = None  # int16 [ids given and sampled, layers, k], from the first one on; -1 or missing: unknown


Generate = Callable[[Sequence[int]], Generated]
End = Literal["done", "turns", "tokens", "failed"]


@dataclass(frozen=True)
class Failed:
    """In the place of what an environment should have answered."""

    error: str


@dataclass(frozen=True)
class Step:
    """What an environment makes of a reply.  environment -> episode"""

    messages: Sequence[Message] = ()  # to be answered next
    reward: float = 0.0  # added to those before
    done: bool = False


@dataclass(frozen=True)
class Outcome:
    """What an episode was worth that outside code has driven.  harness -> episode"""

    reward: float
    metrics: Mapping[str, float] = field(default_factory=dict)  # told beside it


class Env(Protocol):
    """One conversation; a new object for each. `close()`, where there is one, is called at its end."""

    def reset(self, row: Mapping[str, Any]) -> Sequence[Message]:
        """The first messages, for a row of the data."""
        ...

    def step(self, reply: str) -> Step:
        """What follows from the model's reply."""
        ...


class RemoteEnv(Protocol):
    """One conversation whose environment is elsewhere: what it answers comes later, or `Failed` does."""

    def reset(self, row: Mapping[str, Any]) -> Future[Sequence[Message] | Failed]:
        """The first messages, for a row of the data."""
        ...

    def step(self, reply: str) -> Future[Step | Failed]:
        """What follows from the model's reply."""
        ...

    def call(self, calls: Sequence[ToolCall]) -> Future[list[str] | Failed]:
        """What tools give."""
        ...

    def close(self) -> None:
        """The episode is over."""
        ...


class Talk(Protocol):
    """Messages as ids."""

    def begin(self, messages: Sequence[Message]) -> list[int]:
        """The whole prompt."""
        ...

    def follow(self, messages: Sequence[Message], last: int | None) -> list[int]:
        """What stands between a reply, whose last id is `last`, and the next: the reply's end, the messages, the next one's beginning."""
        ...

    def calls(self, ids: Sequence[int]) -> Sequence[ToolCall]:
        """The calls of tools in a reply."""
        ...

    def answer(self, calls: Sequence[ToolCall], results: Sequence[str], last: int | None) -> list[int]:
        """What stands between a reply that called tools and the next: its end, what the tools gave, the next one's beginning."""
        ...

    def read(self, ids: Sequence[int]) -> str:
        """The text of a reply."""
        ...


@dataclass(frozen=True)
class Limits:
    """What an episode may take."""

    turns: int = 8
    tokens: int = 4096  # of prompt, replies and messages together


@dataclass(frozen=True)
class Episode:
    """One conversation, or one completion, ready to be learnt from.  rollouts -> trainer"""

    ids: list[int]
    trained: list[bool]  # whether an id was sampled
    logprobs: list[float]  # of ids that were sampled; 0 elsewhere
    versions: list[int]  # of the adapter that sampled an id; 0 elsewhere
    prompt: int  # ids of the first prompt
    replies: list[str]
    reward: float  # of the environment
    end: End
    error: str = ""  # of the environment, with its traceback
    routing: Tensor | None = None  # int16 [len(ids), layers, k], the experts of each id; -1 where they are not known
    ended: bool = False  # whether the last reply ended by itself
    apart: tuple[Episode, ...] = ()  # what else was asked in it, whose ids do not go on from these
    metrics: Mapping[str, float] = field(default_factory=dict)  # what is told of it beside its reward

    @property
    def sequences(self) -> tuple[Episode, ...]:
        """All that is learnt from, each from its own beginning."""
        return (self, *self.apart)

    @property
    def sampled(self) -> int:
        """How many ids were."""
        return sum(sum(sequence.trained) for sequence in self.sequences)


Playing = Generator["Sequence[int] | Future[Any]", Any, Episode]


@dataclass
class Record:
    """An episode while it grows: what was said and what was sampled, in turn."""

    ids: list[int]
    prompt: int
    trained: list[bool] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    versions: list[int] = field(default_factory=list)
    replies: list[str] = field(default_factory=list)
    reward: float = 0.0
    routing: Tensor | None = None
    ended: bool = False

    @classmethod
    def of(cls, prompt: Sequence[int]) -> Record:
        """Begins with a prompt."""
        record = cls([], len(prompt))
        record.said(prompt)
        return record

    def sampled(self, generated: Generated, reply: str) -> None:
        """The model's part, which is learnt from."""
        self._add(generated.ids, True, generated.logprobs, generated.versions)
        self.replies.append(reply)
        self.ended = generated.ended
        if generated.routing is not None:
            self._route(generated.routing)

    def said(self, ids: Sequence[int]) -> None:
        """Anybody else's part."""
        self._add(ids, False, [0.0] * len(ids), [0] * len(ids))

    def _add(self, ids: Sequence[int], trained: bool, logprobs: Sequence[float], versions: Sequence[int]) -> None:
        if not len(ids) == len(logprobs) == len(versions):
            raise ValueError(f"{len(logprobs)} log-probs and {len(versions)} versions for {len(ids)} ids")
        self.ids += ids
        self.trained += [trained] * len(ids)
        self.logprobs += logprobs
        self.versions += versions

    def _route(self, routing: Tensor) -> None:
        """Takes what is known of the routing; where an id was read again in a later turn, its first reading counts."""
        if len(routing) > len(self.ids):
            raise ValueError(f"the routing of {len(routing)} ids for {len(self.ids)}")
        whole = self._routing_of(len(self.ids), like=routing)
        part = whole[: len(routing)]
        unknown = part < 0
        part[unknown] = routing[unknown]
        self.routing = whole

    def _routing_of(self, length: int, like: Tensor) -> Tensor:
        known = like[:0] if self.routing is None else self.routing
        whole = like.new_full((length, *like.shape[1:]), -1)
        whole[: len(known)] = known
        return whole

    def end(self, end: End, error: str = "") -> Episode:
        """What came of it."""
        routing = None if self.routing is None else self._routing_of(len(self.ids), like=self.routing)
        reward = 0.0 if error else self.reward
        return Episode(
            self.ids,
            self.trained,
            self.logprobs,
            self.versions,
            self.prompt,
            self.replies,
            reward,
            end,
            error,
            routing,
            self.ended,
        )


def single(prompt_ids: Sequence[int], generated: Generated, text: str) -> Episode:
    """A prompt and its completion, which reads as `text`: an episode of one turn, without an environment."""
    record = Record.of(prompt_ids)
    record.sampled(generated, text)
    return record.end("done" if generated.ended else "tokens")


def play(env: Env | RemoteEnv, row: Mapping[str, Any], talk: Talk, limits: Limits = Limits()) -> Playing:
    """One episode as a generator: many can be played side by side.

    It gives the ids to go on from, and is sent what was `Generated`; or what an environment elsewhere will answer, a future, and is
    sent its result. The environment's `close`, where it has one, is called at the end, also of a generator that is closed before.
    """
    try:
        return (yield from _played(env, row, talk, limits))
    finally:
        if hasattr(env, "close"):
            env.close()


def _played(env: Env | RemoteEnv, row: Mapping[str, Any], talk: Talk, limits: Limits) -> Playing:
    first = yield from _answer(env.reset, row)
    begun = first if isinstance(first, Failed) else _trying(talk.begin, first)
    if isinstance(begun, Failed):
        return Record.of([]).end("failed", begun.error)
    record = Record.of(begun)
    if len(begun) >= limits.tokens:
        return record.end("tokens")
    while True:
        generated = yield tuple(record.ids)
        record.sampled(generated, talk.read(generated.ids))
        following = yield from _following(env, record, talk, generated)
        if isinstance(following, Failed):
            return record.end("failed", following.error)
        if following is None:
            return record.end("done")
        if len(record.replies) >= limits.turns:
            return record.end("turns")
        if len(record.ids) + len(following) >= limits.tokens:
            return record.end("tokens")
        record.said(following)


def _following(env: Any, record: Record, talk: Talk, generated: Generated) -> Generator[Future[Any], Any, Any]:
    """The ids behind a reply, what its calls gave or what the environment says; None where the episode is done."""
    last = generated.ids[-1] if generated.ids else None
    if calls := talk.calls(generated.ids):
        results = yield from _answer(env.call, calls)
        return results if isinstance(results, Failed) else _trying(talk.answer, calls, results, last)
    step = yield from _answer(env.step, record.replies[-1])
    if isinstance(step, Failed):
        return step
    record.reward += step.reward
    return None if step.done else _trying(talk.follow, step.messages, last)


def run_episode(
    env: Env | RemoteEnv, row: Mapping[str, Any], talk: Talk, generate: Generate, limits: Limits = Limits()
) -> Episode:
    """One episode with a function that generates."""
    playing = play(env, row, talk, limits)
    try:
        asked = next(playing)
        while True:
            asked = playing.send(asked.result() if isinstance(asked, Future) else generate(asked))
    except StopIteration as stopped:
        episode: Episode = stopped.value
        return episode


def _answer(ask: Callable[..., Any], given: Any) -> Generator[Future[Any], Any, Any]:
    """What an environment answers, waited for where it is elsewhere."""
    answer = _trying(ask, given)
    return (yield answer) if isinstance(answer, Future) else answer


def _trying(call: Callable[..., Any], *arguments: Any) -> Any:
    try:
        return call(*arguments)
    except Exception as error:
        return Failed("".join(traceback.format_exception(error)).strip())
