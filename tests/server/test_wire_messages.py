"""Bodies of the Messages API -> requests, or the sentence that says what is wrong and where; events of a reply -> its JSON."""

import asyncio
import base64
import json
from collections.abc import AsyncIterator, Sequence
from contextlib import suppress
from typing import Any

import pytest
from anthropic.types import Message
from hypothesis import given, settings
from hypothesis import strategies as st

from ropewalk.chat.messages import (
    BlockEnded,
    BlockStarted,
    Bytes,
    CitationAdded,
    Cited,
    Delta,
    Document,
    Ended,
    FileId,
    Image,
    MessagesRequest,
    Pieces,
    ReplyEvent,
    Started,
    Text,
    Thinking,
    Tool,
    ToolChoice,
    ToolResult,
    ToolUse,
    Turn,
    Url,
    Usage,
)
from ropewalk.errors import BadInput, Overloaded
from ropewalk.server.node import Node
from ropewalk.server.wire_messages import read_request
from ropewalk.server.wire_replies import ReplyWriter, sent, sent_error

OLD, NEW = "2023-06-01", "2026-10-21"
PLAIN: dict[str, Any] = {"model": "m", "max_tokens": 5, "messages": [{"role": "user", "content": "hi"}]}
TOOL = {"name": "t", "input_schema": {"type": "object"}}
PDF = base64.b64encode(b"%PDF-").decode()


def read(version: str = OLD, counting: bool = False, **more: Any) -> MessagesRequest:
    body = {key: value for key, value in {**PLAIN, **more}.items() if value is not ...}
    return read_request(Node(body), version, counting=counting)


def user(*blocks: dict[str, Any]) -> list[dict[str, Any]]:
    return [{"role": "user", "content": list(blocks)}]


def document(source: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {"type": "document", "source": source, **more}


def stored(id: str = "file_1", **more: Any) -> dict[str, Any]:
    return document({"type": "file", "file_id": id}, **more)


def test_a_plain_text_is_one_block():
    assert read() == MessagesRequest("m", 5, (Turn("user", (Text("hi"),)),))


def test_what_stands_beside_the_conversation_is_read():
    found = read(
        system=[{"type": "text", "text": "s", "cache_control": {"type": "ephemeral", "ttl": "1h"}}],
        tools=[{**TOOL, "description": "d", "strict": True, "type": "custom"}],
        tool_choice={"type": "tool", "name": "t", "disable_parallel_tool_use": True},
        temperature=0.5,
        top_p=0.9,
        top_k=4,
        stop_sequences=["a", "b"],
        output_config={"effort": "low", "format": {"type": "json_schema", "schema": {"type": "object"}}},
        stream=True,
        metadata={"user_id": "u"},
        service_tier="auto",
        diagnostics={"previous_message_id": None},
    )
    assert (found.system, found.tools) == ((Text("s"),), (Tool("t", "d", {"type": "object"}, True),))
    assert found.tool_choice == ToolChoice("tool", "t", False)
    assert (found.temperature, found.top_p, found.top_k, found.stop_sequences) == (0.5, 0.9, 4, ("a", "b"))
    assert (found.schema, found.stream, found.caching, found.thinking) == ({"type": "object"}, True, "1h", False)
    assert (found.effort, read().effort) == ("low", "")


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ({"type": "file", "file_id": "file_1"}, FileId("file_1")),
        ({"type": "base64", "media_type": "application/pdf", "data": PDF}, Bytes("application/pdf", b"%PDF-")),
        ({"type": "text", "media_type": "text/plain", "data": "ä"}, Bytes("text/plain", "ä".encode())),
        ({"type": "content", "content": "a"}, Pieces(("a",))),
        ({"type": "content", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}, Pieces(("a", "b"))),
        ({"type": "url", "url": "https://example.com/a.pdf"}, Url("https://example.com/a.pdf")),
    ],
)
def test_a_document_has_one_of_five_sources(source, expected):
    found = read(messages=user(document(source, title="T", context="C", citations={"enabled": True})))
    assert found.documents() == [Document(expected, "T", "C", True)]


def test_a_conversation_with_tools_thinking_pictures_and_search_results_is_read():
    result = {
        "type": "tool_result",
        "tool_use_id": "toolu_1",
        "content": [{"type": "text", "text": "12"}, stored()],
        "is_error": True,
    }
    picture = {"type": "image", "source": {"type": "file", "file_id": "file_2"}}
    searched = {"type": "search_result", "source": "https://x", "title": "X", "content": [{"type": "text", "text": "found"}]}
    found = read(
        messages=[
            {"role": "user", "content": [picture, searched]},
            {"role": "user", "content": "and?"},
            {
                "role": "assistant",
                "content": [
                    {"type": "thinking", "thinking": "hm", "signature": "s"},
                    {"type": "redacted_thinking", "data": "x"},
                    {"type": "tool_use", "id": "toolu_1", "name": "t", "input": {"a": 1}},
                ],
            },
            {"role": "user", "content": [result]},
        ]
    )
    assert found.turns == (
        Turn("user", (Image(FileId("file_2")), Document(Pieces(("found",)), "X", None, False, "https://x"), Text("and?"))),
        Turn("assistant", (Thinking("hm", "s"), ToolUse("toolu_1", "t", {"a": 1}))),
        Turn("user", (ToolResult("toolu_1", (Text("12"), Document(FileId("file_1"))), True),)),
    )


def test_citations_of_earlier_replies_are_read():
    cited = {"type": "page_location", "cited_text": "c", "document_index": 0, "document_title": None}
    cited |= {"start_page_number": 1, "end_page_number": 2}
    turns = [*PLAIN["messages"], {"role": "assistant", "content": [{"type": "text", "text": "a", "citations": [cited]}]}]
    text = read(messages=turns).turns[1].blocks[0]
    assert text == Text("a", (Cited("page_location", "c", 0, None, None, 1, 2),))


def test_a_header_that_changes_with_every_request_is_left_out_of_the_prompt():
    blocks = [
        {"type": "text", "text": "x-anthropic-billing-header: cc_version=1; cch=abc"},
        {"type": "text", "text": "You help."},
    ]
    assert read(system=blocks).system == (Text("You help."),)


def deep(levels: int) -> Any:
    value: Any = 1
    for _ in range(levels):
        value = [value]
    return value


MARK = {"cache_control": {"type": "ephemeral"}}


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"model": ...}, "model: Field required"),
        ({"max_tokens": ...}, "max_tokens: Field required"),
        ({"max_tokens": "5"}, "max_tokens: Input should be a valid integer"),
        ({"max_tokens": -1}, "max_tokens: Input should be greater than or equal to 0"),
        ({"max_tokens": True}, "max_tokens: Input should be a valid integer"),
        ({"messages": []}, "messages: at least one message is required"),
        ({"messages": "hi"}, "messages: Input should be a valid list"),
        ({"messages": [7]}, "messages.0: Input should be an object"),
        ({"messages": [{"role": "robot", "content": "x"}]}, "messages.0.role: Input should be 'user' or 'assistant'"),
        ({"messages": [{"role": "user"}]}, "messages.0.content: Field required"),
        ({"messages": [{"role": "user", "content": ""}]}, "messages.0: all messages must have non-empty content"),
        ({"messages": user({"type": "text", "text": ""})}, "messages.0.content.0.text: text content blocks must be non-empty"),
        (
            {"messages": user({"type": "text", "text": "\ud800"})},
            "messages.0.content.0.text: the text holds half of a surrogate",
        ),
        ({"messages": user({"type": "video"})}, "messages.0.content.0.type: Input tag 'video'"),
        ({"messages": user({"type": "text", "text": "a", "x": 1})}, "messages.0.content.0.x: Extra inputs are not permitted"),
        ({"messages": user({"type": "container_upload", "file_id": "f"})}, "messages.0.content.0: no code is executed here"),
        ({"messages": user({"type": "server_tool_use", "id": "x"})}, "messages.0.content.0: `server_tool_use` blocks"),
        (
            {"messages": user({"type": "tool_use", "id": "a", "name": "t", "input": {}})},
            "messages.0.content.0: `tool_use` blocks can",
        ),
        ({"messages": user(document({"type": "ftp"}))}, "messages.0.content.0.source.type: Input should be 'base64'"),
        (
            {"messages": user(document({"type": "base64", "media_type": "application/pdf", "data": "!"}))},
            "messages.0.content.0.source.data: Input should be valid base64",
        ),
        (
            {"messages": user(document({"type": "base64", "media_type": "image/png", "data": PDF}))},
            "messages.0.content.0.source.media_type: Input should be 'application/pdf'",
        ),
        ({"messages": user(document({"type": "url", "url": "file:///etc"}))}, "messages.0.content.0.source.url: Only HTTP"),
        ({"messages": user(stored(title=""))}, "messages.0.content.0.title: String should have at least 1 character"),
        (
            {"messages": user(stored(citations={"enabled": True}), stored())},
            "messages.0.content.1: citations are enabled for other documents",
        ),
        (
            {
                "messages": user(stored(citations={"enabled": True})),
                "output_config": {"format": {"type": "json_schema", "schema": {}}},
            },
            "output_config.format: citations",
        ),
        (
            {"messages": user({"type": "tool_result", "tool_use_id": "a"})},
            "messages.0.content.0: unexpected `tool_use_id` found in `tool_result` blocks: a",
        ),
        (
            {
                "messages": [
                    *PLAIN["messages"],
                    {"role": "assistant", "content": [{"type": "tool_use", "id": "a", "name": "t", "input": {}}]},
                    *PLAIN["messages"],
                ]
            },
            "messages.1: `tool_use` ids were found without `tool_result` blocks immediately after: a",
        ),
        (
            {"messages": [*PLAIN["messages"], {"role": "assistant", "content": "a "}]},
            "messages.1: final assistant content cannot end",
        ),
        ({"tools": [TOOL, TOOL]}, "tools: Tool names must be unique"),
        ({"tools": [{**TOOL, "name": "a b"}]}, "tools.0.name: String should match pattern"),
        ({"tools": [{"name": "t", "input_schema": {"type": "array"}}]}, "tools.0.input_schema.type: Input should be 'object'"),
        (
            {"tools": [{"type": "web_search_20250305", "name": "w"}]},
            "tools.0.type: 'web_search_20250305' is a tool that Anthropic",
        ),
        ({"tool_choice": {"type": "any"}}, "tool_choice: tool_choice may only be specified while providing tools"),
        ({"tools": [TOOL], "tool_choice": {"type": "tool", "name": "x"}}, "tool_choice.name: Tool 'x' not found"),
        (
            {"tools": [TOOL], "tool_choice": {"type": "any"}, "max_tokens": 9000, "thinking": {"type": "adaptive"}},
            "tool_choice: Thinking may not be enabled",
        ),
        ({"thinking": {"type": "enabled", "budget_tokens": 1000}}, "thinking.budget_tokens: Input should be greater than"),
        (
            {"thinking": {"type": "enabled", "budget_tokens": 1024}},
            "`max_tokens` must be greater than `thinking.budget_tokens`",
        ),
        ({"temperature": 1.5}, "temperature: Input should be less than or equal to 1"),
        ({"top_p": 10**400}, "top_p: Input should be less than or equal to 1"),
        ({"top_k": -1}, "top_k: Input should be greater than or equal to 0"),
        ({"stop_sequences": [" "]}, "stop_sequences.0: each stop sequence must contain non-whitespace"),
        ({"speling": 1}, "speling: Extra inputs are not permitted"),
        ({"container": "c"}, "container: no code is executed here"),
        ({"mcp_servers": [{}]}, "mcp_servers: this server does not call MCP servers"),
        ({"metadata": {"name": "x"}}, "metadata.name: Extra inputs"),
        ({"system": [{"type": "text", "text": "s", **MARK}] * 5}, "A maximum of 4 blocks with cache_control"),
        ({"cache_control": {"type": "permanent"}}, "cache_control.type: Input should be 'ephemeral'"),
        (
            {
                "system": [{"type": "text", "text": "s", **MARK}],
                "messages": user(stored(cache_control={"type": "ephemeral", "ttl": "1h"})),
            },
            "messages.0.content.0.cache_control.ttl: a ttl='1h' cache_control block must not come after",
        ),
    ],
)
def test_what_is_wrong_is_told_with_its_place(more, message):
    with pytest.raises(BadInput) as error:
        read(**more)
    assert str(error.value).startswith(message), str(error.value)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"temperature": 1.0}, "temperature: Extra inputs"),
        ({"top_p": 1.0}, "top_p: Extra inputs"),
        ({"top_k": 1}, "top_k: Extra inputs"),
        (
            {"messages": [*PLAIN["messages"], {"role": "assistant", "content": [stored()]}]},
            "messages.1.content.0: a `document` block",
        ),
        (
            {
                "messages": user(
                    {
                        "type": "text",
                        "text": "a",
                        "citations": [
                            {
                                "type": "char_location",
                                "cited_text": "a",
                                "document_index": 0,
                                "document_title": None,
                                "start_char_index": 0,
                                "end_char_index": 1,
                            }
                        ],
                    }
                )
            },
            "messages.0.content.0.citations: a text of a user message has no citations",
        ),
    ],
)
def test_the_newer_version_refuses_what_the_older_takes(more, message):
    read(OLD, **more)
    with pytest.raises(BadInput) as error:
        read(NEW, **more)
    assert str(error.value).startswith(message)


def test_counting_takes_no_max_tokens():
    assert read(counting=True, max_tokens=...).model == "m"
    with pytest.raises(BadInput, match="max_tokens: Extra inputs"):
        read(counting=True)


# -- replies


async def _coming(events: Sequence[ReplyEvent]) -> AsyncIterator[ReplyEvent]:
    for event in events:
        yield event


def whole(events: Sequence[ReplyEvent]) -> dict[str, Any]:
    return asyncio.run(ReplyWriter("msg_1", "m").message(_coming(events)))


CITED = Cited("char_location", "a", 0, "T", "file_1", 0, 1)
REPLY: list[ReplyEvent] = [
    Started(Usage(3, 40, 50)),
    BlockStarted(Thinking("")),
    Delta("hm"),
    BlockEnded("sig"),
    BlockStarted(Text("")),
    Delta("Hel"),
    Delta("lo"),
    CitationAdded(CITED),
    BlockEnded(),
    BlockStarted(ToolUse("toolu_1", "t", {})),
    Delta('{"a":'),
    Delta("1}"),
    BlockEnded(),
    Ended("tool_use", None, Usage(3, 40, 50, 9)),
]


def test_a_reply_is_one_message():
    found = Message.model_validate(whole(REPLY))
    assert [block.type for block in found.content] == ["thinking", "text", "tool_use"]
    assert (found.content[0].signature, found.content[1].text, found.content[2].input) == ("sig", "Hello", {"a": 1})
    assert found.content[1].citations[0].file_id == "file_1"
    assert (found.stop_reason, found.stop_sequence) == ("tool_use", None)
    usage = found.usage
    assert (usage.input_tokens, usage.cache_creation_input_tokens, usage.cache_read_input_tokens) == (3, 40, 50)
    assert (usage.output_tokens, usage.cache_creation.ephemeral_5m_input_tokens) == (9, 40)


def test_the_same_as_events_is_read_by_the_sdk_as_the_same_message():
    from anthropic.lib.streaming._messages import accumulate_event
    from anthropic.types import RawMessageStreamEvent
    from pydantic import TypeAdapter

    writer, snapshot, unfinished = ReplyWriter("msg_1", "m"), None, {}
    for event in REPLY:
        for found in writer.events(event):
            name, data = sent(found).decode().split("\n")[:2]
            assert name == f"event: {found['type']}"
            parsed = TypeAdapter(RawMessageStreamEvent).validate_python(json.loads(data.removeprefix("data: ")))
            snapshot = accumulate_event(event=parsed, current_snapshot=snapshot, json_bufs=unfinished)
    assert snapshot is not None
    expected = Message.model_validate(whole(REPLY))
    assert [b.to_dict() for b in snapshot.content] == [b.to_dict() for b in expected.content]
    assert (snapshot.stop_reason, snapshot.usage.output_tokens) == (expected.stop_reason, expected.usage.output_tokens)


def test_an_hour_is_told_apart_from_five_minutes():
    events = ReplyWriter("msg_1", "m", "1h").events(Started(Usage(1, 2, 3)))
    kept = events[0]["message"]["usage"]["cache_creation"]
    assert kept == {"ephemeral_5m_input_tokens": 0, "ephemeral_1h_input_tokens": 2}


def test_a_call_that_was_cut_off_has_no_input():
    events = [
        Started(Usage()),
        BlockStarted(ToolUse("toolu_1", "t", {})),
        Delta('{"a'),
        BlockEnded(),
        Ended("max_tokens", None, Usage()),
    ]
    assert whole(events)["content"][0]["input"] == {}


def test_an_error_in_the_middle_is_an_event_with_the_usual_envelope():
    name, data = sent_error(Overloaded("full"), "req_1").decode().split("\n")[:2]
    assert name == "event: error"
    assert json.loads(data[6:]) == {
        "type": "error",
        "error": {"type": "overloaded_error", "message": "full"},
        "request_id": "req_1",
    }


# -- whatever comes

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-9, 9) | st.floats(allow_nan=False) | st.text(max_size=9),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=9), inner, max_size=3),
    max_leaves=8,
)
KEYS = "type text source content title context citations cache_control tool_use_id id name input data media_type file_id url".split()
TYPES = "text document image tool_use tool_result thinking search_result base64 content url file ephemeral custom".split()
BLOCKS = st.recursive(
    st.dictionaries(st.sampled_from(KEYS), VALUES | st.sampled_from(TYPES), max_size=5),
    lambda inner: st.dictionaries(
        st.sampled_from(KEYS), inner | st.lists(inner, max_size=2) | st.sampled_from(TYPES), max_size=5
    ),
    max_leaves=6,
)
BODIES = st.dictionaries(
    st.sampled_from(
        "system tools tool_choice thinking output_config stop_sequences metadata temperature cache_control".split()
    ),
    VALUES | BLOCKS | st.lists(BLOCKS, max_size=2),
    max_size=3,
)


@settings(max_examples=300, deadline=None)
@given(
    BODIES, st.lists(BLOCKS, max_size=3) | VALUES, st.sampled_from(["user", "assistant", "system"]), st.sampled_from([OLD, NEW])
)
def test_any_body_is_a_request_or_bad_input(body, content, role, version):
    with suppress(BadInput):
        read(version, **body, messages=[{"role": role, "content": content}])
