"""Linear layers that compute as if their weights, and what they are given, were held in few bits: training for quantisation.

The weights stay what they are and are saved so; whoever quantises them to the same format afterwards loses little. Output head, routers
and embeddings are left alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ropewalk.errors import ModelError
from ropewalk.kernels.fake_quant import BLOCKS, TOKENS, WEIGHTS, straight_through
from ropewalk.models.experts import expert_modules
from ropewalk.models.targets import special


@dataclass
class Rounding:
    """The formats, and whether they are applied now."""

    weights: str  # of kernels/fake_quant.py
    tokens: str | None
    block: int
    on: bool = True
    layers: int = 0


def attach_rounding(model: PreTrainedModel, rounding: Rounding) -> None:
    """Has every linear layer round; one that its format does not fit is an error."""
    if next(expert_modules(model), None) is not None:
        raise ModelError("training for quantisation rounds linear layers, and this model's experts are stacks; remove qat")
    modules = dict(model.named_modules())
    apart = special(model, modules)
    blocks = {BLOCKS.get(rounding.weights, rounding.block if rounding.weights in ("int4", "int8") else 1)}
    blocks.add(BLOCKS.get(rounding.tokens or "", 1))
    for name, module in modules.items():
        if type(module) is not nn.Linear or name in apart:
            continue
        if wrong := [block for block in blocks if module.in_features % block]:
            raise ModelError(
                f"{name} has {module.in_features} inputs, which are no whole number of blocks of {wrong[0]}; choose another "
                "qat.group_size, or a format without blocks"
            )
        module.forward = partial(_rounded, module, rounding)  # type: ignore[method-assign]
        rounding.layers += 1


def _rounded(layer: nn.Linear, rounding: Rounding, x: Tensor) -> Tensor:
    weight = layer.weight
    if rounding.on:
        weight = straight_through(weight, WEIGHTS[rounding.weights](weight.detach(), rounding.block))
        if rounding.tokens is not None:
            x = straight_through(x, TOKENS[rounding.tokens](x.detach()))
    return torch.nn.functional.linear(x, weight, layer.bias)
