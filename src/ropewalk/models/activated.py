"""Activated LoRA: the adapter acts only from its invocation on, so that whatever came before keeps the base's keys and values.

PEFT's rule: in each sample, from the first token of the last occurrence of `alora_invocation_tokens`; without one, nowhere.
Legend: B sequences, T tokens, n tokens of the invocation.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ropewalk.models.lora_layers import Switch


def active_positions(ids: Tensor, position_ids: Tensor | None, invocation: Sequence[int]) -> Tensor:
    """ids [B, T], position_ids [B, T] that restart with every packed sample -> [B, T] bool, without reading anything back."""
    batch, length = ids.shape
    place = torch.arange(length, device=ids.device).expand(batch, length)
    if position_ids is None:
        start = torch.zeros_like(place)
    else:
        # where this token's sample starts: the furthest token so far whose position does not follow from the one before
        position_ids = position_ids.expand(batch, length)
        fresh = torch.ones_like(place, dtype=torch.bool)
        fresh[:, 1:] = position_ids[:, 1:] != position_ids[:, :-1] + 1
        start = torch.where(fresh, place, 0).cummax(dim=1).values
    found = _occurrences(ids, start, invocation)
    last = torch.full_like(place, -1).scatter_reduce(1, start, torch.where(found, place, -1), "amax")
    mine = last.gather(1, start)
    return (mine >= 0) & (place >= mine)


def _occurrences(ids: Tensor, start: Tensor, invocation: Sequence[int]) -> Tensor:
    """[B, T] bool: an invocation begins here and ends within the same sample."""
    n, (batch, length) = len(invocation), ids.shape
    found = torch.zeros(batch, length, dtype=torch.bool, device=ids.device)
    if length < n:
        return found
    pattern = torch.tensor(list(invocation), device=ids.device)
    whole = (ids.unfold(1, n, 1) == pattern).all(-1)
    found[:, : length - n + 1] = whole & (start[:, : length - n + 1] == start[:, n - 1 :])
    return found


class _Watch:
    """Sees the ids that enter the model and tells the adapter's layers where they act; goes on over a key-value cache."""

    def __init__(self, switch: Switch, invocation: Sequence[int]) -> None:
        self.switch, self.invocation = switch, tuple(invocation)
        self.tail: Tensor | None = None  # the last n - 1 ids, where an invocation may have begun
        self.invoked: Tensor | None = None  # [B]

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        bound = inspect.signature(type(module).forward).bind_partial(module, *args, **kwargs).arguments
        bound = {**bound, **bound.get("kwargs", {})}
        ids = bound.get("input_ids")
        if ids is None:
            return
        cache = bound.get("past_key_values")
        if cache is not None and cache.get_seq_length() > 0 and self.tail is not None and self.invoked is not None:
            self._go_on(ids)
        else:
            self.switch.active = active_positions(ids, bound.get("position_ids"), self.invocation)
            self._remember(ids, self.switch.active[:, -1])

    def _go_on(self, ids: Tensor) -> None:
        assert self.tail is not None
        assert self.invoked is not None
        joined = torch.cat([self.tail, ids], dim=1)
        here = active_positions(joined, None, self.invocation)[:, self.tail.shape[1] :]
        self.switch.active = here | self.invoked[:, None]
        self._remember(joined, self.switch.active[:, -1])

    def _remember(self, ids: Tensor, invoked: Tensor) -> None:
        keep = len(self.invocation) - 1
        self.tail, self.invoked = ids[:, max(0, ids.shape[1] - keep) :] if keep else ids[:, :0], invoked


def watch_invocations(model: Any, switch: Switch, invocation: Sequence[int]) -> list[Any]:
    """Hook every part of the model that may be the first to see the ids: the whole, and the decoder that a loss calls directly."""
    watch = _Watch(switch, invocation)
    entries = [m for m in model.modules() if hasattr(m, "get_input_embeddings") and hasattr(m, "config")]
    return [m.register_forward_pre_hook(watch, with_kwargs=True) for m in entries]
