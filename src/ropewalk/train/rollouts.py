"""Prompts -> completions -> rewards: what a step by rewards learns from.

    questions, in an order that follows from the seed -> written by the generator -> scored by the rewards -> groups, in that order

A step's groups may be begun once the generator is at most `ahead` steps behind it. With 0 everything is written by the very weights
that learn from it; with 1, the default of asynchronous runs, what is left of a long completion is written beside the beginnings of
the next step's, so that no slot waits for the longest. Age is bounded by construction, so nothing is ever written to be thrown away.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future
from concurrent.futures import wait as wait_for
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import numpy as np

from ropewalk.engine.request import Sampling
from ropewalk.errors import TrainingStopped
from ropewalk.train.environment import Episode, Generated, Playing, single
from ropewalk.train.process import step_seed
from ropewalk.train.questions import Question
from ropewalk.train.reward_functions import Sample
from ropewalk.train.rewards import Array, Rewards, as_array

MOMENT = 0.01  # seconds after which a wait looks whether there is something to write
PATIENCE = 600.0  # seconds that an environment's answer is waited for, which has limits of its own


class Writer(Protocol):
    """What the rollouts need of train/generator.py, or of a server elsewhere."""

    @property
    def busy(self) -> bool: ...

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
    ) -> None: ...

    def step(self, wait: bool = True) -> list[tuple[str, int, Generated]]: ...


class Host(Protocol):
    """What the rollouts need of an environment."""

    @property
    def patience(self) -> float:
        """Seconds after which somebody must have answered."""

    def play(self, question: Question, sampling: Sampling) -> Playing: ...

    def room(self, ids: Sequence[int]) -> int: ...


@dataclass(frozen=True)
class Group:
    """The completions of one prompt, and what each reward said of each.  rollouts -> trainer"""

    number: int
    question: Question
    episodes: list[Episode]
    scores: Array  # [S, R]; NaN: does not apply
    errors: list[list[str]]  # [S][R]: why a reward, or what the environment gave, could not be had; "" where it could


@dataclass
class Waits:
    """Seconds for which one side stood still, and the other did not."""

    trainer: float = 0.0  # for completions and rewards
    generator: float = 0.0  # for the trainer, with nothing that it might have begun


@dataclass
class _Coming:
    """A group under way."""

    key: str
    number: int
    question: Question
    sampling: Sampling
    episodes: list[Episode | None]
    playing: dict[int, Playing] = field(default_factory=dict)  # sample -> its episode
    cuts: dict[int, list[int]] = field(default_factory=dict)  # sample -> up to where each turn's prompt was read for later ones
    scores: Future[Any] | None = None

    @property
    def written(self) -> bool:
        return all(episode is not None for episode in self.episodes)


class Rollouts:
    """Groups, step after step; `order(number)` gives the question of that number."""

    def __init__(
        self,
        writer: Writer,
        rewards: Rewards,
        *,
        order: Callable[[int], Question],
        samples: int,
        max_tokens: int,
        sampling: Sampling,
        stop_ids: Sequence[int],
        read: Callable[[Sequence[int]], str],
        seed: int,
        host: Host | None = None,
    ) -> None:
        self.writer, self.rewards, self.host = writer, rewards, host
        self.samples, self.max_tokens, self.sampling, self.stop_ids = samples, max_tokens, sampling, tuple(stop_ids)
        self.seed, self.waits = seed, Waits()
        self._order, self._read = order, read
        self._coming: dict[str, _Coming] = {}
        self._answers: list[tuple[_Coming, int, Future[Any]]] = []  # of environments
        self._idle_since: float | None = None

    def begin(self, numbers: Sequence[int]) -> None:
        """Has these groups written, unless they are already."""
        self._was_idle()
        for number in numbers:
            key = str(number)
            if key not in self._coming:
                self._begin(_Coming(key, number, self._order(number), self.sampling, [None] * self.samples))

    def take(self, numbers: Sequence[int]) -> list[Group]:
        """These groups, waited for."""
        begun = time.perf_counter()
        wanted = [self._coming[str(number)] for number in numbers]
        self._write(wanted)
        while waiting := [coming.scores for coming in wanted if coming.scores and not coming.scores.done()]:
            if self.writer.busy:
                self.go_on()
            else:
                wait_for(waiting, MOMENT)  # somebody may ask meanwhile, perhaps the reward itself; its limits bound this
        groups = [self._group(coming) for coming in wanted]
        for coming in wanted:
            del self._coming[coming.key]
        self.waits.trainer += time.perf_counter() - begun
        return groups

    def examine(self, questions: Sequence[Question], numbers: Sequence[int]) -> list[Group]:
        """One greedy completion of each question."""
        greedy = Sampling(temperature=0.0)
        asked = list[_Coming]()
        for number, question in zip(numbers, questions):
            asked.append(_Coming(f"examined {number}", number, question, greedy, [None]))
            self._begin(asked[-1])
        self._write(asked)
        for coming in asked:
            del self._coming[coming.key]
        return [self._group(coming) for coming in asked]

    def go_on(self, steps: int = 1, wait: bool = True) -> None:
        """Writes on for so many steps of the generator, or until nothing is left to write; one that writes by itself is only heard."""
        for _ in range(steps):
            self._was_idle()
            self._hear_environments(wait=wait and not self.writer.busy)
            if not self.writer.busy:
                break
            for key, sample, generated in self.writer.step(wait):
                self._take(key, sample, generated)
        if not self.writer.busy and not self._answers:
            self._idle_since = time.perf_counter()

    def _write(self, wanted: Sequence[_Coming]) -> None:
        while not all(coming.written for coming in wanted):
            assert self.writer.busy or self._answers, "a completion is waited for that nobody writes"
            self.go_on()

    # -- one group

    def _begin(self, coming: _Coming) -> None:
        self._coming[coming.key] = coming
        if self.host is None:
            samples, seed = len(coming.episodes), step_seed(self.seed, coming.number)
            self._submit(coming.key, coming.question.ids, samples, coming.sampling, seed)
            return
        for sample in range(len(coming.episodes)):
            seeded = replace(coming.sampling, seed=step_seed(self.seed, coming.number, sample))
            coming.playing[sample], coming.cuts[sample] = self.host.play(coming.question, seeded), []
            self._play(coming, sample, None)

    def _submit(
        self, key: str, ids: Sequence[int], samples: int, sampling: Sampling, seed: int, ends: Sequence[int] = ()
    ) -> None:
        seeded = replace(sampling, seed=seed)
        most = self.max_tokens if self.host is None else min(self.max_tokens, self.host.room(ids))
        self.writer.submit(key, ids, samples=samples, max_tokens=most, sampling=seeded, stop_ids=self.stop_ids, ends=ends)

    def _take(self, key: str, sample: int, generated: Generated) -> None:
        name, *turn = key.split("/")
        coming = self._coming[name]
        if turn:
            self._play(coming, int(turn[0]), generated)
        else:
            self._keep(coming, sample, single(coming.question.ids, generated, self._read(generated.ids)))

    def _play(self, coming: _Coming, sample: int, given: Any) -> None:
        """Goes on with an episode until it waits for something."""
        try:
            asked = coming.playing[sample].send(given)
        except StopIteration as stopped:
            del coming.playing[sample]
            self._keep(coming, sample, stopped.value)
            return
        if isinstance(asked, Future):
            self._answers.append((coming, sample, asked))
            return
        cuts = coming.cuts[sample]
        turn = len(cuts)
        # All but a prompt's last id is read once: a first prompt for the whole group, any for the turns after it.
        cuts.append(len(asked) - 1)
        seed = step_seed(self.seed, coming.number, sample, turn)
        self._submit(f"{coming.key}/{sample}/{turn}", asked, 1, coming.sampling, seed, [cut for cut in cuts if cut])

    def _hear_environments(self, wait: bool) -> None:
        """Goes on with the episodes whose environments have answered; waits for one where there is nothing else to do."""
        if wait and self._answers:
            patience = PATIENCE + (self.host.patience if self.host else 0.0)
            futures, until = [answer for _, _, answer in self._answers], time.monotonic() + patience
            while not wait_for(futures, MOMENT, FIRST_COMPLETED).done and time.monotonic() < until:
                if self.writer.busy:  # the environment may be asking for it
                    return
            if time.monotonic() >= until:
                raise TrainingStopped(f"none of {len(futures)} environments has answered within {patience:g} seconds")
        ready = [entry for entry in self._answers if entry[2].done()]
        self._answers = [entry for entry in self._answers if not entry[2].done()]
        for coming, sample, answer in ready:
            self._play(coming, sample, answer.result())

    def _keep(self, coming: _Coming, sample: int, episode: Episode) -> None:
        coming.episodes[sample] = episode
        if coming.written:  # it is scored while others are written
            coming.scores = self.rewards.pool.submit([self._sample(coming, one) for one in coming.episodes if one])

    def _sample(self, coming: _Coming, episode: Episode) -> Sample:
        prompt = coming.question.prompt
        return Sample("\n".join(episode.replies), prompt.asked, prompt.row, tuple(episode.ids[episode.prompt :]))

    def _group(self, coming: _Coming) -> Group:
        assert coming.scores is not None
        said = self.rewards.seen(self.rewards.pool.wait_for(coming.scores))
        scores, errors = as_array(said), [[one.error for one in row] for row in said]
        episodes = [episode for episode in coming.episodes if episode is not None]
        if self.host is not None:  # what the environment gave is the first of the rewards
            own = np.array([[episode.reward] for episode in episodes], dtype=np.float64)
            scores = np.concatenate([own, scores], axis=1)
            errors = [[episode.error, *row] for episode, row in zip(episodes, errors)]
            scores[[episode.end == "failed" for episode in episodes]] = np.nan  # nobody knows what these were worth
        return Group(coming.number, coming.question, episodes, scores, errors)

    def _was_idle(self) -> None:
        if self._idle_since is not None:
            self.waits.generator += time.perf_counter() - self._idle_since
            self._idle_since = None
