"""The engine in a process of its own: asked over a pipe, cancelled, killed, and there again."""

import asyncio
import json
import os
import signal
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from ropewalk.chat.template import Template
from ropewalk.engine.client import EngineClient
from ropewalk.engine.lines import EngineSettings
from ropewalk.engine.request import Grammar, Keep, Request, Sampling, Span
from ropewalk.errors import BadInput, EngineDied, ModelError, NotFound
from ropewalk.models.base import make_base

GREEDY = Sampling(temperature=0)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("engine") / "base"
    make_base(folder, "qwen3_moe", size="tiny", seed=3)
    return folder


def asked(base: Path, body, **settings):
    async def whole():
        client = EngineClient(EngineSettings(str(base), threads=1, **settings))
        try:
            await body(client)
        finally:
            await client.stop()

    asyncio.run(whole())


async def collect(client, request):
    return [event async for event in client.generate(request)]


def request(id, **more):
    return Request(id, (Span(tuple(range(10, 60))),), (5, 6, 7), **{"max_tokens": 6, "sampling": GREEDY} | more)


def test_requests_are_answered_side_by_side_and_what_was_read_is_told(base, tmp_path):
    async def body(client):
        several = await asyncio.gather(*(collect(client, request(str(i), logprobs=True)) for i in range(3)))
        ids = [[id for event in events for id in event.ids] for events in several]
        assert ids[0] == ids[1] == ids[2]
        assert len(ids[0]) == 6
        assert sorted(events[0].read for events in several) == [0, 50, 50]
        assert all(len(event.logprobs) == 1 for event in several[0])
        assert (await client.stats())["prefixes"]["memory_hits"] == 2

    asked(base, body)


def test_what_cannot_be_asked_is_told_as_the_error_it_is(base):
    async def body(client):
        with pytest.raises(NotFound, match="no adapter 'x'"):
            await collect(client, request("1", adapter="x"))
        with pytest.raises(BadInput, match="too long"):
            await collect(client, long())
        assert len(await collect(client, request("3"))) == 6

    def long():
        return Request("2", (Span(tuple([10] * 200)),), (5,), 6, sampling=GREEDY)

    asked(base, body, longest=100)


def test_a_base_that_is_not_there_is_told(tmp_path):
    async def body(client):
        with pytest.raises((ModelError, NotFound)):
            await collect(client, request("1"))

    asked(tmp_path / "none", body)


def test_leaving_a_reply_cancels_it(base):
    async def body(client):
        reply = client.generate(request("1", max_tokens=5000))
        async for _ in reply:
            break
        await reply.aclose()
        assert len(await collect(client, request("1"))) == 6  # its id is free again, so it is gone

    asked(base, body)


def test_a_sample_that_nobody_wants_any_more_ends_beside_the_others(base):
    async def body(client):
        over, found = set(), {0: [], 1: []}
        hot = Sampling(temperature=1.0, seed=3)
        two = replace(request("1", max_tokens=40), samples=2, sampling=hot)
        async for event in client.generate(two, None, over):
            found[event.sample].append(event)
            over.add(0)
        assert found[0][-1].finish == "cancelled"
        assert found[1][-1].finish == "length"
        assert sum(len(event.ids) for event in found[1]) == 40
        assert sum(len(event.ids) for event in found[0]) < 40

    asked(base, body)


def test_a_killed_engine_fails_its_replies_and_the_next_request_starts_another(base, tmp_path):
    async def body(client):
        keep = Keep(str(tmp_path / "segments" / "a"), b"k" * 32)
        kept = Request("kept", (Span(tuple(range(10, 60)), keep),), (5,), 2, sampling=GREEDY)
        before = await collect(client, kept)
        await client.flush()
        reply = client.generate(request("1", max_tokens=5000))
        await anext(reply)
        os.kill(client._process.pid, signal.SIGKILL)
        with pytest.raises(EngineDied):
            async for _ in reply:
                pass
        after = await collect(client, kept)
        assert (before[0].read, after[0].read) == (0, 50)
        assert [event.ids for event in after] == [event.ids for event in before]
        await client.forget([keep.path])
        assert not Path(keep.path).exists()

    asked(base, body, folder=str(tmp_path / "segments"))


def test_a_reply_keeps_to_a_schema(base):
    schema = {
        "type": "object",
        "properties": {"kind": {"enum": ["lease", "invoice"]}, "pages": {"type": "integer", "minimum": 1, "maximum": 9}},
        "required": ["kind", "pages"],
        "additionalProperties": False,
    }

    async def body(client):
        template = Template.load(base)
        for seed in range(3):
            grammar = Grammar("json_schema", json.dumps(schema))
            events = await collect(
                client,
                request(str(seed), max_tokens=60, grammar=grammar, sampling=Sampling(seed=seed), stop_ids=template.stop_ids),
            )
            assert events[-1].finish == "stop"
            found = json.loads(template.decode([id for event in events for id in event.ids]))
            assert found["kind"] in ("lease", "invoice")
            assert 1 <= found["pages"] <= 9
        with pytest.raises(BadInput, match="cannot be kept to"):
            await collect(client, request("x", grammar=Grammar("lark", "start: (")))

    asked(base, body)


def test_an_answer_to_who_has_just_been_cancelled_is_dropped_and_the_next_arrives(base):
    async def body(client):
        lines = asyncio.StreamReader()
        lines.feed_data(b'{"call": 0}\n{"call": 1}\n')
        lines.feed_eof()
        gone, waiting = (asyncio.get_running_loop().create_future() for _ in range(2))
        gone.cancel()
        client._answers.update({0: gone, 1: waiting})
        await client._read(SimpleNamespace(stdout=lines, wait=lambda: asyncio.sleep(0)))
        assert waiting.result() == {"call": 1}

    asked(base, body)
