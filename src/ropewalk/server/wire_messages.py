"""The JSON of the Messages API on its way in: a body -> MessagesRequest, or the sentence that says what is wrong with it, and where.

The blocks of its messages are read by wire_blocks.py; what goes out is written by wire_replies.py. Version 2026-10-21 differs from
2023-06-01 in three things: it takes no documents in assistant turns, no citations in user turns, and no temperature, top_p and top_k.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast

from ropewalk.chat.messages import Block, Effort, MessagesRequest, Text, Tool, ToolChoice, Turn
from ropewalk.server.node import Node
from ropewalk.server.wire_blocks import BlockReader

MAX_MESSAGES = 100_000
MAX_STOPS, MAX_STOP = 256, 1_000
LEAST_BUDGET = 1_024
TOOL_NAME = re.compile(r"[a-zA-Z0-9_-]{1,128}")
BILLING = "x-anthropic-billing-header:"  # begins a block that a client changes with every request: no prefix would be equal

SAMPLING = {"temperature", "top_p", "top_k"}
COUNTED = {"messages", "model", "system", "tools", "tool_choice", "thinking", "output_config", "output_format", "cache_control"}
# Understood, and of no effect here: they choose among Anthropic's machines, prices and reports.
WITHOUT_EFFECT = {"service_tier", "inference_geo", "speed", "diagnostics", "context_management", "betas", "anthropic_beta"} | {
    "billing_policy",
    "fallbacks",
    "fallback_credit_token",
}
ASKED = COUNTED | SAMPLING | WITHOUT_EFFECT | {"max_tokens", "stop_sequences", "stream", "metadata"}
ELSEWHERE = {
    "container": "no code is executed here; leave it out, and give the model tools of your own",
    "compaction": "conversations are not summarised here; send a shorter one",
    "thread": "conversations are not kept here; send all of their messages",
    "mcp_servers": "this server does not call MCP servers; call them yourself and send what they answer as tool results",
}


def read_request(body: Node, version: str, *, counting: bool = False) -> MessagesRequest:
    """The request of a body; `counting`: only what count_tokens takes."""
    return _Reader(counting, BlockReader(version)).request(body)


@dataclass
class _Reader:
    """One request on its way in, and what can only be said of it as a whole."""

    counting: bool
    blocks: BlockReader

    def request(self, body: Node) -> MessagesRequest:
        for key, why in ELSEWHERE.items():
            if (found := body.get(key)) is not None and found.value != []:
                raise found.fail(why)
        body.only(
            (COUNTED | WITHOUT_EFFECT if self.counting else ASKED) - (SAMPLING if self.blocks.newer else set()) - {*ELSEWHERE}
        )
        model = body.need("model").text(1, 256)
        most = 1 if self.counting else body.need("max_tokens").integer(0)
        tools = self.tools(body.get("tools"))
        system = self.system(body.get("system"))
        turns = self.turns(body.need("messages"))
        schema = self.schema(body)
        thinking = self.thinking(body, most)
        self.blocks.check_citations(schema is not None)
        temperature, top_p, top_k = body.get("temperature"), body.get("top_p"), body.get("top_k")
        if (metadata := body.get("metadata")) is not None:
            metadata.only({"user_id"})
            if (user := metadata.get("user_id")) is not None:
                user.text(0, 512)
        stream = body.get("stream")
        return MessagesRequest(
            model,
            most,
            turns,
            system,
            tools,
            self.tool_choice(body, tools, thinking),
            1.0 if temperature is None else temperature.number(0, 1),
            1.0 if top_p is None else top_p.number(0, 1),
            0 if top_k is None else top_k.integer(0),
            self.stops(body.get("stop_sequences")),
            thinking,
            schema,
            False if stream is None else stream.boolean(),
            self.blocks.caching(body),
            body.value["thinking"].get("budget_tokens", 0) if thinking else 0,
            self.effort(body),
        )

    # -- what stands beside the conversation

    def system(self, found: Node | None) -> tuple[Text, ...]:
        if found is None:
            return ()
        if isinstance(found.value, str):
            return (Text(found.text()),) if found.value else ()
        blocks = [self.blocks.text(block, "system") for block in found.items()]
        return tuple(block for block in blocks if not block.text.startswith(BILLING))

    def tools(self, found: Node | None) -> tuple[Tool, ...]:
        tools = [self.tool(tool) for tool in found.items()] if found is not None else []
        if found is not None and len({tool.name for tool in tools}) < len(tools):
            raise found.fail("Tool names must be unique.")
        return tuple(tools)

    def tool(self, found: Node) -> Tool:
        kind = found.get("type")
        if kind is not None and kind.text() != "custom":
            raise kind.fail(
                f"'{kind.value[:60]}' is a tool that Anthropic defines; expected 'custom', with the tool's own name and input_schema"
            )
        found.only(
            {"type", "name", "description", "input_schema", "strict", "cache_control", "defer_loading", "eager_input_streaming"}
            | {"allowed_callers", "input_examples"}
        )
        self.blocks.breakpoint(found)
        name, schema, description = found.need("name"), found.need("input_schema"), found.get("description")
        if not TOOL_NAME.fullmatch(name.text()):
            raise name.fail(f"String should match pattern '^{TOOL_NAME.pattern}$'")
        if schema.mapping().get("type") != "object":
            raise Node(schema.value.get("type"), schema.at("type")).fail("Input should be 'object'")
        strict = found.get("strict")
        told = "" if description is None else description.text()
        return Tool(name.value, told, schema.value, strict is not None and strict.boolean())

    def tool_choice(self, body: Node, tools: Sequence[Tool], thinking: bool) -> ToolChoice:
        found = body.get("tool_choice")
        if found is None:
            return ToolChoice()
        kind = cast(Literal["auto", "any", "tool", "none"], found.need("type").choice(("auto", "any", "tool", "none")))
        found.only({"type", *(["name"] if kind == "tool" else []), *(["disable_parallel_tool_use"] if kind != "none" else [])})
        if not tools and kind != "none":
            raise found.fail("tool_choice may only be specified while providing tools.")
        if thinking and kind in ("any", "tool"):
            raise found.fail("Thinking may not be enabled when tool_choice forces tool use.")
        alone, name = found.get("disable_parallel_tool_use"), None
        if kind == "tool":
            name = found.need("name").text()
            if name not in {tool.name for tool in tools}:
                raise found.need("name").fail(f"Tool '{name[:128]}' not found in provided tools.")
        return ToolChoice(kind, name, alone is None or not alone.boolean())

    def thinking(self, body: Node, most: int) -> bool:
        found = body.get("thinking")
        if found is None:
            return False
        kind = found.need("type").choice(("enabled", "disabled", "adaptive", "between_tools"))
        if kind == "enabled":
            found.only({"type", "budget_tokens", "display", "block_binding"})
            budget = found.need("budget_tokens")
            if budget.integer(LEAST_BUDGET) >= most and not self.counting:
                raise body.fail("`max_tokens` must be greater than `thinking.budget_tokens`.")
        else:
            found.only({"type"} if kind == "disabled" else {"type", "display", "block_binding"})
        return kind != "disabled"

    def effort(self, body: Node) -> Effort:
        config = body.get("output_config")
        found = config.get("effort") if config is not None else None
        return "" if found is None else cast(Effort, found.choice(("low", "medium", "high", "xhigh", "max")))

    def schema(self, body: Node) -> dict[str, Any] | None:
        found = body.get("output_format")
        if (config := body.get("output_config")) is not None:
            config.only({"effort", "format", "task_budget"})
            if (inner := config.get("format")) is not None:
                if found is not None:
                    raise inner.fail("output_format says it already; give one of them")
                found = inner
        if found is None:
            return None
        found.only({"type", "schema", "name"})
        found.need("type").choice(("json_schema",))
        return found.need("schema").mapping()

    def stops(self, found: Node | None) -> tuple[str, ...]:
        stops = list(found.items(MAX_STOPS)) if found is not None else []
        for stop in stops:
            if not stop.text(1, MAX_STOP).strip():
                raise stop.fail("each stop sequence must contain non-whitespace")
        return tuple(stop.value for stop in stops)

    # -- the conversation

    def turns(self, found: Node) -> tuple[Turn, ...]:
        turns: list[Turn] = []
        entries = list(found.items(MAX_MESSAGES))
        if not entries:
            raise found.fail("at least one message is required")
        for number, entry in enumerate(entries):
            turn = self.turn(entry, last=number == len(entries) - 1)
            if turns and turns[-1].role == turn.role:  # several in a row are one
                turn = Turn(turn.role, (*turns.pop().blocks, *turn.blocks))
            turns.append(turn)
        if not any(turn.role == "user" for turn in turns):
            raise found.fail("at least one message is expected with the role 'user'")
        self.check_tools(entries)
        return tuple(turns)

    def turn(self, found: Node, last: bool) -> Turn:
        found.only({"role", "content", "prefill"})
        role = cast(Literal["user", "assistant", "system"], found.need("role").choice(("user", "assistant", "system")))
        content = found.need("content")
        if isinstance(content.value, str):
            blocks: list[Block] = [Text(content.text())] if content.value else []
        else:
            blocks = [block for entry in content.items() for block in self.blocks.read(entry, role)]
        if not content.value and not (last and role == "assistant"):
            raise found.fail("all messages must have non-empty content except for the optional final assistant message")
        if last and role == "assistant" and blocks and isinstance(blocks[-1], Text) and blocks[-1].text[-1:].isspace():
            raise found.fail("final assistant content cannot end with trailing whitespace")
        return Turn(role, tuple(blocks))

    def check_tools(self, entries: Sequence[Node]) -> None:
        """Each call is answered in the message that follows, and each answer answers a call of the message before."""
        called: dict[str, str] = {}  # id -> path of its message
        for entry in entries:
            content = entry.value["content"]
            blocks = [Node(b, f"{entry.path}.content.{i}") for i, b in enumerate(content)] if isinstance(content, list) else []
            answered = [block for block in blocks if block.value["type"] == "tool_result"]
            for block in answered:
                if block.value["tool_use_id"] not in called:
                    raise block.fail(
                        f"unexpected `tool_use_id` found in `tool_result` blocks: {block.value['tool_use_id']}. Each `tool_result` "
                        "block must have a corresponding `tool_use` block in the previous message."
                    )
            left = sorted({*called} - {block.value["tool_use_id"] for block in answered})
            if left and entry.value["role"] == "user":
                raise Node(None, called[left[0]]).fail(
                    f"`tool_use` ids were found without `tool_result` blocks immediately after: {', '.join(left)[:500]}."
                )
            if entry.value["role"] == "user":
                called = {}
            elif entry.value["role"] == "assistant":
                ids = [block.value["id"] for block in blocks if block.value["type"] == "tool_use"]
                if len({*ids}) < len(ids) or any(id in called for id in ids):
                    raise entry.fail("`tool_use` ids must be unique")
                called |= dict.fromkeys(ids, entry.path)
