"""`ropewalk serve --engine vllm`: the whole API over a vLLM server, which is a fake with the same answers (train/vllm_fake.py)."""

import argparse
import json
import re
import threading
from contextlib import contextmanager
from types import SimpleNamespace

import anthropic
import openai
import pytest
import torch

from ropewalk.chat.template import Template
from ropewalk.cli import parser
from ropewalk.config.serving import Serving, Vllm, read_serving
from ropewalk.engine.request import Grammar, Request, Sampling, Span
from ropewalk.errors import BadInput, ConfigError
from ropewalk.models.load import load_base
from ropewalk.models.lora import LoraSpec, attach
from ropewalk.server import verbs
from ropewalk.server.settings import ServerSettings
from server.conftest import running, wait_until
from train.vllm_fake import FakeVllm

END = 2  # <|im_end|>, the end of a turn and the tokenizer's own
HELLO = {"max_tokens": 8, "messages": [{"role": "user", "content": "Hello"}], "extra_body": {"temperature": 0}}
LEASE = "The lease of the lighthouse runs until May 1907. It costs nine shillings a year, and the keeper pays for the oil. " * 3


@contextmanager
def vllm(base, **options):
    with FakeVllm(base, **{"max_model_len": 4096} | options) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        thread.start()
        try:
            yield server
        finally:
            server.held.set()
            server.shutdown()
            thread.join()


def adapter(tiny, folder, seed, **spec):
    """An adapter of experts too, which says something else than its base."""
    made = attach(load_base(tiny, dtype=torch.float32, device="cpu"), LoraSpec(**{"r": 2, "alpha": 64.0} | spec), seed)
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, parameter in made.named_parameters().items():
            if name.endswith("lora_B"):
                parameter.normal_(std=0.3)
    made.save(folder)
    return folder


@pytest.fixture(scope="module")
def house(root_key, tiny, tmp_path_factory):
    """A server of ours before a vLLM server that wants a key, with a base and two adapters over it."""
    folder = tmp_path_factory.mktemp("elsewhere")
    with pytest.MonkeyPatch.context() as patch, vllm(tiny, key="open sesame") as there:
        patch.setenv("VLLM_API_KEY", "open sesame")
        serving = Serving(vllm=Vllm(there.url, base="tiny", adapters=str(folder / "shared")))
        with running(folder / "data", settings=ServerSettings(serving=serving, jobs_at_once=0)) as server:
            registry = server.app.state.registry
            registry.publish_base("tiny", tiny)
            for name, seed in (("first", 5), ("second", 6)):
                registry.publish_adapter(name, adapter(tiny, folder / name, seed), "tiny")
            yield SimpleNamespace(server=server, there=there, registry=registry, folder=folder, tiny=tiny)


@pytest.fixture
def sdk(house):
    house.there.begin_anew()
    house.there.asked.clear()
    with house.server.sdk(default_headers={"anthropic-version": "2023-06-01"}) as client:
        yield client


def completions(house):
    return [body for path, body in house.there.asked if path == "/v1/completions"]


def adapters_told(house):
    return [
        (path.split("/")[-1].split("_")[0], body["lora_name"]) for path, body in house.there.asked if "lora_adapter" in path
    ]


def total(usage):
    return usage.input_tokens + usage.cache_creation_input_tokens + usage.cache_read_input_tokens


def test_a_reply_is_written_there_from_our_own_prompt(house, sdk):
    reply = sdk.messages.create(model="tiny", **HELLO)
    [asked] = completions(house)
    template = Template.load(house.tiny)
    rendered = template.render([{"role": "user", "content": "Hello"}], add_generation_prompt=True)
    assert asked["prompt"] == rendered.ids
    assert reply.usage.output_tokens == 8
    assert (
        total(reply.usage)
        == len(asked["prompt"])
        == sdk.messages.count_tokens(model="tiny", messages=HELLO["messages"]).input_tokens
    )
    with sdk.messages.stream(model="tiny", **HELLO) as stream:
        assert "".join(stream.text_stream) == reply.content[0].text
    assert {one.id for one in sdk.models.list()} >= {"second", "first", "tiny"}
    assert sdk.models.retrieve("tiny").max_input_tokens == 4096


def test_what_was_read_of_a_file_is_found_again_by_its_workspace_alone(house, sdk):
    def about(client):
        file = client.beta.files.upload(file=("lease.txt", LEASE.encode(), "text/plain"))
        source = {"type": "document", "source": {"type": "file", "file_id": file.id}, "citations": {"enabled": True}}
        asks = [
            {"role": "user", "content": [source, {"type": "text", "text": question}]}
            for question in ("Until when?", "How much?")
        ]
        return [client.beta.messages.create(model="tiny", max_tokens=4, messages=[one], betas=[]).usage for one in asks]

    first, second = about(sdk)
    assert (first.cache_read_input_tokens, second.cache_creation_input_tokens) == (0, 0)
    assert second.cache_read_input_tokens > len(LEASE) // 8
    assert second.input_tokens + second.cache_read_input_tokens == len(completions(house)[1]["prompt"])
    _, key = house.server.workspace("another")
    with house.server.sdk(key) as other:
        assert next(one.cache_read_input_tokens for one in about(other)) == 0
    salts = [body["cache_salt"] for body in completions(house)]
    assert salts[0] == salts[1] != salts[2] == salts[3]


def test_a_file_is_read_ahead(house, sdk):
    file = sdk.beta.files.upload(file=("oil.txt", LEASE.upper().encode(), "text/plain"))
    block = {"type": "document", "source": {"type": "file", "file_id": file.id}}
    turn = lambda *blocks: [{"role": "user", "content": [block, *blocks]}]
    sdk.beta.messages.create(model="tiny", max_tokens=0, messages=turn())
    reply = sdk.beta.messages.create(model="tiny", max_tokens=2, messages=turn({"type": "text", "text": "Why?"}))
    assert reply.usage.cache_read_input_tokens > len(LEASE) // 8
    assert [body["max_tokens"] for body in completions(house)] == [1, 2]


def test_a_form_is_kept_to_there(house, sdk):
    schema = {"type": "object", "properties": {"ok": {"type": "boolean"}}, "required": ["ok"], "additionalProperties": False}
    format = {"type": "json_schema", "schema": schema}
    reply = sdk.messages.create(
        model="tiny", **{**HELLO, "max_tokens": 40, "extra_body": {"output_config": {"format": format}}}
    )
    assert set(json.loads(reply.content[0].text)) == {"ok"}
    assert "json" in completions(house)[0]["structured_outputs"]
    house.there.guidance = False
    try:
        with pytest.raises(anthropic.BadRequestError, match=r"structured-outputs-config\.backend guidance"):
            sdk.messages.create(model="tiny", **{**HELLO, "extra_body": {"output_config": {"format": format}}})
    finally:
        house.there.guidance = True


@pytest.mark.parametrize("again", [True, False])
def test_a_form_that_begins_within_a_reply_is_another_completion_from_there(house, sdk, again):
    sdk.messages.create(model="tiny", **HELLO)
    (base,) = house.server.app.state.models._bases.values()
    word, opener = base.template.encode("Well ")[0], base.template.tokenizer.token_to_id("<|reserved_17|>")
    grammar = Grammar("lark", 'start: "[" /[0-9]{2}/ "]"', (opener,), again=again)
    asked = Request("r", (Span(tuple(base.template.encode("Hello"))),), (word,), 12, None, Sampling(0.0), (END,), grammar)
    house.there.says, house.there.asked[:] = [word, opener], []

    async def written():
        return [event async for event in base.client.generate(asked)]

    events = house.server.run(written())
    ids = [id for event in events for id in event.ids]
    free, held, *rest = completions(house)
    assert (ids[:2], held["prompt"]) == ([word, opener], [*free["prompt"], word, opener])
    assert (free["stop_token_ids"], free["ignore_eos"], "structured_outputs" in free) == ([END, opener], True, False)
    assert (held["stop_token_ids"], held["ignore_eos"], held["max_tokens"]) == ([END], False, 10)
    text = base.template.decode(ids[2:], skip_special_tokens=False)
    assert re.match(r"\[\d\d\]", text)
    if again:
        assert END not in ids[:-1]  # the end of the form is none of the reply
        assert (len(rest), rest[0]["stop_token_ids"], len(ids)) == (1, [END, opener], 12)
        assert rest[0]["prompt"] == [*held["prompt"], *ids[2 : len(rest[0]["prompt"]) - len(free["prompt"])]]
    else:
        assert (rest, events[-1].finish, text[4:]) == ([], "stop", "<|im_end|>")
    assert next(event.read for event in events) is not None
    assert [event.finish for event in events[:-1]] == [""] * (len(events) - 1)


def test_openais_clients_are_given_ids_and_log_probabilities_of_several_replies(house, sdk):
    key = house.server.key
    with openai.OpenAI(base_url=house.server.url + "/openai/v1", api_key=key, max_retries=0) as client:
        asked = {"model": "tiny", "messages": HELLO["messages"], "max_tokens": 3, "seed": 4}
        reply = client.chat.completions.create(**asked, n=2, logprobs=True, top_logprobs=2)
        assert [len(choice.logprobs.content) for choice in reply.choices] == [3, 3]
        for place in reply.choices[0].logprobs.content:
            assert len(place.top_logprobs) == 2
            assert place.logprob <= place.top_logprobs[0].logprob
        assert [body["seed"] for body in completions(house)] in ([4, 5], [5, 4])
        raw = client.completions.create(model="tiny", prompt="Once", max_tokens=2)
        assert raw.usage.completion_tokens == 2


def test_a_batch_is_answered(house, sdk):
    params = {"model": "tiny", "max_tokens": 3, "messages": HELLO["messages"]}
    batch = sdk.messages.batches.create(requests=[{"custom_id": "a", "params": params}])
    wait_until(lambda: sdk.messages.batches.retrieve(batch.id).processing_status == "ended")
    [result] = sdk.messages.batches.results(batch.id)
    assert result.result.message.usage.output_tokens == 3


def test_an_alias_that_is_moved_takes_its_adapter_with_it(house, sdk):
    registry = house.registry
    registry.ship("answers", "first")
    said = sdk.messages.create(model="answers", **HELLO).content[0].text
    registry.ship("answers", "second")
    other = sdk.messages.create(model="answers", **HELLO).content[0].text
    [(loaded, first), (also, second), (gone, name)] = adapters_told(house)
    assert (loaded, also, gone, name) == ("load", "load", "unload", first)
    assert first.startswith("first@")
    assert second.startswith("second@")
    assert len({said, other, sdk.messages.create(model="tiny", **HELLO).content[0].text}) == 3
    assert all(body["is_3d_lora_weight"] for path, body in house.there.asked if path.endswith("/load_lora_adapter"))
    assert [path.name for path in (house.folder / "shared").iterdir()] == [second.replace("@", "-")]  # the copy that it reads
    registry.rollback("answers")
    house.server.run(house.server.app.state.models.follow("answers"))  # as the page and the API do
    assert adapters_told(house)[3:] == [("load", first), ("unload", second)]
    assert sdk.messages.create(model="answers", **HELLO).content[0].text == said
    assert completions(house)[-1]["model"] == first


def test_a_server_that_was_started_anew_is_told_of_its_adapters_again(house, sdk):
    said = sdk.messages.create(model="first", **HELLO).content[0].text
    house.there.begin_anew()
    assert sdk.messages.create(model="first", **HELLO).content[0].text == said


def test_who_was_about_to_be_answered_by_an_adapter_that_is_let_go_of_still_is(house, sdk):
    sdk.messages.create(model="second", **HELLO)
    models = house.server.app.state.models
    (base,) = models._bases.values()
    name = completions(house)[-1]["model"]
    asked = Request("r", (Span(tuple(base.template.encode("Hello"))),), (END,), 2, name, Sampling(0.0))

    async def written():
        await base.client.unload_adapter(name)
        return [event async for event in base.client.generate(asked)]

    assert sum(len(event.ids) for event in house.server.run(written())) == 2
    assert adapters_told(house)[-3:] == [("unload", name), ("load", name), ("unload", name)]
    base.adapters.clear()  # as Models does when it lets go of one


def test_adapters_that_no_vllm_writes_with_are_refused(house, sdk):
    config = json.loads((house.folder / "first" / "adapter_config.json").read_text())
    folder = house.folder / "activated"
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps(config | {"alora_invocation_tokens": [7, 8]}))
    house.registry.publish_adapter("activated", folder, "tiny")
    with pytest.raises(anthropic.BadRequestError, match="activated LoRA"):
        sdk.messages.create(model="activated", **HELLO)
    house.there.lora = False
    try:
        house.registry.publish_adapter("third", adapter(house.tiny, house.folder / "third", 7, r=4), "tiny")
        with pytest.raises(anthropic.InternalServerError, match="--max-lora-rank 4 --enable-mixed-moe-lora-format"):
            sdk.messages.create(model="third", **HELLO)
    finally:
        house.there.lora = True


def test_pictures_cannot_be_shown_there(house, sdk):
    dot = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="
    image = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": dot}}
    with pytest.raises(anthropic.BadRequestError, match="reads no images"):
        sdk.messages.create(model="tiny", max_tokens=2, messages=[{"role": "user", "content": [image]}])


def test_what_is_wrong_there_is_said_here(house, sdk):
    for house.there.overloaded_as in (429, 503):
        house.there.overloaded = 9
        with pytest.raises(anthropic.InternalServerError, match="overloaded") as refused:
            sdk.messages.create(model="tiny", **HELLO)
        assert refused.value.status_code == 529
    house.there.overloaded = 0
    with house.server.http() as http:
        assert http.get("/health").json() == {"status": "ok", "vllm": "well"}
        house.there.well = False
        assert http.get("/health").json()["vllm"] == "out of reach"
        house.there.well = True


def test_a_server_that_is_away_or_serves_something_else_is_told(root_key, tiny, tmp_path, tokenizer_folder):
    with vllm(tiny) as there:
        models = {"model": "tiny", "max_tokens": 2, "messages": HELLO["messages"]}
        settings = ServerSettings(serving=Serving(vllm=Vllm(there.url)), jobs_at_once=0)
        with running(tmp_path / "data", settings=settings) as server, server.sdk() as client:
            registry = server.app.state.registry
            registry.publish_base("tiny", tiny)
            other = tmp_path / "other"
            other.mkdir()
            (other / "config.json").write_text("{}")
            registry.publish_base("other", other)
            with pytest.raises(anthropic.BadRequestError, match="--vllm-base"):
                client.messages.create(**models)
            server.app.state.models.serving = Serving(vllm=Vllm(there.url, base="tiny"))
            with pytest.raises(anthropic.BadRequestError, match="'other' is not the one that the vLLM server writes for"):
                client.messages.create(**{**models, "model": "other"})
            assert [one.id for one in client.models.list()] == ["tiny"]
            there.folder = tokenizer_folder  # another base's
            with pytest.raises(anthropic.InternalServerError, match="reads a text as other ids"):
                client.messages.create(**models)
            there.folder = tiny
            client.messages.create(**models)
            there.away = True
            with pytest.raises(
                anthropic.InternalServerError, match="the server behind 'tiny' broke the connection off"
            ) as away:
                client.messages.create(**models)
            assert away.value.status_code == 502
            with server.http() as http:
                assert http.get("/health").json() == {"status": "ok", "vllm": "out of reach"}


@pytest.mark.parametrize(
    ("arguments", "wanted"),
    [
        ([], None),
        (["--engine", "vllm", "--vllm-url", "http://gpu:8000"], Vllm("http://gpu:8000")),
        (["--vllm-url", "http://gpu:8000", "--vllm-base", "qwen"], Vllm("http://gpu:8000", "qwen")),
        (["--models", "FILE"], Vllm("http://file:1", "house")),
        (["--models", "FILE", "--engine", "own"], None),
        (["--models", "FILE", "--vllm-base", "qwen"], Vllm("http://file:1", "qwen")),
    ],
)
def test_flags_and_file_say_which_engine_writes(tmp_path, arguments, wanted):
    file = tmp_path / "models.yml"
    file.write_text("vllm: {url: 'http://file:1', base: house}\n")
    found = parser().parse_args(["serve", *(str(file) if one == "FILE" else one for one in arguments)])
    assert isinstance(found, argparse.Namespace)
    assert verbs._written_by(found, read_serving(found.models) if found.models else Serving()).vllm == wanted


def test_what_is_wrong_with_the_flags_or_the_file_is_said(tmp_path):
    for arguments, why in (
        (["--engine", "vllm"], "needs the server's address"),
        (["--engine", "own", "--vllm-url", "http://a"], "of --engine vllm"),
        (["--vllm-url", "gpu:8000"], "no address"),
    ):
        with pytest.raises(BadInput, match=why):
            verbs._written_by(parser().parse_args(["serve", *arguments]), Serving())
    file = tmp_path / "models.yml"
    for text, why in (
        ("vllm: {base: house}", "url"),
        ("vllm: {url: 'http://a', adapters_there: /x}", "name both"),
        ("vllm: {url: 'http://a', key_env: 'a b'}", "no name of an environment variable"),
        ("vllm: {url: 'ftp://a'}", "no address"),
    ):
        file.write_text(text + "\n")
        with pytest.raises(ConfigError, match=why):
            read_serving(file)
