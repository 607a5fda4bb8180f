"""One architecture, tiny, against the truth: our experts and LoRA beside its own eager experts with W + s B A written out.

The same weights, factors and routing go through both; the loss and the gradient of every tensor there is are compared: of the input
(through the embeddings), of the routers, of every factor, of every frozen weight. In each layer one expert gets every token and one gets none.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ropewalk.models.experts import expert_modules
from ropewalk.models.lora import Adapter, LoraSpec, attach
from ropewalk.models.targets import text_part
from ropewalk.models.tiny import FIRST_FREE_ID, VOCABULARY, shrink

TOLERANCE = 1e-5
TOKENS = (2, 20)


@dataclass(frozen=True)
class Compared:
    """How far apart the two are: the largest relative error of any gradient, and where it is."""

    architecture: str
    model: str
    text_only: bool
    layers: int  # expert layers
    factors: int  # LoRA tensors compared
    dtype: str
    error: float
    where: str
    loss: float  # relative difference
    in_float32: float | None = None  # what float32 gave, where it took float64 to pass

    @property
    def passed(self) -> bool:
        return self.layers > 0 and self.error <= TOLERANCE and self.loss <= TOLERANCE


def compare(architecture: str, kind: Any) -> Compared:
    """In float32; where its rounding alone is more than the tolerance, in float64, which shows whether the mathematics is the same."""
    single = _compare(architecture, kind, torch.float32)
    return single if single.passed else replace(_compare(architecture, kind, torch.float64), in_float32=single.error)


def _compare(architecture: str, kind: Any, dtype: torch.dtype) -> Compared:
    torch.manual_seed(0)
    model = build(kind).to(dtype)
    adapter = attach(model, LoraSpec(r=4, alpha=8), seed=0, dtype=dtype)
    stir((*model.parameters(), *adapter.parameters()))
    layers = list(expert_modules(model))
    hooks = [module.register_forward_pre_hook(crowd, with_kwargs=True) for _, module in layers]
    ids = torch.randint(FIRST_FREE_ID, VOCABULARY, TOKENS)
    tensors = {**{n: p for n, p in model.named_parameters() if "ropewalk_lora" not in n}, **adapter.named_parameters()}
    for tensor in tensors.values():
        tensor.requires_grad_(True)
    torch.manual_seed(1)  # some models draw noise in their forward
    our_loss, ours = gradients(tensors, model(input_ids=ids, use_cache=False))
    adapter.detach()
    torch.manual_seed(1)
    true_loss, truth = gradients(tensors, with_delta(model, adapter, ids))
    for hook in hooks:
        hook.remove()
    error, where = worst(ours, truth)
    loss = abs(our_loss - true_loss) / abs(true_loss)
    factors = sum(1 for name in truth if ".lora_" in name)
    text = bool(text_part(model))
    return Compared(architecture, kind.__name__, text, len(layers), factors, str(dtype)[6:], error, where, loss)


def build(kind: Any) -> Any:
    """The tiny model with its own experts."""
    config = shrink(kind.config_class)
    return kind._from_config(config, experts_implementation="eager", attn_implementation="eager").eval()


@torch.no_grad()
def stir(parameters: Iterable[Tensor]) -> None:
    """Nothing may be constant: zero routers would tie, zero biases and zero factors would hide what is missing."""
    for parameter in parameters:
        if parameter.numel() and bool((parameter == parameter.flatten()[0]).all()):
            parameter.add_(torch.randn_like(parameter) * 0.1)


def crowd(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Expert 0 gets every token and the last one none; the routing weights stay what they are."""
    experts = module.down_proj.shape[0]
    names = list(kwargs)
    ids: Tensor = args[1] if len(args) > 1 else kwargs[names[1 - len(args)]]
    ids = 1 + ids % (experts - 2)
    ids[:, 0] = 0
    if len(args) > 1:
        return (args[0], ids, *args[2:]), kwargs
    return args, {**kwargs, names[1 - len(args)]: ids}


def with_delta(model: nn.Module, adapter: Adapter, ids: Tensor) -> Any:
    """The base's own forward with W + s B A in the place of every adapted W."""
    weights: dict[str, Tensor] = {}
    for name, lora in adapter.linears.items():
        linear: Any = model.get_submodule(name)
        weights[f"{name}.weight"] = linear.weight + lora.scale * (lora.B @ lora.A)
    for name, stack in adapter.experts.items():
        module: Any = model.get_submodule(name)
        for projection, scale in stack.scales.items():
            a, b = stack.factors_of(projection)
            delta = scale * (b @ a)
            delta = delta.transpose(1, 2) if module.is_transposed else delta
            weights[f"{name}.{projection}"] = getattr(module, projection) + delta
    for name, parameters in adapter.trained.items():
        weights |= {f"{name}.{key}": parameter for key, parameter in parameters.items()}
    # tied weights stay apart: an adapter acts where it was attached, not in another layer that shares the weight
    return torch.func.functional_call(model, weights, (), {"input_ids": ids, "use_cache": False}, tie_weights=False)


def gradients(tensors: dict[str, Any], output: Any) -> tuple[float, dict[str, Tensor]]:
    """The cross entropy of arbitrary targets, and its gradient of every tensor that it reaches."""
    logits = (output.logits if "logits" in output else output[0]).flatten(0, -2)
    targets = torch.arange(logits.shape[0]) * 7919 % logits.shape[1]
    loss = F.cross_entropy(logits, targets)
    found = torch.autograd.grad(loss, list(tensors.values()), allow_unused=True)
    return loss.item(), {name: g for name, g in zip(tensors, found) if g is not None}


def worst(ours: dict[str, Tensor], truth: dict[str, Tensor]) -> tuple[float, str]:
    """|ours - truth| / |truth| of the worst tensor; against 1e-5 of the largest gradient where a tensor's own is next to nothing."""
    missing = sorted(ours.keys() ^ truth.keys())
    if missing:
        return math.inf, f"{missing[0]} has a gradient on one side only"
    floor = 1e-5 * max(float(g.norm()) for g in truth.values())
    errors = {n: float((ours[n] - g).norm()) / max(float(g.norm()), floor) for n, g in truth.items()}
    where = max(errors, key=lambda n: (math.isnan(errors[n]), errors[n]))
    return (errors[where] if math.isfinite(errors[where]) else math.inf), where
