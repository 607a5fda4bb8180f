"""The routers of a model: which module picks the experts of which layer, by which of its calls of topk. No architecture is named.

Looked up by looking on at one forward pass: the last call in a block, before its experts are called, that picks as many as they are given.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.overrides import TorchFunctionMode

from ropewalk.errors import ModelError
from ropewalk.models.experts import expert_modules

WAY_OUT = "remove trl.replay_routing"
PICKS = ("topk", "max", "argmax", "sort", "argsort", "multinomial", "kthvalue")


@dataclass(frozen=True, eq=False)
class Router:
    """One module that picks experts, and how."""

    kind: str  # the architecture
    name: str
    module: nn.Module
    experts: nn.Module
    call: int  # which of the calls of topk in its forward is the one that picks
    choices: int  # what it picks from; more than there are experts where a token may go to none
    k: int

    def refused(self, what: str) -> ModelError:
        """Why its choice cannot be replayed."""
        return refused(self.kind, self.name, what)


def refused(kind: str, name: str, what: str) -> ModelError:
    """For a model whose experts are picked in another way."""
    return ModelError(f"{kind}: {name} {what}, so that the choice of experts cannot be replayed; {WAY_OUT}")


def find_routers(model: Any, forward: Callable[[], Any], tokens: int) -> tuple[Router, ...]:
    """The routers that are at work in a forward pass over so many tokens, in their order."""
    kind = str(model.config.model_type)
    names = {module: name for name, module in model.named_modules()}
    found: list[Router] = []
    seen: list[nn.Module] = []
    given: dict[nn.Module, Tensor] = {}  # the experts of each token, where nothing picks them
    with _Looking() as looking, ExitStack() as stack:

        def note(module: nn.Module, args: Any, kwargs: Any) -> None:
            if module in seen:
                raise refused(kind, names[module], "is used more than once in a pass")
            seen.append(module)
            _, ids, _ = arguments(args, kwargs)
            if len(ids) != tokens:
                raise refused(kind, names[module], f"is given {len(ids)} of {tokens} tokens")
            router = _router_of(kind, module, ids, looking.calls, names)
            if router is None:
                given[module] = ids.clone()
            else:
                found.append(router)
            looking.calls.clear()

        for _, module in expert_modules(model):
            stack.callback(module.register_forward_pre_hook(note, with_kwargs=True).remove)
        forward()
    for module, ids in given.items():
        if not torch.equal(ids, _with_other_states(model, names, module, forward)):
            raise refused(kind, names[module], "gets its experts in a way of its own")
    if not found:
        raise ModelError(f"{kind} has no experts whose choice could be replayed; {WAY_OUT}")
    if repeated := [one for one in found if sum(one.module is other.module for other in found) > 1]:
        raise repeated[0].refused("picks for more than one layer")
    return tuple(found)


def _router_of(
    kind: str, experts: nn.Module, ids: Tensor, calls: Sequence[_Call], names: dict[nn.Module, str]
) -> Router | None:
    """The router of an expert module; None where experts follow from the token itself, by a table."""
    block = names[experts].rpartition(".")[0]
    inside = [call for call in calls if f"{names[call.module]}.".startswith(f"{block}.")]
    if not inside:
        return None
    picking = [call for call in inside if call.function == "topk" and call.picked.numel() == ids.numel()]
    if not picking:
        raise refused(kind, names[experts], "does not get its experts by topk")
    last = picking[-1]
    number = sum(call.function == "topk" and call.module is last.module for call in inside[: inside.index(last)])
    return Router(kind, names[last.module], last.module, experts, number, last.choices, ids.shape[1])


def _with_other_states(model: nn.Module, names: dict[nn.Module, str], experts: nn.Module, forward: Callable[[], Any]) -> Tensor:
    """The experts of each token where its block is given the states of other tokens: a table gives the same."""
    found: list[Tensor] = []

    def turn(module: nn.Module, args: Any, kwargs: Any) -> Any:
        if args:
            return (args[0].flip(-2), *args[1:]), kwargs
        first, *rest = kwargs.items()
        return args, {first[0]: first[1].flip(-2), **dict(rest)}

    def note(module: nn.Module, args: Any, kwargs: Any) -> None:
        found.append(arguments(args, kwargs)[1])

    with ExitStack() as stack:
        block = model.get_submodule(names[experts].rpartition(".")[0])
        stack.callback(block.register_forward_pre_hook(turn, with_kwargs=True).remove)
        stack.callback(experts.register_forward_pre_hook(note, with_kwargs=True).remove)
        forward()
    return found[0]


def arguments(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
    """x, ids and weights, of a call of an expert module."""
    x, ids, weights = [*args, *kwargs.values()][:3]
    return x, ids, weights


@dataclass(frozen=True, eq=False)
class _Call:
    """A call in a forward pass that picks something."""

    function: str
    module: nn.Module  # the innermost one that was at work
    picked: Tensor
    choices: int


class _Looking(TorchFunctionMode):
    """Looks on at a whole pass."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[_Call] = []
        self._at_work: list[nn.Module] = []
        self._hooks = ExitStack()

    def __enter__(self) -> _Looking:
        self._hooks.callback(register_module_forward_pre_hook(lambda module, args: self._at_work.append(module)).remove)
        done: Callable[..., Any] = lambda module, args, output: self._at_work.pop() and None
        self._hooks.callback(register_module_forward_hook(done, always_call=True).remove)
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *how: Any) -> None:
        super().__exit__(*how)  # type: ignore[no-untyped-call]
        self._hooks.close()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = getattr(func, "__name__", "")
        if name in PICKS and self._at_work and isinstance(args[0], Tensor):
            picked = result if isinstance(result, Tensor) else result[1]
            self.calls.append(_Call(name, self._at_work[-1], picked, args[0].shape[-1] if args[0].dim() else 1))
        return result
