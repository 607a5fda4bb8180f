"""Uploads in several requests: tus 1.0 as a plain client speaks it, over sockets, across crashes, at the edges of quotas."""

import base64
import hashlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from datetime import timedelta
from itertools import count

import httpx
import pytest
import time_machine
from sqlalchemy import func, select

from ropewalk.database import now
from ropewalk.files.lifecycle import sweep
from ropewalk.files.settings import Settings
from ropewalk.files.store import Store
from ropewalk.files.tables import parts, resumables
from ropewalk.tenants import quotas
from ropewalk.tenants.keys import create_key

ROOT_KEY = base64.b64encode(bytes(range(32))).decode()
VERSION = {"tus-resumable": "1.0.0"}
BYTES = {"content-type": "application/offset+octet-stream"}
PATH = "/v1/files/resumable"
names = (f"tus-{number}" for number in count())


def metadata(**values: str) -> str:
    return ",".join(f"{name} {base64.b64encode(value.encode()).decode()}" for name, value in values.items())


class Tus:
    """A plain client of the protocol."""

    def __init__(self, http: httpx.Client) -> None:
        self.http = http

    def create(self, length: int | None, content: bytes | None = None, **values: str) -> httpx.Response:
        headers = {**VERSION, "upload-metadata": metadata(**values)}
        if length is not None:
            headers["upload-length"] = str(length)
        if content is not None:
            headers |= BYTES
        return self.http.post(PATH, headers=headers, content=content)

    def begin(self, length: int, **values: str) -> str:
        answer = self.create(length, **{"filename": "long.bin", **values})
        assert answer.status_code == 201, answer.text
        return answer.headers["location"]

    def patch(self, where: str, offset: int, content: bytes, **more: str) -> httpx.Response:
        headers = {**VERSION, **BYTES, "upload-offset": str(offset), **more}
        return self.http.patch(where, headers=headers, content=content)

    def offset(self, where: str) -> int:
        answer = self.http.head(where, headers=VERSION)
        assert answer.status_code == 200
        assert answer.headers["cache-control"] == "no-store"
        return int(answer.headers["upload-offset"])


@pytest.fixture
def tus(server):
    """A client in a workspace of its own."""
    workspace, key = server.workspace(next(names))
    with server.http(key) as http:
        client = Tus(http)
        client.workspace_id = workspace.id
        yield client


def used(server, workspace_id: str) -> tuple[int, int, int, int]:
    """Bytes used and reserved, files used and reserved."""

    async def look():
        async with server.store.database.reading() as connection:
            found = await quotas.usage(connection, "workspace", workspace_id)
            return found.used_bytes, found.reserved_bytes, found.used_files, found.reserved_files

    return server.run(look())


def test_the_server_says_what_it_knows(tus):
    answer = tus.http.options(PATH)
    assert answer.status_code == 204
    assert answer.headers["tus-version"] == answer.headers["tus-resumable"] == "1.0.0"
    assert answer.headers["tus-extension"] == "creation,creation-with-upload,expiration,checksum,termination"
    assert answer.headers["tus-checksum-algorithm"] == "sha256,sha1"
    assert answer.headers["tus-max-size"] == "500000000"


def test_bytes_of_three_requests_become_one_file(tus, server):
    content = os.urandom(2_500_000)
    where = tus.begin(
        len(content), filename="dir/big.pdf", filetype="application/pdf", tags="a, b,a", expires_in_seconds="3600"
    )
    assert tus.offset(where) == 0
    for start, end in ((0, 1), (1, 1_200_000), (1_200_000, 2_500_000)):
        answer = tus.patch(where, start, content[start:end])
        assert (answer.status_code, answer.headers["upload-offset"]) == (204, str(end))
        assert ("ropewalk-file-id" in answer.headers) == (end == len(content))
    id = answer.headers["ropewalk-file-id"]
    assert tus.http.head(where, headers=VERSION).headers["ropewalk-file-id"] == id
    found = tus.http.get(f"/v1/files/{id}/details").json()
    assert (found["filename"], found["mime_type"], found["tags"]) == ("big.pdf", "application/pdf", ["a", "b"])
    assert found["sha256"] == hashlib.sha256(content).hexdigest()
    assert found["expires_at"] is not None
    assert tus.http.get(f"/v1/files/{id}/content").content == content
    assert used(server, tus.workspace_id) == (2_500_000, 0, 1, 0)


def test_bytes_that_come_with_the_creation_count(tus):
    whole = tus.create(5, b"whole", filename="a.txt")
    assert (whole.status_code, whole.headers["upload-offset"]) == (201, "5")
    assert tus.http.get(f"/v1/files/{whole.headers['ropewalk-file-id']}/content").content == b"whole"
    begun = tus.create(9, b"half ", filename="a.txt")
    assert (begun.status_code, begun.headers["upload-offset"], begun.headers.get("ropewalk-file-id")) == (201, "5", None)
    assert tus.patch(begun.headers["location"], 5, b"half").headers["ropewalk-file-id"]


def test_an_empty_file_is_there_at_once(tus):
    answer = tus.create(0)
    id = answer.headers["ropewalk-file-id"]
    found = tus.http.get(f"/v1/files/{id}").json()
    assert (found["size_bytes"], found["filename"]) == (
        0,
        "unnamed.txt" if found["mime_type"] == "text/plain" else "unnamed.bin",
    )


def test_bytes_for_another_place_are_refused(tus):
    where = tus.begin(10)
    assert tus.patch(where, 0, b"12345").status_code == 204
    for offset in (0, 4, 6):
        answer = tus.patch(where, offset, b"xxx")
        assert (answer.status_code, answer.json()["error"]["type"]) == (409, "invalid_request_error")
    assert tus.offset(where) == 5


def test_bytes_with_a_wrong_checksum_do_not_count(tus):
    where = tus.begin(8)
    right = base64.b64encode(hashlib.sha256(b"1234").digest()).decode()
    assert tus.patch(where, 0, b"12x4", **{"upload-checksum": f"sha256 {right}"}).status_code == 460
    assert tus.offset(where) == 0
    assert tus.patch(where, 0, b"1234", **{"upload-checksum": f"sha256 {right}"}).status_code == 204
    right = base64.b64encode(hashlib.sha1(b"5678").digest()).decode()
    answer = tus.patch(where, 4, b"5678", **{"upload-checksum": f"sha1 {right}"})
    assert tus.http.get(f"/v1/files/{answer.headers['ropewalk-file-id']}/content").content == b"12345678"
    for text in ("md5 AAAA", "sha256", "sha256 !!", "sha256 AAAA"):
        assert tus.patch(tus.begin(4), 0, b"1234", **{"upload-checksum": text}).status_code == 400


def test_what_is_not_the_protocol_is_refused_in_its_own_status(tus):
    where = tus.begin(10)
    refused = tus.http.patch(where, headers={**BYTES, "upload-offset": "0"}, content=b"1")
    assert (refused.status_code, refused.headers["tus-version"]) == (412, "1.0.0")
    headers = {**VERSION, "upload-offset": "0", "content-type": "text/plain"}
    assert tus.http.patch(where, headers=headers, content=b"1").status_code == 415
    assert tus.http.patch(where, headers={**VERSION, **BYTES}, content=b"1").status_code == 400
    assert tus.create(None).status_code == 400
    assert tus.create(500_000_001).status_code == 413
    assert tus.create(5, filename="a:b").status_code == 400
    assert tus.create(5, filetype="nonsense").status_code == 400
    assert tus.create(5, expires_in_seconds="5").status_code == 400
    assert tus.http.post(PATH, headers={**VERSION, "upload-length": "5", "upload-metadata": "filename !"}).status_code == 400
    assert tus.patch(where, 0, b"12345678901").status_code == 413
    assert tus.offset(where) == 0


def test_a_client_that_cannot_send_patch_says_so_in_a_header(tus):
    where = tus.begin(4)
    headers = {**VERSION, **BYTES, "upload-offset": "0", "x-http-method-override": "PATCH"}
    assert tus.http.post(where, headers=headers, content=b"1234").headers["ropewalk-file-id"]
    assert tus.http.post(where, headers={**VERSION, "x-http-method-override": "GET"}).status_code == 400
    assert tus.http.post(where, headers={**VERSION, "x-http-method-override": "DELETE"}).status_code == 204
    assert tus.http.head(where, headers=VERSION).status_code == 404


def test_the_whole_length_is_reserved_until_the_file_is_there_or_the_upload_is_ended(tus, server):
    server.run(_limit(server, tus.workspace_id, 100))
    first = tus.begin(70)
    assert used(server, tus.workspace_id) == (0, 70, 0, 1)
    refused = tus.create(31)
    assert (refused.status_code, refused.json()["error"]["details"]["error_code"]) == (400, "storage_quota_exceeded")
    assert tus.http.delete(first, headers=VERSION).status_code == 204
    assert used(server, tus.workspace_id) == (0, 0, 0, 0)
    second = tus.begin(100)  # all there is: the parts and the file are not counted twice
    assert tus.patch(second, 0, bytes(99)).status_code == 204
    assert tus.patch(second, 99, b"x").headers["ropewalk-file-id"]
    assert used(server, tus.workspace_id) == (100, 0, 1, 0)
    assert tus.http.delete(second, headers=VERSION).status_code == 204  # the file stays
    assert used(server, tus.workspace_id) == (100, 0, 1, 0)


def test_an_upload_ends_a_day_after_its_last_byte(tus, server):
    where = tus.begin(70)
    with time_machine.travel(now() / 1e6 + timedelta(hours=23).total_seconds()):
        assert tus.patch(where, 0, b"1").status_code == 204
    with time_machine.travel(now() / 1e6 + timedelta(hours=46).total_seconds()):
        assert tus.offset(where) == 1
    with time_machine.travel(now() / 1e6 + timedelta(hours=48).total_seconds()):
        assert tus.http.head(where, headers=VERSION).status_code == 404
        server.run(sweep(server.store))
        assert used(server, tus.workspace_id) == (0, 0, 0, 0)
    assert _rows(server, where) == (0, 0)


def test_room_that_an_upload_held_too_long_is_there_for_the_next(tus, server):
    server.run(_limit(server, tus.workspace_id, 100))
    tus.begin(70)
    with time_machine.travel(now() / 1e6 + timedelta(hours=25).total_seconds()):
        tus.begin(100)
        assert used(server, tus.workspace_id) == (0, 100, 0, 1)


def test_anothers_upload_answers_like_none(tus, server):
    _, key = server.workspace(next(names))
    where = tus.begin(10)
    none = where[:-6] + "aaaaaa"
    with server.http(key) as http:
        stranger = Tus(http)
        for method, more in (("PATCH", {**BYTES, "upload-offset": "0"}), ("DELETE", {}), ("HEAD", {})):
            mine = stranger.http.request(method, where, headers={**VERSION, **more})
            nobodys = stranger.http.request(method, none, headers={**VERSION, **more})
            assert mine.status_code == nobodys.status_code == 404
            same = [
                a.text.replace(w.rpartition("/")[2], "").replace(a.headers["request-id"], "")
                for a, w in ((mine, where), (nobodys, none))
            ]
            assert same[0] == same[1]
    assert tus.offset(where) == 0


def test_of_two_who_send_the_same_place_one_counts(tus):
    where = tus.begin(600_000)
    answers = {}

    def send(letter: bytes) -> None:
        answers[letter] = tus.patch(where, 0, letter * 600_000)

    threads = [threading.Thread(target=send, args=(letter,)) for letter in (b"a", b"b")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    winner = next(letter for letter, answer in answers.items() if answer.status_code == 204)
    loser = next(letter for letter in answers if letter != winner)
    assert answers[loser].status_code == 409
    id = answers[winner].headers["ropewalk-file-id"]
    assert tus.http.get(f"/v1/files/{id}/content").content == winner * 600_000
    assert len(tus.http.get("/v1/files").json()["data"]) == 1


def test_what_came_before_the_connection_broke_is_kept(tus):
    content = os.urandom(3_000_000)
    where = tus.begin(len(content))
    url = tus.http.base_url
    with socket.create_connection((url.host, url.port)) as connection:
        lines = [f"PATCH {where} HTTP/1.1", "host: localhost", f"x-api-key: {tus.http.headers['x-api-key']}"]
        lines += [f"{name}: {value}" for name, value in {**VERSION, **BYTES}.items()]
        lines += ["upload-offset: 0", f"content-length: {len(content)}", "", ""]
        connection.sendall("\r\n".join(lines).encode() + content[:2_000_000])
    late = time.monotonic() + 20
    while not (offset := tus.offset(where)) and time.monotonic() < late:
        time.sleep(0.05)
    assert 0 < offset <= 2_000_000
    answer = tus.patch(where, offset, content[offset:])
    assert tus.http.get(f"/v1/files/{answer.headers['ropewalk-file-id']}/content").content == content


def test_long_requests_become_durable_on_the_way(tus, server, monkeypatch):
    monkeypatch.setattr("ropewalk.files.resumable.PART", 1_500_000)
    content = os.urandom(4_000_000)
    where = tus.begin(len(content) + 1)
    assert tus.patch(where, 0, content).headers["upload-offset"] == "4000000"
    assert _rows(server, where)[1] > 1
    id = tus.patch(where, 4_000_000, b"!").headers["ropewalk-file-id"]
    assert tus.http.get(f"/v1/files/{id}/content").content == content + b"!"


def test_the_sweep_leaves_an_upload_alone_and_nothing_is_left_of_a_finished_one(tus, server):
    canary = b"canary-7d1e" * 1000
    where = tus.begin(len(canary) * 2)
    assert tus.patch(where, 0, canary).status_code == 204
    assert server.run(sweep(server.store)).orphans == 0
    assert not _holds(server.data, b"canary-7d1e")
    id = tus.patch(where, len(canary), canary).headers["ropewalk-file-id"]
    assert _rows(server, where) == (1, 0)
    assert server.run(sweep(server.store)).orphans == 0
    assert tus.http.get(f"/v1/files/{id}/content").content == canary * 2


# -- crashes


def test_acknowledged_bytes_survive_kill_9(tmp_path):
    content = os.urandom(2_300_000)
    with _prepared(tmp_path) as serve:
        with serve() as (tus, process):
            where = tus.begin(len(content))
            assert tus.patch(where, 0, content[:1_100_000]).status_code == 204
            process.send_signal(signal.SIGKILL)
        # Killed with the second part published and not yet counted, then with the last one counted and no file made of them.
        with serve("resumable.published:1") as (tus, process):
            assert tus.offset(where) == 1_100_000
            with pytest.raises(httpx.RemoteProtocolError):
                tus.patch(where, 1_100_000, content[1_100_000:])
            assert process.wait(20) == -signal.SIGKILL
        with serve("resumable.committed:1") as (tus, process):
            assert tus.offset(where) == 1_100_000
            with pytest.raises(httpx.RemoteProtocolError):
                tus.patch(where, 1_100_000, content[1_100_000:])
            assert process.wait(20) == -signal.SIGKILL
        # Killed again as the file has just been made, unheard.
        with serve("upload.committed:1") as (tus, process):
            assert tus.http.get("/v1/files").json()["data"] == []
            with pytest.raises(httpx.RemoteProtocolError):
                tus.offset(where)
            assert process.wait(20) == -signal.SIGKILL
        with serve() as (tus, process):
            id = tus.http.head(where, headers=VERSION).headers["ropewalk-file-id"]
            assert [file["id"] for file in tus.http.get("/v1/files").json()["data"]] == [id]
            assert tus.http.get(f"/v1/files/{id}/content").content == content
            usage = tus.http.get("/v1/files/usage").json()["workspace"]
            assert (usage["used_bytes"], usage["reserved_bytes"], usage["used_files"], usage["reserved_files"]) == (
                2_300_000,
                0,
                1,
                0,
            )


@contextmanager
def _prepared(folder):
    """A store with a key, and a way to serve it from a process of its own."""
    import asyncio

    key, data = "rw-key-" + "k" * 40, folder / "data"
    os.environ["ROPEWALK_ROOT_KEY"] = ROOT_KEY

    async def prepare():
        store = await Store.open(Settings(data=data))
        caller = await store.local_caller()
        await create_key(store.database, store.vault, caller.workspace_id, "test", secret=key)
        await store.close()

    try:
        asyncio.run(prepare())
    finally:
        del os.environ["ROPEWALK_ROOT_KEY"]

    @contextmanager
    def serve(failpoint: str = ""):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        environment = {**os.environ, "ROPEWALK_ROOT_KEY": ROOT_KEY, "ROPEWALK_FAILPOINT": failpoint}
        command = [sys.executable, "-m", "ropewalk", "serve", "--port", str(port), "--data", str(data)]
        with (folder / "log").open("ab") as log:
            process = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
        try:
            with httpx.Client(base_url=f"http://127.0.0.1:{port}", headers={"x-api-key": key}, timeout=30) as http:
                late = time.monotonic() + 30
                while True:
                    try:
                        http.get("/health")
                        break
                    except httpx.TransportError:
                        assert process.poll() is None, (folder / "log").read_text()
                        assert time.monotonic() < late, (folder / "log").read_text()
                        time.sleep(0.05)
                yield Tus(http), process
        finally:
            process.kill()
            process.wait()

    yield serve


async def _limit(server, workspace_id: str, size: int) -> None:
    async with server.store.database.writing() as connection:
        await quotas.set_limit(connection, "workspace", workspace_id, size, None)


def _rows(server, where: str) -> tuple[int, int]:
    """Rows of the upload, and of its parts."""
    id = where.rpartition("/")[2]

    async def look():
        async with server.store.database.reading() as connection:
            counts = [
                select(func.count()).select_from(resumables).where(resumables.c.id == id),
                select(func.count()).select_from(parts).where(parts.c.resumable_id == id),
            ]
            return tuple([(await connection.execute(query)).scalar_one() for query in counts])

    return server.run(look())


def _holds(folder, content: bytes) -> bool:
    return any(content in path.read_bytes() for path in folder.rglob("*") if path.is_file())
