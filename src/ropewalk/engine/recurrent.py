"""Layers with a state, and several requests: each request's ids run on that request's own.

Those that decode run together, their states beside each other; the others run one request after another.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import FunctionType, MethodType
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PretrainedConfig

from ropewalk.engine.batch import Batch, Part
from ropewalk.kernels.delta_rule import LONGEST, delta_rule

RULE = "torch_chunk_gated_delta_rule"  # what a layer's own code calls the rule, in five families of models

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
    plain, names = _with_short_rule(module), list(inspect.signature(module.forward).parameters)
    at_once = _continues(plain, module, past, config)

    def each(hidden: Tensor, part: Part, more: dict[str, Any]) -> Any:
        spans = [slice(part.begin, part.end)]
        if not at_once and part.reading.position:
            spans = [slice(row, row + 1) for row in range(part.begin, part.end)]
        outs = []
        for span in spans:
            given = _rows(more, hidden, span, apart=False) | {past: part.reading.states}
            outs.append(plain(hidden[:, span], **given))
        return _beside(outs)

    def forward(hidden_states: Tensor, *args: Any, **more: Any) -> Any:
        more |= dict(zip(names[1:], args))
        batch = more.get(past)
        if not isinstance(batch, Batch):
            return plain(hidden_states, **more)
        more = {
            name: None if name in ("attention_mask", "conv_mask") else given for name, given in more.items() if name != past
        }
        outs: list[Any] = []
        together = batch.decoding if len(batch.decoding) > 1 else []
        if batch.crowd is not None and together:  # one call with their states beside each other
            own = hidden_states[0, batch.rows, None]
            with focused(together):
                states = batch.crowd.joined(module.layer_idx)
                outs.append(_turned(plain(own, **_rows(more, hidden_states, batch.rows), **{past: states})))
        for part in batch.others if together else batch.parts:
            with focused([part]):
                outs.append(each(hidden_states, part, more))
        return _beside(outs) if not together or batch.order is None else _ordered(_beside(outs), batch.order)

    module.forward = forward


def _with_short_rule(module: Any) -> Callable[..., Any]:
    """The layer's own code, with the gated delta rule over few ids, on a CPU, taken from kernels/delta_rule.py."""
    code = inspect.unwrap(type(module).forward)
    rule = getattr(code, "__globals__", {}).get(RULE)
    usual = "forward" not in vars(module) and code.__closure__ is None
    if rule is None or not usual or next(module.parameters()).device.type != "cpu" or not _is_known(rule):
        return module.forward  # type: ignore[no-any-return]

    def short(query: Tensor, key: Tensor, value: Tensor, g: Tensor, beta: Tensor, **more: Any) -> tuple[Tensor, Tensor | None]:
        if query.shape[1] > LONGEST:
            return rule(query, key, value, g=g, beta=beta, **more)  # type: ignore[no-any-return]
        return delta_rule(query, key, value, g, beta, more.get("initial_state"), bool(more.get("use_qk_l2norm_in_kernel")))

    own = FunctionType(code.__code__, {**code.__globals__, RULE: short}, code.__name__, code.__defaults__)
    own.__kwdefaults__ = code.__kwdefaults__
    return MethodType(own, module)


@functools.cache
def _is_known(rule: Callable[..., Any]) -> bool:
    """Whether a family's rule is the one that is known; before transformers 5.23 layers repeat key heads themselves."""
    repeated = _agrees(rule, 4)
    return bool(repeated) and _agrees(rule, 2) is not False


def _agrees(rule: Callable[..., Any], key_heads: int) -> bool | None:
    """Whether a rule computes what ours does with 4 value heads and so many key heads; None where it does not take them."""
    draw = torch.Generator().manual_seed(0)
    query, key = torch.randn(2, 2, 5, key_heads, 8, generator=draw).unbind()
    value, state = torch.randn(2, 5, 4, 6, generator=draw), torch.randn(2, 4, 8, 6, generator=draw)
    g, beta = -torch.rand(2, 5, 4, generator=draw), torch.rand(2, 5, 4, generator=draw)
    ours = delta_rule(query, key, value, g, beta, state, True)
    more = {"initial_state": state, "output_final_state": True, "use_qk_l2norm_in_kernel": True}
    try:
        its = rule(query, key, value, g=g, beta=beta, **more)
    except (TypeError, RuntimeError, ValueError):  # that wants heads repeated, more arguments, or tensors on a GPU
        return None
    return all(torch.allclose(a, b, rtol=1e-4, atol=1e-5) for a, b in zip(ours, its))


def _rows(more: dict[str, Any], like: Tensor, rows: slice | Tensor, apart: bool = True) -> dict[str, Any]:
    """Whatever else a layer is given, of these rows: of several requests that have one each, or beside each other."""

    def own(given: Any) -> Any:
        if not isinstance(given, Tensor) or given.shape[:2] != like.shape[:2]:
            return given
        return given[0, rows, None] if apart else given[:, rows]

    return {name: own(given) for name, given in more.items()}


def _beside(outs: Sequence[Any]) -> Any:
    """What several requests got [1, T, ..], one tensor or a few, as that of one."""
    if len(outs) == 1:
        return outs[0]
    if isinstance(outs[0], Tensor):
        return torch.cat(list(outs), dim=1)
    return tuple(torch.cat(several, dim=1) for several in zip(*outs))


def _turned(out: Any) -> Any:
    """[B, 1, ..], one tensor or a few -> [1, B, ..]."""
    return out.transpose(0, 1) if isinstance(out, Tensor) else tuple(one.transpose(0, 1) for one in out)


def _ordered(out: Any, order: Tensor) -> Any:
    """The rows [1, T, ..], of one tensor or a few, in another order."""
    return out[:, order] if isinstance(out, Tensor) else tuple(one[:, order] for one in out)


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
