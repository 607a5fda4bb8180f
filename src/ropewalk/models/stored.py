"""Checkpoints that keep weights in few bits already (gpt-oss in MXFP4, DeepSeek in FP8): read as the numbers they stand for.

transformers knows how each format is read, one tensor after another; here it is only told to give plain numbers, whatever kernels there
are, because adapters are trained and merged over those. Formats that it can only compute with, not read, are refused.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import PretrainedConfig
from transformers.quantizers.auto import AutoHfQuantizer, AutoQuantizationConfig
from transformers.quantizers.base import HfQuantizer

from ropewalk.errors import ModelError
from ropewalk.models.folder import read_config

KEY = "quantization_config"


def stored_as(folder: Path) -> str | None:
    """The name of the format that a checkpoint keeps its weights in, if it is one of few bits."""
    told = _told(folder)
    return None if told is None else str(told.get("quant_method", "an unnamed format"))


def reader(folder: Path, config: PretrainedConfig) -> HfQuantizer | None:
    """What reads such a checkpoint; `config` no longer speaks of it then, since the model will not be held so."""
    told = _told(folder)
    if told is None:
        return None
    for part in (config, config.get_text_config()):
        part.__dict__.pop(KEY, None)
    try:
        asked = AutoQuantizationConfig.from_dict(dict(told))
    except (ValueError, TypeError, ImportError) as error:
        raise _unreadable(folder) from error
    if not hasattr(asked, "dequantize"):
        raise _unreadable(folder)
    asked.dequantize = True
    return AutoHfQuantizer.from_config(asked, pre_quantized=True)


def _told(folder: Path) -> dict[str, Any] | None:
    """A multimodal checkpoint says it once for all its parts, or in that which writes."""
    config = read_config(folder)
    found = config.get(KEY) or (config.get("text_config") or {}).get(KEY)
    return found or None


def _unreadable(folder: Path) -> ModelError:
    return ModelError(
        f"{folder}: its weights are stored as {stored_as(folder)}, which cannot be read back as plain numbers here; name the checkpoint in "
        "16 bits that it was made from, or one in MXFP4 or FP8"
    )
