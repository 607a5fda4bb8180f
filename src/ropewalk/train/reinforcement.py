"""Training by rewards: each step learns from completions that the model has just written itself.

questions.py  what is asked           rollouts.py   what is written and scored    standing.py  rewards, advantages
generator.py  who writes it           episodes.py, harness.py  over more turns     policy_step.py  the loss of a step
background.py, vllm_generator.py  and where else                                   report.py, troubles.py  what is told of it
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ropewalk.config.vllm import by_server, server_url
from ropewalk.engine.request import Sampling
from ropewalk.errors import ConfigError
from ropewalk.train.background import Background
from ropewalk.train.distributed import World
from ropewalk.train.environment_pool import environment_of
from ropewalk.train.episodes import Episodes
from ropewalk.train.generator import Generator
from ropewalk.train.harness import Harness
from ropewalk.train.harness_pool import harness_of
from ropewalk.train.lessons import Examined
from ropewalk.train.objective import Measures
from ropewalk.train.policy_step import PolicyStep
from ropewalk.train.prepare import Prepared, tell
from ropewalk.train.process import step_seed
from ropewalk.train.pupil import Pupil
from ropewalk.train.questions import Question, Questions, groups_of
from ropewalk.train.report import Report
from ropewalk.train.rewards import Rewards, specs_of
from ropewalk.train.rollouts import Rollouts
from ropewalk.train.shared_writer import Opens, PublishingWriter, SharedWriter
from ropewalk.train.standing import standings
from ropewalk.train.survey import SLOTS
from ropewalk.train.troubles import Troubles
from ropewalk.train.vllm_generator import VllmGenerator

BETWEEN = 4  # steps of the generator between two micro-batches


class Rewarded:
    """Lessons of completions and their rewards."""

    def __init__(
        self, prepared: Prepared, questions: Questions, device: torch.device, world: World, opens: Opens | None = None
    ) -> None:
        run, trl = prepared.run, prepared.run.trl
        assert trl is not None
        self.run, self.trl, self.template, self.folder = run, trl, prepared.template, prepared.folder.path
        self.questions, self.device, self.world = questions, device, world
        self.opens, self.base = opens, prepared.base
        self.groups = groups_of(run, world.size)  # of a step, over all processes
        self.ahead = trl.prefetch_depth if trl.async_prefetch else 0
        of_epoch = math.ceil(len(questions.train) / self.groups)
        self.per_epoch = of_epoch * trl.num_iterations
        self.total = run.max_steps or math.ceil(run.num_epochs * of_epoch) * trl.num_iterations
        self.rows = len(questions.train)
        self.examines = bool(questions.evaluation)
        self.rewards = Rewards(specs_of(run) if trl.reward_funcs else (), trl.reward_num_workers)
        environment, harness = environment_of(run), harness_of(run)
        self.host: Episodes | Harness | None = None
        if environment is not None:
            self.host = Episodes(run, environment, prepared.template)
        elif harness is not None:
            self.host = Harness(run, harness, prepared.template)
        # What an environment or a harness gives counts as it is, before the rewards.
        own = [spec.name.replace(":", ".").rpartition(".")[2] for spec in (environment, harness) if spec is not None]
        names = [*own, *(spec.name for spec in self.rewards.specs)]
        self.report = Report(names, self.template, world)
        self.troubles = Troubles(names, [self.rewards.pool, *([self.host.pool] if self.host else ())], world)
        self.weights = np.concatenate([np.ones(len(own)), self.rewards.weights])
        self._open = ExitStack()
        self._orders: dict[int, list[int]] = {}
        self._told: list[tuple[str, dict[str, Any]]] = []
        self._measures: Measures = {}
        self._learning: int | None = None  # which batch of completions is at hand

    def start(self, pupil: Pupil, step: int, data: dict[str, Any]) -> None:
        trl = self.trl
        self.policy = PolicyStep(pupil, self.run, self.template, self.device, self.world)
        self._open.enter_context(self.rewards)
        if self.host is not None:
            self._open.enter_context(self.host)
        sampling = Sampling(trl.temperature, trl.top_p, trl.top_k, trl.min_p)
        self.writer = self._beside(self._writer(pupil, step, sampling))
        self.rollouts = Rollouts(
            self.writer,
            self.rewards,
            order=self._question,
            samples=trl.num_generations,
            max_tokens=trl.max_completion_length,
            sampling=sampling,
            stop_ids=self.template.stop_ids if self.host is None else self.host.stop_ids,
            read=self.template.decode,
            seed=self.run.seed,
            host=self.host,
        )

    def begin(self, number: int) -> int:
        batch, iteration = divmod(number, self.trl.num_iterations)
        if batch != self._learning:  # after a restart between two iterations, what was written is written again
            self._learn_from(batch, number)
        elif iteration:
            self._write_ahead(batch + 1, number)
            self._measures |= dict.fromkeys(_OF_WRITING, 0.0)
        return self.policy.tokens

    def losses(self) -> Iterator[Tensor]:
        for loss in self.policy.losses():
            yield loss
            self.rollouts.go_on(BETWEEN, wait=False)

    def name(self, number: int) -> str:
        return f"micro-batch {number}"

    def learnt(self) -> None:
        self.writer.publish()

    def measured(self) -> Measures:
        return self._measures | self.policy.measured()

    def told(self) -> list[tuple[str, dict[str, Any]]]:
        told, self._told = self._told, []
        return told

    def examine(self) -> Examined:
        asked = self.questions.evaluation
        mine = range(self.world.rank, len(asked), self.world.size)
        groups = self.rollouts.examine([asked[n] for n in mine], list(mine))
        found = standings(groups, self.run, self.weights, self.world)
        self._told += self.troubles.of(groups, evaluation=True)
        return Examined(-found.mean, self.report.rewards(groups, found))

    def epoch_after(self, steps: int) -> float:
        return steps / self.per_epoch

    def position(self) -> dict[str, Any]:
        return {}

    def probe(self) -> Tensor:
        return torch.tensor([self.questions.train[0].ids[:64]])

    def close(self) -> None:
        self._open.close()

    def _writer(self, pupil: Pupil, step: int, sampling: Sampling) -> Generator | Background | VllmGenerator:
        """Who writes the completions."""
        slots = min(SLOTS, self.groups * self.trl.num_generations * (1 + self.ahead))
        longest = self.run.sequence_len
        if by_server(self.run):
            url, folder, seconds = server_url(self.run), self.folder / "published", self.trl.vllm_server_timeout
            bounds = {"seconds": seconds} if seconds else {}
            elsewhere = VllmGenerator(
                pupil, url=url, folder=folder, running=slots, longest=longest, sampling=sampling, world=self.world, **bounds
            )
            self._open.callback(elsewhere.close)
            elsewhere.version = step
            return elsewhere
        generator = Generator(pupil, running=slots, longest=longest, routing=self.trl.replay_routing)
        generator.version = step
        if not writes_alone(self.device, self.ahead, adapter=pupil.adapter is not None):
            return generator
        background = Background(generator, self.device)
        self._open.callback(background.close)
        return background

    def _beside(self, writer: Generator | Background | VllmGenerator) -> PublishingWriter:
        """The writer, which others ask too: where the run opens an address, and where a harness drives its episodes."""
        shared: PublishingWriter = writer
        if self.trl.endpoint and self.world.leads:
            if self.opens is None:
                raise ConfigError(
                    f"trl.endpoint: {self.trl.endpoint} is opened by the command `ropewalk train`; run it, or remove the key"
                )
            opened = self.opens(
                self.trl.endpoint,
                name=self.base.name,
                template=self.template,
                longest=self.run.sequence_len,
                version=lambda: writer.version,
            )
            self._open.callback(opened.stop)
            tell(f"the model under training is asked at {opened.url}")
            shared = SharedWriter(shared, opened.asked)
        if isinstance(self.host, Harness):
            opened = self.host.open(self.opens, lambda: writer.version)
            self._open.callback(opened.stop)
            shared = SharedWriter(shared, opened.asked)
        return shared

    def _mine(self, batch: int) -> list[int]:
        """The numbers of this process's groups of a batch."""
        first = batch * self.groups
        return list(range(first + self.world.rank, first + self.groups, self.world.size))

    def _question(self, number: int) -> Question:
        """Every prompt once in each epoch, in an order that follows from the seed."""
        epoch, place = divmod(number, len(self.questions.train))
        if epoch not in self._orders:
            self._orders = {e: order for e, order in self._orders.items() if e >= epoch - 1}
            order = list(range(len(self.questions.train)))
            random.Random(step_seed(self.run.seed, epoch)).shuffle(order)
            self._orders[epoch] = order
        return self.questions.train[self._orders[epoch][place]]

    def _write_ahead(self, batch: int, number: int) -> None:
        """Begins this batch and those after it of which the first step, with the present adapter, is at most `ahead` steps away."""
        each = self.trl.num_iterations
        for later in range(batch, min((number + self.ahead) // each + 1, math.ceil(self.total / each))):
            self.rollouts.begin(self._mine(later))

    def _learn_from(self, batch: int, number: int) -> None:
        """Has this batch written, and what may be begun of those after it."""
        waits, spent = replace(self.rollouts.waits), replace(self.writer.spent)
        self._write_ahead(batch, number)
        groups = self.rollouts.take(self._mine(batch))
        found = standings(groups, self.run, self.weights, self.world)
        advantage = self.policy.learn_from(groups, found)
        self._learning = batch
        tokens, seconds = self.writer.spent.tokens - spent.tokens, self.writer.spent.seconds - spent.seconds
        self._measures = self.report.step(groups, found, advantage, self.writer.version) | {
            "generate_seconds": seconds,
            "decode_tokens_per_second": tokens / seconds if seconds else 0.0,
            "wait_rollouts_seconds": self.rollouts.waits.trainer - waits.trainer,
            "wait_trainer_seconds": self.rollouts.waits.generator - waits.generator,
        }
        self._told += [("samples", {"samples": self.report.samples(groups, found, advantage)}), *self.troubles.of(groups)]


_OF_WRITING = ("generate_seconds", "decode_tokens_per_second", "wait_rollouts_seconds", "wait_trainer_seconds")


def writes_alone(device: torch.device, ahead: int, *, adapter: bool) -> bool:
    """Whether the generator has a thread of its own.

    On a CPU both would share the cores that one can fill. Without an adapter the generator reads the very weights that the optimizer
    writes: it then has its turns between two micro-batches, on the trainer's own stream.
    """
    return device.type == "cuda" and ahead > 0 and adapter
