"""Adapters over one model, several of them in one batch: each row of a step is adapted by its own request's adapter, or by none.

An activated adapter acts only from its invocation on (Greenewald et al., "Activated LoRA", 2025), so that what lies before, such as
the documents of a conversation, is read once for the base and for all such adapters.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from ropewalk.engine.batch import Part
from ropewalk.engine.engine import Rows
from ropewalk.engine.latent import EXPANSION, is_latent
from ropewalk.engine.recurrent import focus
from ropewalk.errors import ModelError, NotFound
from ropewalk.models.experts import expert_modules, experts_forward
from ropewalk.models.lora import LoraSpec, attach
from ropewalk.models.lora_layers import ExpertLora, LinearLora

EXPERTS = "ropewalk_mixed"


@dataclass(frozen=True)
class Loaded:
    """One adapter, as it lies in memory."""

    digest: str
    version: int
    invocation: tuple[int, ...] | None
    linears: dict[str, LinearLora]
    experts: dict[str, ExpertLora]


Spans = list[tuple[Loaded | None, int, int]]  # whose adapter acts on rows [begin, end)


class Adapters:
    """The adapters of a model, by name."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self._loaded: dict[str, Loaded] = {}
        self._rows: Sequence[Rows] = ()
        self._last: Sequence[str | None] = ()
        self._known: dict[tuple[int, int], tuple[Sequence[Part] | None, Spans]] = {}  # what a step has found for so many rows
        self._wrapped: set[str] = set()
        stacks = list(expert_modules(model))
        if stacks:
            ALL_EXPERTS_FUNCTIONS.register(EXPERTS, _mixed_experts)
            model.set_experts_implementation(EXPERTS)
            for name, module in stacks:
                module.__dict__["_ropewalk_mixed"] = partial(self._through_experts, name)

    def load(self, name: str, folder: Path) -> None:
        """Reads a folder in PEFT's layout; a name that is there already becomes this one from the next step on."""
        spec = _spec_of(folder, self.model)
        if spec.modules_to_save:
            raise ModelError(
                f"the adapter {folder} replaces whole modules ({', '.join(spec.modules_to_save)}), which cannot be mixed with "
                "others in one batch; merge it into its base and serve that: ropewalk merge"
            )
        trained = attach(self.model, spec, seed=0, dtype=self.model.dtype)
        try:
            trained.load(folder)
        finally:
            trained.detach()
            self.model.requires_grad_(False)
        linears, experts = dict(trained.linears), dict(trained.experts)
        for layer in linears:
            attention, _, last = layer.rpartition(".")
            if last == EXPANSION and is_latent(self.model.get_submodule(attention)):
                raise ModelError(
                    f"the adapter {folder} changes {EXPANSION}, through which this model's attention reads all that it keeps, so "
                    f"that it cannot be mixed with others; train it without {EXPANSION}, or merge it into its base: ropewalk merge"
                )
        for part in (*linears.values(), *experts.values()):
            part.requires_grad_(False)
        # What `detach` has put back is the plain implementation of experts.
        if any(True for _ in expert_modules(self.model)):
            self.model.set_experts_implementation(EXPERTS)
        before = self._loaded.get(name)
        self._loaded[name] = Loaded(
            _digest(folder), before.version + 1 if before else 0, spec.alora_invocation_tokens, linears, experts
        )
        self._wrapped |= linears.keys()
        for layer in self._wrapped:  # all of them: `detach` leaves layers plain
            linear = self.model.get_submodule(layer)
            linear.forward = partial(self._through_linear, layer, linear)

    def names(self) -> list[str]:
        return sorted(self._loaded)

    def digest(self, name: str) -> str:
        return self._found(name).digest

    def invocation(self, name: str) -> tuple[int, ...] | None:
        return self._found(name).invocation

    def version(self, name: str) -> int:
        return self._found(name).version

    @contextmanager
    def rows(self, rows: Sequence[Rows], last: Sequence[str | None]) -> Iterator[None]:
        """Within it, the rows of a forward pass belong to these adapters; `last` names those of the rows whose logits are kept."""
        self._rows, self._last, self._known = rows, last, {}
        try:
            yield
        finally:
            self._rows, self._last, self._known = (), (), {}

    def _found(self, name: str) -> Loaded:
        try:
            return self._loaded[name]
        except KeyError:
            raise NotFound(f"no adapter '{name}' is loaded here; there are {', '.join(self.names()) or 'none'}") from None

    def _through_linear(self, name: str, linear: Any, x: Tensor) -> Tensor:
        spans = self._spans(x)
        adapted = [(lora, begin, end) for found, begin, end in spans if found and (lora := found.linears.get(name))]
        if len(spans) == 1 and adapted:
            return adapted[0][0].through(linear, x)
        y: Tensor = type(linear).forward(linear, x)
        if not adapted:
            return y
        flat_x, flat_y = x.reshape(-1, x.shape[-1]), y.reshape(-1, y.shape[-1]).clone()
        for lora, begin, end in adapted:
            flat_y[begin:end] = lora.add_to(linear, flat_x[begin:end], flat_y[begin:end])
        return flat_y.view(y.shape)

    def _through_experts(self, name: str, module: Any, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        """x [T, H], ids [T, k], weights [T, k] -> [T, H]."""
        outs = []
        for found, begin, end in self._spans(x):
            lora = found.experts.get(name) if found else None
            outs.append(experts_forward(module, x[begin:end], ids[begin:end], weights[begin:end], lora))
        return outs[0] if len(outs) == 1 else torch.cat(outs)

    def _spans(self, x: Tensor) -> Spans:
        """The rows of x in order, with the adapter that acts on them; neighbours with the same are one."""
        count = x.numel() // x.shape[-1]
        parts = focus[-1] if focus else None
        known = self._known.get((count, id(parts)))
        if known is not None and known[0] is parts:
            return known[1]
        rows = self._rows
        if rows and parts is not None:
            rows = _within(rows, parts)
        if rows and count != rows[-1][2]:
            assert count == len(self._last), f"{count} rows reach a layer; the step has {rows[-1][2]}"
            rows = [(name, index, index + 1) for index, name in enumerate(self._last)]
        spans: Spans = []
        for name, begin, end in rows or [(None, 0, count)]:
            acts = None if name is None else self._found(name)
            if spans and spans[-1][0] is acts:
                spans[-1] = (acts, spans[-1][1], end)
            else:
                spans.append((acts, begin, end))
        if self._rows:
            self._known[count, id(parts)] = parts, spans
        return spans


def _within(rows: Sequence[Rows], parts: Sequence[Part]) -> list[Rows]:
    """Those of the rows that lie in these parts, counted from the first of them."""
    found: list[Rows] = []
    offset = 0
    for part in parts:
        for name, begin, end in rows:
            if begin < part.end and end > part.begin:
                shift = offset - part.begin
                found.append((name, max(begin, part.begin) + shift, min(end, part.end) + shift))
        offset += part.end - part.begin
    return found


def _mixed_experts(module: Any, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
    mixed: Callable[..., Tensor] = module.__dict__["_ropewalk_mixed"]
    return mixed(module, x, ids, weights)


def _spec_of(folder: Path, model: Any) -> LoraSpec:
    """What adapter_config.json says, in our words."""
    path = folder / "adapter_config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise NotFound(f"{folder} is no adapter: it has no adapter_config.json") from None
    except ValueError as error:
        raise ModelError(f"{path} is not JSON: {error}") from error
    if config.get("peft_type") != "LORA":
        raise ModelError(f"{folder} is an adapter of type {config.get('peft_type')}; this engine serves LoRA")
    modules = config.get("target_modules") or ()
    parameters = config.get("target_parameters") or ()
    # PEFT names some linear layers of mixture-of-experts models by their weight.
    weights = [name.removesuffix(".weight") for name in parameters if name.endswith(".weight")]
    if weights and not isinstance(modules, str):
        layers = [name for name, _ in model.named_modules()]
        modules = [*modules, *(n for n in layers if any(n == w or n.endswith(f".{w}") for w in weights))]
    stacks = tuple(name for name in parameters if not name.endswith(".weight"))
    spec = LoraSpec(
        r=config["r"],
        alpha=config["lora_alpha"],
        target_modules=modules if isinstance(modules, str) else tuple(modules),
        target_parameters=stacks,
        target_linear=False,
        experts=bool(stacks),
        rank_pattern=config.get("rank_pattern") or {},
        alpha_pattern=config.get("alpha_pattern") or {},
        rslora=bool(config.get("use_rslora")),
        dora=bool(config.get("use_dora")),
        modules_to_save=tuple(config.get("modules_to_save") or ()),
    )
    invocation = config.get("alora_invocation_tokens")
    return replace(spec, alora_invocation_tokens=tuple(invocation)) if invocation else spec


def _digest(folder: Path) -> str:
    total = hashlib.sha256()
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        with (folder / name).open("rb") as file:
            total.update(hashlib.file_digest(file, "sha256").digest())
    return total.hexdigest()
