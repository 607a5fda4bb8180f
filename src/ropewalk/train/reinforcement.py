"""Training by rewards: each step learns from completions that the model has just written itself.

    rollouts -> groups -> advantages -> packed batches -> policy loss -> (optimizer) -> publish

The loss of a step is divided by what all processes have written, so that how it is cut into micro-batches changes nothing.
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass, replace
from itertools import zip_longest
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ropewalk.config.run import Run
from ropewalk.data.laying import MULTIPLE
from ropewalk.engine.request import Sampling
from ropewalk.errors import ModelError, TrainingStopped
from ropewalk.kernels.cross_entropy import IGNORED
from ropewalk.models.routing import Routing
from ropewalk.train.background import Background
from ropewalk.train.corrections import Correction
from ropewalk.train.distributed import World
from ropewalk.train.environment import Episode
from ropewalk.train.environment_pool import environment_of
from ropewalk.train.episodes import Episodes
from ropewalk.train.generator import Generator
from ropewalk.train.lessons import Examined
from ropewalk.train.objective import Measures
from ropewalk.train.policy_batches import PolicyBatch, lay_out, sharing_pays
from ropewalk.train.policy_losses import DEFAULT, METHODS, Method, PolicyInput, Totals, policy_loss
from ropewalk.train.prepare import Prepared
from ropewalk.train.process import step_seed
from ropewalk.train.pupil import Pupil
from ropewalk.train.questions import Question, Questions, groups_of
from ropewalk.train.rewards import Rewards, specs_of
from ropewalk.train.rollouts import Group, Rollouts
from ropewalk.train.standing import Standing, standings

SLOTS = 64  # completions that are written at once
BETWEEN = 4  # steps of the generator between two micro-batches
SHOWN, SHOWN_CHARACTERS = 4, 2000  # samples of a step that are written down, and how much of each
AGREE = {torch.float32: 1e-3, torch.float64: 1e-3}  # mean |log mu - log pi| of the same weights; other types: COARSELY
COARSELY = 0.1


@dataclass(frozen=True)
class Lesson:
    """One micro-batch with what does not change while it is learnt from."""

    batch: PolicyBatch
    mask: Tensor  # [T]
    sample: Tensor  # [T]
    advantage: Tensor  # [S] of this batch
    behaviour: Tensor  # [T]
    old: Tensor | None  # [T]
    reference: Tensor | None  # [T]


class Rewarded:
    """Lessons of completions and their rewards."""

    def __init__(self, prepared: Prepared, questions: Questions, device: torch.device, world: World) -> None:
        run, trl = prepared.run, prepared.run.trl
        assert trl is not None
        self.run, self.trl, self.template = run, trl, prepared.template
        self.questions, self.device, self.world = questions, device, world
        self.method = method_of(run)
        # REINFORCE++ takes the divergence from the base off the reward; the others add it to the loss.
        self.in_reward = bool(self.method.beta) and self.method.advantage == "batch"
        self.losing = replace(self.method, beta=0.0) if self.in_reward else self.method
        self.groups = groups_of(run, world.size)  # of a step, over all processes
        self.ahead = trl.prefetch_depth if trl.async_prefetch else 0
        of_epoch = math.ceil(len(questions.train) / self.groups)
        self.per_epoch = of_epoch * trl.num_iterations
        self.total = run.max_steps or math.ceil(run.num_epochs * of_epoch) * trl.num_iterations
        self.rows = len(questions.train)
        self.examines = bool(questions.evaluation)
        self.rewards = Rewards(specs_of(run) if trl.reward_funcs else (), trl.reward_num_workers)
        environment = environment_of(run)
        self.host = Episodes(run, environment, prepared.template) if environment else None
        # What an environment gives counts as it is, before the rewards.
        self.names = [
            *([environment.name.replace(":", ".").rpartition(".")[2]] if environment else []),
            *(spec.name for spec in self.rewards.specs),
        ]
        self.weights = np.concatenate([np.ones(len(self.names) - len(self.rewards.weights)), self.rewards.weights])
        self._open = ExitStack()
        self._orders: dict[int, list[int]] = {}
        self._told: list[tuple[str, dict[str, Any]]] = []
        self._measures: Measures = {}
        self._lessons: list[Lesson] = []
        self._sums: dict[str, float] = {}

    def start(self, pupil: Pupil, step: int, data: dict[str, Any]) -> None:
        self._open.enter_context(self.rewards)
        if self.host is not None:
            self._open.enter_context(self.host)
        self.pupil, self.step = pupil, step
        slots = min(SLOTS, self.groups * self.trl.num_generations * (1 + self.ahead))
        generator = Generator(pupil, running=slots, longest=self.run.sequence_len, routing=self.trl.replay_routing)
        generator.version = step
        self.generator: Generator | Background = generator
        if writes_alone(self.device, self.ahead):
            self.generator = Background(generator, self.device)
            self._open.callback(self.generator.close)
        self.routing = self._routing_of(pupil) if self.trl.replay_routing else None
        trl = self.trl
        self.rollouts = Rollouts(
            self.generator,
            self.rewards,
            order=self._question,
            samples=trl.num_generations,
            max_tokens=trl.max_completion_length,
            sampling=Sampling(trl.temperature, trl.top_p, trl.top_k, trl.min_p),
            stop_ids=self.template.stop_ids,
            read=self.template.decode,
            seed=self.run.seed,
            host=self.host,
        )
        self._agreed = False

    def begin(self, number: int) -> int:
        batch, iteration = divmod(number, self.trl.num_iterations)
        self._sums, self._told = {}, []
        if iteration == 0 or not self._lessons:  # after a restart in between, what was written is written again
            last = math.ceil(self.total / self.trl.num_iterations)
            waits, spent = replace(self.rollouts.waits), replace(self.generator.spent)
            for later in range(batch, min(batch + self.ahead + 1, last)):
                self.rollouts.begin(self._mine(later))
            self._learn_from(self.rollouts.take(self._mine(batch)))
            tokens, seconds = self.generator.spent.tokens - spent.tokens, self.generator.spent.seconds - spent.seconds
            self._measures |= {
                "generate_seconds": seconds,
                "decode_tokens_per_second": tokens / seconds if seconds else 0.0,
                "wait_rollouts_seconds": self.rollouts.waits.trainer - waits.trainer,
                "wait_trainer_seconds": self.rollouts.waits.generator - waits.generator,
            }
        return sum(lesson.batch.tokens for lesson in self._lessons)

    def losses(self) -> Iterator[Tensor]:
        for lesson in self._lessons:
            with self._replayed(lesson.batch):  # also while it is taken back
                yield self._loss(lesson)
            self.rollouts.go_on(BETWEEN, wait=False)

    def name(self, number: int) -> str:
        return f"micro-batch {number}"

    def learnt(self) -> None:
        self.generator.publish()

    def measured(self) -> Measures:
        names = ("tokens", "ratio", "clipped", "kl", "approximate_kl", "weight", "dropped", "entropy", "mismatch")
        sums = dict(zip(names, self.world.sum([self._sums.get(name, 0.0) for name in names])))
        tokens = max(1.0, sums.pop("tokens"))
        return self._measures | {name: total / tokens for name, total in sums.items()}

    def told(self) -> list[tuple[str, dict[str, Any]]]:
        return self._told

    def examine(self) -> Examined:
        asked = self.questions.evaluation
        mine = range(self.world.rank, len(asked), self.world.size)
        groups = self.rollouts.examine([asked[n] for n in mine], list(mine))
        found = standings(groups, self.run, self.weights, self.world)
        return Examined(-found.mean, {"reward": found.mean} | self._components(found) | self._lengths(groups))

    def epoch_after(self, steps: int) -> float:
        return steps / self.per_epoch

    def position(self) -> dict[str, Any]:
        return {}

    def probe(self) -> Tensor:
        return torch.tensor([self.questions.train[0].ids[:64]])

    def close(self) -> None:
        self._open.close()

    # -- what is asked

    def _mine(self, batch: int) -> list[int]:
        """The numbers of this process's groups of a step."""
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

    # -- what is learnt

    def _learn_from(self, groups: list[Group]) -> None:
        """Lays a step's groups out as micro-batches, with everything that is the same for every pass over them."""
        begun = time.perf_counter()
        found = standings(groups, self.run, self.weights, self.world)
        episodes = [[self._masked(episode) for episode in group.episodes] for group in groups]
        self.totals = self._totals(episodes)
        held = bool(self.method.beta)  # to the base, and so is what has no advantage
        if held:
            batches = self._laid(episodes, None)
            references = [self.pupil.base_policy_log_probs(batch, self.trl.temperature) for batch in batches]
            if self.in_reward:
                apart = self._divergence(batches, references, sum(map(len, episodes)))
                found = found.less(apart, self.method.beta, self.world)
        advantage = found.advantages(self.method, self.run)
        self._measure(groups, found, advantage)
        advantage = advantage[found.mine]
        if not held:
            batches = self._laid(episodes, advantage.tolist())
            references = []
        pairs = zip_longest(batches, references)
        self._lessons = [self._lesson(batch, advantage, reference) for batch, reference in pairs]
        self._agree()
        self._measures["prepare_seconds"] = time.perf_counter() - begun

    def _masked(self, episode: Episode) -> Episode:
        """The episode; where it was cut off and such are to teach nothing, without a trained token."""
        return _silent(episode) if self.trl.mask_truncated_completions and not episode.ended else episode

    def _totals(self, groups: Sequence[Sequence[Episode]]) -> Totals:
        counts = [sum(episode.trained) for group in groups for episode in group]
        samples, tokens = self.world.sum([sum(count > 0 for count in counts), sum(counts)])
        return Totals(int(samples), int(tokens), self.trl.max_completion_length)

    def _laid(self, groups: Sequence[Sequence[Episode]], advantage: Sequence[float] | None) -> list[PolicyBatch]:
        """Micro-batches of what teaches something."""
        if advantage is not None:
            number = iter(advantage)
            groups = [[e if next(number) != 0 else _silent(e) for e in group] for group in groups]
        tokens = self.run.micro_batch_size * self.run.sequence_len
        pad, multiple = self.template.pad_id or 0, self.run.pad_to_multiple_of or MULTIPLE
        shared = self.pupil.shares_prompts and sharing_pays(groups)
        return lay_out(groups, tokens=tokens, shared=shared, pad=pad, multiple=multiple)

    def _lesson(self, batch: PolicyBatch, advantage: Tensor, reference: Tensor | None) -> Lesson:
        labels, sample, behaviour = (
            torch.from_numpy(a).to(self.device).flatten() for a in (batch.labels, batch.sample, batch.behaviour)
        )
        old = None
        if self.method.correction.mode == "decoupled":
            old = self._quietly(batch)
        mine = advantage[list(batch.samples)].to(self.device, torch.float32)
        return Lesson(batch, labels != IGNORED, sample.long(), mine, behaviour.float(), old, reference)

    def _loss(self, lesson: Lesson) -> Tensor:
        logp, entropy = self.pupil.policy_log_probs_with_entropy(lesson.batch, self.trl.temperature)
        given = PolicyInput(logp, lesson.mask, lesson.sample, lesson.advantage, lesson.behaviour, lesson.old, lesson.reference)
        part = policy_loss(given, self.losing, self.totals)
        sums, scale = self._sums, max(1, self.totals.tokens)
        for name in ("ratio", "clipped", "kl", "approximate_kl", "weight", "dropped"):
            sums[name] = sums.get(name, 0.0) + float(getattr(part, name)) * scale
        apart = (logp.detach() - lesson.behaviour).abs()[lesson.mask]
        sums["tokens"] = sums.get("tokens", 0.0) + int(lesson.mask.sum())
        sums["mismatch"] = sums.get("mismatch", 0.0) + float(apart.sum())
        sums["entropy"] = sums.get("entropy", 0.0) + float(entropy[lesson.mask].sum())
        return part.loss

    def _quietly(self, batch: PolicyBatch) -> Tensor:
        """[T] of the present policy, constant."""
        with self.pupil.quietly(), self._replayed(batch):
            return self.pupil.policy_log_probs(batch, self.trl.temperature)

    def _replayed(self, batch: PolicyBatch) -> AbstractContextManager[None]:
        """Within it the experts are those that were picked when the batch was written."""
        return self.routing.replay(batch.routing) if self.routing is not None and batch.routing is not None else nullcontext()

    def _routing_of(self, pupil: Pupil) -> Routing:
        if pupil.head.isolation == "unpacked":
            raise ModelError(
                "trl.replay_routing: this model cannot keep packed samples apart, so that rows are laid out anew for it; "
                "switch replay_routing off"
            )
        return Routing(pupil.model)

    def _divergence(self, batches: list[PolicyBatch], references: list[Tensor], samples: int) -> Tensor:
        """[S]: each sample's summed log mu - log ref."""
        total = torch.zeros(samples, dtype=torch.float64)
        for batch, reference in zip(batches, references):
            mask = torch.from_numpy(batch.labels != IGNORED).flatten()
            apart = torch.from_numpy(batch.behaviour).flatten() - reference.cpu()
            whose = torch.tensor(batch.samples)[torch.from_numpy(batch.sample).flatten()]
            total.index_add_(0, whose[mask], apart[mask].double())
        return total

    def _agree(self) -> None:
        """At the beginning of a run: the generator has written with the weights that learn, and computed what they compute."""
        if self._agreed or not self._lessons:
            return
        self._agreed = True
        lesson = self._lessons[0]
        apart = (self._quietly(lesson.batch) - lesson.behaviour).abs()[lesson.mask]
        limit = AGREE.get(self.pupil.model.dtype, COARSELY)
        if len(apart) and not float(apart.mean()) <= limit:
            raise TrainingStopped(
                f"generator and trainer disagree about the same weights: their log-probabilities differ by {float(apart.mean()):.3g} "
                f"on average, and {limit:g} is the most that rounding explains; train this model with another method, and report it"
            )

    # -- what is told

    def _measure(self, groups: list[Group], found: Standing, advantage: Tensor) -> None:
        teaching = [bool((advantage[found.mine][group] != 0).any()) for group in _slices(groups)]
        ages = [self.generator.version - v for g in groups for e in g.episodes for v, t in zip(e.versions, e.trained) if t]
        varied, count, age, tokens = self.world.sum([sum(teaching), len(groups), sum(ages), len(ages)])
        self._measures = {
            "reward": found.mean,
            "reward_std": found.std,
            **self._components(found),
            **self._lengths(groups),
            "varied": varied / max(1.0, count),
            "staleness": age / max(1.0, tokens),
            "staleness_max": float(max(self.world.gather([max(ages, default=0)]))),
        }
        self._told.append(("samples", {"samples": self._samples(groups, found, advantage)}))

    def _components(self, found: Standing) -> Measures:
        return {f"rewards/{name}": mean for name, mean in zip(self.names, found.means)}

    def _lengths(self, groups: list[Group]) -> Measures:
        lengths = [sum(episode.trained) for group in groups for episode in group.episodes]
        ended = [episode.ended for group in groups for episode in group.episodes]
        total, whole, count = self.world.sum([sum(lengths), sum(ended), len(lengths)])
        longest = float(max(self.world.gather([max(lengths, default=0)])))
        return {"length": total / max(1.0, count), "length_max": longest, "ended": whole / max(1.0, count)}

    def _samples(self, groups: list[Group], found: Standing, advantage: Tensor) -> list[dict[str, Any]]:
        """The first prompt's best and worst completions, and the next prompts' first."""
        shown = list[dict[str, Any]]()
        for group, place in list(zip(groups, _slices(groups)))[:SHOWN]:
            mine, total = advantage[found.mine][place], found.total[found.mine][place]
            number = int(np.nanargmax(total)) if not np.isnan(total).all() else 0
            if len(shown) % 2 and not np.isnan(total).all():
                number = int(np.nanargmin(total))
            episode, row = group.episodes[number], group.scores[number]
            shown.append(
                {
                    "prompt": self.template.decode(episode.ids[: episode.prompt])[-SHOWN_CHARACTERS:],
                    "completion": "\n".join(episode.replies)[:SHOWN_CHARACTERS],
                    "reward": None if math.isnan(total[number]) else float(total[number]),
                    "rewards": {name: None if math.isnan(v) else float(v) for name, v in zip(self.names, row)},
                    "advantage": float(mine[number]),
                }
            )
        return shown


def writes_alone(device: torch.device, ahead: int) -> bool:
    """Whether the generator has a thread of its own: on a CPU both would share the cores that one can fill."""
    return device.type == "cuda" and ahead > 0


def method_of(run: Run) -> Method:
    """The preset that the run names, with the numbers that it changes."""
    trl = run.trl
    assert trl is not None
    method = METHODS[trl.loss_type or DEFAULT]
    low, high = trl.correction_bounds
    keep, opsm = trl.correction_keep, trl.off_policy_mask_threshold
    given: dict[str, Any] = {
        "epsilon": trl.epsilon,
        "epsilon_high": trl.epsilon_high if trl.epsilon_high is not None else trl.epsilon,
        "ratio_level": trl.importance_sampling_level,
        "dual_clip": trl.delta,
        "beta": trl.beta or None,
        "correction": Correction(trl.correction, trl.correction_weight, low=low, high=high, keep=keep, opsm=opsm),
    }
    if trl.epsilon_high is not None and method.clip == "cispo":
        given["ratio_max"] = trl.epsilon_high
    return replace(method, **{name: value for name, value in given.items() if value is not None})


def _silent(episode: Episode) -> Episode:
    return replace(episode, trained=[False] * len(episode.ids))


def _slices(groups: Sequence[Group]) -> list[slice]:
    """Where each group's samples stand among all."""
    ends = np.cumsum([len(group.episodes) for group in groups])
    return [slice(int(end) - len(group.episodes), int(end)) for group, end in zip(groups, ends)]
