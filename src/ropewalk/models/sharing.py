"""A second module tree over the storage of a model: another adapter, another attention, another mode, and no second copy of a weight."""

from __future__ import annotations

import copy
from typing import Any

from torch import Tensor

from ropewalk.models.lora import Adapter, attach


def second_tree(model: Any, adapter: Adapter | None, seed: int = 0) -> tuple[Any, Adapter | None]:
    """The model again, every parameter and buffer of its base being the same tensor, and an adapter with factors of its own.

    Without an adapter all that is trained is shared too, so that a change of it is seen at once.
    """
    if adapter is not None:
        adapter.detach()  # what it has put into the modules is its own
    try:
        known: dict[int, Any] = {id(tensor): tensor for tensor in _tensors(model)}
        twin = copy.deepcopy(model, known)
    finally:
        if adapter is not None:
            adapter.reattach()
    if any(getattr(module, "gradient_checkpointing", False) for module in twin.modules()):
        twin.gradient_checkpointing_disable()
    twin.eval()
    if adapter is None:
        return twin, None
    dtype = next(iter(adapter.parameters())).dtype
    own = attach(twin, adapter.spec, seed, dtype=dtype)
    for parameter in own.parameters():
        parameter.requires_grad_(False)
    own.load_state_dict(adapter.state_dict())
    return twin, own


def _tensors(model: Any) -> list[Tensor]:
    return [*model.parameters(), *model.buffers()]
