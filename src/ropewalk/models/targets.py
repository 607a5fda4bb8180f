"""Which parts of a model an adapter covers: Axolotl's and PEFT's ways of naming targets -> linear layers and stacks of experts.

A name is a suffix of a module's name at a dot, a text that is not a list is a regular expression over whole names, 'all-linear' is every
linear layer but the output head and the routers. Names of experts' projections (gate_proj, w1, ...) mean the stacks they became.
"""

from __future__ import annotations

import difflib
import inspect
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

from torch import Tensor, nn

from ropewalk.errors import ModelError
from ropewalk.models.experts import expert_modules, projections

ALL_LINEAR = "all-linear"
SCORES = ("score", "classifier")  # what classifiers of transformers call the layer that takes the output head's place
_UP_NAMES = frozenset({"gate_proj", "up_proj", "gate_up_proj", "w1", "w3", "mlp1", "input_linear"})
_DOWN_NAMES = frozenset({"down_proj", "w2", "mlp2", "output_linear"})
_ROUTER = re.compile(r"(^|\.)(gate|router|gating|[a-z_]*router[a-z_]*|shared_expert_gate)(\.|$)")


@dataclass(frozen=True)
class Wanted:
    """What was asked for, in Axolotl's and PEFT's words."""

    modules: str | tuple[str, ...] = ()  # names, a regular expression, or 'all-linear'
    parameters: tuple[str, ...] = ()
    linear: bool = False
    experts: bool = True
    exclude: tuple[str, ...] = ()
    layers: tuple[int, ...] | None = None
    text_only: bool = True


@dataclass(frozen=True)
class Covered:
    """What an adapter will act on, by full name, in the model's own order."""

    linears: tuple[str, ...]
    stacks: tuple[tuple[str, str], ...]  # (expert module, projection)
    left_out: tuple[str, ...] = ()  # families of linear layers that an adapter cannot act on


def cover(model: nn.Module, wanted: Wanted) -> Covered:
    """Resolve names to layers; a name that matches nothing is an error."""
    modules = dict(model.named_modules())
    text = text_part(model) if wanted.text_only else ""

    def inside(name: str) -> bool:
        return not text or name == text or name.startswith(f"{text}.")

    def kept(name: str) -> bool:
        return not _matches_any(wanted.exclude, name) and _in_layers(wanted.layers, name)

    linears = [n for n, m in modules.items() if is_linear(m)]
    stacks = [(n, p) for n, m in expert_modules(model) if inside(n) for p in projections(m)]
    head = special(model, modules)
    unreachable = read_directly(modules) | {n for n, m in modules.items() if isinstance(m, nn.Linear) and not is_linear(m)}
    unreachable -= head
    apart = head | unreachable
    ordinary = [n for n in linears if inside(n) and n not in apart]
    chosen, named_stacks = _by_modules(wanted, linears, ordinary, stacks, inside, modules)
    if wanted.linear:
        chosen |= set(ordinary)
    chosen_stacks = set(stacks) if wanted.experts and not wanted.parameters else named_stacks
    chosen_stacks |= _by_parameters(wanted, stacks, model)
    return Covered(
        tuple(n for n in linears if n in chosen and kept(n)),
        tuple(s for s in stacks if s in chosen_stacks and kept(s[0]) and kept(".".join(s))),
        tuple(f for f, _ in families([n for n in modules if inside(n) and n in unreachable])),
    )


def is_linear(module: nn.Module) -> bool:
    """Whether this computes W x + b: a class derived from nn.Linear may compute anything, unless its weight is merely packed."""
    return isinstance(module, nn.Linear) and (
        type(module).forward is nn.Linear.forward or not isinstance(module.weight, Tensor)
    )


def read_directly(modules: dict[str, nn.Module]) -> set[str]:
    """Linear layers whose owner reads their weight instead of calling them (state-space kernels do): an adapter would not be seen."""
    found = set()
    for name, module in modules.items():
        if is_linear(module):
            owner, _, leaf = name.rpartition(".")
            pattern = rf"self\.{leaf}\.(weight|bias)\b(?!\s*\.(dtype|device|shape|is_cuda|data_ptr))(?!\s+is)"
            kind: Any = type(modules[owner])
            if re.search(pattern, _source(kind)):
                found.add(name)
    return found


@cache
def _source(kind: Any) -> str:
    try:
        return inspect.getsource(kind)
    except (OSError, TypeError):  # a class made at run time has no source to read
        return ""


def text_part(model: Any) -> str:
    """The name of the submodule that reads text, in a model that also sees or hears; otherwise ''."""
    config = model.config
    text = config.get_text_config(decoder=True)
    if text is config:
        return ""
    for name, module in model.named_modules():
        if name and getattr(module, "config", None) is text and hasattr(module, "get_input_embeddings"):
            return str(name)
    for name, module in model.named_modules():
        if name and type(getattr(module, "config", None)) is type(text) and hasattr(module, "get_input_embeddings"):
            return str(name)
    return ""


def special(model: Any, modules: dict[str, nn.Module]) -> set[str]:
    """Linear layers that 'all-linear' leaves alone: the output head, routers and gates of shared experts."""
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    found = {name for name, module in modules.items() if module is head} | (set(SCORES) & modules.keys())
    blocks = {name.rpartition(".")[0]: module for name, module in expert_modules(model)}
    for name, module in modules.items():
        block = next((b for b in blocks if name.startswith(f"{b}.")), None)
        if block is not None and isinstance(module, nn.Linear) and _ROUTER.search(name[len(block) :]):
            experts = getattr(blocks[block], projections(blocks[block])[1]).shape[0]
            if module.out_features in (1, experts) or "router" in name[len(block) :]:
                found.add(name)
    return found


def _by_modules(
    wanted: Wanted,
    linears: list[str],
    ordinary: list[str],
    stacks: list[tuple[str, str]],
    inside: Callable[[str], bool],
    modules: dict[str, nn.Module],
) -> tuple[set[str], set[tuple[str, str]]]:
    if isinstance(wanted.modules, str):
        if wanted.modules.lower() == ALL_LINEAR:
            return set(ordinary), set()
        matched = {n for n in linears if re.fullmatch(wanted.modules, n)}
        if not matched:
            raise ModelError(f"lora_target_modules {wanted.modules!r} matches no linear layer; {_examples(ordinary)}")
        return matched, set()
    chosen: set[str] = set()
    chosen_stacks: set[tuple[str, str]] = set()
    for target in wanted.modules:
        if target == ALL_LINEAR:
            chosen |= set(ordinary)
            continue
        found = {n for n in linears if _matches(target, n)}
        near = {n for n in found if inside(n)} or found  # a bare name means the text part, a full name what it says
        meant = {s for s in stacks if wanted.experts and _means(target, s[1])}
        if not near and not meant:
            raise ModelError(_nothing("lora_target_modules", target, linears, modules))
        chosen |= near
        chosen_stacks |= meant
    return chosen, chosen_stacks


def _by_parameters(wanted: Wanted, stacks: list[tuple[str, str]], model: nn.Module) -> set[tuple[str, str]]:
    chosen: set[tuple[str, str]] = set()
    for target in wanted.parameters:
        found = {s for s in stacks if _matches(target, ".".join(s))}
        if not found:
            names = [".".join(s) for s in stacks]
            other = [n for n, _ in model.named_parameters() if _matches(target, n)]
            if other:
                raise ModelError(
                    f"lora_target_parameters {target!r} names {other[0]}, which is not a stack of experts; "
                    "name linear layers in lora_target_modules" + (f", stacks are {_short(names)}" if names else "")
                )
            raise ModelError(_nothing("lora_target_parameters", target, names, {}))
        chosen |= found
    return chosen


def _means(target: str, projection: str) -> bool:
    last = target.rpartition(".")[2]
    return last in (_DOWN_NAMES if projection == "down_proj" else _UP_NAMES)


def _matches(target: str, name: str) -> bool:
    return name == target or name.endswith(f".{target}")


def _matches_any(targets: Sequence[str], name: str) -> bool:
    return any(_matches(target, name) for target in targets)


def _in_layers(layers: tuple[int, ...] | None, name: str) -> bool:
    if layers is None:
        return True
    number = re.search(r"\.(\d+)\.", f".{name}.")
    return number is not None and int(number[1]) in layers


def _nothing(key: str, target: str, names: list[str], modules: dict[str, nn.Module]) -> str:
    """The sentence for a target that matches nothing, with the nearest names that would."""
    other = [f"{n} ({type(m).__name__})" for n, m in modules.items() if _matches(target, n)]
    if other:
        return f"{key} {target!r} matches only {other[0]}, which is not a linear layer; to train it whole, name it in modules_to_save"
    families = sorted({n.rpartition(".")[2] for n in names})
    close = difflib.get_close_matches(target.rpartition(".")[2], families, n=3, cutoff=0.5)
    if close:
        return f"{key} {target!r} matches nothing in this model; did you mean {' or '.join(map(repr, close))}?"
    return f"{key} {target!r} matches nothing in this model; it has {_short(families) or 'nothing that can be adapted'}"


def _examples(names: list[str]) -> str:
    return f"names look like {_short(names)}" if names else "the model has none"


def _short(names: Sequence[str]) -> str:
    shown = ", ".join(names[:8])
    return f"{shown}, ..." if len(names) > 8 else shown


def families(names: Sequence[str]) -> Iterator[tuple[str, list[str]]]:
    """Names grouped by what they are in every layer: numbers become '*'."""
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault(re.sub(r"(?<=\.)\d+(?=\.|$)", "*", name), []).append(name)
    yield from groups.items()
