"""One forward pass over the ids of several requests."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ropewalk.engine.attention import NAME, register, running
from ropewalk.engine.cache import Batch, Layout, Part, Reading, per_request

_RUNS = "_ropewalk_runner"


class Runner:
    """A model whose every call serves several requests."""

    def __init__(self, model: Any) -> None:
        register()
        self.model = model.eval()
        self.layout = Layout.of(model.config.get_text_config(decoder=True))
        model.get_decoder().set_attn_implementation(NAME)  # not that of a part that sees
        for module in model.modules():
            if _is_recurrent(module):
                per_request(module)

    @property
    def device(self) -> torch.device:
        return self.model.device  # type: ignore[no-any-return]

    @torch.inference_mode()
    def forward(self, work: Sequence[tuple[Reading, Sequence[int]]]) -> Tensor:
        """Reads these ids, each on its reading's end -> logits [B, V] after the last id of each, float32."""
        parts, ids, positions = [], list[int](), list[int]()
        for reading, new in work:
            assert new, "a request without ids in a step"
            parts.append(Part(reading, len(ids), len(ids) + len(new)))
            ids += new
            first = reading.position + reading.shift
            positions += range(first, first + len(new))
        batch = Batch(parts)
        with running(batch):
            logits = self.model(
                input_ids=torch.tensor([ids], device=self.device),
                position_ids=torch.tensor([positions], device=self.device),
                past_key_values=batch,
                use_cache=True,
                logits_to_keep=torch.tensor([part.end - 1 for part in parts], device=self.device),
            ).logits
        for reading, new in work:
            reading.position += len(new)
        return logits[0].float()  # type: ignore[no-any-return]


def _is_recurrent(module: Any) -> bool:
    """Whether a layer takes its past as `cache_params`, as every recurrent layer of transformers does."""
    import inspect

    forward = type(module).__dict__.get("forward")
    return forward is not None and "cache_params" in inspect.signature(forward).parameters and hasattr(module, "layer_idx")
