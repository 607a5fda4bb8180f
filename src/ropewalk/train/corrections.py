"""Corrections for tokens that another policy sampled: an older version of this one, or another engine's arithmetic.

Three policies: mu sampled, old is the anchor of the clip, pi is trained. Bypass: old is mu, and the ratio pi/mu carries the whole
correction, so a weight beside it would count it twice. Decoupled: old is recomputed before the first update, the ratio is pi/old, and
w(old/mu) stands before it. Legend: T tokens, S samples. Everything here is constant for the gradient.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ropewalk.errors import ConfigError
from ropewalk.train.samples import mean_by_sample, sum_by_sample


@dataclass(frozen=True)
class Correction:
    """What is done about the difference to the sampler; the default is the ratio pi/mu under the method's own clip."""

    mode: Literal["bypass", "decoupled"] = "bypass"
    weight: Literal["none", "tis", "icepop"] = "none"
    level: Literal["token", "sequence"] = "token"  # of tis
    low: float = 0.5  # icepop
    high: float = 2.0  # tis and icepop
    keep: tuple[float, float] | None = None  # geometric mask, such as (0.99, 1.01)
    opsm: float | None = None  # off-policy sequence mask

    def __post_init__(self) -> None:
        if self.mode == "bypass" and self.weight == "tis":
            raise ConfigError(
                "correction tis with mode bypass would count the sampler's difference twice; write mode: decoupled, or leave tis out"
            )


def corrected(
    logp: Tensor,
    old: Tensor | None,
    behaviour: Tensor | None,
    mask: Tensor,
    sample: Tensor,
    advantage: Tensor,
    how: Correction,
) -> tuple[Tensor, Tensor]:
    """The anchor of the clip [T] and each token's weight [T]; without `behaviour` pi or old sampled, and weights are 1.

    rho = old/mu (decoupled) or pi/mu (bypass). tis: min(rho, high), at sequence level of the product (Yao et al. 2025).
    icepop: rho within [low, high], else 0; in bypass 1 or 0 (Ling team 2025). keep: 0 for a sample whose geometric mean of rho lies
    outside (GSPO's ratio as a mask). opsm: 0 for a sample with A < 0 and mean(log mu - log pi) > opsm (DeepSeek-V3.2, arXiv 2512.02556).
    """
    now, samples = logp.detach(), len(advantage)
    before = now if old is None else old.detach()
    if behaviour is None:
        return before, torch.ones_like(now)
    mu = behaviour.detach()
    anchor = mu if how.mode == "bypass" else before
    log_rho = (now if how.mode == "bypass" else before) - mu
    rho = log_rho.exp()
    weight = torch.ones_like(now)
    if how.weight == "tis" and how.level == "sequence":
        weight = sum_by_sample(log_rho, mask, sample, samples).exp()[sample].clamp(max=how.high)
    elif how.weight == "tis":
        weight = rho.clamp(max=how.high)
    elif how.weight == "icepop":
        inside = (rho >= how.low) & (rho <= how.high)
        weight = torch.where(inside, rho if how.mode == "decoupled" else torch.ones_like(rho), 0.0)
    if how.keep is not None:
        mean = mean_by_sample(log_rho, mask, sample, samples).exp()
        weight = weight * ((mean >= how.keep[0]) & (mean <= how.keep[1]))[sample]
    if how.opsm is not None:
        far = mean_by_sample(mu - now, mask, sample, samples) > how.opsm
        weight = weight * ~((advantage < 0) & far)[sample]
    return anchor, weight
