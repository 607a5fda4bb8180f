"""The same weights under two names: as a model holds them in memory, and as its checkpoint holds them on disk.

A checkpoint may keep each expert in tensors of its own, fuse projections or prefix every name. transformers knows the way back
for each architecture; those steps only cut, stack and turn, so a difference of weights may go through them as well as a weight.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers.core_model_loading import revert_weight_conversion

from ropewalk.errors import ModelError
from ropewalk.models.folder import tensor_names


class Layout:
    """From names in memory to names on disk, for one folder."""

    def __init__(self, folder: Path, model: Any, prefixes: Mapping[str, str]) -> None:
        self.folder, self.model = folder, model
        self.outward = {here: there for there, here in prefixes.items()}
        self.names = set(tensor_names(folder))
        self.owners: dict[int, list[str]] = defaultdict(list)
        for name, parameter in model.named_parameters(remove_duplicate=False):
            self.owners[id(parameter)].append(name)

    def group(self, parameter: str) -> list[str]:
        """The parameters that lie in the same tensors on disk as this one: usually itself alone."""
        owners = self.owners[id(self.model.get_parameter(parameter))]
        if len(owners) > 1 and not self._is_embedding(parameter):
            raise SharedWeight(
                f"{self.folder}: '{owners[0]}' and '{owners[1]}' are one tensor, and a merge would change both; serve it as an "
                "adapter instead"
            )
        if self.on_disk({parameter: self._empty(parameter)}) is not None:
            return [parameter]
        block = parameter.rpartition(".")[0]
        while block:
            together = [name for name, _ in self.model.named_parameters() if name.startswith(f"{block}.")]
            if len(together) > 1 and self.on_disk({name: self._empty(name) for name in together}) is not None:
                return together
            block = block.rpartition(".")[0]
        raise ModelError(f"{self.folder}: no tensor in its files holds '{parameter}'{self._tied(parameter)}")

    def on_disk(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor] | None:
        """The tensors as the files hold them, or None if the files have no such tensors."""
        for candidate in (self._reverted, dict):
            try:
                converted = candidate(tensors)
            except (ValueError, KeyError, RuntimeError, IndexError, AttributeError):
                continue  # a step that needs the parameter's neighbours too
            for rename in (self._outward, self._without_prefix):
                renamed = {rename(name): tensor for name, tensor in converted.items()}
                if renamed.keys() <= self.names:
                    return renamed
        return None

    def _reverted(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return dict(revert_weight_conversion(self.model, dict(tensors)))

    def _outward(self, name: str) -> str:
        for here, there in self.outward.items():
            if name.startswith(here):
                return there + name.removeprefix(here)
        return name

    def _without_prefix(self, name: str) -> str:
        return name.removeprefix(f"{self.model.base_model_prefix}.")

    def _empty(self, parameter: str) -> Tensor:
        return torch.empty(self.model.get_parameter(parameter).shape, device="meta")

    def _is_embedding(self, parameter: str) -> bool:
        return self.model.get_parameter(parameter) is self.model.get_input_embeddings().weight

    def _tied(self, parameter: str) -> str:
        if self._is_embedding(parameter):
            return ": it shares the embedding's, and a merge would change both; serve it as an adapter instead"
        return ""


class SharedWeight(ModelError):
    """The adapter changes one of two layers that are one tensor on disk."""
