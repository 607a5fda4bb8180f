"""A row of preferences -> the examples to compare: a pair of answers to one prompt, or one answer that is wanted or not. No torch.

Answers are texts, messages, or whole conversations; the prompt is a text, messages, or what conversations begin with. Only the last
message of a conversation is compared.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from ropewalk.chat.masking import Rules
from ropewalk.config.preference import held
from ropewalk.config.run import DataSource, PromptFormat, Run
from ropewalk.data.conversations import COLUMNS as CONVERSATIONS
from ropewalk.data.conversations import conversation_reader
from ropewalk.data.formats import Conversation, Pieces, Reader, fill, missing, reader_of, text_of
from ropewalk.data.stepwise import YES_AND_NO, Steps, steps_reader
from ropewalk.errors import ConfigError, DataError

Answered = Conversation | Pieces


@dataclass(frozen=True)
class Pair:
    """Two answers to one prompt."""

    chosen: Answered
    rejected: Answered
    margin: float = 0.0  # by how much the chosen one is to score higher, for reward models


@dataclass(frozen=True)
class Judged:
    """One answer and whether it is wanted."""

    answer: Answered
    wanted: bool


PreferenceReader = Callable[[Mapping[str, Any]], Pair | Judged | Steps]


@dataclass(frozen=True)
class Columns:
    """Where a format keeps what; the first prompt column that a row has is taken."""

    prompt: tuple[str, ...] = ("prompt", "question", "instruction", "input")
    chosen: str = "chosen"
    rejected: str = "rejected"
    completion: str = "completion"
    label: str = "label"


FORMATS = {
    "default": Columns(),
    "argilla": Columns(("instruction", "prompt"), "chosen_response", "rejected_response"),
    "argilla_chat": Columns(),
    "icr": Columns(("input",)),
    "intel": Columns(("question",)),
    "prompt_pairs": Columns(("prompt",)),
    "ultra": Columns(("prompt",)),
}
FAMILIES = ("chat_template", "chatml", "llama3")
NAMES = ("chat_template", *(f"{family}.{name}" for family in FAMILIES for name in FORMATS))


def example_reader(source: DataSource, run: Run) -> Reader | PreferenceReader:
    """The function that reads a row of this source for this run."""
    kind = held(run)
    if kind is None:
        return reader_of(source, run)
    if kind == "steps":
        return steps_reader(source)
    return _judged_reader(source, run) if kind == "judged" else _pair_reader(source, run)


def template_named(source: DataSource, run: Run) -> DataSource:
    """The source with the chat template that its format's name asks for, as chatml.intel does."""
    family = source.type.removeprefix("bradley_terry.").split(".")[0] if isinstance(source.type, str) else ""
    if held(run) is None or family not in FAMILIES[1:] or source.chat_template or source.chat_template_jinja:
        return source
    return source.model_copy(update={"chat_template": family})


def _pair_reader(source: DataSource, run: Run) -> PreferenceReader:
    columns, answered = _columns(source), _answer_reader(source, run)

    def read(row: Mapping[str, Any]) -> Pair:
        row = _renamed(row)
        both = tuple(
            answered(row, column, name) for column, name in ((columns.chosen, "chosen"), (columns.rejected, "rejected"))
        )
        if both[0] == both[1]:
            raise DataError("equals the preferred answer, so there is nothing to learn", key=columns.rejected)
        return Pair(both[0], both[1], _margin(row) if run.reward_model else 0.0)

    return read


def _renamed(row: Mapping[str, Any]) -> Mapping[str, Any]:
    """A row in the shape of OpenAI's preference fine-tuning, under the names that are usual elsewhere."""
    if "chosen" in row or not {"input", "preferred_output", "non_preferred_output"} <= row.keys():
        return row
    given = row["input"] if isinstance(row["input"], dict) else {"messages": row["input"]}
    found = {**row, "prompt": given.get("messages"), "chosen": row["preferred_output"], "rejected": row["non_preferred_output"]}
    return found | ({"tools": given["tools"]} if given.get("tools") else {})


def _judged_reader(source: DataSource, run: Run) -> PreferenceReader:
    columns, answered = _columns(source), _answer_reader(source, run)

    def read(row: Mapping[str, Any]) -> Judged:
        if columns.label not in row:
            raise missing(row, columns.label)
        label = row[columns.label]
        wanted = YES_AND_NO.get(str(label).strip().lower())
        if wanted is None:
            raise DataError(f"expected true or false, found {str(label)[:60]!r}", key=columns.label)
        return Judged(answered(row, columns.completion, "completion"), wanted)

    return read


def _margin(row: Mapping[str, Any]) -> float:
    """The column `margin` of a pair, which may be left out."""
    value = row.get("margin")
    if value is None:
        return 0.0
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise DataError(f"expected a number, found {str(value)[:60]!r}", key="margin")
    return float(value)


def _columns(source: DataSource) -> Columns:
    kind = source.type
    if isinstance(kind, PromptFormat):
        columns, named = Columns(("prompt",)), kind
    else:
        columns, named = FORMATS[_format(kind)], source  # type: ignore[assignment]
    given = {
        name: value
        for name in ("chosen", "rejected", "completion", "label")
        if (value := getattr(named, f"field_{name}", None) or getattr(source, f"field_{name}"))
    }
    prompt = named.field_prompt or source.field_prompt
    return replace(columns, prompt=(prompt,) if prompt else columns.prompt, **given)


def _format(kind: str | None) -> str:
    if kind in (None, "chat_template", "bradley_terry", "bradley_terry.chat_template"):
        return "default"
    assert kind is not None
    family, _, name = kind.removeprefix("bradley_terry.").partition(".")
    if family not in FAMILIES or name not in FORMATS:
        near = difflib.get_close_matches(kind, NAMES, 1)
        hint = f"did you mean '{near[0]}'?" if near else f"known are {', '.join(NAMES)}"
        raise ConfigError(
            f"type: '{kind}' is no format of preferences; {hint}, or a mapping with prompt_format and chosen_format"
        )
    return name


def _answer_reader(source: DataSource, run: Run) -> Callable[[Mapping[str, Any], str, str], Answered]:
    """The function (row, column of the answer, what it is called in formats) -> the prompt with this answer."""
    columns = _columns(source)
    if isinstance(source.type, PromptFormat):
        return _written_reader(source.type, columns)
    read = conversation_reader(source.model_copy(update={"field_messages": "messages"}), run)
    rules = Rules(("assistant",), source.train_on_eos or "turn", source.train_on_eot, False, True)
    mapping = source.message_property_mappings or {}
    role, content = mapping.get("role") or source.message_field_role or "role", mapping.get("content") or "content"

    def said(who: str, text: str) -> dict[str, str]:
        return {role: who, content: text}

    def answered(row: Mapping[str, Any], column: str, name: str) -> Answered:
        if column not in row:
            raise missing(row, column)
        answer, prompt = row[column], _prompt(row, source, columns)
        if source.type is None and isinstance(answer, str) and isinstance(prompt, str):
            return Pieces(((prompt, False), (text_of(row, column), True)))
        if isinstance(answer, str):
            messages = [said("assistant", text_of(row, column))]
        elif isinstance(answer, dict):
            messages = [answer]
        elif isinstance(answer, list) and answer:
            messages = answer
        else:
            raise DataError(f"expected a text, a message or a list of messages, found {type(answer).__name__}", key=column)
        if len(messages) == 1 or _who(messages[0], role) in ("assistant", "gpt"):
            if prompt is None:
                raise missing(row, columns.prompt[0])
            messages = [*([said("user", prompt)] if isinstance(prompt, str) else prompt), *messages]
        found, tools = read({**row, "messages": messages})
        if found[-1]["role"] != "assistant":
            raise DataError(f"ends with a message of the role '{found[-1]['role']}', expected assistant", key=column)
        return Conversation(found, tools, rules)

    return answered


def _prompt(row: Mapping[str, Any], source: DataSource, columns: Columns) -> str | list[Any] | None:
    """The prompt of a row; None where the answers hold it themselves."""
    named = source.field_messages
    for column in (named,) if named else (*columns.prompt, *CONVERSATIONS):
        value = row.get(column)
        if isinstance(value, str) and value.strip():
            return value
        if isinstance(value, list) and value:
            return value
    return None


def _who(message: Any, role: str) -> Any:
    return message.get(role, message.get("from")) if isinstance(message, dict) else None


def _written_reader(form: PromptFormat, columns: Columns) -> Callable[[Mapping[str, Any], str, str], Answered]:
    formats = {
        "chosen": form.chosen_format or "{chosen}",
        "rejected": form.rejected_format or "{rejected}",
        "completion": form.completion_format or "{completion}",
    }
    system_column = form.field_system or "system"

    def answered(row: Mapping[str, Any], column: str, name: str) -> Answered:
        system = text_of(row, system_column, empty=True) if system_column in row else form.system_prompt or ""
        prompt = fill(form.prompt_format or "{prompt}", prompt=text_of(row, columns.prompt[0]), system=system)
        return Pieces(((prompt, False), (fill(formats[name], **{name: text_of(row, column)}), True)))

    return answered
