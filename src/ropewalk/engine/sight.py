"""A model's eyes: a picture as ids, as what the vision tower makes of it, and as a part of what has been read.

    size -> ids          as the model's own processor writes a picture of that size
    pixels -> features   by the vision tower, once
    features -> keys and values, on a reading's end: placed and masked as the model itself does it

What differs from model to model is asked of the model: its processor how many ids, its `get_rope_index` where they lie, its
`create_masks_for_generate` which of them see each other.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from copy import copy
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ropewalk.engine.attention import running
from ropewalk.engine.batch import Batch, Part
from ropewalk.engine.cache import Kind, Reading
from ropewalk.engine.request import Picture
from ropewalk.errors import ModelError
from ropewalk.models.lens import TEXT, Lens, looks_at, shape_of
from ropewalk.models.seeing import Seeing

KINDS: dict[str, Kind] = {"full_attention": "full", "sliding_attention": "sliding"}


@dataclass(frozen=True)
class Seen:
    """What the vision tower made of a picture, and what lays it out."""

    features: Any
    layout: dict[str, Tensor]


class Sight:
    """How one model sees."""

    def __init__(self, seeing: Seeing) -> None:
        """ModelError for a model whose way of seeing is not known here."""
        self.whole: Any = seeing.whole
        kind = self.whole.config.model_type
        self.lens = Lens(seeing.processor, kind)
        self.token = self.lens.token
        self._inputs = looks_at(self.whole)
        if "mm_encoder_outputs" not in inspect.signature(self.whole.forward).parameters or not self._inputs:
            raise ModelError(f"a {kind} takes pictures in a way that this engine does not know")
        self._index = getattr(getattr(self.whole, self.whole.base_model_prefix), "get_rope_index", None)
        self._mutual = _mutual_kinds(self.whole)

    @property
    def digest(self) -> str:
        """Changes when the processor does."""
        return self.lens.digest

    def ids(self, width: int, height: int) -> tuple[int, ...]:
        """What stands for a picture of this size; BadInput where the model takes none of that shape."""
        return self.lens.ids(width, height)

    @torch.inference_mode()
    def look(self, picture: Picture) -> Seen:
        """What the vision tower makes of it."""
        assert picture.pixels is not None
        pixels = np.frombuffer(picture.pixels, np.uint8).reshape(picture.height, picture.width, 3)
        found = self.lens.processed([Image.fromarray(pixels)])
        inputs = {name: value.to(self.whole.device) for name, value in found.items() if name in self._inputs}
        inputs = {name: value.to(self.whole.dtype) if value.is_floating_point() else value for name, value in inputs.items()}
        with shape_of((picture.width, picture.height)):
            return Seen(self.whole.get_image_features(**inputs, return_dict=True), dict(found))

    @property
    def at_once(self) -> bool:
        """Whether all ids of a picture have to be read in one pass: they see each other both ways."""
        return bool(self._mutual)

    @torch.inference_mode()
    def read(self, reading: Reading, seen: Seen, begin: int, end: int) -> None:
        """Reads the ids [begin, end) of a picture on a reading's end."""
        ids, types = seen.layout["input_ids"], self.lens.types(seen.layout["input_ids"])
        assert (begin, end) == (0, ids.shape[1]) or not self.at_once
        part = Part(reading, 0, end - begin, self._sees(types[0]))
        places, shift = self._places(seen, types)
        first = reading.position - begin + reading.shift
        before, until = int(types[0, :begin].sum()), int(types[0, :end].sum())
        batch = Batch([part], self.whole.device)
        with running(batch):
            self.whole(
                input_ids=ids[:, begin:end].to(self.whole.device),
                position_ids=(places[..., begin:end] + first).to(self.whole.device),
                past_key_values=batch,
                use_cache=True,
                mm_encoder_outputs={"image": _part(seen.features, before, until)},
                logits_to_keep=1,
            )
        reading.position += end - begin
        reading.shift += shift if end == ids.shape[1] else 0

    def _places(self, seen: Seen, types: Tensor) -> tuple[Tensor, int]:
        """Where the ids lie from the reading's end on, and how far what follows is from their count."""
        count = types.shape[1]
        if self._index is None:
            return torch.arange(count)[None], 0
        known = set(inspect.signature(self._index).parameters)
        grids = {name: value for name, value in seen.layout.items() if name in known and name not in TEXT}
        places, delta = self._index(seen.layout["input_ids"], mm_token_type_ids=types, **grids)
        return places, int(delta)

    def _sees(self, types: Tensor) -> dict[Kind, Tensor]:
        if not self._mutual:
            return {}
        begins = (types == 1) & (types.roll(1) != 1)
        begins[0] = types[0] == 1
        block = torch.where(types == 1, begins.cumsum(0), 0)
        same = (block[:, None] == block[None]) & (block[:, None] > 0)
        return dict.fromkeys(self._mutual, same)


def _part(features: Any, begin: int, end: int) -> Any:
    """The features [begin, end) of a picture, with those that are added between layers."""

    def cut(rows: Any) -> Any:  # a list of [N, H] for models that take pictures of many sizes, else one [1, N, H]
        if isinstance(rows, Tensor):
            return rows[begin:end] if rows.dim() == 2 else rows[:, begin:end]
        return [cut(inner) for inner in rows]

    found = copy(features)
    for name in ("pooler_output", "deepstack_features"):
        if getattr(features, name, None) is not None:
            setattr(found, name, cut(getattr(features, name)))
    return found


def _mutual_kinds(model: Any) -> tuple[Kind, ...]:
    """The kinds of layers in which the ids of one picture see each other both ways: the model's own masks say so."""
    maker = getattr(type(model), "create_masks_for_generate", None)
    if maker is None:
        return ()
    types = torch.tensor([[0, 1, 1, 1, 0]])
    config = model.config.get_text_config()
    with _eager(config):
        options = {"mm_token_type_ids": types, "token_type_ids": types, "is_first_iteration": True}
        embeds = torch.zeros(1, 5, config.hidden_size)
        masks = maker(model.config, embeds, None, None, torch.arange(5)[None], **options)
    found: list[Kind] = []
    for name, mask in masks.items() if isinstance(masks, dict) else [("full_attention", masks)]:
        if mask is None:
            continue
        seen = mask[0, 0] if mask.dtype == torch.bool else mask[0, 0] == 0
        backwards = seen & ~torch.ones(5, 5, dtype=torch.bool).tril()
        inside = torch.zeros(5, 5, dtype=torch.bool)
        inside[1:4, 1:4] = ~torch.ones(3, 3, dtype=torch.bool).tril()
        if torch.equal(backwards, inside):
            found.append(KINDS[name])
        elif backwards.any():
            raise ModelError(f"a {model.config.model_type} masks pictures in a way that this engine does not know")
    return tuple(found)


@contextmanager
def _eager(config: Any) -> Iterator[None]:
    """Within it, masks are made in full: other implementations leave out what they need not be told."""
    before = config._attn_implementation
    config._attn_implementation = "eager"
    try:
        yield
    finally:
        config._attn_implementation = before
