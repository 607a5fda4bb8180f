"""A base looked at without its weights: its shape, its size, and what an adapter will cover."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PretrainedConfig

from ropewalk.errors import ModelError
from ropewalk.models.experts import expert_modules
from ropewalk.models.load import load_config, override
from ropewalk.models.lora import Coverage, attach
from ropewalk.train.config import Run
from ropewalk.train.pupil import lora_spec

PER_TOKEN = ("num_experts_per_tok", "num_experts_per_token", "top_k_experts", "moe_top_k", "moe_topk", "moe_k", "top_k")


@dataclass(frozen=True)
class Survey:
    """What a base is and what of it will be trained."""

    config: PretrainedConfig
    model_type: str
    layers: int
    hidden: int
    experts: int  # 0: not a mixture
    experts_per_token: int
    parameters: int
    active: int  # parameters that one token meets
    coverage: Coverage | None  # None: every weight is trained
    trained: int
    memory: dict[str, int] | None = None


def survey(folder: Path, run: Run) -> Survey:
    """Builds the model on the meta device, where it takes no memory, and attaches the run's adapter to it."""
    config = override(load_config(folder, trust_remote_code=run.trust_remote_code), run.overrides_of_model_config or {})
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=run.trust_remote_code)
    except (ValueError, KeyError, ImportError, AttributeError) as error:
        raise ModelError(f"{folder}: no model can be built from its config.json: {str(error).splitlines()[0]}") from error
    text = config.get_text_config()
    total = sum(p.numel() for p in model.parameters())
    stacks = [module for _, module in expert_modules(model)]
    in_experts = sum(p.numel() for module in stacks for p in module.parameters())
    experts = max((p.shape[0] for module in stacks for p in module.parameters() if p.dim() == 3), default=0)
    chosen = _chosen(text.to_dict()) if experts else 0
    coverage = None
    if run.adapter is not None:
        adapter = attach(model, lora_spec(run), seed=run.seed)
        _patterns_match(run, [*adapter.linears, *(f"{n}.{p}" for n, lora in adapter.experts.items() for p in lora.scales)])
        coverage = adapter.coverage()
    return Survey(
        config=config,
        model_type=str(config.model_type),
        layers=int(getattr(text, "num_hidden_layers", 0)),
        hidden=int(getattr(text, "hidden_size", 0)),
        experts=experts,
        experts_per_token=chosen,
        parameters=total,
        active=total - in_experts + (in_experts * chosen // experts if chosen else in_experts),
        coverage=coverage,
        trained=total if coverage is None else coverage.parameters,
    )


def _patterns_match(run: Run, names: list[str]) -> None:
    """A pattern of ranks or alphas that reaches no adapted layer is an error: PEFT would pass over it in silence."""
    for key in ("lora_rank_pattern", "lora_alpha_pattern"):
        for pattern in getattr(run, key) or {}:
            if not any(re.match(rf"(.*\.)?({pattern})$", name) for name in names):
                raise ModelError(
                    f"{run.where(key, pattern)}key '{key}': '{pattern}' matches no adapted layer; a pattern reaches to the end of "
                    f"a name, as '{pattern}.*' does, of names such as {names[-1]}"
                )


def _chosen(text: dict[str, Any]) -> int:
    """Experts per token, by the names that configurations use; the least of them where layers differ."""
    found = next((text[name] for name in PER_TOKEN if text.get(name)), 0)
    return int(min(found) if isinstance(found, list) else found)
