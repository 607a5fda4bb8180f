"""What a run will need before it starts, in bytes of one process, and what the device has."""

from __future__ import annotations

import os
from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ropewalk.kernels.eight_bits import BLOCK, SMALL
from ropewalk.models.experts import expert_modules
from ropewalk.models.measure import Courses, Situation
from ropewalk.models.quantized import to_quantise
from ropewalk.models.recompute import WAYS, Way, decoder_layers
from ropewalk.models.streaming import SLOTS, Part, Streaming, aligned, streamed

# Bytes of optimizer state per byte or number of what is trained: states kept in the parameter's own type, or in a few bits.
STATES_LIKE_PARAMETERS = {"adamw_torch": 2, "adamw_torch_fused": 2, "adamw_hf": 2, "paged_adamw_32bit": 2, "sgd": 1}
STATES_IN_BYTES = {
    **dict.fromkeys(("adamw_8bit", "adamw_bnb_8bit", "adamw_torch_8bit", "paged_adamw_8bit"), 2 + 2 * 4 / BLOCK),
    "adamw_torch_4bit": 1 + 2 * 4 / 128,
    "adafactor": 0.05,
}
BYTES = {"nf4": 4.129 / 8, "int4": 4.258 / 8, "int8": 1.0}
AT_ONCE = 2**26  # bytes of gradients that are worth a step while the backward pass runs
BUFFERS = 4 * 4 * 2**22  # what 8-bit AdamW passes its pieces through on a GPU
CONTEXT = 800_000_000  # what CUDA, its libraries and their workspaces take before anything of ours


@dataclass(frozen=True)
class Memory:
    """Bytes by what they are for."""

    weights: int
    adapter: int
    gradients: int
    optimizer: int
    activations: (
        int  # with the logits of a chunk, and what the passes need for a moment, experts while they are dequantised among it
    )
    workspace: int  # the device's own, and a matrix while it is dequantised
    generator: int = 0  # keys and values of what is being written, where a model learns by rewards
    host: int = 0  # in the host's memory, and not in the total: weights that are streamed, inputs of layers that wait there

    @property
    def total(self) -> int:
        """The most that lives on the device at once."""
        return int(sum(asdict(self).values())) - self.host

    def as_dict(self) -> dict[str, int]:
        """By name, with the total."""
        return {**asdict(self), "total": self.total}


class Estimate:
    """What training a model takes over micro-batches of [rows, tokens], for any ways of its layers.

    The model lies on the meta device with its adapter attached, and is changed: its weights take on `dtype`. adapter: its parameters, or
    None for full fine-tuning. accumulates: whether gradients are there before a pass begins. master: whether the optimizer holds what is
    trained in 16 bits in float32 too. in_backward: whether gradients are used, and gone, as soon as they have come. fused: whether
    Triton's kernels run, as on a GPU they do if nothing is said. packed: whether a mask keeps samples apart; spans: whether attention goes
    by spans, without masks.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        rows: int,
        tokens: int,
        dtype: torch.dtype = torch.bfloat16,
        quantize: str | None = None,
        adapter: Collection[Tensor] | None = None,
        optimizer: str = "adamw_torch_fused",
        on_gpu: bool = True,
        accumulates: bool = True,
        master: bool = False,
        in_backward: bool = False,
        slots: int = 0,
        fused: bool | None = None,
        packed: bool = False,
        spans: bool = False,
    ) -> None:
        ours = {id(parameter) for parameter in adapter or ()}
        base = {name: parameter for name, parameter in model.named_parameters() if id(parameter) not in ours}
        for parameter in base.values():
            if parameter.is_floating_point():
                parameter.data = parameter.data.to(dtype)
        trained = list(adapter) if adapter is not None else list(base.values())
        few_bits = set(to_quantise(model)) if quantize else set()
        self._model, self._base, self._few_bits, self._quantize = model, base, few_bits, quantize
        self._waiting: dict[Part, list[int]] = {}
        self._input = rows * tokens * int(model.config.get_text_config().hidden_size) * dtype.itemsize
        self.weights = self.quantised(quantize)
        self.adapter = 0 if adapter is None else sum(parameter.nbytes for parameter in trained)
        self.gradients = sum(parameter.nbytes for parameter in trained)
        self.optimizer = int(sum(_states(parameter, optimizer, master) for parameter in trained))
        self.context = CONTEXT if on_gpu else 0
        if in_backward:  # they live beside all that the pass takes
            self.gradients = min(self.gradients, AT_ONCE + max(parameter.nbytes for parameter in trained))
            self.context += BUFFERS if on_gpu and optimizer in STATES_IN_BYTES else 0
            accumulates = True
        self.generator = slots * _keys_and_values(model) if slots else 0
        self.on_gpu, self.accumulates = on_gpu, accumulates
        layers = decoder_layers(model)
        self.layers = len(layers)
        names = {id(parameter): name for name, parameter in base.items()}
        taught = {id(parameter) for parameter in trained}
        self._passing = [_dequantised([p for p in layer.parameters() if names.get(id(p)) in few_bits]) for layer in layers]
        self._grown = [sum(p.nbytes for p in layer.parameters() if id(p) in taught) for layer in layers]
        self.experts = any(True for _ in expert_modules(model))
        stored = frozenset(id(parameter) for name, parameter in base.items() if name in few_bits)
        fused = on_gpu if fused is None else fused
        self._courses = Courses(model, rows, tokens, Situation(on_gpu, fused, packed, spans, stored))

    def quantised(self, quantize: str | None) -> int:
        """The bytes of the base held in this format."""
        packed = set(to_quantise(self._model)) if quantize else set()
        held = sum(_bytes(name, parameter, packed, quantize) for name, parameter in self._base.items())
        return int(held + sum(buffer.nbytes for buffer in self._model.buffers()))

    def share(self, processes: int, *, on_host: bool = False) -> None:
        """From now on it is divided by so many processes, but for what is gathered at a time: two layers, and what is around them."""
        names = {id(parameter): name for name, parameter in self._base.items()}
        layers = [
            sum(_bytes(names[id(p)], p, self._few_bits, self._quantize) for p in layer.parameters() if id(p) in names)
            for layer in decoder_layers(self._model)
        ]
        gathered = int(self.weights - sum(layers) + 2 * max(layers, default=0))
        self.weights = gathered + (0 if on_host else -(-self.weights // processes))
        self.adapter, self.gradients, self.optimizer = (
            0 if on_host else -(-size // processes) for size in (self.adapter, self.gradients, self.optimizer)
        )

    def waiting(self, part: Part) -> list[int]:
        """For each layer the bytes that wait on the host where this part is streamed."""
        if part not in self._waiting:
            sizes = (
                sum(aligned(_bytes(n, p, self._few_bits, self._quantize)) for n, p in tensors.items())
                for tensors in streamed(self._model, part)
            )
            self._waiting[part] = list(sizes)
        return self._waiting[part]

    def possible(self, way: Way) -> bool:
        """Whether a way saves anything in this model, on this device."""
        return way == "keep" or bool(self.layers and (self.experts or way != "experts") and (self.on_gpu or way != "offload"))

    def of(self, ways: Sequence[Way] | Way, streaming: Streaming | None = None) -> Memory:
        """The bytes for these ways of the layers, or one for all; a way that saves nothing here is taken for the one before it."""
        each = [ways] * self.layers if isinstance(ways, str) else list(ways)
        known = [next(w for w in reversed(WAYS[: WAYS.index(way) + 1]) if self.possible(w)) for way in each]
        with_experts, without = (
            self._courses.peak(known, gradients=self._grown, there=self.accumulates, passing=passing)
            for passing in (self._passing, ())
        )
        # Gradients that come one by one take the place of what layers had kept.
        later = 0 if self.accumulates else self.gradients
        waits = self.waiting(streaming.part) if streaming else [0]
        ring = max(waits, default=0) * (streaming.slots if streaming else 0)
        return Memory(
            weights=self.weights - sum(waits) + ring,
            adapter=self.adapter,
            gradients=self.gradients,
            optimizer=self.optimizer,
            activations=max(0, without - later),
            workspace=self.context + max(0, with_experts - max(without, later)),
            generator=self.generator,
            host=sum(waits) + known.count("offload") * self._input,
        )

    def ahead(self, part: Part, room: int, ways: Sequence[Way]) -> Streaming:
        """With a buffer more than must be, where there is room for it."""
        ahead = Streaming(part, SLOTS + 1)
        return ahead if self.of(ways, ahead).total <= room else Streaming(part)

    def fill(self, room: int, streaming: Streaming | None = None) -> tuple[Way, ...]:
        """The fastest ways that need no more than `room`, or the leanest where none does.

        The last layers are the first to keep more: what they keep is gone before the others' gradients have come.
        """
        order = [way for way in WAYS if self.possible(way)]
        for faster, leaner in pairwise(order):
            if self.of(leaner, streaming).total > room:
                continue  # and the faster is not even measured
            if self.of(faster, streaming).total <= room:
                return (faster,) * self.layers
            low, high = 0, self.layers - 1  # how many of the last layers keep more
            while low < high:
                middle = (low + high + 1) // 2
                if self.of(self._mixed(leaner, faster, middle), streaming).total <= room:
                    low = middle
                else:
                    high = middle - 1
            return self._mixed(leaner, faster, low)
        return (order[-1],) * self.layers

    def _mixed(self, leaner: Way, faster: Way, last: int) -> tuple[Way, ...]:
        return (leaner,) * (self.layers - last) + (faster,) * last


def estimate(model: PreTrainedModel, *, recompute: Way = "keep", **options: Any) -> Memory:
    """What training takes where every layer goes the same way; options as of Estimate."""
    return Estimate(model, **options).of(recompute)


def _dequantised(weights: Sequence[Tensor]) -> int:
    """What a matrix takes while it is dequantised, the largest of a layer; its experts are measured where they pass."""
    return max((p.nbytes for p in weights if p.dim() < 3), default=0)


def _keys_and_values(model: PreTrainedModel) -> int:
    """Bytes that a written token leaves in the generator's cache."""
    names = ("k_proj", "v_proj", "qkv_proj")
    linears = [(n.rpartition(".")[2], m) for n, m in model.named_modules() if isinstance(m, nn.Linear)]
    return int(sum(m.out_features * m.weight.itemsize for n, m in linears if n in names))


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


def _states(parameter: Tensor, optimizer: str, master: bool) -> float:
    size, held = parameter.numel(), 4 * parameter.numel() if master and parameter.itemsize == 2 else 0
    if optimizer in STATES_LIKE_PARAMETERS:
        return STATES_LIKE_PARAMETERS[optimizer] * (4 * size if held else parameter.nbytes) + held
    if optimizer == "muon":  # momentum for matrices, AdamW for the rest
        return (1 if parameter.dim() == 2 else 2) * parameter.nbytes
    if "8bit" in optimizer and size < SMALL:
        return 8 * size + held
    return STATES_IN_BYTES[optimizer] * size + held
