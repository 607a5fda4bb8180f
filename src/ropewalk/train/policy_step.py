"""One step's completions as a loss: advantages, packed micro-batches, what they are held to, and the policy loss over them.

The loss of a step is divided by what all processes have written, so that how it is cut into micro-batches changes nothing. Where they
gather weights together, one that has fewer micro-batches than another makes the passes that it lacks over a row that teaches nothing.
Legend: S samples of this process, T tokens of a micro-batch.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor

from ropewalk.chat.template import Template
from ropewalk.config.run import Run
from ropewalk.data.laying import MULTIPLE
from ropewalk.errors import ModelError, TrainingStopped
from ropewalk.kernels.cross_entropy import IGNORED
from ropewalk.models.routing import Routing
from ropewalk.models.sharded import is_sharded
from ropewalk.train.advantages import PER_REWARD
from ropewalk.train.corrections import Correction
from ropewalk.train.distributed import World
from ropewalk.train.environment import Episode, Generated, single
from ropewalk.train.objective import Measures
from ropewalk.train.policy_batches import PolicyBatch, lay_out, sharing_pays
from ropewalk.train.policy_losses import DEFAULT, METHODS, Method, PolicyInput, Totals, policy_loss
from ropewalk.train.pupil import Pupil
from ropewalk.train.rollouts import Group
from ropewalk.train.standing import Standing

AGREE = {torch.float32: 1e-3, torch.float64: 1e-3}  # mean |log mu - log pi| of the same weights; other types: COARSELY
COARSELY = 0.1
SCALED = {"group": "group_std", "batch": "group_mean_batch_std", "none": "group_mean"}  # trl.scale_rewards -> Method.advantage
MEANS = ("ratio", "clipped", "kl", "approximate_kl", "weight", "dropped")  # of policy_losses.PolicyLoss


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


class PolicyStep:
    """What is learnt from a step's completions, once or several times over."""

    def __init__(self, pupil: Pupil, run: Run, template: Template, device: torch.device, world: World) -> None:
        assert run.trl is not None
        self.pupil, self.run, self.trl, self.template, self.device, self.world = pupil, run, run.trl, template, device, world
        self.method = method_of(run)
        # REINFORCE++ takes the divergence from the base off the reward; the others add it to the loss, and so does all that has no
        # sum of rewards to take it off.
        self.in_reward = bool(self.method.beta) and self.method.advantage == "batch"
        self.losing = replace(self.method, beta=0.0) if self.in_reward else self.method
        self.routing = self._routing_of(pupil) if run.trl.replay_routing else None
        self.totals = Totals(0, 0)
        self.lessons: list[Lesson] = []
        self.idle: list[Lesson] = []  # gone through so that all processes make as many passes, for nothing
        self._sums: dict[str, float] = {}
        self._agreed = False

    @property
    def tokens(self) -> int:
        """Of the micro-batches, without padding."""
        return sum(lesson.batch.tokens for lesson in self.lessons)

    def learn_from(self, groups: Sequence[Group], found: Standing) -> Tensor:
        """Lays a step's groups out, with everything that is the same for every pass over them; the advantages of all samples."""
        episodes = [[self._masked(episode) for episode in group.episodes] for group in groups]
        self.totals = self._totals(episodes)
        held = bool(self.method.beta)  # to the base, and so is what has no advantage
        if held:
            batches = self._laid(episodes, None)
            idle = self._idle(batches)
            references = [self.pupil.base_policy_log_probs(batch, self.trl.temperature) for batch in (*batches, *idle)]
            if self.in_reward:
                apart = self._divergence(batches, references, sum(map(len, episodes)))
                found = found.less(apart, self.method.beta, self.world)
        advantage = found.advantages(self.method)
        mine = advantage[found.mine]
        if not held:
            batches, references = self._laid(episodes, mine.tolist()), []
            idle = self._idle(batches)
        lessons = [
            self._lesson(batch, mine if at < len(batches) else torch.zeros(1), reference)
            for at, (batch, reference) in enumerate(zip_longest([*batches, *idle], references))
        ]
        self.lessons, self.idle = lessons[: len(batches)], lessons[len(batches) :]
        self._agree()
        return advantage

    def losses(self) -> Iterator[Tensor]:
        """Of one micro-batch after another."""
        self._sums = {}
        for lesson in self.lessons:
            with self._replayed(lesson.batch):  # also while it is taken back
                yield self._loss(lesson)
        for lesson in self.idle:
            logp, _ = self.pupil.policy_log_probs_with_entropy(lesson.batch, self.trl.temperature)
            yield 0.0 * logp.sum()

    def measured(self) -> Measures:
        """Means over the tokens that were learnt from, over all processes."""
        names = ("tokens", *MEANS, "entropy", "mismatch")
        sums = dict(zip(names, self.world.sum([self._sums.get(name, 0.0) for name in names])))
        tokens = max(1.0, sums.pop("tokens"))
        return {name: total / tokens for name, total in sums.items()}

    def _masked(self, episode: Episode) -> Episode:
        """The episode; where it was cut off and such are to teach nothing, without a trained token."""
        if not self.trl.mask_truncated_completions:
            return episode
        first = episode if episode.ended else _silent(replace(episode, apart=()))
        return replace(first, apart=tuple(map(self._masked, episode.apart)))

    def _totals(self, groups: Sequence[Sequence[Episode]]) -> Totals:
        counts = [sum(one.trained) for group in groups for episode in group for one in episode.sequences]
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

    def _idle(self, batches: Sequence[PolicyBatch]) -> list[PolicyBatch]:
        """Rows for the passes that other processes make beyond those over these."""
        if not is_sharded(self.pupil.model):
            return []
        nothing = single([0], Generated([0], [0.0], [0], False), "")
        missing = max(self.world.gather([len(batches)])) - len(batches)
        return missing * lay_out([[nothing]], tokens=1, shared=False, pad=0, multiple=MULTIPLE)

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
        for name in MEANS:
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
        lesson = next(iter((*self.lessons, *self.idle)), None)
        if self._agreed or lesson is None:
            return
        self._agreed = True
        apart = (self._quietly(lesson.batch) - lesson.behaviour).abs()[lesson.mask]
        if not self.lessons:  # what is at hand nobody has written
            return
        limit = AGREE.get(self.pupil.model.dtype, COARSELY)
        if len(apart) and not float(apart.mean()) <= limit:
            raise TrainingStopped(
                f"generator and trainer disagree about the same weights: their log-probabilities differ by {float(apart.mean()):.3g} "
                f"on average, and {limit:g} is the most that rounding explains; train this model with another method, and report it"
            )


def method_of(run: Run) -> Method:
    """The preset that the run names, with the numbers that it changes."""
    trl = run.trl
    assert trl is not None
    method = METHODS[trl.loss_type or DEFAULT]
    how = PER_REWARD if run.normalises_rewards_apart else method.advantage
    if trl.scale_rewards is not None and how in SCALED.values():
        how = SCALED[trl.scale_rewards]
    low, high = trl.correction_bounds
    keep, opsm = trl.correction_keep, trl.off_policy_mask_threshold
    level = trl.correction_level
    given: dict[str, Any] = {
        "advantage": how,
        "epsilon": trl.epsilon,
        "epsilon_high": trl.epsilon_high if trl.epsilon_high is not None else trl.epsilon,
        "ratio_level": trl.importance_sampling_level,
        "dual_clip": trl.delta,
        "beta": trl.beta or None,
        "kl": trl.kl_estimator,
        "correction": Correction(trl.correction, trl.correction_weight, level, low, high, keep, opsm),
    }
    if trl.epsilon_high is not None and method.clip == "cispo":
        given["ratio_max"] = trl.epsilon_high
    return replace(method, **{name: value for name, value in given.items() if value is not None})


def _silent(episode: Episode) -> Episode:
    return replace(episode, trained=[False] * len(episode.ids), apart=tuple(map(_silent, episode.apart)))
