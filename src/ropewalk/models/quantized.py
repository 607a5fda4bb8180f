"""A base whose linear layers and experts are quantised while it loads, one tensor at a time.

This is an on-the-fly quantiser in transformers' own loading code: each tensor is read, renamed and stacked as any other, then
replaced by its quantised form before the next one is read. Embeddings, output head, routers, norms and biases stay as they are.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.core_model_loading import ConversionOps
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING, register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from ropewalk.errors import ConfigError
from ropewalk.kernels.quant import FORMATS, QuantLinear
from ropewalk.models.experts import expert_modules, projections
from ropewalk.models.targets import special, text_part

METHOD = "ropewalk"


class QuantisedLoading(QuantizationConfigMixin):  # type: ignore[misc]
    """Tells transformers to hand every tensor to us while it loads."""

    def __init__(self, format: str = "nf4", computed_on: str | None = None, **unused: Any) -> None:
        self.quant_method = METHOD
        self.format = format
        self.computed_on = computed_on  # the device that does the work, where it is not the one that the model comes to


class _Loader(HfQuantizer):  # type: ignore[misc]
    """transformers' view of the quantiser: which tensors, and what to do with one."""

    requires_calibration = False

    def param_needs_quantization(self, model: PreTrainedModel, param_name: str, **unused: Any) -> bool:
        if not hasattr(self, "names"):
            self.names = set(to_quantise(model))
        return param_name in self.names

    def get_quantize_ops(self) -> ConversionOps:
        return _Quantise(FORMATS[self.quantization_config.format], self.quantization_config.computed_on)

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **unused: Any) -> PreTrainedModel:
        # What transformers keeps of a quantiser concerns formats it can save; ours exists in memory only.
        self.remove_quantization_config(model)
        return model

    @property
    def is_trainable(self) -> bool:
        return True

    def is_serializable(self, **unused: Any) -> bool:
        return False


class _Quantise(ConversionOps):  # type: ignore[misc]
    def __init__(self, made: Any, computed_on: str | None) -> None:
        self.made, self.computed_on = made, computed_on

    def convert(
        self, input_dict: dict[str, Any], model: Any = None, missing_keys: set[str] | None = None, **unused: Any
    ) -> dict[str, Tensor]:
        for name, value in input_dict.items():
            tensor = value[0] if isinstance(value, list) else value
            there = tensor if self.computed_on is None else tensor.to(self.computed_on)
            replace(model, name, self.made.of(there).to(tensor.device))
            if missing_keys is not None:
                missing_keys.discard(name)
        return {}


def quantization(format: str, computed_on: str | None = None) -> QuantisedLoading:
    """What `from_pretrained(quantization_config=...)` needs to quantise to this format, each tensor on the device `computed_on`."""
    if format not in FORMATS:
        raise ConfigError(f"quantize '{format}' is unknown; one of {', '.join(FORMATS)}")
    if METHOD not in AUTO_QUANTIZER_MAPPING:
        register_quantization_config(METHOD)(QuantisedLoading)
        register_quantizer(METHOD)(_Loader)
    return QuantisedLoading(format, computed_on)


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


def _is_mamba(modules: dict[str, nn.Module], name: str) -> bool:
    return "mamba" in type(modules[name.rpartition(".")[0].rpartition(".")[0]]).__name__.lower()
