"""A line of a suite's file -> what is asked and how its answer is checked, or the sentence that says what is wrong with the line.

{"prompt": "...", "reference": "..."}                                checked for exactly that
{"prompt": "...", "checks": [{"kind": "contains", "value": "30 days"}], "tags": ["refunds"], "group": "manual.pdf"}
{"messages": [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]}      a training file's: the last turn is expected
{"prompt": "..."}                                                    nothing to check by: left to judges
"""

from __future__ import annotations

import difflib
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ropewalk.checks import CheckSpec, check_reference, parse_check
from ropewalk.errors import BadInput, DataError

Message = Mapping[str, Any]
REFERENCES = ("reference", "answer", "expected", "completion", "response")
CONVERSATIONS = ("messages", "conversations", "conversation")
KNOWN = (
    "prompt",
    "instruction",
    "system",
    "checks",
    "check",
    "group",
    "tags",
    "must_pass",
    "style",
    *REFERENCES,
    *CONVERSATIONS,
)
ROLES = {"user": "user", "human": "user", "assistant": "assistant", "gpt": "assistant", "model": "assistant"} | {
    "system": "system",
    "developer": "system",
}
BLOCKS = ("text", "image", "document", "search_result", "tool_use", "tool_result")
MOST_TAGS, LONGEST_TAG = 32, 100
ALIKE = 0.85  # an unknown key this near to a known one is a slip of the pen, not a column of somebody's own


@dataclass(frozen=True)
class Asked:
    """What one line asks."""

    messages: tuple[Message, ...]
    system: str
    reference: str
    checks: tuple[CheckSpec, ...]
    group: str
    tags: tuple[str, ...]
    must_pass: bool
    style: bool

    def text(self) -> str:
        """What is asked, as one text that two equal questions have in common."""
        return json.dumps([self.system, list(self.messages)], ensure_ascii=False, separators=(",", ":"), sort_keys=True)


def read_line(line: bytes, number: int, origin: str, group_key: str = "group", must_pass: str | None = None) -> Asked:
    """The question of one line; DataError with the line's number."""
    try:
        return _read(_object(line), group_key, must_pass)
    except DataError as error:
        if error.line is not None:
            raise
        raise DataError(str(error).removeprefix(f"key '{error.key}': "), path=origin, line=number, key=error.key) from None
    except BadInput as error:
        raise DataError(str(error), path=origin, line=number) from None


def _object(line: bytes) -> Mapping[str, Any]:
    try:
        row = json.loads(line)
    except UnicodeDecodeError as error:
        raise DataError(f"is not UTF-8: byte {error.start + 1} of the line; save the file as UTF-8") from None
    except RecursionError:
        raise DataError("is nested too deeply") from None
    except ValueError as error:
        shown = line[:60].decode(errors="replace")
        if line.lstrip()[:1] not in b"{[" and (b"," in line or b"\t" in line):
            raise DataError(f"is no JSON but '{shown}'; a table is not read: write one JSON object per line (JSONL)") from None
        raise DataError(f"is no JSON object: {error}; expected one object per line (JSONL), found '{shown}'") from None
    if not isinstance(row, dict):
        found = "a list" if isinstance(row, list) else type(row).__name__
        raise DataError(f'is {found}; expected one JSON object per line, such as {{"prompt": "...", "reference": "..."}}')
    try:
        json.dumps(row, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise DataError("has half of a surrogate pair (\\ud800 to \\udfff), which is no character") from None
    return row


def _read(row: Mapping[str, Any], group_key: str, must_pass: str | None) -> Asked:
    for key in row:
        if key not in KNOWN and key != group_key and (near := difflib.get_close_matches(key, KNOWN, 1, ALIKE)):
            raise DataError(f"did you mean '{near[0]}'?", key=key)
    messages, system, reference = _conversation(row)
    for key in REFERENCES:
        if row.get(key) is not None:
            reference = _reference(row[key], key)
            break
    tags = _tags(row.get("tags"))
    checks = _checks(row, reference)
    asked = Asked(
        messages=messages,
        system=system,
        reference=reference,
        checks=checks,
        group="",
        tags=tags,
        must_pass=_flag(row, "must_pass") or (must_pass is not None and must_pass in tags),
        style=_flag(row, "style") or "style" in tags,
    )
    return Asked(**{**vars(asked), "group": _group(row, group_key, asked)})


def _conversation(row: Mapping[str, Any]) -> tuple[tuple[Message, ...], str, str]:
    """Turns to be answered, the system's text, and the answer that the conversation itself has."""
    given = [key for key in ("prompt", "instruction", *CONVERSATIONS) if row.get(key) is not None]
    if not given:
        have = ", ".join(map(repr, row)) or "no keys"
        raise DataError(f"has neither 'prompt' nor 'messages', but {have}")
    key, value, system = given[0], row[given[0]], row.get("system", "") or ""
    if not isinstance(system, str):
        raise DataError(f"expected a text, found {type(system).__name__}", key="system")
    if key == "prompt" and isinstance(value, list):
        key = "messages"  # a data set for preferences calls them so
    if key in ("prompt", "instruction"):
        if not isinstance(value, str) or not value.strip():
            raise DataError(f"expected a text that is not empty, found {json.dumps(value)[:60]}", key=key)
        more = row.get("input") if key == "instruction" else None
        text = f"{value}\n\n{more}" if isinstance(more, str) and more else value
        reference = row.get("output") if key == "instruction" else None
        return ({"role": "user", "content": text},), system, _reference(reference, "output") if reference is not None else ""
    if not isinstance(value, list) or not value:
        raise DataError("expected a list of messages that is not empty", key=key)
    turns: list[Message] = []
    for number, message in enumerate(value, 1):
        role, content = _message(message, number, key)
        if role == "system":
            system = f"{system}\n\n{_plain(content)}" if system else _plain(content)
        else:
            turns.append({"role": role, "content": content})
    reference = _plain(turns.pop()["content"]) if turns and turns[-1]["role"] == "assistant" else ""
    if not turns or turns[-1]["role"] != "user" or turns[0]["role"] != "user":
        raise DataError("expected a conversation that begins with a user's turn and has one to be answered", key=key)
    return tuple(turns), system, reference


def _message(message: Any, number: int, key: str) -> tuple[str, Any]:
    if not isinstance(message, Mapping):
        raise DataError(f"message {number} is {type(message).__name__}; expected an object with role and content", key=key)
    role = message.get("role", message.get("from"))
    content = message.get("content", message.get("value"))
    if not isinstance(role, str) or role not in ROLES:
        raise DataError(f"message {number} has the role {json.dumps(role)[:60]}; expected user, assistant or system", key=key)
    if isinstance(content, list):
        for block in content:
            kind = block.get("type") if isinstance(block, Mapping) else None
            if kind not in BLOCKS or (kind == "text" and not isinstance(block.get("text"), str)):
                raise DataError(f"message {number} has a block {json.dumps(block)[:60]}; expected {', '.join(BLOCKS)}", key=key)
    if not isinstance(content, (str, list)) or not content:
        raise DataError(f"message {number} has no content; expected a text, or a list of blocks", key=key)
    return ROLES[role], content


def _plain(content: Any) -> str:
    """The text of a content."""
    if isinstance(content, str):
        return content
    return "".join(block["text"] for block in content if block["type"] == "text")


def _reference(value: Any, key: str) -> str:
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return str(value)
    if isinstance(value, list) and value and all(isinstance(turn, Mapping) for turn in value):  # a completion as messages
        return _plain(_message(value[-1], 1, key)[1])
    if not isinstance(value, str):
        raise DataError(f"expected a text or a number, found {json.dumps(value)[:60]}", key=key)
    return value


def _checks(row: Mapping[str, Any], reference: str) -> tuple[CheckSpec, ...]:
    key = "checks" if row.get("checks") is not None else "check"
    given = row.get(key)
    if given is None:
        given = ["exact"] if reference.strip() else []
    if not isinstance(given, list):
        given = [given]
    found = []
    for number, value in enumerate(given):
        where = f"{key}[{number}]"
        spec = parse_check(value, where)
        check_reference(spec, reference, where)
        found.append(spec)
    if any(spec.kind == "judge" for spec in found) and not all(spec.guardrail or spec.kind == "judge" for spec in found):
        raise DataError("has a judge beside a check that scores; make the check a guardrail, or leave one of them out", key=key)
    return tuple(found)


def _tags(value: Any) -> tuple[str, ...]:
    given = [value] if isinstance(value, str) else value if value is not None else []
    good = isinstance(given, list) and all(isinstance(tag, str) and 0 < len(tag) <= LONGEST_TAG for tag in given)
    if not good or len(given) > MOST_TAGS:
        raise DataError(f"expected at most {MOST_TAGS} texts of 1 to {LONGEST_TAG} characters", key="tags")
    return tuple(dict.fromkeys(given))


def _flag(row: Mapping[str, Any], key: str) -> bool:
    value = False if row.get(key) is None else row[key]  # a column that has nothing for this row is null
    if not isinstance(value, bool):
        raise DataError(f"expected true or false, found {json.dumps(value)[:60]}", key=key)
    return value


def _group(row: Mapping[str, Any], key: str, asked: Asked) -> str:
    """What a question's answer hangs together with: its source document, its template. Without one, equal questions do."""
    value = row.get(key)
    if value is None and key != "group":
        raise DataError(f"is missing; this line has {', '.join(map(repr, row))}", key=key)
    if value is not None and (isinstance(value, bool) or not isinstance(value, (str, int)) or value == ""):
        raise DataError(f"expected a text or a number, found {json.dumps(value)[:60]}", key=key)
    return str(value) if value is not None else f"alone {hashlib.sha256(asked.text().encode()).hexdigest()[:24]}"
