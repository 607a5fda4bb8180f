"""Rotary positions of a model under training by kernels/rotary.py, where that is proven to give the same bits.

No architecture is named. A function that a module's forward calls with cosines and sines is asked for its answer to random numbers and
compared with every known form; whatever answers otherwise stays what it was. The module gets a forward of its own that finds ours under the
function's name, so other models of the same classes keep theirs; and where there is no gradient, the function itself is called.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import product
from types import FunctionType, MethodType
from typing import Any, get_args

import torch
from torch import Tensor, nn

from ropewalk.kernels.rotary import Angles, Form, Pairs, plain, rotary

FORMS = tuple(Form(pairs, angles, wide) for pairs, angles, wide in product(get_args(Pairs), get_args(Angles), (False, True)))
COS, SIN = "cos", "sin"
AXIS = "unsqueeze_dim"  # of the heads
UNUSED = "position_ids"
WIDTH = 16
_Types = tuple[torch.dtype, torch.dtype]


def lean_rotary(model: nn.Module) -> int:
    """Exchanges the rotary positions of the model -> in how many modules."""
    known: dict[Any, Callable[..., Any] | None] = {}
    count = 0
    for module in model.modules():
        forward = type(module).forward
        if "forward" in module.__dict__ or not isinstance(forward, FunctionType) or hasattr(forward, "__wrapped__"):
            continue
        if forward not in known:
            known[forward] = _exchanged(forward)
        if (made := known[forward]) is not None:
            module.forward = MethodType(made, module)
            count += 1
    return count


def _exchanged(forward: FunctionType) -> FunctionType | None:
    """The same code, which finds ours for each function that can be exchanged; None where there is none."""
    found = {name: lean for name in forward.__code__.co_names if (lean := Lean.of(forward.__globals__.get(name))) is not None}
    if not found:
        return None
    made = FunctionType(
        forward.__code__, forward.__globals__ | found, forward.__name__, forward.__defaults__, forward.__closure__
    )
    made.__kwdefaults__ = forward.__kwdefaults__
    return made


@dataclass(frozen=True)
class Lean:
    """Called in a function's place; calls it for what it was not compared on."""

    function: Callable[..., Any]
    signature: inspect.Signature
    turned: tuple[str, ...]  # its parameters that are queries and keys
    forms: Mapping[_Types, Form]  # by the types of what is turned, and of cosines

    @classmethod
    def of(cls, function: Any) -> Lean | None:
        """For a function that says what one of the forms says."""
        if not isinstance(function, FunctionType):
            return None
        signature = inspect.signature(function)
        names = signature.parameters.keys()
        variable = any(p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD) for p in signature.parameters.values())
        if variable or not {COS, SIN, AXIS} <= names:
            return None
        turned = tuple(name for name in names if name not in {COS, SIN, AXIS, UNUSED})
        pairs = [(kind, angles) for kind in (torch.float32, torch.bfloat16, torch.float16) for angles in {kind, torch.float32}]
        forms = {types: form for types in pairs if (form := _form_of(function, turned, types)) is not None}
        return cls(function, signature, turned, forms) if forms else None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if torch.is_grad_enabled():  # else there is nothing to keep
            bound = self.signature.bind(*args, **kwargs)
            bound.apply_defaults()
            given = bound.arguments
            made = [self._turn(given[name], given[COS], given[SIN], given[AXIS]) for name in self.turned]
            if given.get(UNUSED) is None and not any(t is None for t in made):
                return made[0] if len(made) == 1 else tuple(made)
        return self.function(*args, **kwargs)

    def _turn(self, x: Any, cos: Any, sin: Any, axis: Any) -> Tensor | None:
        if not all(isinstance(t, Tensor) for t in (x, cos, sin)) or axis not in (1, 2) or x.dim() != 4:
            return None
        form = self.forms.get((x.dtype, cos.dtype))
        alike = (cos.shape, cos.dtype, cos.device) == (sin.shape, sin.dtype, sin.device) and cos.device == x.device
        if form is None or not alike or cos.requires_grad or cos.dim() != 3:
            return None
        if cos.shape[0] not in (1, len(x)) or cos.shape[1] != x.shape[3 - axis] or 2 * form.count(cos) > x.shape[-1]:
            return None
        return rotary(x, cos, sin, form, axis)


def _form_of(function: Callable[..., Any], turned: tuple[str, ...], types: _Types) -> Form | None:
    """The form that gives the function's bits, wherever it gives any."""
    with torch.no_grad():
        asked = [(given, own) for given in _probes(turned, types) if (own := _answer(function, given)) is not None]
        for form in FORMS:
            if asked and all(_same(form, turned, given, own) for given, own in asked):
                return form
    return None


def _probes(turned: tuple[str, ...], types: _Types) -> Iterator[dict[str, Any]]:
    """Two sequences of five tokens, each tensor with another number of heads, turned whole and in half."""
    draw = torch.Generator().manual_seed(0)
    for axis, width, sequences in product((1, 2), (WIDTH, WIDTH // 2), (2, 1)):
        given: dict[str, Any] = {AXIS: axis}
        for heads, name in enumerate(turned, start=3):
            shape = (2, heads, 5, WIDTH) if axis == 1 else (2, 5, heads, WIDTH)
            given[name] = torch.randn(shape, generator=draw).to(types[0])
        for name in (COS, SIN):
            given[name] = torch.randn(sequences, 5, width, generator=draw).to(types[1])
        yield given


def _answer(function: Callable[..., Any], given: dict[str, Any]) -> tuple[Any, ...] | None:
    try:
        found = function(**given)
    except (RuntimeError, TypeError, AttributeError, IndexError, ValueError):
        return None
    return found if isinstance(found, tuple) else (found,)


def _same(form: Form, turned: tuple[str, ...], given: dict[str, Any], own: tuple[Any, ...]) -> bool:
    if len(own) != len(turned) or 2 * form.count(given[COS]) > WIDTH:
        return False
    for name, theirs in zip(turned, own):
        mine = plain(given[name], given[COS], given[SIN], form, given[AXIS])
        if not isinstance(theirs, Tensor) or theirs.dtype != mine.dtype or not torch.equal(theirs, mine):
            return False
    return True
