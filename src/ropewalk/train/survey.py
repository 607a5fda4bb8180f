"""A base looked at without its weights: its shape, its size, and what an adapter will cover."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForImageTextToText, PretrainedConfig, PreTrainedModel

from ropewalk.config.preference import compares_with_base
from ropewalk.config.run import Run
from ropewalk.config.vllm import by_server
from ropewalk.errors import ModelError
from ropewalk.kernels.branching import compiles
from ropewalk.kernels.triton_kernels import usable
from ropewalk.models.experts import expert_modules
from ropewalk.models.load import auto_class, load_config, override, pick_device
from ropewalk.models.lora import Adapter, Coverage, attach
from ropewalk.models.memory import Estimate, Memory, free
from ropewalk.models.norms import lean_norms
from ropewalk.models.recompute import Way
from ropewalk.models.rotary import lean_rotary
from ropewalk.models.stored import reader
from ropewalk.models.streaming import Part, Streaming
from ropewalk.train.branching import may_branch
from ropewalk.train.pupil import lora_spec, scored_by, slides_within
from ropewalk.train.questions import groups_of

FILLED = 0.95  # of the memory there is
SLOTS = 64  # completions that are written at once
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
    ways: tuple[Way, ...]  # what each layer keeps for the backward pass
    beside: int | None  # parameters beside the text part, of a run on pictures; None: they are not known here
    streaming: Streaming | None  # which weights wait on the host


def survey(folder: Path, run: Run, device: torch.device | None = None) -> Survey:
    """Builds the model on the meta device, where it takes no memory, and attaches the run's adapter to it."""
    config = override(load_config(folder, trust_remote_code=run.trust_remote_code), run.overrides_of_model_config or {})
    if not by_server(run):
        reader(folder, config)  # whether its weights can be read
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
    room = Room.of(run, device or pick_device("auto"))
    beside = _beside(folder, run, total)
    coverage = adapter = None
    if run.adapter is not None:
        adapter = attach(model, lora_spec(run, model), seed=run.seed, dtype=_factors(run, room))
        _patterns_match(run, [*adapter.linears, *(f"{n}.{p}" for n, lora in adapter.experts.items() for p in lora.scales)])
        coverage = adapter.coverage()
    lean_norms(model)  # as it will be in training
    lean_rotary(model)
    memory, ways, streaming = _memory(model, adapter, run, room, beside or 0)
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
        memory={**memory.as_dict(), "planned" if room.planned else "free": room.bytes},
        ways=ways,
        beside=beside,
        streaming=streaming,
    )


@dataclass(frozen=True)
class Room:
    """What one process may take, and where."""

    bytes: int
    on_gpu: bool
    planned: bool  # for a GPU that need not be this machine's

    @classmethod
    def of(cls, run: Run, device: torch.device) -> Room:
        """The room for a run: as much as it says, or what is free here; a little is left over, since memory falls to pieces."""
        there = free(device)
        if run.gpu_memory_limit is not None:
            limit = int(run.gpu_memory_limit * 1e9)
            there = min(there, limit) if device.type == "cuda" else limit
        return cls(
            int(there * FILLED), device.type == "cuda" or run.gpu_memory_limit is not None, run.gpu_memory_limit is not None
        )


def _memory(
    model: PreTrainedModel, adapter: Adapter | None, run: Run, room: Room, beside: int
) -> tuple[Memory, tuple[Way, ...], Streaming | None]:
    """What one process will take, the way of every layer, and what is streamed: on a GPU where there or planned for one, else here."""
    asked = run.recompute
    found = Estimate(
        model,
        rows=run.micro_batch_size,
        tokens=run.sequence_len,
        dtype=_computed(run, room),
        quantize=run.quantization,
        adapter=None if adapter is None else list(adapter.parameters()),
        optimizer=run.moved_by,
        on_gpu=room.on_gpu,
        accumulates=run.accumulation > 1,
        master=run.float32_master,
        in_backward=run.step_in_backward,
        slots=_slots(run),
        fused=room.on_gpu and (room.planned or usable(torch.device("cuda"))),
        packed=run.packing and room.on_gpu,  # on a CPU packed samples are kept apart without a mask
        spans=_spans(model, run, room),
    )
    if run.adapter is None and compares_with_base(run):
        found.weights *= 2  # the base, to compare with
    found.weights += beside * model.dtype.itemsize
    if (processes := sharing(run)) > 1:
        found.share(processes, on_host=run.fsdp_config is not None and run.fsdp_config.offload_params)
    for streaming in _streamings(run, found, room):
        ways = found.fill(room.bytes, streaming) if asked == "auto" else (asked,) * found.layers
        memory = found.of(ways, streaming)
        if memory.total <= room.bytes:
            break
    if streaming is not None and memory.total <= room.bytes:
        streaming = found.ahead(streaming.part, room.bytes, ways)
        memory = found.of(ways, streaming)
    if room.on_gpu and memory.total > room.bytes:
        raise ModelError(
            f"this run needs about {memory.total / 1e9:.1f} GB in every process, and {room.bytes / 1e9:.1f} GB of the GPU can be filled; "
            f"{_way_out(found, memory, run, ways)}"
        )
    return memory, ways, streaming


def _spans(model: PreTrainedModel, run: Run, room: Room) -> bool:
    """Whether attention goes by spans, without masks, as far as can be told before a model is loaded."""
    runs = not room.on_gpu or room.planned or compiles()
    apart = run.packing or slides_within(model, run.sequence_len)
    return bool(runs and apart and not run.attention and sharing(run) == 1 and scored_by(run) is None and may_branch(model))


def sharing(run: Run) -> int:
    """How many processes the weights are sharded over, as far as it is known here."""
    return int(os.environ.get("WORLD_SIZE", run.dp_shard_size or 1)) if run.sharded else 1


def _streamings(run: Run, found: Estimate, room: Room) -> list[Streaming | None]:
    """What may be streamed, from nothing on."""
    asked = run.weights_on_host
    if asked != "auto":
        return [None if asked == "off" else Streaming(asked)]
    parts: tuple[Part, ...] = ("experts", "layers") if room.on_gpu else ()
    return [None, *(Streaming(part) for part in parts if any(found.waiting(part)))]


def _computed(run: Run, room: Room) -> torch.dtype:
    """The type of the base and of what is computed."""
    name = run.dtype_name if run.dtype_name != "auto" else "bfloat16" if room.on_gpu else "float32"
    found: torch.dtype = getattr(torch, name)
    return found


def _factors(run: Run, room: Room) -> torch.dtype:
    """The type of the adapter."""
    return torch.float32 if run.peft_autocast_adapter_dtype else _computed(run, room)


def _beside(folder: Path, run: Run, text: int) -> int | None:
    """Parameters of the whole model that its text part has not; None where the folder tells of the text part alone."""
    if not run.sees:
        return 0
    config = load_config(folder, trust_remote_code=run.trust_remote_code, whole=True)
    if getattr(config, "vision_config", None) is None:
        return None
    with torch.device("meta"):
        whole = AutoModelForImageTextToText.from_config(config, trust_remote_code=run.trust_remote_code)
    parameters: int = sum(p.numel() for p in whole.parameters())
    return max(0, parameters - text)


def _slots(run: Run) -> int:
    """Tokens whose keys and values are kept for completions that are being written."""
    if not run.by_rewards or run.trl is None or by_server(run):
        return 0
    return min(SLOTS, groups_of(run) * run.trl.num_generations) * run.sequence_len


def _way_out(found: Estimate, memory: Memory, run: Run, ways: Sequence[Way]) -> str:
    """Keys that make a run smaller, each with what it would need then."""
    saved: dict[str, int] = {}
    if run.recompute != "auto" and found.layers:
        saved["gradient_checkpointing: true"] = memory.total - found.of("layer").total
    eighth = found.adapter // 4 * 2 if run.adapter else found.gradients // 2
    saved["optimizer: adamw_torch_8bit"] = memory.optimizer - eighth
    if run.adapter is not None and run.quantization not in ("nf4", "int4"):
        saved["adapter: qlora"] = memory.weights - found.quantised("nf4")
    if run.weights_on_host == "off" and run.adapter is not None and not run.sharded and not run.by_rewards:
        for part in ("experts", "layers"):
            if any(found.waiting(part)):
                saved[f"stream_weights: {part}"] = memory.total - found.of(ways, Streaming(part)).total
    if run.adapter is not None and run.rank > 1:
        saved[f"lora_r: {max(1, run.rank // 4)}"] = (memory.adapter + memory.gradients + memory.optimizer) * 3 // 4
    saved["half of sequence_len"] = memory.activations // 2
    saved = {key: less for key, less in saved.items() if less > 0.01 * memory.total}
    return "change one of these, or several: " + ", ".join(
        f"{key} (then about {(memory.total - less) / 1e9:.1f} GB)"
        for key, less in sorted(saved.items(), key=lambda item: -item[1])
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
