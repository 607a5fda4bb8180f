"""A reward that a model with one output gives: a sequence classifier that was trained on preferences."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from ropewalk.errors import ModelError
from ropewalk.models.hub import resolve_base
from ropewalk.train.reward_functions import Message

AT_ONCE = 16  # completions of one forward pass


def reward_model(params: Mapping[str, Any]) -> Callable[..., list[float]]:
    """The reward: the model's one number for prompt and completion."""
    path = resolve_base(params["path"])
    tokenizer: Any = AutoTokenizer.from_pretrained(path)
    model: Any = AutoModelForSequenceClassification.from_pretrained(path)
    if model.config.num_labels != 1:
        raise ModelError(
            f"{params['path']} has {model.config.num_labels} outputs; a reward model has one, the reward: name another, "
            "or call it in a function of your own"
        )
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    model.config.pad_token_id = tokenizer.pad_token_id
    device = torch.device(params.get("device") or ("cuda" if torch.cuda.is_available() else "cpu"))
    model.to(device).eval()

    def text(prompt: str | Sequence[Message], completion: str) -> str:
        if isinstance(prompt, str):
            return prompt + completion
        said = [*prompt, {"role": "assistant", "content": completion}]
        return str(tokenizer.apply_chat_template(said, tokenize=False))

    def reward(completions: Sequence[Any], prompts: Sequence[str | Sequence[Message]]) -> list[float]:
        said = [one if isinstance(one, str) else one[0]["content"] for one in completions]
        texts = [text(prompt, completion) for prompt, completion in zip(prompts, said, strict=True)]
        values: list[float] = []
        for start in range(0, len(texts), AT_ONCE):
            # A template has written the special tokens already; a plain text has none.
            plain = isinstance(prompts[start], str)
            batch = tokenizer(
                texts[start : start + AT_ONCE], return_tensors="pt", padding=True, truncation=True, add_special_tokens=plain
            )
            with torch.inference_mode():
                values += model(**batch.to(device)).logits[:, 0].float().tolist()
        return values

    return reward
