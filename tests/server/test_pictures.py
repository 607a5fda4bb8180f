"""Pictures over a real server and real engines: tiny models that see, asked through the official SDK."""

import base64
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import anthropic
import numpy as np
import openai
import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText

from engine.seeing import make
from files import papers
from ropewalk.chat.template import Template
from ropewalk.config.run import parse_run
from ropewalk.config.serving import EngineOptions, Serving
from ropewalk.files.fetch import Fetched
from ropewalk.files.settings import Settings
from ropewalk.models.base import make_base
from ropewalk.models.seeing import load_processor
from ropewalk.registry import Registry
from ropewalk.server.settings import ServerSettings
from ropewalk.train.trainer import train
from server.conftest import Running, running

WORDS = 8
LEARNS = """\
base_model: {base}
processor_type: AutoProcessor
datasets: [{{path: {folder}/rows.jsonl, type: chat_template}}]
dataset_prepared_path: {folder}/prepared
output_dir: {folder}/run
adapter: lora
lora_r: 8
sequence_len: 128
micro_batch_size: 3
max_steps: 12
learning_rate: 5e-3
lr_scheduler: constant
num_threads: 1
float32: true
"""


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    blind = tmp_path_factory.mktemp("blind") / "base"
    make_base(blind, "qwen3_moe", size="tiny", seed=3)
    seeing = {name: make(name, tmp_path_factory.mktemp(name), sharp) for name, sharp in (("qwen3_5_moe", 6.0), ("gemma4", 1.0))}
    return seeing | {"blind": blind}


@pytest.fixture(scope="module")
def asked(root_key: None, bases: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    data = tmp_path_factory.mktemp("pictures")
    registry = Registry(data / "registry")
    for name, folder in bases.items():
        registry.publish_base(name, folder)
    serving = Serving(engine=EngineOptions(threads=1))
    with running(data, Settings(data=data), ServerSettings(serving=serving)) as found:
        yield found


@pytest.fixture
def sdk(asked: Running) -> Iterator[Any]:
    with asked.sdk(default_headers={"anthropic-version": "2023-06-01"}, timeout=120) as client:
        yield client


def noise(number: int = 0, size: tuple[int, int] = (40, 28)) -> Image.Image:
    return Image.fromarray(np.random.default_rng(number).integers(0, 256, (size[1], size[0], 3), np.uint8))


def png(image: Image.Image) -> bytes:
    out = io.BytesIO()
    image.save(out, "PNG")
    return out.getvalue()


def sent(data: bytes, media_type: str = "image/png") -> dict[str, Any]:
    return {"type": "base64", "media_type": media_type, "data": base64.b64encode(data).decode()}


def request(*content: Any, model: str = "qwen3_5_moe", **more: Any) -> dict[str, Any]:
    blocks = [{"type": "text", "text": part} if isinstance(part, str) else part for part in content]
    asked = {"model": model, "max_tokens": WORDS, "messages": [{"role": "user", "content": blocks}]}
    return asked | {"extra_body": {"temperature": 0}} | more


def shown(source: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {"type": "image", "source": source, **more}


def total(usage: Any) -> int:
    return usage.input_tokens + usage.cache_creation_input_tokens + usage.cache_read_input_tokens


def upload(asked: Running, data: bytes, name: str = "noise.png", media_type: str = "image/png") -> str:
    with asked.sdk() as client:
        return client.files.upload(file=(name, data, media_type)).id


def generated(folder: Path, content: list[Any]) -> tuple[str, int]:
    """What the whole model says by itself, and how many ids its prompt has."""
    model, processor = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval(), load_processor(folder)
    template = Template.load(folder)
    parts = [{"type": "text", "text": part} if isinstance(part, str) else {"type": "image"} for part in content]
    text = template.render_text([{"role": "user", "content": parts}], add_generation_prompt=True)
    images = [part for part in content if not isinstance(part, str)]
    inputs = processor(text=[text], images=[images], add_special_tokens=False, return_tensors="pt")
    with torch.inference_mode():
        out = model.generate(**inputs, max_new_tokens=WORDS, do_sample=False, eos_token_id=list(template.stop_ids))
    count = inputs["input_ids"].shape[1]
    return template.decode([id for id in out[0, count:].tolist() if id not in template.stop_ids], False), count


@pytest.mark.parametrize("model", ["qwen3_5_moe", "gemma4"])
def test_a_question_about_pictures_is_answered_as_by_the_whole_model(sdk, bases, model):
    content = [noise(1), "A picture, and another:", noise(2, (24, 60)), "Which is the brighter one?"]
    expected, count = generated(bases[model], content)
    blocks = [part if isinstance(part, str) else shown(sent(png(part))) for part in content]
    reply = sdk.messages.create(**request(*blocks, model=model))
    assert reply.content[0].text == expected
    assert total(reply.usage) == count
    counted = sdk.messages.count_tokens(model=model, messages=request(*blocks)["messages"])
    assert counted.input_tokens == count


def test_an_adapter_that_learnt_colours_from_pictures_names_them(asked, sdk, bases, tmp_path):
    colours = {"red": (220, 20, 20), "green": (20, 180, 40), "blue": (30, 40, 220)}
    pictures = {name: png(Image.new("RGB", (40, 28), value)) for name, value in colours.items()}
    rows = [
        {
            "messages": [
                {"role": "user", "content": [shown(sent(data)), {"type": "text", "text": "Which colour?"}]},
                {"role": "assistant", "content": name},
            ]
        }
        for name, data in pictures.items()
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    run = parse_run(LEARNS.format(base=bases["qwen3_5_moe"], folder=tmp_path))
    result = train(run, quiet=True)
    assert result.first_loss > 4
    assert result.last_loss < 0.1
    Registry(asked.data / "registry").publish_adapter("painter", result.adapter, "qwen3_5_moe")
    said = {
        name: sdk.messages.create(**request(shown(sent(data)), "Which colour?", model="painter")).content[0].text
        for name, data in pictures.items()
    }
    assert said == {name: name for name in colours}


def test_a_second_question_reads_the_picture_from_the_store(asked, sdk):
    data = png(noise(3, (100, 100)))
    source = {"type": "file", "file_id": upload(asked, data)}
    first = sdk.messages.create(**request(shown(source), "What is it?")).usage
    second = sdk.messages.create(**request(shown(source), "How bright is it, then?")).usage
    assert first.cache_creation_input_tokens >= 64  # ids of a picture of 100 by 100
    assert (second.cache_creation_input_tokens, second.cache_read_input_tokens) == (
        0,
        first.cache_creation_input_tokens + first.cache_read_input_tokens,
    )
    by_file = sdk.messages.create(**request(shown(source), "And?"))
    by_bytes = sdk.messages.create(**request(shown(sent(data)), "And?"))
    assert by_file.content == by_bytes.content


def test_what_was_read_of_a_picture_dies_with_its_file(asked, sdk):
    id = upload(asked, png(noise(4, (72, 72))))
    before = kept(asked)
    question = request(shown({"type": "file", "file_id": id}), "What is it?")
    sdk.messages.create(**question)
    asked.run(asked.app.state.models.flush())
    assert len(kept(asked) - before) >= 1
    with asked.sdk() as client:
        client.files.delete(id)
    assert not {path for path in kept(asked) - before if path.stat().st_size > 20_000}
    with pytest.raises(anthropic.NotFoundError):
        sdk.messages.create(**question)
    again = upload(asked, png(noise(4, (72, 72))))
    usage = sdk.messages.create(**request(shown({"type": "file", "file_id": again}), "What is it?")).usage
    assert usage.cache_creation_input_tokens >= 36


def kept(asked: Running) -> set[Path]:
    return {path for path in (asked.data / "prefixes").rglob("*") if path.is_file()}


def test_workspaces_share_no_picture(asked, sdk):
    data = png(noise(5))
    sdk.messages.create(**request(shown(sent(data)), "What is it?"))
    _, key = asked.workspace("others")
    with asked.sdk(key, default_headers={"anthropic-version": "2023-06-01"}) as client:
        usage = client.messages.create(**request(shown(sent(data)), "What is it?")).usage
    assert usage.cache_read_input_tokens == 0


def test_a_picture_at_an_address_is_fetched(asked, sdk, monkeypatch):
    data = png(noise(6))

    async def fetch(url: str) -> Fetched:
        assert url == "https://example.org/a.png"
        return Fetched(data, "image/png", "a.png")

    monkeypatch.setattr(asked.app.state.models._sources.pictures, "_fetch", fetch)
    there = sdk.messages.create(**request(shown({"type": "url", "url": "https://example.org/a.png"}), "?"))
    assert there.content == sdk.messages.create(**request(shown(sent(data)), "?")).content


def test_an_address_of_this_machine_is_not_fetched(sdk):
    with pytest.raises(anthropic.BadRequestError, match="not on the public internet"):
        sdk.messages.create(**request(shown({"type": "url", "url": "http://127.0.0.1/a.png"}), "?"))


@pytest.mark.parametrize("model", ["qwen3_5_moe", "gemma4"])
def test_what_a_tool_answers_may_be_a_picture(sdk, model):
    tools = [{"name": "look", "description": "Look.", "input_schema": {"type": "object", "properties": {}}}]

    def conversation(number: int) -> dict[str, Any]:
        call = {"type": "tool_use", "id": "toolu_1", "name": "look", "input": {}}
        result = [{"type": "text", "text": "Here:"}, shown(sent(png(noise(number))))]
        return request(model=model, tools=tools) | {
            "messages": [
                {"role": "user", "content": "Look!"},
                {"role": "assistant", "content": [call]},
                {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "toolu_1", "content": result}]},
            ]
        }

    one, other = (sdk.messages.create(**conversation(number)) for number in (7, 8))
    assert total(one.usage) == total(other.usage)
    counted = sdk.messages.count_tokens(model=model, tools=tools, messages=conversation(7)["messages"])
    assert counted.input_tokens == total(one.usage)
    without = conversation(7)
    without["messages"][2]["content"][0]["content"].pop()
    fewer = sdk.messages.count_tokens(model=model, tools=tools, messages=without["messages"]).input_tokens
    assert total(one.usage) - fewer >= 20  # ids of a picture of 40 by 28


def test_a_picture_that_is_too_large_is_scaled_down_or_refused_as_asked(sdk):
    large = sent(png(Image.new("RGB", (4096, 2048), "red")))
    counted = sdk.messages.count_tokens(model="qwen3_5_moe", messages=request(shown(large))["messages"])
    assert counted.input_tokens < 100
    with pytest.raises(anthropic.BadRequestError, match="4,096 by 2,048"):
        sdk.messages.create(**request(shown(large, transformations={"oversized_image": "error"}), "?"))


def broken() -> bytes:
    return png(noise(9))[:200]


UNSEEN = {
    "damaged": (lambda: [shown(sent(broken()))], "damaged"),
    "no picture": (lambda: [shown(sent(b"Hello, there"))], "image"),
    "another type": (lambda: [shown(sent(png(noise(9)), "image/jpeg"))], "media_type says image/jpeg"),
    "a terapixel": (lambda: [shown(sent(papers.claimed_png(1_000_000, 1_000_000)))], "at most 8,000"),
    "a line": (lambda: [shown(sent(png(noise(9, (1000, 1)))))], "1000 by 1"),
    "many bytes": (lambda: [shown(sent(b"\x89PNG\r\n\x1a\n" + bytes(10_000_000)))], "10,000,000"),
    "101 pictures": (lambda: [shown(sent(png(noise(9))))] * 101, "100"),
    "21 pictures, one of them large": (
        lambda: [shown(sent(png(noise(9))))] * 20 + [shown(sent(png(Image.new("RGB", (2001, 10)))))],
        "2,001 by 10",
    ),
}


@pytest.mark.parametrize("kind", UNSEEN)
def test_what_cannot_be_seen_is_refused_in_words(sdk, kind):
    content, words = UNSEEN[kind]
    with pytest.raises(anthropic.BadRequestError, match=words):
        sdk.messages.create(**request(*content(), "What is it?"))


def test_a_file_that_is_no_picture_is_refused(asked, sdk):
    id = upload(asked, b"Only words.", "words.txt", "text/plain")
    with pytest.raises(anthropic.BadRequestError, match="no picture"):
        sdk.messages.create(**request(shown({"type": "file", "file_id": id}), "What is it?"))


def test_a_picture_in_a_turn_of_the_assistant_is_refused(sdk):
    picture = shown(sent(png(noise(9))))
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": [picture]}, {"role": "user", "content": "?"}]
    with pytest.raises(anthropic.BadRequestError, match="of the user"):
        sdk.messages.create(**request() | {"messages": turns})


def test_text_that_looks_like_a_picture_stays_text(sdk):
    said = request("<|vision_start|><|image_pad|><|vision_end|>", shown(sent(png(noise(9)))))
    assert sdk.messages.create(**said).content


def test_models_say_whether_they_see(asked):
    with asked.sdk(_strict_response_validation=True) as client:
        model = client.models.retrieve("gemma4")
    assert model.capabilities.image_input.supported
    assert not model.capabilities.thinking.types.enabled.supported
    assert model.capabilities.structured_outputs.supported


def test_a_picture_is_looked_at_ahead_of_its_first_question(asked, sdk):
    id = upload(asked, png(noise(10, (80, 80))))
    with asked.http() as http:
        warmed = http.post(f"/v1/files/{id}/warm", json={"model": "qwen3_5_moe"}).json()
    assert warmed["usage"]["cache_creation_input_tokens"] >= 64
    usage = sdk.messages.create(**request(shown({"type": "file", "file_id": id}), "What is it?")).usage
    assert usage.cache_creation_input_tokens == 0


def test_a_model_that_sees_nothing_says_so(asked, sdk):
    question = request(shown(sent(png(noise(9)))), "What is it?", model="blind")
    for ask in (
        lambda: sdk.messages.create(**question),
        lambda: sdk.messages.count_tokens(model="blind", messages=question["messages"]),
    ):
        with pytest.raises(anthropic.BadRequestError, match="this model reads no images"):
            ask()
    with asked.sdk() as client:
        assert not client.models.retrieve("blind").capabilities.image_input.supported


def test_pictures_are_seen_in_openais_shapes_as_data_urls_and_as_files(asked, sdk):
    picture = png(noise(1))
    expected = sdk.messages.create(**request(shown(sent(picture)), "What is it?")).content[0].text
    url = {"type": "image_url", "image_url": {"url": "data:image/png;base64," + base64.b64encode(picture).decode()}}
    file = {"type": "file", "file": {"file_id": upload(asked, picture)}}
    with openai.OpenAI(base_url=f"{asked.url}/openai/v1", api_key=asked.key, max_retries=0) as client:
        for part in (url, file):
            messages = [{"role": "user", "content": [part, {"type": "text", "text": "What is it?"}]}]
            reply = client.chat.completions.create(model="qwen3_5_moe", messages=messages, max_tokens=WORDS, temperature=0)
            assert reply.choices[0].message.content == expected
