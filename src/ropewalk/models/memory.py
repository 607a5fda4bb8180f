"""What a run will need before it starts, in bytes of one process, and what the device has."""

from __future__ import annotations

import os
import warnings
from collections.abc import Collection
from dataclasses import asdict, dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ropewalk.models.measure import measure
from ropewalk.models.quantized import to_quantise

# Bytes of optimizer state per byte or number of what is trained: states kept in the parameter's own type, or in a few bits.
STATES_LIKE_PARAMETERS = {"adamw_torch": 2, "adamw_torch_fused": 2, "adamw_hf": 2, "paged_adamw_32bit": 2, "sgd": 1}
STATES_IN_BYTES = {
    **dict.fromkeys(("adamw_8bit", "adamw_bnb_8bit", "adamw_torch_8bit", "ao_adamw_8bit", "paged_adamw_8bit"), 2 + 2 * 4 / 256),
    **dict.fromkeys(("adamw_torch_4bit", "ao_adamw_4bit"), 1 + 2 * 4 / 128),
    "adafactor": 0.05,
}
BYTES = {"nf4": 4.129 / 8, "int8": 1.0}
CONTEXT = 800_000_000  # what CUDA, its libraries and their workspaces take before anything of ours


@dataclass(frozen=True)
class Memory:
    """Bytes by what they are for."""

    weights: int
    adapter: int
    gradients: int
    optimizer: int
    activations: int  # with the logits of a chunk, and what the passes need for a moment
    workspace: int  # the device's own, and weights while they are dequantised

    @property
    def total(self) -> int:
        """The most that lives at once."""
        return sum(asdict(self).values())

    def as_dict(self) -> dict[str, int]:
        """By name, with the total."""
        return {**asdict(self), "total": self.total}


def estimate(
    model: PreTrainedModel,
    *,
    rows: int,
    tokens: int,
    dtype: torch.dtype = torch.bfloat16,
    quantize: str | None = None,
    adapter: Collection[Tensor] | None = None,
    optimizer: str = "adamw_torch_fused",
    recompute: str | None = None,
    on_gpu: bool = True,
    whole_logits: bool = False,
) -> Memory:
    """What training `model` takes over micro-batches of [rows, tokens]; adapter: its parameters, or None for full fine-tuning.

    The model lies on the meta device with its adapter attached, and is changed: its weights take on `dtype`.
    """
    ours = {id(parameter) for parameter in adapter or ()}
    base = {name: parameter for name, parameter in model.named_parameters() if id(parameter) not in ours}
    for parameter in base.values():
        if parameter.is_floating_point():
            parameter.data = parameter.data.to(dtype)
    trained = list(adapter) if adapter is not None else list(base.values())
    packed = set(to_quantise(model)) if quantize else set()
    weights = sum(_bytes(name, parameter, packed, quantize) for name, parameter in base.items())
    weights += sum(buffer.nbytes for buffer in model.buffers())
    unpacked = [parameter.nbytes for name, parameter in base.items() if name in packed]
    return Memory(
        weights=int(weights),
        adapter=0 if adapter is None else sum(parameter.nbytes for parameter in trained),
        gradients=sum(parameter.nbytes for parameter in trained),
        optimizer=int(sum(_states(parameter, optimizer) for parameter in trained)),
        activations=_activations(model, rows, tokens, recompute, on_gpu, whole_logits),
        workspace=(CONTEXT if on_gpu else 0) + sum(sorted(unpacked)[-2:]),  # an expert layer has two stacks at once
    )


def free(device: torch.device) -> int:
    """Bytes that a new allocation may take on the device now."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    with open("/proc/meminfo") if os.path.exists("/proc/meminfo") else open(os.devnull) as lines:
        for line in lines:
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _bytes(name: str, parameter: Tensor, packed: set[str], quantize: str | None) -> float:
    return parameter.numel() * BYTES[str(quantize)] if name in packed else parameter.nbytes


def _states(parameter: Tensor, optimizer: str) -> float:
    if optimizer in STATES_LIKE_PARAMETERS:
        return STATES_LIKE_PARAMETERS[optimizer] * parameter.nbytes
    return STATES_IN_BYTES[optimizer] * parameter.numel()


def _activations(
    model: PreTrainedModel, rows: int, tokens: int, recompute: str | None, on_gpu: bool, whole_logits: bool
) -> int:
    training = model.training
    model.train()
    try:
        if recompute:
            _recompute(model)
        peak = measure(model, rows, tokens, on_gpu=on_gpu, whole_logits=whole_logits)
        if recompute != "offload":
            return peak
        # Inputs of the layers wait on the host; one layer's own tensors remain.
        text = model.config.get_text_config()
        kept = int(text.num_hidden_layers * rows * tokens * text.hidden_size)
        return max(0, peak - kept * int(model.dtype.itemsize))
    finally:
        if recompute:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", FutureWarning)
                model.gradient_checkpointing_disable()
        model.train(training)


def _recompute(model: PreTrainedModel) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # renamed in newer transformers, where the old name still works
        model.gradient_checkpointing_enable({"use_reentrant": False})
