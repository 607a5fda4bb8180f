"""Environments in processes of their own: each episode's object lives in one of them, and ends with it.

begin() --> PooledEnv: reset(row), step(reply), close() --> calls of one process --> futures of messages, of a Step, or of Failed
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from contextlib import suppress
from functools import partial
from typing import Any, Literal

from ropewalk.chat.messages import Tool
from ropewalk.config.run import Run
from ropewalk.errors import BadInput, ConfigError, TrainingStopped
from ropewalk.train.environment import Failed, Limits, Step
from ropewalk.train.environment_tools import ToolCall
from ropewalk.train.environment_worker import EnvironmentSpec
from ropewalk.train.outage import Outage
from ropewalk.train.reward_builtins import SECONDS
from ropewalk.train.reward_functions import Message
from ropewalk.train.user_code import split_name
from ropewalk.train.worker_pool import WorkerPool
from ropewalk.train.worker_process import Call, Work, WorkerProcess

WORKER = "ropewalk.train.environment_worker"


def environment_of(run: Run) -> EnvironmentSpec | None:
    """The environment that a configuration names; no code of a user's is run for it."""
    trl = run.trl
    if trl is None or trl.environment is None:
        return None
    try:
        split_name(trl.environment, kind="environment", noun="Class")
    except BadInput as error:
        raise ConfigError(f"{run.where('trl', 'environment')}key 'trl.environment': {error}") from None
    return EnvironmentSpec(trl.environment, tuple(dict.fromkeys([run.folder, "."])), trl.reward_seconds or SECONDS)


def limits_of(run: Run) -> Limits:
    """What a configuration lets an episode take."""
    assert run.trl is not None
    return Limits(run.trl.max_turns, run.trl.max_episode_tokens or run.sequence_len)


class EnvironmentPool(WorkerPool):
    """The environments of a run's episodes, and the processes that hold them; use as a context."""

    def __init__(self, spec: EnvironmentSpec, workers: int = 1) -> None:
        self.spec = spec
        self.tools: tuple[Tool, ...] = ()  # known once it has started
        self.failures = 0  # episodes that failed
        self._outage = Outage(f"environment '{spec.name}'", "episodes")
        self._episodes = itertools.count()
        self._living: dict[int, dict[int, PooledEnv]] = {lane: {} for lane in range(workers)}
        super().__init__("environment", WORKER, [Work((lane,), spec, spec.name) for lane in range(workers)])

    def begin(self) -> PooledEnv:
        """The environment of one episode, in the process that holds fewest; raises where all that ran lately failed."""
        self._outage.check()
        with self._room:
            lane = min(self._living, key=lambda one: len(self._living[one]))
            env = PooledEnv(self, lane, next(self._episodes))
            self._living[lane][env.episode] = env
        return env

    def slowest(self) -> float:
        return self.spec.seconds

    def ask(self, env: PooledEnv, what: Literal["reset", "step", "call"], given: Any) -> Future[Any]:
        """What an episode's environment will answer."""
        coming: Future[Any] = Future()
        with self._room:  # so that the process is not lost between the two
            lost = env.lost
            if not lost:
                env.begun = True
                self.add([self._call(env, what, given, coming)])
        if lost:
            self._told(env, coming, Failed(lost))
        return coming

    def leave(self, env: PooledEnv) -> None:
        """An episode is over; the process drops its environment when it has time."""
        with self._room:
            known = self._living[env.lane].pop(env.episode, None) is not None
            held = known and env.begun and not env.lost
            if known and not env.failed:
                self._outage.worked()
        if held:
            with suppress(TrainingStopped):  # then it has ended already
                self.add([self._call(env, "close", None, Future())])

    def _loaded(self, worker: WorkerProcess, said: tuple[Tool, ...]) -> None:
        self.tools = said

    def _call(self, env: PooledEnv, what: str, given: Any, coming: Future[Any]) -> Call:
        def ended(error: Exception) -> None:
            if not coming.done():
                coming.set_exception(error)

        def lost(what: str, seconds: float) -> None:
            self._told(env, coming, Failed(f"environment '{self.spec.name}': {what}"))

        return Call(env.lane, (what, env.episode, given), self.spec.seconds, partial(self._told, env, coming), lost, ended)

    def _told(self, env: PooledEnv, coming: Future[Any], said: Any) -> None:
        if isinstance(said, Failed):
            with self._room:
                if not env.failed:
                    self.failures += 1
                    self._outage.failed(said.error)
                env.failed = True
        if not coming.done():
            coming.set_result(said)

    def _lost(self, worker: WorkerProcess, what: str) -> None:
        """Whatever lived in a process is lost with it, be it asked or not."""
        (lane,) = worker.work.lanes
        with self._room:
            here = [call for call in self._waiting if call.lane == lane]
            coming = {call.message[1] for call in here if call.message[0] == "reset"}  # these begin in the next process
            waiting = [call for call in here if call.message[1] not in coming]
            for call in waiting:
                self._waiting.remove(call)
            for env in self._living[lane].values():
                if env.begun and env.episode not in coming:
                    env.lost = f"environment '{self.spec.name}': {what}"
        for call in waiting:
            call.lost(what, 0.0)


class PooledEnv:
    """The environment of one episode, in another process."""

    def __init__(self, pool: EnvironmentPool, lane: int, episode: int) -> None:
        self.pool, self.lane, self.episode = pool, lane, episode
        self.begun = False  # whether there is an object, or will be soon
        self.failed = False
        self.lost = ""  # why it is there no longer

    def reset(self, row: Mapping[str, Any]) -> Future[Sequence[Message] | Failed]:
        """The first messages, for a row of the data."""
        return self.pool.ask(self, "reset", row)

    def step(self, reply: str) -> Future[Step | Failed]:
        """What follows from the model's reply."""
        return self.pool.ask(self, "step", reply)

    def call(self, calls: Sequence[ToolCall]) -> Future[list[str] | Failed]:
        """What tools give."""
        return self.pool.ask(self, "call", tuple(calls))

    def close(self) -> None:
        """The episode is over."""
        self.pool.leave(self)
