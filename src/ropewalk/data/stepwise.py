"""A row of steps that are right or wrong each (type: stepwise_supervised) -> the example that a process reward model learns from. No torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ropewalk.chat.template import Template
from ropewalk.config.run import DataSource
from ropewalk.data.formats import missing, text_of
from ropewalk.errors import DataError

YES_AND_NO = {"true": True, "false": False, "1": True, "0": False, "1.0": True, "0.0": False, "+": True, "-": False}


@dataclass(frozen=True)
class Steps:
    """A prompt and the steps of an answer, each with its verdict.  reader -> tokeniser"""

    prompt: str | list[dict[str, Any]]
    texts: tuple[str, ...]
    right: tuple[bool, ...]


def steps_reader(source: DataSource) -> Callable[[Mapping[str, Any]], Steps]:
    """The function that reads a row: `prompt` (a text, or messages), `completions` and `labels` (a list each)."""
    name = source.field_prompt or "prompt"

    def read(row: Mapping[str, Any]) -> Steps:
        for column in (name, "completions", "labels"):
            if row.get(column) is None:
                raise missing(row, column)
        prompt, texts, labels = row[name], row["completions"], row["labels"]
        if not isinstance(prompt, list) or not prompt:
            prompt = text_of(row, name)
        if not isinstance(texts, list) or not texts or not all(isinstance(text, str) and text for text in texts):
            raise DataError("expected a list of texts, none of them empty", key="completions")
        if not isinstance(labels, list) or len(labels) != len(texts):
            found = f"{len(labels)}" if isinstance(labels, list) else type(labels).__name__
            raise DataError(f"expected a list of {len(texts)}, one for each of completions, found {found}", key="labels")
        return Steps(prompt, tuple(texts), tuple(_right(label, number) for number, label in enumerate(labels, 1)))

    return read


def as_ids(
    template: Template, prompt: str | Sequence[Mapping[str, Any]], texts: Sequence[str], separator: str
) -> tuple[list[int], list[list[int]]]:
    """The prompt's ids and those of every step with the separator that ends it, each encoded by itself."""
    if isinstance(prompt, str):
        begun = template.encode_document(prompt)
        if len(begun) > 1 and begun[-1] == template.eos_id:
            begun = begun[:-1]  # a tokenizer that ends every document would end the prompt
    else:
        begun = template.render(prompt, add_generation_prompt=True).ids
    end = template.encode(separator)
    return begun, [template.encode(text) + end for text in texts]


def _right(label: Any, number: int) -> bool:
    found = YES_AND_NO.get(str(label).strip().lower())
    if found is None:
        raise DataError(f"step {number}: expected true or false, found {str(label)[:60]!r}", key="labels")
    return found
