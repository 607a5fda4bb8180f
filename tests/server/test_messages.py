"""The Messages API over a real server and a real engine: a tiny base of this machine, asked through the official SDK."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

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
def sdk(asked: Running) -> Any:
    """The version of the API that knows a temperature, so that replies are the same each time."""
    return asked.sdk(default_headers={"anthropic-version": "2023-06-01"})


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
