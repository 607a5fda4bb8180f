"""The endpoint over a model under training: the official client drives a generator that another thread steps."""

import asyncio
import threading
import time
from contextlib import contextmanager
from dataclasses import dataclass, field

import httpx
import openai
import pytest

from ropewalk.chat.template import Template
from ropewalk.engine.request import Sampling
from ropewalk.errors import BadInput, EngineDied
from ropewalk.server.live_policy import Asked, LivePolicy
from ropewalk.server.policy_endpoint import KEY_ENV, Policy, PolicyServer, address_of

SAY = [{"role": "user", "content": "How is the weather?"}]
LONGEST = 200


@dataclass
class Written:
    ids: list[int]
    logprobs: list[float]
    versions: list[int]
    ended: bool


@dataclass
class FakeGenerator:
    """Writes the same words for everybody, one id a step, and publishes an adapter after each third."""

    words: list[int]
    version: int = 4
    held: bool = False  # nothing is written meanwhile
    asked: dict[str, dict] = field(default_factory=dict)
    cancelled: list[str] = field(default_factory=list)
    _writing: dict[tuple[str, int], Written] = field(default_factory=dict)

    @property
    def busy(self):
        return bool(self._writing) and not self.held

    def submit(self, key, ids, *, samples, max_tokens, sampling, stop_ids, ends, stops):
        assert isinstance(sampling, Sampling)
        told = {"most": max_tokens, "sampling": sampling, "stops": stop_ids, "ends": list(ends), "texts": stops and stops.texts}
        self.asked[key] = {"ids": list(ids), **told}
        for sample in range(samples):
            self._writing[key, sample] = Written([], [], [], False)

    def cancel(self, key):
        self.cancelled.append(key)
        self._writing = {at: found for at, found in self._writing.items() if at[0] != key}

    def step(self):
        finished = []
        for (key, sample), found in list(self._writing.items()):
            place = len(found.ids)
            found.ids.append(self.words[place])
            found.logprobs.append(-0.5 - place)
            found.versions.append(self.version + place // 3)
            found.ended = place + 1 == len(self.words)
            if found.ended or place + 1 == self.asked[key]["most"]:
                finished.append((key, sample, found))
                del self._writing[key, sample]
        return finished


@pytest.fixture(scope="module")
def template(tiny):
    return Template.load(tiny)


@pytest.fixture
def words(template):
    return [*template.encode("Rain in Kiel, sun in Ulm."), template.stop_ids[0]]


@contextmanager
def opened(template, generator, waiting=16, **settings):
    """The endpoint, and the thread that drives its generator."""
    live, stopped = LivePolicy(waiting=waiting), threading.Event()
    policy = Policy("policy", template, LONGEST, live, lambda: generator.version)
    server = PolicyServer(policy, "127.0.0.1", 0, **{"key": "", **settings})
    driving = threading.Thread(target=live.drive, args=(generator, stopped))
    server.start()
    driving.start()
    try:
        yield server, live
    finally:
        stopped.set()
        driving.join(10)
        server.stop()


@pytest.fixture
def generator(words):
    return FakeGenerator(words)


@pytest.fixture
def client(template, generator):
    with opened(template, generator) as (server, _), openai.OpenAI(base_url=server.url, api_key="-", max_retries=0) as found:
        yield found


def ask(client, **more):
    return client.chat.completions.create(**{"model": "policy", "messages": SAY, **more})


def test_a_reply_tells_its_ids_their_logprobs_and_the_versions_that_sampled_them(client, template, generator, words):
    reply = ask(client, logprobs=True, n=2, temperature=0.7, extra_body={"return_token_ids": True})
    assert reply.prompt_token_ids == template.render(SAY, add_generation_prompt=True).ids
    assert [choice.index for choice in reply.choices] == [0, 1]
    for choice in reply.choices:
        assert choice.message.content == "Rain in Kiel, sun in Ulm."
        assert (choice.finish_reason, choice.token_ids) == ("stop", words)
        assert [token.logprob for token in choice.logprobs.content] == [-0.5 - n for n in range(len(words))]
        assert choice.token_versions == [4 + n // 3 for n in range(len(words))]
    assert reply.usage.completion_tokens == 2 * len(words)
    [asked] = generator.asked.values()
    assert asked["ids"] == reply.prompt_token_ids
    assert asked["most"] == LONGEST - len(asked["ids"])
    assert asked["sampling"].temperature == 0.7
    assert template.stop_ids[0] in asked["stops"]


def test_ids_go_in_and_a_limit_ends_a_reply(client, generator, words):
    made = client.completions.create(model="policy", prompt=[[5, 6], [7]], max_tokens=4, extra_body={"return_token_ids": True})
    assert [choice.token_ids for choice in made.choices] == [words[:4]] * 2
    assert [choice.prompt_token_ids for choice in made.choices] == [[5, 6], [7]]
    assert {choice.finish_reason for choice in made.choices} == {"length"}
    assert sorted(asked["ids"] for asked in generator.asked.values()) == [[5, 6], [7]]


def test_a_stream_brings_each_reply_and_its_ids(client, words):
    chunks = list(ask(client, stream=True, extra_body={"return_token_ids": True}, stream_options={"include_usage": True}))
    assert chunks[0].prompt_token_ids
    told = [chunk.choices[0] for chunk in chunks if chunk.choices]
    assert "".join(choice.delta.content or "" for choice in told) == "Rain in Kiel, sun in Ulm."
    assert [id for choice in told for id in getattr(choice, "token_ids", None) or ()] == words
    assert chunks[-1].usage.completion_tokens == len(words)


@pytest.mark.parametrize(
    ("more", "param"),
    [
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"reasoning_effort": "low"}, "reasoning_effort"),
        ({"messages": [{"role": "user", "content": [{"type": "file", "file": {"file_id": "x"}}]}]}, "messages"),
        ({"logprobs": True, "top_logprobs": 2}, "top_logprobs"),
    ],
)
def test_what_would_change_its_ids_is_refused(client, more, param):
    with pytest.raises(openai.BadRequestError) as raised:
        ask(client, **more)
    assert raised.value.param == param


def test_another_model_is_not_there_and_the_run_says_what_it_is(client):
    with pytest.raises(openai.NotFoundError):
        ask(client, model="tiny")
    [model] = client.models.list()
    assert (model.id, model.version, model.max_model_len) == ("policy", 4, LONGEST)


def test_more_requests_than_may_wait_are_told_to_come_again_and_the_end_of_a_run_is_told(template, generator):
    generator.held = True
    with opened(template, generator, waiting=1) as (server, live):
        client = openai.OpenAI(base_url=server.url, api_key="-", max_retries=0)
        told = []

        def wait():
            try:
                ask(client)
            except openai.APIStatusError as error:
                told.append(error)

        waiting = threading.Thread(target=wait)
        waiting.start()
        until(lambda: generator.asked)
        with pytest.raises(openai.InternalServerError, match="wait already") as raised:
            ask(client)
        assert raised.value.status_code == 503
        live.close()
        waiting.join(10)
        assert "has ended" in str(told[0])
        with pytest.raises(openai.InternalServerError, match="has ended"):
            ask(client)
        client.close()


def test_what_a_client_that_left_had_asked_is_cancelled(template, generator):
    generator.held = True
    with opened(template, generator) as (server, live):
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(f"{server.url}/chat/completions", json={"model": "policy", "messages": SAY}, timeout=0.5)
        until(lambda: generator.cancelled)
        assert generator.cancelled == list(generator.asked)
        assert not live.waits


def test_what_others_have_asked_of_the_generator_is_theirs(words):
    live = LivePolicy()
    theirs = ("prompt 3", 0, Written(words, [], [], True))
    assert live.take([theirs, (f"{live.own}7", 0, theirs[2]), ("endpoint 999.1", 0, theirs[2])]) == [
        theirs,
        ("endpoint 999.1", 0, theirs[2]),
    ]


def test_whoever_asks_after_the_end_is_told_at_once(words):
    live = LivePolicy()
    live.close()

    async def ask_it():
        await anext(live.write(Asked([1], samples=1, max_tokens=1, sampling=Sampling(), stop_ids=())))

    with pytest.raises(EngineDied, match="has ended"):
        asyncio.run(ask_it())


def test_an_address_that_others_reach_needs_a_key(template, generator, monkeypatch):
    monkeypatch.delenv(KEY_ENV, raising=False)
    policy = Policy("policy", template, LONGEST, LivePolicy(), lambda: 0)
    with pytest.raises(BadInput, match=KEY_ENV):
        PolicyServer(policy, "0.0.0.0", 0)
    with opened(template, generator, key="secret") as (server, _):
        for key, status in (("wrong", 401), ("secret", 200)):
            headers = {"authorization": f"Bearer {key}"}
            told = httpx.post(f"{server.url}/chat/completions", json={"model": "policy", "messages": SAY}, headers=headers)
            assert told.status_code == status


@pytest.mark.parametrize(("text", "address"), [("127.0.0.1:8001", ("127.0.0.1", 8001)), ("[::1]:80", ("::1", 80))])
def test_an_address_is_a_host_and_a_port(text, address):
    assert address_of(text) == address
    for wrong in ("8001", ":8001", "here:", "here:99999", "here:eight"):
        with pytest.raises(BadInput, match="host:port"):
            address_of(wrong)


def until(true):
    late = time.monotonic() + 30
    while not true():
        assert time.monotonic() < late
        time.sleep(0.02)
