"""The form of a reply: how it is read, what it is kept to, and where it ends, for one request to one model."""

from __future__ import annotations

import json
from dataclasses import replace

from ropewalk.chat.dialects.dialect import Asked, Dialect, Form
from ropewalk.chat.dialects.known import dialect_of
from ropewalk.chat.lark import check, valid
from ropewalk.chat.messages import MessagesRequest
from ropewalk.chat.parsers import Parser
from ropewalk.chat.template import Template
from ropewalk.errors import BadInput

TAIL = 64  # ids of the prompt's end that say where the reply begins


def parser_for(template: Template, request: MessagesRequest, tail: str, *, kept: bool = False) -> Parser:
    """What reads a reply; `tail` is the end of the prompt, `kept` says that form_for's grammar is followed."""
    return dialect_of(template).parser(_asked(request, tail), kept=kept)


def form_for(template: Template, request: MessagesRequest, tail: str) -> Form | None:
    """What the engine is to keep the reply to; BadInput where it could not."""
    dialect, asked = dialect_of(template), _asked(request, tail)
    if request.schema is not None:
        check(request.schema, "output_config.format.schema")
    for number, tool in enumerate(request.tools):
        if tool.strict:
            check(tool.schema, f"tools.{number}.input_schema")
    if asked.goes_on:
        return None
    form = _form(dialect, asked)
    if form is not None and form.kind == "lark" and not valid(form.text):
        # What a family writes beside JSON cannot say all that a schema does: then its calls are only kept to being objects.
        loose = tuple(replace(tool, schema={"type": "object"}) for tool in asked.tools)
        form = _form(dialect, replace(asked, tools=loose))
        strict = [tool.name for tool in asked.tools if tool.strict]
        if strict:
            raise BadInput(f"tools: this model's calls of '{strict[0]}' cannot be kept to its input_schema; leave out strict")
    return form


def _form(dialect: Dialect, asked: Asked) -> Form | None:
    request = asked.request
    forced = request.tool_choice.kind in ("any", "tool")
    if forced and not dialect.calls:
        raise BadInput(
            "tool_choice: this model's chat template writes calls in no way that is known here; leave tool_choice out"
        )
    if forced and asked.tools:
        return dialect.must_call(asked)
    if request.schema is not None:
        if not asked.tools and not request.thinking and not dialect.thinks_first(asked) and dialect.plain_reply:
            return Form("json_schema", json.dumps(request.schema))
        return dialect.structured(asked, request.schema)
    if not dialect.calls:
        return None
    if asked.tools:
        return dialect.may_call(asked)
    return dialect.must_not_call() if request.tools else None


def stop_ids(template: Template) -> tuple[int, ...]:
    """The ids at which a reply ends."""
    return dialect_of(template).stop_ids() if template.program is not None else template.stop_ids


def _asked(request: MessagesRequest, tail: str) -> Asked:
    choice = request.tool_choice
    tools = () if choice.kind == "none" else request.tools
    if choice.kind == "tool":
        tools = tuple(tool for tool in tools if tool.name == choice.name)
    return Asked(request, tools, tail)
