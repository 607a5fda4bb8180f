"""LoRA on any model: on every linear layer and on every expert, attached without renaming anything of the base.

    spec -> attach(model, spec, seed) -> Adapter -> save(folder) in PEFT's layout -> verify_saved

Legend: E experts, r rank, in/out a layer's sizes. Inside, factors of experts lie expert by expert, A [E, r, in] and B [E, out, r]; on disk they
lie as PEFT wants them (models/adapter_folder.py).
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ropewalk.errors import ModelError
from ropewalk.models import adapter_folder
from ropewalk.models.activated import watch_invocations
from ropewalk.models.adapter_folder import verify_saved
from ropewalk.models.experts import LORA, NAME, expert_modules, register_experts, stack_sizes
from ropewalk.models.lora_layers import ExpertLora, LinearLora, Switch, dense_weight, unwrap, wrap
from ropewalk.models.targets import Wanted, cover, families

__all__ = ["Adapter", "Coverage", "LoraSpec", "attach", "verify_saved"]

_CONFUSED_BY_PEFT = frozenset({"gate", "gate_proj", "up_proj", "down_proj", "w1", "w2", "w3"})


@dataclass(frozen=True)
class LoraSpec:
    """What to adapt and how; names and meanings are PEFT's and Axolotl's."""

    r: int = 16
    alpha: float = 32.0
    dropout: float = 0.0  # on linear layers; experts have none, since x cannot be dropped apart from their routing
    target_modules: str | tuple[str, ...] = ()
    target_parameters: tuple[str, ...] = ()
    target_linear: bool = True
    experts: bool = True  # every stack of experts, unless target_parameters names some itself
    expert_r: int | None = None  # another rank for experts at the same scale; rank_pattern goes before it
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    rslora: bool = False
    dora: bool = False
    alora_invocation_tokens: tuple[int, ...] | None = None
    modules_to_save: tuple[str, ...] = ()
    exclude_modules: tuple[str, ...] = ()
    layers_to_transform: tuple[int, ...] | None = None
    text_only: bool = True

    @property
    def linear_only(self) -> str | None:
        """Why experts are left out although they are asked for by default: PEFT has neither form for parameters."""
        if self.dora:
            return "DoRA"
        return "activated LoRA" if self.alora_invocation_tokens else None

    @property
    def wanted(self) -> Wanted:
        """What models/targets.py resolves."""
        return Wanted(
            self.target_modules,
            self.target_parameters,
            self.target_linear,
            self.experts and not self.linear_only,
            self.exclude_modules,
            self.layers_to_transform,
            self.text_only,
        )

    def rank(self, name: str, expert: bool) -> int:
        """The rank of one layer or stack."""
        default = self.expert_r if expert and self.expert_r else self.r
        return int(_pattern(self.rank_pattern, name, default))

    def effective_alpha(self, name: str, expert: bool) -> float:
        """Its alpha; with `expert_r`, the one that keeps the scale of every other layer."""
        default = self.alpha
        if expert and self.expert_r and not _matched(self.rank_pattern, name):
            share = self.expert_r / self.r
            default *= math.sqrt(share) if self.rslora else share
        return float(_pattern(self.alpha_pattern, name, default))

    def scale(self, name: str, expert: bool) -> float:
        """alpha / r, or alpha / sqrt(r) for rank-stabilised LoRA."""
        r = self.rank(name, expert)
        return self.effective_alpha(name, expert) / (math.sqrt(r) if self.rslora else r)


def _matched(patterns: Mapping[str, Any], name: str) -> str | None:
    return next((p for p in patterns if re.match(rf"(.*\.)?({p})$", name)), None)


def _pattern(patterns: Mapping[str, Any], name: str, default: Any) -> Any:
    found = _matched(patterns, name)
    return default if found is None else patterns[found]


@dataclass(frozen=True)
class CoverageRow:
    """One family of layers: the same layer in every block of the model."""

    family: str
    count: int
    experts: int  # 0 for linear layers
    inputs: int
    outputs: int
    rank: int
    parameters: int


@dataclass(frozen=True)
class Coverage:
    """What an adapter covers; notes say what was left out and why."""

    rows: tuple[CoverageRow, ...]
    notes: tuple[str, ...]

    @property
    def parameters(self) -> int:
        """All trained numbers."""
        return sum(row.parameters for row in self.rows)

    def table(self) -> str:
        """Plain lines for a terminal or a log."""
        lines = [f"{'layers':<58} {'count':>5} {'shape':>22} {'rank':>4} {'parameters':>12}"]
        for row in self.rows:
            shape = f"{row.inputs} -> {row.outputs}" if row.rank else "whole"
            shape = f"{row.experts} x {shape}" if row.experts else shape
            lines.append(f"{row.family:<58} {row.count:>5} {shape:>22} {row.rank or '':>4} {row.parameters:>12,}")
        lines.append(f"{'all':<58} {'':>5} {'':>22} {'':>4} {self.parameters:>12,}")
        return "\n".join([*lines, *self.notes])


def attach(model: Any, spec: LoraSpec, seed: int, *, dtype: torch.dtype = torch.float32) -> Adapter:
    """Freeze the model and put an adapter on it that changes nothing yet; the same seed gives every factor the same first values."""
    if any(LORA in module._modules for module in model.modules()):
        raise AssertionError("this model already carries an adapter: detach it first")
    covered = cover(model, spec.wanted)
    stacks = {n for n, _ in expert_modules(model)}
    linears, notes = list(covered.linears), []
    if spec.linear_only and stacks:
        notes.append(f"experts are left out: PEFT knows {spec.linear_only} for linear layers only")
        # PEFT reads these names as experts when it loads an adapter of such a model, and has no other way to say them here
        linears = [n for n in linears if n.rpartition(".")[2] not in _CONFUSED_BY_PEFT]
    if covered.left_out:
        notes.append(
            f"left out, since their model reads the weight instead of calling the layer: {', '.join(covered.left_out)}"
        )
    if spec.dropout and covered.stacks:
        notes.append("lora_dropout acts on linear layers; experts have none")
    if not (linears or covered.stacks or spec.modules_to_save):
        raise ModelError("the adapter would cover nothing: name lora_target_modules, or set lora_target_linear: true")
    model.requires_grad_(False)
    saved = _modules_to_save(model, spec)
    adapter = Adapter(model, spec, Switch(), notes)
    make = _Maker(spec, seed, dtype, adapter.switch)
    for name in linears:
        if not any(name == s or name.startswith(f"{s}.") for s in saved):
            adapter._add_linear(name, make)
    for name, projection in covered.stacks:
        adapter._add_stack(name, projection, make)
    for name in saved:
        adapter._add_whole(name)
    adapter._begin()
    return adapter


@dataclass(frozen=True)
class _Maker:
    """Makes factors; the first values depend on the seed and the layer's name alone, not on the order of making."""

    spec: LoraSpec
    seed: int
    dtype: torch.dtype
    switch: Switch

    def factors(
        self, name: str, like: Any, sizes: tuple[int, ...], inputs: int, outputs: int, expert: bool
    ) -> tuple[Tensor, Tensor]:
        r, device = self.spec.rank(name, expert), like.device
        a, b = (
            torch.empty(*sizes, r, inputs, dtype=self.dtype, device=device),
            torch.zeros(*sizes, outputs, r, dtype=self.dtype, device=device),
        )
        if device.type != "meta":
            digest = hashlib.sha256(f"{self.seed}:{name}".encode()).digest()
            generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
            bound = 1 / math.sqrt(inputs)
            a.copy_(torch.empty(a.shape, dtype=torch.float32).uniform_(-bound, bound, generator=generator))
        return a, b


def _modules_to_save(model: nn.Module, spec: LoraSpec) -> list[str]:
    names = [n for n, _ in model.named_modules() if n]
    found = []
    for target in spec.modules_to_save:
        matched = [n for n in names if n == target or n.endswith(f".{target}")]
        if not matched:
            raise ModelError(f"modules_to_save {target!r} matches no module of this model")
        found += matched
    return [n for n in names if n in found]


class Adapter:
    """The trained part of a model: factors, and modules trained whole."""

    def __init__(self, model: Any, spec: LoraSpec, switch: Switch, notes: list[str]) -> None:
        self.model, self.spec, self.switch, self.notes = model, spec, switch, tuple(notes)
        self.linears: dict[str, LinearLora] = {}
        self.experts: dict[str, ExpertLora] = {}
        self.wholes: dict[str, dict[str, nn.Parameter]] = {}  # module -> the base's own parameters
        self.trained: dict[str, dict[str, nn.Parameter]] = {}  # module -> those that are trained in their place
        self.untouched: set[str] = set()  # names that no gradient has reached yet
        self.gathered: Mapping[str, Tensor] | None = (
            None  # all of what is trained, where the parameters are sharded and asked for
        )
        self.put: Callable[[Tensor, Tensor], object] = Tensor.copy_  # a whole tensor into a parameter
        self._implementation: Any = None
        self._hooks: list[Any] = []

    # ------------------------------------------------------------ building and taking away

    def _add_linear(self, name: str, make: _Maker) -> None:
        linear = self.model.get_submodule(name)
        a, b = make.factors(name, linear.weight, (), linear.in_features, linear.out_features, expert=False)
        lora = LinearLora(a, b, self.spec.scale(name, expert=False), self.spec.dropout, self.switch)
        if self.spec.dora:
            lora.magnitude = nn.Parameter(
                torch.linalg.vector_norm(dense_weight(linear), dim=1, dtype=torch.float32).to(make.dtype)
            )
        self.linears[name] = lora

    def _add_stack(self, name: str, projection: str, make: _Maker) -> None:
        module, full = self.model.get_submodule(name), f"{name}.{projection}"
        experts, inputs, outputs = stack_sizes(module, projection)
        a, b = make.factors(full, getattr(module, projection), (experts,), inputs, outputs, expert=True)
        self.experts.setdefault(name, ExpertLora(self.switch)).add(projection, a, b, self.spec.scale(full, expert=True))

    def _add_whole(self, name: str) -> None:
        self.wholes[name] = dict(self.model.get_submodule(name).named_parameters())
        self.trained[name] = {key: nn.Parameter(p.detach().clone()) for key, p in self.wholes[name].items()}

    def _begin(self) -> None:
        self.watch()
        self.reattach()

    def watch(self) -> None:
        """Notes from now on which of the parameters a gradient reaches; to be called again where others have taken their place."""
        for name, parameter in self.named_parameters().items():
            self.untouched.add(name)
            forget: Any = partial(self._touched, name)
            parameter.register_post_accumulate_grad_hook(forget)  # type: ignore[no-untyped-call]

    def _touched(self, name: str, parameter: Tensor) -> None:
        self.untouched.discard(name)

    def reattach(self) -> None:
        """The way back from `detach`."""
        for name, lora in self.linears.items():
            wrap(self.model.get_submodule(name), lora)
        for name, stack in self.experts.items():
            self.model.get_submodule(name).add_module(LORA, stack)
        self._place_wholes(self.trained)
        if self.experts:
            register_experts()
            self._implementation = self.model.get_experts_implementation()
            self.model.set_experts_implementation(NAME)
        if self.spec.alora_invocation_tokens:
            self._hooks = watch_invocations(self.model, self.switch, self.spec.alora_invocation_tokens)

    def detach(self) -> None:
        """The model as it was before `attach`, apart from `requires_grad`."""
        for name in self.linears:
            unwrap(self.model.get_submodule(name))
        for name in self.experts:
            del self.model.get_submodule(name)._modules[LORA]
        self._place_wholes(self.wholes)
        if self.experts:
            self.model.set_experts_implementation(self._implementation)
        for hook in self._hooks:
            hook.remove()
        self._hooks, self.switch.active = [], None

    def _place_wholes(self, parameters: Mapping[str, Mapping[str, nn.Parameter]]) -> None:
        for name, those in parameters.items():
            for key, parameter in those.items():
                owner, _, leaf = f"{name}.{key}".rpartition(".")
                self.model.get_submodule(owner)._parameters[leaf] = parameter

    @contextmanager
    def enabled(self, flag: bool) -> Iterator[None]:
        """Within it, `enabled(False)`, the model is its base."""
        before, self.switch.on = self.switch.on, flag
        self._place_wholes(self.trained if flag else self.wholes)
        try:
            yield
        finally:
            self.switch.on = before
            self._place_wholes(self.trained if before else self.wholes)

    # ------------------------------------------------------------ what it is made of

    def named_parameters(self) -> dict[str, nn.Parameter]:
        """Everything trained, by the name of its layer: ....q_proj.lora_A, ....experts.down_proj.lora_B, lm_head.weight."""
        named: dict[str, nn.Parameter] = {}
        for name, lora in self.linears.items():
            named[f"{name}.lora_A"], named[f"{name}.lora_B"] = lora.A, lora.B
            if lora.magnitude is not None:
                named[f"{name}.lora_magnitude_vector"] = lora.magnitude
        for name, stack in self.experts.items():
            for projection in stack.scales:
                named[f"{name}.{projection}.lora_A"] = getattr(stack, f"{projection}_A")
                named[f"{name}.{projection}.lora_B"] = getattr(stack, f"{projection}_B")
        for name, parameters in self.trained.items():
            named |= {f"{name}.{key}": p for key, p in parameters.items()}
        return named

    def parameters(self) -> list[nn.Parameter]:
        """Everything trained."""
        return list(self.named_parameters().values())

    def groups(self) -> dict[str, list[nn.Parameter]]:
        """The same by role: "A", "B" (with magnitudes; LoRA+ gives them a higher rate), "whole" (modules_to_save)."""
        groups: dict[str, list[nn.Parameter]] = {"A": [], "B": [], "whole": []}
        for name, parameter in self.named_parameters().items():
            role = {"lora_A": "A", "lora_B": "B", "lora_magnitude_vector": "B"}.get(name.rpartition(".")[2], "whole")
            groups[role].append(parameter)
        return groups

    def coverage(self) -> Coverage:
        """What is adapted, by family of layers."""
        rows = []
        for family, names in families(list(self.linears)):
            loras = [self.linears[n] for n in names]
            first, size = loras[0], sum(p.numel() for lora in loras for p in lora.parameters())
            rows.append(CoverageRow(family, len(names), 0, first.A.shape[1], first.B.shape[0], first.A.shape[0], size))
        stacks = {f"{n}.{p}": self.experts[n].factors_of(p) for n in self.experts for p in self.experts[n].scales}
        for family, names in families(list(stacks)):
            a, b = stacks[names[0]]
            size = sum(p.numel() for n in names for p in stacks[n])
            rows.append(CoverageRow(family, len(names), a.shape[0], a.shape[2], b.shape[1], a.shape[1], size))
        for name, parameters in self.trained.items():
            size = sum(p.numel() for p in parameters.values())
            rows.append(CoverageRow(name, 1, 0, 0, 0, 0, size))
        return Coverage(tuple(rows), self.notes)

    def state_dict(self) -> dict[str, Tensor]:
        """For checkpoints: everything trained, by name, as it lies in memory; all of it where it was `gathered`."""
        if self.gathered is not None:
            return dict(self.gathered)
        return {name: p.detach() for name, p in self.named_parameters().items()}

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """The way back in; names and shapes must be exactly these."""
        named = self.named_parameters()
        if named.keys() != state.keys():
            strange = sorted(named.keys() ^ state.keys())
            raise ModelError(f"this checkpoint is of another adapter: {strange[0]!r} and {len(strange) - 1} more names differ")
        for name, parameter in named.items():
            if parameter.shape != state[name].shape:
                raise ModelError(
                    f"{name} is {tuple(state[name].shape)} in the checkpoint and {tuple(parameter.shape)} here: another rank?"
                )
            self.put(parameter, state[name])

    # ------------------------------------------------------------ on disk

    def save(self, folder: Path) -> None:
        """Write adapter_model.safetensors and adapter_config.json as PEFT does; the folder appears whole or not at all."""
        adapter_folder.save(self, folder)

    def load(self, folder: Path) -> None:
        """Read the factors of a folder that `save` or PEFT wrote for the same targets and ranks."""
        adapter_folder.load(self, folder)
