"""What goes beyond the Claude Files API, and that nobody sees it who does not ask."""

import hashlib
from itertools import count

import pytest
from cryptography.hazmat.primitives.serialization import load_pem_public_key

from ropewalk.errors import VerificationFailed
from ropewalk.files.receipts import verify
from ropewalk.tenants.audit import entries

EXTENDED = {"x-ropewalk-extensions": "true"}
names = (f"extensions-{number}" for number in count())


@pytest.fixture
def http(server):
    """A client in a workspace of its own."""
    _, key = server.workspace(next(names))
    with server.http(key) as client:
        yield client


def upload(http, name="a.txt", content=b"abc", **form):
    answer = http.post("/v1/files", files={"file": (name, content, "text/plain")}, data=form)
    assert answer.status_code == 200, answer.text
    return answer.json()["id"]


def test_details_tell_the_digest_the_tags_and_who_shares_the_bytes(http):
    first, second = upload(http, tags=["b", "a"]), upload(http, "other.txt")
    found = http.get(f"/v1/files/{first}/details").json()
    assert found["sha256"] == hashlib.sha256(b"abc").hexdigest()
    assert (found["tags"], found["user_id"], found["expired"], found["shared_with"]) == (["b", "a"], None, False, 1)
    http.delete(f"/v1/files/{second}")
    assert http.get(f"/v1/files/{first}/details").json()["shared_with"] == 0
    assert http.get(f"/v1/files/{second}/details").status_code == 404


def test_a_users_bytes_are_shared_with_no_other_user(server):
    workspace, key = server.workspace(next(names))
    mine = server.new_key(workspace.id, user_id="me")
    with server.http(key) as everybody, server.http(mine) as me:
        upload(everybody)
        id = upload(me)
        assert me.get(f"/v1/files/{id}/details").json()["shared_with"] == 0
        assert everybody.get(f"/v1/files/{id}/details").json()["shared_with"] == 0
        upload(me)
        assert me.get(f"/v1/files/{id}/details").json()["shared_with"] == 1


def test_tags_are_replaced_and_found(http):
    first, second = upload(http, tags=["draft"]), upload(http, "other.txt", tags=["draft"])
    answer = http.put(f"/v1/files/{first}/tags", json={"tags": ["final", "final", "2026"]})
    assert answer.json()["tags"] == ["final", "2026"]
    assert [file["id"] for file in http.get("/v1/files?tag=draft").json()["data"]] == [second]
    assert [file["id"] for file in http.get("/v1/files?tag=final").json()["data"]] == [first]
    assert http.put(f"/v1/files/{first}/tags", json={"tags": []}).json()["tags"] == []


@pytest.mark.parametrize(
    "body",
    ['{"tags": "a"}', '{"tags": [1]}', "[]", "{}", '{"tags": [], "filename": "b"}', '{"tags": [""]}', '{"tags": ["\\u0000"]}'],
)
def test_tags_that_are_none_change_nothing(http, body):
    id = upload(http, tags=["kept"])
    assert http.put(f"/v1/files/{id}/tags", content=body).status_code == 400
    assert http.get(f"/v1/files/{id}/details").json()["tags"] == ["kept"]


@pytest.mark.parametrize("method", ["PATCH", "PUT", "POST"])
def test_a_file_is_never_renamed(http, method):
    id = upload(http)
    assert http.request(method, f"/v1/files/{id}", json={"filename": "b.txt"}).status_code == 405
    assert http.get(f"/v1/files/{id}").json()["filename"] == "a.txt"


def test_many_are_deleted_each_with_its_receipt_or_its_error(http, server):
    with server.http(server.workspace(next(names))[1]) as stranger:
        foreign = upload(stranger)
        mine = [upload(http, content=content) for content in (b"one", b"two")]
        answer = http.post("/v1/files/delete", json={"ids": [*mine, foreign, "file/none", mine[0]]}).json()["data"]
        assert [(found["id"], found["type"]) for found in answer] == [
            (mine[0], "file_deleted"),
            (mine[1], "file_deleted"),
            (foreign, "error"),
            ("file/none", "error"),
        ]
        for found, content in zip(answer, (b"one", b"two")):
            receipt = verify(found["receipt"], server.store.signing_key.public_key())
            assert receipt.sha256 == hashlib.sha256(content).hexdigest()
            assert receipt.is_of(found["id"])
        # A stranger's file is answered like one that never was.
        assert answer[2]["error"]["message"].replace(foreign, "") == answer[3]["error"]["message"].replace("file/none", "")
        assert http.get("/v1/files").json()["data"] == []
        denied = server.run(entries(server.store.database, action="denied", newest=True, limit=2))
        assert [(entry["subject"], entry["outcome"]) for entry in reversed(denied)] == [
            (foreign, "no_such_id"),
            ("/v1/files/delete", "no_such_id"),  # what cannot be an id is a stranger's word
        ]
        assert stranger.get(f"/v1/files/{foreign}").status_code == 200


@pytest.mark.parametrize("body", ['{"ids": []}', '{"ids": [1]}', '{"ids": {}}', "{}", "nonsense"])
def test_a_deletion_that_names_nothing_deletes_nothing(http, body):
    upload(http)
    assert http.post("/v1/files/delete", content=body).status_code == 400
    assert http.post("/v1/files/delete", json={"ids": [f"file_{n}" for n in range(101)]}).status_code == 400
    assert len(http.get("/v1/files").json()["data"]) == 1


def test_a_receipt_verifies_with_the_key_that_the_server_gives(http):
    id = upload(http)
    receipt = http.delete(f"/v1/files/{id}", headers=EXTENDED).json()["receipt"]
    key = http.get("/v1/files/receipt_key").json()
    public = load_pem_public_key(key["public_key"].encode())
    assert (key["algorithm"], key["key_id"]) == ("Ed25519", receipt["key_id"])
    assert verify(receipt, public).is_of(id)
    with pytest.raises(VerificationFailed):
        verify({**receipt, "size_bytes": receipt["size_bytes"] + 1}, public)


def test_usage_is_told_for_the_workspace_the_key_and_the_user(server):
    workspace, key = server.workspace(next(names), limit_bytes=1000, limit_files=10)
    mine = server.new_key(workspace.id, user_id="me")
    with server.http(key) as everybody, server.http(mine) as me:
        upload(everybody, content=b"12345")
        upload(me, content=b"123")
        found = me.get("/v1/files/usage").json()
    none = {"reserved_bytes": 0, "reserved_files": 0, "limit_bytes": None, "limit_files": None}
    assert found == {
        "type": "usage",
        "workspace": {**none, "used_bytes": 8, "used_files": 2, "limit_bytes": 1000, "limit_files": 10},
        "key": {**none, "used_bytes": 3, "used_files": 1},
        "user": {**none, "used_bytes": 3, "used_files": 1},
    }


def test_a_key_that_may_only_read_changes_nothing(server):
    workspace, key = server.workspace(next(names))
    reader = server.new_key(workspace.id, rights={"read"})
    with server.http(key) as http, server.http(reader) as reading:
        id = upload(http)
        assert reading.get(f"/v1/files/{id}/details").status_code == 200
        assert reading.get("/v1/files/usage").status_code == 200
        assert reading.put(f"/v1/files/{id}/tags", json={"tags": ["a"]}).status_code == 403
        assert reading.post("/v1/files/delete", json={"ids": [id]}).status_code == 403
        tus = {"tus-resumable": "1.0.0", "upload-length": "1"}
        assert reading.post("/v1/files/resumable", headers=tus).status_code == 403


def test_a_plain_client_sees_none_of_it(http):
    id = upload(http, tags=["a"])
    known = {"id", "type", "filename", "mime_type", "size_bytes", "created_at", "downloadable", "expires_at"}
    begun = http.post("/v1/files/resumable", headers={"tus-resumable": "1.0.0", "upload-length": "5"})
    listed = http.get("/v1/files")
    assert begun.status_code == 201
    assert [set(file) for file in listed.json()["data"]] == [known]
    assert set(listed.json()) == {"data", "next_page"}
    shown = http.get(f"/v1/files/{id}")
    assert set(shown.json()) == known
    for answer in (listed, shown):
        assert not [name for name in answer.headers if name.startswith(("tus-", "upload-", "ropewalk-"))]
    assert set(http.get(f"/v1/files/{id}", headers=EXTENDED).json()) == known | {"sha256", "tags", "user_id", "expired"}
    assert set(http.delete(f"/v1/files/{id}").json()) == {"id", "type"}
