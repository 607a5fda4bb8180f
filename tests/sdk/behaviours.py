"""What a user of the official Python SDK sees, whichever version is installed: bytes, names, pages, errors, expiry, workspaces.

Run by `make test-sdk` in an environment per version; our own suite runs a part of it with the version of the dev extra.
"""

from __future__ import annotations

import asyncio
import hashlib
import http.client
import io
import json
import os
import random
import threading
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import anthropic
import pytest
from anthropic import Anthropic, AsyncAnthropic

BETA = "files-api-2025-04-14"
VERSION = tuple(int(part) for part in anthropic.__version__.split("."))
OLD = VERSION < (1, 0)  # files live under client.beta alone, with the beta header and its list shape
CODES = VERSION >= (2, 0)  # errors carry error_code and have classes of their own
GA_KEYS = {"id", "type", "filename", "mime_type", "size_bytes", "created_at", "downloadable", "expires_at"}
TooLarge = getattr(anthropic, "ContentTooLargeError", anthropic.RequestTooLargeError)
Connect = Callable[..., Anthropic]

ga_only = pytest.mark.skipif(OLD, reason="this version has only the beta shape")
old_only = pytest.mark.skipif(not OLD, reason="this version's list has the GA shape")


def files(client: Anthropic) -> Any:
    return client.beta.files if OLD else client.files


def noise(size: int, seed: int = 0) -> bytes:
    return random.Random(seed).randbytes(size)


def download(client: Anthropic, file_id: str) -> bytes:
    content: bytes = files(client).download(file_id).read()
    return content


def code(error: anthropic.APIStatusError) -> str | None:
    """details.error_code, which versions before 2 leave in the body."""
    found: str | None = ((error.body or {})["error"].get("details") or {}).get("error_code")  # type: ignore[index, call-overload]
    if CODES:
        assert error.error_code == found
    return found


def test_bytes_come_back(client):
    data = noise(300_001)
    file = files(client).upload(file=data)
    assert (file.type, file.size_bytes) == ("file", len(data))
    assert file.id.startswith("file_")
    assert download(client, file.id) == data


@pytest.mark.skipif(VERSION < (1, 9), reason="until 1.9 the SDK names such a part itself")
def test_bytes_without_a_name_are_called_unnamed_by_their_type(client):
    assert files(client).upload(file=b"%PDF-1.7\n%nothing else").filename == "unnamed.pdf"


def test_a_path_keeps_its_name_and_type(client, tmp_path):
    path = tmp_path / "lease.pdf"
    path.write_bytes(b"%PDF-1.7\n" + noise(10_000))
    file = files(client).upload(file=path)
    assert (file.filename, file.mime_type, file.size_bytes) == ("lease.pdf", "application/pdf", 10_009)
    assert download(client, file.id) == path.read_bytes()


def test_an_open_file_is_streamed(client, tmp_path):
    path = tmp_path / "big.bin"
    path.write_bytes(noise(12_000_000))
    with path.open("rb") as stream:
        file = files(client).upload(file=stream)
    digest = hashlib.sha256()
    got = files(client).with_streaming_response.download(file.id)
    with got as response:
        for chunk in response.iter_bytes():
            digest.update(chunk)
    assert digest.hexdigest() == hashlib.sha256(path.read_bytes()).hexdigest()


def test_a_name_and_a_type_that_are_given_are_kept(client):
    file = files(client).upload(file=("Grüße 你好 'n.txt", io.BytesIO(b"hello"), "text/plain"))
    assert (file.filename, file.mime_type) == ("Grüße 你好 'n.txt", "text/plain")
    response = files(client).with_raw_response.download(file.id)
    assert response.headers["content-type"].startswith("text/plain")
    assert "filename*=UTF-8''Gr%C3%BC%C3%9Fe%20" in response.headers["content-disposition"]


def test_an_empty_file_is_a_file(client):
    file = files(client).upload(file=("empty.txt", b"", "text/plain"))
    assert file.size_bytes == 0
    assert download(client, file.id) == b""


def test_the_async_client_does_the_same(seeder, workspace):
    async def go() -> tuple[bytes, list[str], str]:
        async with AsyncAnthropic(base_url=seeder.server, api_key=workspace["secret"], max_retries=0) as client:
            namespace: Any = files(client)  # type: ignore[arg-type]
            both = await asyncio.gather(*(namespace.upload(file=(f"{n}.txt", b"abc", "text/plain")) for n in range(2)))
            content = await (await namespace.download(both[0].id)).read()
            ids = [file.id async for file in namespace.list()]
            gone = await namespace.delete(both[0].id)
        assert sorted(ids) == sorted(file.id for file in both)
        return content, ids, gone.type

    content, ids, gone = asyncio.run(go())
    assert (content, len(ids), gone) == (b"abc", 2, "file_deleted")


def test_metadata_is_what_the_upload_answered(client):
    file = files(client).upload(file=("a.txt", b"abc", "text/plain"))
    again = files(client).retrieve_metadata(file.id)
    assert again == file
    assert again.downloadable is True
    assert abs(again.created_at - datetime.now(again.created_at.tzinfo)) < timedelta(minutes=5)


def test_a_plain_client_sees_the_documented_keys_and_no_others(client):
    file = files(client).upload(file=("a.txt", b"abc", "text/plain"))
    metadata: Any = client.get(f"/v1/files/{file.id}", cast_to=object)
    listing: Any = client.get("/v1/files", cast_to=object)
    assert set(metadata) == GA_KEYS
    assert set(listing) == {"data", "next_page"}
    assert listing["data"] == [metadata]


def test_a_deleted_file_is_gone(client):
    file = files(client).upload(file=("a.txt", b"abc", "text/plain"))
    gone = files(client).delete(file.id)
    assert (gone.id, gone.type) == (file.id, "file_deleted")
    for call in (files(client).retrieve_metadata, files(client).download, files(client).delete):
        with pytest.raises(anthropic.NotFoundError):
            call(file.id)
    assert [found.id for found in files(client).list()] == []


def test_newest_comes_first(client):
    made = [files(client).upload(file=(f"{n}.txt", b"abc", "text/plain")).id for n in range(5)]
    assert [file.id for file in files(client).list(limit=2)] == made[::-1]  # three pages, walked by the SDK
    assert [file.id for file in files(client).list(limit=2).data] == made[:2:-1]


def test_2500_files_are_walked_once_each(seeder, connect):
    many = seeder.ask("many", count=2_500)
    client = connect(many["secret"])
    seen = [file.id for file in files(client).list(limit=1000)]
    assert seen == many["ids"]


@pytest.mark.skipif(VERSION < (2, 0), reason="walked in small pages with one version")
def test_2500_files_are_walked_in_small_pages_too(seeder, connect):
    many = seeder.ask("many", count=2_500)
    assert [file.id for file in files(connect(many["secret"])).list(limit=77)] == many["ids"]


@ga_only
def test_files_are_found_by_their_ids(client):
    made = [files(client).upload(file=(f"{n}.txt", b"abc", "text/plain")).id for n in range(3)]
    found = files(client).list(ids=[made[2], made[0], "file_unknown", made[0]])
    assert {file.id for file in found.data} == {made[0], made[2]}
    assert len(found.data) == 2
    assert found.next_page is None


@ga_only
@pytest.mark.parametrize(
    "arguments",
    [
        {"page": "not-a-cursor"},
        {"page": "page_bm9uZQ"},
        {"limit": 0},
        {"limit": 1001},
        {"ids": ["file_a"], "limit": 5},
        {"ids": [f"file_{n}" for n in range(101)]},
        {"extra_query": {"before_id": "file_a"}},
        {"extra_query": {"after_id": "file_a"}},
    ],
    ids=lambda arguments: "-".join(arguments),
)
def test_a_list_that_the_contract_forbids_is_a_bad_request(client, arguments):
    with pytest.raises(anthropic.BadRequestError) as caught:
        files(client).list(**arguments)
    assert caught.value.body["error"]["type"] == "invalid_request_error"


@old_only
def test_the_old_list_has_ids_at_its_ends_and_no_expiry(client):
    made = [files(client).upload(file=(f"{n}.txt", b"abc", "text/plain")).id for n in range(3)]
    raw = json.loads(files(client).with_raw_response.list(limit=2).text)
    assert set(raw) == {"data", "has_more", "first_id", "last_id"}
    assert (raw["has_more"], raw["first_id"], raw["last_id"]) == (True, made[2], made[1])
    assert set(raw["data"][0]) == GA_KEYS - {"expires_at"}
    assert [file.id for file in files(client).list(limit=5, before_id=made[0]).data] == [made[2], made[1]]
    assert [file.id for file in files(client).list(limit=5, after_id=made[1]).data] == [made[0]]


@ga_only
def test_the_beta_header_brings_the_old_list_back(client):
    made = files(client).upload(file=("a.txt", b"abc", "text/plain")).id
    raw: Any = client.get("/v1/files?limit=1", cast_to=object, options={"headers": {"anthropic-beta": BETA}})
    assert (raw["has_more"], raw["first_id"], raw["last_id"]) == (False, made, made)
    assert set(raw["data"][0]) == GA_KEYS - {"expires_at"}


@ga_only
def test_an_expiry_is_told(client):
    file = files(client).upload(file=("a.txt", b"abc", "text/plain"), expires_in_seconds=3600)
    assert file.expires_at - file.created_at == timedelta(hours=1)
    assert files(client).retrieve_metadata(file.id).expires_at == file.expires_at


@ga_only
@pytest.mark.parametrize("seconds", [0, 3_599, 7_776_001])
def test_an_expiry_outside_an_hour_to_ninety_days_is_a_bad_request(client, seconds):
    with pytest.raises(anthropic.BadRequestError):
        files(client).upload(file=("a.txt", b"abc", "text/plain"), expires_in_seconds=seconds)
    assert files(client).list().data == []


def test_an_expired_file_keeps_its_metadata_alone(seeder, client):
    file = files(client).upload(file=("a.txt", b"abc", "text/plain"))
    seeder.ask("expire", file_id=file.id)
    assert files(client).retrieve_metadata(file.id).id == file.id
    assert [found.id for found in files(client).list()] == [file.id]
    with pytest.raises(anthropic.NotFoundError) as caught:
        files(client).download(file.id)
    assert code(caught.value) == "file_expired"
    if CODES:
        assert type(caught.value) is anthropic.types.FileExpiredError
    files(client).delete(file.id)
    with pytest.raises(anthropic.NotFoundError):
        files(client).retrieve_metadata(file.id)


def test_a_workspace_may_forbid_downloads(seeder, connect):
    client = connect(seeder.workspace(downloads="nobody")["secret"])
    file = files(client).upload(file=("a.txt", b"abc", "text/plain"))
    assert file.downloadable is False
    with pytest.raises(anthropic.BadRequestError) as caught:
        files(client).download(file.id)
    assert code(caught.value) == "file_not_downloadable"
    if CODES:
        assert type(caught.value) is anthropic.types.FileNotDownloadableError


def test_a_full_workspace_says_so(seeder, connect):
    client = connect(seeder.workspace(limit_bytes=1_000)["secret"])
    file = files(client).upload(file=("a.bin", noise(900), "application/octet-stream"))
    with pytest.raises(anthropic.BadRequestError) as caught:
        files(client).upload(file=("b.bin", noise(900, 1), "application/octet-stream"))
    assert code(caught.value) == "storage_quota_exceeded"
    if CODES:
        assert type(caught.value) is anthropic.types.StorageQuotaExceededError
    files(client).delete(file.id)
    assert files(client).upload(file=("b.bin", noise(900, 1), "application/octet-stream")).size_bytes == 900


def test_an_unknown_key_is_refused(connect):
    with pytest.raises(anthropic.AuthenticationError) as caught:
        files(connect("nobody's key")).list()
    assert caught.value.body["error"]["type"] == "authentication_error"
    assert caught.value.request_id.startswith("req_")
    assert "anthropic-workspace-id" not in caught.value.response.headers


def test_a_key_that_may_only_read_cannot_write(seeder, workspace, connect):
    key = seeder.ask("key", workspace_id=workspace["workspace_id"], rights=["read"])
    client = connect(key["secret"])
    assert files(client).list().data == []
    with pytest.raises(anthropic.PermissionDeniedError):
        files(client).upload(file=("a.txt", b"abc", "text/plain"))


def test_too_many_requests_are_told_when_to_come_back(seeder, connect):
    client = connect(seeder.workspace(requests_per_minute=3)["secret"])

    def ask_often():
        for _ in range(8):
            files(client).list()

    with pytest.raises(anthropic.RateLimitError) as caught:
        ask_often()
    assert caught.value.body["error"]["type"] == "rate_limit_error"
    assert 0 < float(caught.value.response.headers["retry-after"]) <= 60
    assert caught.value.response.headers["anthropic-ratelimit-requests-limit"] == "3"
    assert caught.value.response.headers["anthropic-ratelimit-requests-remaining"] == "0"


@pytest.mark.parametrize("name", ["a<b.txt", "a|b.txt", "a?b", "x" * 256])
def test_a_name_that_the_contract_forbids_is_a_bad_request(client, name):
    with pytest.raises(anthropic.BadRequestError):
        files(client).upload(file=(name, b"abc", "text/plain"))


def test_every_answer_has_a_request_id_and_says_whose_it_is(client, workspace):
    file = files(client).upload(file=("a.txt", b"abc", "text/plain"))
    assert file._request_id.startswith("req_")
    headers = files(client).with_raw_response.retrieve_metadata(file.id).headers
    assert headers["anthropic-workspace-id"] == workspace["workspace_id"]
    assert headers["anthropic-organization-id"] == workspace["organization_id"]
    with pytest.raises(anthropic.NotFoundError) as caught:
        files(client).retrieve_metadata("file_unknown")
    assert caught.value.request_id == caught.value.body["request_id"]
    assert caught.value.request_id.startswith("req_")


def test_a_foreign_file_answers_like_a_missing_one(seeder, client, connect):
    file = files(client).upload(file=("a.txt", b"abc", "text/plain"))
    other = connect(seeder.workspace()["secret"])
    for verb in ("retrieve_metadata", "download", "delete"):
        bodies = []
        for wanted in (file.id, "file_" + "0" * len(file.id[5:])):
            with pytest.raises(anthropic.NotFoundError) as caught:
                getattr(files(other), verb)(wanted)
            bodies.append(json.dumps(caught.value.body).replace(wanted, "ID").replace(caught.value.request_id, "REQUEST"))
        assert bodies[0] == bodies[1]
    assert files(other).list().data == []
    if not OLD:
        assert files(other).list(ids=[file.id]).data == []
    assert download(client, file.id) == b"abc"


def test_a_workspace_that_the_key_is_not_of_is_refused(seeder, client, workspace):
    files(client).list(extra_headers={"anthropic-workspace-id": workspace["workspace_id"]})
    with pytest.raises(anthropic.APIStatusError) as caught:
        files(client).list(extra_headers={"anthropic-workspace-id": seeder.workspace()["workspace_id"]})
    assert caught.value.status_code in (400, 403)


def test_an_upload_that_the_sdk_repeats_is_one_file(client):
    first = files(client).upload(file=("a.txt", b"abc", "text/plain"))
    again = files(client).upload(file=("a.txt", b"abc", "text/plain"), extra_headers={"x-stainless-retry-count": "1"})
    meant = files(client).upload(file=("a.txt", b"abc", "text/plain"))
    assert again.id == first.id
    assert meant.id != first.id


@contextmanager
def losing_answers(server: str, lost: int) -> Iterator[str]:
    """A proxy before the server that hangs up instead of handing on the first answers, as a broken network would."""
    address, left = server.removeprefix("http://"), [lost]

    class Proxy(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["content-length"]))
            onward = http.client.HTTPConnection(address, timeout=60)
            onward.request("POST", self.path, body, dict(self.headers))
            answer = onward.getresponse()
            content = answer.read()
            onward.close()
            self.close_connection = True
            if left[0]:
                left[0] -= 1
                return
            self.send_response(answer.status)
            self.send_header("content-type", "application/json")
            self.send_header("content-length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *arguments: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Proxy) as proxy:
        thread = threading.Thread(target=proxy.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        yield f"http://127.0.0.1:{proxy.server_port}"
        proxy.shutdown()
        thread.join()


def test_an_upload_whose_answers_are_lost_is_sent_again_and_is_one_file(seeder, workspace, client):
    with losing_answers(seeder.server, lost=2) as url, Anthropic(base_url=url, api_key=workspace["secret"]) as patient:
        file = files(patient).upload(file=("a.txt", b"abc", "text/plain"))
    assert [found.id for found in files(client).list()] == [file.id]


def test_the_key_is_taken_from_either_header(seeder, workspace):
    for headers in ({"x-api-key": workspace["secret"]}, {"authorization": f"Bearer {workspace['secret']}"}):
        for version in ("2023-06-01", "2026-10-21"):
            request = urllib.request.Request(f"{seeder.server}/v1/files", headers=headers | {"anthropic-version": version})
            with urllib.request.urlopen(request) as response:
                assert json.load(response) == {"data": [], "next_page": None}


def test_models_are_those_of_the_registry(seeder, client):
    seeder.ask("model", name="ours-1")
    assert "ours-1" in [model.id for model in client.models.list(limit=1)]
    model = client.models.retrieve("ours-1")
    assert (model.id, model.type) == ("ours-1", "model")
    with pytest.raises(anthropic.NotFoundError):
        client.models.retrieve("nobody-knows")


class Endless(io.RawIOBase):
    """So many bytes that are never in memory at once: one block over and over, each beginning with its number."""

    def __init__(self, size: int) -> None:
        self.size, self.at, self.block = size, 0, noise(1 << 20)

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self.at = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self.at, os.SEEK_END: self.size}[whence]
        return self.at

    def tell(self) -> int:
        return self.at

    def readinto(self, buffer: Any) -> int:
        number, within = divmod(self.at, 1 << 20)
        block = number.to_bytes(8, "big") + self.block[8:]
        piece = block[within : within + min(len(buffer), self.size - self.at)]
        buffer[: len(piece)] = piece
        self.at += len(piece)
        return len(piece)


def digest(blocks: Iterator[bytes]) -> str:
    found = hashlib.sha256()
    for block in blocks:
        found.update(block)
    return found.hexdigest()


def test_500_mb_go_up_and_come_down_whole(client):
    size = 500_000_000
    file = files(client).upload(file=("huge.bin", io.BufferedReader(Endless(size)), "application/octet-stream"), timeout=600)
    assert file.size_bytes == size
    source = io.BufferedReader(Endless(size))
    with files(client).with_streaming_response.download(file.id, timeout=600) as response:
        got = digest(response.iter_bytes())
    assert got == digest(iter(lambda: source.read(1 << 20), b""))
    files(client).delete(file.id)


def test_a_byte_more_than_500_mb_is_too_large(client):
    stream = io.BufferedReader(Endless(500_000_001))
    with pytest.raises(TooLarge) as caught:
        files(client).upload(file=("huge.bin", stream, "application/octet-stream"), timeout=600)
    assert caught.value.body["error"]["type"] == "request_too_large"
    assert caught.value.request_id.startswith("req_")
    assert files(client).list().data == []
