"""A reward that a model with one output gives: a sequence classifier that was trained on preferences."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from transformers import AutoTokenizer

from ropewalk.train.reward_functions import Message
from ropewalk.train.score_model import folder_of, load_scorer

AT_ONCE = 16  # completions of one forward pass


def reward_model(params: Mapping[str, Any]) -> Callable[..., list[float]]:
    """The reward: the model's one number for prompt and completion."""
    tokenizer: Any = AutoTokenizer.from_pretrained(folder_of(params["path"]))
    model = load_scorer(params, tokens=False, outputs=1)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    # The score is read at the last token that is not this one, as it was in training.
    model.config.get_text_config().pad_token_id = tokenizer.pad_token_id

    def text(prompt: str | Sequence[Message], completion: str) -> str:
        if isinstance(prompt, str):
            end = tokenizer.eos_token or ""  # which ends a text in training
            return prompt + completion + ("" if completion.endswith(end) else end)
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
                values += model(**batch.to(model.device)).logits[:, 0].float().tolist()
        return values

    return reward
