"""A model under training that also sees: its text part learns, and all else of it stays as it is.

The tower is no part of what is recomputed, sharded or saved: what it makes of a picture is constant, so no gradient goes there.
Legend: B lines, T tokens of a line, S samples, L tokens of the longest of them.
"""

from __future__ import annotations

import inspect
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import pad
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel

from ropewalk.errors import ModelError
from ropewalk.kernels.cross_entropy import IGNORED
from ropewalk.models.head import Head
from ropewalk.models.lens import PROBE, Lens, looks_at
from ropewalk.models.seeing import text_part

TYPES = ("mm_token_type_ids", "token_type_ids")  # what models call the kinds of ids
NEAR = {torch.float32: 1e-3}  # a part of the whole by which packed rows may differ; in 16 bits NEAR_16
NEAR_16 = 3e-2


@dataclass(frozen=True)
class Looked:
    """What the tower is given of the pictures of a micro-batch.  looking -> pupil"""

    each: Sequence[Mapping[str, Tensor]]  # of every picture
    by_sample: Sequence[int]  # how many of them each sample shows

    def of(self, samples: Sequence[int]) -> dict[str, Tensor]:
        """The tensors of these samples' pictures, one behind the other."""
        ends = torch.tensor([0, *self.by_sample]).cumsum(0).tolist()
        return _joined([one for sample in samples for one in self.each[ends[sample] : ends[sample + 1]]])


class Sighted:
    """The whole of a model, around its text part."""

    def __init__(self, whole: PreTrainedModel, lens: Lens, device: torch.device) -> None:
        if not hasattr(whole, "get_image_features"):
            raise ModelError(
                f"a {whole.config.model_type} takes pictures in a way that is not known here; train it on text alone"
            )
        self.whole, self.lens = whole, lens
        self.text: PreTrainedModel = text_part(whole)
        self.packs = False  # whether samples with pictures are kept apart in one line
        self.masks = False  # whether it takes masks made here to do so
        self._takes = looks_at(whole)
        self._asks = set(inspect.signature(whole.forward).parameters)
        self._index: Any = getattr(getattr(whole, whole.base_model_prefix), "get_rope_index", None)
        inside = {id(module) for module in whole.get_decoder().modules()}
        self._still = [module for module in whole.modules() if id(module) not in inside and module is not whole]
        for module in self._still:  # where layers wait on the host, all else is at hand
            for tensors in (module._parameters, module._buffers):
                for tensor in tensors.values():
                    if tensor is not None:
                        tensor.data = tensor.data.to(device)

    @property
    def frozen(self) -> int:
        """Parameters beside those of the text part."""
        text = {id(parameter) for parameter in self.text.parameters()}
        others = {id(p): p.numel() for p in self.whole.parameters() if id(p) not in text}
        if self.text is self.whole:
            others = {id(p): p.numel() for module in self._still for p in module.parameters(recurse=False)}
        return sum(others.values())

    def train(self, training: bool) -> None:
        """Sets the mode of the text part; the rest is never in training."""
        self.text.train(training)
        self.whole.training = training  # asked for losses of its routers
        for module in self._still:
            module.training = False

    def loss(self, head: Head, ids: Tensor, labels: Tensor, position_ids: Tensor, looked: Looked) -> Tensor:
        """Summed loss over the trained tokens of lines [B, T]; packed ones are laid out a sample to a line where need be."""
        losses = []
        for part, target, places, samples in self._laid(ids, labels, position_ids, len(looked.by_sample)):
            seen = looked.of(samples)
            extra = self._extra(part, seen)
            if places is not None:
                extra |= self._apart(part, places)
                places = self._places(part, places, seen)
            losses.append(head.loss(self.whole, part, target, places, **extra)[0])
        return torch.stack(losses).sum()

    @torch.no_grad()
    def try_packing(self, head: Head) -> bool:
        """Finds out whether two samples with pictures read the same in one line as each alone, by the model's masks or by ours."""
        if head.isolation != "positions":
            return False
        self.packs = self._kept_apart(head)
        if not self.packs and hasattr(type(self.whole), "create_masks_for_generate"):
            self.masks = True
            self.packs = self.masks = self._kept_apart(head)
        return self.packs

    def _kept_apart(self, head: Head) -> bool:
        noise = torch.Generator().manual_seed(0)
        looked = []
        for _ in range(2):
            pixels = torch.randint(0, 256, (*PROBE, 3), generator=noise, dtype=torch.uint8)
            looked.append(self.lens.tensors([Image.fromarray(pixels.numpy())]))
        apart = {self.lens.token_id, self.lens.feature_id}
        words = [id for id in range(3, 40) if id not in apart]
        of_picture = list(self.lens.ids(*PROBE))
        rows = [[*words[:7], *of_picture, *words[7:12]], [*words[12:16], *of_picture, *words[16:22]]]
        ids = torch.tensor([rows[0] + rows[1]], device=self.text.device)
        places = torch.cat([torch.arange(len(row)) for row in rows])[None].to(ids.device)
        labels = ids.masked_fill(places == 0, IGNORED)
        self.train(False)
        try:
            seen = _joined(looked)
            extra = self._extra(ids, seen) | self._apart(ids, places)
            packed = head.log_probs(self.whole, ids, labels, self._places(ids, places, seen), **extra)
            alone = []
            for row, one in zip(rows, looked):
                line = torch.tensor([row], device=ids.device)
                target = line.clone()
                target[:, 0] = IGNORED
                alone.append(head.log_probs(self.whole, line, target, None, **self._extra(line, one)))
        except (
            RuntimeError,
            ValueError,
            IndexError,
            TypeError,
            AttributeError,
        ):  # of a model that takes no such positions, or masks
            return False
        finally:
            self.train(True)
        wanted = torch.cat(alone, dim=1).float()
        difference = (packed.float() - wanted).norm() / wanted.norm()
        return bool(difference <= NEAR.get(self.whole.dtype, NEAR_16))

    def _laid(
        self, ids: Tensor, labels: Tensor, position_ids: Tensor, samples: int
    ) -> Iterator[tuple[Tensor, Tensor, Tensor | None, list[int]]]:
        """Lines to read at once, each with the numbers of its samples; without places where every sample has a line."""
        if samples == len(ids):
            yield ids, labels, None, list(range(samples))
        elif self.packs:
            yield ids, labels, position_ids, list(range(samples))
        else:
            classes = defaultdict(list)
            for number, (start, end) in enumerate(_spans(position_ids)):
                classes[(end - start - 1).bit_length()].append((number, start, end))
            for spans in classes.values():
                rows, targets = ([flat[a:b] for _, a, b in spans] for flat in (ids.flatten(), labels.flatten()))
                padded = pad_sequence(targets, batch_first=True, padding_value=IGNORED)
                yield pad_sequence(rows, batch_first=True), padded, None, [number for number, _, _ in spans]

    def _places(self, ids: Tensor, position_ids: Tensor, seen: Mapping[str, Tensor]) -> Tensor:
        """Where the ids of packed lines [B, T] lie: as they are counted, and before that in three dimensions where the model has them."""
        if self._index is None:
            return position_ids
        spans = _spans(position_ids)
        rows = pad_sequence([ids.flatten()[start:end] for start, end in spans], batch_first=True)  # [S, L]
        known = set(inspect.signature(self._index).parameters)
        grids = {name: value.to(ids.device) for name, value in seen.items() if name in known}
        found, _ = self._index(rows, mm_token_type_ids=self.lens.types(rows), **grids)  # [3, S, L]
        flat = torch.cat([found[:, number, : end - start] for number, (start, end) in enumerate(spans)], dim=1)
        return torch.cat([position_ids[None], flat.view(-1, *position_ids.shape).to(position_ids.device)])

    def _apart(self, ids: Tensor, position_ids: Tensor) -> dict[str, Any]:
        """Masks [B, 1, T, T] for a model whose own, where pictures' ids see each other, do not end with a sample."""
        if not self.masks:
            return {}
        text, types = self.whole.config.get_text_config(), self.lens.types(ids)
        embeds = torch.zeros((), dtype=self.whole.dtype, device=ids.device).expand(*ids.shape, text.hidden_size)
        line = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
        before, maker = text._attn_implementation, type(self.whole).create_masks_for_generate
        text._attn_implementation = "eager"  # or what need not be told would be left out
        try:
            made = maker(self.whole.config, embeds, None, None, line, **dict.fromkeys(TYPES, types), is_first_iteration=True)
        finally:
            text._attn_implementation = before
        sample = (position_ids == 0).cumsum(1)
        apart = (sample[:, :, None] != sample[:, None])[:, None]
        lowest = torch.finfo(self.whole.dtype).min
        return {"attention_mask": {kind: mask.masked_fill(apart, lowest) for kind, mask in made.items()}}

    def _extra(self, ids: Tensor, seen: Mapping[str, Tensor]) -> dict[str, Any]:
        """What the model is given beside its ids."""
        types = self.lens.types(ids)
        extra: dict[str, Any] = {name: types for name in TYPES if name in self._asks}
        for name, value in seen.items():
            if name in self._takes:
                value = value.to(ids.device)
                extra[name] = value.to(self.whole.dtype) if value.is_floating_point() else value
        return extra


def _spans(position_ids: Tensor) -> list[tuple[int, int]]:
    """Where the samples of lines [B, T] begin and end in them laid end to end; padding belongs to the one before it."""
    starts = position_ids == 0
    starts[:, 0] = True
    places = torch.nonzero(starts.flatten()).squeeze(1).tolist()
    return list(zip(places, [*places[1:], position_ids.numel()]))


def _joined(each: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """The tensors of pictures one behind the other; those that are cut into fewer pieces than others are filled up."""
    found = {}
    for name in each[0] if each else ():
        tensors = [one[name] for one in each]
        if len({tensor.shape[1:] for tensor in tensors}) > 1:
            most = [max(sizes) for sizes in zip(*(tensor.shape[1:] for tensor in tensors))]
            tensors = [pad(t, [n for m, s in reversed(list(zip(most, t.shape[1:]))) for n in (0, m - s)]) for t in tensors]
        found[name] = torch.cat(tensors)
    return found
