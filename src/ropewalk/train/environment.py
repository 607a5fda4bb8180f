"""Replies over several turns: an environment answers the model, and its rewards are added up.

    class Env:                                     reset(row) -> the first messages
                                                   step(reply) -> Step(messages, reward, done)

Ids go in and ids come out: what was sampled is kept as it was sampled, with its log-probs, and what the environment says is added
behind it, never trained. Nothing that stands already is tokenised again, since that may give other ids than those that were sampled.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from ropewalk.chat.template import Template
from ropewalk.train.reward_functions import Message

REPLY = "271828182845904523536"  # stands for a reply where only what a template writes after one is wanted
Generated = tuple[Sequence[int], Sequence[float]]  # ids, the last one an end where there is one; their log-probs
Generate = Callable[[Sequence[int]], Generated]


@dataclass(frozen=True)
class Step:
    """What an environment makes of a reply.  environment -> episode"""

    messages: Sequence[Message] = ()  # to be answered next
    reward: float = 0.0  # added to those before
    done: bool = False


class Env(Protocol):
    """One conversation; a new object for each."""

    def reset(self, row: Mapping[str, Any]) -> Sequence[Message]:
        """The first messages, for a row of the data."""
        ...

    def step(self, reply: str) -> Step:
        """What follows from the model's reply."""
        ...


class Talk(Protocol):
    """Messages as ids."""

    def begin(self, messages: Sequence[Message]) -> list[int]:
        """The whole prompt."""
        ...

    def follow(self, messages: Sequence[Message], last: int | None) -> list[int]:
        """What stands between a reply, whose last id is `last`, and the next: the reply's end, the messages, the next one's beginning."""
        ...

    def read(self, ids: Sequence[int]) -> str:
        """The text of a reply."""
        ...


class TemplateTalk:
    """A model's own chat template."""

    def __init__(self, template: Template) -> None:
        self.template = template

    def begin(self, messages: Sequence[Message]) -> list[int]:
        return self.template.render(messages, add_generation_prompt=True).ids

    def follow(self, messages: Sequence[Message], last: int | None) -> list[int]:
        before = [{"role": "user", "content": "?"}, {"role": "assistant", "content": REPLY}]
        text = self.template.render_text([*before, *messages], add_generation_prompt=True)
        ids = self.template.encode(text.partition(REPLY)[2])
        # The end that the model has said itself is not said twice.
        return ids[1:] if ids and ids[0] == last else ids

    def read(self, ids: Sequence[int]) -> str:
        return self.template.decode(ids)


@dataclass(frozen=True)
class Limits:
    """What an episode may take."""

    turns: int = 8
    tokens: int = 4096  # of prompt, replies and messages together


@dataclass(frozen=True)
class Episode:
    """One conversation, ready to be learnt from.  rollouts -> trainer"""

    ids: list[int]
    trained: list[bool]  # whether an id was sampled
    logprobs: list[float]  # of ids that were sampled; 0 elsewhere
    prompt: int  # ids of the first prompt
    replies: list[str]
    reward: float
    end: Literal["done", "turns", "tokens", "failed"]
    error: str = ""  # of the environment, with its traceback


@dataclass
class _Record:
    ids: list[int]
    prompt: int
    trained: list[bool] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    replies: list[str] = field(default_factory=list)
    reward: float = 0.0

    def sampled(self, ids: Sequence[int], logprobs: Sequence[float]) -> None:
        self._add(ids, True, logprobs)

    def said(self, ids: Sequence[int]) -> None:
        self._add(ids, False, [0.0] * len(ids))

    def _add(self, ids: Sequence[int], trained: bool, logprobs: Sequence[float]) -> None:
        if len(ids) != len(logprobs):
            raise ValueError(f"{len(logprobs)} log-probs for {len(ids)} ids")
        self.ids += ids
        self.trained += [trained] * len(ids)
        self.logprobs += logprobs

    def end(self, end: Literal["done", "turns", "tokens", "failed"], error: str = "") -> Episode:
        begun = [False] * self.prompt, [0.0] * self.prompt
        reward = 0.0 if error else self.reward
        return Episode(
            self.ids, begun[0] + self.trained, begun[1] + self.logprobs, self.prompt, self.replies, reward, end, error
        )


def play(
    env: Env, row: Mapping[str, Any], talk: Talk, limits: Limits = Limits()
) -> Generator[Sequence[int], Generated, Episode]:
    """One episode as a generator: gives the ids to go on from, is sent what was generated. Many can be played side by side."""
    try:
        begun = talk.begin(env.reset(row))
    except Exception as error:
        return _Record([], 0).end("failed", _told(error))
    record = _Record(list(begun), len(begun))
    if len(begun) >= limits.tokens:
        return record.end("tokens")
    while True:
        ids, logprobs = yield tuple(record.ids)
        record.sampled(ids, logprobs)
        record.replies.append(talk.read(ids))
        try:
            step = env.step(record.replies[-1])
            record.reward += step.reward
        except Exception as error:
            return record.end("failed", _told(error))
        if step.done:
            return record.end("done")
        if len(record.replies) >= limits.turns:
            return record.end("turns")
        following = talk.follow(step.messages, ids[-1] if ids else None)
        if len(record.ids) + len(following) >= limits.tokens:
            return record.end("tokens")
        record.said(following)


def run_episode(env: Env, row: Mapping[str, Any], talk: Talk, generate: Generate, limits: Limits = Limits()) -> Episode:
    """One episode with a function that generates."""
    playing = play(env, row, talk, limits)
    try:
        ids = next(playing)
        while True:
            ids = playing.send(generate(ids))
    except StopIteration as stopped:
        episode: Episode = stopped.value
        return episode


def _told(error: Exception) -> str:
    return "".join(traceback.format_exception(error)).strip()
