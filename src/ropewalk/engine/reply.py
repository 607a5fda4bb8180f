"""Messages in, the reply's text out: a registry entry, loaded, and asked by plain greedy generation.

    messages -> template -> ids -> generate -> ids -> template -> text

The adapter is read through PEFT, not through our own layers: what answers here is what any reader of the folder gets.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import GenerationConfig

from ropewalk.chat.template import Template
from ropewalk.models.hub import ensure_tokenizer
from ropewalk.models.load import load_base
from ropewalk.registry import Entry, Registry

Message = dict[str, Any]


@dataclass(frozen=True)
class Served:
    """A model that is ready to answer."""

    entry: Entry
    model: Any
    template: Template


def load_served(registry: Registry, name: str) -> Served:
    """The base or adapter of that name, or the one that the alias of that name points at."""
    entry = registry.resolve(name)
    base = Path(registry.resolve(entry.base).path if entry.base else entry.path)
    dtype = "auto" if torch.cuda.is_available() else torch.float32
    model: Any = load_base(base, dtype=dtype, experts_implementation=None)
    if entry.kind == "adapter":
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # PEFT asks transformers by a name that is going away
            model = PeftModel.from_pretrained(model, entry.path).eval()
    return Served(entry, model, Template.load(ensure_tokenizer(base)))


def reply(served: Served, messages: Sequence[Message], max_tokens: int) -> str:
    """The greedy answer to one conversation."""
    return replies(served, [messages], max_tokens)[0]


@torch.inference_mode()
def replies(served: Served, conversations: Sequence[Sequence[Message]], max_tokens: int, batch: int = 32) -> list[str]:
    """The greedy answers to several conversations, generated `batch` at a time, like lengths together."""
    prompts = [served.template.render(messages, add_generation_prompt=True).ids for messages in conversations]
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    answers = [""] * len(prompts)
    for start in range(0, len(order), batch):
        chosen = order[start : start + batch]
        for i, ids in zip(chosen, _generate(served, [prompts[i] for i in chosen], max_tokens)):
            answers[i] = served.template.decode(ids).strip()
    return answers


def _generate(served: Served, prompts: Sequence[Sequence[int]], max_tokens: int) -> list[list[int]]:
    """New ids per prompt; prompts are padded on the left, so that all of them end at the same place."""
    pad, width = served.template.pad_id or 0, max(map(len, prompts))
    ids = torch.tensor([[pad] * (width - len(p)) + list(p) for p in prompts], device=served.model.device)
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=served.model.device)
    settings = GenerationConfig(
        max_new_tokens=max_tokens, do_sample=False, pad_token_id=pad, eos_token_id=list(served.template.stop_ids) or None
    )
    out = served.model.generate(input_ids=ids, attention_mask=mask, generation_config=settings)
    return [row[width:] for row in out.tolist()]
