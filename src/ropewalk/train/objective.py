"""What a step minimises: the likelihood of answers, or a comparison of them. The trainer asks for sums and divides by the step's weight."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from ropewalk.config.preference import BETA, REFERENCED, held
from ropewalk.config.run import Run
from ropewalk.config.scoring import scored
from ropewalk.data.dataset import Batch
from ropewalk.kernels.cross_entropy import IGNORED
from ropewalk.train.distributed import World
from ropewalk.train.looking import Looking
from ropewalk.train.preference_losses import Judged, Pairs, Preferred, cpo, dpo, kto, likelihood, mismatched_kl, orpo, simpo
from ropewalk.train.pupil import Pupil
from ropewalk.train.samples import sum_by_sample, tokens_by_sample
from ropewalk.train.scoring import Ranking, StepJudging

Measures = dict[str, float]


class Objective(Protocol):
    """What the trainer needs of it."""

    def weight(self, batch: Batch) -> int:
        """How much a micro-batch counts in its step."""
        ...

    def begin(self, batches: Iterable[Batch], idle: Iterable[Batch] = ()) -> None:
        """Before the micro-batches that this process has of a step, or of an evaluation; through `idle` ones it goes for nothing."""
        ...

    def loss(self, batch: Batch) -> Tensor:
        """The summed loss of a micro-batch."""
        ...

    def measured(self) -> Measures:
        """What was measured since `begin`, over all processes."""
        ...

    def unheard(self) -> AbstractContextManager[None]:
        """Within it nothing is measured."""
        ...


class Likelihood:
    """Supervised fine-tuning: the cross entropy of trained tokens."""

    def __init__(self, pupil: Pupil, device: torch.device) -> None:
        self.pupil, self.device = pupil, device
        self.looking = None if pupil.sighted is None else Looking(pupil.sighted.lens)

    def weight(self, batch: Batch) -> int:
        return batch.trained

    def begin(self, batches: Iterable[Batch], idle: Iterable[Batch] = ()) -> None:
        if self.looking is not None:
            self.looking.begin(batches)

    def loss(self, batch: Batch) -> Tensor:
        if self.looking is None:
            return self.pupil.loss(*_tensors(batch, self.device))
        return self.pupil.loss(*_tensors(batch, self.device), self.looking.next())

    def measured(self) -> Measures:
        return {}

    def unheard(self) -> AbstractContextManager[None]:
        return nullcontext()


@dataclass(frozen=True)
class Answers:
    """The answers of a micro-batch: summed log-probabilities under policy and base, and their tokens, each [S]. # pupil -> losses"""

    policy: Tensor
    reference: Tensor | None
    tokens: Tensor


class Comparison:
    """Training by preferences; the base is the same model with its adapter switched off, so there is no second one."""

    def __init__(self, pupil: Pupil, device: torch.device, world: World, run: Run) -> None:
        self.pupil, self.device, self.world, self.run = pupil, device, world, run
        self.method = run.rl or ""
        self.pairs = held(run) == "pairs"
        self.sums: dict[str, float] = {}
        self.kl = torch.zeros(())

    def weight(self, batch: Batch) -> int:
        assert batch.compared is not None
        return batch.compared.units

    def begin(self, batches: Iterable[Batch], idle: Iterable[Batch] = ()) -> None:
        self.sums = {}
        if not self.pairs:
            self.kl = self._mismatched_kl(batches, idle)

    def loss(self, batch: Batch) -> Tensor:
        assert batch.compared is not None
        answers = self._answers(batch)
        return self._of_pairs(answers) if self.pairs else self._of_judged(answers, batch)

    def measured(self) -> Measures:
        names = _PAIRED if self.pairs else _JUDGED
        sums = dict(zip(names, self.world.sum([self.sums.get(name, 0.0) for name in names])))
        if self.pairs:
            units = max(1.0, sums.pop("units"))
            return {name: total / units for name, total in sums.items()}
        chosen, rejected = (sums[f"rewards/{kind}"] / max(1.0, sums[kind]) for kind in ("chosen", "rejected"))
        right = sums["right"] / max(1.0, sums["chosen"] + sums["rejected"])
        found = {"rewards/chosen": chosen, "rewards/rejected": rejected, "rewards/margins": chosen - rejected}
        return found | {"rewards/accuracies": right, "kl": float(self.kl)}

    @contextmanager
    def unheard(self) -> Iterator[None]:
        kept = dict(self.sums)
        try:
            yield
        finally:
            self.sums = kept

    def _of_pairs(self, answers: Answers) -> Tensor:
        policy, tokens, base = answers.policy, answers.tokens, answers.reference
        chosen, rejected = (None, None) if base is None else (base[0::2], base[1::2])
        pairs = Pairs(policy[0::2], policy[1::2], tokens[0::2], tokens[1::2], chosen, rejected)
        found = preferred(pairs, self.run)
        margin = found.chosen_reward - found.rejected_reward
        self._add("units", torch.ones_like(margin))
        self._add("rewards/chosen", found.chosen_reward)
        self._add("rewards/rejected", found.rejected_reward)
        self._add("rewards/margins", margin)
        self._add("rewards/accuracies", margin > 0)
        self._add("logps/chosen", pairs.chosen)
        self._add("logps/rejected", pairs.rejected)
        return found.loss.sum()

    def _of_judged(self, answers: Answers, batch: Batch) -> Tensor:
        assert batch.compared is not None
        assert batch.compared.wanted is not None
        assert answers.reference is not None
        wanted = torch.from_numpy(batch.compared.wanted).to(self.device)
        judged = Judged(answers.policy, answers.reference, wanted, self.kl)
        run = self.run
        found = kto(judged, beta(run), run.kto_desirable_weight, run.kto_undesirable_weight)
        self._add("chosen", wanted)
        self._add("rejected", ~wanted)
        self._add("rewards/chosen", found.reward[wanted])
        self._add("rewards/rejected", found.reward[~wanted])
        self._add("right", (found.reward > beta(run) * self.kl) == wanted)
        return found.loss.sum()

    def _add(self, name: str, values: Tensor) -> None:
        self.sums[name] = self.sums.get(name, 0.0) + float(values.detach().double().sum())

    def _answers(self, batch: Batch) -> Answers:
        assert batch.compared is not None
        ids, labels, positions = _tensors(batch, self.device)
        mask, sample = (labels != IGNORED).flatten(), torch.from_numpy(batch.compared.sample).to(self.device).flatten()
        samples = batch.compared.units * (2 if self.pairs else 1)
        policy = sum_by_sample(self.pupil.log_probs(ids, labels, positions).flatten(), mask, sample, samples)
        reference = None
        if self.method in REFERENCED:
            base = self.pupil.base_log_probs(ids, labels, positions).flatten()
            reference = sum_by_sample(base, mask, sample, samples)
        return Answers(policy, reference, tokens_by_sample(mask, sample, samples))

    def _mismatched_kl(self, batches: Iterable[Batch], idle: Iterable[Batch]) -> Tensor:
        """Over the whole step, so that it is the same however the step is cut into micro-batches."""
        total = count = 0.0
        with self.pupil.quietly():
            for batch in batches:
                assert batch.compared is not None
                assert batch.compared.mismatched is not None
                answers = self._answers(batch.compared.mismatched)
                assert answers.reference is not None
                total += float((answers.policy - answers.reference).double().sum())
                count += len(answers.policy)
            for batch in idle:
                assert batch.compared is not None
                assert batch.compared.mismatched is not None
                self._answers(batch.compared.mismatched)
        total, count = self.world.sum([total, count])
        mean = torch.tensor([total / max(1.0, count)], device=self.device)
        return mismatched_kl(mean, torch.zeros_like(mean))


_PAIRED = (
    "units",
    "rewards/chosen",
    "rewards/rejected",
    "rewards/margins",
    "rewards/accuracies",
    "logps/chosen",
    "logps/rejected",
)
_JUDGED = ("chosen", "rejected", "rewards/chosen", "rewards/rejected", "right")


def objective_of(run: Run, pupil: Pupil, device: torch.device, world: World) -> Objective:
    """What the run's method minimises."""
    if (kind := scored(run)) is not None:
        return Ranking(pupil, device, world, run) if kind == "answers" else StepJudging(pupil, device, world, run)
    return Likelihood(pupil, device) if held(run) is None else Comparison(pupil, device, world, run)


def beta(run: Run) -> float:
    """The run's beta, or its method's default."""
    return BETA.get(run.rl or "", 0.1) if run.rl_beta is None else run.rl_beta


def preferred(pairs: Pairs, run: Run) -> Preferred:
    """The loss of the run's method, with its numbers."""
    losses: dict[str, Callable[[], Preferred]] = {
        "dpo": lambda: _dpo(pairs, run),
        "ipo": lambda: _with_likelihood(dpo(pairs, beta(run), "ipo"), pairs, run),
        "orpo": lambda: orpo(pairs, run.orpo_alpha if run.rl_beta is None else run.rl_beta),
        "simpo": lambda: simpo(pairs, beta(run), run.simpo_gamma, run.cpo_alpha or 0.0),
        "cpo": lambda: cpo(pairs, beta(run), 1.0 if run.cpo_alpha is None else run.cpo_alpha),
    }
    return losses[run.rl or ""]()


def _dpo(pairs: Pairs, run: Run) -> Preferred:
    kinds = run.dpo_loss_type or ("sigmoid",)
    weights = run.dpo_loss_weights or (1.0,) * len(kinds)
    parts = [dpo(pairs, beta(run), kind, run.dpo_label_smoothing) for kind in kinds]
    loss = torch.stack([weight * part.loss for weight, part in zip(weights, parts)]).sum(0)
    return _with_likelihood(Preferred(loss, parts[0].chosen_reward, parts[0].rejected_reward), pairs, run)


def _with_likelihood(found: Preferred, pairs: Pairs, run: Run) -> Preferred:
    if not run.rpo_alpha:
        return found
    return Preferred(found.loss + run.rpo_alpha * likelihood(pairs), found.chosen_reward, found.rejected_reward)


def _tensors(batch: Batch, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """ids and labels on the device; positions on the host, where the pupil reads off them how the row is made up."""
    ids, labels, positions = (torch.from_numpy(a) for a in (batch.ids, batch.labels, batch.position_ids))
    return ids.to(device), labels.to(device), positions
