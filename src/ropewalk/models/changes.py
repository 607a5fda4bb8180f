"""What a saved adapter changes: PEFT's folder -> for each parameter of the base, its new value.

Only keys and shapes are read at first; factors are read when a parameter's turn comes. Legend: E experts, r rank, in/out sizes.
"""

from __future__ import annotations

import json
import math
import re
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from ropewalk.errors import ModelError
from ropewalk.models.adapter_folder import CONFIG, WEIGHTS

_KEY = re.compile(r"(?P<module>.+?)\.lora_(?P<part>A|B|magnitude_vector|embedding_A|embedding_B)(\.weight)?")
_PREFIX = "base_model.model."


@dataclass(frozen=True)
class Change:
    """What happens to one parameter: factors A and B (and DoRA's magnitude), or a value that replaces it whole."""

    scale: float = 1.0
    experts: int = 0  # 0 for a matrix
    transposed: bool = False
    keys: dict[str, str] = field(default_factory=dict)  # "A", "B", "magnitude_vector" or "whole" -> key in the folder

    @property
    def needs_weight(self) -> bool:
        """Whether the new value is more than the old one plus something (DoRA)."""
        return "magnitude_vector" in self.keys


class Changes:
    """All changes of an adapter folder, by the full name of the parameter in the base."""

    def __init__(self, folder: Path, model: nn.Module) -> None:
        self.path = folder / WEIGHTS
        config_path = folder / CONFIG
        if not self.path.is_file() or not config_path.is_file():
            raise ModelError(f"{folder} is no adapter folder: expected {WEIGHTS} and {CONFIG} in it")
        self.config: dict[str, Any] = json.loads(config_path.read_text())
        _check_mergeable(folder, self.config)
        with safe_open(self.path, framework="pt") as file:
            keys = list(file.keys())
        self.by_parameter = self._resolve(folder, keys, model)

    def _resolve(self, folder: Path, keys: list[str], model: nn.Module) -> dict[str, Change]:
        modules: dict[str, dict[str, str]] = defaultdict(dict)
        changes: dict[str, Change] = {}
        parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
        for key in keys:
            name = key.removeprefix(_PREFIX)
            match = _KEY.fullmatch(name)
            if match is None:
                if name not in parameters:
                    raise UnknownParameter(f"{folder} changes '{name}', which this base does not have")
                changes[name] = Change(keys={"whole": key})
            elif match["part"].startswith("embedding"):
                raise ModelError(f"{folder}: LoRA on the embedding '{match['module']}' cannot be merged")
            else:
                modules[match["module"]][match["part"]] = key
        for module, parts in modules.items():
            parameter, experts, transposed = self._parameter(folder, module, model)
            changes[parameter] = Change(self._scale(parameter, parts, experts), experts, transposed, parts)
        return changes

    def _parameter(self, folder: Path, path: str, model: nn.Module) -> tuple[str, int, bool]:
        """The parameter that a module's keys mean: a layer's weight, or one of the stacks PEFT nests (the last is outermost)."""
        plain = re.sub(r"(\.base_layer)+$", "", path)
        depth = (len(path) - len(plain)) // len(".base_layer")
        try:
            module = model.get_submodule(plain)
        except AttributeError as error:
            raise UnknownParameter(f"{folder} adapts '{plain}', which this base does not have") from error
        if isinstance(module, nn.Linear):
            return f"{plain}.weight", 0, False
        wanted = self.config.get("target_parameters") or []
        names = [f"{plain}.{name}" for name, p in module.named_parameters(recurse=False) if p.dim() in (2, 3)]
        adapted = [name for name in names if any(name == t or name.endswith(f".{t}") for t in wanted)]
        if depth >= len(adapted):
            raise ModelError(f"{folder}: the keys of '{path}' are for no parameter that its target_parameters name")
        parameter = adapted[-1 - depth]
        shape = model.get_parameter(parameter).shape
        return parameter, shape[0] if len(shape) == 3 else 0, bool(getattr(module, "is_transposed", False))

    def _scale(self, parameter: str, parts: dict[str, str], experts: int) -> float:
        with safe_open(self.path, framework="pt") as file:
            rank = file.get_slice(parts["A"]).get_shape()[0] // max(1, experts)
        layer = parameter if experts else parameter.removesuffix(".weight")
        patterns: dict[str, float] = self.config.get("alpha_pattern") or {}
        found = next((p for p in patterns if re.match(rf"(.*\.)?({p})$", layer)), None)
        alpha = float(patterns[found] if found is not None else self.config["lora_alpha"])
        return alpha / (math.sqrt(rank) if self.config.get("use_rslora") else rank)

    def whole(self, parameter: str) -> Tensor | None:
        """The value that replaces the parameter, if it was trained whole."""
        key = self.by_parameter[parameter].keys.get("whole")
        return None if key is None else self._read(key)

    def delta(self, parameter: str) -> Tensor:
        """scale * B A in float32, in the parameter's own layout: [out, in], [E, out, in] or, transposed, [E, in, out]."""
        change = self.by_parameter[parameter]
        a, b = self._read(change.keys["A"]), self._read(change.keys["B"])
        if not change.experts:
            return change.scale * (b @ a)
        a = a.view(change.experts, -1, a.shape[1])  # on disk [E*r, in]: the expert slowest
        b = b.view(b.shape[0], -1, change.experts).permute(2, 0, 1)  # on disk [out, r*E]: the expert fastest
        delta = torch.bmm(b, a).mul_(change.scale)
        return delta.transpose(1, 2) if change.transposed else delta

    def with_magnitude(self, parameter: str, weight: Tensor) -> Tensor:
        """DoRA: the changed weight [out, in], each row brought to the length that was trained."""
        changed = weight.float() + self.delta(parameter)
        magnitude = self._read(self.by_parameter[parameter].keys["magnitude_vector"])
        factor: Tensor = magnitude / torch.linalg.vector_norm(changed, dim=1)
        return changed * factor.unsqueeze(1)

    def _read(self, key: str) -> Tensor:
        with safe_open(self.path, framework="pt") as file:
            tensor: Tensor = file.get_tensor(key)
        return tensor.float()


class UnknownParameter(ModelError):
    """The adapter is for another model, or for the whole of a multimodal one."""


def _check_mergeable(folder: Path, config: dict[str, Any]) -> None:
    if config.get("peft_type") != "LORA":
        raise ModelError(f"{folder} is a {config.get('peft_type')} adapter; only LoRA can be merged")
    if config.get("alora_invocation_tokens"):
        raise ModelError(
            f"{folder} is an activated LoRA: it acts only after its invocation tokens, which a merged weight cannot do; serve it "
            "as an adapter"
        )
    if config.get("fan_in_fan_out") or config.get("bias", "none") != "none":
        raise ModelError(f"{folder} was saved with bias or fan_in_fan_out, which cannot be merged")
