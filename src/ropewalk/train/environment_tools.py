"""Tools of an environment: methods that its class lists under `tools`, which the model may call before it replies.

    class Shop:
        def price(self, item: str) -> float:
            \"\"\"What an item costs.\"\"\"
        tools = [price]

The model is told a method's docstring and the types of its parameters. What goes wrong in a call is told to the model, as its result.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, get_type_hints

from pydantic import BaseModel, ConfigDict, ValidationError, create_model

from ropewalk.chat.messages import Tool
from ropewalk.errors import BadInput


@dataclass(frozen=True)
class ToolCall:
    """What a reply calls.  talk -> environment"""

    name: str
    arguments: Mapping[str, Any]


class Toolbox:
    """The tools of a class."""

    def __init__(self, environment: str, kind: Any) -> None:
        listed = getattr(kind, "tools", ())
        if not isinstance(listed, list | tuple):
            raise BadInput(f"environment '{environment}': tools is {listed!r}; expected a list of its methods")
        self._arguments: dict[str, type[BaseModel]] = {}
        tools = []
        for one in listed:
            name = one if isinstance(one, str) else str(getattr(one, "__name__", one))
            method = getattr(kind, name, None)
            where = f"environment '{environment}': the tool '{name}'"
            if not callable(method):
                raise BadInput(f"{where} is no method of the class")
            if not method.__doc__:
                raise BadInput(f"{where} has no docstring; the model reads there what it is for")
            self._arguments[name] = _arguments(where, name, method)
            tools.append(Tool(name, inspect.cleandoc(method.__doc__), _schema(self._arguments[name])))
        self.tools = tuple(tools)

    def call(self, env: Any, call: ToolCall, run: Callable[..., Any]) -> str:
        """What a call gives, as text; `run` calls a method and waits for it."""
        name = call.name
        if name not in self._arguments:
            return f"error: there is no tool '{name}'; there are {', '.join(self._arguments)}"
        try:
            checked = self._arguments[name].model_validate(dict(call.arguments))
        except ValidationError as error:
            wrong = "; ".join(f"{'.'.join(map(str, one['loc']))}: {one['msg']}" for one in error.errors())
            return f"error: arguments of '{name}': {wrong}"
        arguments = {field: getattr(checked, field) for field in type(checked).model_fields}
        try:
            result = run(getattr(env, name), **arguments)
            return result if isinstance(result, str) else json.dumps(result, ensure_ascii=False)
        except (Exception, SystemExit) as error:
            return f"error: {type(error).__name__}: {error}"


def _arguments(where: str, name: str, method: Callable[..., Any]) -> type[BaseModel]:
    """A model of the arguments that a method takes."""
    hints = get_type_hints(method, include_extras=True)
    fields: dict[str, Any] = {}
    for parameter in [*inspect.signature(method).parameters.values()][1:]:
        if parameter.kind not in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY):
            raise BadInput(f"{where} takes '{parameter}'; expected parameters that have a name each")
        if parameter.name not in hints:
            raise BadInput(f"{where}: its parameter '{parameter.name}' has no type; the model is told of it")
        default = ... if parameter.default is parameter.empty else parameter.default
        fields[parameter.name] = (hints[parameter.name], default)
    try:
        return create_model(name, __config__=ConfigDict(extra="forbid", protected_namespaces=()), **fields)
    except Exception as error:
        raise BadInput(f"{where}: the types of its parameters cannot be told to a model: {error}") from None


def _schema(arguments: type[BaseModel]) -> dict[str, Any]:
    """Without the titles, which only repeat names."""

    def bare(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: bare(inner) for key, inner in value.items() if key != "title" or not isinstance(inner, str)}
        return [bare(inner) for inner in value] if isinstance(value, list) else value

    schema: dict[str, Any] = bare(arguments.model_json_schema())
    schema.pop("additionalProperties", None)
    return schema
