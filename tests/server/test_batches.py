"""Message batches through the official SDK against a real server: results, refusals, paging, time, and a server that is killed."""

import asyncio
import json
import os
import signal
import socket
import sqlite3
import subprocess
import sys
import threading
import time
from contextlib import contextmanager, suppress
from pathlib import Path

import anthropic
import httpx
import pytest
import time_machine
from sqlalchemy import select, update

from ropewalk.batches.ledger import Ledger
from ropewalk.batches.tables import batch_items, batches
from ropewalk.database import now
from ropewalk.files.settings import Settings
from ropewalk.files.store import Store
from ropewalk.registry import Registry
from ropewalk.tenants.keys import create_key

MODEL = "tiny"
PATIENCE = 120.0


@pytest.fixture(scope="module")
def sdk(asked):
    """A client in a workspace of its own."""
    _, key = asked.workspace("batches")
    with asked.sdk(key) as client:
        yield client


def asks(text="Hello", **more):
    return {"model": MODEL, "max_tokens": 4, "messages": [{"role": "user", "content": text}], **more}


def requests(**params):
    return [{"custom_id": id, "params": asked} for id, asked in params.items()]


def ended(client, id):
    """The batch, once it has ended."""
    end = time.monotonic() + PATIENCE
    while time.monotonic() < end:
        batch = client.messages.batches.retrieve(id)
        if batch.processing_status == "ended":
            return batch
        assert batch.request_counts.processing == sum(batch.request_counts.model_dump().values())
        time.sleep(0.1)
    raise AssertionError(batch)


def test_a_batch_is_answered_request_by_request(sdk):
    file = sdk.files.upload(file=("book.txt", b"The lighthouse was built in 1907.", "text/plain")).id
    content = [{"type": "document", "source": {"type": "file", "file_id": file}}, {"type": "text", "text": "When?"}]
    wrong = {
        "streamed": (asks(stream=True), "stream: a request of a batch is not streamed"),
        "nothing": (asks(max_tokens=0), "max_tokens: Input should be greater"),
        "fast": (asks(speed="fast"), "speed: a batch has no speed"),
        "strange": (asks(oddity=1), "oddity: Extra inputs are not permitted"),
        "unserved": (asks(model="none"), "model: none"),
        "lost": (asks([{"type": "document", "source": {"type": "file", "file_id": "file_none"}}]), "file_none"),
    }
    made = sdk.messages.batches.create(
        requests=requests(a=asks(), b=asks(content), **{id: asked for id, (asked, _) in wrong.items()})
    )
    assert (made.type, made.processing_status, made.results_url, made.ended_at) == ("message_batch", "in_progress", None, None)
    assert made.request_counts.processing == 8
    assert (made.expires_at - made.created_at).total_seconds() == 24 * 3600
    done = ended(sdk, made.id)
    assert done.request_counts.model_dump() == {"processing": 0, "succeeded": 2, "errored": 6, "canceled": 0, "expired": 0}
    found = {line.custom_id: line.result for line in sdk.messages.batches.results(made.id)}
    assert sorted(found) == sorted(["a", "b", *wrong])
    for id in "ab":
        message = found[id].message
        assert (found[id].type, message.type, message.usage.service_tier) == ("succeeded", "message", "batch")
        assert message.content[0].text
        assert message.usage.output_tokens <= 4
    for id, (_, says) in wrong.items():
        error = found[id].error
        assert (found[id].type, error.type) == ("errored", "error")
        assert error.request_id.startswith("req_")
        assert says in error.error.message
        assert error.error.type == ("not_found_error" if id in ("unserved", "lost") else "invalid_request_error")


def test_a_batch_that_cannot_be_is_refused_as_a_whole(sdk):
    for sent, says in (
        ([], "at least 1"),
        (requests(**{"not an id": asks()}), "requests.0.custom_id: String should match"),
        (requests(a=asks()) * 2, "must be unique"),
        ([{"custom_id": "a"}], "requests.0.params: Field required"),
        ([{"custom_id": "a", "params": asks(), "more": 1}], "Extra inputs"),
    ):
        with pytest.raises(anthropic.BadRequestError, match=says):
            sdk.messages.batches.create(requests=sent)


def test_while_a_large_batch_is_read_others_are_answered(server):
    _, key = server.workspace("large batches")
    count, text = 4_000, "The lighthouse was built in 1907. " * 300  # 40 MB

    def body():
        yield b'{"requests": ['
        for n in range(count):
            entry = {"custom_id": f"id{n}", "params": asks(text, model="none", temperature=0.5, stop_sequences=["\n"] * 40)}
            yield (b"," if n else b"") + json.dumps(entry).encode()
        yield b"]}"

    whole = b"".join(body())
    waits, done = [], threading.Event()

    def look():
        with server.http() as other:
            while not done.is_set():
                begun = time.monotonic()
                assert other.get("/health").status_code == 200
                waits.append(time.monotonic() - begun)
                time.sleep(0.005)

    looking = threading.Thread(target=look)
    with server.http(key) as client:
        looking.start()
        try:
            begun = time.monotonic()
            made = client.post("/v1/messages/batches", content=whole).json()
            seconds = time.monotonic() - begun
        finally:
            done.set()
            looking.join()
        assert made["request_counts"]["processing"] == count
        client.post(f"/v1/messages/batches/{made['id']}/cancel").raise_for_status()
    # Read at once, the body would stop everything for a third of the time that it takes; in pieces, for less than a tenth of that.
    assert len(waits) > 10
    assert sorted(waits)[len(waits) * 9 // 10] < seconds / 10, (seconds, waits)


def test_batches_are_paged_newest_first_and_deleted_once_they_have_ended(server):
    _, key = server.workspace("pages of batches")
    with server.sdk(key) as client:
        ids = [client.messages.batches.create(requests=requests(a=asks(model="none"))).id for _ in range(5)][::-1]
        assert [batch.id for batch in client.messages.batches.list(limit=2)] == ids
        first = client.messages.batches.list(limit=2)
        assert (first.has_more, first.first_id, first.last_id) == (True, ids[0], ids[1])
        assert [batch.id for batch in client.messages.batches.list(limit=2, before_id=ids[4]).data] == ids[2:4]
        assert client.messages.batches.list(after_id="msgbatch_none").data == []
        ended(client, ids[0])
        gone = client.messages.batches.delete(ids[0])
        assert (gone.id, gone.type) == (ids[0], "message_batch_deleted")
        for call in (client.messages.batches.retrieve, client.messages.batches.delete, client.messages.batches.cancel):
            with pytest.raises(anthropic.NotFoundError):
                call(ids[0])
        assert [batch.id for batch in client.messages.batches.list()] == ids[1:]


def held(server, key, *ids):
    """A batch that nobody works on: its requests are leased to a process that is not there."""
    runner = server.app.state.batches
    room, runner.at_once = runner.at_once, 0
    try:
        with server.sdk(key) as client:
            made = client.messages.batches.create(requests=requests(**{id: asks(model="none") for id in ids})).id

        async def lease():
            async with server.store.database.writing() as connection:
                mine = update(batch_items).where(batch_items.c.batch_id == made)
                await connection.execute(mine.values(holder="gone", lease_until=now() + 10**9))

        server.run(lease())
    finally:
        runner.at_once = room
    return made


def test_what_is_cancelled_ends_without_an_answer_but_for_what_is_being_answered(server):
    _, key = server.workspace("cancelled batches")
    id = held(server, key, "a", "b")

    async def free():
        async with server.store.database.writing() as connection:
            one = update(batch_items).where(batch_items.c.batch_id == id, batch_items.c.custom_id == "a")
            await connection.execute(one.values(lease_until=0))
            # As if the process that had it were about to answer the other.
            await connection.execute(update(batches).where(batches.c.id == id).values(cancel_initiated_at=now()))
        await server.app.state.batches.ledger.settle()
        async with server.store.database.writing() as connection:
            left = (await connection.execute(select(batch_items.c.custom_id).where(batch_items.c.outcome.is_(None)))).scalars()
            assert "b" in left.all()
            await connection.execute(update(batch_items).where(batch_items.c.batch_id == id).values(lease_until=0))

    with server.sdk(key) as client:
        for call in (client.messages.batches.delete, client.messages.batches.results):
            with pytest.raises(anthropic.AnthropicError):
                call(id)
        server.run(free())
        told = client.messages.batches.cancel(id)
        assert told.processing_status in ("canceling", "ended")
        assert told.cancel_initiated_at is not None
        assert ended(client, id).request_counts.canceled == 2
        assert client.messages.batches.cancel(id).processing_status == "ended"
        assert {line.custom_id: line.result.type for line in client.messages.batches.results(id)} == dict.fromkeys(
            "ab", "canceled"
        )


def test_a_day_later_a_batch_has_expired_and_a_month_later_its_results_are_erased(server):
    _, key = server.workspace("old batches")
    id = held(server, key, "a", "b")
    ledger = server.app.state.batches.ledger

    async def later(days):
        async with server.store.database.writing() as connection:
            mine = update(batches).where(batches.c.id == id)
            moment = now() - round(days * 24 * 3600 * 1_000_000)
            await connection.execute(mine.values(created_at=moment, expires_at=moment + 24 * 3600 * 1_000_000))
        await ledger.settle()

    with server.sdk(key) as client:
        server.run(later(0.9))
        assert client.messages.batches.retrieve(id).processing_status == "in_progress"
        server.run(later(1.1))
        assert client.messages.batches.retrieve(id).request_counts.expired == 2
        assert {line.result.type for line in client.messages.batches.results(id)} == {"expired"}
        server.run(later(29.1))
        old = client.messages.batches.retrieve(id)
        assert (old.processing_status, old.results_url) == ("ended", None)
        assert old.archived_at is not None
    with server.http(key) as http:
        assert http.get(f"/v1/messages/batches/{id}/results").status_code == 404
    with sqlite3.connect(server.data / "ropewalk.db") as rows:
        assert rows.execute("SELECT count(*) FROM batch_items WHERE batch_id = ?", (id,)).fetchone() == (0,)
        assert rows.execute("SELECT sealed_key FROM batches WHERE id = ?", (id,)).fetchone() == (None,)


# -- as they are written down ----------------------------------------------------------------------------------------------------


@pytest.fixture
def opened(root_key, tmp_path):
    """Runs a coroutine of (store, caller) over a new store."""

    def run(body):
        async def inside():
            store = await Store.open(Settings(data=tmp_path / "data"))
            try:
                return await body(store, await store.local_caller())
            finally:
                await store.close()

        return asyncio.run(inside())

    return run


async def given(*some):
    """Requests as they come with a body."""
    for asked in some:
        yield asked


def test_a_batch_that_comes_to_no_end_leaves_nothing(opened):
    async def half():
        yield [(f"id{n}", {}) for n in range(1_200)]
        raise ConnectionError

    async def body(store, caller):
        ledger = Ledger(store.database, store.vault)
        with pytest.raises(ConnectionError):
            await ledger.create(caller, "2023-06-01", half())
        async with store.database.reading() as connection:
            for table in (batches, batch_items):
                assert (await connection.execute(select(table))).all() == []
        whole = await ledger.create(caller, "2023-06-01", given([(f"id{n}", {"n": n}) for n in range(1_200)], [("last", {})]))
        assert (whole.total, whole.unanswered) == (1_201, 1_201)
        assert [item.number for item in await ledger.claim(1_201)] == list(range(1_201))

    opened(body)


def test_two_processes_share_a_batch_and_one_answer_counts(opened):
    async def body(store, caller):
        first, second = (Ledger(store.database, store.vault) for _ in range(2))
        batch = await first.create(caller, "2023-06-01", given([(f"id{n}", {"n": n}) for n in range(7)]))
        claimed = [*await first.claim(3), *await second.claim(3), *await first.claim(3)]
        assert sorted(item.params["n"] for item in claimed) == list(range(7))
        assert [*await first.claim(3), *await second.claim(3)] == []
        assert await first.answer(claimed[0], "succeeded", {"type": "succeeded"})
        assert not await second.answer(claimed[0], "errored", {"type": "errored"})
        for item in claimed[1:]:
            assert await second.answer(item, "errored", {"type": "errored"})
        done = await first.show(caller, batch.id)
        assert (done.succeeded, done.errored, done.unanswered) == (1, 6, 0)
        assert done.ended_at is not None
        assert [outcome async for _, outcome, _ in await first.results(caller, batch.id)].count("succeeded") == 1

    opened(body)


def test_a_lease_that_is_not_renewed_runs_out(opened):
    async def body(store, caller):
        first, second = (Ledger(store.database, store.vault, 10.0) for _ in range(2))
        with time_machine.travel(1_800_000_000, tick=False) as clock:
            await first.create(caller, "2023-06-01", given([("a", {})]))
            (item,) = await first.claim(1)
            clock.shift(9)
            await first.renew()
            clock.shift(9)
            assert await second.claim(1) == []
            clock.shift(2)
            (again,) = await second.claim(1)
            assert (again.custom_id, again.tries) == ("a", item.tries + 1)
            await second.release(again)
            assert (await first.claim(1))[0].tries == again.tries

    opened(body)


def test_workspaces_take_turns(opened):
    async def body(store, caller):
        from ropewalk.tenants.workspaces import create_workspace

        other = await store.local_caller((await create_workspace(store.database, store.vault, "other")).id)
        ledger = Ledger(store.database, store.vault)
        for _ in range(2):
            await ledger.create(caller, "2023-06-01", given([(f"id{n}", {}) for n in range(4)]))
        await ledger.create(other, "2023-06-01", given([(f"id{n}", {}) for n in range(2)]))
        turns = [(await ledger.claim(1))[0].batch.workspace_id for _ in range(4)]
        assert turns.count(other.workspace_id) == 2

    opened(body)


def test_what_is_asked_and_answered_is_not_there_to_be_read_and_goes_with_the_batch(opened, tmp_path):
    async def body(store, caller):
        ledger = Ledger(store.database, store.vault)
        batch = await ledger.create(caller, "2023-06-01", given([("a", {"secret": "PELLWORM-QUESTION"})]))
        (item,) = await ledger.claim(1)
        assert item.params == {"secret": "PELLWORM-QUESTION"}
        await ledger.answer(item, "succeeded", {"type": "succeeded", "text": "PELLWORM-ANSWER"})
        assert await _bytes_with(store, b"PELLWORM") == []
        await ledger.delete(caller, batch.id)
        await store.database.forget()
        assert await _bytes_with(store, batch.id.encode()) == []

    async def _bytes_with(store, needle):
        return [path.name for path in (tmp_path / "data").rglob("*") if path.is_file() and needle in path.read_bytes()]

    opened(body)


# -- a server that is killed -----------------------------------------------------------------------------------------------------


@contextmanager
def served(data, port):
    """A server in a process of its own, killed at the end."""
    script = Path(__file__).with_name("batch_server.py")
    process = subprocess.Popen([sys.executable, script, data, str(port)], stderr=subprocess.DEVNULL)
    try:
        end = time.monotonic() + PATIENCE
        while time.monotonic() < end:
            with suppress(httpx.TransportError):
                if httpx.get(f"http://127.0.0.1:{port}/ready").status_code == 200:
                    break
            time.sleep(0.1)
        yield process
    finally:
        with suppress(ProcessLookupError):
            os.kill(process.pid, signal.SIGKILL)
        process.wait()


def test_a_killed_server_goes_on_where_it_was_and_answers_nothing_twice(root_key, tiny, tmp_path):
    data, count = tmp_path / "data", 20
    Registry(data / "registry").publish_base(MODEL, tiny)

    async def key():
        store = await Store.open(Settings(data=data))
        _, secret = await create_key(store.database, store.vault, None, "test")
        await store.close()
        return secret

    secret = asyncio.run(key())

    def answered():
        with sqlite3.connect(data / "ropewalk.db") as rows:
            return dict(rows.execute("SELECT custom_id, result FROM batch_items WHERE outcome IS NOT NULL").fetchall())

    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    with anthropic.Anthropic(base_url=f"http://127.0.0.1:{port}", api_key=secret) as client:
        with served(data, port) as process:
            asked = {f"q{n}": asks(f"Question {n}", max_tokens=24) for n in range(count)}
            id = client.messages.batches.create(requests=requests(**asked)).id
            while len(answered()) < 3:
                assert process.poll() is None
                time.sleep(0.01)
        before = answered()
        assert 3 <= len(before) < count
        with served(data, port):
            done = ended(client, id)
            lines = list(client.messages.batches.results(id))
    assert done.request_counts.succeeded == count
    assert sorted(line.custom_id for line in lines) == sorted(asked)
    assert len({line.result.message.id for line in lines}) == count
    after = answered()
    assert {id: after[id] for id in before} == before
    assert sorted(after) == sorted(asked)
