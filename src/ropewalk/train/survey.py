"""A base looked at without its weights: its shape, its size, and what an adapter will cover."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import PretrainedConfig, PreTrainedModel

from ropewalk.config.preference import REFERENCED
from ropewalk.config.run import Run
from ropewalk.errors import ModelError
from ropewalk.models.experts import expert_modules
from ropewalk.models.load import auto_class, load_config, override, pick_device
from ropewalk.models.lora import Adapter, Coverage, attach
from ropewalk.models.memory import estimate, free
from ropewalk.train.pupil import lora_spec, scored_by

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
    memory: dict[str, int]  # by purpose, with the total and what is free here


def survey(folder: Path, run: Run) -> Survey:
    """Builds the model on the meta device, where it takes no memory, and attaches the run's adapter to it."""
    config = override(load_config(folder, trust_remote_code=run.trust_remote_code), run.overrides_of_model_config or {})
    try:
        with torch.device("meta"):
            scored = scored_by(run)
            if scored is not None:
                config.num_labels, config.pad_token_id = scored.outputs, 0
            maker = scored.maker(config) if scored else auto_class(config)
            model = maker.from_config(config, trust_remote_code=run.trust_remote_code)
    except (ValueError, KeyError, ImportError, AttributeError) as error:
        raise ModelError(f"{folder}: no model can be built from its config.json: {str(error).splitlines()[0]}") from error
    text = config.get_text_config()
    total = sum(p.numel() for p in model.parameters())
    stacks = [module for _, module in expert_modules(model)]
    in_experts = sum(p.numel() for module in stacks for p in module.parameters())
    experts = max((p.shape[0] for module in stacks for p in module.parameters() if p.dim() == 3), default=0)
    chosen = _chosen(text.to_dict()) if experts else 0
    coverage = adapter = None
    if run.adapter is not None:
        adapter = attach(model, lora_spec(run, model), seed=run.seed)
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
        memory=_memory(model, adapter, run),
    )


def _memory(model: PreTrainedModel, adapter: Adapter | None, run: Run) -> dict[str, int]:
    """What one process will take: on a GPU where there is one, else on this machine's processor."""
    device = pick_device("auto")
    on_gpu = device.type == "cuda"
    name = run.dtype_name if run.dtype_name != "auto" else "bfloat16" if on_gpu else "float32"
    found = estimate(
        model,
        rows=run.micro_batch_size,
        tokens=run.sequence_len,
        dtype=getattr(torch, name),
        quantize=run.quantization,
        adapter=None if adapter is None else list(adapter.parameters()),
        optimizer=run.optimizer,
        recompute=run.recompute,
        on_gpu=on_gpu,
    )
    if run.adapter is None and run.rl in REFERENCED:
        found = replace(found, weights=2 * found.weights)  # the base, to compare with
    memory = {**found.as_dict(), "free": free(device)}
    if on_gpu and found.total > torch.cuda.get_device_properties(device).total_memory:
        raise ModelError(
            f"this run needs about {found.total / 2**30:.1f} GiB in every process, and the GPU has "
            f"{torch.cuda.get_device_properties(device).total_memory / 2**30:.1f} GiB; try adapter: qlora, "
            "gradient_checkpointing: true, a smaller sequence_len or micro_batch_size, or optimizer: adamw_torch_8bit"
        )
    return memory


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
