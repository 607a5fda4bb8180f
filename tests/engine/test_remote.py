"""Models of other servers, over real HTTP: the official SDK asks ours, and ours asks a small server that says what each test tells it to."""

import asyncio
import json
import logging
from collections.abc import Iterator
from contextlib import aclosing
from typing import Any

import anthropic
import pytest

from engine.other_server import Answer, Other, asked, block, chunks, event, listening, message, paper, said
from files.papers import pdf
from ropewalk.config.serving import Remote, ServedModel, Serving
from ropewalk.engine import upstream
from ropewalk.engine.event_stream import EventStream
from ropewalk.engine.upstream import Upstream, http_client, retry_after
from ropewalk.errors import OutputError, UpstreamFailed, UpstreamTimedOut
from ropewalk.files.settings import Settings
from ropewalk.server.settings import ServerSettings
from server.conftest import Running, running

KEY = "sk-far-away-0815"
TEXT = "The lighthouse of Pellworm was built in 1907. Its light — 灯 🗼 — reaches far."
TOOL = {"name": "weather", "description": "of a place", "input_schema": {"type": "object", "properties": {"place": {}}}}


@pytest.fixture(scope="module")
def other() -> Iterator[Other]:
    with listening() as found:
        yield found


@pytest.fixture(scope="module")
def ours(other: Other, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """Our server with two remotes: 'far' speaks Messages, 'chat' chat completions."""
    models = {
        "far": ServedModel(remote=Remote("anthropic", other.url, "far-1", "FAR_KEY", 8192)),
        "chat": ServedModel(remote=Remote("openai", other.url + "/v1/", "", "FAR_KEY")),
    }
    data = tmp_path_factory.mktemp("remote")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ROPEWALK_ROOT_KEY_FILE", str(tmp_path_factory.mktemp("keys") / "root.key"))
        patch.setenv("FAR_KEY", KEY)
        patch.setattr(upstream, "PAUSE_SECONDS", 0.01)
        with running(data, Settings(data=data), ServerSettings(serving=Serving(models))) as found:
            yield found


@pytest.fixture
def sdk(ours: Running) -> Iterator[anthropic.Anthropic]:
    with ours.sdk() as client:
        yield client


# -- tests


@pytest.mark.parametrize("cut", [1, 7, 1 << 20])
@pytest.mark.parametrize("model", ["far", "chat"])
def test_a_reply_is_the_same_however_it_is_cut(sdk, other, model, cut):
    words = "Café|\u2028 灯|🗼 end"
    body = message(said(words)) if model == "far" else chunks(*({"content": word} for word in words.split("|")))
    other.says(Answer(body, cut=cut), Answer(body, cut=cut))
    with sdk.messages.stream(**asked(model)) as stream:
        assert "".join(stream.text_stream) == words.replace("|", "")
    assert sdk.messages.create(**asked(model)).content[0].text == words.replace("|", "")


def test_messages_are_asked_with_everything_and_told_with_everything(sdk, other):
    thought = block(
        0,
        {"type": "thinking", "thinking": "", "signature": ""},
        {"type": "thinking_delta", "thinking": "Hm."},
        {"type": "signature_delta", "signature": "c2ln"},
    )
    hidden = block(1, {"type": "redacted_thinking", "data": "x"})
    call = block(
        2,
        {"type": "tool_use", "id": "toolu_1", "name": "weather", "input": {}},
        *({"type": "input_json_delta", "partial_json": part} for part in ('{"pla', 'ce":"Rom"}')),
    )
    other.says(Answer(message(thought, hidden, call, reason="tool_use")))
    extra = {"tools": [TOOL], "system": "Be short.", "thinking": {"type": "enabled", "budget_tokens": 1500}}
    extra["output_config"] = {"effort": "medium"}
    reply = sdk.messages.create(**asked("far", **extra))
    path, headers, body = other.asked[-1]
    assert (path, headers["x-api-key"], headers["anthropic-version"]) == ("/v1/messages", KEY, "2023-06-01")
    assert (body["model"], body["max_tokens"], body["stream"]) == ("far-1", 2000, True)
    assert body["thinking"] == {"type": "enabled", "budget_tokens": 1500}
    assert body["tools"] == [TOOL]
    assert body["system"] == [{"type": "text", "text": "Be short."}]
    assert not {"temperature", "top_p", "top_k", "stop_sequences"} & {*body}
    assert body["output_config"] == {"effort": "medium"}
    assert [(b.type, getattr(b, "signature", "")) for b in reply.content] == [("thinking", "c2ln"), ("tool_use", "")]
    assert (reply.content[1].input, reply.stop_reason, reply.model) == ({"place": "Rom"}, "tool_use", "far")
    usage = reply.usage
    counts = (usage.input_tokens, usage.cache_creation_input_tokens, usage.cache_read_input_tokens, usage.output_tokens)
    assert counts == (5, 7, 11, 23)

    other.says(Answer(message(said("Warm."), reason="stop_sequence", stop="END")))
    turns = [
        {"role": "user", "content": "Rome?"},
        {"role": "assistant", "content": [b.model_dump(exclude_none=True) for b in reply.content]},
        {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "toolu_1", "content": "20 C", "is_error": True}]},
    ]
    reply = sdk.messages.create(**asked("far", stop_sequences=["END"], **extra) | {"messages": turns})
    assert (reply.stop_reason, reply.stop_sequence, other.body["stop_sequences"]) == ("stop_sequence", "END", ["END"])
    assert other.body["messages"][1]["content"][0] == {"type": "thinking", "thinking": "Hm.", "signature": "c2ln"}
    answered = {
        "type": "tool_result",
        "tool_use_id": "toolu_1",
        "content": [{"type": "text", "text": "20 C"}],
        "is_error": True,
    }
    assert other.body["messages"][2]["content"] == [answered]


def test_files_travel_as_their_text(sdk, other):
    file = sdk.beta.files.upload(file=("a.pdf", pdf("Rent is 900 euros.", "It rises."), "application/pdf"))
    source = {"type": "document", "source": {"type": "file", "file_id": file.id}, "title": "Lease"}
    question = {"type": "text", "text": "What is the rent?", "cache_control": {"type": "ephemeral", "ttl": "1h"}}
    for model, body in (("far", message(said("900"))), ("chat", chunks({"content": "900"}))):
        other.says(Answer(body))
        assert sdk.messages.create(**asked(model, [source, question])).content[0].text == "900"
        told = json.dumps(other.body)
        assert file.id not in told
        assert '<document title=\\"Lease\\">' in told
        assert "Rent is 900 euros." in told
        assert "It rises." in told
    other.says(Answer(message(said("900"))))
    sdk.messages.create(**asked("far", [source, question]))
    kept = {"type": "ephemeral", "ttl": "1h"}
    assert [part.get("cache_control") for part in other.body["messages"][0]["content"]] == [kept, kept]


def test_only_citations_that_our_text_holds_go_on(sdk, other):
    file = sdk.beta.files.upload(file=("a.pdf", pdf("Rent is 900 euros.", "It rises."), "application/pdf"))
    pages = {"type": "document", "source": {"type": "file", "file_id": file.id}, "citations": {"enabled": True}}
    pieces = {"type": "document", "citations": {"enabled": True}, "title": "Own"}
    pieces["source"] = {"type": "content", "content": [{"type": "text", "text": "One."}, {"type": "text", "text": "Two."}]}
    plain = paper(TEXT, citations={"enabled": True})
    begin = TEXT.index("Its light")

    def cited(document: int, start: int, end: int, text: str, kind: str = "char") -> dict[str, Any]:
        unit = "block" if kind == "content_block" else "char"
        found = {"type": f"{kind}_location", "cited_text": text, "document_index": document, "document_title": None}
        return {"type": "citations_delta", "citation": {**found, f"start_{unit}_index": start, f"end_{unit}_index": end}}

    other.says(
        *(Answer(json.dumps({"input_tokens": count}).encode()) for count in (9, 24)),
        Answer(
            message(
                block(
                    0,
                    {"type": "text", "text": "", "citations": []},
                    {"type": "text_delta", "text": "So it is."},
                    cited(0, 0, 18, "Rent is 900 euros."),
                    cited(0, 0, 18, "Rent is 901 euros."),
                    cited(1, 1, 2, "Two.", "content_block"),
                    cited(1, 1, 3, "Two.", "content_block"),
                    cited(2, begin, len(TEXT), TEXT[begin:]),
                    cited(2, begin + 1, len(TEXT), TEXT[begin:]),
                    cited(3, 0, 4, "None"),
                    {"type": "citations_delta", "citation": {"type": "web_search_result_location", "cited_text": "x"}},
                )
            )
        ),
    )
    reply = sdk.messages.create(**asked("far", [pages, pieces, plain, {"type": "text", "text": "Well?"}]))
    sent = other.body["messages"][0]["content"]
    assert [part["source"]["type"] for part in sent[:3]] == ["text", "content", "text"]
    page, own, found = reply.content[0].citations
    assert (page.type, page.start_page_number, page.end_page_number, page.file_id) == ("page_location", 1, 2, file.id)
    assert (own.type, own.start_block_index, own.cited_text, own.document_title) == ("content_block_location", 1, "Two.", "Own")
    assert (found.type, found.document_index) == ("char_location", 2)
    assert TEXT[found.start_char_index : found.end_char_index] == found.cited_text == TEXT[begin:]


def test_chat_completions_are_asked_with_everything_and_told_with_everything(sdk, other):
    def call(index: int, id: str | None, name: str | None, text: str) -> dict[str, Any]:
        function = {"arguments": text} | ({"name": name} if name else {})
        return {"tool_calls": [{"index": index, "function": function} | ({"id": id, "type": "function"} if id else {})]}

    counts = {"prompt_tokens": 100, "completion_tokens": 9, "prompt_tokens_details": {"cached_tokens": 64}}
    deltas = [
        {"role": "assistant", "content": ""},
        {"reasoning_content": "Hm"},
        {"reasoning": "."},
        {"content": "\n\nLet me see."},
        call(0, "call_1", "weather", ""),
        call(0, None, None, '{"place":'),
        call(0, None, None, '"Rom"}'),
        call(1, "functions.weather:1", "weather", '{"place": "Oslo"}'),
    ]
    other.says(Answer(chunks(*deltas, reason="tool_calls", usage=counts), cut=11))
    extra: dict[str, Any] = {"tools": [TOOL], "system": "Be short.", "thinking": {"type": "adaptive"}}
    with sdk.messages.stream(
        **asked("chat", tool_choice={"type": "auto", "disable_parallel_tool_use": True}, **extra)
    ) as stream:
        reply = stream.get_final_message()
    path, headers, body = other.asked[-1]
    assert (path, headers["authorization"], body["model"]) == ("/v1/chat/completions", f"Bearer {KEY}", "chat")
    assert "x-api-key" not in headers
    assert (body["tool_choice"], body["parallel_tool_calls"], body["max_tokens"]) == ("auto", False, 2000)
    assert body["messages"] == [{"role": "system", "content": "Be short."}, {"role": "user", "content": "Hello"}]
    assert body["tools"][0]["function"]["parameters"] == TOOL["input_schema"]
    assert [b.type for b in reply.content] == ["thinking", "text", "tool_use", "tool_use"]
    thinking, text, first, second = reply.content
    assert (thinking.thinking, text.text, reply.stop_reason) == ("Hm.", "Let me see.", "tool_use")
    assert thinking.signature
    assert (first.id, first.input, second.input) == ("call_1", {"place": "Rom"}, {"place": "Oslo"})
    assert second.id.startswith("toolu_")
    assert (reply.usage.input_tokens, reply.usage.cache_read_input_tokens, reply.usage.output_tokens) == (36, 64, 9)

    other.says(Answer(chunks({"content": "Warm."})))
    results = [{"type": "tool_result", "tool_use_id": b.id, "content": "20 C"} for b in (first, second)]
    results[1]["is_error"] = True
    turns = [
        {"role": "user", "content": "Rome?"},
        {"role": "assistant", "content": [b.model_dump(exclude_none=True) for b in reply.content]},
        {"role": "user", "content": [*results, {"type": "text", "text": "So?"}]},
    ]
    reply = sdk.messages.create(**asked("chat", **extra) | {"messages": turns})
    _, _, called, *answered = other.body["messages"]
    assert called["content"] == "Let me see."
    assert [json.loads(c["function"]["arguments"]) for c in called["tool_calls"]] == [{"place": "Rom"}, {"place": "Oslo"}]
    assert answered == [
        {"role": "tool", "tool_call_id": "call_1", "content": "20 C"},
        {"role": "tool", "tool_call_id": second.id, "content": "Error: 20 C"},
        {"role": "user", "content": "So?"},
    ]
    usage = reply.usage  # nothing was told of it
    assert (usage.input_tokens, usage.cache_read_input_tokens, usage.output_tokens) == (0, 0, 0)


@pytest.mark.parametrize(
    ("reason", "rest", "told"),
    [
        ("length", {}, ("max_tokens", None)),
        ("content_filter", {}, ("refusal", None)),
        ("stop", {"stop_reason": "END"}, ("stop_sequence", "END")),
        ("stop", {"stop_reason": 151645}, ("end_turn", None)),
    ],
)
def test_reasons_to_stop_of_chat_completions(sdk, other, reason, rest, told):
    other.says(Answer(chunks({"content": "So", "reasoning": "never asked for"}, reason=reason, **rest)))
    reply = sdk.messages.create(**asked("chat"))
    assert ([b.type for b in reply.content], (reply.stop_reason, reply.stop_sequence)) == (["text"], told)


@pytest.mark.parametrize(
    ("words", "goes_on", "text", "stop"),
    [
        (["So it", " is EN", "D"], [], "So it is ", "END"),
        (["So it is END more"], [" and more"] * 3, "So it is ", "END"),
        (["So it", " is EN", "OUGH"], [], "So it is ENOUGH", None),
        (["It is EN"], [], "It is EN", None),
        (["A ", "HALT END"], [], "A ", "HALT"),
    ],
)
def test_a_stop_sequence_that_a_server_leaves_in_the_text_ends_it(sdk, other, words, goes_on, text, stop):
    counts = {"prompt_tokens": 10, "completion_tokens": 3}
    deltas = [{"content": word} for word in [*words, *goes_on]]
    other.says(Answer(chunks(*deltas, usage=counts)))
    reply = sdk.messages.create(**asked("chat", stop_sequences=["END", "HALT"]))
    assert [b.text for b in reply.content] == [text]
    assert (reply.stop_reason, reply.stop_sequence) == (("stop_sequence", stop) if stop else ("end_turn", None))
    assert reply.usage.output_tokens == (0 if goes_on else 3)  # a reply that goes on is not waited for


def test_what_may_be_a_stop_sequence_stands_before_the_call_that_follows_it(sdk, other):
    call = {"index": 0, "id": "c1", "type": "function", "function": {"name": "weather", "arguments": "{}"}}
    other.says(Answer(chunks({"content": "See EN"}, {"tool_calls": [call]}, reason="tool_calls")))
    reply = sdk.messages.create(**asked("chat", stop_sequences=["END"], tools=[TOOL]))
    assert [(b.type, getattr(b, "text", "")) for b in reply.content] == [("text", "See EN"), ("tool_use", "")]


def test_a_stop_sequence_is_the_reason_to_stop_also_where_the_other_server_calls_it_the_end_of_the_turn(sdk, other):
    other.says(Answer(message(said("So"), stop="END")))
    reply = sdk.messages.create(**asked("far", stop_sequences=["END"]))
    assert (reply.stop_reason, reply.stop_sequence) == ("stop_sequence", "END")


def test_a_form_of_the_reply_is_passed_on(sdk, other):
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"], "additionalProperties": False}
    form = {"format": {"type": "json_schema", "schema": schema}}
    for model, body in (("far", message(said('{"a": 1}'))), ("chat", chunks({"content": '{"a": 1}'}))):
        other.says(Answer(body))
        assert sdk.messages.create(**asked(model, output_config=form)).content[0].text == '{"a": 1}'
    assert other.body["response_format"]["json_schema"]["schema"] == schema


@pytest.mark.parametrize("model", ["far", "chat"])
@pytest.mark.parametrize(
    ("answers", "status", "kind", "times", "words"),
    [
        ([429], 429, "rate_limit_error", 1, "slow down"),
        ([529, 529, 529], 529, "overloaded_error", 3, "slow down"),
        ([503, 503, 503], 529, "overloaded_error", 3, "slow down"),
        ([500, 502, 500], 502, "api_error", 3, "slow down"),
        ([400], 400, "invalid_request_error", 1, "slow down"),
        ([413], 413, "request_too_large", 1, "slow down"),
        ([504], 504, "timeout_error", 1, "slow down"),
        ([404], 502, "api_error", 1, "slow down"),
        ([401], 502, "api_error", 1, "refuses the key of this server (FAR_KEY)"),
        ([307], 502, "api_error", 1, "which is no answer"),
    ],
)
def test_errors_are_told_in_our_terms(sdk, other, model, answers, status, kind, times, words):
    body = json.dumps({"type": "error", "error": {"type": "x", "message": f"slow down, {KEY}"}}).encode()
    other.says(*(Answer(body, code, {"location": "/v1/elsewhere"}) for code in answers))
    with pytest.raises(anthropic.APIStatusError) as raised:
        sdk.messages.create(**asked(model))
    error = raised.value
    assert (error.status_code, error.type, len(other.asked)) == (status, kind, times)
    assert words in error.message
    assert KEY not in error.message


def test_how_long_to_wait_is_passed_on_and_not_waited_for(sdk, other):
    other.says(Answer(b"", 429, {"retry-after": "17"}))
    with pytest.raises(anthropic.RateLimitError) as raised:
        sdk.messages.create(**asked("chat"))
    assert raised.value.response.headers["retry-after"] == "17"
    other.says(Answer(b"", 529, {"retry-after-ms": "30500"}))
    with pytest.raises(anthropic.APIStatusError) as raised:
        sdk.messages.create(**asked("far"))
    assert (raised.value.response.headers["retry-after"], len(other.asked)) == ("31", 1)
    assert retry_after({"retry-after": "Thu, 01 Jan 1970 00:00:00 GMT"}) == 0
    assert retry_after({"retry-after": "soon"}) is retry_after({}) is None


def test_a_second_try_is_made_before_the_first_byte_only(sdk, other):
    other.says(Answer(b"", 503), Answer(message(said("There."))))
    assert sdk.messages.create(**asked("far")).content[0].text == "There."
    assert len(other.asked) == 2
    broken = message(said("There.")).partition(b"event: message_delta")[0]
    other.says(Answer(broken), Answer(message(said("Again."))))
    with pytest.raises(anthropic.APIStatusError, match="broke off in the middle"):
        sdk.messages.create(**asked("far"))
    assert len(other.asked) == 1


@pytest.mark.parametrize(
    ("model", "body", "kind"),
    [
        ("far", event("error", error={"type": "overloaded_error", "message": "later"}), "overloaded_error"),
        ("far", event("error", error={"type": "api_error", "message": "later"}), "api_error"),
        ("chat", b'data: {"error": {"message": "later", "type": "BadRequestError", "code": 400}}\n\n', "invalid_request_error"),
        ("chat", b'data: {"error": {"message": "later", "code": null}}\n\n', "api_error"),
    ],
)
def test_errors_in_the_middle_of_a_stream(sdk, other, model, body, kind):
    begun = message(said("So")).partition(b"event: message_delta")[0]
    if model == "chat":
        begun = chunks({"content": "So"}).partition(
            b'data: {"id": "c", "object": "chat.completion.chunk", "choices": [{"index": 0, "delta": {},'
        )[0]
    other.says(Answer(begun + body))
    heard = []
    with pytest.raises(anthropic.APIStatusError) as raised, sdk.messages.stream(**asked(model)) as stream:
        heard += list(stream.text_stream)
    assert raised.value.type == kind
    assert "later" in raised.value.message


@pytest.mark.parametrize(
    ("model", "answer", "words"),
    [
        ("far", Answer(b"data: {not json\n\n"), "no JSON object"),
        ("far", Answer(b'data: {"choices": []}\n\n'), "not of its api"),
        ("chat", Answer(b'data: {"choices": [3]}\n\n'), "not of its api"),
        ("chat", Answer(b'{"choices": []}', headers={"content-type": "application/json"}), "does not stream"),
        ("chat", Answer(b"data: [DONE]\n\n"), "broke off"),
        ("far", Answer(b""), "broke off"),
    ],
)
def test_what_is_no_reply_is_an_error_of_the_other_server(sdk, other, model, answer, words):
    other.says(answer)
    with pytest.raises(anthropic.APIStatusError, match=words) as raised:
        sdk.messages.create(**asked(model))
    assert raised.value.status_code == 502


@pytest.mark.parametrize("model", ["far", "chat"])
def test_whoever_leaves_ends_the_reply_there_too(sdk, other, model):
    begun = message(said("So")).partition(b"event: content_block_stop")[0] if model == "far" else chunks({"content": "So"}, {})
    other.says(Answer(begun.partition(b'"delta": {}')[0].rpartition(b"data:")[0] if model == "chat" else begun, endless=True))
    with sdk.messages.create(**asked(model, stream=True)) as stream:
        assert next(iter(stream)).type == "message_start"
        assert not other.left.is_set()
    assert other.left.wait(5)


def test_tokens_are_counted_by_the_other_server_or_not_at_all(sdk, other):
    asking = {key: value for key, value in asked("far", system="Hi").items() if key != "max_tokens"}
    other.says(Answer(b'{"input_tokens": 42}', headers={"content-type": "application/json"}))
    assert sdk.messages.count_tokens(**asking).input_tokens == 42
    assert other.asked[-1][0] == "/v1/messages/count_tokens"
    assert "max_tokens" not in other.body
    other.says(Answer(b'{"detail": "Not Found"}', 404))
    with pytest.raises(
        anthropic.BadRequestError, match="count_tokens: 'far' is answered by another server, and it counts none"
    ):
        sdk.messages.count_tokens(**asking)
    other.says()
    with pytest.raises(anthropic.BadRequestError, match="count_tokens: 'chat' is answered over OpenAI's chat completions"):
        sdk.messages.count_tokens(**asking | {"model": "chat"})


def test_reading_ahead_is_asked_of_messages_alone(sdk, other):
    other.says(Answer(json.dumps({"usage": {"input_tokens": 1, "cache_creation_input_tokens": 9}}).encode()))
    reply = sdk.messages.create(**asked("far", [paper(TEXT)]) | {"max_tokens": 0})
    assert (reply.stop_reason, reply.usage.cache_creation_input_tokens, other.body["max_tokens"]) == ("max_tokens", 9, 0)
    assert other.body["messages"][0]["content"][0]["cache_control"] == {"type": "ephemeral"}
    with pytest.raises(anthropic.BadRequestError, match="reading ahead: 'chat'"):
        sdk.messages.create(**asked("chat") | {"max_tokens": 0})


def test_a_server_that_leaves_documents_out_is_not_asked_to_cite_them(other, tmp_path, tmp_path_factory, monkeypatch):
    monkeypatch.setenv("ROPEWALK_ROOT_KEY_FILE", str(tmp_path_factory.mktemp("keys") / "root.key"))
    models = {"deaf": ServedModel(remote=Remote("anthropic", other.url))}
    with running(tmp_path, Settings(data=tmp_path), ServerSettings(serving=Serving(models))) as found, found.sdk() as sdk:
        for _ in range(2):
            other.says(*(Answer(b'{"input_tokens": 9}') for _ in range(2)))
            with pytest.raises(anthropic.APIStatusError, match="leaves documents out of its prompts") as raised:
                sdk.messages.create(**asked("deaf", [paper(TEXT, citations={"enabled": True})]))
            assert raised.value.status_code == 502
            assert [path for path, _, _ in other.asked] == ["/v1/messages/count_tokens"] * 2
        # Where nothing is counted, the question itself has to tell.
        other.says(Answer(b"{}", 404), Answer(message(said("So"))), Answer(message(said("Again"))))
        assert sdk.messages.create(**asked("deaf", [paper(TEXT, citations={"enabled": True})])).content[0].text == "So"
        assert sdk.messages.create(**asked("deaf", [paper(TEXT, citations={"enabled": True})])).content[0].text == "Again"


@pytest.mark.parametrize(
    ("model", "content", "words"),
    [
        ("chat", [paper(TEXT, citations={"enabled": True})], "citations: 'chat' is answered over OpenAI's chat completions"),
        *(
            (m, [{"type": "image", "source": {"type": "url", "url": "https://x.org/a.png"}}], "image: ")
            for m in ("far", "chat")
        ),
    ],
)
def test_what_cannot_be_passed_on_is_refused_here(sdk, other, model, content, words):
    other.says()
    with pytest.raises(anthropic.BadRequestError, match=words):
        sdk.messages.create(**asked(model, content))
    assert not other.asked


def test_a_reply_cannot_be_begun_over_chat_completions(sdk):
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Well,"}]
    with pytest.raises(anthropic.BadRequestError, match="expected a user message at the end"):
        sdk.messages.create(**asked("chat") | {"messages": turns})


def test_remotes_are_listed(sdk):
    assert {m.id: m.max_input_tokens for m in sdk.models.list()}["far"] == 8192


def test_a_key_that_is_not_there_is_the_operators_fault(sdk, other, monkeypatch):
    monkeypatch.delenv("FAR_KEY")
    with pytest.raises(anthropic.InternalServerError) as raised:
        sdk.messages.create(**asked("far"))
    assert (raised.value.status_code, "FAR_KEY" in raised.value.message) == (500, False)


# -- the connection alone


def asking(address: str, key: str = "", silence: float = 5.0) -> list[bytes]:
    async def whole() -> list[bytes]:
        async with http_client(silence) as http:
            named = Upstream("m", Remote("openai", address, "", key), http)
            async with aclosing(named.stream("chat/completions", {})) as events:
                return [data async for data in events]

    return asyncio.run(whole())


def test_silence_is_not_waited_out(other):
    other.says(Answer(silence=1.0))
    with pytest.raises(UpstreamTimedOut, match="silent for too long"):
        asking(other.url, silence=0.1)
    assert len(other.asked) == 1


def test_nobody_there_is_told_without_the_address(monkeypatch):
    monkeypatch.setattr(upstream, "PAUSE_SECONDS", 0.0)
    with pytest.raises(UpstreamFailed, match="the server behind 'm' cannot be reached") as raised:
        asking("http://127.0.0.1:9")
    assert "127.0.0.1" not in str(raised.value)


def test_keys_stand_in_no_log_and_in_no_error(other, monkeypatch, caplog):
    caplog.set_level(logging.DEBUG)
    monkeypatch.setenv("FAR_KEY", KEY + "\n")
    other.says(Answer(b"data: x\n\n"))
    assert asking(other.url, "FAR_KEY") == [b"x"]
    assert other.asked[-1][1]["authorization"] == f"Bearer {KEY}"
    monkeypatch.setenv("FAR_KEY", "sk\nbroken")
    with pytest.raises(OutputError, match="environment variable FAR_KEY") as raised:
        asking(other.url, "FAR_KEY")
    assert "broken" not in str(raised.value)
    assert KEY not in caplog.text
    assert "broken" not in caplog.text


@pytest.mark.parametrize(
    ("api", "url", "address"),
    [
        ("anthropic", "https://api.anthropic.com", "https://api.anthropic.com/v1/p"),
        ("anthropic", "http://x/anthropic/", "http://x/anthropic/v1/p"),
        ("anthropic", "http://x/v1", "http://x/v1/p"),
        ("openai", "http://x:8000", "http://x:8000/v1/p"),
        ("openai", "http://x/v1beta/openai", "http://x/v1beta/openai/p"),
    ],
)
def test_addresses(api, url, address):
    assert Upstream("m", Remote(api, url), None)._address("p") == address


def test_an_event_has_its_bounds():
    stream = EventStream()
    assert stream.feed(b"data: a\ndata: b\r\n\r\nid: 3\n\ndata:c") == [b"a\nb"]
    assert stream.finish() == [b"c"]
    with pytest.raises(UpstreamFailed, match="longer than"):
        stream.feed(b"x" * (9 << 20))
