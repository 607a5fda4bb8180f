"""A reward that a process reward model gives: the probability of each step to be right, taken together over the steps of a completion."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence

from ropewalk.chat.template import Template
from ropewalk.data.stepwise import as_ids
from ropewalk.models.hub import ensure_tokenizer
from ropewalk.train.reward_functions import Message
from ropewalk.train.score_model import folder_of, load_scorer

AT_ONCE = 16  # completions of one forward pass
OVER: Mapping[str, Callable[[Sequence[float]], float]] = {
    "min": min,
    "mean": lambda steps: sum(steps) / len(steps),
    "last": lambda steps: steps[-1],
    "product": math.prod,
}


def process_reward_model(params: Mapping[str, Any]) -> Callable[..., list[float]]:
    """The reward, from 0 to 1; a completion is cut into steps at `separator`, and one without a step gets 0."""
    template = Template.load(ensure_tokenizer(folder_of(params["path"])))
    model = load_scorer(params, tokens=True, outputs=2)
    separator, over = params.get("separator", "\n"), OVER[params.get("over", "min")]

    def asked(prompt: str | Sequence[Message]) -> str | Sequence[Message]:
        if isinstance(prompt, str) or not params.get("plain"):
            return prompt
        return "\n".join(str(message.get("content") or "") for message in prompt)

    def ids_of(prompt: str | Sequence[Message], completion: str) -> tuple[list[int], list[int]]:
        """The ids, and where each step ends."""
        steps = [step for step in (completion.split(separator) if separator else [completion]) if step.strip()]
        ids, texts = as_ids(template, asked(prompt), steps, separator)
        ends = []
        for text in texts:
            ids = ids + text
            ends.append(len(ids) - 1)
        return ids, ends

    def reward(completions: Sequence[Any], prompts: Sequence[str | Sequence[Message]]) -> list[float]:
        said = [one if isinstance(one, str) else one[0]["content"] for one in completions]
        rows = [ids_of(prompt, completion) for prompt, completion in zip(prompts, said, strict=True)]
        values = [0.0] * len(rows)
        order = sorted((at for at, (_, ends) in enumerate(rows) if ends), key=lambda at: len(rows[at][0]))
        for start in range(0, len(order), AT_ONCE):
            now = order[start : start + AT_ONCE]
            # Padding stands behind, where nothing before it looks.
            batch = pad_sequence([torch.tensor(rows[at][0]) for at in now], batch_first=True).to(model.device)
            with torch.inference_mode():
                sure = model(input_ids=batch).logits.float().softmax(-1)[..., 1]
            for line, at in zip(sure, now):
                values[at] = over(line[rows[at][1]].tolist())
        return values

    return reward
