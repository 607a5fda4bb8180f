"""What a model's own processor makes of pictures: the ids that stand for one, and the tensors that its tower looks at.

size -> ids              as the processor writes a picture of that size
pictures -> tensors      pixels, and what says how they lie, in the order of the ids
"""

from __future__ import annotations

import hashlib
import inspect
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from ropewalk.errors import BadInput, ModelError
from ropewalk.models.folder import read_config
from ropewalk.models.seeing import load_processor

PROBE = (64, 64)  # the size of a picture of which every model takes some
REMEMBERED = 10_000  # sizes
TEXT = ("input_ids", "attention_mask", "mm_token_type_ids", "token_type_ids")  # of a processor's output


class Lens:
    """How a model is shown pictures; one of a folder is sent to other processes as the folder's name."""

    def __init__(self, processor: Any, kind: str, folder: Path | None = None) -> None:
        """`kind` is what to call the model; ModelError for one that takes pictures in a way that is not known here."""
        self.processor, self.folder = processor, folder
        self.token = str(getattr(processor, "image_token", "") or "")
        encoded = processor.tokenizer.encode(self.token, add_special_tokens=False) if self.token else []
        if len(encoded) != 1:
            raise ModelError(f"a {kind} takes pictures in a way that is not known here; use it for text alone")
        self.token_id = int(encoded[0])
        self._sizes: dict[tuple[int, int], tuple[int, ...]] = {}

    @classmethod
    def of(cls, folder: Path) -> Lens:
        """The lens of the model in a folder; ModelError for one that sees no pictures."""
        config = read_config(folder)
        kind = str(config.get("model_type"))
        if not config.get("vision_config"):
            raise ModelError(
                f"{folder}: a {kind} sees no pictures; name a base that does in base_model, or remove processor_type to train on text"
            )
        return cls(load_processor(folder), kind, folder)

    def __reduce__(self) -> tuple[Any, ...]:
        return Lens.of, (self.folder,)

    @property
    def digest(self) -> str:
        """Changes when the processor does."""
        said = json.dumps(self.processor.image_processor.to_dict(), sort_keys=True, default=str)
        return hashlib.sha256(f"{type(self.processor).__name__} {said}".encode()).hexdigest()

    @cached_property
    def feature_id(self) -> int:
        """The id that stands for a part of a picture; others may frame it."""
        found = self.processed([Image.new("RGB", PROBE)])
        told = next((found[name] for name in ("mm_token_type_ids", "token_type_ids") if name in found), None)
        if told is None:
            told = torch.isin(found["input_ids"], torch.tensor(self.processor.image_token_ids))
        ids = set(found["input_ids"][told == 1].tolist())
        if len(ids) != 1:
            raise ModelError(f"{len(ids)} ids stand for the parts of a picture of this model, and one is expected")
        return int(ids.pop())

    def ids(self, width: int, height: int) -> tuple[int, ...]:
        """What stands for a picture of this size; BadInput where the model takes none of that shape."""
        if (width, height) not in self._sizes:
            if len(self._sizes) >= REMEMBERED:
                self._sizes.clear()
            found = self.processed([Image.new("RGB", (width, height))])["input_ids"][0]
            self._sizes[width, height] = tuple(found.tolist())
        return self._sizes[width, height]

    def tensors(self, pictures: Sequence[Image.Image]) -> dict[str, Tensor]:
        """What the model's tower is given of pictures that stand in this order."""
        if not pictures:
            return {}
        return {name: value for name, value in self.processed(pictures).items() if name not in TEXT}

    def types(self, ids: Tensor) -> Tensor:
        """1 where an id stands for a part of a picture, else 0; shaped as ids."""
        return (ids == self.feature_id).long()

    def processed(self, pictures: Sequence[Image.Image]) -> Mapping[str, Tensor]:
        """What the processor makes of nothing but these pictures, one behind the other; BadInput for shapes that it takes none of."""
        with shape_of(*(picture.size for picture in pictures)):
            made = self.processor(
                images=[list(pictures)], text=[self.token * len(pictures)], add_special_tokens=False, return_tensors="pt"
            )
        found: Mapping[str, Tensor] = {name: value for name, value in made.items() if isinstance(value, Tensor)}
        return found


def looks_at(whole: Any) -> set[str]:
    """The names of the tensors that a model's tower takes."""
    return set(inspect.signature(whole.get_image_features).parameters) - {"kwargs"}


@contextmanager
def shape_of(*sizes: tuple[int, int]) -> Iterator[None]:
    """Whatever a model's own code raises over pictures is for their shapes: their pixels are only numbers."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except (ValueError, IndexError, ArithmeticError, RuntimeError) as error:
        told = ", ".join(f"{width} by {height}" for width, height in sizes)
        raise BadInput(f"image: a picture of {told} pixels cannot be shown to this model: {error}") from error
