"""A row in one of Axolotl's formats -> what will be tokenised: a conversation, pieces of text, or ids. No torch.

Names are Axolotl's. A row that does not fit is a DataError with the key and the reason; who reads the rows adds file and line.
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from ropewalk.chat.masking import Rules
from ropewalk.config.run import DataSource, PromptFormat, Run
from ropewalk.data.conversations import Messages, conversation_reader, pictures_of
from ropewalk.errors import ConfigError, DataError


@dataclass(frozen=True)
class Conversation:
    """Messages for the chat template, and what of them is trained."""

    messages: list[dict[str, Any]]
    tools: list[Any] | None
    rules: Rules
    pictures: tuple[Any, ...] = ()  # what the row says of where each lies


@dataclass(frozen=True)
class Pieces:
    """Texts one after another, trained or not; `document`: with the tokenizer's own beginning; `ends`: end tokens after them."""

    parts: tuple[tuple[str, bool], ...]
    document: bool = True
    ends: int = 1


@dataclass(frozen=True)
class Text:
    """A document that is trained whole and cut into rows of the sequence length."""

    text: str


@dataclass(frozen=True)
class Ids:
    """A row that is tokenised already."""

    ids: list[int]
    trained: list[bool]


Example = Conversation | Pieces | Text | Ids
Reader = Callable[[Mapping[str, Any]], Example]


@dataclass(frozen=True)
class Style:
    """What an instruction looks like: with an input, without one, and the system text before it."""

    with_input: str
    without_input: str
    system: str


_IM_USER, _IM_TURN = "<|im_start|>user\n{instruction}", "<|im_end|>\n<|im_start|>assistant\n"
STYLES = {
    "instruct": Style(
        "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n",
        "### Instruction:\n{instruction}\n\n### Response:\n",
        "{system}\n\n",
    ),
    "chat": Style("USER: {instruction}\n{input}\nASSISTANT:", "USER: {instruction}\nASSISTANT:", "SYSTEM: {system}\n"),
    "chatml": Style(_IM_USER + "\n{input}" + _IM_TURN, _IM_USER + _IM_TURN, "<|im_start|>system\n{system}<|im_end|>\n"),
    "phi": Style(
        "<|user|>\n{instruction}<|end|>{input}<|assistant|>",
        "<|user|>\n{instruction}<|end|>\n<|assistant|>\n",
        "<|system|>\n{system}<|end|>\n",
    ),
    "plain": Style("{instruction}\n{input}", "{instruction}", "{system}"),
}
# The format named alpaca is these two sentences (Stanford Alpaca's, Apache-2.0); models tuned on it expect them to the letter.
PREAMBLE = "Below is an instruction that describes a task{}. Write a response that appropriately completes the request."
WITH_INPUT, WITHOUT_INPUT = PREAMBLE.format(", paired with an input that provides further context"), PREAMBLE.format("")


@dataclass(frozen=True)
class Instruction:
    """One instruction format: the columns it takes and the words around them."""

    instruction: str = "instruction"
    input: str | None = "input"
    output: str = "output"
    system: str | None = None  # the column of a row's own system text; without one, alpaca's preamble
    style: str = "instruct"
    preamble: bool = True
    ends: int = 1
    system_format: str | None = None


_CHAT = Instruction(style="chat")
INSTRUCTIONS: dict[str, Instruction] = {
    "alpaca": Instruction(),
    "gpteacher": Instruction(output="response"),
    "oasst": Instruction("INSTRUCTION", None, "RESPONSE"),
    "alpaca_instruct": Instruction(),
    "alpaca_instruct.load_no_prompt": Instruction(preamble=False),
    "alpaca_chat": _CHAT,
    "alpaca_chat.load_qa": Instruction("question", None, "answer", style="chat"),
    "alpaca_chat.load_camel_ai": Instruction("message_1", None, "message_2", style="chat"),
    "alpaca_chat.load_no_prompt": Instruction(style="chat", preamble=False),
    "alpaca_w_system": Instruction(system="system", style="chat"),
    "alpaca_w_system.load_chat": Instruction(system="system", style="chat"),
    "alpaca_w_system.load_instruct": Instruction(system="system", system_format="### System:\n{system}\n\n"),
    "alpaca_w_system.load_open_orca": Instruction(
        "question", None, "response", system="system_prompt", system_format="### System:\n{system}\n\n"
    ),
    "alpaca_w_system.load_open_orca_chatml": Instruction("question", None, "response", system="system_prompt", style="chatml"),
    "metharme": Instruction("prompt", None, "generation", style="plain", preamble=False, ends=3),
}
CHATS = ("chat_template", "chat_template.default", "sharegpt", "chat_template.load")
TEXTS = ("completion", "pretrain", "pretraining")
NAMES = (*CHATS, *INSTRUCTIONS, *TEXTS, "input_output")


def reader_of(source: DataSource, run: Run) -> Reader:
    """The function that reads a row of this source; a type that nobody knows is an error that says what is near."""
    kind = source.type
    if kind is None:
        return _read_ids
    if isinstance(kind, PromptFormat):
        return _mapping_reader(kind)
    if kind in CHATS:
        read, rules = conversation_reader(source, run), rules_of(source, run)
        return lambda row: _conversation(*read(row), rules)
    if kind in TEXTS:
        column = source.field or source.text_column or "text"
        return lambda row: Text(text_of(row, column))
    if kind == "input_output":
        return _read_segments
    name, _, style = kind.partition(":")
    if name in INSTRUCTIONS and (not style or style in STYLES):
        return _instruction_reader(INSTRUCTIONS[name], STYLES[style or INSTRUCTIONS[name].style], source)
    raise ConfigError(f"type: '{kind}' is not supported; {_suggest(kind)}")


def _conversation(messages: Messages, tools: list[Any] | None, rules: Rules) -> Conversation:
    pictures = tuple(pictures_of(messages))
    return Conversation(messages, tools, rules, pictures)


def rules_of(source: DataSource, run: Run) -> Rules:
    """What of a conversation is trained; an empty `roles_to_train` without flags in the data means the last message alone."""
    roles = source.roles_to_train
    names = {name: role for role, names in (source.roles or {}).items() for name in names} | ({} if source.roles else ALIASES)
    return Rules(
        tuple(names.get(role, role) for role in (("assistant",) if roles is None else roles)),
        source.train_on_eos or "turn",
        source.train_on_eot,
        run.train_on_inputs,
        roles == () and not source.message_field_training and not source.message_field_training_detail,
    )


ALIASES = {"human": "user", "gpt": "assistant"}


def missing(row: Mapping[str, Any], key: str, way_out: str = "") -> DataError:
    """The error for a key that a row has not, with the keys it has."""
    near = difflib.get_close_matches(key, list(row), 1, 0.5)
    hint = way_out or (f"did you mean '{near[0]}'? " if near else "") + "name the column in the data source, or choose its type"
    return DataError(f"is missing; this row has {', '.join(map(repr, row)) or 'no keys'}; {hint}", key=key)


def text_of(row: Mapping[str, Any], key: str, *, empty: bool = False) -> str:
    if key not in row:
        raise missing(row, key)
    value = row[key]
    if value is None and empty:
        return ""
    if not isinstance(value, str):
        raise DataError(f"expected a text, found {type(value).__name__}: {str(value)[:60]!r}", key=key)
    if not value.strip() and not empty:
        raise DataError("is empty, so there is nothing to train on", key=key)
    return value


def _instruction_reader(form: Instruction, style: Style, source: DataSource) -> Reader:
    style = replace(style, system=form.system_format or style.system)
    columns = source.field_instruction or form.instruction, source.field_input or form.input, source.field_output or form.output
    system_column = source.field_system or form.system

    def system_of(row: Mapping[str, Any], given: str) -> str:
        if system_column:
            return text_of(row, system_column, empty=True)
        return (WITH_INPUT if given else WITHOUT_INPUT) if form.preamble else ""

    return lambda row: _prompted(row, columns, style, system_of, form.ends)


def _mapping_reader(form: PromptFormat) -> Reader:
    chosen = (form.format, "{instruction} {input} "), (form.no_input_format, "{instruction} "), (form.system_format, "{system}")
    style = Style(*(default if given is None else given for given, default in chosen))
    columns = form.field_instruction or "instruction", form.field_input or "input", form.field_output or "output"
    column = form.field_system or "system"

    def system_of(row: Mapping[str, Any], given: str) -> str:
        return text_of(row, column, empty=True) if column in row else form.system_prompt or ""

    return lambda row: _prompted(row, columns, style, system_of, 1)


def _prompted(
    row: Mapping[str, Any],
    columns: tuple[str, str | None, str],
    style: Style,
    system_of: Callable[[Mapping[str, Any], str], str],
    ends: int,
) -> Pieces:
    instruction, output = text_of(row, columns[0]), text_of(row, columns[2])
    given = text_of(row, columns[1], empty=True) if columns[1] and columns[1] in row else ""
    system = system_of(row, given)
    prompt = fill(style.system, system=system) if system else ""
    prompt += fill(style.with_input if given else style.without_input, instruction=instruction, input=given)
    return Pieces(((prompt, False), (output, True)), ends=ends)


def fill(form: str, **values: str) -> str:
    """As str.format does, doubled braces too, except that names it does not know stay as they are."""
    known = {"{{": "{", "}}": "}", **{f"{{{name}}}": value for name, value in values.items()}}
    return re.sub(r"\{\{|\}\}|\{\w+\}", lambda found: known.get(found[0], found[0]), form)


def _read_segments(row: Mapping[str, Any]) -> Pieces:
    segments = row.get("segments")
    if "segments" not in row:
        raise missing(row, "segments")
    if not isinstance(segments, list) or not all(isinstance(s, dict) and isinstance(s.get("text"), str) for s in segments):
        raise DataError("expected a list of {label: true or false, text: ...}", key="segments")
    parts = tuple((segment["text"], bool(segment.get("label"))) for segment in segments)
    if not any(text and trained for text, trained in parts):
        raise DataError("no segment has label true and a text, so there is nothing to train on", key="segments")
    return Pieces(parts, document=False, ends=0)


def _read_ids(row: Mapping[str, Any]) -> Ids:
    if "input_ids" not in row:
        near = "messages" if "messages" in row or "conversations" in row else "instruction"
        kind = "chat_template" if near == "messages" else "alpaca"
        raise missing(row, "input_ids", f"a source without a type holds tokens; for text add a type, such as {kind}")
    ids, labels = _numbers(row, "input_ids"), _numbers(row, "labels") if row.get("labels") is not None else None
    labels = ids if labels is None else labels
    if len(labels) != len(ids):
        raise DataError(f"has {len(labels)} entries, input_ids {len(ids)}", key="labels")
    seen = _numbers(row, "attention_mask") if row.get("attention_mask") is not None else [1] * len(ids)
    if len(seen) != len(ids):
        raise DataError(f"has {len(seen)} entries, input_ids {len(ids)}", key="attention_mask")
    for at, (token, label) in enumerate(zip(ids, labels)):
        if label not in (-100, token):
            raise DataError(f"entry {at} is {label}, expected -100 or the token {token}; labels are not shifted", key="labels")
    kept = [(token, label != -100) for token, label, on in zip(ids, labels, seen) if on]
    if not any(trained for _, trained in kept):
        raise DataError("every entry is -100, so there is nothing to train on", key="labels")
    return Ids([token for token, _ in kept], [trained for _, trained in kept])


def _numbers(row: Mapping[str, Any], key: str) -> list[int]:
    value = row[key]
    value = json.loads(value) if isinstance(value, str) and value.startswith("[") else value
    if not isinstance(value, list) or not all(isinstance(number, int) for number in value):
        raise DataError("expected a list of whole numbers", key=key)
    return value


def _suggest(kind: str) -> str:
    near = difflib.get_close_matches(kind, NAMES, 1)
    other = "or write the format as a mapping: type: {field_instruction: ..., field_output: ..., format: ...}"
    return f"did you mean '{near[0]}'? {other}" if near else f"known are {', '.join(NAMES)}; {other}"
