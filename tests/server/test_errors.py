"""Every error walks through the one handler: as its envelope, with its id, and as the exception that the official client knows."""

import inspect
import json
import math
import socket

import anthropic
import httpx
import pytest
from starlette.routing import Route

from ropewalk import errors
from ropewalk.server import logs

EXPLAINED = "what went wrong in these words"
# Classes whose constructor takes more than a message.
MADE = {
    errors.CardError: lambda: errors.CardError(EXPLAINED, 1),
    errors.MailFailed: lambda: errors.MailFailed(EXPLAINED, True),
    errors.NotShipped: lambda: errors.NotShipped(EXPLAINED, "replay"),
    errors.MissingExtra: lambda: errors.MissingExtra("thing", "extra", EXPLAINED),
    errors.RateLimited: lambda: errors.RateLimited(EXPLAINED, 1.5),
    errors.SandboxFailed: lambda: errors.SandboxFailed(EXPLAINED, "time"),
    errors.ResumeFailed: lambda: errors.ResumeFailed(EXPLAINED, 400),
    errors.UnreadableBody: lambda: errors.UnreadableBody(EXPLAINED, "request_body_timeout"),
}
OURS = [made for _, made in inspect.getmembers(errors, inspect.isclass) if issubclass(made, errors.RopewalkError)]
# On the command line these are what the user gave; over HTTP they are the server's own trouble, and are not told.
NOT_TOLD = (errors.OutputError, errors.MissingExtra)
CLIENTS = {
    400: anthropic.BadRequestError,
    401: anthropic.AuthenticationError,
    403: anthropic.PermissionDeniedError,
    404: anthropic.NotFoundError,
    413: anthropic.APIStatusError,
    429: anthropic.RateLimitError,
    500: anthropic.InternalServerError,
    502: anthropic.InternalServerError,
    504: anthropic.APIStatusError,
    529: anthropic.InternalServerError,
}


@pytest.fixture(scope="module")
def failing(server):
    """The server, with routes of this test's that raise what they are told."""

    async def fail(request):
        name = request.path_params["name"]
        if name == "committed":
            request.state.committed = True
            raise RuntimeError("a secret of the server's")
        if name == "RuntimeError":
            raise RuntimeError("a secret of the server's")
        raise _made(getattr(errors, name))

    route = Route("/v1/raise/{name}", fail)
    server.app.router.routes.insert(0, route)
    yield server
    server.app.router.routes.remove(route)


def _made(kind):
    return MADE.get(kind, lambda: kind(EXPLAINED))()


@pytest.mark.parametrize("kind", OURS, ids=lambda kind: kind.__name__)
def test_every_error_of_ours_has_its_status_and_its_envelope(failing, kind):
    with failing.http() as http:
        answer = http.get(f"/v1/raise/{kind.__name__}")
    told = issubclass(kind, NOT_TOLD) is False and kind.status != 500
    assert answer.status_code == (kind.status if told else 500)
    found = answer.json()
    assert list(found) == ["type", "error", "request_id"]
    assert (found["type"], found["request_id"]) == ("error", answer.headers["request-id"])
    assert found["error"]["type"] == (kind.claude_type if told else "api_error")
    assert (EXPLAINED in found["error"]["message"]) == told
    code = _made(kind).error_code
    assert found["error"].get("details") == ({"error_code": code} if told and code else None)
    wait = getattr(_made(kind), "retry_after", None)
    assert answer.headers.get("retry-after") == (str(math.ceil(wait)) if wait else None)


@pytest.mark.parametrize("kind", OURS, ids=lambda kind: kind.__name__)
def test_the_official_client_raises_its_own_exception(failing, kind):
    with failing.sdk() as client, pytest.raises(anthropic.APIStatusError) as raised:
        client.get(f"/v1/raise/{kind.__name__}", cast_to=object)
    error = raised.value
    assert isinstance(error, CLIENTS[error.status_code])
    assert error.request_id.startswith("req_")
    typed = {
        "storage_quota_exceeded": anthropic.types.StorageQuotaExceededError,
        "file_not_downloadable": anthropic.types.FileNotDownloadableError,
        "file_expired": anthropic.types.FileExpiredError,
    }
    if getattr(kind, "error_code", None) in typed:
        assert type(error) is typed[kind.error_code]


def test_what_went_wrong_inside_is_told_to_the_log_alone(failing, caplog):
    logs.logger.setLevel("INFO")
    with failing.http() as http:
        answer = http.get("/v1/raise/RuntimeError")
        http.get("/health")  # answered after the line of the one before is written
    assert (answer.status_code, "secret" in answer.text) == (500, False)
    told = [logs.Lines().format(r) for r in caplog.records if r.name == "ropewalk" and r.levelname == "ERROR"]
    # The line of a request before this one may be written only now.
    [line] = [line for line in told if json.loads(line)["request_id"] == answer.headers["request-id"]]
    assert json.loads(line)["error"][0]["class"] == "builtins.RuntimeError"
    assert "secret" not in line


def test_what_was_done_although_it_failed_is_not_repeated(failing):
    with failing.http() as http:
        assert http.get("/v1/raise/committed").headers["x-should-retry"] == "false"
        assert "x-should-retry" not in http.get("/v1/raise/RuntimeError").headers


@pytest.mark.parametrize(
    "headers", [{}, {"x-api-key": "wrong"}, {"authorization": "Bearer wrong"}, {"authorization": "Basic eDp5"}]
)
def test_a_key_that_opens_nothing_is_refused_alike_everywhere(server, headers):
    with httpx.Client(base_url=server.url, headers=headers) as http:
        for method, path in [
            ("GET", "/v1/files"),
            ("POST", "/v1/files"),
            ("DELETE", "/v1/files/file_a"),
            ("GET", "/v1/unknown"),
        ]:
            answer = http.request(method, path)
            assert (answer.status_code, answer.json()["error"]["type"]) == (401, "authentication_error")
            assert not {"anthropic-workspace-id", "anthropic-organization-id"} & {*answer.headers}
            assert answer.headers["request-id"].startswith("req_")


def test_both_ways_of_sending_a_key_are_taken(server):
    for headers in (
        {"x-api-key": server.key},
        {"authorization": f"Bearer {server.key}"},
        {"authorization": f"bearer {server.key}"},
    ):
        answer = httpx.get(f"{server.url}/v1/files", headers=headers)
        assert answer.status_code == 200
        assert answer.headers["anthropic-organization-id"].startswith("org_")
        assert answer.headers["anthropic-workspace-id"].startswith("wrkspc_")


def test_a_workspace_is_chosen_by_its_id(server):
    workspace, key = server.workspace("chosen")
    other, _ = server.workspace("not chosen")
    with server.http() as admin, server.http(key) as own:
        for http, id, status in [
            (admin, workspace.id, 200),
            (admin, "wrkspc_unknown", 404),
            (own, workspace.id, 200),
            (own, other.id, 403),
            (own, "wrkspc_unknown", 403),
        ]:
            answer = http.get("/v1/files", headers={"anthropic-workspace-id": id})
            assert answer.status_code == status
            assert answer.headers.get("anthropic-workspace-id") == (workspace.id if status == 200 else None)


@pytest.mark.parametrize("version", ["2023-06-01", "2026-10-21"])
def test_both_versions_of_the_api_are_spoken(server, version):
    with server.http(**{"anthropic-version": version}) as http:
        assert http.get("/v1/files", params={"beta": "true"}).status_code == 200


def test_a_version_that_nobody_knows_is_refused(server):
    with server.http(**{"anthropic-version": "1999-01-01"}) as http:
        for path in ("/v1/files", "/v1/models", "/v1/files/file_a", "/v1/files/file_a/content"):
            assert (http.get(path).status_code, http.get(path).json()["error"]["type"]) == (400, "invalid_request_error")


@pytest.mark.parametrize(
    "path", ["/", "/v1/nothing", "/v1/files/", "/v1/files/a/b/c", "/v1", "/nothing", "/v1/files/%00", "/%ff%fe"]
)
def test_an_unknown_path_is_an_envelope(server, path):
    with server.http() as http:
        answer = http.post(path)
    assert answer.status_code in (404, 405)
    assert answer.json()["type"] == "error"


def test_a_wrong_method_says_which_are_right(server):
    with server.http() as http:
        answer = http.patch("/v1/files")
    assert (answer.status_code, answer.headers["allow"]) == (405, "GET, HEAD, POST")
    assert answer.json()["error"]["type"] == "invalid_request_error"


@pytest.mark.parametrize("id", ["%00", "a%00b", "..%2f..%2fetc", "%ed%a0%80", "x" * 5000, "'; DROP TABLE files;--", "file_é"])
def test_an_id_of_any_kind_is_only_unknown(server, id):
    with server.http() as http:
        for method, path in [("GET", ""), ("DELETE", ""), ("GET", "/content"), ("GET", "/details")]:
            answer = http.request(method, f"/v1/files/{id}{path}")
            assert (answer.status_code, answer.json()["error"]["type"]) == (404, "not_found_error")


def test_what_is_no_http_gets_an_answer_and_no_traceback(server):
    host, port = server.url.removeprefix("http://").split(":")
    for said in (b"nothing of the kind\r\n\r\n", b"GET / HTTP/9.9\r\n\r\n", b"\0" * 100 + b"\r\n\r\n"):
        with socket.create_connection((host, int(port)), timeout=10) as connection:
            connection.sendall(said)
            assert b" 400 " in connection.recv(1000)
    with server.http() as http:
        assert http.get("/health").status_code == 200
