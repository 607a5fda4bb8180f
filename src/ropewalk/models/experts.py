"""Every mixture-of-experts model through one seam: the implementation "ropewalk" of transformers' ExpertsInterface.

transformers keeps the experts of a layer as 3-D parameters of one module and says by flags how they lie: `has_gate`, `has_bias`,
`is_transposed`, `has_post_expert_norm` (interleaving shows in `_apply_gate` itself). This module reads the flags, finds the LoRA
factors that models/lora.py attached, and calls kernels/expert_lora.py. No architecture is named.
Legend: T tokens, k experts per token, E experts, H hidden, I expert intermediate, r rank.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from ropewalk.errors import ModelError
from ropewalk.kernels.expert_lora import Experts, expert_lora
from ropewalk.kernels.gates import AnyGate, ClampedGlu, Gate, Glu

NAME = "ropewalk"
LORA = "ropewalk_lora"  # the child module that holds the factors, in expert modules and linear layers alike
RECOMPUTE = "_ropewalk_recompute"  # whether the module's experts keep their input only (models/recompute.py)
NARROW_ROWS = 64  # routed rows up to which a CPU multiplies factors sooner in float32 than in 16 bits
_GATE = "_ropewalk_gate"
_FLAGS = ("has_gate", "has_bias", "is_transposed", "is_concatenated")


def register_experts() -> None:
    """Make `experts_implementation="ropewalk"` known to transformers."""
    if NAME not in ALL_EXPERTS_FUNCTIONS:
        ALL_EXPERTS_FUNCTIONS.register(NAME, adapted_experts)


def expert_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Every module that goes through transformers' ExpertsInterface, with its name."""
    for name, module in model.named_modules():
        if all(flag in module.__dict__ for flag in _FLAGS):
            yield name, module


def projections(module: Any) -> tuple[str, str]:
    """The names of an expert module's two stacks, in the order the module registers them."""
    return ("gate_up_proj" if module.has_gate else "up_proj"), "down_proj"


def stack_sizes(module: Any, name: str) -> tuple[int, int, int]:
    """Experts, inputs and outputs of a stack."""
    experts, first, second = getattr(module, name).shape
    return (experts, first, second) if module.is_transposed else (experts, second, first)


def adapted_experts(module: Any, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
    """What transformers calls in place of a model's own loop over experts: with the adapter that the module carries."""
    return experts_forward(module, x, ids, weights, module._modules.get(LORA))


def experts_forward(module: Any, x: Tensor, ids: Tensor, weights: Tensor, lora: Any = None) -> Tensor:
    """x [T, H], ids [T, k], weights [T, k] -> [T, H]; `lora` is an ExpertLora, or None for the base alone."""
    if getattr(module, "_is_expert_parallel", False):  # unknown to transformers 5.17
        raise ModelError(
            "experts_implementation 'ropewalk' cannot compute experts that are split over devices (expert parallelism); "
            "load the model without a device mesh, or with experts_implementation 'grouped_mm' and no LoRA on experts"
        )
    experts = _experts(module)
    dtype = experts.up.dtype if isinstance(experts.up, Tensor) else x.dtype
    narrow = torch.float32 if dtype.itemsize == 2 and x.is_cpu and ids.numel() <= NARROW_ROWS else dtype
    up, down = (None, None) if lora is None else (lora.factors(name, narrow) for name in projections(module))
    return expert_lora(x.to(dtype), ids, weights, experts, up, down).to(x.dtype)


def _experts(module: Any) -> Experts:
    up, down = projections(module)
    post_norm = module.post_expert_norm if getattr(module, "has_post_expert_norm", False) else None  # neither to 5.17
    return Experts(
        up=getattr(module, up),
        down=getattr(module, down),
        gate=gate_of(module),
        up_bias=getattr(module, f"{up}_bias") if module.has_bias else None,
        down_bias=getattr(module, f"{down}_bias") if module.has_bias else None,
        transposed=module.is_transposed,
        post_norm=post_norm,
        post_norm_parameters=_trained(post_norm),
        recompute=module.__dict__.get(RECOMPUTE, False),
    )


def _trained(module: nn.Module | None) -> tuple[Tensor, ...]:
    return () if module is None else tuple(p for p in module.parameters() if p.requires_grad)


def gate_of(module: Any) -> Gate:
    """What the module computes between its projections, in closed form where its values show that it is a known one."""
    activation = getattr(module, "act_fn", None)
    if isinstance(activation, nn.Module) and next(activation.parameters(), None) is not None:
        return AnyGate(_function(module), _trained(activation))
    known: Gate | None = module.__dict__.get(_GATE)
    if known is None:
        known = recognise(_function(module), _candidates(module)) if module.has_gate else AnyGate(_function(module))
        module.__dict__[_GATE] = known
    return known


def _function(module: Any) -> Callable[[Tensor], Tensor]:
    return module._apply_gate if module.has_gate else module.act_fn  # type: ignore[no-any-return]


def _candidates(module: Any) -> Iterator[Gate]:
    """The closed forms that this module's numbers could mean."""
    limits = [v for name in ("limit", "swiglu_limit") if isinstance(v := getattr(module, name, None), int | float)]
    alphas = [v for name in ("alpha", "swiglu_alpha") if isinstance(v := getattr(module, name, None), int | float)]
    for interleaved in (not module.is_concatenated, module.is_concatenated):
        for activation in ("silu", "gelu_tanh", "gelu"):
            yield Glu(activation, interleaved)
        for limit in limits:
            for alpha in (*alphas, 1.0):
                for shift in (0.0, 1.0):
                    yield ClampedGlu(float(limit), float(alpha), shift, interleaved)


def recognise(function: Callable[[Tensor], Tensor], candidates: Iterator[Gate]) -> Gate:
    """The candidate that computes the same as `function` on a probe; any other function is differentiated as it is.

    Known by its values and not by its name, so that a new model's clamp or cast is neither missed nor taken for another's.
    """
    known = list(candidates)
    turns = torch.linspace(-1, 1, 2048).view(16, 128) * 97.0
    probe = torch.cat([torch.sin(turns * (reach % 7 + 1)) * reach for reach in (1.0, 4.0, 20.0, 300.0, 1e4)])
    with torch.no_grad():
        truth = function(probe)
        for gate in known:
            if torch.allclose(gate.plain(probe), truth, rtol=1e-5, atol=1e-5):
                return gate
    return AnyGate(function)
