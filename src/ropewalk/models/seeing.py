"""Models that see: the whole of a multimodal checkpoint, its text part as a model of its own, and its processor.

The processor is put together of what pictures need alone: the parts for films and sound ask for packages that nothing here uses.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoImageProcessor, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING_NAMES, processor_class_from_name

from ropewalk.errors import ModelError
from ropewalk.models.folder import read_config
from ropewalk.models.load import load_base, quiet


@dataclass(frozen=True)
class Seeing:
    """A model that sees."""

    whole: PreTrainedModel
    text: PreTrainedModel  # what writes, over the same modules
    processor: Any


def load_seeing(folder: Path, *, dtype: torch.dtype | str, device: str) -> Seeing:
    """The whole model and its processor; ModelError where one of them cannot be used for pictures."""
    processor = load_processor(folder)
    whole = load_base(folder, dtype=dtype, device=device, whole=True)
    return Seeing(whole, text_part(whole), processor)


def text_part(whole: Any) -> Any:
    """The model that reads and writes within one that also sees: its modules are the other's; itself where it has no class."""
    decoder = whole.get_decoder()
    if type(decoder.config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        return whole
    with quiet(), torch.device("meta"):
        text = AutoModelForCausalLM.from_config(decoder.config)
    prefix = text.base_model_prefix
    if type(getattr(text, prefix)) is not type(decoder):
        return whole
    setattr(text, prefix, decoder)
    text.set_output_embeddings(whole.get_output_embeddings())
    text.config = decoder.config
    if any(parameter.is_meta for parameter in text.parameters()):
        return whole
    return text.eval()


def load_processor(folder: Path) -> Any:
    """What makes a model's input of pictures and text, without the parts for anything else."""
    kind = _processor_class(folder)
    with quiet():
        try:
            made = {
                "image_processor": AutoImageProcessor.from_pretrained(folder, backend="pil"),
                "tokenizer": AutoTokenizer.from_pretrained(folder),
            }
            settings, _ = kind.get_processor_dict(folder)
            parts = {name: made.get(name) for name in kind.get_attributes()}
            settings = {
                key: value
                for key, value in settings.items()
                if key not in parts and key not in ("processor_class", "auto_map", "chat_template")
            }
            return _without_others(kind)(**parts, **settings)
        except (ImportError, ValueError, OSError, TypeError, AttributeError) as error:
            raise ModelError(f"{folder}: its processor cannot be used for pictures: {error}") from error


def _processor_class(folder: Path) -> Any:
    """The class that the folder names, or that of its model type."""
    named = None
    for file in ("processor_config.json", "preprocessor_config.json", "tokenizer_config.json"):
        if named is None and (folder / file).is_file():
            named = json.loads((folder / file).read_text(encoding="utf-8")).get("processor_class")
    named = named or PROCESSOR_MAPPING_NAMES.get(str(read_config(folder).get("model_type")))
    kind = processor_class_from_name(named) if named else None
    if kind is None:
        raise ModelError(f"{folder}: no processor of the installed transformers is known for it ({named or 'none named'})")
    return kind


def _without_others(kind: Any) -> Any:
    """The same processor, to which a part may be missing."""

    def check(self: Any, name: str, part: Any) -> type:
        return type(part)

    return type(kind.__name__, (kind,), {"check_argument_for_proper_class": check})
