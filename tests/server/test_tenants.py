"""Tenants beside each other: every route of the server, asked for what is another's and for what never was, answers alike.

Two who ask: a workspace's key, for what another workspace has; and a user's key, for what another user of the same workspace has.
A route that is in the application and not in the tables below fails a test, so that none is forgotten.
"""

import re
import secrets
import time
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

import httpx
import pytest
from sqlalchemy import select
from starlette.routing import Mount, Route

from ropewalk.compare.tables import prompts
from ropewalk.server.app import ROUTES
from ropewalk.tenants.quotas import set_limit

BYTES = "application/offset+octet-stream"
TUS = {"tus-resumable": "1.0.0"}
OLD = {"anthropic-beta": "files-api-2025-04-14"}
FORM = {"content-type": "application/x-www-form-urlencoded"}


COMPARED = ("candidate", "card", "suite", "prompt", "comparison")


@dataclass
class Things:
    """Ids of what somebody has; or of nothing, in the same form."""

    file: str
    upload: str
    deleted: str  # a file that its owner has deleted
    sequence: int = 1  # of the receipt of that
    workspace: str = ""
    key: str = ""
    user: str = "nobody"
    batch: str = ""  # a batch that has ended, and is not the only one
    job: str = ""  # a job that waits, and is not the only one
    candidate: str = ""
    card: str = ""
    suite: str = ""
    prompt: str = ""
    comparison: str = ""

    def absent(self):
        """The same, of what never was: each id as long as it was, so that answers can be equal to the byte."""
        other = lambda id: id[:8] + "".join(secrets.choice("0123456789") for _ in id[8:])
        return Things(
            *map(other, (self.file, self.upload, self.deleted)),
            self.sequence,
            *map(other, (self.workspace, self.key)),
            **{name: other(getattr(self, name)) for name in ("batch", "job", *COMPARED)},
        )

    def words(self):
        compared = [getattr(self, name) for name in COMPARED]
        return [self.file, self.upload, self.deleted, self.workspace, self.key, self.batch, self.job, *compared]


@dataclass
class Party:
    """Somebody with a key, a browser that is signed in with it, and some things."""

    api: httpx.Client
    browser: httpx.Client
    token: str
    things: Things


def ask(method, path, **more):
    """A request that names a thing by its id."""
    return lambda things, token: (method, path.format(things=things), more)


def ask_json(method, path, make):
    return lambda things, token: (method, path.format(things=things), {"json": make(things)})


def ask_form(path, **fields):
    def request(things, token):
        data = {"csrf": token, **{name: value.format(things=things) for name, value in fields.items()}}
        return "POST", path.format(things=things), {"data": data}

    return request


# Routes that take an id: what to ask, the status for who has the thing, and the status for everybody else.
API = {
    ("GET", "/v1/files"): [
        (ask("GET", "/v1/files?ids[]={things.file}"), 200, 200),
        (ask("GET", "/v1/files?after_id={things.file}", headers=OLD), 200, 400),
        (ask("GET", "/v1/files?before_id={things.file}", headers=OLD), 200, 400),
    ],
    ("GET", "/v1/files/{file_id}"): [(ask("GET", "/v1/files/{things.file}"), 200, 404)],
    ("HEAD", "/v1/files/{file_id}"): [(ask("HEAD", "/v1/files/{things.file}"), 200, 404)],
    ("GET", "/v1/files/{file_id}/content"): [
        (ask("GET", "/v1/files/{things.file}/content"), 200, 404),
        (ask("GET", "/v1/files/{things.file}/content", headers={"range": "bytes=0-1"}), 206, 404),
        (ask("GET", "/v1/files/{things.file}/content", headers={"range": "bytes=9999-"}), 416, 404),
        (ask("GET", "/v1/files/{things.file}/content", headers={"if-none-match": "*"}), 304, 404),
    ],
    ("HEAD", "/v1/files/{file_id}/content"): [(ask("HEAD", "/v1/files/{things.file}/content"), 200, 404)],
    ("GET", "/v1/files/{file_id}/details"): [(ask("GET", "/v1/files/{things.file}/details"), 200, 404)],
    ("HEAD", "/v1/files/{file_id}/details"): [(ask("HEAD", "/v1/files/{things.file}/details"), 200, 404)],
    ("PUT", "/v1/files/{file_id}/tags"): [
        (ask_json("PUT", "/v1/files/{things.file}/tags", lambda t: {"tags": ["a"]}), 200, 404)
    ],
    ("POST", "/v1/files/delete"): [(ask_json("POST", "/v1/files/delete", lambda things: {"ids": [things.file]}), 200, 200)],
    ("DELETE", "/v1/files/{file_id}"): [(ask("DELETE", "/v1/files/{things.file}"), 200, 404)],
    ("HEAD", "/v1/files/resumable/{upload_id}"): [(ask("HEAD", "/v1/files/resumable/{things.upload}", headers=TUS), 200, 404)],
    ("PATCH", "/v1/files/resumable/{upload_id}"): [
        (
            ask(
                "PATCH",
                "/v1/files/resumable/{things.upload}",
                headers={**TUS, "content-type": BYTES, "upload-offset": "0"},
                content=b"ab",
            ),
            204,
            404,
        ),
        (
            ask(
                "PATCH",
                "/v1/files/resumable/{things.upload}",
                headers={**TUS, "content-type": BYTES, "upload-offset": "7"},
                content=b"ab",
            ),
            409,
            404,
        ),
    ],
    ("DELETE", "/v1/files/resumable/{upload_id}"): [
        (ask("DELETE", "/v1/files/resumable/{things.upload}", headers=TUS), 204, 404)
    ],
    ("POST", "/v1/files/resumable/{upload_id}"): [
        (
            ask("POST", "/v1/files/resumable/{things.upload}", headers={**TUS, "x-http-method-override": "DELETE"}),
            204,
            404,
        )
    ],
}

MODEL = "tiny"


def document(things):
    """A question about a file."""
    source = {"type": "file", "file_id": things.file}
    content = [{"type": "document", "source": source, "title": "it"}, {"type": "text", "text": "What is it?"}]
    return {"model": MODEL, "max_tokens": 2, "messages": [{"role": "user", "content": content}]}


def counted(things):
    return {name: value for name, value in document(things).items() if name != "max_tokens"}


MESSAGES = {
    ("POST", "/v1/messages"): [
        (ask_json("POST", "/v1/messages", document), 200, 404),
        (ask_json("POST", "/v1/messages", lambda things: {**document(things), "stream": True}), 200, 404),
    ],
    ("POST", "/v1/messages/count_tokens"): [(ask_json("POST", "/v1/messages/count_tokens", counted), 200, 404)],
    ("POST", "/v1/files/{file_id}/warm"): [
        (ask_json("POST", "/v1/files/{things.file}/warm", lambda things: {"model": MODEL}), 200, 404),
        (ask_json("POST", "/v1/files/{things.file}/warm", lambda things: {"model": "none"}), 404, 404),
    ],
    ("POST", "/v1/files/{file_id}/questions"): [
        (ask_json("POST", "/v1/files/{things.file}/questions", lambda things: {"model": MODEL}), 200, 404),
    ],
    ("GET", "/v1/files/{file_id}/questions"): [(ask("GET", "/v1/files/{things.file}/questions"), 200, 404)],
    ("GET", "/v1/files/{file_id}/questions/{job_id}"): [
        (ask("GET", "/v1/files/{things.file}/questions/qjob_none"), 404, 404),
    ],
}


def about(things):
    """The same question in OpenAI's shape."""
    content = [{"type": "file", "file": {"file_id": things.file}}, {"type": "text", "text": "What is it?"}]
    return {"model": MODEL, "max_tokens": 2, "messages": [{"role": "user", "content": content}]}


OPENAI = {
    ("GET", "/openai/v1/files"): [
        (ask("GET", "/openai/v1/files?after={things.file}"), 200, 400),
        (ask("GET", "/openai/v1/files?order=asc&after={things.file}"), 200, 400),
    ],
    ("GET", "/openai/v1/files/{file_id}"): [(ask("GET", "/openai/v1/files/{things.file}"), 200, 404)],
    ("GET", "/openai/v1/files/{file_id}/content"): [
        (ask("GET", "/openai/v1/files/{things.file}/content"), 200, 404),
        (ask("GET", "/openai/v1/files/{things.file}/content", headers={"range": "bytes=9999-"}), 416, 404),
        (ask("GET", "/openai/v1/files/{things.file}/content", headers={"if-none-match": "*"}), 304, 404),
    ],
    ("DELETE", "/openai/v1/files/{file_id}"): [(ask("DELETE", "/openai/v1/files/{things.file}"), 200, 404)],
    ("POST", "/openai/v1/chat/completions"): [
        (ask_json("POST", "/openai/v1/chat/completions", about), 200, 404),
        (ask_json("POST", "/openai/v1/chat/completions", lambda things: {**about(things), "stream": True}), 200, 404),
    ],
}

BATCHES = {
    ("GET", "/v1/messages/batches"): [(ask("GET", "/v1/messages/batches?after_id={things.batch}"), 200, 200)],
    ("GET", "/v1/messages/batches/{batch_id}"): [(ask("GET", "/v1/messages/batches/{things.batch}"), 200, 404)],
    ("GET", "/v1/messages/batches/{batch_id}/results"): [(ask("GET", "/v1/messages/batches/{things.batch}/results"), 200, 404)],
    ("POST", "/v1/messages/batches/{batch_id}/cancel"): [(ask("POST", "/v1/messages/batches/{things.batch}/cancel"), 200, 404)],
    ("DELETE", "/v1/messages/batches/{batch_id}"): [(ask("DELETE", "/v1/messages/batches/{things.batch}"), 200, 404)],
}

ONE = "/v1/comparisons/{things.comparison}"
COMPARE = {
    ("GET", "/v1/candidates"): [(ask("GET", "/v1/candidates?after_id={things.candidate}"), 200, 404)],
    ("GET", "/v1/candidates/{candidate_id}"): [
        (ask("GET", "/v1/candidates/{things.candidate}"), 200, 404),
        (ask("GET", "/v1/candidates/{things.card}"), 200, 404),
    ],
    ("POST", "/v1/candidates/{candidate_id}/link"): [
        (ask_json("POST", "/v1/candidates/{things.card}/link", lambda things: {"candidate": things.candidate}), 200, 404)
    ],
    ("POST", "/v1/suites"): [(ask_json("POST", "/v1/suites", lambda things: {"file_id": things.file}), 400, 404)],
    ("GET", "/v1/suites"): [(ask("GET", "/v1/suites?after_id={things.suite}"), 200, 404)],
    ("GET", "/v1/suites/{suite_id}"): [(ask("GET", "/v1/suites/{things.suite}"), 200, 404)],
    ("DELETE", "/v1/suites/{suite_id}"): [(ask("DELETE", "/v1/suites/{things.suite}"), 200, 404)],
    ("POST", "/v1/comparisons"): [
        (
            ask_json(
                "POST",
                "/v1/comparisons",
                lambda things: {
                    "baseline": things.candidate,
                    "candidates": [things.candidate],
                    "suite": things.suite,
                    "run": False,
                },
            ),
            200,
            404,
        )
    ],
    ("GET", "/v1/comparisons"): [(ask("GET", "/v1/comparisons?after_id={things.comparison}"), 200, 404)],
    ("GET", "/v1/comparisons/{comparison_id}"): [(ask("GET", ONE), 200, 404)],
    ("GET", "/v1/comparisons/{comparison_id}/prompts"): [(ask("GET", ONE + "/prompts"), 200, 404)],
    ("POST", "/v1/comparisons/{comparison_id}/run"): [(ask("POST", ONE + "/run"), 200, 404)],
    ("POST", "/v1/comparisons/{comparison_id}/cancel"): [(ask("POST", ONE + "/cancel"), 400, 404)],
    ("POST", "/v1/comparisons/{comparison_id}/tickets"): [(ask("POST", ONE + "/tickets"), None, 404)],
    ("POST", "/v1/comparisons/{comparison_id}/votes"): [
        (ask_json("POST", ONE + "/votes", lambda things: {"ticket": "none", "choice": "left"}), 404, 404)
    ],
}
AT = "/compare/{things.comparison}"


def jobs_under(prefix):
    """Fine-tuning jobs, of which the owner has one that waits, not the only one."""
    jobs, one = f"{prefix}/fine_tuning/jobs", prefix + "/fine_tuning/jobs/{things.job}"
    at = lambda rest="": f"{jobs}/{{job_id}}{rest}"
    asks = lambda **names: lambda things: {"model": MODEL, **{key: getattr(things, of) for key, of in names.items()}}
    return {
        ("POST", jobs): [
            (ask_json("POST", jobs, asks(training_file="file")), 400, 404),  # a text is no rows
            (ask_json("POST", jobs, asks(training_file="file", validation_file="file")), 400, 404),
        ],
        ("GET", jobs): [(ask("GET", jobs + "?after={things.job}"), 200, 404)],
        ("GET", at()): [(ask("GET", one), 200, 404)],
        ("GET", at("/events")): [
            (ask("GET", one + "/events"), 200, 404),
            (ask("GET", one + "/events?limit=1&stream=false"), 200, 404),
        ],
        ("GET", at("/checkpoints")): [(ask("GET", one + "/checkpoints"), 200, 404)],
        ("GET", at("/log")): [(ask("GET", one + "/log"), 200, 404)],
        ("POST", at("/pause")): [(ask("POST", one + "/pause"), 200, 404)],
        ("POST", at("/resume")): [(ask("POST", one + "/resume"), 200, 404)],
        ("POST", at("/cancel")): [(ask("POST", one + "/cancel"), 200, 404)],
    }


JOBS = {**jobs_under("/v1"), **jobs_under("/openai/v1")}
JOB_PAGES = {
    ("GET", "/jobs"): [(ask("GET", "/jobs?after={things.job}"), 200, 404)],
    ("GET", "/jobs/{id}"): [(ask("GET", "/jobs/{things.job}"), 200, 404)],
    ("POST", "/jobs/{id}/pause"): [(ask_form("/jobs/{things.job}/pause"), 303, 404)],
    ("POST", "/jobs/{id}/resume"): [(ask_form("/jobs/{things.job}/resume"), 303, 404)],
    ("POST", "/jobs/{id}/cancel"): [(ask_form("/jobs/{things.job}/cancel"), 303, 404)],
}
COMPARE_PAGES = {
    ("GET", "/compare"): [(ask("GET", "/compare?after={things.comparison}"), 200, 404)],
    ("POST", "/compare"): [
        (ask_form("/compare", baseline="{things.candidate}", candidate="{things.card}", suite="{things.suite}"), 303, 404)
    ],
    ("GET", "/compare/{id}"): [(ask("GET", AT), 200, 404)],
    ("GET", "/compare/{id}/json"): [(ask("GET", AT + "/json"), 200, 404)],
    ("POST", "/compare/{id}/run"): [(ask_form(AT + "/run"), 303, 404)],
    ("POST", "/compare/{id}/cancel"): [(ask_form(AT + "/cancel"), 400, 404)],
    ("GET", "/compare/{id}/prompts/{prompt_id}"): [(ask("GET", AT + "/prompts/{things.prompt}"), 200, 404)],
    ("GET", "/compare/{id}/vote"): [(ask("GET", AT + "/vote"), None, 404)],
    ("POST", "/compare/{id}/vote"): [(ask_form(AT + "/vote", ticket="none", choice="left"), 404, 404)],
    ("POST", "/compare/{id}/invite"): [(ask_form(AT + "/invite"), 200, 404)],
    ("POST", "/bookmarks"): [(ask_form("/bookmarks", target="{things.comparison}"), 303, 404)],
    ("GET", "/candidates/{id}"): [(ask("GET", "/candidates/{things.candidate}"), 200, 404)],
    ("POST", "/candidates/{id}/link"): [(ask_form("/candidates/{things.card}/link", candidate="{things.candidate}"), 303, 404)],
}
# What moves an alias is refused before an id is looked at.
SHIP = {
    ("POST", "/v1/comparisons/{comparison_id}/ship"): ask_json(
        "POST", ONE + "/ship", lambda things: {"candidate": things.candidate, "alias": "answers"}
    ),
    ("POST", "/v1/aliases/{alias}/rollback"): ask("POST", "/v1/aliases/{things.file}/rollback"),
    ("GET", "/compare/{id}/ship"): ask("GET", AT + "/ship?candidate={things.candidate}"),
    ("POST", "/compare/{id}/ship"): ask_form(AT + "/ship", candidate="{things.candidate}", alias="answers"),
    ("GET", "/rollback"): ask("GET", "/rollback?alias={things.file}"),
    ("POST", "/rollback"): ask_form("/rollback", alias="{things.file}"),
}

PAGES = {
    ("GET", "/files"): [(ask("GET", "/files?stored={things.file}"), 200, 200)],
    ("GET", "/files/{id}"): [
        (ask("GET", "/files/{things.file}"), 200, 404),
        (ask("GET", "/files/{things.file}?from=0"), 200, 404),
    ],
    ("GET", "/files/{id}/content"): [(ask("GET", "/files/{things.file}/content"), 200, 404)],
    ("GET", "/files/{id}/pages/{number}"): [(ask("GET", "/files/{things.file}/pages/1"), None, 404)],
    ("GET", "/files/{id}/delete"): [(ask("GET", "/files/{things.file}/delete"), 200, 404)],
    ("GET", "/files/{id}/chunks"): [(ask("GET", "/files/{things.file}/chunks"), 200, 404)],
    ("GET", "/chat"): [(ask("GET", "/chat?file={things.file}"), 200, 200)],
    ("POST", "/chat"): [(ask_form("/chat", question="When?", model="nobody", file="{things.file}"), 404, 404)],
    ("POST", "/files/{id}/delete"): [(ask_form("/files/{things.file}/delete"), 303, 404)],
    ("GET", "/files/{id}/receipt/{sequence}"): [(ask("GET", "/files/{things.deleted}/receipt/{things.sequence}"), 200, 404)],
    ("GET", "/files/{id}/receipt/{sequence}/json"): [
        (ask("GET", "/files/{things.deleted}/receipt/{things.sequence}/json"), 200, 404)
    ],
}

# Administration is refused before an id is looked at.
ADMIN = {
    ("GET", "/v1/organizations/workspaces/{workspace_id}"): ask("GET", "/v1/organizations/workspaces/{things.workspace}"),
    ("POST", "/v1/organizations/workspaces/{workspace_id}"): ask_json(
        "POST", "/v1/organizations/workspaces/{things.workspace}", lambda things: {"name": "mine"}
    ),
    ("POST", "/v1/organizations/workspaces/{workspace_id}/archive"): ask(
        "POST", "/v1/organizations/workspaces/{things.workspace}/archive"
    ),
    ("GET", "/v1/organizations/workspaces"): ask("GET", "/v1/organizations/workspaces?ids[]={things.workspace}"),
    ("POST", "/v1/organizations/workspaces"): ask_json("POST", "/v1/organizations/workspaces", lambda things: {"name": "x"}),
    ("GET", "/v1/organizations/api_keys"): ask("GET", "/v1/organizations/api_keys?workspace_id={things.workspace}"),
    ("POST", "/v1/organizations/api_keys"): ask_json(
        "POST", "/v1/organizations/api_keys", lambda things: {"name": "x", "workspace_id": things.workspace}
    ),
    ("GET", "/v1/organizations/api_keys/{api_key_id}"): ask("GET", "/v1/organizations/api_keys/{things.key}"),
    ("POST", "/v1/organizations/api_keys/{api_key_id}"): ask_json(
        "POST", "/v1/organizations/api_keys/{things.key}", lambda things: {"status": "inactive"}
    ),
    ("GET", "/v1/organizations/usage"): ask("GET", "/v1/organizations/usage?scope=workspace&id={things.workspace}"),
    ("POST", "/v1/organizations/limits"): ask_json(
        "POST", "/v1/organizations/limits", lambda things: {"scope": "workspace", "id": things.workspace, "limit_bytes": 0}
    ),
    ("GET", "/v1/organizations/audit"): ask("GET", "/v1/organizations/audit?workspace_id={things.workspace}"),
    ("GET", "/v1/organizations/audit/verify"): ask("GET", "/v1/organizations/audit/verify"),
    ("GET", "/v1/organizations/audit/export"): ask("GET", "/v1/organizations/audit/export"),
    ("GET", "/v1/organizations/me"): ask("GET", "/v1/organizations/me"),
}

# Routes that take no id of a tenant's, with the reason why they are in no table above.
WITHOUT_IDS = {
    ("POST", "/openai/v1/files"): "makes files of the caller's own",
    ("POST", "/openai/v1/embeddings"): "takes texts",
    ("POST", "/openai/v1/completions"): "takes texts, or ids of tokens",
    ("GET", "/openai/v1/models"): "what is served, for everybody alike",
    ("GET", "/openai/v1/models/{model_id}"): "the same",
    ("POST", "/v1/files"): "makes a file of the caller's own",
    ("POST", "/v1/files/resumable"): "begins an upload of the caller's own",
    ("POST", "/v1/messages/batches"): "makes a batch of the caller's own; a file it names is tested below",
    ("OPTIONS", "/v1/files/resumable"): "tells what the server can",
    ("GET", "/v1/files/usage"): "of the caller's own; tested below",
    ("GET", "/v1/files/receipt_key"): "the installation's public key",
    ("GET", "/v1/models"): "models are every key's, but for those that a job has made; tested in test_fine_tuning",
    ("GET", "/v1/models/{model_id}"): "the same",
    ("GET", "/health"): "public",
    ("GET", "/ready"): "public",
    ("GET", "/metrics"): "public; labels are routes and numbers",
    ("GET", "/openapi.json"): "public",
    ("GET", "/"): "of the caller's own; tested below",
    ("GET", "/facts.json"): "of the caller's own; tested below",
    ("GET", "/llms.txt"): "public",
    ("GET", "/method"): "public",
    ("GET", "/badge/{id}.svg"): "public to who was given its address; tested in test_comparisons",
    ("GET", "/digest"): "of the caller's own; tested below",
    ("GET", "/models"): "of the caller's own; tested below",
    ("POST", "/digest/subscribe"): "an address of the caller's own",
    ("POST", "/v1/candidates"): "takes a served name or a page's text; makes candidates of the caller's own",
    ("GET", "/compare/new"): "offers what is the caller's own; tested below",
    ("POST", "/compare/cards"): "takes a page's text",
    (
        "GET",
        "/vote/{token}",
    ): "public to who was sent it; a forged one is told what an old one is, tested in test_compare_pages",
    ("POST", "/vote/{token}"): "the same",
    ("GET", "/login"): "public",
    ("POST", "/login"): "takes a key; a wrong one and a revoked one are told the same, tested in test_pages",
    ("GET", "/usage"): "of the caller's own workspace, or of all for who administers; tested in test_usage",
    ("GET", "/usage/csv"): "the same",
    ("GET", "/usage/json"): "the same",
    ("POST", "/logout"): "ends the caller's own session",
    ("POST", "/workspace"): "takes a workspace's id; tested below",
    ("POST", "/files"): "makes files of the caller's own",
    ("GET", "/digest/confirm"): "public: a question; the token in it is not looked at",
    ("POST", "/digest/confirm"): "takes a token from a mail; tested in test_digest",
    ("GET", "/digest/unsubscribe"): "public: a question; the token in it is not looked at",
    ("POST", "/digest/unsubscribe"): "takes a token from a mail; tested in test_digest",
    ("GET", "/static"): "files of the package",
}


def table():
    """(method, path) of every route of the application."""
    for route in ROUTES:
        if isinstance(route, Mount):
            yield "GET", route.path
        else:
            assert isinstance(route, Route), route
            yield from ((method, route.path_format) for method in sorted(route.methods or ()))


def test_every_route_is_in_one_of_the_tables_and_every_entry_is_a_route():
    known = {
        *API,
        *MESSAGES,
        *OPENAI,
        *BATCHES,
        *JOBS,
        *JOB_PAGES,
        *COMPARE,
        *COMPARE_PAGES,
        *SHIP,
        *PAGES,
        *ADMIN,
        *WITHOUT_IDS,
    }
    routes = set(table())
    # HEAD is asked for by itself where it is looked at by itself; elsewhere it is GET without the body.
    assert {
        route for route in routes if route not in known and not (route[0] == "HEAD" and ("GET", route[1]) in known)
    } == set()
    assert known - routes == set()


# -- who is there ----------------------------------------------------------------------------------------------------------------


def things_of(api, key="", workspace=""):
    """A file, an upload that has begun, and a deleted file with its receipt."""
    name = {"file": ("secret-plan.txt", b"nobody else's business", "text/plain")}
    file, deleted = (api.post("/v1/files", files=name).json()["id"] for _ in range(2))
    receipt = api.delete(f"/v1/files/{deleted}", headers={"x-ropewalk-extensions": "true"}).json()["receipt"]
    begun = api.post("/v1/files/resumable", headers={**TUS, "upload-length": "5"})
    return Things(file, begun.headers["location"].rpartition("/")[2], deleted, receipt["sequence"], workspace, key)


def sign_in(browser, key):
    """A session, and the token that its forms carry."""
    token = lambda page: re.search(r'name="csrf" value="([^"]+)"', page.text)[1]
    first = browser.get("/login")
    assert browser.post("/login", data={"csrf": token(first), "key": key}).status_code == 303
    return token(browser.get("/files"))


@pytest.fixture
def party(server):
    """Makes a Party in a workspace, for a user or for all."""
    with ExitStack() as stack:

        def make(workspace, user=None):
            key = server.new_key(workspace.id, user_id=user)
            api = stack.enter_context(server.http(key))
            browser = stack.enter_context(httpx.Client(base_url=server.url, headers={"origin": server.url}, timeout=30))
            return Party(api, browser, sign_in(browser, key), things_of(api, "key_" + "0" * 24, workspace.id))

        yield make


@pytest.fixture(params=["workspace", "user"])
def asker_and_owner(request, server, party):
    """Who asks for whose things."""
    first, _ = server.workspace(f"matrix {secrets.token_hex(4)}")
    if request.param == "user":
        return party(first, "ann"), party(first, "ben")
    second, _ = server.workspace(f"matrix {secrets.token_hex(4)}")
    return party(first), party(second)


def answer(client, request):
    """Status, headers and body of an answer, without what is another one in every answer."""
    method, path, more = request
    response = client.request(method, path, **more)
    headers = [
        (name, value) for name, value in response.headers.multi_items() if name not in ("date", "request-id", "x-request-id")
    ]
    return response.status_code, headers, re.sub(rb"req_[A-Za-z0-9]+", b"REQUEST", response.content)


def without(words, told):
    """The same answer with each of these words replaced."""
    status, headers, body = told
    for word in filter(None, words):
        body = body.replace(word.encode(), b"ID")
        headers = [(name, value.replace(word, "ID")) for name, value in headers]
    return status, headers, body


def beside(client, things, probe, token=""):
    """The answers for what is another's and for what never was, with what was named in each replaced."""
    absent = things.absent()
    told = []
    for named in (things, absent):
        request = probe(named, token)
        told.append(without([word for word in named.words() if word and word in str(request)], answer(client, request)))
    return told


def check(client, owner_client, token, owner_token, things, probe, theirs, others):
    foreign, missing = beside(client, things, probe, token)
    assert foreign == missing
    assert foreign[0] == others
    # And it was there to be found: its owner has another answer.
    own = without(things.words(), answer(owner_client, probe(things, owner_token)))
    assert own[::2] != foreign[::2]
    if theirs is not None:
        assert own[0] == theirs, own


@pytest.mark.parametrize("route", API, ids=" ".join)
def test_the_api_answers_alike_for_what_is_anothers_and_for_what_never_was(asker_and_owner, route):
    asker, owner = asker_and_owner
    for probe, theirs, others in API[route]:
        check(asker.api, owner.api, "", "", owner.things, probe, theirs, others)


def batch_of(api, params):
    """A batch of one request, once it has been answered."""
    id = api.post("/v1/messages/batches", json={"requests": [{"custom_id": "it", "params": params}]}).json()["id"]
    for _ in range(300):
        if api.get(f"/v1/messages/batches/{id}").json()["processing_status"] == "ended":
            return id
        time.sleep(0.1)
    raise AssertionError(id)


@pytest.mark.parametrize("route", BATCHES, ids=" ".join)
def test_batches_answer_alike_for_what_is_anothers_and_for_what_never_was(asker_and_owner, route):
    asker, owner = asker_and_owner
    unserved = {"model": "none", "max_tokens": 1, "messages": [{"role": "user", "content": "Hello"}]}
    for party in (asker, owner):
        party.things.batch = [batch_of(party.api, unserved) for _ in range(2)][1]
    for probe, theirs, others in BATCHES[route]:
        check(asker.api, owner.api, "", "", owner.things, probe, theirs, others)


def test_a_batch_about_what_is_anothers_is_answered_like_one_about_what_never_was(asked, asker_and_owner):
    asker, owner = asker_and_owner
    told = []
    for api, things in ((asker.api, owner.things), (asker.api, owner.things.absent()), (owner.api, owner.things)):
        line = api.get(f"/v1/messages/batches/{batch_of(api, document(things))}/results").json()
        told.append(re.sub(r"req_\w+", "REQUEST", str(line).replace(things.file, "ID")))
    assert told[0] == told[1]
    assert "not_found_error" in told[0]
    assert "'succeeded'" in told[2]


@pytest.mark.parametrize("route", MESSAGES, ids=" ".join)
def test_a_question_about_what_is_anothers_is_answered_like_one_about_what_never_was(asked, asker_and_owner, route):
    asker, owner = asker_and_owner
    for probe, theirs, others in MESSAGES[route]:
        check(asker.api, owner.api, "", "", owner.things, probe, theirs, others)


@pytest.mark.parametrize("asker_and_owner", ["workspace"], indirect=True)
def test_what_a_model_has_read_for_another_workspace_is_read_anew(asked, asker_and_owner):
    asker, owner = asker_and_owner
    text = "The lighthouse of Pellworm was built in 1907. " * 12

    def reused(party):
        file = party.api.post("/v1/files", files={"file": ("book.txt", text, "text/plain")}).json()["id"]
        content = [{"type": "document", "source": {"type": "file", "file_id": file}, "cache_control": {"type": "ephemeral"}}]
        content.append({"type": "text", "text": "When?"})
        asked = {"model": MODEL, "max_tokens": 1, "messages": [{"role": "user", "content": content}]}
        told = [party.api.post("/v1/messages", json=asked).json() for _ in range(2)]
        return [one["usage"]["cache_read_input_tokens"] for one in told]

    first, second = reused(owner)
    assert first == 0
    assert second > 0
    assert reused(asker)[0] == 0


@pytest.mark.parametrize("route", OPENAI, ids=" ".join)
def test_openai_shapes_answer_alike_for_what_is_anothers_and_for_what_never_was(asked, asker_and_owner, route):
    asker, owner = asker_and_owner
    for probe, theirs, others in OPENAI[route]:
        check(asker.api, owner.api, "", "", owner.things, probe, theirs, others)


@pytest.mark.parametrize("route", PAGES, ids=" ".join)
def test_pages_answer_alike_for_what_is_anothers_and_for_what_never_was(asker_and_owner, route):
    asker, owner = asker_and_owner
    for probe, theirs, others in PAGES[route]:
        check(asker.browser, owner.browser, asker.token, owner.token, owner.things, probe, theirs, others)


@pytest.fixture
def training(asked, asker_and_owner):
    """Who asks for whose jobs; none of them runs."""
    runner = asked.app.state.jobs
    options, runner.options = runner.options, replace(runner.options, at_once=0)
    for party in asker_and_owner:
        rows = b'{"messages": [{"role": "user", "content": "Due?"}, {"role": "assistant", "content": "May"}]}\n'
        file = party.api.post("/v1/files", files={"file": ("rows.jsonl", rows)}).json()["id"]
        make = lambda api=party.api, file=file: api.post("/v1/fine_tuning/jobs", json={"model": MODEL, "training_file": file})
        party.things.job = [make().json()["id"] for _ in range(2)][1]
    yield asker_and_owner
    runner.options = options


@pytest.mark.parametrize("prefix", ["/v1", "/openai/v1"])
def test_jobs_answer_alike_for_what_is_anothers_and_for_what_never_was(training, prefix):
    asker, owner = training
    for probes in jobs_under(prefix).values():
        for probe, theirs, others in probes:
            check(asker.api, owner.api, "", "", owner.things, probe, theirs, others)


def test_pages_of_jobs_answer_alike_for_what_is_anothers_and_for_what_never_was(training):
    asker, owner = training
    assert owner.things.job in owner.browser.get("/models").text
    assert owner.things.job not in asker.browser.get("/models").text
    for probes in JOB_PAGES.values():
        for probe, theirs, others in probes:
            check(asker.browser, owner.browser, asker.token, owner.token, owner.things, probe, theirs, others)


CARDS = (Path(__file__).parents[1] / "compare" / "pages" / "two_tools.txt").read_text()


@pytest.fixture
def comparing(asked, asker_and_owner):
    """Who asks for whose comparisons; none of them runs."""
    for party in asker_and_owner:
        post = lambda path, body, api=party.api: api.post(path, json=body).json()
        things = party.things
        things.candidate = post("/v1/candidates", {"name": MODEL})["data"][0]["id"]
        things.card = post("/v1/candidates", {"page_text": CARDS})["data"][0]["id"]
        things.suite = post("/v1/suites", {"jsonl": '{"prompt": "Due?", "reference": "May"}', "hold": 0})["id"]
        body = {"baseline": things.candidate, "candidates": [things.card], "suite": things.suite, "run": False}
        things.comparison = [post("/v1/comparisons", body)["id"] for _ in range(2)][1]
        things.prompt = asked.run(only_prompt(asked.store, things.suite))
    return asker_and_owner


async def only_prompt(store, suite_id):
    async with store.database.reading() as connection:
        return (await connection.execute(select(prompts.c.id).where(prompts.c.suite_id == suite_id))).scalar_one()


@pytest.mark.parametrize("route", COMPARE, ids=" ".join)
def test_comparisons_answer_alike_for_what_is_anothers_and_for_what_never_was(comparing, route):
    asker, owner = comparing
    for probe, theirs, others in COMPARE[route]:
        check(asker.api, owner.api, "", "", owner.things, probe, theirs, others)


@pytest.mark.parametrize("route", COMPARE_PAGES, ids=" ".join)
def test_pages_of_compare_answer_alike_for_what_is_anothers_and_for_what_never_was(comparing, route):
    asker, owner = comparing
    for probe, theirs, others in COMPARE_PAGES[route]:
        check(asker.browser, owner.browser, asker.token, owner.token, owner.things, probe, theirs, others)


@pytest.mark.parametrize("route", SHIP, ids=" ".join)
def test_who_may_not_move_an_alias_learns_nothing_of_what_there_is(comparing, route):
    asker, owner = comparing
    client = asker.api if "/v1/" in route[1] else asker.browser
    foreign, missing = beside(client, owner.things, SHIP[route], asker.token)
    assert foreign == missing
    assert foreign[0] == 403


def test_facts_home_and_forms_hold_only_what_is_the_callers(comparing):
    asker, owner = comparing
    theirs = {getattr(owner.things, name) for name in COMPARED}
    for told in (
        asker.api.get("/facts.json").text,
        *(asker.browser.get(path).text for path in ("/", "/models", "/compare", "/compare/new", "/digest", "/facts.json")),
    ):
        assert not [id for id in theirs if id in told]
    assert owner.things.comparison in owner.api.get("/facts.json").text


@pytest.mark.parametrize("route", ADMIN, ids=" ".join)
def test_administration_tells_others_nothing(asker_and_owner, route):
    asker, owner = asker_and_owner
    foreign, missing = (answer(asker.api, ADMIN[route](named, "")) for named in (owner.things, owner.things.absent()))
    assert foreign == missing
    assert foreign[0] == 403


def test_lists_and_usage_hold_only_what_is_the_callers(asker_and_owner):
    asker, owner = asker_and_owner
    mine = [file["id"] for file in asker.api.get("/v1/files").json()["data"]]
    assert mine == [asker.things.file]
    assert owner.things.file not in asker.browser.get("/files").text
    before = asker.api.get("/v1/files/usage").json()
    owner.api.post("/v1/files", files={"file": b"12345"})
    after = asker.api.get("/v1/files/usage").json()
    for scope in ("key", "user"):
        assert before[scope] == after[scope]
    if asker.things.workspace != owner.things.workspace:
        assert before == after


def test_equal_bytes_of_others_cannot_be_noticed(asker_and_owner):
    """Neither by the answer to an upload, nor by details, nor by the receipt of a deletion."""
    asker, owner = asker_and_owner
    content = secrets.token_bytes(100)

    def upload_and_delete():
        extended = {"x-ropewalk-extensions": "true"}
        file = asker.api.post("/v1/files", files={"file": ("x", content)}, headers=extended).json()
        details = asker.api.get(f"/v1/files/{file['id']}/details").json()
        receipt = asker.api.delete(f"/v1/files/{file['id']}", headers=extended).json()["receipt"]
        return {
            **{name: value for name, value in {**file, **details}.items() if name not in ("id", "created_at")},
            "receipt": (receipt["content"], receipt["shared_with"]),
        }

    alone = upload_and_delete()
    owner.api.post("/v1/files", files={"file": ("x", content)})
    assert upload_and_delete() == alone


def test_a_cursor_of_anothers_list_is_no_cursor(asker_and_owner):
    asker, owner = asker_and_owner
    owner.api.post("/v1/files", files={"file": b"1"})
    cursor = owner.api.get("/v1/files?limit=1").json()["next_page"]
    assert owner.api.get(f"/v1/files?page={cursor}").status_code == 200
    forged = "page_" + "A" * (len(cursor) - 5)
    foreign = without([cursor], answer(asker.api, ("GET", f"/v1/files?page={cursor}", {})))
    missing = without([forged], answer(asker.api, ("GET", f"/v1/files?page={forged}", {})))
    assert foreign == missing
    assert foreign[0] == 400


@pytest.mark.parametrize("asker_and_owner", ["workspace"], indirect=True)
def test_another_workspace_named_in_a_header_is_refused_like_one_that_never_was(asker_and_owner):
    asker, owner = asker_and_owner
    absent = owner.things.absent()
    named = lambda id: ("GET", "/v1/files", {"headers": {"anthropic-workspace-id": id}})
    foreign = without([owner.things.workspace], answer(asker.api, named(owner.things.workspace)))
    missing = without([absent.workspace], answer(asker.api, named(absent.workspace)))
    assert foreign == missing
    assert foreign[0] == 403


@pytest.mark.parametrize("asker_and_owner", ["workspace"], indirect=True)
def test_a_page_cannot_be_switched_to_another_workspace(asker_and_owner):
    asker, owner = asker_and_owner
    absent = owner.things.absent()
    switch = lambda id: ("POST", "/workspace", {"data": {"csrf": asker.token, "workspace_id": id}})
    foreign = without([owner.things.workspace], answer(asker.browser, switch(owner.things.workspace)))
    missing = without([absent.workspace], answer(asker.browser, switch(absent.workspace)))
    assert foreign == missing
    assert foreign[0] in (403, 404)


def test_another_user_named_in_a_header_is_refused_whether_or_not_there_is_one(server):
    workspace, _ = server.workspace(f"matrix {secrets.token_hex(4)}")
    with server.http(server.new_key(workspace.id, user_id="ben")) as ben:
        ben.post("/v1/files", files={"file": b"1"})
    for settings in ({"user_id": "ann"}, {}):
        with server.http(server.new_key(workspace.id, **settings)) as client:
            named = lambda user: ("GET", "/v1/files", {"headers": {"anthropic-user-id": user}})
            foreign = without(["ben"], answer(client, named("ben")))
            missing = without(["bob"], answer(client, named("bob")))
            assert foreign == missing
            assert foreign[0] == 403


def test_a_full_organisation_does_not_tell_what_others_use(start):
    with start() as server:
        first, key = server.workspace("first")
        _, other = server.workspace("second")
        with server.http(other) as client:
            client.post("/v1/files", files={"file": b"1234567"})

        async def limit():
            async with server.store.database.writing() as connection:
                await set_limit(connection, "organization", first.organization_id, 10, None)

        server.run(limit())
        with server.http(key) as client:
            told = client.post("/v1/files", files={"file": b"12345"}).json()["error"]
    assert told["details"]["error_code"] == "storage_quota_exceeded"
    assert "10" not in told["message"]
    assert "7" not in told["message"]


def test_the_page_of_security_names_all_that_needs_no_key():
    page = (Path(__file__).parents[2] / "docs" / "security.md").read_text(encoding="utf-8")
    (row,) = (line for line in page.splitlines() if line.startswith("| somebody without a key"))
    public = {path for (_, path), why in WITHOUT_IDS.items() if why.startswith("public") or path in ("/static", "/login")}
    assert public == set(re.findall(r"`(/[^`]+)`", row))


def test_a_log_and_the_metrics_name_no_tenants_files(server, party):
    workspace, _ = server.workspace(f"matrix {secrets.token_hex(4)}")
    somebody = party(workspace)
    with httpx.Client(base_url=server.url) as stranger:
        told = stranger.get("/metrics").text
    for word in (*somebody.things.words(), "secret-plan"):
        assert not word or word not in told
