"""A model that scores, from a folder: a whole one, or an adapter with its own layer over the base that it names."""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForSequenceClassification, AutoModelForTokenClassification

from ropewalk.errors import ModelError
from ropewalk.models.hub import resolve_base

ADAPTER = "adapter_config.json"


def folder_of(path: str) -> Path:
    """The folder with the model's tokenizer: that of an adapter, or of a whole model, which may be fetched."""
    given = Path(path).expanduser()
    return given if (given / ADAPTER).is_file() else resolve_base(path)


def load_scorer(params: Mapping[str, Any], *, tokens: bool, outputs: int) -> Any:
    """The model of `path` in eval mode on `device`; an adapter's is laid over `base`, or over the one that it names."""
    folder = folder_of(params["path"])
    maker = AutoModelForTokenClassification if tokens else AutoModelForSequenceClassification
    if (folder / ADAPTER).is_file():
        model = _with_adapter(maker, folder, params.get("base"), outputs)
    else:
        model = maker.from_pretrained(folder)
    if model.config.num_labels != outputs:
        what = "one, the reward" if outputs == 1 else "two, for wrong and right"
        raise ModelError(
            f"{params['path']} has {model.config.num_labels} outputs; a model for this reward has {what}: name another, "
            "or call it in a function of your own"
        )
    device = torch.device(params.get("device") or ("cuda" if torch.cuda.is_available() else "cpu"))
    return model.to(device).eval()


def _with_adapter(maker: Any, folder: Path, base: str | None, outputs: int) -> Any:
    from peft import PeftModel  # slow to import, and needed only here

    named = base or json.loads((folder / ADAPTER).read_text(encoding="utf-8")).get("base_model_name_or_path")
    if not named:
        raise ModelError(f"{folder} does not say what base it is for; add base, the folder or hub name of it, to the reward")
    model = maker.from_pretrained(resolve_base(named), num_labels=outputs)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = PeftModel.from_pretrained(model, str(folder))
    if lost := [str(w.message) for w in caught if "missing adapter keys" in str(w.message)]:
        raise ModelError(f"PEFT cannot read {folder} over {named}: {lost[0].splitlines()[0][:200]}")
    return found
