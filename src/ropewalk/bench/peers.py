"""The peers' expert layers: transformers' own under PEFT, and the kernels of Axolotl and Unsloth where they are installed.

Theirs are called as they are, out of the installed packages, of which only the modules with the kernels are loaded. Nobody's code is here.
Legend: E experts, H hidden, I expert intermediate, r rank. PEFT lays factors out as A [E r, in], B [out, r E] with experts fastest.
"""

from __future__ import annotations

import importlib
import importlib.util
import logging
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

Experts = Callable[[Tensor, Tensor, Tensor], Tensor]
Factors = list[Tensor]  # A1, B1, A2, B2 as PEFT lays them out
Fused = Callable[[Tensor, Tensor, Tensor, Factors], Tensor]
PROJECTIONS = ("gate_up_proj", "down_proj")


def experts_module(up: Tensor, down: Tensor, activation: str, topk: int, implementation: str) -> Any:
    """transformers' module of the experts over these stacks [E, 2I, H] and [E, H, I]."""
    from transformers import Qwen3MoeConfig
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

    config = Qwen3MoeConfig(
        hidden_size=down.shape[1], moe_intermediate_size=down.shape[2], num_experts=len(up), num_experts_per_tok=topk, hidden_act=activation
    )  # fmt: skip
    config._experts_implementation = implementation
    with torch.device("meta"):
        module: Any = Qwen3MoeExperts(config)
    module.gate_up_proj, module.down_proj = (nn.Parameter(stack, requires_grad=False) for stack in (up, down))
    return module


class _Holder(nn.Module):
    """What PEFT wants around the module: it adapts modules and parameters of a model by name."""

    def __init__(self, experts: nn.Module) -> None:
        super().__init__()
        self.experts, self.unused = experts, nn.Linear(1, 1)

    def forward(self, *given: Any) -> Any:
        return self.experts(*given)


def with_peft(experts: nn.Module, factors: Factors, scale: float) -> tuple[Experts, Factors]:
    """The module under PEFT's target_parameters -> what computes, and its factors, which hold these values."""
    from peft import LoraConfig, get_peft_model

    rank = factors[1].shape[1] // next(experts.parameters()).shape[0]
    config = LoraConfig(
        r=rank, lora_alpha=int(scale * rank), target_modules=["unused"], target_parameters=[f"experts.{p}" for p in PROJECTIONS]
    )  # fmt: skip
    peft: Any = get_peft_model(_Holder(experts), config, autocast_adapter_dtype=False)
    wrapper, wrappers = peft.base_model.model.experts, {}
    while hasattr(wrapper, "parameter_name"):
        wrappers[wrapper.parameter_name] = wrapper
        wrapper = wrapper.base_layer
    own = [getattr(wrappers[p], f"lora_{side}")["default"].weight for p in PROJECTIONS for side in "AB"]
    for parameter, values in zip(own, factors, strict=True):
        parameter.data = values.detach().clone().view(parameter.shape)
    return peft.base_model.model.experts, own


def axolotl(module: Any, scale: float) -> Fused:
    """Axolotl's fused experts and LoRA over transformers' module."""
    root = "axolotl.integrations.kernels.libs.scattermoe_lora"
    _bare(
        "axolotl", "axolotl.integrations", "axolotl.integrations.kernels", "axolotl.integrations.kernels.libs", "axolotl.utils"
    )
    logs: Any = ModuleType("axolotl.utils.logging")
    logs.get_logger = logging.getLogger
    sys.modules["axolotl.utils.logging"] = logs
    experts, layers = importlib.import_module(f"{root}.experts"), importlib.import_module(f"{root}.layers")
    count = module.gate_up_proj.shape[0]

    def compute(x: Tensor, ids: Tensor, weights: Tensor, factors: Factors) -> Tensor:
        a1, b1, a2, b2 = factors
        pairs = zip(PROJECTIONS, ((a1, b1), (a2, b2)), strict=True)
        module._scattermoe_lora = {n: layers._convert_smoe_lora(a, b, count, len(a) // count, scale) for n, (a, b) in pairs}
        return experts.scattermoe_experts_forward(module, x, ids, weights)  # type: ignore[no-any-return]

    return compute


def unsloth(module: Any, scale: float) -> Fused:
    """Unsloth's grouped products, the LoRA part beside them, over transformers' module."""
    _bare("unsloth_zoo", "unsloth_zoo.temporary_patches")
    elsewhere: Any = ModuleType("unsloth_zoo.mlx")
    elsewhere.is_mlx_available = lambda: False
    sys.modules["unsloth_zoo.mlx"] = elsewhere
    kernels: Any = importlib.import_module("unsloth_zoo.temporary_patches.moe_utils")
    module._unsloth_model_type = None
    count, hidden = module.gate_up_proj.shape[0], module.gate_up_proj.shape[2]
    inner = module.down_proj.shape[2]

    def compute(x: Tensor, ids: Tensor, weights: Tensor, factors: Factors) -> Tensor:
        a1, b1, a2, b2 = factors
        for name, a, b, inputs, outputs in (
            (PROJECTIONS[0], a1, b1, hidden, 2 * inner),
            (PROJECTIONS[1], a2, b2, inner, hidden),
        ):
            first, second = kernels._canonical_lora_weights_for_grouped_mm(a, b, count, len(a) // count, inputs, outputs)
            setattr(module, kernels.moe_lora_stash_name(name), (first, second, scale, count))
        return kernels.forward_native_grouped_mm(module, x, ids, weights)  # type: ignore[no-any-return]

    return compute


FUSED: dict[str, Callable[[Any, float], Fused]] = {"axolotl": axolotl, "unsloth": unsloth}


def fused_in_model(name: str, model: Any, rank: int, scale: float) -> dict[str, Tensor]:
    """Every expert module of the model computes with that peer's kernels -> its new factors by the names that PEFT gives them."""
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    from ropewalk.models.experts import expert_modules, stack_sizes

    made: dict[str, Tensor] = {}
    for path, module in expert_modules(model):
        factors: Factors = []
        for projection in PROJECTIONS:
            experts, inputs, outputs = stack_sizes(module, projection)
            device = getattr(module, projection).device
            for side, size in (("A", (experts * rank, inputs)), ("B", (outputs, rank * experts))):
                factor = nn.Parameter(torch.zeros(size, device=device))
                made[f"{path}.{projection}.lora_{side}"] = factor
                factors.append(factor)
        module.__dict__["_bench"] = FUSED[name](module, scale), factors
    if f"bench_{name}" not in ALL_EXPERTS_FUNCTIONS:
        ALL_EXPERTS_FUNCTIONS.register(f"bench_{name}", _fused)
    model.set_experts_implementation(f"bench_{name}")
    return made


def _fused(module: Any, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
    compute, factors = module.__dict__["_bench"]
    return compute(x, ids, weights, [f.to(x.dtype) for f in factors])  # type: ignore[no-any-return]


def with_liger(model_type: str) -> None:
    """transformers' classes of this architecture compute norms, rotary embeddings and the loss by Liger's kernels from here on."""
    kernels: Any = importlib.import_module("liger_kernel.transformers")
    getattr(kernels, f"apply_liger_kernel_to_{model_type}")()


def _bare(*names: str) -> None:
    """Packages that can be imported from without their own __init__ being run, which would ask for all that they need."""
    if names[0] in sys.modules:
        return
    top = importlib.util.find_spec(names[0])
    assert top is not None, f"{names[0]} is not installed"
    root = Path(next(iter(top.submodule_search_locations or [])))
    for name in names:
        package = ModuleType(name)
        package.__path__ = [str(root.joinpath(*name.split(".")[1:]))]
        sys.modules[name] = package
