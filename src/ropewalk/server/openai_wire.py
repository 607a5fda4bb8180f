"""The JSON of chat completions and completions on its way in: a body -> a request, or the sentence that says what is wrong, and where."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from ropewalk.chat.messages import Effort, MessagesRequest, Tool, ToolChoice
from ropewalk.server.node import Node
from ropewalk.server.openai_sampling import MAX_SAMPLES, Told, most_of, refuse_others, sampling_of, told_of
from ropewalk.server.openai_turns import TurnReader

TOOL_NAME = re.compile(r"[a-zA-Z0-9_-]{1,128}")
MAX_TOP = 20  # likeliest tokens that are told in the place of each
MAX_IDS = 1 << 22  # of a prompt
COMPLETION_TOKENS = 16  # where a completion names no max_tokens: OpenAI's own default
CHAT = {
    *(
        "messages",
        "max_completion_tokens",
        "tools",
        "tool_choice",
        "parallel_tool_calls",
        "response_format",
        "logprobs",
        "top_logprobs",
    ),
    *("reasoning_effort", "chat_template_kwargs", "add_generation_prompt", "continue_final_message"),
}
EFFORTS: dict[str, Effort] = {
    "minimal": "low",
    "low": "low",
    "medium": "medium",
    "high": "high",
    "xhigh": "xhigh",
    "max": "max",
}
Asked = tuple[MessagesRequest, Told]


def read_chat(body: Node) -> Asked:
    """A body of chat completions."""
    refuse_others(body, CHAT)
    logprobs = body.get("logprobs")
    told = told_of(body, logprobs is not None and logprobs.boolean())
    top = body.get("top_logprobs")
    if top is not None and top.integer(0, MAX_TOP) and not told.logprobs:
        raise top.fail("it is only allowed when logprobs is true")
    system, turns = TurnReader().read(body.need("messages"))
    goes_on, begins = body.get("continue_final_message"), body.get("add_generation_prompt")
    continues = goes_on is not None and goes_on.boolean()
    if continues == (begins is None or begins.boolean()) and (continues or begins is not None):
        raise body.need("add_generation_prompt" if begins is not None else "continue_final_message").fail(
            "a reply that goes on needs continue_final_message: true and add_generation_prompt: false; another one needs neither"
        )
    if (turns[-1].role == "assistant") != continues:
        raise body.need("messages").fail(
            "the last message is to be the user's or a tool's; for a reply that goes on where an assistant message ends, "
            "say continue_final_message: true and add_generation_prompt: false"
        )
    tools = _tools(body.get("tools"))
    thinking, effort = _thinking(body)
    choice = _choice(body, tools)
    if thinking and choice.kind in ("any", "tool"):
        raise body.need("tool_choice").fail("a model that thinks cannot be made to call a tool; say reasoning_effort: none")
    request = MessagesRequest(
        **sampling_of(body),
        max_tokens=most_of(body, "max_completion_tokens", "max_tokens"),
        turns=turns,
        system=system,
        tools=tools,
        tool_choice=choice,
        schema=_schema(body.get("response_format")),
        thinking=thinking,
        effort=effort,
        stream=told.stream,
        tokens=told.tokens,
        top=0 if top is None else top.integer(0),
    )
    return request, told


@dataclass(frozen=True)
class Prompts:
    """A body of completions: one request a prompt."""

    requests: tuple[MessagesRequest, ...]
    told: Told


def read_completion(body: Node) -> Prompts:
    """A body of completions."""
    refuse_others(body, {"prompt", "logprobs", "add_special_tokens"})
    logprobs, special = body.get("logprobs"), body.get("add_special_tokens")
    top = 0 if logprobs is None else logprobs.integer(0, MAX_TOP)
    if special is not None and not special.boolean():
        raise special.fail("a text is read as the tokenizer reads a document; send ids to say it otherwise")
    told = told_of(body, logprobs is not None)
    sampling = sampling_of(body)
    prompts = _prompts(body.need("prompt"))
    if len(prompts) * sampling["samples"] > MAX_SAMPLES:
        raise body.need("prompt").fail(
            f"{len(prompts)} prompts of {sampling['samples']} completions each are more than the {MAX_SAMPLES} of one request"
        )
    most = body.get("max_tokens")
    tokens = COMPLETION_TOKENS if most is None else most.integer(1)
    request = MessagesRequest(**sampling, max_tokens=tokens, turns=(), stream=told.stream, tokens=told.tokens, top=top)
    return Prompts(tuple(replace(request, raw=raw) for raw in prompts), told)


def _prompts(found: Node) -> list[str | tuple[int, ...]]:
    """A text, ids, or a list of either."""
    if isinstance(found.value, str):
        return [found.text(1)]
    inner = list(found.items(MAX_IDS))
    if not inner:
        raise found.fail("List should have at least 1 item")
    if not isinstance(inner[0].value, str | list):
        return [_ids(inner)]
    if len(inner) > MAX_SAMPLES:
        raise found.fail(f"List should have at most {MAX_SAMPLES} items, not {len(inner):,}")
    return [one.text(1) if isinstance(one.value, str) else _ids(list(one.items(MAX_IDS))) for one in inner]


def _ids(found: Sequence[Node]) -> tuple[int, ...]:
    return tuple(id.integer(0) for id in found)


def _tools(found: Node | None) -> tuple[Tool, ...]:
    tools = [_tool(tool) for tool in found.items()] if found is not None else []
    if found is not None and len({tool.name for tool in tools}) < len(tools):
        raise found.fail("Tool names must be unique.")
    return tuple(tools)


def _tool(found: Node) -> Tool:
    if found.need("type").choice(("function", "custom")) == "custom":
        raise found.fail("custom tools are not called here; describe a function")
    found.only({"type", "function"})
    function = found.need("function")
    function.only({"name", "description", "parameters", "strict"})
    name, described = function.need("name"), function.get("description")
    if not TOOL_NAME.fullmatch(name.text()):
        raise name.fail("String should match pattern '^[a-zA-Z0-9_-]{1,128}$'")
    parameters, strict = function.get("parameters"), function.get("strict")
    return Tool(
        name.value,
        "" if described is None else described.text(),
        {"type": "object", "properties": {}} if parameters is None else parameters.mapping(),
        strict is not None and strict.boolean(),
    )


def _choice(body: Node, tools: Sequence[Tool]) -> ToolChoice:
    found, together = body.get("tool_choice"), body.get("parallel_tool_calls")
    parallel = together is None or together.boolean()
    if found is None:
        return ToolChoice(parallel=parallel)
    if isinstance(found.value, str):
        kind = found.choice(("none", "auto", "required"))
        if kind == "required" and not tools:
            raise found.fail("it is only allowed when tools are specified")
        return ToolChoice({"none": "none", "auto": "auto"}.get(kind, "any"), None, parallel)  # type: ignore[arg-type]
    if found.need("type").choice(("function", "custom", "allowed_tools")) != "function":
        raise found.fail("expected none, auto, required, or a function; send only the tools that may be called")
    found.only({"type", "function"})
    function = found.need("function")
    function.only({"name"})
    name = function.need("name")
    if name.text() not in {tool.name for tool in tools}:
        raise name.fail(f"'{name.value[:128]}' is none of the tools")
    return ToolChoice("tool", name.value, parallel)


def _schema(found: Node | None) -> dict[str, Any] | None:
    if found is None:
        return None
    match found.need("type").choice(("text", "json_object", "json_schema")):
        case "text":
            found.only({"type"})
            return None
        case "json_object":
            found.only({"type"})
            return {"type": "object"}
        case _:
            found.only({"type", "json_schema"})
            form = found.need("json_schema")
            form.only({"name", "schema", "strict"})
            form.need("name").text(1, 64)
            if (strict := form.get("strict")) is not None:
                strict.boolean()  # a reply is kept to its schema in either case
            return form.need("schema").mapping()


def _thinking(body: Node) -> tuple[bool, Effort]:
    found, options = body.get("reasoning_effort"), body.get("chat_template_kwargs")
    thinks = None
    if options is not None:
        options.only({"enable_thinking"})
        thinks = options.need("enable_thinking").boolean()
    if found is None:
        return bool(thinks), "max" if thinks else ""
    effort = found.choice(("none", *EFFORTS))
    if thinks is not None and thinks == (effort == "none"):
        raise found.fail("chat_template_kwargs.enable_thinking says otherwise; give one of them")
    return effort != "none", EFFORTS.get(effort, "")
