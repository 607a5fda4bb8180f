"""Policy-gradient losses over packed tokens, as pure functions: a method is a preset of four switches.

Legend: T tokens of a packed micro-batch, laid end to end; S samples. `sample` [T] says whose token it is, `mask` [T] which tokens the
policy chose itself, through the first end token; prompts, environments' words and padding are False and contribute nothing.
Every sum is divided by the step's `Totals`, counted over all micro-batches and ranks: parts add up to the loss of the whole step.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from torch import Tensor

from ropewalk.train.corrections import Correction, corrected
from ropewalk.train.samples import mean_by_sample

RatioLevel = Literal["token", "sequence"]
Clip = Literal["ppo", "cispo", "dppo", "none"]
Aggregate = Literal["seq_mean", "token_mean", "constant"]
KlEstimator = Literal["k2", "k3"]


@dataclass(frozen=True)
class Method:
    """The four switches and their numbers; `beta` weighs the KL to the reference."""

    advantage: str = "group_std"  # of train/advantages.py, or "per_reward"
    ratio_level: RatioLevel = "token"
    clip: Clip = "ppo"
    aggregate: Aggregate = "token_mean"
    epsilon: float = 0.2
    epsilon_high: float = 0.2
    ratio_max: float = 5.0  # cispo
    divergence: float = 0.2  # dppo: the largest |pi - mu| that is not masked
    anchor: float = 0.0  # dppo: weight of (log ratio)^2
    dual_clip: float | None = None
    beta: float = 0.0
    kl: KlEstimator = "k3"
    correction: Correction = field(default_factory=Correction)


METHODS: dict[str, Method] = {
    "grpo": Method(aggregate="seq_mean"),  # arXiv 2402.03300
    "dr_grpo": Method("group_mean", aggregate="constant"),  # arXiv 2503.20783
    "dapo": Method(epsilon_high=0.28),  # arXiv 2503.14476; the default
    "gspo": Method(ratio_level="sequence", aggregate="seq_mean", epsilon=3e-4, epsilon_high=4e-4),  # arXiv 2507.18071
    "cispo": Method(clip="cispo"),  # arXiv 2506.13585
    "rloo": Method("leave_one_out"),  # arXiv 2402.14740
    "reinforce++": Method("batch"),  # arXiv 2501.03262
    "reinforce++-baseline": Method("group_mean_batch"),
    "bnpo": Method(),  # as dapo with GRPO's bounds
    "dppo": Method("group_mean", clip="dppo", anchor=1e-3),  # Divergence PPO: the mask is a bound on |pi - mu|
}
DEFAULT = "dapo"


@dataclass(frozen=True)
class PolicyInput:
    """One packed micro-batch. # trainer -> losses"""

    logp: Tensor  # [T] of the present policy, with gradient
    mask: Tensor  # [T] bool
    sample: Tensor  # [T] 0 .. S-1; any number where mask is False
    advantage: Tensor  # [S]
    behaviour: Tensor | None = None  # [T] of the policy that sampled, written down then; None: it was this very policy
    old: Tensor | None = None  # [T] of the policy before this batch's first update; None: bypass, or this very policy
    reference: Tensor | None = None  # [T] of the reference; needed where beta is not 0


@dataclass(frozen=True)
class Totals:
    """What the whole optimizer step is divided by, over all micro-batches and ranks."""

    samples: int
    tokens: int
    longest: int = 1  # tokens a completion may have; for `constant`

    def __add__(self, other: Totals) -> Totals:
        return Totals(self.samples + other.samples, self.tokens + other.tokens, max(self.longest, other.longest))


@dataclass(frozen=True)
class PolicyLoss:
    """A micro-batch's part of the step's loss and measures, which are token means but for `dropped`. # losses -> trainer"""

    loss: Tensor
    ratio: Tensor
    clipped: Tensor  # share of tokens whose gradient the clip took away
    kl: Tensor  # k3 to the reference; 0 without one
    approximate_kl: Tensor  # k3 to the policy that sampled, or to the anchor
    weight: Tensor  # the correction's weight
    dropped: Tensor  # share of tokens that the correction left out


def policy_loss(given: PolicyInput, method: Method, totals: Totals) -> PolicyLoss:
    """The loss of a micro-batch, to be minimised: aggregate(weight * clip(ratio, A) + beta KL); see `METHODS` for the papers.

    ratio is pi/old (decoupled), pi/mu (bypass), or 1 with a gradient; at `sequence` level exp(mean log ratio) for all tokens of a sample.
    """
    quiet = _quiet(given)
    samples = len(quiet.advantage)
    advantage = quiet.advantage[quiet.sample]
    anchor, weight = corrected(
        quiet.logp, quiet.old, quiet.behaviour, quiet.mask, quiet.sample, quiet.advantage, method.correction
    )
    log_ratio = quiet.logp - anchor
    if method.ratio_level == "sequence":
        whole = mean_by_sample(log_ratio.detach(), quiet.mask, quiet.sample, samples)[quiet.sample]
        log_ratio = quiet.logp - quiet.logp.detach() + whole
    ratio = log_ratio.exp()
    per_token, clipped = _clip(quiet.logp, anchor, ratio, advantage, method)
    per_token = weight * per_token
    if method.anchor:
        per_token = per_token + method.anchor * log_ratio.square()
    kl = torch.zeros_like(quiet.logp)
    if quiet.reference is not None:
        kl = kl_estimate(quiet.logp.detach(), quiet.reference, "k3")
        if method.beta:
            per_token = per_token + method.beta * kl_estimate(quiet.logp, quiet.reference, method.kl)

    def mean(values: Tensor) -> Tensor:
        return (values.detach().to(quiet.logp.dtype) * quiet.mask).sum() / max(1, totals.tokens)

    return PolicyLoss(
        loss=_aggregate(per_token, quiet.mask, quiet.sample, samples, method.aggregate, totals),
        ratio=mean(ratio),
        clipped=mean(clipped),
        kl=mean(kl),
        approximate_kl=mean(kl_estimate(quiet.logp.detach(), anchor, "k3")),
        weight=mean(weight),
        dropped=mean(weight == 0),
    )


def kl_estimate(logp: Tensor, reference: Tensor, kind: KlEstimator) -> Tensor:
    """[T]: with k1 = log pi/ref, k2 = k1^2 / 2, k3 = exp(-k1) + k1 - 1 (Schulman 2020, "Approximating KL divergence").

    k1 itself has no useful gradient as a loss, since its expectation is zero: it is what `advantages.less_kl` takes off a reward.
    """
    difference = logp - reference
    return difference.square() / 2 if kind == "k2" else torch.exp(-difference) + difference - 1


def _quiet(given: PolicyInput) -> PolicyInput:
    """The input with 0 wherever the mask is False, so that no value from there, not even NaN, reaches value or gradient."""

    def clear(values: Tensor | None) -> Tensor | None:
        return None if values is None else torch.where(given.mask, values, 0.0)

    return replace(
        given,
        logp=torch.where(given.mask, given.logp, 0.0),
        sample=torch.where(given.mask, given.sample, 0),
        behaviour=clear(given.behaviour),
        old=clear(given.old),
        reference=clear(given.reference),
    )


def _clip(logp: Tensor, anchor: Tensor, ratio: Tensor, advantage: Tensor, method: Method) -> tuple[Tensor, Tensor]:
    """The loss of every token [T] before weights, and which tokens have lost their gradient [T] bool."""
    match method.clip:
        case "none":
            return -ratio * advantage, torch.zeros_like(ratio, dtype=torch.bool)
        case "cispo":  # the weight is clipped and constant, so that every token keeps its gradient
            bounded = ratio.detach().clamp(max=method.ratio_max)
            return -bounded * advantage * logp, torch.zeros_like(ratio, dtype=torch.bool)
        case "dppo":
            moved = logp.detach().exp() - anchor.exp()
            out = torch.where(advantage > 0, moved > method.divergence, moved < -method.divergence)
            return torch.where(out, 0.0, -ratio * advantage), out
        case "ppo":
            plain = ratio * advantage
            bounded = ratio.clamp(1 - method.epsilon, 1 + method.epsilon_high) * advantage
            least, out = torch.minimum(plain, bounded), bounded < plain
            if method.dual_clip is not None:  # arXiv 1912.09729: for A < 0 the loss is bounded too
                floor = method.dual_clip * advantage
                far = (advantage < 0) & (least < floor)
                least, out = torch.where(far, floor, least), out | far
            return -least, out


def _aggregate(per_token: Tensor, mask: Tensor, sample: Tensor, samples: int, how: Aggregate, totals: Totals) -> Tensor:
    """seq_mean: mean over samples of their token means; token_mean: over tokens; constant: sum / (samples * longest)."""
    if how == "seq_mean":
        return mean_by_sample(per_token, mask, sample, samples).sum() / max(1, totals.samples)
    whole = torch.where(mask, per_token, 0.0).sum()
    return whole / max(1, totals.tokens if how == "token_mean" else totals.samples * totals.longest)
