"""Norms of a model under training that keep less: each is exchanged for kernels/rms_norm.py where that is proven to give the same bits.

No architecture is named. What looks like a norm (one frozen weight, an epsilon) is asked for its answer to random numbers, with a random
weight in place of its own, and compared with every known form; whatever answers otherwise stays what it was.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from functools import partial
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn

from ropewalk.kernels.rms_norm import Form, plain, rms_norm

FORMS = tuple(Form(offset, early, power) for offset, early, power in product((0.0, 1.0), (True, False), (False, True)))
EPSILONS = ("variance_epsilon", "eps")


def lean_norms(model: nn.Module) -> int:
    """Exchanges the norms of the model -> how many."""
    known: dict[Any, Form | None] = {}
    count = 0
    for module, eps in _norms(model):
        weight = module._parameters.get("weight")
        key = (type(module), eps, None if weight is None else (weight.shape, weight.dtype))
        if key not in known:
            known[key] = _form_of(module, eps)
        if (form := known[key]) is not None:
            module.forward = partial(_forward, module, eps, form)
            count += 1
    return count


def _norms(model: nn.Module) -> Iterator[tuple[nn.Module, float]]:
    for module in model.modules():
        eps = next((getattr(module, name) for name in EPSILONS if isinstance(getattr(module, name, None), float)), None)
        parameters = dict(module.named_parameters())
        plain_call = not (module._forward_hooks or module._forward_pre_hooks or "forward" in module.__dict__)
        if eps is None or not plain_call or set(parameters) - {"weight"} or next(module.children(), None) is not None:
            continue
        if "RMSNorm" in type(module).__name__ and not any(p.requires_grad or p.ndim != 1 for p in parameters.values()):
            yield module, eps


def _form_of(module: nn.Module, eps: float) -> Form | None:
    """The form that gives the module's bits, in its own type."""
    own_weight = module._parameters.get("weight")
    dtype, width = (torch.float32, 64) if own_weight is None else (own_weight.dtype, own_weight.shape[0])
    weight: Tensor | None = None
    draw = torch.Generator().manual_seed(0)
    probe: Any = copy.copy(module)
    if own_weight is not None:
        weight = torch.randn(width, generator=draw).to(dtype)
        probe._parameters = {"weight": nn.Parameter(weight, requires_grad=False)}
    rows = [torch.randn(4, width, generator=draw).mul_(10.0**power).to(dtype) for power in (-3, 0, 2)]
    if dtype.itemsize == 2:
        rows += [r.float() for r in rows]
    with torch.no_grad():
        try:
            own = [probe(r) for r in rows]
        except (RuntimeError, TypeError, AttributeError):
            return None
        for form in FORMS:
            if all(
                torch.equal(mine, plain(r, weight, eps, form)) and mine.dtype == plain(r, weight, eps, form).dtype
                for mine, r in zip(own, rows)
            ):
                return form
    return None


def _forward(module: nn.Module, eps: float, form: Form, x: Tensor) -> Tensor:
    if not torch.is_grad_enabled():
        return type(module).forward(module, x)  # type: ignore[no-any-return]  # there is nothing to keep
    return rms_norm(x, module._parameters.get("weight"), eps, form)
