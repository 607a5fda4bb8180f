"""Losses of preferences, reward models and process rewards, as pure functions of log-probabilities.

Legend: P pairs, S samples, K steps of a solution. A sample's log-probability is the sum over its answer's tokens (train/samples.py);
`*_tokens` are their numbers. Losses are per pair or sample, so that the caller divides their sum by what the whole step holds.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits, logsigmoid

DpoKind = Literal["sigmoid", "ipo", "hinge", "robust"]


@dataclass(frozen=True)
class Pairs:
    """Preferred and other answers to the same prompts. # trainer -> losses"""

    chosen: Tensor  # [P] with gradient
    rejected: Tensor  # [P] with gradient
    chosen_tokens: Tensor  # [P]
    rejected_tokens: Tensor  # [P]
    reference_chosen: Tensor | None = None  # [P]; DPO and its kin
    reference_rejected: Tensor | None = None  # [P]


@dataclass(frozen=True)
class Judged:
    """Single answers, each wanted or not. # trainer -> losses"""

    policy: Tensor  # [S] with gradient
    reference: Tensor  # [S]
    wanted: Tensor  # [S] bool
    kl: Tensor  # scalar: the batch's estimate of KL(pi, reference), not below 0, constant


@dataclass(frozen=True)
class Preferred:
    """Losses and implicit rewards, constant, each [P]. # losses -> trainer"""

    loss: Tensor
    chosen_reward: Tensor
    rejected_reward: Tensor


@dataclass(frozen=True)
class Weighed:
    """Losses and implicit rewards of single answers, each [S]. # losses -> trainer"""

    loss: Tensor
    reward: Tensor


def dpo(pairs: Pairs, beta: float, kind: DpoKind = "sigmoid", smoothing: float = 0.0) -> Preferred:
    """h = log pi/ref of chosen less of rejected, [P].

    sigmoid: -(1 - e) log s(beta h) - e log s(-beta h), e `smoothing` (DPO, arXiv 2305.18290; conservative where e > 0).
    robust: (that with -e for +e) / (1 - 2 e), unbiased when e of the labels are flipped (arXiv 2403.00409). hinge: max(0, 1 - beta h)
    (SLiC, arXiv 2305.10425). ipo: (h - 1 / (2 beta))^2 with means over tokens in place of sums (arXiv 2310.12036).
    """
    assert pairs.reference_chosen is not None
    assert pairs.reference_rejected is not None
    chosen = pairs.chosen - pairs.reference_chosen
    rejected = pairs.rejected - pairs.reference_rejected
    margin = beta * (chosen - rejected)
    match kind:
        case "sigmoid":
            loss = -(1 - smoothing) * logsigmoid(margin) - smoothing * logsigmoid(-margin)
        case "robust":
            loss = (-(1 - smoothing) * logsigmoid(margin) + smoothing * logsigmoid(-margin)) / (1 - 2 * smoothing)
        case "hinge":
            loss = torch.relu(1 - margin)
        case "ipo":
            mean = chosen / pairs.chosen_tokens.clamp(min=1) - rejected / pairs.rejected_tokens.clamp(min=1)
            loss = (mean - 1 / (2 * beta)).square()
    return Preferred(loss, beta * chosen.detach(), beta * rejected.detach())


def kto(judged: Judged, beta: float, wanted_weight: float = 1.0, unwanted_weight: float = 1.0) -> Weighed:
    """w (1 - s(beta (log pi/ref - KL))) for wanted answers, w (1 - s(beta (KL - log pi/ref))) for others, [S] (KTO, arXiv 2402.01306)."""
    against = judged.policy - judged.reference
    sign = torch.where(judged.wanted, 1.0, -1.0).to(against.dtype)
    weight = torch.where(judged.wanted, wanted_weight, unwanted_weight).to(against.dtype)
    loss = weight * (1 - torch.sigmoid(beta * sign * (against - judged.kl.detach())))
    return Weighed(loss, beta * against.detach())


def mismatched_kl(policy: Tensor, reference: Tensor) -> Tensor:
    """KTO's estimate, a scalar: max(0, mean log pi/ref) over answers [S] set beside prompts they do not belong to (arXiv 2402.01306)."""
    return (policy.detach() - reference.detach()).mean().clamp(min=0)


def orpo(pairs: Pairs, weight: float) -> Preferred:
    """-l_c - weight log s(log odds_c - log odds_r), [P]; l the mean log-probability of a token, odds = p / (1 - p), p = exp(l)
    (ORPO, arXiv 2403.07691)."""
    chosen, rejected = _means(pairs)
    odds = (chosen - rejected) - (log1mexp(chosen) - log1mexp(rejected))
    return Preferred(-chosen - weight * logsigmoid(odds), weight * chosen.detach(), weight * rejected.detach())


def simpo(pairs: Pairs, beta: float, gamma: float, likelihood: float = 0.0) -> Preferred:
    """-log s(beta (l_c - l_r) - gamma) - likelihood l_c, [P]; l the mean log-probability of a token (SimPO, arXiv 2405.14734)."""
    chosen, rejected = _means(pairs)
    loss = -logsigmoid(beta * (chosen - rejected) - gamma) - likelihood * chosen
    return Preferred(loss, beta * chosen.detach(), beta * rejected.detach())


def cpo(pairs: Pairs, beta: float, likelihood: float = 1.0, smoothing: float = 0.0) -> Preferred:
    """-(1 - e) log s(beta (lp_c - lp_r)) - e log s(-that) - likelihood l_c, [P]; lp are sums, l_c a token's mean (CPO, arXiv 2401.08417)."""
    margin = beta * (pairs.chosen - pairs.rejected)
    loss = -(1 - smoothing) * logsigmoid(margin) - smoothing * logsigmoid(-margin) - likelihood * _means(pairs)[0]
    return Preferred(loss, beta * pairs.chosen.detach(), beta * pairs.rejected.detach())


def likelihood(pairs: Pairs) -> Tensor:
    """[P]: -l_c, the term that RPO adds to DPO (arXiv 2404.19733)."""
    return -_means(pairs)[0]


def bradley_terry(chosen: Tensor, rejected: Tensor, margin: Tensor | None = None, centering: float = 0.0) -> Tensor:
    """Scores [P] of a reward model -> [P]: -log s(r_c - r_r - margin) + centering (r_c + r_r)^2 (arXiv 2204.05862, 2312.09244)."""
    difference = chosen - rejected if margin is None else chosen - rejected - margin
    return -logsigmoid(difference) + centering * (chosen + rejected).square()


def process_rewards(scores: Tensor, right: Tensor) -> Tensor:
    """Scores [K] at the ends of steps and right [K] in {0, 1} -> [K]: cross entropy of each step (arXiv 2305.20050)."""
    return binary_cross_entropy_with_logits(scores, right.to(scores.dtype), reduction="none")


def log1mexp(x: Tensor) -> Tensor:
    """log(1 - exp(x)) for x < 0, exact near 0 and far from it; at 0 it is held just below, where the odds are finite."""
    x = x.clamp(max=-torch.finfo(x.dtype).eps)
    return torch.where(x > -0.693, torch.log(-torch.expm1(x)), torch.log1p(-torch.exp(x)))


def _means(pairs: Pairs) -> tuple[Tensor, Tensor]:
    return pairs.chosen / pairs.chosen_tokens.clamp(min=1), pairs.rejected / pairs.rejected_tokens.clamp(min=1)
