"""A model taught to read rows in which answers branch off one prompt: its attention is exchanged for the time of a forward pass.

transformers asks for attention by name, per layer: within `row` the name is ours, so whoever else runs the model, or another tree over
its weights, keeps the one it was loaded with. Layers that are computed again in the backward pass take the row with them (`kept`).
Which models this is right for is found out by trying: a small row must be worth what its samples are worth each by itself.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface

from ropewalk.engine.cache import Layout
from ropewalk.errors import ModelError
from ropewalk.kernels.branching import Branching, Piece, branching
from ropewalk.kernels.cross_entropy import IGNORED
from ropewalk.models.head import Head

NAME = "ropewalk_branching"
SMALL = 1 << 22  # numbers of a weight whose gradient is compared
PROBE = (Piece(7, (5, 3, 4)), Piece(0, (6,)))


class _Unfit(Exception):
    """Why a model cannot read such rows."""


@dataclass(frozen=True)
class _Running:
    """What the forward pass that is running attends by."""

    exchange: tuple[Any, ...]  # the configurations that its layers look up the name of their attention in
    layout: Layout
    row: Branching
    attended: set[int] = field(default_factory=set)


@dataclass(frozen=True)
class _Probe:
    row: Branching
    ids: Tensor  # [T]
    labels: Tensor  # [T]


_running: list[_Running] = []  # one at a time in a process


class BranchingModel:
    """A model that reads such rows; `reason` says why it does not, where it does not.

    Within a row its samples are apart, also of a model that by itself makes no mask of where they begin.
    """

    def __init__(self, model: Any, head: Head) -> None:
        apart = type(head) is Head and head.isolation == "unpacked"
        self.model, self.head = model, replace(head, isolation="positions") if apart else head
        self.reason = ""
        try:
            self._layout = _layout_of(model)
            self._exchange = _configurations(model)
            AttentionInterface.register(NAME, branching_attention)
            self._prove()
        except _Unfit as why:
            self.reason = str(why)

    @property
    def window(self) -> int:
        """The narrowest of its windows; 0 where no layer has one."""
        return min((w for w, kind in zip(self._layout.windows, self._layout.kinds) if kind == "sliding"), default=0)

    @contextmanager
    def row(self, row: Branching, model: Any = None) -> Iterator[set[int]]:
        """Within it the model, or another of its kind, attends by this row; gives the layers that have."""
        other = model is not None and model is not self.model
        running = _Running(_configurations(model) if other else self._exchange, self._layout, row)
        with _taking(running):
            yield running.attended

    def _prove(self) -> None:
        training = self.model.training
        try:
            with torch.no_grad():
                self.model.train()  # only to see whether attention drops anything out
                self._attend(self._probe())
                self.model.eval()
            self._compare()
        except (RuntimeError, TypeError, AttributeError, ValueError, IndexError) as error:
            raise _Unfit(f"it asks more of its attention than is done here ({error})") from error
        finally:
            self.model.train(training)

    def _attend(self, probe: _Probe) -> Tensor:
        with self.row(probe.row) as attended:
            found = self._log_probs(probe.ids, probe.labels, probe.row.positions())
        kinds = self._layout.kinds
        missing = [number for number, kind in enumerate(kinds) if kind != "none" and number not in attended]
        if missing:
            raise _Unfit(f"its layer {missing[0]} attends without transformers' attention interface")
        return found

    def _compare(self) -> None:
        """Log-probs, and the gradient of what learns in the first layer, beside those of the samples by themselves."""
        probe = self._probe()
        with torch.enable_grad():
            ours = self._with_slope(self._attend(probe))
            wrong = self._with_slope(self._log_probs(probe.ids, probe.labels, torch.arange(len(probe.ids))))
            parts = []
            for begin, end, home in probe.row.spans()[1:]:
                taken = (
                    torch.cat([torch.arange(home, PROBE[0].prompt), torch.arange(begin, end)])
                    if home != begin
                    else slice(begin, end)
                )
                ids, labels = probe.ids[taken], probe.labels[taken]
                parts.append((begin, end, *self._with_slope(self._log_probs(ids, labels, torch.arange(len(ids))))))
        values, slope = torch.zeros_like(ours[0]), torch.zeros_like(ours[1])
        for begin, end, alone, its in parts:
            values[begin:end] = alone[begin - end :]
            slope += its
        exact = self.model.dtype in (torch.float32, torch.float64)
        share, least = (0.01, 1e-5) if exact else (0.25, 1e-2)
        for what, mine, theirs, amiss in zip(("log-probabilities", "gradients"), ours, (values, slope), wrong):
            off, leak = float((mine - theirs).norm()), float((amiss - theirs).norm())
            if not off <= share * leak + least * float(theirs.norm()):
                raise _Unfit(
                    f"the {what} of a row with a shared prompt are off by {off:.2g}, those of a wrong one by {leak:.2g}"
                )

    def _with_slope(self, found: Tensor) -> tuple[Tensor, Tensor]:
        """The log-probs [T], and the gradient of their sum to the first weights that learn, flat: it comes through every layer."""
        learning = (p for p in self.model.parameters() if p.requires_grad and p.numel() <= SMALL)
        first = [*islice(learning, 4)]
        if not first or not found.requires_grad:
            return found.detach(), found.new_zeros(1)
        slopes = torch.autograd.grad(found.sum(), first, materialize_grads=True, allow_unused=True)
        return found.detach(), torch.cat([slope.flatten().to(found.dtype) for slope in slopes])

    def _log_probs(self, ids: Tensor, labels: Tensor, places: Tensor) -> Tensor:
        return self.head.log_probs(self.model, ids[None], labels[None], places.to(ids.device)[None]).flatten()

    def _probe(self) -> _Probe:
        """Every branch begins with an id that nothing predicts; padding lies at the end."""
        device = self.model.device
        row = Branching(PROBE, sum(piece.length for piece in PROBE) + 2, device)
        ids = (torch.arange(row.length, device=device) * 7919 + 11) % int(self.model.get_input_embeddings().weight.shape[0])
        labels = ids.clone()
        labels[[begin for begin, _, _ in row.spans()]] = IGNORED
        labels[: PROBE[0].prompt] = IGNORED
        return _Probe(row, ids, labels)


def branching_attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
) -> tuple[Tensor, None]:
    """query [1, H, T, D] -> [1, T, H, V], of the row that is running."""
    running = _running[-1]
    layer = module.layer_idx
    window = running.layout.windows[layer] if running.layout.kinds[layer] == "sliding" else 0
    if not getattr(module, "is_causal", True):
        raise _Unfit(f"{type(module).__name__} looks ahead")
    if attention_mask is not None:
        raise _Unfit(f"{type(module).__name__} has a mask of its own")
    if options.get("dropout"):
        raise _Unfit("its attention drops out weights")
    for name in ("softcap", "position_bias"):
        if options.get(name) is not None:
            raise _Unfit(f"its attention has {'a soft cap' if name == 'softcap' else 'a bias'}")
    if options.get("sliding_window") not in (None, 0, window):
        raise _Unfit(f"layer {layer} has a window of {options['sliding_window']} where its configuration says {window}")
    running.attended.add(layer)
    scale = options.get("scaling") or query.shape[-1] ** -0.5
    q, k, v = (rows[0].transpose(0, 1) for rows in (query, key, value))
    return branching(q, k, v, running.row, scale, window, options.get("s_aux")).unsqueeze(0), None


def kept(context: AbstractContextManager[Any]) -> AbstractContextManager[Any]:
    """The context, and within it the row that is running now, whenever it is entered: for what is computed again."""
    return _Again(context, _running[-1]) if _running else context


class _Again(AbstractContextManager[Any]):
    def __init__(self, context: AbstractContextManager[Any], running: _Running) -> None:
        self._context, self._taken = context, running
        self._open = ExitStack()

    def __enter__(self) -> Any:
        self._open.enter_context(_taking(self._taken))
        return self._open.enter_context(self._context)

    def __exit__(self, *failed: Any) -> bool | None:
        return self._open.__exit__(*failed)


@contextmanager
def _taking(running: _Running) -> Iterator[None]:
    before = [config._attn_implementation for config in running.exchange]
    _running.append(running)
    for config in running.exchange:
        config._attn_implementation = NAME
    try:
        yield
    finally:
        for config, name in zip(running.exchange, before):
            config._attn_implementation = name
        _running.pop()


def may_branch(model: Any) -> bool:
    """Whether nothing in the model's configuration speaks against it."""
    try:
        return bool(_layout_of(model))
    except _Unfit:
        return False


def _layout_of(model: Any) -> Layout:
    try:
        layout = Layout.of(model.config.get_text_config(decoder=True))
    except ModelError as error:
        raise _Unfit(str(error)) from error
    if any(layout.states) or {"recurrent", "chunked"} & set(layout.kinds):
        raise _Unfit("some of its layers keep a state, or attend in chunks")
    return layout


def _configurations(model: Any) -> tuple[Any, ...]:
    """Every configuration that a module of the model may look its attention up in, each once."""
    found = {
        id(config): config
        for module in model.modules()
        if hasattr(config := getattr(module, "config", None), "_attn_implementation")
    }
    return tuple(found.values())
