"""A model taught to read rows in which answers branch off one prompt: its attention is exchanged for the time of a forward pass.

transformers asks for attention by name, per layer: within `row` the name is ours, so whoever else runs the model, or another tree over
its weights, keeps the one it was loaded with. Layers that are computed again in the backward pass take the row with them (`kept`).
Which models this is right for is found out by trying: a small row must be worth what its samples are worth each by itself.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field
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
PROBE = (Piece(7, (5, 3, 4)), Piece(0, (6,)))
SHARE = {torch.float64: 0.01, torch.float32: 0.01}  # how far off the probe may be, as a part of what a wrong mask changes
COARSE = 0.25  # with 16 bits


class _Unfit(Exception):
    """Why a model cannot read such rows."""


@dataclass(frozen=True)
class _Running:
    """What the forward pass that is running attends by."""

    exchange: tuple[Any, ...]  # the configurations that its layers look up the name of their attention in
    layout: Layout
    row: Branching
    attended: set[int] = field(default_factory=set)


_running: list[_Running] = []  # one at a time in a process


class BranchingModel:
    """A model that reads such rows; `reason` says why it does not, where it does not."""

    def __init__(self, model: Any, head: Head) -> None:
        self.model, self.head = model, head
        self.reason = ""
        try:
            self._layout = _layout_of(model)
            self._exchange = _configurations(model)
            AttentionInterface.register(NAME, branching_attention)
            self._prove()
        except _Unfit as why:
            self.reason = str(why)

    @contextmanager
    def row(self, row: Branching) -> Iterator[set[int]]:
        """Within it the model attends by this row; gives the layers that have."""
        running = _Running(self._exchange, self._layout, row)
        with _taking(running):
            yield running.attended

    def _prove(self) -> None:
        if self.head.isolation == "unpacked":
            raise _Unfit("it carries a state from one sample to the next")
        training = self.model.training
        try:
            # In train mode only to see whether attention drops anything out.
            for mode in (True, False):
                self.model.train(mode)
                with torch.no_grad():
                    self._try()
        except (RuntimeError, TypeError, AttributeError, ValueError, IndexError) as error:
            raise _Unfit(f"it asks more of its attention than is done here ({error})") from error
        finally:
            self.model.train(training)

    def _try(self) -> None:
        device = self.model.device
        length = sum(piece.length for piece in PROBE) + 2  # with padding
        row = Branching(PROBE, length, device)
        ids, labels = _probe(row, int(self.model.get_input_embeddings().weight.shape[0]))
        places = row.positions().to(device)[None]
        with self.row(row) as attended:
            ours = self._log_probs(ids[None], labels[None], places)
        kinds = self._layout.kinds
        missing = [number for number, kind in enumerate(kinds) if kind != "none" and number not in attended]
        if missing:
            raise _Unfit(f"its layer {missing[0]} attends without transformers' attention interface")
        if self.model.training:
            return
        expected = torch.zeros_like(ours)
        spans = row.spans()
        prompt = PROBE[0].prompt
        for begin, end, home in spans[1:]:
            taken = torch.arange(begin, end, device=device)
            if home != begin:
                taken = torch.cat([torch.arange(prompt, device=device), taken])
            alone = self._log_probs(ids[taken][None], labels[taken][None], torch.arange(len(taken), device=device)[None])
            expected[begin:end] = alone[-(end - begin) :]
        wrong = self._log_probs(ids[None], labels[None], torch.arange(length, device=device)[None])
        off, leak = float((ours - expected).norm()), float((wrong - expected).norm())
        share, least = (SHARE[ours.dtype], 1e-5) if self.model.dtype in SHARE else (COARSE, 1e-2)
        if not off <= share * leak + least * float(expected.norm()):
            raise _Unfit(
                f"log-probabilities of a row with a shared prompt are off by {off:.2g}, where those of a wrong one are by {leak:.2g}"
            )

    def _log_probs(self, ids: Tensor, labels: Tensor, places: Tensor) -> Tensor:
        return (
            self.head.log_probs(self.model, ids, labels, places)
            .flatten()
            .to(torch.float64 if self.model.dtype == torch.float64 else torch.float32)
        )


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
    for name in ("softcap", "s_aux", "position_bias"):
        if options.get(name) is not None:
            raise _Unfit(f"its attention has {'a soft cap' if name == 'softcap' else 'sinks' if name == 's_aux' else 'a bias'}")
    if options.get("sliding_window") not in (None, 0, window):
        raise _Unfit(f"layer {layer} has a window of {options['sliding_window']} where its configuration says {window}")
    running.attended.add(layer)
    scale = options.get("scaling") or query.shape[-1] ** -0.5
    q, k, v = (rows[0].transpose(0, 1) for rows in (query, key, value))
    return branching(q, k, v, running.row, scale, window).unsqueeze(0), None


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


def _probe(row: Branching, vocabulary: int) -> tuple[Tensor, Tensor]:
    """Ids and labels [T]: every branch begins with the prompt's last id, as the prompt itself would go on."""
    ids = (torch.arange(row.length, device=row.device) * 7919 + 11) % vocabulary
    labels = ids.clone()
    for begin, _, _ in row.spans():
        labels[begin] = IGNORED
    labels[: PROBE[0].prompt] = IGNORED
    return ids, labels
