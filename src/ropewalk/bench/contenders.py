"""Who races: ours and its peers, what each may keep for the backward pass, and who is here. No torch.

    ours      experts_implementation "ropewalk" and models/lora.py; products: its experts by torch's grouped products, without Triton's kernels
    grouped   experts_implementation "grouped_mm" of transformers, and PEFT's target_parameters
    eager     the model's own loop over experts, and PEFT's target_parameters
    axolotl   the scattermoe_lora kernels of an installed axolotl; unsloth: the grouped path of an installed unsloth_zoo
    liger     "grouped" in a model whose norms, rotary embedding and loss are those of an installed liger_kernel

What is kept, from the fastest to the leanest: "keep" all that autograd and the kernels keep; "experts" all but the experts' own, which only
ours can; "layer" each layer's input; "offload" that input on the host, which only ours does by itself.
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass

OURS, PRODUCTS = "ours", "products"
TITLES = {
    OURS: "Ropewalk",
    PRODUCTS: "Ropewalk by torch's products",
    "grouped": "grouped_mm + PEFT",
    "eager": "eager + PEFT",
    "axolotl": "Axolotl scattermoe_lora",
    "unsloth": "Unsloth grouped",
    "liger": "grouped_mm + PEFT + Liger",
}
NEEDS = {
    "grouped": "peft",
    "eager": "peft",
    "axolotl": "axolotl",
    "unsloth": "unsloth_zoo",
    "liger": "liger_kernel",
}
ON_GPU = ("axolotl", "unsloth", "liger")
ONCE = "eager"  # so slow that one step of it on a CPU, or few on a GPU, are enough to see by how much
FOUR_BITS = {  # why a peer does not train through experts of few bits
    "grouped": "transformers quantises no stack of experts, and PEFT adapts none that is quantised",
    "eager": "transformers quantises no stack of experts, and PEFT adapts none that is quantised",
}
IN_MODELS = "its models in few bits are those of bitsandbytes, which is not raced"


@dataclass(frozen=True)
class Entrant:
    """One contender under one policy."""

    name: str
    policy: str = "keep"

    def __str__(self) -> str:
        return self.name if self.policy == "keep" else f"{self.name}, {self.policy}"

    @property
    def title(self) -> str:
        return TITLES[self.name] if self.policy == "keep" else f"{TITLES[self.name]}, {self.policy}"


def present(device: str) -> tuple[list[str], dict[str, str]]:
    """The contenders that are here, and why the others are not."""
    there, missing = [OURS], {}
    for name, package in NEEDS.items():
        packages = [package] if package == "peft" or name != "liger" else [package, "peft"]
        absent = [p for p in packages if importlib.util.find_spec(p) is None]
        if absent:
            missing[name] = f"{absent[0]} is not installed"
        elif name in ON_GPU and device != "cuda":
            missing[name] = "its kernels need a GPU"
        else:
            there.append(name)
    return there, missing


def groups(names: list[str], device: str, *, lean: bool) -> list[list[Entrant]]:
    """Who takes turns with whom: all that keep everything beside our leaner ways, then all that keep a layer's input."""
    first = [Entrant(name) for name in names if device != "cuda" or name != ONCE]  # a model's steps would take it minutes there
    if not lean:
        return [first]
    ours = [Entrant(OURS, "experts"), Entrant(OURS, "layer")]
    second = [Entrant(OURS, "layer"), Entrant(OURS, "offload")]
    second += [Entrant(name, "layer") for name in names if name != OURS and (device != "cuda" or name != ONCE)]
    return [[first[0], *ours, *first[1:]], second]
