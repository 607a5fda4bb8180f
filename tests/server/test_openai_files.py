"""Files, models and errors under /openai/v1, with the official client unchanged; the store is the one that /v1/files has."""

import json
import secrets

import openai
import pytest

from ropewalk.errors import RateLimited
from ropewalk.server.openai_errors import error_of


@pytest.fixture
def place(asked):
    """A workspace of the test's own, seen by both official clients."""
    _, key = asked.workspace(f"openai {secrets.token_hex(4)}")
    with openai.OpenAI(base_url=f"{asked.url}/openai/v1", api_key=key, max_retries=0) as client, asked.sdk(key) as other:
        yield asked, client, other, key


def test_a_file_is_the_same_under_both_apis(place):
    _, client, other, _ = place
    rows = b'{"messages": []}\n'
    made = client.files.create(file=("rows.jsonl", rows), purpose="fine-tune")
    assert (made.bytes, made.filename, made.purpose, made.status) == (len(rows), "rows.jsonl", "fine-tune", "processed")
    assert other.beta.files.retrieve_metadata(made.id).size_bytes == len(rows)
    assert client.files.retrieve(made.id) == made
    assert client.files.content(made.id).read() == rows
    theirs = other.beta.files.upload(file=("a.txt", b"a", "text/plain"))
    assert client.files.retrieve(theirs.id).purpose == "user_data"
    assert client.files.delete(theirs.id).deleted
    with pytest.raises(openai.NotFoundError) as raised:
        client.files.retrieve(theirs.id)
    assert (raised.value.type, raised.value.code) == ("invalid_request_error", "not_found")
    assert raised.value.request_id.startswith("req_")


def test_files_are_listed_by_purpose_and_in_either_order_page_by_page(place):
    _, client, other, _ = place
    first = [client.files.create(file=(f"{n}.jsonl", b"{}"), purpose="fine-tune").id for n in range(3)]
    second = client.files.create(file=("e.jsonl", b"{}"), purpose="evals").id
    said_nothing = other.beta.files.upload(file=("a.txt", b"a", "text/plain")).id
    everything = [*first, second, said_nothing]
    assert [file.id for file in client.files.list(limit=2)] == everything[::-1]
    assert [file.id for file in client.files.list(limit=2, order="asc")] == everything
    assert [file.id for file in client.files.list(purpose="fine-tune", limit=1)] == first[::-1]
    assert [file.id for file in client.files.list(purpose="user_data")] == [said_nothing]
    assert [file.id for file in client.files.list(after=second, order="asc")] == [said_nothing]


def test_a_file_expires_when_its_upload_says_so(place):
    _, client, _, _ = place
    after = {"anchor": "created_at", "seconds": 3600}
    made = client.files.create(file=("a.txt", b"a"), purpose="user_data", expires_after=after)
    assert made.expires_at - made.created_at == 3600


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"purpose": "fun"}, "purpose"),
        ({}, "purpose"),
        ({"purpose": "batch", "expires_after[seconds]": "3600"}, "expires_after"),
        ({"purpose": "batch", "expires_after[anchor]": "created_at", "expires_after[seconds]": "x"}, "expires_after"),
    ],
)
def test_a_field_that_cannot_be_used_is_named(place, fields, param):
    server, _, _, key = place
    with server.http(key) as http:
        answer = http.post("/openai/v1/files", files={"file": ("a.txt", b"a")}, data=fields)
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == param


def test_a_file_that_is_too_large_is_told_in_the_shape_of_openai(start):
    with start(max_file_bytes=10) as small:
        client = openai.OpenAI(base_url=f"{small.url}/openai/v1", api_key=small.key, max_retries=0)
        with client, pytest.raises(openai.APIStatusError) as raised:
            client.files.create(file=("a.txt", b"a" * 11), purpose="user_data")
    assert (raised.value.status_code, raised.value.code) == (413, "request_too_large")


def test_models_are_listed_with_their_aliases(place):
    _, client, _, _ = place
    assert {"tiny", "answers"} <= {model.id for model in client.models.list()}
    assert client.models.retrieve("answers").owned_by == "ropewalk"
    with pytest.raises(openai.NotFoundError) as raised:
        client.models.retrieve("none")
    assert (raised.value.code, raised.value.param) == ("model_not_found", "model")


def test_keys_are_asked_for_as_openai_asks_for_them(place):
    server, _, _, key = place
    with openai.OpenAI(base_url=f"{server.url}/openai/v1", api_key="wrong", max_retries=0) as client:
        with pytest.raises(openai.AuthenticationError) as raised:
            client.models.list()
        assert raised.value.code == "invalid_api_key"
        with pytest.raises(openai.PermissionDeniedError):  # a project is a workspace
            client.with_options(api_key=key, project="another").models.list()
    with server.http(key) as http:  # x-api-key opens as well
        answer = http.get("/openai/v1/models")
        assert answer.status_code == 200
        assert answer.headers["x-request-id"] == answer.headers["request-id"]
        nowhere = http.get("/openai/v1/assistants")
    assert nowhere.status_code == 404
    assert nowhere.json()["error"]["type"] == "invalid_request_error"


def test_a_rate_limit_is_told_as_openai_tells_it(place):
    server, _, _, _ = place
    _, key = server.workspace(f"slow {secrets.token_hex(4)}", requests_per_minute=1)
    with openai.OpenAI(base_url=f"{server.url}/openai/v1", api_key=key, max_retries=0) as client:
        first = client.models.with_raw_response.list()
        assert (first.headers["x-ratelimit-limit-requests"], first.headers["x-ratelimit-remaining-requests"]) == ("1", "0")
        with pytest.raises(openai.RateLimitError) as raised:
            client.models.list()
    assert raised.value.code == "rate_limit_exceeded"
    assert int(raised.value.response.headers["retry-after"]) > 0
    assert error_of(RateLimited("slow", 1.0))["error"]["type"] == "requests"


def test_no_embeddings_without_an_encoder(place):
    _, client, _, _ = place
    with pytest.raises(openai.NotFoundError) as raised:
        client.embeddings.create(model="e5", input="a")
    assert raised.value.code == "model_not_found"


def test_deletions_under_openai_leave_receipts(place):
    _, client, _, _ = place
    made = client.files.create(file=("a.txt", b"a"), purpose="user_data")
    raw = client.files.with_raw_response.delete(made.id, extra_headers={"x-ropewalk-extensions": "true"})
    body = json.loads(raw.text)
    assert int(raw.headers["x-ropewalk-receipt"]) == body["receipt"]["sequence"]
