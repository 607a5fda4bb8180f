"""A row with messages, under OpenAI's or ShareGPT's keys -> messages as chat templates expect them. No torch."""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Callable, Mapping
from typing import Any

from ropewalk.chat.rendering import PICTURE
from ropewalk.config.run import DataSource, Run
from ropewalk.data.pictures import MARKER, MOST, in_column, is_picture, named_in
from ropewalk.errors import DataError

OWN_ROLES = ("user", "assistant", "system", "tool", "developer", "ipython", "function")
ROLES = {"human": "user", "gpt": "assistant", **{role: role for role in OWN_ROLES}}
# A row's keys and those of its messages are looked for in this order when the source names none.
COLUMNS, ROLE_KEYS, CONTENT_KEYS = ("messages", "conversations", "conversation"), ("role", "from"), ("content", "value")
# Handed on to the template as they are.
CARRIED = ("tool_calls", "tool_call_id", "name")
_THOUGHTS = (("<think>", "</think>"), ("<reasoning>", "</reasoning>"), ("<|begin_of_thought|>", "<|end_of_thought|>"))
_ANSWER = re.compile(r"<\|begin_of_solution\|>(.*)<\|end_of_solution\|>", re.DOTALL)

PICTURES = "pictures"  # of a message: what says where each lies

Messages = list[dict[str, Any]]


def conversation_reader(source: DataSource, run: Run) -> Callable[[Mapping[str, Any]], tuple[Messages, list[Any] | None]]:
    """The function from a row to its messages and tools."""
    mapping = dict(source.message_property_mappings or {})
    for key, older in (("role", source.message_field_role), ("content", source.message_field_content)):
        if older:
            mapping.setdefault(key, older)
    mapping.setdefault(source.template_thinking_key or "reasoning_content", source.field_thinking or "reasoning_content")
    roles = {name: role for role, names in source.roles.items() for name in (*names, role)} if source.roles else ROLES

    def read(row: Mapping[str, Any]) -> tuple[Messages, list[Any] | None]:
        column, listed = _listed(row, source.field_messages)
        messages = [_message(m, i, source, mapping, roles, run.sees) for i, m in enumerate(listed, 1)]
        if run.sees:
            _show(messages, in_column(row))
        messages = _with_system(messages, row, source, run.default_system_message)
        if not any(m["role"] == "assistant" for m in messages) and not source.roles_to_train and not run.train_on_inputs:
            found = ", ".join(m["role"] for m in messages)
            raise DataError(f"has no assistant turn, so there is nothing to train on; its roles are {found}", key=column)
        return messages, _tools(row, source.field_tools or "tools")

    return read


def _listed(row: Mapping[str, Any], named: str | None) -> tuple[str, list[Any]]:
    column = named or next((name for name in COLUMNS if row.get(name) is not None), None)
    if column is None or row.get(column) is None:
        raise _no_messages(row, column or COLUMNS[0])
    listed = _from_json(row[column], column)
    if not isinstance(listed, list):
        raise DataError(f"expected a list of messages, found {type(listed).__name__}", key=column)
    if not listed:
        raise DataError("has no message", key=column)
    return column, listed


def _no_messages(row: Mapping[str, Any], key: str) -> DataError:
    near = next((name for name in row if isinstance(row[name], list)), None)
    near = near or next(iter(difflib.get_close_matches(key, list(row), 1)), None)
    hint = f"if '{near}' holds the messages, write field_messages: {near}" if near else "name the column in field_messages"
    return DataError(f"is missing; this row has {', '.join(map(repr, row)) or 'no keys'}; {hint}", key=key)


def _message(
    message: Any, number: int, source: DataSource, mapping: Mapping[str, str], roles: Mapping[str, str], sees: bool
) -> dict[str, Any]:
    if not isinstance(message, dict):
        raise DataError(f"message {number}: expected an object with role and content, found {type(message).__name__}")
    found: dict[str, Any] = {"role": _role(message, number, mapping.get("role"), roles)}
    key = mapping.get("content") or next((k for k in CONTENT_KEYS if message.get(k) is not None), "content")
    found["content"] = _content(message, key, number, found, sees)
    for name, taken_from in mapping.items():
        if name not in ("role", "content") and message.get(taken_from) is not None:
            found[name] = message[taken_from]
    taken = set(mapping.values())
    found |= {name: message[name] for name in CARRIED if message.get(name) is not None and name not in taken}
    if found.get("tool_calls"):
        found["tool_calls"] = [_call(call, number) for call in _from_json(found["tool_calls"], "tool_calls")]
    _add_training(found, message, number, source)
    return found


def _role(message: Mapping[str, Any], number: int, named: str | None, roles: Mapping[str, str]) -> str:
    key = named or next((k for k in ROLE_KEYS if k in message), "role")
    if message.get(key) is None:
        have = ", ".join(map(repr, message)) or "no keys"
        raise DataError(
            f"message {number} has no '{key}' but {have}; map it: message_property_mappings: {{role: ...}}", key=key
        )
    role = str(message[key])
    if role not in roles:
        near = difflib.get_close_matches(role, list(roles), 1)
        hint = f"did you mean '{near[0]}'? " if near else ""
        known = ", ".join(dict.fromkeys(roles))
        raise DataError(
            f"message {number} has the role '{role}'; {hint}known are {known}; others are mapped in 'roles'", key=key
        )
    return roles[role]


def _content(message: Mapping[str, Any], key: str, number: int, found: dict[str, Any], sees: bool) -> str:
    value = message.get(key)
    if isinstance(value, list):
        if sees and (pictures := [named_in(part) for part in value if is_picture(part)]):
            found[PICTURES] = pictures
        value, details = _joined(value, number, sees)
        if details is not None:
            found["training_detail"] = details
    if value is None and not message.get("tool_calls"):
        have = ", ".join(map(repr, message))
        raise DataError(
            f"message {number} has no '{key}' but {have}; map it: message_property_mappings: {{content: ...}}", key=key
        )
    if value is not None and not isinstance(value, str):
        raise DataError(f"message {number}: expected a text, found {type(value).__name__}", key=key)
    return value or ""


def _joined(parts: list[Any], number: int, sees: bool = False) -> tuple[str, list[dict[str, Any]] | None]:
    """Parts of a content as one text, with their own `train` or `weight` as details."""
    text, details, flagged = "", [], False
    for part in parts:
        if is_picture(part):
            if not sees:
                raise DataError(
                    f"message {number} holds a picture; to train on pictures add processor_type: AutoProcessor, with a base that sees",
                    key="content",
                )
            text += PICTURE
            continue
        words = part if isinstance(part, str) else next((part[k] for k in ("text", "content", "value") if part.get(k)), None)
        if words is None and not isinstance(part, str) and part.get("type", "text") != "text":
            raise DataError(
                f"message {number} holds a part of type '{part['type']}'; only text and pictures can be trained on",
                key="content",
            )
        flag = None if isinstance(part, str) else part.get("train", part.get("weight"))
        flagged |= flag is not None
        if words:
            begin = len(text)
            text += words
            details.append({"begin_offset": begin, "end_offset": len(text) - 1, "train": flag is None or bool(flag)})
    return text, details if flagged else None


def _show(messages: Messages, listed: list[Any]) -> None:
    """Gives every place of a picture what says where it lies: the part itself, or the row's column, in its order."""
    left = iter(listed)
    if listed and not any(PICTURES in message for message in messages):
        for message in messages:
            message["content"] = message["content"].replace(MARKER, PICTURE)
            if count := message["content"].count(PICTURE):
                message[PICTURES] = [None] * count
        first = next((m for m in messages if m["role"] == "user"), messages[0])
        if not any(PICTURES in message for message in messages):  # the column shows them all before the first words
            first["content"], first[PICTURES] = PICTURE * len(listed) + first["content"], [None] * len(listed)
    for number, message in enumerate(messages, 1):
        if PICTURES in message:
            if message["role"] == "assistant":
                raise DataError(f"message {number} is the assistant's and holds a picture; models here write text alone")
            message[PICTURES] = [next(left, None) if said is None else said for said in message[PICTURES]]
    shown = [said for message in messages for said in message.get(PICTURES, ())]
    if None in shown or next(left, None) is not None:
        raise DataError(
            f"shows {len(shown)} pictures in its messages, and its column 'images' lists {len(listed)}; give each place one"
        )
    if len(shown) > MOST:
        raise DataError(f"shows {len(shown)} pictures; a row shows {MOST} at most, as a request does")


def pictures_of(messages: Messages) -> list[Any]:
    """What says where the pictures of messages lie, in their order; the messages no longer hold it."""
    return [said for message in messages for said in message.pop(PICTURES, ())]


def _add_training(found: dict[str, Any], message: Mapping[str, Any], number: int, source: DataSource) -> None:
    """The message's own flags, and its reasoning apart from its answer where that is asked for."""
    flag = message.get(source.message_field_training) if source.message_field_training else None
    if flag is not None:
        found["training"] = bool(flag)
    details = message.get(source.message_field_training_detail) if source.message_field_training_detail else None
    if details:
        found["training_detail"] = _checked_details(details, number, str(source.message_field_training_detail))
    thinking = source.template_thinking_key or "reasoning_content"
    if isinstance(found.get(thinking), list):
        found[thinking], parts = _joined(found[thinking], number)
        if parts is not None:
            found["reasoning_training_detail"] = parts
    if source.split_thinking and found["role"] == "assistant":
        _split_thought(found, thinking)


def _checked_details(details: Any, number: int, key: str) -> list[dict[str, Any]]:
    wanted = {"begin_offset", "end_offset", "train"}
    if not isinstance(details, list) or not all(isinstance(d, dict) and wanted <= d.keys() for d in details):
        raise DataError(f"message {number}: expected a list of objects with begin_offset, end_offset and train", key=key)
    return [{name: detail[name] for name in wanted} for detail in details]


def _split_thought(found: dict[str, Any], key: str) -> None:
    for opens, closes in _THOUGHTS:
        before, opened, rest = found["content"].partition(opens)
        thought, closed, answer = rest.partition(closes)
        if opened and closed and not before.strip():
            solution = _ANSWER.search(answer)
            found[key], found["content"] = thought.strip(), solution[1].strip() if solution else answer.lstrip()
            return


def _with_system(messages: Messages, row: Mapping[str, Any], source: DataSource, default: str | None) -> Messages:
    has = messages[0]["role"] == "system"
    if has:
        return messages[1:] if source.drop_system_message and len(messages) > 1 else messages
    said = row.get(source.field_system or "system") or default
    return (
        [{"role": "system", "content": said}, *messages]
        if isinstance(said, str) and not source.drop_system_message
        else messages
    )


def _call(call: Any, number: int) -> Any:
    """A call whose arguments are an object, as templates expect; data often has them as JSON text."""
    function = call.get("function") if isinstance(call, dict) else None
    if isinstance(function, dict) and isinstance(function.get("arguments"), str):
        return {**call, "function": {**function, "arguments": _from_json(function["arguments"] or "{}", "arguments", number)}}
    return call


def _tools(row: Mapping[str, Any], key: str) -> list[Any] | None:
    tools = row.get(key)
    if not tools:
        return None
    tools = _from_json(tools, key)
    if not isinstance(tools, list):
        raise DataError(f"expected a list of tools, found {type(tools).__name__}", key=key)
    return [_tool(tool, key) for tool in tools]


def _tool(tool: Any, key: str) -> Any:
    function = tool.get("function") if isinstance(tool, dict) else None
    if isinstance(function, dict) and isinstance(function.get("parameters"), str):
        return {**tool, "function": {**function, "parameters": _from_json(function["parameters"], key)}}
    return tool


def _from_json(value: Any, key: str, number: int | None = None) -> Any:
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except json.JSONDecodeError as error:
        where = f"message {number}: " if number else ""
        raise DataError(f"{where}holds text that is not JSON: {error.msg} at its column {error.colno}", key=key) from error
