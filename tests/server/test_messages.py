"""The Messages API over a real server and a real engine: a tiny base of this machine, asked through the official SDK."""

import base64
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from files.papers import pdf
from ropewalk.config.serving import EngineOptions, Serving
from ropewalk.files.settings import Settings
from ropewalk.models.base import make_base
from ropewalk.registry import Registry
from ropewalk.server.settings import ServerSettings
from server.conftest import Running, running


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bases") / "tiny"
    make_base(folder, "qwen3_moe", size="tiny", seed=3)
    return folder


@pytest.fixture(scope="session")
def asked(root_key: None, tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """A server with one base, 'tiny', which the alias 'answers' points at."""
    data = tmp_path_factory.mktemp("messages")
    registry = Registry(data / "registry")
    registry.publish_base("tiny", tiny)
    registry.ship("answers", "tiny")
    serving = Serving(engine=EngineOptions(threads=1))
    with running(data, Settings(data=data), ServerSettings(serving=serving)) as found:
        yield found


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
