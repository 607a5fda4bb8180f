"""The layer that scores, in the place of a language model's output head: one number for a sequence, or several for each token.

As with models/head.py no architecture is named: the layer is told apart by its name, what it is given is kept, and it is applied to
the tokens that are scored alone. Legend: B sequences, T tokens, N tokens that are scored, L outputs.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from ropewalk.errors import ModelError
from ropewalk.kernels.cross_entropy import IGNORED
from ropewalk.models.head import Head, find_isolation, instead_of, nothing, output_module, run, unpack
from ropewalk.models.targets import SCORES


@dataclass(frozen=True)
class ScoreHead(Head):
    """How to get the scores out of one model, with packed samples kept apart."""

    def scores(self, model: nn.Module, ids: Tensor, labels: Tensor, position_ids: Tensor) -> Tensor:
        """[N, L] float32: the scores at the tokens that have a label, in their order; all [B, T]."""
        if self.isolation == "unpacked":
            places = torch.arange(ids.numel(), device=ids.device).view_as(ids)
            parts = [
                (place[target != IGNORED], _scores(model, ids.flatten()[place], where, target))
                for place, target, where in unpack(places, labels, position_ids)
            ]
            order = torch.cat([place for place, _ in parts]).argsort()
            return torch.cat([scores for _, scores in parts])[order]
        if self.isolation == "one row":
            ids, labels, position_ids = (part.reshape(1, -1) for part in (ids, labels, position_ids))
        return _scores(model, ids, position_ids, labels)


def score_head(model: nn.Module) -> ScoreHead:
    """Finds out by trying how packed samples are kept apart."""
    training = model.training
    model.eval()
    try:
        with torch.no_grad(), instead_of(score_layer(model), nothing) as seen:
            # What the layer is given tells more of a leak than the one number that it gives.
            hook = model.register_forward_hook(lambda *_: SimpleNamespace(logits=seen.pop()))
            try:
                return ScoreHead(None, find_isolation(model))
            finally:
                hook.remove()
    finally:
        model.train(training)


def score_name(model: nn.Module) -> str:
    """What the model calls the layer that scores."""
    found = next((name for name in SCORES if isinstance(getattr(model, name, None), nn.Linear)), None)
    if found is None:
        raise ModelError(f"a {type(model).__name__} scores by more than one linear layer; name a base of another architecture")
    return found


def score_layer(model: nn.Module) -> nn.Linear:
    """That layer."""
    layer: nn.Linear = getattr(model, score_name(model))
    return layer


def last_layer(model: nn.Module) -> nn.Linear:
    """The layer that scores, or the output head of a model that writes."""
    return score_layer(model) if any(hasattr(model, name) for name in SCORES) else output_module(model)


def _scores(model: nn.Module, ids: Tensor, position_ids: Tensor, labels: Tensor) -> Tensor:
    layer = score_layer(model)
    with instead_of(layer, nothing) as seen:
        run(model, ids, position_ids)
    hidden = seen[0][labels != IGNORED].float()
    bias: Any = layer.bias
    return torch.nn.functional.linear(hidden, layer.weight.float(), None if bias is None else bias.float())
