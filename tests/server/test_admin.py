"""Administration over HTTP: the official client drives what the Admin API has, a plain one what goes beyond it."""

import json
import re
import time
from contextlib import ExitStack

import anthropic
import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ropewalk.server.admin import routes
from ropewalk.tenants import audit

ORGANIZATIONS = "/v1/organizations"


@pytest.fixture
def admin(server):
    with server.http() as client:
        yield client


@pytest.fixture
def sdk(server):
    """The official client with a key; closed after the test."""
    with ExitStack() as stack:
        yield lambda key=None: stack.enter_context(server.sdk(key))


def make_key(admin, **given):
    response = admin.post(f"{ORGANIZATIONS}/api_keys", json={"name": "test", "workspace_id": None, **given})
    assert response.status_code == 200, response.text
    return response.json()


def denied(admin, count, **asked):
    """The refusals in the log, newest first, once there are so many: they are written when they have been answered."""
    end = time.monotonic() + 20
    while True:
        asked = {"action": "denied", "limit": 1000, **asked}
        found = admin.get(f"{ORGANIZATIONS}/audit", params=asked).json()["data"]
        if len(found) >= count or time.monotonic() > end:
            return found
        time.sleep(0.05)


def refused(response, status, told):
    assert response.status_code == status, response.text
    assert told in response.json()["error"]["message"]


def test_the_official_client_makes_finds_changes_and_archives_a_workspace(server, sdk):
    client = sdk().organization.workspaces
    made = client.create(name="sdk")
    assert made.id.startswith("wrkspc_")
    assert client.retrieve(made.id) == made
    changed = client.update(made.id, name="renamed")
    assert (changed.id, changed.name) == (made.id, "renamed")
    assert [one.id for one in client.list(ids=[made.id])] == [made.id]
    archived = client.archive(made.id)
    assert archived.archived_at >= made.created_at
    assert list(client.list(ids=[made.id])) == []
    assert [one.id for one in client.list(ids=[made.id], include_archived=True)] == [made.id]
    with pytest.raises(anthropic.NotFoundError):
        client.retrieve("wrkspc_none")


def test_the_official_client_walks_through_pages_in_both_directions(server, sdk):
    client = sdk().organization.workspaces
    made = [client.create(name=f"page {number}").id for number in range(7)]
    assert [one.id for one in client.list(limit=3) if one.id in made] == made[::-1]
    first = client.list(limit=3, after_id=made[4])
    assert [one.id for one in first.data] == [made[3], made[2], made[1]]
    back = client.list(limit=2, before_id=made[1])
    assert [one.id for one in back.data] == [made[3], made[2]]
    assert back.has_more
    names = [one.name for one in client.list(limit=1000, include_default=False)]
    assert "default" not in names
    assert "default" in [one.name for one in client.list(limit=1000)]


def test_the_official_client_finds_and_revokes_a_key(server, sdk, admin):
    workspace, _ = server.workspace("keys by sdk")
    made = make_key(admin, workspace_id=workspace.id, name="laptop", user_id="ann")
    client = sdk().organization
    found = client.api_keys.retrieve(made["id"])
    assert (found.status, found.scope.workspace_id, found.principal.user_id) == ("active", workspace.id, "ann")
    assert found.partial_key_hint.endswith(made["key"][-4:])
    assert made["key"] not in found.to_json()
    assert next(key.id for key in client.api_keys.list(workspace_id=workspace.id, status="active")) == made["id"]
    user = sdk(made["key"])
    user.files.list()
    assert client.api_keys.update(made["id"], name="old laptop", status="inactive").status == "archived"
    with pytest.raises(anthropic.AuthenticationError):
        user.files.list()
    with pytest.raises(anthropic.BadRequestError, match="for good"):
        client.api_keys.update(made["id"], status="active")
    assert client.api_keys.retrieve(made["id"]).name == "old laptop"


def test_the_organisation_tells_its_name(server, sdk):
    me = sdk().organization.retrieve()
    assert me.id.startswith("org_")
    assert me.name == "default"


def test_an_archived_workspace_refuses_its_keys_and_every_workspaces_keys(server, sdk, admin):
    workspace, key = server.workspace("to archive")
    sdk(key).files.upload(file=b"kept")
    assert admin.post(f"{ORGANIZATIONS}/workspaces/{workspace.id}/archive").status_code == 200
    with pytest.raises(anthropic.AuthenticationError):
        sdk(key).files.list()
    with server.http(**{"anthropic-workspace-id": workspace.id}) as client:
        archived = client.get("/v1/files")
    with server.http(**{"anthropic-workspace-id": "wrkspc_none"}) as client:
        missing = client.get("/v1/files")
    refused(archived, 404, f"Workspace `{workspace.id}` not found.")
    refused(missing, 404, "Workspace `wrkspc_none` not found.")


def test_limits_are_set_seen_and_kept(server, sdk, admin):
    workspace, key = server.workspace("limited")
    response = admin.post(f"{ORGANIZATIONS}/limits", json={"scope": "workspace", "id": workspace.id, "limit_bytes": 10})
    assert response.json()["limit_bytes"] == 10
    sdk(key).files.upload(file=b"123456")
    with pytest.raises(anthropic.BadRequestError) as full:
        sdk(key).files.upload(file=b"1234567")
    assert full.value.body["error"]["details"]["error_code"] == "storage_quota_exceeded"
    seen = admin.get(f"{ORGANIZATIONS}/usage", params={"scope": "workspace", "id": workspace.id}).json()["data"]
    assert [(one["used_bytes"], one["used_files"], one["limit_bytes"], one["limit_files"]) for one in seen] == [
        (6, 1, 10, None)
    ]
    # Taking one limit away leaves the other.
    admin.post(f"{ORGANIZATIONS}/limits", json={"scope": "workspace", "id": workspace.id, "limit_files": 1})
    admin.post(f"{ORGANIZATIONS}/limits", json={"scope": "workspace", "id": workspace.id, "limit_bytes": None})
    with pytest.raises(anthropic.BadRequestError, match="may hold 1 files"):
        sdk(key).files.upload(file=b"1")


def test_a_user_and_a_key_have_limits_of_their_own(server, sdk, admin):
    workspace, _ = server.workspace("people")
    ann = make_key(admin, workspace_id=workspace.id, user_id="ann")
    ben = make_key(admin, workspace_id=workspace.id, user_id="ben")
    admin.post(f"{ORGANIZATIONS}/limits", json={"scope": "user", "id": f"{workspace.id}/ann", "limit_bytes": 3})
    admin.post(f"{ORGANIZATIONS}/limits", json={"scope": "key", "id": ben["id"], "limit_files": 0})
    sdk(ann["key"]).files.upload(file=b"123")
    for secret in (ann["key"], ben["key"]):
        with pytest.raises(anthropic.BadRequestError):
            sdk(secret).files.upload(file=b"1")
    largest = admin.get(f"{ORGANIZATIONS}/usage", params={"scope": "user", "limit": 1000}).json()["data"]
    assert [one["used_bytes"] for one in largest if one["id"] == f"{workspace.id}/ann"] == [3]
    assert [one["used_bytes"] for one in largest] == sorted((one["used_bytes"] for one in largest), reverse=True)


def test_new_workspaces_begin_with_the_limits_set_for_them(start):
    with start() as server, server.http() as admin:
        assert admin.post(f"{ORGANIZATIONS}/limits", json={"scope": "new_workspaces", "limit_files": 3}).status_code == 200
        made = admin.post(f"{ORGANIZATIONS}/workspaces", json={"name": "a", "limit_bytes": 5}).json()
        found = admin.get(f"{ORGANIZATIONS}/usage", params={"scope": "workspace", "id": made["id"]}).json()["data"][0]
        assert (found["limit_bytes"], found["limit_files"]) == (5, 3)
        usual = admin.get(f"{ORGANIZATIONS}/usage", params={"scope": "new_workspaces"}).json()["data"][0]
        assert (usual["limit_bytes"], usual["limit_files"]) == (None, 3)
        every = admin.get(f"{ORGANIZATIONS}/usage", params={"scope": "workspace"}).json()["data"]
        assert [one["id"] for one in every] == [made["id"]]


def test_a_workspace_has_its_own_request_rate(server, admin):
    workspace, key = server.workspace("slow", requests_per_minute=2)
    with server.http(key) as client:
        answers = [client.get("/v1/files") for _ in range(3)]
        assert [answer.status_code for answer in answers] == [200, 200, 429]
        assert [answer.headers["anthropic-ratelimit-requests-remaining"] for answer in answers] == ["1", "0", "0"]
        assert 1 <= int(answers[2].headers["retry-after"]) <= 30
        assert answers[2].json()["error"]["type"] == "rate_limit_error"
        admin.post(f"{ORGANIZATIONS}/workspaces/{workspace.id}", json={"requests_per_minute": None})
        freed = client.get("/v1/files")
    assert freed.status_code == 200
    assert "anthropic-ratelimit-requests-limit" not in freed.headers


@pytest.mark.parametrize(
    ("method", "path", "body", "told"),
    [
        ("POST", "/workspaces", {}, "name: it is missing"),
        ("POST", "/workspaces", {"name": 7}, "name: 7 is not a setting"),
        ("POST", "/workspaces", {"name": "x", "display_color": "#fff"}, "'display_color' is nothing that can be set here"),
        ("POST", "/workspaces", {"name": "x", "limit_bytes": -1}, "limit_bytes: -1 is no limit"),
        ("POST", "/workspaces", {"name": "a\0b"}, "name: 'a\\x00b' cannot be one"),
        ("POST", "/workspaces", {"name": "default"}, "is taken"),
        ("GET", "/workspaces?limit=0", None, "limit: '0'"),
        ("GET", "/workspaces?include_archived=maybe", None, "neither true nor false"),
        ("GET", "/workspaces?after_id=%00", None, "cannot be one"),
        ("GET", "/workspaces?after_id=wrkspc_none", None, "is no id in this list"),
        ("GET", "/workspaces?" + "&".join(f"ids[]={n}" for n in range(101)), None, "at most 100"),
        ("POST", "/api_keys", {"name": "x"}, "workspace_id: it is missing"),
        ("POST", "/api_keys", {"workspace_id": None}, "name: None is no name"),
        ("POST", "/api_keys", {"name": "x", "workspace_id": 5}, "workspace_id: 5 is no id"),
        ("POST", "/api_keys", {"name": "x", "workspace_id": None, "rights": "read"}, "is no list of texts"),
        ("POST", "/api_keys", {"name": "x", "workspace_id": None, "expires_in_seconds": 0}, "expires_in_seconds: 0 is none"),
        ("GET", "/api_keys?status=gone", None, "'gone' is no status"),
        ("GET", "/usage?scope=planet", None, "'planet' is none"),
        ("POST", "/limits", {"scope": "workspace"}, "the limits of a workspace need its id"),
        ("POST", "/limits", {"scope": "user", "id": "ann"}, "expected WORKSPACE/USER"),
        ("POST", "/limits", {"scope": 5}, "scope: 5 is none"),
        ("POST", "/limits", {"scope": "organization", "limit_files": True}, "limit_files: True is no limit"),
        ("GET", "/audit?before=x", None, "is no sequence number"),
    ],
)
def test_what_cannot_be_done_is_named(admin, method, path, body, told):
    refused(admin.request(method, ORGANIZATIONS + path, json=body), 400, told)


def test_every_route_is_for_admins_only_and_tells_others_nothing(server):
    workspace, key = server.workspace("not an admin")
    with server.http(key) as client:
        for route in routes:
            for method in route.methods - {"HEAD"}:
                told = []
                for id in (workspace.id, "none"):
                    path = route.path.format(workspace_id=id, api_key_id=id)
                    answer = client.request(method, path, content=b"not even JSON" if method == "POST" else None)
                    refused(answer, 403, "needs the right 'admin'")
                    told.append(answer.json()["error"])
                assert told[0] == told[1]


def test_the_audit_log_tells_what_was_done_and_never_a_files_name(server, sdk, admin):
    workspace, key = server.workspace("audited")
    other, _ = server.workspace("bystander")
    client = sdk(key)
    file = client.files.upload(file=("canary-name.txt", b"canary content", "text/plain"))
    client.files.download(file.id)
    client.files.delete(file.id)
    with pytest.raises(anthropic.NotFoundError):
        client.files.retrieve_metadata(file.id)
    with pytest.raises(anthropic.PermissionDeniedError):
        client.organization.workspaces.list()
    with pytest.raises(anthropic.AuthenticationError):
        sdk("rw-key-canary-secret").files.list()
    with server.http(key) as plain:
        plain.get("/v1/files/canary-name.txt")
        plain.get("/v1/files/canary-name.txt/content")
    assert len(denied(admin, 4, workspace_id=workspace.id)) == 4
    admin.post(f"{ORGANIZATIONS}/workspaces/{workspace.id}/archive")

    found = admin.get(f"{ORGANIZATIONS}/audit", params={"workspace_id": workspace.id, "limit": 1000}).json()
    told = [(entry["action"], entry["outcome"], entry["subject"]) for entry in found["data"][::-1]]
    assert [one for one in told if one[0] != "key_created"] == [
        ("workspace_created", "ok", workspace.id),
        ("file_uploaded", "ok", file.id),
        ("file_downloaded", "ok", file.id),
        ("file_deleted", "ok", file.id),
        ("denied", "no_such_id", file.id),
        ("denied", "missing_right", "/v1/organizations/workspaces"),
        ("denied", "no_such_id", "/v1/files/{file_id}"),
        ("denied", "no_such_id", "/v1/files/{file_id}/content"),
        ("workspace_archived", "ok", workspace.id),
    ]
    assert all(entry["request_id"].startswith("req_") for entry in found["data"] if entry["action"].startswith("file_"))
    whole = admin.get(f"{ORGANIZATIONS}/audit", params={"limit": 1000}).text
    assert "wrong_key" in whole
    assert "canary" not in whole
    assert denied(admin, 0, workspace_id=other.id) == []


def test_the_audit_log_is_paged_verified_and_exported(server, admin):
    for number in range(5):
        server.workspace(f"chain {number}")
    first = admin.get(f"{ORGANIZATIONS}/audit", params={"limit": 4}).json()
    rest = admin.get(f"{ORGANIZATIONS}/audit", params={"limit": 4, "before": first["data"][-1]["seq"]}).json()
    sequences = [entry["seq"] for entry in first["data"] + rest["data"]]
    assert first["has_more"]
    assert sequences == list(range(sequences[0], sequences[0] - 8, -1))
    report = admin.get(f"{ORGANIZATIONS}/audit/verify").json()
    assert report["faults"] == []
    assert report["entries"] == report["head"]["sequence"] >= sequences[0]
    lines = [json.loads(line) for line in admin.get(f"{ORGANIZATIONS}/audit/export").text.splitlines()]
    exported = audit.verify_export(lines, server.store.signing_key.public_key())
    assert (exported.entries, exported.faults) == (report["entries"], ())


def test_refusals_beyond_so_many_a_minute_are_counted(start):
    with start() as server, server.http() as admin:
        clock = [0.0]
        server.app.state.denials._limits._clock = lambda: clock[0]
        with httpx.Client(base_url=server.url, headers={"x-api-key": "wrong"}) as stranger:
            for _ in range(70):
                assert stranger.get("/v1/files").status_code == 401
            assert len(denied(admin, 60)) == 60
            clock[0] = 60.0
            stranger.get("/v1/files")
        found = denied(admin, 61)
        assert len(found) == 61
        assert [entry["detail"] for entry in found[:2]] == [{"not_written_before": 10}, {}]


def test_refusals_on_pages_are_in_the_log_too(server, admin):
    workspace, key = server.workspace("pages refused")
    with httpx.Client(base_url=server.url, headers={"origin": server.url}) as browser:
        token = re.search(r'name="csrf" value="([^"]+)"', browser.get("/login").text)[1]
        assert browser.post("/login", data={"csrf": token, "key": key}).status_code == 303
        assert browser.get("/files/file_000000000000000000000000").status_code == 404
        assert browser.get("/files/canary-name.txt").status_code == 404
    found = denied(admin, 2, workspace_id=workspace.id)
    assert [(entry["outcome"], entry["subject"]) for entry in found] == [
        ("no_such_id", "/files/{id}"),
        ("no_such_id", "file_000000000000000000000000"),
    ]


TEXTS = st.one_of(st.text(max_size=20), st.sampled_from(["\ud800", "a\0b", "../..", "x" * 2000, "default", "wrkspc_1"]))
VALUES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.sampled_from([2**62, 2**63, -1, 0]),
    st.floats(allow_nan=False, allow_infinity=False),
    TEXTS,
    st.lists(TEXTS, max_size=3),
    st.dictionaries(TEXTS, TEXTS, max_size=2),
)
FIELDS = [
    "name",
    "workspace_id",
    "rights",
    "user_id",
    "expires_in_seconds",
    "status",
    "scope",
    "id",
    "limit_bytes",
    "limit_files",
]
FIELDS += ["requests_per_minute", "downloads", "unknown"]
BODIES = st.one_of(VALUES, st.dictionaries(st.sampled_from(FIELDS), VALUES))
PATHS = [
    "workspaces",
    "workspaces/wrkspc_none",
    "workspaces/%00",
    "api_keys",
    "api_keys/key_none",
    "api_keys/%ED%A0%80",
    "limits",
]


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], database=None)
@given(path=st.sampled_from(PATHS), content=BODIES)
def test_no_body_breaks_administration(admin, path, content):
    response = admin.post(f"{ORGANIZATIONS}/{path}", content=json.dumps(content))
    assert response.status_code in (200, 400, 404), (path, content, response.text)


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], database=None)
@given(
    path=st.sampled_from(["workspaces", "api_keys", "usage", "audit"]),
    name=st.sampled_from(
        [
            "limit",
            "after_id",
            "before_id",
            "ids[]",
            "include_archived",
            "workspace_id",
            "status",
            "scope",
            "id",
            "before",
            "action",
        ]
    ),
    value=st.one_of(
        st.text(max_size=30), st.integers().map(str), st.sampled_from(["user", "key", "\0", "9" * 30, "0" * 20 + "9" * 20, "٣"])
    ),
)
def test_no_query_breaks_administration(admin, path, name, value):
    response = admin.get(f"{ORGANIZATIONS}/{path}", params={name: value.encode("utf-8", "replace").decode("utf-8", "replace")})
    assert response.status_code in (200, 400, 404), (path, name, value, response.text)
