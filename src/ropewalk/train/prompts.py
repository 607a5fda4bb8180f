"""Rows as prompts: what is asked, what was expected, and the columns that rewards may want. No torch.

    {"prompt": "2 + 2 =", "answer": "4"}                                text, as it is; under type chat_template a user's turn
    {"prompt": [{"role": "user", "content": "2 + 2?"}], "answer": "4"}    messages
    {"messages": [..., {"role": "assistant", "content": "4"}]}            the last answer is the reference, and is not shown

A row of an instruction format (alpaca and others) is its prompt, and its answer the reference.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from typing import Any

from ropewalk.chat.template import Template
from ropewalk.config.run import DataSource, Run
from ropewalk.data.conversations import conversation_reader
from ropewalk.data.formats import CHATS, Conversation, Pieces, reader_of
from ropewalk.data.rows import Row, chunks
from ropewalk.data.sources import locate
from ropewalk.errors import DataError
from ropewalk.train.reward_functions import Message

AMONG = 10_000  # rows of a source, of which some are drawn
TEXT = "completion"  # a prompt that is text is a document's beginning, unless its source is a chat
ROLES = ("system", "user", "assistant", "tool")

Asked = str | list[Message]


@dataclass(frozen=True)
class Prompt:
    """One row as a prompt."""

    asked: Asked
    row: Mapping[str, Any]  # its columns, with 'reference' where the row's own answer is one
    path: str
    line: int

    def ids(self, template: Template) -> list[int]:
        """What the model goes on from."""
        if isinstance(self.asked, str):
            return template.encode_document(self.asked)
        return template.render(self.asked, add_generation_prompt=True).ids


def prompts(run: Run) -> Iterator[Prompt]:
    """Every prompt of the run's data, in order."""
    for source in run.datasets or ():
        read = _reader(source, run)
        for chunk in chunks(locate(source)):
            for line, raw in chunk:
                yield _prompt(chunk.read(line, raw), read)


def some_prompts(run: Run, count: int) -> list[Prompt]:
    """So many prompts, drawn by the run's seed from the first rows of its data."""
    found = list(islice(prompts(run), AMONG))
    if not found:
        raise DataError("there is no prompt: the data is empty")
    return random.Random(run.seed).sample(found, min(count, len(found)))


def _prompt(row: Row, read: Callable[[Mapping[str, Any]], tuple[Asked, str]]) -> Prompt:
    try:
        asked, answer = read(row.values)
    except DataError as error:
        raise DataError(str(error), path=row.path, line=row.line) from None
    known = {**row.values, **({"reference": answer} if answer and "reference" not in row.values else {})}
    return Prompt(asked, known, row.path, row.line)


def _reader(source: DataSource, run: Run) -> Callable[[Mapping[str, Any]], tuple[Asked, str]]:
    # Naming all roles lets a conversation pass that has no answer yet.
    open_ended = source.model_copy(update={"roles_to_train": ROLES})
    of_messages = conversation_reader(open_ended, run)
    of_prompts = conversation_reader(open_ended.model_copy(update={"field_messages": "prompt"}), run)
    chat = source.type in CHATS
    other = reader_of(source, run) if source.type is not None and not chat else None

    def read(values: Mapping[str, Any]) -> tuple[Asked, str]:
        prompt = values.get("prompt")
        if isinstance(prompt, str) and prompt and (chat or source.type in (None, TEXT)):
            return ([{"role": "user", "content": prompt}] if chat else prompt), ""
        if isinstance(prompt, list) and prompt:
            return _split(of_prompts(values)[0])
        if other is None:
            return _split(of_messages(values)[0])
        found = other(values)
        if isinstance(found, Conversation):
            return _split(found.messages)
        if isinstance(found, Pieces):
            shown = [text for text, trained in found.parts if not trained]
            return "".join(shown), "".join(text for text, trained in found.parts if trained)
        raise DataError("holds no prompt: its text has no answer; give it a column 'prompt'")

    return read


def _split(messages: list[dict[str, Any]]) -> tuple[Asked, str]:
    """The messages without the answer at their end, and that."""
    if messages[-1]["role"] != "assistant":
        return list(messages), ""
    if len(messages) == 1:
        raise DataError("holds an answer to nothing: its only message is the assistant's")
    return list(messages[:-1]), str(messages[-1].get("content") or "")
