"""One compiled chat template: Jinja in a sandbox, with the filters and functions that model folders expect of it."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment

from ropewalk.errors import DataError, ModelError

Message = Mapping[str, Any]

# Marks are characters of private-use plane 15; its last two open and close a block of `{% generation %}`.
MARK, BLOCK_OPENS, BLOCK_CLOSES = 0xF0000, "\U000ffffc", "\U000ffffd"
PICTURE = "\U000ffffb"  # stands in a message's text where a picture is shown


class Generation(Extension):
    """`{% generation %}...{% endgeneration %}`: what the template's author says the model writes."""

    tags = {"generation"}

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_fence", [nodes.ContextReference()]), [], [], body).set_lineno(line)

    def _fence(self, context: Context, caller: Any) -> str:
        text: str = caller()
        return BLOCK_OPENS + text + BLOCK_CLOSES if context.get("fencing") else text


class Program:
    """A compiled template; the same words in give the same words out, but for `strftime_now`."""

    def __init__(self, source: str, variables: Mapping[str, Any]) -> None:
        self.source = source
        self.variables = dict(variables)
        self.dated = "strftime_now" in source
        self._environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[Generation, "jinja2.ext.loopcontrols"]
        )
        self._environment.filters["tojson"] = _to_json
        self._environment.globals.update(raise_exception=_refuse, strftime_now=lambda form: datetime.now().strftime(form))
        try:
            self._template = self._environment.from_string(source)
        except jinja2.TemplateSyntaxError as error:
            raise ModelError(f"the chat template cannot be read: {error.message} in its line {error.lineno}") from error

    def run(
        self,
        messages: Sequence[Message],
        tools: Sequence[Any] | None = None,
        *,
        add_generation_prompt: bool = False,
        fencing: bool = False,
        variables: Mapping[str, Any] | None = None,
    ) -> str:
        """The text of a conversation; with `fencing`, `{% generation %}` blocks are marked in it."""
        try:
            return self._template.render(
                {**self.variables, **(variables or {})},
                messages=messages,
                tools=tools or None,
                documents=None,
                add_generation_prompt=add_generation_prompt,
                fencing=fencing,
            )
        except jinja2.TemplateError as error:
            raise DataError(f"the chat template refuses this conversation: {error}") from error
        except (TypeError, AttributeError, KeyError, IndexError, ValueError) as error:
            raise DataError(f"the chat template fails on this conversation: {type(error).__name__}: {error}") from error


def _refuse(message: str) -> None:
    raise jinja2.TemplateError(message)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # Jinja's own filter escapes HTML, which is no part of a prompt.
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def in_parts(messages: Sequence[Message]) -> list[Message]:
    """The same messages with their texts as lists of one part, which is all that some multimodal templates look at."""
    texts = [m["content"] if isinstance(m.get("content"), str) else None for m in messages]
    return [m if text is None else {**m, "content": [{"type": "text", "text": text}]} for m, text in zip(messages, texts)]


def with_pictures(messages: Sequence[Message]) -> list[Message]:
    """The same messages, those with pictures as lists of parts, which is how templates are shown them."""
    texts = [m["content"] if isinstance(m.get("content"), str) else "" for m in messages]
    return [{**m, "content": list(_parts(text))} if PICTURE in text else m for m, text in zip(messages, texts)]


def _parts(content: str) -> Iterator[dict[str, str]]:
    for number, text in enumerate(content.split(PICTURE)):
        if number:
            yield {"type": "image"}
        if text:
            yield {"type": "text", "text": text}


def with_written_arguments(messages: Sequence[Message]) -> list[Message]:
    """The same messages with the arguments of calls as JSON text, which is what some templates expect."""
    return [{**m, "tool_calls": [_written(call) for call in m["tool_calls"]]} if m.get("tool_calls") else m for m in messages]


def _written(call: Any) -> Any:
    function = call.get("function") if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or isinstance(function.get("arguments"), str):
        return call
    return {**call, "function": {**function, "arguments": json.dumps(function.get("arguments"), ensure_ascii=False)}}
