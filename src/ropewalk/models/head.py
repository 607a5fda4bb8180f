"""The output head of any causal language model: its loss without its logits.

No architecture is named here. What a model does after its head (scales, soft caps) is measured once by putting known values in
the head's place, and the result is compared with the model's own logits. A model that cannot be proven equal keeps its whole
logits and says so. The same probe finds out how packed samples are kept apart. Legend: B sequences, T tokens, H hidden,
V vocabulary.
"""

from __future__ import annotations

import inspect
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ropewalk.kernels.cross_entropy import IGNORED, linear_cross_entropy
from ropewalk.kernels.log_probs import LogProbs, linear_log_probs, of_logits

Isolation = Literal["positions", "one row", "unpacked"]
"""How samples packed into a row are kept apart: the model reads it from position ids; it does so if all rows are laid end to
end (flash attention); or it cannot, and every sample gets a padded row of its own."""


@dataclass(frozen=True)
class AfterHead:
    """What a model does to its head's output z: `softcap * tanh(scale * z / softcap)`, or `scale * z` without a cap."""

    scale: float = 1.0
    softcap: float | None = None

    def __call__(self, z: Tensor) -> Tensor:
        z = z * self.scale
        return z if self.softcap is None else self.softcap * torch.tanh(z / self.softcap)


@dataclass(frozen=True)
class Head:
    """How to get the loss out of one model. `after` is None where the whole logits are needed, and `notices` say why."""

    after: AfterHead | None
    isolation: Isolation
    notices: tuple[str, ...] = ()

    def loss(
        self, model: nn.Module, ids: Tensor, labels: Tensor, position_ids: Tensor | None = None, **extra: Any
    ) -> tuple[Tensor, int]:
        """The summed loss over the labels and their number; ids, labels and position_ids are [B, T], labels not shifted.

        labels[b, t] is the token at t, predicted from t - 1, so the first token of every packed sample has label -100.
        """
        parts = [self._loss(model, *part, extra) for part in self._apart(ids, labels, position_ids)]
        return torch.stack([loss for loss, _ in parts]).sum(), sum(count for _, count in parts)

    def _loss(
        self, model: nn.Module, ids: Tensor, labels: Tensor, position_ids: Tensor | None, extra: dict[str, Any]
    ) -> tuple[Tensor, int]:
        targets = torch.nn.functional.pad(labels[:, 1:], (0, 1), value=IGNORED).flatten()
        count = int((targets != IGNORED).sum())
        if self.after is None or not _only_multiplies(output_module(model)):  # an adapter may have wrapped it since
            out = run(model, ids, position_ids, **extra)
            flat = out.logits.flatten(0, 1).float()
            loss = torch.nn.functional.cross_entropy(flat, targets, ignore_index=IGNORED, reduction="sum")
            return loss + count * _balance(model, out), count
        head = output_module(model)
        with instead_of(head, nothing) as seen:
            out = run(model, ids, position_ids, **extra)
        hidden = seen[0].flatten(0, 1)
        scale, softcap = self.after.scale, self.after.softcap
        loss = linear_cross_entropy(hidden, head.weight, targets, bias=head.bias, scale=scale, softcap=softcap)
        return loss + count * _balance(model, out), count

    def log_probs(
        self, model: nn.Module, ids: Tensor, labels: Tensor, position_ids: Tensor | None = None, **extra: Any
    ) -> Tensor:
        """log p of the token at t given those before it, [B, T] float32; 0 where labels[b, t] is -100. Labels are not shifted."""
        return self.log_probs_at(model, ids, labels, position_ids, **extra).of_labels

    def log_probs_at(
        self,
        model: nn.Module,
        ids: Tensor,
        labels: Tensor,
        position_ids: Tensor | None = None,
        *,
        temperature: float = 1.0,
        entropy: bool = False,
        **extra: Any,
    ) -> LogProbs:
        """The same [B, T] at a temperature, which divides the logits, with the entropy of what each token was drawn from."""

        def of(ids: Tensor, labels: Tensor, position_ids: Tensor | None) -> LogProbs:
            return self._log_probs(model, ids, labels, position_ids, temperature, entropy, extra)

        if position_ids is not None and self.isolation == "unpacked":
            # Where each token of the rows that are made comes from: numbers take the place of ids.
            places = torch.arange(ids.numel(), device=ids.device).view_as(ids)
            values, entropies = [], []
            for place, target, where in unpack(places, labels, position_ids):
                part, kept = of(ids.flatten()[place], target, where), target != IGNORED
                values.append((place[kept], part.of_labels[kept]))
                if part.entropy is not None:
                    entropies.append((place[kept], part.entropy[kept]))
            return LogProbs(_put(ids, values), _put(ids, entropies) if entropies else None)
        if position_ids is not None and self.isolation == "one row":
            ((flat, targets, positions),) = self._apart(ids, labels, position_ids)
            found = of(flat, targets, positions)
            return LogProbs(found.of_labels.view_as(ids), None if found.entropy is None else found.entropy.view_as(ids))
        return of(ids, labels, position_ids)

    def _log_probs(
        self,
        model: nn.Module,
        ids: Tensor,
        labels: Tensor,
        position_ids: Tensor | None,
        temperature: float,
        entropy: bool,
        extra: dict[str, Any],
    ) -> LogProbs:
        targets = torch.nn.functional.pad(labels[:, 1:], (0, 1), value=IGNORED).flatten()
        if self.after is None or not _only_multiplies(output_module(model)):
            logits = run(model, ids, position_ids, **extra).logits.flatten(0, 1).float()
            found = of_logits(logits if temperature == 1.0 else logits / temperature, targets, entropy=entropy)
        else:
            head = output_module(model)
            with instead_of(head, nothing) as seen:
                run(model, ids, position_ids, **extra)
            scale, softcap = self.after.scale, self.after.softcap
            found = linear_log_probs(
                seen[0].flatten(0, 1),
                head.weight,
                targets,
                bias=head.bias,
                scale=scale,
                softcap=softcap,
                temperature=temperature,
                entropy=entropy,
            )
        return LogProbs(*(None if part is None else _behind(part.view_as(ids)) for part in found))  # type: ignore[arg-type]

    def _apart(self, ids: Tensor, labels: Tensor, position_ids: Tensor | None) -> list[tuple[Tensor, Tensor, Tensor | None]]:
        if position_ids is None or self.isolation == "positions":
            return [(ids, labels, position_ids)]
        if self.isolation == "one row":
            labels = torch.cat([torch.full_like(labels[:, :1], IGNORED), labels[:, 1:]], dim=1)
            return [(ids.reshape(1, -1), labels.reshape(1, -1), position_ids.reshape(1, -1))]
        return list(unpack(ids, labels, position_ids))


def output_head(model: nn.Module) -> Head:
    """Find and prove how the loss of this model is computed, by six forward passes over two dozen tokens."""
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            isolation = find_isolation(model)
            try:
                return Head(_prove(model), isolation)
            except _NotProven as why:
                notice = f"this model's whole logits are computed in every step, which takes more memory: {why}"
                return Head(None, isolation, (notice,))
    finally:
        model.train(training)


def run(model: nn.Module, ids: Tensor, position_ids: Tensor | None = None, **extra: Any) -> Any:
    """One forward pass over text [B, T] without a cache, with the inputs that only some models insist on."""
    accepted = _accepted(model)
    if hasattr(getattr(model, "config", None), "vision_config"):
        # Multimodal models ask where the images are when they train; in text there are none.
        for name in accepted & {"mm_token_type_ids", "token_type_ids"}:
            extra.setdefault(name, torch.zeros_like(ids))
    if position_ids is not None and "position_ids" in accepted:
        extra["position_ids"] = position_ids
    return model(input_ids=ids, use_cache=False, **extra)


def _balance(model: nn.Module, out: Any) -> Tensor | float:
    """The load-balancing loss of the routers, which models compute when their config says output_router_logits; only to train by."""
    balance = getattr(out, "aux_loss", None)
    if balance is None or not model.training:
        return 0.0
    weighted: Tensor = balance * float(model.config.get_text_config().router_aux_loss_coef)  # type: ignore[operator, union-attr]
    return weighted


def output_module(model: nn.Module) -> nn.Linear:
    """The module that turns hidden states into logits."""
    head = model.get_output_embeddings()  # type: ignore[operator]
    if head is None or not hasattr(head, "weight"):
        raise _NotProven("it has no output embeddings")
    found: nn.Linear = head
    return found


def unpack(ids: Tensor, labels: Tensor, position_ids: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Give every sample of the packed rows [B, T] a padded row of its own; samples of like length share a batch.

    No sample is padded to twice its length, so all batches together hold at most twice the tokens of the rows.
    """
    edge = position_ids == 0
    edge[:, 0] = True
    starts = torch.nonzero(edge.flatten()).squeeze(1).tolist()
    ends = [*starts[1:], ids.numel()]
    flat_ids, flat_labels = ids.flatten(), labels.flatten()
    trained = (flat_labels != IGNORED).cpu()
    classes: dict[int, list[tuple[int, int]]] = defaultdict(list)
    for start, end in zip(starts, ends):
        classes[(end - start - 1).bit_length()].append((start, end))
    made = False
    for spans in classes.values():
        # Padding looks like samples of one token; it and whatever else trains nothing is left out.
        kept = [span for span in spans if bool(trained[slice(*span)].any())]
        if kept:
            yield _padded(flat_ids, flat_labels, kept)
            made = True
    if not made:
        yield _padded(flat_ids, flat_labels, [(starts[0], ends[0])])


def _padded(ids: Tensor, labels: Tensor, spans: list[tuple[int, int]]) -> tuple[Tensor, Tensor, Tensor]:
    """The spans of flat ids and labels as rows [samples, longest]."""
    pad = torch.nn.utils.rnn.pad_sequence
    out_ids = pad([ids[start:end] for start, end in spans], batch_first=True)
    out_labels = pad([labels[start:end] for start, end in spans], batch_first=True, padding_value=IGNORED)
    return out_ids, out_labels, torch.arange(out_ids.shape[1], device=ids.device).expand(out_ids.shape)


def _behind(predictions: Tensor) -> Tensor:
    """[B, T]: what was found at t - 1 about the token at t, at t."""
    return torch.nn.functional.pad(predictions[:, :-1], (1, 0))


def _put(ids: Tensor, parts: list[tuple[Tensor, Tensor]]) -> Tensor:
    """Values at their places in rows shaped as ids [B, T], 0 elsewhere."""
    found = parts[0][1].new_zeros(ids.numel())
    for place, values in parts:
        found = found.index_add(0, place, values)
    return found.view_as(ids)


class _NotProven(Exception):
    pass


def _accepted(model: nn.Module) -> set[str]:
    inner = getattr(model, "base_model", model) if hasattr(model, "peft_config") else model
    return set(inspect.signature(inner.forward).parameters) | set(inspect.signature(model.forward).parameters)


@contextmanager
def instead_of(head: nn.Module, stand_in: Callable[[Tensor], Tensor]) -> Iterator[list[Tensor]]:
    """Within the context the head keeps what it is given and answers with the stand-in."""
    seen: list[Tensor] = []

    def forward(hidden: Tensor) -> Tensor:
        seen.append(hidden)
        return stand_in(hidden)

    head.forward = forward
    try:
        yield seen
    finally:
        del head.forward


def nothing(hidden: Tensor) -> Tensor:
    return torch.zeros((*hidden.shape[:-1], 1), dtype=hidden.dtype, device=hidden.device)


def _probe_ids(model: nn.Module) -> Tensor:
    """Two rows [2, 12] that differ in their first seven tokens only."""
    device = next(model.parameters()).device
    vocabulary = _vocabulary(model)
    ids = (torch.arange(24, device=device).reshape(2, 12) * 7919 + 11) % vocabulary
    ids[1, 7:] = ids[0, 7:]
    return ids


def _vocabulary(model: nn.Module) -> int:
    table = model.get_input_embeddings()  # type: ignore[operator]
    return int(table.weight.shape[0])


def _prove(model: nn.Module) -> AfterHead:
    head = output_module(model)
    if not _only_multiplies(head):
        raise _NotProven(f"its output head is a {type(head).__name__} that does more than multiply")
    ids = _probe_ids(model)
    after = _measure(model, head, ids)
    with instead_of(head, nothing) as seen:
        run(model, ids)
    if len(seen) != 1 or seen[0].shape[:-1] != ids.shape:
        raise _NotProven("its output head is not called once over all hidden states")
    own = model(input_ids=ids, use_cache=False).logits.float()
    ours = after(torch.nn.functional.linear(seen[0], head.weight, head.bias).float())
    if ours.shape != own.shape:
        raise _NotProven(f"its logits have shape {tuple(own.shape)} where its head gives {tuple(ours.shape)}")
    tolerance = 1e-4 if head.weight.dtype in (torch.float32, torch.float64) else 2e-2
    difference = float((ours - own).abs().max())
    if not difference <= tolerance * float(own.abs().max()):
        raise _NotProven(f"its own logits differ from its head's by {difference:.2g}")
    return after


def _only_multiplies(head: nn.Module) -> bool:
    return type(head) is nn.Linear and not ("forward" in head.__dict__ or head._forward_hooks or head._forward_pre_hooks)


def _measure(model: nn.Module, head: nn.Module, ids: Tensor) -> AfterHead:
    """Read scale and cap off the model by letting its head answer with known values."""
    small, huge = 2.0**-10, 1e6
    z = torch.cat([torch.tensor([small, -huge, huge]), torch.linspace(-100, 100, 401)]).to(ids.device)
    try:
        with instead_of(head, lambda hidden: z.expand(*hidden.shape[:-1], len(z)).clone()):
            answer = run(model, ids).logits
    except (RuntimeError, IndexError, ValueError) as error:
        raise _NotProven(f"its logits cannot be narrowed ({error})") from error
    got = answer[0, 0].float()
    if got.shape != z.shape or not torch.equal(answer.float(), got.expand_as(answer)):
        raise _NotProven("its logits are not a function of its head's output alone")
    scale, top = float(got[0]) / small, float(got[2])
    scale = 1.0 if abs(scale - 1) < 1e-6 else scale
    after = AfterHead(scale, top if top < 0.99 * scale * huge else None)
    if not torch.allclose(after(z), got, rtol=1e-4, atol=1e-4):
        raise _NotProven("what follows its head is neither a scale nor a soft cap")
    return after


def find_isolation(model: nn.Module) -> Isolation:
    """Swap the first of two packed samples and see whether the logits of the second change."""
    if "position_ids" not in _accepted(model):
        return "unpacked"
    ids = _probe_ids(model)
    positions = torch.cat([torch.arange(7), torch.arange(5)]).to(ids.device).expand(2, 12)
    leak = _influence(run(model, ids).logits)
    flash = "flash" in str(getattr(getattr(model, "config", None), "_attn_implementation", ""))
    packed = run(model, ids.reshape(1, -1), positions.reshape(1, -1)) if flash else run(model, ids, positions)
    logits = packed.logits.reshape(2, 12, -1)
    alone = model(input_ids=ids[:1, 7:], use_cache=False).logits
    if not _close(logits[:1, 7:].float(), alone.float()) or _influence(logits) > 0.02 * leak:
        return "unpacked"
    return "one row" if flash else "positions"


def _influence(logits: Tensor) -> float:
    """How far the logits [2, 12, V] of the last five, equal tokens depend on the seven before."""
    return float((logits[0, 7:].float() - logits[1, 7:].float()).norm())


def _close(a: Tensor, b: Tensor) -> bool:
    return bool((a - b).norm() <= 0.1 * b.norm())
