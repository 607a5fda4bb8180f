"""A base whose linear layers and experts are quantised while it loads, one tensor at a time.

This is an on-the-fly quantiser in transformers' own loading code: each tensor is read, renamed and stacked as any other, then
replaced by its quantised form before the next one is read. Embeddings, output head, routers, norms and biases stay as they are.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.core_model_loading import ConversionOps, WeightConverter
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING, register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from ropewalk.errors import ConfigError
from ropewalk.kernels.quant import FORMATS, QuantLinear
from ropewalk.models.experts import expert_modules, projections
from ropewalk.models.host_memory import USUAL, give_back
from ropewalk.models.targets import special, text_part

METHOD = "ropewalk"

Wanted = Callable[[Any, str], bool]  # (model, name of a parameter)


@dataclass(frozen=True)
class Share:
    """The part of every weight that a process will keep, by models/sharded.py: of the others it need not hold what they hold."""

    rank: int
    size: int

    def of(self, weight: Tensor) -> Tensor:
        """A tensor of the same shape with the rows that are kept; the rest is memory that is never touched, and so never taken."""
        dim = 0 if weight.shape[0] >= self.size else 1
        if weight.dim() <= dim or weight.shape[dim] % self.size * dim:
            return weight
        rows = -(-weight.shape[dim] // self.size)
        first = min(rows * self.rank, weight.shape[dim])
        mine = slice(first, first + rows) if dim == 0 else (slice(None), slice(first, first + rows))
        made = torch.empty_like(weight)
        made[mine] = weight[mine]
        return made


class QuantisedLoading(QuantizationConfigMixin):  # type: ignore[misc]
    """Tells transformers to hand every tensor to us while it loads."""

    def __init__(
        self,
        format: str | None = "nf4",
        computed_on: str | None = None,
        share: Share | None = None,
        stored: HfQuantizer | None = None,
        **unused: Any,
    ) -> None:
        self.quant_method = METHOD
        self.stored = stored  # what reads weights that the checkpoint keeps in few bits itself
        self.format = format  # None: weights stay what they are
        self.share = share
        self.computed_on = computed_on  # the device that does the work, where it is not the one that the model comes to


class _Loader(HfQuantizer):  # type: ignore[misc]
    """transformers' view of the quantiser: which tensors, and what to do with one."""

    requires_calibration = False

    def __init__(self, quantization_config: QuantisedLoading, **more: Any) -> None:
        super().__init__(quantization_config, **more)
        # Or transformers would turn codes into numbers of the model's type before anybody has read them.
        self.pre_quantized = quantization_config.stored is not None

    def update_weight_conversions(self, weight_conversions: list[Any], *model: Any) -> list[Any]:
        """The steps by which tensors are read; those of a checkpoint in few bits end with ours, which nobody else would call."""
        stored = self.quantization_config.stored
        if stored is None:
            return list(super().update_weight_conversions(weight_conversions, *model))
        steps = list(stored.update_weight_conversions(weight_conversions, *model))
        if not any(list(step.target_patterns) == ["weight"] for step in steps):  # for weights that no step is about
            steps.append(WeightConverter("weight$", "weight", [_AsItIs()]))
        for step in steps:
            if isinstance(step, WeightConverter):
                step.quantization_operation = self.get_quantize_ops()
        return steps

    def param_needs_quantization(self, model: PreTrainedModel, param_name: str, **unused: Any) -> bool:
        if not hasattr(self, "names"):
            self.names = set(to_quantise(model))
            self.names |= {other for name in self.names for other in _tied_to(model, name)}
        return param_name in self.names

    def get_quantize_ops(self) -> ConversionOps:
        asked = self.quantization_config
        made = None if asked.format is None else FORMATS[asked.format]
        return _Quantise(made, asked.computed_on, asked.share, self.param_needs_quantization if self.pre_quantized else None)

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **unused: Any) -> PreTrainedModel:
        # What transformers keeps of a quantiser concerns formats it can save; ours exists in memory only.
        self.remove_quantization_config(model)
        if self.pre_quantized:
            del model._weight_conversions  # the way back to few bits, which nobody goes: saved, it is a plain checkpoint
        give_back(USUAL)
        return model

    @property
    def is_trainable(self) -> bool:
        return True

    def is_serializable(self, **unused: Any) -> bool:
        return False


class _Quantise(ConversionOps):  # type: ignore[misc]
    def __init__(self, made: Any, computed_on: str | None, share: Share | None, wanted: Wanted | None) -> None:
        self.made, self.computed_on, self.share, self.wanted = made, computed_on, share, wanted
        give_back()

    def convert(
        self, input_dict: dict[str, Any], model: Any = None, missing_keys: set[str] | None = None, **unused: Any
    ) -> dict[str, Tensor]:
        plain = {}
        for name, value in input_dict.items():
            tensor = (value[0] if isinstance(value, list) else value).detach()  # some steps make parameters
            if self.wanted is not None and tensor.is_floating_point():
                tensor = tensor.to(model.get_parameter_or_buffer(name).dtype)
            untouched = self.wanted is not None and not self.wanted(model, name)
            if untouched or self.made is None:
                plain[name] = tensor if untouched or self.share is None else self.share.of(tensor)
                continue
            there = tensor if self.computed_on is None else tensor.to(self.computed_on)
            made = self.made.of(there).to(tensor.device)
            if self.share is not None:
                for part, codes in list(made.named_buffers(recurse=False)):
                    setattr(made, part, self.share.of(codes))
            for each in (name, *_tied_to(model, name)):
                replace(model, each, made)
                if missing_keys is not None:
                    missing_keys.discard(each)
                model.all_tied_weights_keys.pop(each, None)  # transformers ties parameters only
        return plain


class _AsItIs(ConversionOps):  # type: ignore[misc]
    """No step: for tensors that are read as they are."""

    def convert(self, input_dict: dict[str, Any], full_layer_name: str = "", **unused: Any) -> dict[str, Any]:
        (value,) = input_dict.values()
        return {full_layer_name: value}


def quantization(
    format: str | None, computed_on: str | None = None, share: Share | None = None, stored: HfQuantizer | None = None
) -> QuantisedLoading:
    """What `from_pretrained(quantization_config=...)` needs to quantise to this format, each tensor on the device `computed_on`.

    With a `share` only that of each weight is kept; without a format it is kept as it is. `stored` (models/stored.py) reads what the
    checkpoint itself keeps in few bits.
    """
    if format is not None and format not in FORMATS:
        raise ConfigError(f"quantize '{format}' is unknown; one of {', '.join(FORMATS)}")
    if METHOD not in AUTO_QUANTIZER_MAPPING:
        register_quantization_config(METHOD)(QuantisedLoading)
        register_quantizer(METHOD)(_Loader)
    return QuantisedLoading(format, computed_on, share, stored)


def to_quantise(model: PreTrainedModel) -> list[str]:
    """The full names of the parameters to quantise: the weights of linear layers and the stacks of experts."""
    modules = dict(model.named_modules())
    apart = set(special(model, modules))
    text = text_part(model)  # what sees or hears stays as it is
    inside = [(name, module) for name, module in modules.items() if not text or name.startswith(f"{text}.")]
    linears = [f"{name}.weight" for name, module in inside if type(module) is nn.Linear and name not in apart]
    # A state-space mixer's fused kernel reads the weight of its last projection itself and does not call the layer.
    linears = [name for name in linears if not (name.endswith("out_proj.weight") and _is_mamba(modules, name))]
    stacks = [f"{name}.{projection}" for name, module in expert_modules(model) for projection in projections(module)]
    return linears + stacks


def replace(model: nn.Module, name: str, quantised: Any, linear: type[QuantLinear] = QuantLinear) -> None:
    """Put the quantised weight where the parameter `name` was; a linear layer becomes one of this kind."""
    path, _, leaf = name.rpartition(".")
    module = model.get_submodule(path)
    if isinstance(module, nn.Linear):
        parent, _, child = path.rpartition(".")
        layer = linear(quantised)
        if module.bias is not None:
            layer.bias = module.bias  # loaded later, in place of the same parameter
        layer.train(module.training)
        setattr(model.get_submodule(parent), child, layer)
        module = layer
    else:
        del module._parameters[leaf]
        module.add_module(leaf, quantised)
    for filled in (module, quantised):
        filled._is_hf_initialized = True  # or transformers would fill them with random numbers at the end of loading


def _tied_to(model: PreTrainedModel, name: str) -> list[str]:
    """The other names of a parameter, as those of an encoder that shares all its decoder's layers."""
    tied: dict[str, str] = model.all_tied_weights_keys
    source = tied.get(name, name)
    return [other for other in (source, *(target for target, its in tied.items() if its == source)) if other != name]


def _is_mamba(modules: dict[str, nn.Module], name: str) -> bool:
    return "mamba" in type(modules[name.rpartition(".")[0].rpartition(".")[0]]).__name__.lower()
