"""Published shapes: their sums of parameters are those of the models' cards."""

from __future__ import annotations

import pytest
import torch

from ropewalk.models.load import auto_class, load_config
from ropewalk.models.shapes import KNOWN, SHAPES, shape_folder

# Billions of parameters of the text part, as published; E2B and E4B are named without their tables of embeddings per layer.
PUBLISHED = {
    "google/gemma-4-E2B": (2.3, True),
    "google/gemma-4-E4B": (4.5, True),
    "google/gemma-4-12B": (11.9, False),
    "google/gemma-4-26B-A4B": (25.2, False),
    "google/gemma-4-31B": (30.7, False),
    "Qwen/Qwen3-30B-A3B": (30.5, False),
    "Qwen/Qwen3.5-35B-A3B": (34.7, False),
    "mistralai/Mixtral-8x7B-v0.1": (46.7, False),
    "openai/gpt-oss-20b": (20.9, False),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_shape_has_the_published_number_of_parameters(name: str) -> None:
    folder = shape_folder(name)
    assert folder is not None
    config = load_config(folder)
    with torch.device("meta"):
        model = auto_class(config).from_config(config)
    billions, without = PUBLISHED[name]
    counted = sum(p.numel() for n, p in model.named_parameters() if not (without and "embed_tokens_per_layer" in n))
    assert counted / 1e9 == pytest.approx(billions, rel=0.035 if without else 0.003)


def test_every_shape_has_a_name_and_every_name_a_shape() -> None:
    assert {folder.name for folder in SHAPES.iterdir()} == set(KNOWN.values())
    assert (
        shape_folder("google/gemma-4-26B-A4B-it") == shape_folder("google/gemma-4-26b-a4b") == shape_folder("gemma-4-26b-a4b")
    )
    assert shape_folder("somebody/else") is None
    assert shape_folder("../shapes") is None
