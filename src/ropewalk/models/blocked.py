"""A model that only answers, its weights arranged for the CPU it runs on."""

from __future__ import annotations

from torch import nn
from transformers import PreTrainedModel

from ropewalk.kernels.blocked import Blocked, BlockedLinear, pays
from ropewalk.models.quantized import replace, to_quantise


def arrange(model: PreTrainedModel) -> None:
    """Puts linear layers and experts in blocks where that is faster, one after another; each plain weight is let go."""
    names = to_quantise(model)
    head = next((name for name, module in model.named_modules() if module is model.get_output_embeddings()), None)
    if head is not None and type(model.get_submodule(head)) is nn.Linear:
        names.append(f"{head}.weight")  # where it is also the embedding, that one stays beside it
    for name in names:
        path, _, leaf = name.rpartition(".")
        module = model.get_submodule(path)
        weight = getattr(module, leaf)
        if pays(weight):
            replace(model, name, Blocked.of(weight, getattr(module, "is_transposed", False)), BlockedLinear)
