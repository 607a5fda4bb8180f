"""Layers with a state, and several requests: each request's ids run on that request's own.

Those that decode run together, their states beside each other; the others run one request after another.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PretrainedConfig

from ropewalk.engine.cache import Batch, Part

focus: list[Sequence[Part]] = []  # the parts whose rows a recurrent layer is working on, if it is


@contextmanager
def focused(parts: Sequence[Part]) -> Iterator[None]:
    """Within it, the rows that layers see are those of these parts alone."""
    focus.append(parts)
    try:
        yield
    finally:
        focus.pop()


def past_of(module: Any) -> str:
    """What a layer with a state calls the past that it is given; empty for other layers."""
    forward = type(module).__dict__.get("forward")
    if forward is None or not hasattr(module, "layer_idx"):
        return ""
    names = inspect.signature(forward).parameters
    if "cache_params" in names:
        return "cache_params"
    return "past_key_values" if "past_key_values" in names and ".update_conv_state(" in inspect.getsource(forward) else ""


def per_request(module: Any, past: str, config: PretrainedConfig) -> None:
    """Makes a layer with a state run each request of a batch on that request's own; `past` is its name for what it is given."""
    plain, names = module.forward, list(inspect.signature(module.forward).parameters)
    at_once = _continues(plain, module, past, config)

    def each(hidden: Tensor, part: Part, more: dict[str, Any]) -> Any:
        spans = [slice(part.begin, part.end)]
        if not at_once and part.reading.position:
            spans = [slice(row, row + 1) for row in range(part.begin, part.end)]
        return _beside([plain(hidden[:, span], **_rows(more, hidden, span), **{past: part.reading.states}) for span in spans])

    def forward(hidden_states: Tensor, *args: Any, **more: Any) -> Any:
        more |= dict(zip(names[1:], args))
        batch = more.get(past)
        if not isinstance(batch, Batch):
            return plain(hidden_states, **more)
        more = {
            name: None if name in ("attention_mask", "conv_mask") else given for name, given in more.items() if name != past
        }
        outs: list[Any] = [None] * len(batch.parts)
        single = [n for n, part in enumerate(batch.parts) if part.end - part.begin == 1]
        if len(single) > 1:  # they decode: one call with their states beside each other
            parts = [batch.parts[n] for n in single]
            rows = torch.tensor([part.begin for part in parts], device=hidden_states.device)
            own = hidden_states[0, rows, None]
            with batch.joined(parts, module.layer_idx) as states, focused(parts):
                for n, out in zip(single, _apart(plain(own, **_rows(more, hidden_states, rows), **{past: states}))):
                    outs[n] = out
        for n, part in enumerate(batch.parts):
            if outs[n] is None:
                with focused([part]):
                    outs[n] = each(hidden_states, part, more)
        return _beside(outs)

    module.forward = forward


def _rows(more: dict[str, Any], like: Tensor, rows: slice | Tensor) -> dict[str, Any]:
    """Whatever else a layer is given, of these rows: beside each other, or of several requests that have one each."""

    def own(given: Any) -> Any:
        if not isinstance(given, Tensor) or given.shape[:2] != like.shape[:2]:
            return given
        return given[:, rows] if isinstance(rows, slice) else given[0, rows, None]

    return {name: own(given) for name, given in more.items()}


def _beside(outs: Sequence[Any]) -> Any:
    """What several requests got [1, T, ..], one tensor or a few, as that of one."""
    if isinstance(outs[0], Tensor):
        return torch.cat(list(outs), dim=1)
    return tuple(torch.cat(several, dim=1) for several in zip(*outs))


def _apart(out: Any) -> list[Any]:
    """[B, 1, ..], one tensor or a few -> B of [1, 1, ..]."""
    return list(out.chunk(out.shape[0])) if isinstance(out, Tensor) else list(zip(*(one.chunk(one.shape[0]) for one in out)))


@torch.no_grad()
def _continues(plain: Any, module: Any, past: str, config: PretrainedConfig) -> bool:
    """Whether a layer can read several ids at once from a state on; some take it up only one id at a time."""
    like = next(module.parameters())
    dtype = like.dtype if like.is_floating_point() else config.dtype or torch.float32
    hidden = torch.randn(1, 6, config.hidden_size, generator=torch.Generator().manual_seed(0)).to(like.device, dtype)

    def read(*pieces: Tensor) -> Tensor:
        """What comes of the pieces after the first; its state is made so large that nobody can do without it."""
        states = DynamicCache(config=config)
        outs = []
        for number, piece in enumerate(pieces):
            outs.append(plain(piece, **{past: states}))
            layer: Any = states.layers[module.layer_idx]
            for state in [layer.recurrent_states[index] for index in range(layer.number_of_states)]:
                if state is not None and not number:
                    state.mul_(10_000)
        out = _beside(outs[1:])
        return (out if isinstance(out, Tensor) else torch.cat([one.flatten(2) for one in out], dim=-1)).float()

    try:
        together, apart = read(hidden[:, :3], hidden[:, 3:]), read(hidden[:, :3], *hidden[:, 3:].chunk(3, dim=1))
    except (TypeError, RuntimeError):  # it wants more than hidden states, or narrower ones: one id at a time is always right
        return False
    return bool((together - apart).norm() <= 0.05 * apart.norm())
