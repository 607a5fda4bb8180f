"""The Messages API over a real server and a real engine: a tiny base of this machine, asked through the official SDK."""

import base64
import json
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import anthropic
import httpx
import hypothesis
import pytest
import torch
from hypothesis import strategies as st

from files.papers import pdf
from ropewalk.config.serving import EngineOptions, ServedModel, Serving
from ropewalk.engine import models
from ropewalk.files.settings import Settings
from ropewalk.models.load import load_base
from ropewalk.models.lora import LoraSpec, attach
from ropewalk.server.settings import ServerSettings
from server.conftest import PATIENCE, Running, running, wait_until


@pytest.fixture
def sdk(asked: Running) -> Iterator[Any]:
    """The version of the API that knows a temperature, so that replies are the same each time."""
    with asked.sdk(default_headers={"anthropic-version": "2023-06-01"}) as client:
        yield client


HELLO: dict[str, Any] = {"model": "answers", "max_tokens": 8, "messages": [{"role": "user", "content": "Hello"}]}
HELLO["extra_body"] = {"temperature": 0}


def test_a_text_is_answered(sdk):
    reply = sdk.messages.create(**HELLO)
    assert (reply.role, reply.type, reply.model) == ("assistant", "message", "answers")
    assert reply.content[0].text
    assert reply.stop_reason in ("max_tokens", "end_turn")
    assert 0 < reply.usage.output_tokens <= 8
    assert sdk.messages.count_tokens(model="answers", messages=HELLO["messages"]).input_tokens == total(reply.usage)


def test_the_same_is_streamed(sdk):
    whole = sdk.messages.create(**HELLO)
    with sdk.messages.stream(**HELLO) as stream:
        text = "".join(stream.text_stream)
        final = stream.get_final_message()
    assert text == whole.content[0].text == final.content[0].text
    assert (final.stop_reason, final.usage.output_tokens) == (whole.stop_reason, whole.usage.output_tokens)


def total(usage: Any) -> int:
    return usage.input_tokens + usage.cache_creation_input_tokens + usage.cache_read_input_tokens


BOOK = "The lighthouse of Pellworm was built in 1907. Its light reaches twenty-five sea miles. " * 5


def question(source: dict[str, Any], text: str = "When was it built?", **more: Any) -> dict[str, Any]:
    content = [{"type": "document", "source": source, **more}, {"type": "text", "text": text}]
    return {**HELLO, "messages": [{"role": "user", "content": content}]}


def put(asked: Running, text: str = BOOK, name: str = "book.txt") -> str:
    with asked.sdk() as client:
        return client.files.upload(file=(name, text.encode(), "text/plain")).id


def test_the_second_question_about_a_file_reads_it_from_the_store(asked, sdk):
    source = {"type": "file", "file_id": put(asked, BOOK + "1")}
    first = sdk.messages.create(**question(source)).usage
    second = sdk.messages.create(**question(source, "How far does it reach?")).usage
    assert first.cache_read_input_tokens < 20
    assert second.cache_creation_input_tokens == 0
    assert second.cache_read_input_tokens > 120
    assert second.input_tokens < 40
    for text, usage in (("When was it built?", first), ("How far does it reach?", second)):
        counted = sdk.messages.count_tokens(model="answers", messages=question(source, text)["messages"])
        assert counted.input_tokens == total(usage)


def test_a_file_read_ahead_is_not_read_again(asked, sdk):
    id = put(asked, BOOK + "2")
    with asked.http() as http:
        warmed = http.post(f"/v1/files/{id}/warm", json={"model": "answers"}).json()
    assert warmed["usage"]["cache_creation_input_tokens"] > 120
    usage = sdk.messages.create(**question({"type": "file", "file_id": id})).usage
    assert usage.cache_creation_input_tokens == 0


@pytest.mark.parametrize(
    "source",
    [
        {"type": "text", "media_type": "text/plain", "data": BOOK},
        {"type": "content", "content": BOOK},
        {"type": "content", "content": [{"type": "text", "text": BOOK}]},
    ],
    ids=["text", "content", "blocks"],
)
def test_the_same_text_in_the_request_gives_the_same_reply(asked, sdk, source):
    expected = sdk.messages.create(**question({"type": "file", "file_id": put(asked)}))
    found = sdk.messages.create(**question(source))
    assert found.content[0].text == expected.content[0].text
    assert total(found.usage) == total(expected.usage)


def test_a_pdf_in_the_request_is_read(asked, sdk):
    data = base64.b64encode(pdf("The bridge is 400 metres long.")).decode()
    source = {"type": "base64", "media_type": "application/pdf", "data": data}
    count = sdk.messages.count_tokens(model="answers", messages=question(source)["messages"]).input_tokens
    without = sdk.messages.count_tokens(
        model="answers", messages=question({"type": "text", "media_type": "text/plain", "data": "x"})["messages"]
    )
    assert count > without.input_tokens


# -- what ends a reply


def long(sdk: Any, **more: Any) -> Any:
    return sdk.messages.create(**{**HELLO, "max_tokens": 40, **more})


def test_a_reply_ends_before_a_stop_sequence(sdk):
    text = long(sdk).content[0].text
    stop = text[len(text) // 2 :][:3]
    found = long(sdk, stop_sequences=[stop])
    assert (found.stop_reason, found.stop_sequence) == ("stop_sequence", stop)
    assert found.content[0].text == text[: text.index(stop)]


def test_no_tokens_at_all_read_ahead(asked, sdk):
    source = {"type": "file", "file_id": put(asked, BOOK + "0")}
    nothing = sdk.messages.create(**{**question(source), "max_tokens": 0})
    assert (nothing.content, nothing.stop_reason, nothing.usage.output_tokens) == ([], "max_tokens", 0)
    assert sdk.messages.create(**question(source)).usage.cache_creation_input_tokens == 0


def test_a_prompt_without_room_is_told_with_its_length(sdk):
    with pytest.raises(anthropic.BadRequestError, match=r"prompt is too long: [0-9,]+ tokens > 511 maximum"):
        sdk.messages.create(**question({"type": "text", "media_type": "text/plain", "data": BOOK * 3}))


def test_a_reply_that_meets_the_end_of_the_context_says_so(sdk):
    reply = sdk.messages.create(**{**question({"type": "text", "media_type": "text/plain", "data": BOOK}), "max_tokens": 5000})
    assert reply.stop_reason in ("model_context_window_exceeded", "end_turn")


# -- who is asked


def test_an_unknown_model_is_not_found(sdk):
    for ask in (sdk.messages.create, sdk.messages.stream):
        with pytest.raises(anthropic.NotFoundError, match="model: none"), ask(**{**HELLO, "model": "none"}):
            pass


def test_an_alias_is_followed_when_it_is_shipped_anew(asked, sdk, tiny, tmp_path):
    registry = asked.app.state.registry
    registry.publish_adapter("house", adapter(tiny, tmp_path / "house", 1), "tiny")
    registry.ship("moving", "tiny")
    base = sdk.messages.create(**{**HELLO, "model": "moving"}).content[0].text
    registry.ship("moving", "house")
    adapted = sdk.messages.create(**{**HELLO, "model": "moving"}).content[0].text
    assert adapted == sdk.messages.create(**{**HELLO, "model": "house"}).content[0].text != base
    adapter(tiny, tmp_path / "house", 2)  # trained anew, in the same folder
    assert sdk.messages.create(**{**HELLO, "model": "moving"}).content[0].text not in (base, adapted)
    registry.rollback("moving")
    assert sdk.messages.create(**{**HELLO, "model": "moving"}).content[0].text == base


def test_a_model_whose_folder_is_gone_is_told(asked, sdk, tiny, tmp_path):
    asked.app.state.registry.publish_adapter("gone", adapter(tiny, tmp_path / "gone", 1), "tiny")
    shutil.rmtree(tmp_path / "gone")
    with pytest.raises(anthropic.BadRequestError, match="there is no folder"):
        sdk.messages.create(**{**HELLO, "model": "gone"})


def test_thinking_comes_back_only_as_it_was_signed(sdk):
    thought = {"type": "thinking", "thinking": "hm", "signature": "mine"}
    turns = [*HELLO["messages"], {"role": "assistant", "content": [thought, {"type": "text", "text": "a"}]}, *HELLO["messages"]]
    with pytest.raises(anthropic.BadRequestError, match="Invalid `signature` in `thinking` block"):
        sdk.messages.create(**{**HELLO, "messages": turns})


# -- files come and go


def test_another_workspace_finds_neither_the_file_nor_what_was_read(asked, sdk):
    source = {"type": "file", "file_id": put(asked, BOOK + "3")}
    sdk.messages.create(**question(source))
    _, key = asked.workspace("elsewhere")
    with asked.sdk(key) as other:
        with pytest.raises(anthropic.NotFoundError, match="not found"):
            other.messages.create(**{**question(source), "extra_body": {}})
        text = {"type": "text", "media_type": "text/plain", "data": BOOK + "3"}
        assert other.messages.create(**{**question(text), "extra_body": {}}).usage.cache_read_input_tokens == 0


def test_a_deleted_file_is_forgotten_by_the_engine_too(asked, sdk):
    id = put(asked, BOOK + "4")
    sdk.messages.create(**question({"type": "file", "file_id": id}))
    asked.run(asked.app.state.models.flush())
    folder = asked.data / "prefixes"
    kept = {path for path in folder.rglob("*") if path.is_file()}
    used = stats(asked)["memory_used"]
    sdk.files.delete(id)
    assert stats(asked)["memory_used"] < used
    assert len({path for path in folder.rglob("*") if path.is_file()}) < len(kept)
    with pytest.raises(anthropic.NotFoundError):
        sdk.messages.create(**question({"type": "file", "file_id": id}))


# -- clients that leave, and crowds


def test_who_leaves_costs_the_engine_nothing_more(asked):
    many = {**HELLO, "max_tokens": 400, "stop_sequences": ["\x00never"]}
    body = {key: value for key, value in many.items() if key != "extra_body"}
    with asked.http() as http:
        with http.stream("POST", "/v1/messages", json={**body, "stream": True}) as response:
            next(response.iter_lines())
        with pytest.raises(httpx.ReadTimeout):
            http.post("/v1/messages", json=body, timeout=0.05)
    wait_until(lambda: stats(asked)["requests"] == 0)


def test_a_stream_has_its_events_in_order_and_a_ping(asked):
    body = {key: value for key, value in HELLO.items() if key != "extra_body"}
    with asked.http() as http:
        response = http.post("/v1/messages", json={**body, "stream": True})
    assert response.headers["content-type"].startswith("text/event-stream")
    assert response.headers["request-id"].startswith("req_")
    names = [line[7:] for line in response.text.split("\n") if line.startswith("event: ")]
    assert names[:3] == ["message_start", "ping", "content_block_start"]
    assert names[-3:] == ["content_block_stop", "message_delta", "message_stop"]
    assert set(names[3:-3]) == {"content_block_delta"}


def stats(asked: Running) -> dict[str, Any]:
    found: dict[str, Any]
    engines = asked.run(asked.app.state.models.stats())
    [found] = [told for folder, told in engines.items() if Path(folder).name == "tiny"]
    return found


def adapter(base: Path, folder: Path, seed: int) -> Path:
    """A folder with an adapter that changes what the base says."""
    made = attach(load_base(base, dtype=torch.float32), LoraSpec(r=4, alpha=64.0), seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    made.save(folder)
    return folder


# -- over the life of a server


def test_a_file_is_read_as_it_is_uploaded_and_still_known_after_a_restart(root_key, tiny, tmp_path, monkeypatch):
    def begin(**options: Any) -> Any:
        serving = Serving(
            {"small": ServedModel(base=str(tiny))},
            EngineOptions(threads=1, running=1, waiting=2, **options),
            warm_at_upload=("small",),
        )
        return running(tmp_path, Settings(data=tmp_path), ServerSettings(serving=serving))

    monkeypatch.setattr(models, "START_SECONDS", 0.01)
    monkeypatch.setattr(models, "RETRY_SECONDS", 0.5)
    monkeypatch.setattr(models, "AHEAD_TRIES", 2 * PATIENCE)
    with begin() as server:
        id = put(server)
        asked = {**question({"type": "file", "file_id": id}), "model": "small"}
        body = {key: value for key, value in asked.items() if key != "extra_body"}
        with server.http() as http:
            loading = http.post("/v1/messages", json=body)
            assert (loading.status_code, loading.json()["error"]["type"]) == (529, "overloaded_error")
            assert loading.headers["retry-after"] == "1"
            assert [model["id"] for model in http.get("/v1/models").json()["data"]] == ["small"]
        wait_until(lambda: stats(server).get("prefixes", {}).get("written"))
        with server.sdk() as sdk:
            assert sdk.messages.create(**{**asked, "extra_body": {}}).usage.cache_creation_input_tokens == 0
        crowd = {**body, "messages": HELLO["messages"], "max_tokens": 120, "stop_sequences": ["\x00never"]}
        with ThreadPoolExecutor(8) as threads, server.http() as http:
            answers = list(threads.map(lambda _: http.post("/v1/messages", json=crowd), range(8)))
        assert {answer.status_code for answer in answers} == {200, 529}
        assert all(answer.headers["retry-after"] == "1" for answer in answers if answer.status_code == 529)
        server.run(server.app.state.models.flush())
    monkeypatch.setattr(models, "START_SECONDS", PATIENCE)
    with begin() as server, server.sdk() as sdk:
        usage = sdk.messages.create(**{**asked, "extra_body": {}}).usage
        assert (usage.cache_creation_input_tokens, usage.cache_read_input_tokens > 100) == (0, True)
        assert stats(server)["prefixes"]["disk_hits"] > 0


# -- files beyond the context


def long_file(asked: Running) -> str:
    chapters = [f"# Chapter {n}\n\n" + f"Here is talk of weather, and of day {n} at sea. " * 40 for n in range(1, 21)]
    chapters.insert(13, "# The keeper\n\nThe keeper of the lighthouse of Pellworm was called Ingwersen. ")
    return put(asked, "\n".join(chapters), "long.md")


def test_of_a_file_beyond_the_context_the_chunks_are_shown_that_the_question_leads_to(asked, sdk):
    id = long_file(asked)
    sent = question(
        {"type": "file", "file_id": id}, "What was the keeper of the lighthouse called?", citations={"enabled": True}
    )
    raw = sdk.messages.with_raw_response.create(**sent, extra_headers={"x-ropewalk-extensions": "true"})
    told, usage = raw.headers["x-ropewalk-retrieval"], raw.parse().usage
    shown, chunks = told.removeprefix(f"{id}=").removesuffix(" chunks").split("/")
    assert 0 < int(shown) < int(chunks)
    assert usage.model_extra["retrieval"] == [{"file_id": id, "shown_chunks": int(shown), "chunks": int(chunks)}]
    assert total(usage) <= 512 - 512 // 4
    assert sdk.messages.count_tokens(model="answers", messages=sent["messages"]).input_tokens == total(usage)
    with sdk.messages.with_streaming_response.create(**sent, stream=True) as streamed:
        assert streamed.headers["x-ropewalk-retrieval"] == told
    assert "x-ropewalk-retrieval" not in sdk.messages.with_raw_response.create(**HELLO).headers


# -- tools

WEATHER = {
    "name": "weather",
    "description": "The weather.",
    "input_schema": {
        "type": "object",
        "properties": {"days": {"type": "integer", "minimum": 1, "maximum": 9}},
        "required": ["days"],
        "additionalProperties": False,
    },
}
CALLING: dict[str, Any] = {
    **HELLO,
    "max_tokens": 100,
    "tools": [WEATHER],
    "tool_choice": {"type": "any", "disable_parallel_tool_use": True},
}


def test_a_tool_that_must_be_called_is_called_and_its_answer_is_taken(sdk):
    reply = sdk.messages.create(**CALLING)
    [call] = reply.content
    assert (call.type, call.name, reply.stop_reason) == ("tool_use", "weather", "tool_use")
    assert call.id.startswith("toolu_")
    assert 1 <= call.input["days"] <= 9
    with sdk.messages.stream(**CALLING) as stream:
        final = stream.get_final_message()
    assert (final.content[0].input, final.stop_reason) == (call.input, "tool_use")
    answer = {"type": "tool_result", "tool_use_id": call.id, "content": "Rain"}
    said = [*HELLO["messages"], {"role": "assistant", "content": reply.content}, {"role": "user", "content": [answer]}]
    after = sdk.messages.create(**{**HELLO, "messages": said, "tools": [WEATHER], "tool_choice": {"type": "none"}})
    assert after.content[0].type == "text"


def test_a_schema_that_cannot_be_kept_is_refused(sdk):
    schema = {"type": "object", "properties": {"a": {"not": {"type": "string"}}}}
    with pytest.raises(anthropic.BadRequestError, match=r"output_config\.format\.schema\.properties\.a: "):
        sdk.messages.create(**HELLO, output_config={"format": {"type": "json_schema", "schema": schema}})


# -- usage

WORDS = st.text(st.characters(codec="utf-8", exclude_characters="\x00"), min_size=1, max_size=40)
PARTS = st.one_of(
    WORDS.map(lambda text: {"type": "text", "text": text}),
    WORDS.filter(str.strip).map(
        lambda text: {"type": "document", "source": {"type": "content", "content": text}, "title": "T"}
    ),
    st.just({"type": "document", "source": {"type": "file", "file_id": "here"}}),
)
TURNS = st.lists(st.tuples(st.lists(PARTS, min_size=1, max_size=3), WORDS.filter(str.strip)), min_size=1, max_size=3)


def test_the_three_kinds_of_input_tokens_are_the_rendered_prompt(asked, sdk):
    file_id = put(asked, "A short file. " * 4)

    @hypothesis.settings(max_examples=15, deadline=None)
    @hypothesis.given(TURNS, st.none() | WORDS)
    def holds(turns: Any, system: str | None) -> None:
        messages: list[dict[str, Any]] = []
        for blocks, reply in turns:
            messages += [{"role": "user", "content": blocks}, {"role": "assistant", "content": reply.strip()}]
        body = {"model": "answers", "messages": messages[:-1]} | ({"system": system} if system else {})
        body = json.loads(json.dumps(body).replace('"here"', json.dumps(file_id)))
        counted = sdk.messages.count_tokens(**body).input_tokens
        first = sdk.messages.create(**body, max_tokens=1).usage
        again = sdk.messages.create(**body, max_tokens=1).usage
        assert total(first) == total(again) == counted
        assert again.cache_creation_input_tokens == 0
        assert again.cache_read_input_tokens == first.cache_read_input_tokens + first.cache_creation_input_tokens

    holds()
