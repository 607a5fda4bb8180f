"""A model under training that also sees: its text part learns, and all else of it stays as it is.

The tower is no part of what is recomputed, sharded or saved: what it makes of a picture is constant, so no gradient goes there.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ropewalk.errors import ModelError
from ropewalk.models.head import Head
from ropewalk.models.lens import Lens, looks_at
from ropewalk.models.seeing import text_part

TYPES = ("mm_token_type_ids", "token_type_ids")  # what models call the kinds of ids


class Sighted:
    """The whole of a model, around its text part."""

    def __init__(self, whole: PreTrainedModel, lens: Lens, device: torch.device) -> None:
        if not hasattr(whole, "get_image_features"):
            raise ModelError(
                f"a {whole.config.model_type} takes pictures in a way that is not known here; train it on text alone"
            )
        self.whole, self.lens = whole, lens
        self.text: PreTrainedModel = text_part(whole)
        self._takes = looks_at(whole)
        self._asks = set(inspect.signature(whole.forward).parameters)
        inside = {id(module) for module in whole.get_decoder().modules()}
        self._still = [module for module in whole.modules() if id(module) not in inside and module is not whole]
        for module in self._still:  # where layers wait on the host, all else is at hand
            for tensors in (module._parameters, module._buffers):
                for tensor in tensors.values():
                    if tensor is not None:
                        tensor.data = tensor.data.to(device)

    @property
    def frozen(self) -> int:
        """Parameters beside those of the text part."""
        text = {id(parameter) for parameter in self.text.parameters()}
        others = {id(p): p.numel() for p in self.whole.parameters() if id(p) not in text}
        if self.text is self.whole:
            others = {id(p): p.numel() for module in self._still for p in module.parameters(recurse=False)}
        return sum(others.values())

    def train(self, training: bool) -> None:
        """Sets the mode of the text part; the rest is never in training."""
        self.text.train(training)
        self.whole.training = training  # asked for losses of its routers
        for module in self._still:
            module.training = False

    def loss(self, head: Head, ids: Tensor, labels: Tensor, seen: Mapping[str, Tensor]) -> Tensor:
        """Summed loss over the trained tokens of [B, T], a row to a line; `seen`: what the tower is given of their pictures."""
        types = self.lens.types(ids)
        extra: dict[str, Any] = {name: types for name in TYPES if name in self._asks}
        for name, value in seen.items():
            if name in self._takes:
                value = value.to(ids.device)
                extra[name] = value.to(self.whole.dtype) if value.is_floating_point() else value
        loss, _ = head.loss(self.whole, ids, labels, None, **extra)
        return loss
