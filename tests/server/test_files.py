"""The Claude Files API, by its official client and by plain requests."""

import gzip
import hashlib
import json
import os
import socket
import threading
import time
from datetime import UTC, datetime, timedelta
from io import BytesIO

import anthropic
import httpx
import pytest
from sqlalchemy import update

from ropewalk.database import now
from ropewalk.files.tables import files
from ropewalk.server.settings import ServerSettings

FILES_BETA = {"anthropic-beta": "files-api-2025-04-14"}
AGENTS_BETA = {"anthropic-beta": "managed-agents-2026-04-01"}
EXTENDED = {"x-ropewalk-extensions": "true"}


def names(answer: httpx.Response) -> list[str]:
    assert answer.status_code == 200, answer.text
    return [file["filename"] for file in answer.json()["data"]]


def upload(http: httpx.Client, name: str = "a.txt", content: bytes = b"abc", **form: str) -> str:
    """The id of a new file."""
    answer = http.post("/v1/files", files={"file": (name, content, "text/plain")}, data=form)
    assert answer.status_code == 200, answer.text
    return answer.json()["id"]


def form(filename: str, content: bytes = b"abc") -> bytes:
    """A form as no client writes it, so that a name arrives as it is."""
    head = f'--B\r\nContent-Disposition: form-data; name="file"; filename="{filename}"\r\nContent-Type: text/plain\r\n\r\n'
    return head.encode() + content + b"\r\n--B--\r\n"


# -- upload and content


@pytest.mark.parametrize("content", [b"", b"abc", os.urandom(3_000_001)], ids=["nothing", "three bytes", "three megabytes"])
def test_what_is_uploaded_comes_back(server, content):
    client = server.sdk()
    file = client.files.upload(file=content)
    assert file.size_bytes == len(content)
    assert client.files.download(file.id).read() == content


def test_bytes_without_a_name_are_named_by_what_they_are(server):
    client = server.sdk()
    assert client.files.upload(file=b"%PDF-1.7\n%\xe2\xe3\xcf\xd3\n").filename == "unnamed.pdf"
    assert client.files.upload(file=b"plain words").filename == "unnamed.txt"


def test_a_path_and_a_stream_and_a_tuple_can_be_uploaded(server, tmp_path):
    path = tmp_path / "notes.md"
    path.write_bytes(b"# Notes")
    client = server.sdk()
    assert client.files.upload(file=path).filename == "notes.md"
    with path.open("rb") as stream:
        assert client.files.upload(file=stream).filename == "notes.md"
    file = client.files.upload(file=("other.bin", BytesIO(b"\0\1\2"), "application/x-thing"))
    assert (file.filename, file.mime_type) == ("other.bin", "application/x-thing")


def test_metadata_has_the_shape_of_the_documentation(server):
    before = datetime.now(UTC)
    with server.http() as http:
        made = http.post("/v1/files", files={"file": ("lease.txt", b"abc", "text/plain")}).json()
        assert http.get(f"/v1/files/{made['id']}").json() == made
    assert list(made) == ["id", "type", "filename", "mime_type", "size_bytes", "created_at", "downloadable", "expires_at"]
    assert made["id"].startswith("file_")
    assert (made["type"], made["size_bytes"], made["expires_at"]) == ("file", 3, None)
    assert len(made["created_at"]) == len("2026-11-22T13:36:11.120435Z")
    assert abs(datetime.fromisoformat(made["created_at"]) - before) < timedelta(seconds=30)


def test_fields_may_stand_before_and_after_the_file(server):
    file, expiry = ("file", ("a.txt", b"abc")), ("expires_in_seconds", (None, b"3600"))
    with server.http() as http:
        for parts in ([file, expiry], [expiry, file]):
            made = http.post("/v1/files", files=parts).json()
            created, expires = (datetime.fromisoformat(made[name]) for name in ("created_at", "expires_at"))
            assert expires - created == timedelta(hours=1)


@pytest.mark.parametrize("seconds", ["3599", "7776001", "-1", "0", "3600.5", "soon", "", "9" * 30, "٣٦٠٠"])
def test_an_expiry_out_of_bounds_is_refused(server, seconds):
    with server.http() as http:
        answer = http.post("/v1/files", files={"file": b"abc"}, data={"expires_in_seconds": seconds})
    assert answer.status_code == 400
    assert "expires_in_seconds" in answer.json()["error"]["message"]


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        ("/etc/passwd", "passwd"),
        ("a/b\\c.txt", "c.txt"),
        ("folder/", "unnamed.txt"),
        ("é.txt", "é.txt"),
        ("x" * 255, "x" * 255),
    ],
)
def test_of_a_path_the_last_component_is_kept(server, given, kept):
    with server.http() as http:
        made = http.post("/v1/files", content=form(given), headers={"content-type": "multipart/form-data; boundary=B"})
        assert made.json()["filename"] == kept


@pytest.mark.parametrize("given", ["a<b", "a>b", "a:b", "a|b", "a?b", "a*b", "x" * 256, "a\tb", "a\0b", "a\x1fb"])
def test_a_name_that_cannot_be_kept_is_refused(server, given):
    with server.http() as http:
        answer = http.post("/v1/files", content=form(given), headers={"content-type": "multipart/form-data; boundary=B"})
    assert (answer.status_code, answer.json()["error"]["type"]) == (400, "invalid_request_error")


def test_a_body_that_is_no_upload_is_refused(server):
    with server.http() as http:
        assert http.post("/v1/files", json={"file": "abc"}).status_code == 400
        assert http.post("/v1/files").status_code == 400
        assert "no such part" in http.post("/v1/files", files={"tags": (None, "a")}).text
        two = http.post("/v1/files", files=[("file", b"a"), ("file", b"b")])
        assert (two.status_code, "two of them" in two.text) == (400, True)
        other = http.post("/v1/files", files={"file": b"a"}, data={"expires_in_second": "3600"})
        assert (other.status_code, "expires_in_second:" in other.text) == (400, True)
        wrong = http.post("/v1/files", files={"file": ("a", b"a", "not a type")})
        assert (wrong.status_code, "no media type" in wrong.text) == (400, True)


def test_a_form_cut_short_leaves_nothing(server):
    _, key = server.workspace("cut short")
    with server.http(key) as http:
        whole = form("a.txt")
        for end in (0, 20, len(whole) - 20, len(whole) - 6):
            answer = http.post("/v1/files", content=whole[:end], headers={"content-type": "multipart/form-data; boundary=B"})
            assert answer.status_code == 400
        assert names(http.get("/v1/files")) == []
        used = http.get("/v1/files/usage").json()["workspace"]
    assert (used["used_bytes"], used["reserved_bytes"], used["used_files"], used["reserved_files"]) == (0, 0, 0, 0)


def test_a_client_that_goes_away_leaves_nothing(server):
    _, key = server.workspace("gone")
    host, port = server.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port))) as connection:
        head = f"POST /v1/files HTTP/1.1\r\nHost: x\r\nx-api-key: {key}\r\nContent-Type: multipart/form-data; boundary=B\r\n"
        connection.sendall(head.encode() + b"Content-Length: 5000000\r\n\r\n" + form("a.txt", b"x" * 2_000_000)[:-9])
    with server.http(key) as http:
        for _ in range(100):
            used = http.get("/v1/files/usage").json()["workspace"]
            if not used["reserved_bytes"]:
                break
            time.sleep(0.05)
        assert (used["used_bytes"], used["reserved_bytes"]) == (0, 0)
        assert names(http.get("/v1/files")) == []


def test_a_compressed_body_is_taken_and_bounded(start):
    with start(max_file_bytes=2_000_000) as found, found.http() as http:
        headers = {"content-type": "multipart/form-data; boundary=B", "content-encoding": "gzip"}
        made = http.post("/v1/files", content=gzip.compress(form("a.txt", b"x" * 1_000_000)), headers=headers).json()
        assert (made["filename"], made["size_bytes"]) == ("a.txt", 1_000_000)
        bomb = http.post("/v1/files", content=gzip.compress(form("a.txt", b"x" * 50_000_000)), headers=headers)
        assert bomb.status_code == 413


@pytest.mark.parametrize(
    ("encoding", "body", "code"),
    [
        ("br", b"", "request_body_encoding_unsupported"),
        ("gzip", b"this is no gzip", "request_body_encoding_invalid"),
        ("gzip", gzip.compress(form("a.txt"))[:-5], "request_body_encoding_invalid"),
        ("gzip", gzip.compress(form("a.txt")) + b"more", "request_body_encoding_invalid"),
    ],
)
def test_an_encoding_that_cannot_be_read_has_its_code(server, encoding, body, code):
    headers = {"content-type": "multipart/form-data; boundary=B", "content-encoding": encoding}
    with server.http() as http:
        answer = http.post("/v1/files", content=body, headers=headers)
    assert (answer.status_code, answer.json()["error"]["details"]["error_code"]) == (400, code)


def test_a_charset_that_nobody_reads_has_its_code(server):
    with server.http() as http:
        answer = http.post(
            "/v1/files", content=b"x", headers={"content-type": "multipart/form-data; boundary=B; charset=utf-16"}
        )
    assert (answer.status_code, answer.json()["error"]["details"]["error_code"]) == (400, "unsupported_charset")


def test_tags_and_digest_show_only_when_asked_for(server):
    with server.http() as http:
        id = upload(http, content=b"tagged", **{"tags[]": "red"})
        assert "tags" not in http.get(f"/v1/files/{id}").json()
        more = http.get(f"/v1/files/{id}", headers=EXTENDED).json()
        assert (more["tags"], more["sha256"]) == (["red"], hashlib.sha256(b"tagged").hexdigest())
        assert names(http.get("/v1/files", params={"tag": "red"})) == ["a.txt"]
        assert names(http.get("/v1/files", params={"tag": "blue"})) == []
        assert http.delete(f"/v1/files/{id}", headers=EXTENDED).json()["receipt"]["sha256"] == more["sha256"]


def test_an_upload_sent_again_after_no_answer_is_one_file(server):
    _, key = server.workspace("again")
    with server.http(key) as http:
        first = http.post("/v1/files", files={"file": ("a.txt", b"abc")}).json()
        again = http.post("/v1/files", files={"file": ("a.txt", b"abc")}, headers={"x-stainless-retry-count": "1"}).json()
        other = http.post("/v1/files", files={"file": ("a.txt", b"abc")}, headers={"x-stainless-retry-count": "0"}).json()
        assert (again["id"], len(names(http.get("/v1/files")))) == (first["id"], 2)
        assert other["id"] != first["id"]


# -- limits


def test_a_file_of_the_largest_size_fits_and_one_byte_more_does_not(start):
    with start(max_file_bytes=300_000) as found:
        client = found.sdk()
        assert client.files.upload(file=b"x" * 300_000, expires_in_seconds=3600).size_bytes == 300_000
        with pytest.raises(anthropic.APIStatusError) as refused:
            client.files.upload(file=b"x" * 300_001)
        assert refused.value.status_code == 413
        with found.http() as http:  # nobody says how much will come
            pieces = (form("a.txt", b"x" * 2_000_000)[at : at + 50_000] for at in range(0, 2_000_000, 50_000))
            answer = http.post("/v1/files", content=pieces, headers={"content-type": "multipart/form-data; boundary=B"})
            assert (answer.status_code, answer.json()["error"]["type"]) == (413, "request_too_large")
            assert names(http.get("/v1/files")) == ["unnamed.txt"]


def test_a_length_too_large_is_refused_before_the_body_comes(start):
    with start(max_file_bytes=300_000) as found:
        host, port = found.url.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port)), timeout=10) as connection:
            connection.sendall(
                f"POST /v1/files HTTP/1.1\r\nHost: x\r\nx-api-key: {found.key}\r\nExpect: 100-continue\r\n"
                "Content-Type: multipart/form-data; boundary=B\r\nContent-Length: 600000000\r\n\r\n".encode()
            )
            assert connection.recv(4096).startswith(b"HTTP/1.1 413 ")


def test_an_upload_to_the_last_byte_of_a_quota_fits(server):
    _, key = server.workspace("edge", limit_bytes=1000)
    client = server.sdk(key)
    assert client.files.upload(file=b"x" * 1000).size_bytes == 1000
    with pytest.raises(anthropic.types.StorageQuotaExceededError):
        client.files.upload(file=b"x")


def test_a_form_without_a_last_line_break_fits_a_quota_too(server):
    _, key = server.workspace("edge without line break", limit_bytes=1000)
    with server.http(key) as http:
        body = form("a.txt", b"x" * 1000).removesuffix(b"\r\n")
        answer = http.post("/v1/files", content=body, headers={"content-type": "multipart/form-data; boundary=B"})
    assert (answer.status_code, answer.json()["size_bytes"]) == (200, 1000)


def test_a_body_that_stops_coming_is_given_up(start):
    with start(settings=ServerSettings(idle_seconds=0.3)) as found:
        host, port = found.url.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port)), timeout=10) as connection:
            head = f"POST /v1/files HTTP/1.1\r\nHost: x\r\nx-api-key: {found.key}\r\nContent-Type: multipart/form-data; boundary=B\r\n"
            connection.sendall(head.encode() + b"Content-Length: 5000\r\n\r\n" + form("a.txt")[:-9])
            answer = connection.recv(4096)
    assert answer.startswith(b"HTTP/1.1 400 ")
    assert json.loads(answer.partition(b"\r\n\r\n")[2])["error"]["details"] == {"error_code": "request_body_timeout"}


def test_a_body_that_trickles_is_given_up(start):
    settings = ServerSettings(idle_seconds=5, slow_seconds=0.3, slowest_bytes_per_second=1_000_000)
    with start(settings=settings) as found, found.http() as http:

        def trickle():
            yield form("a.txt")[:-9]
            for _ in range(15):
                time.sleep(0.05)
                yield b"x"
            yield b"\r\n--B--\r\n"

        answer = http.post("/v1/files", content=trickle(), headers={"content-type": "multipart/form-data; boundary=B"})
    assert answer.json()["error"]["details"] == {"error_code": "request_body_timeout"}


def test_a_workspace_that_asks_too_often_is_told_when_to_come_back(server):
    _, key = server.workspace("often", requests_per_minute=3)
    with server.http(key) as http:
        for left in (2, 1, 0):
            answer = http.get("/v1/files")
            assert answer.headers["anthropic-ratelimit-requests-remaining"] == str(left)
        answer = http.get("/v1/files")
    assert (answer.status_code, answer.json()["error"]["type"]) == (429, "rate_limit_error")
    assert 1 <= int(answer.headers["retry-after"]) <= 20
    assert answer.headers["anthropic-ratelimit-requests-limit"] == "3"
    with pytest.raises(anthropic.RateLimitError):
        server.sdk(key).files.list()


# -- lists


@pytest.fixture(scope="module")
def shelf(server):
    """A workspace with five files, the newest last in name, and its key."""
    _, key = server.workspace("shelf")
    with server.http(key) as http:
        ids = [upload(http, f"{number}.txt") for number in range(5)]
    return key, ids


def test_a_list_is_paged_by_its_cursor(server, shelf):
    key, _ = shelf
    assert [file.filename for file in server.sdk(key).files.list(limit=2)] == ["4.txt", "3.txt", "2.txt", "1.txt", "0.txt"]
    with server.http(key) as http:
        page = http.get("/v1/files", params={"limit": 5}).json()
        assert (list(page), page["next_page"]) == (["data", "next_page"], None)
        first = http.get("/v1/files", params={"limit": 2}).json()
        assert first["next_page"].startswith("page_")


def test_a_page_stays_where_it_was_when_files_come_and_go(server):
    _, key = server.workspace("moving shelf")
    with server.http(key) as http:
        ids = [upload(http, f"{number}.txt") for number in range(5)]
        first = http.get("/v1/files", params={"limit": 2}).json()
        upload(http, "new.txt")
        http.delete(f"/v1/files/{ids[3]}")  # the last of the first page
        assert names(http.get("/v1/files", params={"page": first["next_page"]})) == ["2.txt", "1.txt", "0.txt"]


def test_files_are_found_by_their_ids(server, shelf):
    key, ids = shelf
    with server.http(key) as http:
        page = http.get("/v1/files", params={"ids[]": [ids[1], "file_unknown", ids[3], ids[1], "\0"]})
        assert (names(page), page.json()["next_page"]) == (["3.txt", "1.txt"], None)
        assert http.get("/v1/files", params={"ids[]": [f"file_{n}" for n in range(101)]}).status_code == 400
        assert names(http.get("/v1/files", params={"ids[]": ["file_x"] * 101})) == []
    assert [file.id for file in server.sdk(key).files.list(ids=[ids[0]])] == [ids[0]]


def test_a_list_in_the_older_shape_has_its_keys_and_cursors(server, shelf):
    key, ids = shelf
    with server.http(key, **FILES_BETA) as http:
        page = http.get("/v1/files", params={"limit": 2}).json()
        assert list(page) == ["data", "has_more", "first_id", "last_id"]
        assert (page["has_more"], page["first_id"], page["last_id"]) == (True, ids[4], ids[3])
        assert "expires_at" not in page["data"][0]
        assert names(http.get("/v1/files", params={"limit": 2, "after_id": ids[3]})) == ["2.txt", "1.txt"]
        before = http.get("/v1/files", params={"limit": 2, "before_id": ids[0]})
        assert (names(before), before.json()["has_more"]) == (["2.txt", "1.txt"], True)
        assert http.get("/v1/files", params={"before_id": ids[4]}).json() == {
            "data": [],
            "has_more": False,
            "first_id": None,
            "last_id": None,
        }
        no_type = {"content-type": "multipart/form-data; boundary=B"}
        assert (
            http.post("/v1/files", content=form("a").replace(b"Content-Type", b"X-Other"), headers=no_type).status_code == 400
        )


def test_clients_of_managed_agents_have_the_keys_of_both_shapes(server, shelf):
    key, ids = shelf
    with server.http(key, **AGENTS_BETA) as http:
        page = http.get("/v1/files", params={"limit": 2}).json()
        assert list(page) == ["data", "next_page", "has_more", "first_id", "last_id"]
    with httpx.Client(
        base_url=server.url, headers=[("x-api-key", key), ("anthropic-beta", "other"), *AGENTS_BETA.items()]
    ) as http:
        assert http.get("/v1/files", params={"limit": 2}).json() == page  # a header may stand on several lines
        assert "expires_at" in page["data"][0]
        assert names(http.get("/v1/files", params={"page": page["next_page"], "limit": 1})) == ["2.txt"]
        assert names(http.get("/v1/files", params={"after_id": ids[3], "limit": 1})) == ["2.txt"]


@pytest.mark.parametrize(
    ("asked", "headers"),
    [
        ({"limit": "0"}, {}),
        ({"limit": "1001"}, {}),
        ({"limit": "many"}, {}),
        ({"limit": ""}, {}),
        ({"limit": "5", "ids[]": "file_a"}, {}),
        ({"page": "page_x", "ids[]": "file_a"}, {}),
        ({"page": "page_x"}, {}),
        ({"page": "page"}, {}),
        ({"page": ""}, {}),
        ({"page": "page_" + "é"}, {}),
        ({"before_id": "file_a"}, {}),
        ({"after_id": "file_a"}, {}),
        ({"after_id": "file_unknown"}, FILES_BETA),
        ({"before_id": "\0"}, FILES_BETA),
        ({"page": "page_x"}, FILES_BETA),
        ({"ids[]": "file_a"}, FILES_BETA),
        ({"after_id": "file_a", "before_id": "file_b"}, FILES_BETA),
        ({"tag": ""}, {}),
    ],
)
def test_a_list_that_cannot_be_given_is_refused(server, asked, headers):
    with server.http(**headers) as http:
        answer = http.get("/v1/files", params=asked)
    assert (answer.status_code, answer.json()["error"]["type"]) == (400, "invalid_request_error"), answer.text


def test_a_cursor_is_of_no_use_elsewhere_or_changed(server, shelf):
    key, _ = shelf
    _, other = server.workspace("another shelf")
    with server.http(key) as http:
        cursor = http.get("/v1/files", params={"limit": 2}).json()["next_page"]
        assert http.get("/v1/files", params={"page": cursor}).status_code == 200
        for changed in (cursor[:-2] + "AA", cursor + "=", cursor + "A", cursor.removeprefix("page_"), cursor + "\n"):
            assert http.get("/v1/files", params={"page": changed}).status_code == 400
    with server.http(other) as http:
        assert http.get("/v1/files", params={"page": cursor}).status_code == 400


# -- content


@pytest.fixture(scope="module")
def stored(server):
    """A file of three megabytes, which is three chunks as they are stored: its id and its bytes."""
    content = os.urandom(3_000_000)
    return server.sdk().files.upload(file=("Bär & Co.bin", content, "application/x-test")).id, content


def test_content_comes_with_headers_that_keep_it_from_being_a_page(server, stored):
    id, content = stored
    with server.http() as http:
        answer = http.get(f"/v1/files/{id}/content")
    assert answer.content == content
    assert answer.headers["content-type"] == "application/x-test"
    assert answer.headers["content-length"] == "3000000"
    assert answer.headers["etag"] == f'"{hashlib.sha256(content).hexdigest()}"'
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert answer.headers["cache-control"] == "private, no-cache"
    plain_and_full = "attachment; filename=\"B_r & Co.bin\"; filename*=UTF-8''B%C3%A4r%20%26%20Co.bin"
    assert answer.headers["content-disposition"] == plain_and_full


@pytest.mark.parametrize(
    ("asked", "start", "end"),
    [
        ("bytes=0-0", 0, 1),
        ("bytes=0-", 0, 3_000_000),
        ("bytes=-5", 2_999_995, 3_000_000),
        ("bytes=1048570-1048580", 1_048_570, 1_048_581),
        ("bytes=2999999-9999999", 2_999_999, 3_000_000),
        ("bytes=-99999999", 0, 3_000_000),
    ],
)
def test_one_range_is_given(server, stored, asked, start, end):
    id, content = stored
    with server.http() as http:
        answer = http.get(f"/v1/files/{id}/content", headers={"range": asked})
    assert (answer.status_code, answer.content) == (206, content[start:end])
    assert answer.headers["content-range"] == f"bytes {start}-{end - 1}/3000000"


@pytest.mark.parametrize("asked", ["bytes=3000000-", "bytes=-0", "bytes=9999999-99999999"])
def test_a_range_of_nothing_is_refused(server, stored, asked):
    with server.http() as http:
        answer = http.get(f"/v1/files/{stored[0]}/content", headers={"range": asked})
    assert (answer.status_code, answer.headers["content-range"]) == (416, "bytes */3000000")
    assert answer.json()["error"]["type"] == "invalid_request_error"


@pytest.mark.parametrize("asked", ["bytes=0-1,3-4", "lines=0-1", "bytes=5-1", "bytes=-", "bytes=a-b", ""])
def test_a_range_that_is_none_gives_everything(server, stored, asked):
    with server.http() as http:
        answer = http.get(f"/v1/files/{stored[0]}/content", headers={"range": asked})
    assert (answer.status_code, len(answer.content)) == (200, 3_000_000)


def test_what_the_client_has_already_is_not_sent_again(server, stored):
    id, content = stored
    with server.http() as http:
        etag = http.head(f"/v1/files/{id}/content").headers["etag"]
        for known in (etag, f"W/{etag}", f'"other", {etag}', "*"):
            answer = http.get(f"/v1/files/{id}/content", headers={"if-none-match": known})
            assert (answer.status_code, answer.content, answer.headers["etag"]) == (304, b"", etag)
        changed = http.get(f"/v1/files/{id}/content", headers={"if-none-match": '"other"'})
        assert (changed.status_code, changed.content) == (200, content)
        part = {"range": "bytes=0-9", "if-range": '"other"'}
        assert http.get(f"/v1/files/{id}/content", headers=part).status_code == 200
        part["if-range"] = etag
        assert http.get(f"/v1/files/{id}/content", headers=part).status_code == 206


def test_head_tells_the_size_and_sends_nothing(server, stored):
    with server.http() as http:
        answer = http.head(f"/v1/files/{stored[0]}/content")
        assert (answer.status_code, answer.headers["content-length"], answer.content) == (200, "3000000", b"")
        assert http.head(f"/v1/files/{stored[0]}").status_code == 200
        assert http.head("/v1/files/file_none/content").status_code == 404


def test_damaged_bytes_are_an_error_and_never_sent(server):
    client = server.sdk()
    content = os.urandom(2_500_000)
    file = client.files.upload(file=content)
    [blob] = [path for path in server.data.rglob("*") if path.is_file() and 2_500_000 <= path.stat().st_size < 2_600_000]
    stored = bytearray(blob.read_bytes())
    stored[100] ^= 1
    blob.write_bytes(stored)
    with pytest.raises(anthropic.InternalServerError) as damaged:
        client.files.download(file.id)
    assert "damaged" in damaged.value.message
    stored[100] ^= 1
    stored[2_000_000] ^= 1  # in the second chunk: the answer has begun
    blob.write_bytes(stored)
    with server.http() as http, pytest.raises(httpx.RemoteProtocolError):
        http.get(f"/v1/files/{file.id}/content")
    client.files.delete(file.id)


def test_a_client_that_goes_away_ends_its_download(start):
    with start() as found, found.http() as http:
        id = upload(http, content=os.urandom(40_000_000))
        with http.stream("GET", f"/v1/files/{id}/content") as answer:
            next(answer.iter_raw(1000))
        for _ in range(100):
            shown = http.get("/metrics").text
            if "ropewalk_requests_in_progress 1.0" in shown:  # this one
                break
            time.sleep(0.05)
        [sent] = [
            line for line in shown.splitlines() if line.startswith('ropewalk_sent_bytes_total{route="/v1/files/{file_id}/con')
        ]
        assert float(sent.split()[1]) < 40_000_000


def test_a_workspace_may_keep_its_uploads_from_being_downloaded(server):
    _, key = server.workspace("kept", downloads="nobody")
    client = server.sdk(key)
    file = client.files.upload(file=b"abc")
    assert file.downloadable is False
    with pytest.raises(anthropic.types.FileNotDownloadableError):
        client.files.download(file.id)
    with server.http(key) as http:
        assert http.head(f"/v1/files/{file.id}/content").status_code == 400


# -- delete, and who may what


def test_what_is_deleted_is_gone(server):
    client = server.sdk()
    file = client.files.upload(file=b"abc")
    assert client.files.delete(file.id).model_dump() == {"id": file.id, "type": "file_deleted"}
    for ask in (client.files.delete, client.files.retrieve_metadata, client.files.download):
        with pytest.raises(anthropic.NotFoundError):
            ask(file.id)
    assert list(client.files.list(ids=[file.id])) == []


def test_another_workspaces_file_answers_like_none(server, stored):
    _, key = server.workspace("foreign")
    there, nowhere = stored[0], "file_" + "0" * 24
    with server.http(key) as http:
        for method, path in [("GET", ""), ("DELETE", ""), ("GET", "/content"), ("HEAD", "/content")]:
            one, other = (http.request(method, f"/v1/files/{id}{path}") for id in (there, nowhere))
            assert one.status_code == other.status_code == 404
            shown = [
                (answer.text.replace(answer.headers["request-id"], "").replace(id, ""), sorted(answer.headers))
                for answer, id in ((one, there), (other, nowhere))
            ]
            assert shown[0] == shown[1]
        assert names(http.get("/v1/files", params={"ids[]": [there]})) == []


def test_users_of_a_workspace_see_their_own_files(server):
    workspace, key = server.workspace("house")
    ann = server.new_key(workspace.id, rights=["read", "write", "download"], user_id="ann")
    clerk = server.new_key(workspace.id, rights=["read", "write", "download", "users"])
    with server.http(ann) as http:
        id = upload(http, "ann.txt")
        assert http.get("/v1/files", headers={"anthropic-user-id": "bob"}).status_code == 403
    with server.http(clerk) as http:
        assert names(http.get("/v1/files", headers={"anthropic-user-id": "ann"})) == ["ann.txt"]
        assert names(http.get("/v1/files", headers={"anthropic-user-id": "bob"})) == []
        assert http.get(f"/v1/files/{id}", headers={"anthropic-user-id": "bob"}).status_code == 404
        assert http.get("/v1/files", headers={"anthropic-user-id": "not a user"}).status_code == 400
    with server.http(key) as http:
        assert names(http.get("/v1/files")) == ["ann.txt"]
        assert http.get("/v1/files", headers={"anthropic-user-id": "ann"}).status_code == 403


def test_a_key_does_what_its_rights_say(server):
    workspace, key = server.workspace("rights")
    with server.http(key) as http:
        id = upload(http)
    reader = server.sdk(server.new_key(workspace.id, rights=["read"]))
    assert reader.files.retrieve_metadata(id).filename == "a.txt"
    for ask in (lambda: reader.files.upload(file=b"abc"), lambda: reader.files.delete(id), lambda: reader.files.download(id)):
        with pytest.raises(anthropic.PermissionDeniedError):
            ask()


def test_an_expired_file_is_listed_and_cannot_be_read(server):
    client = server.sdk()
    file = client.files.upload(file=b"abc", expires_in_seconds=3600)

    async def pass_an_hour():
        async with server.store.database.writing() as connection:
            await connection.execute(update(files).where(files.c.id == file.id).values(expires_at=now() - 1))

    server.run(pass_an_hour())
    assert client.files.retrieve_metadata(file.id).id == file.id
    with pytest.raises(anthropic.types.FileExpiredError):
        client.files.download(file.id)
    assert client.files.delete(file.id).id == file.id


def test_uploads_at_once_are_all_there(server):
    _, key = server.workspace("many")
    client = server.sdk(key)
    failed = []

    def send(number):
        try:
            client.files.upload(file=(f"{number}.txt", b"%d" % number * 100_000))
        except Exception as error:
            failed.append(error)

    threads = [threading.Thread(target=send, args=(number,)) for number in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failed == []
    assert sorted(file.filename for file in client.files.list()) == sorted(f"{number}.txt" for number in range(12))


# -- state elsewhere


def test_two_servers_share_a_database_and_a_bucket(start, postgres_url, bucket_url):
    elsewhere = {"database_url": postgres_url, "blobs": bucket_url}
    with start(**elsewhere) as one, start(**elsewhere) as other:
        content = os.urandom(2_500_000)
        file = one.sdk().files.upload(file=("a.bin", content), expires_in_seconds=3600)
        client = other.sdk(one.key)
        assert client.files.retrieve_metadata(file.id) == file
        assert client.files.download(file.id).read() == content
        assert [each.id for each in client.files.list(limit=1)] == [file.id]
        with other.http(one.key) as http:
            assert names(http.get("/v1/files", params={"ids[]": ["\0", file.id], "beta": "true"})) == ["a.bin"]
            for id in ("%00", "a%00b", "%ed%a0%80", "x" * 5000):
                assert http.get(f"/v1/files/{id}").status_code == http.delete(f"/v1/files/{id}").status_code == 404
            assert http.get("/v1/files", params={"tag": "a\0b"}).status_code == 400
            assert http.get("/v1/files", headers={"anthropic-workspace-id": b"\xff"}).status_code == 404
        client.files.delete(file.id)
        with pytest.raises(anthropic.NotFoundError):
            one.sdk().files.download(file.id)
        assert httpx.get(f"{other.url}/v1/files", headers={"x-api-key": b"no key \xff"}).status_code == 401
