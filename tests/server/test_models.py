"""The Models API: what the registry has published, newest first."""

import json

import anthropic
import pytest


@pytest.fixture(scope="module")
def published(server, tmp_path_factory):
    """Five bases, the last the newest, an adapter older than all, and an alias of the adapter."""
    registry, folder = server.app.state.registry, tmp_path_factory.mktemp("base")
    others = registry.file.read_text() if registry.file.exists() else None  # published by tests before these
    registry.file.unlink(missing_ok=True)
    for number in range(5):
        registry.publish_base(f"base-{number}", folder)
    registry.publish_adapter("house", folder, "base-0")
    registry.ship("answers", "house")
    state = json.loads(registry.file.read_text())
    for number in range(5):  # all were published within one second
        state["entries"][f"base-{number}"]["created"] = f"2026-01-02T00:00:0{number}+00:00"
    state["entries"]["house"]["created"] = "2026-01-01T00:00:00+00:00"
    registry.file.write_text(json.dumps(state))
    yield ["base-4", "base-3", "base-2", "base-1", "base-0", "house", "answers"]
    if others is not None:
        registry.file.write_text(others)


def test_the_official_client_pages_through_all_models(server, published):
    assert [model.id for model in server.sdk().models.list(limit=2)] == published
    assert [model.id for model in server.sdk().beta.models.list(limit=3)] == published


def test_a_model_says_what_it_is(server, published):
    model = server.sdk().models.retrieve("house")
    assert (model.id, model.type, model.lifecycle, model.display_name) == ("house", "model", "active", "house (over base-0)")
    assert model.created_at.isoformat() == "2026-01-01T00:00:00+00:00"
    assert server.sdk().models.retrieve("answers").display_name == "answers, now house (over base-0)"


@pytest.mark.parametrize(
    ("asked", "ids", "more"),
    [
        ({"limit": 2}, ["base-4", "base-3"], True),
        ({"limit": 2, "after_id": "base-3"}, ["base-2", "base-1"], True),
        ({"limit": 9, "after_id": "base-0"}, ["house", "answers"], False),
        ({"limit": 2, "before_id": "base-1"}, ["base-3", "base-2"], True),
        ({"limit": 9, "before_id": "base-3"}, ["base-4"], False),
        ({"after_id": "base-4", "before_id": "base-1"}, ["base-3", "base-2"], False),
        ({"after_id": "withdrawn"}, [], False),
        ({"lifecycle[]": "active", "limit": 1}, ["base-4"], True),
        ({"lifecycle[]": ["deprecated", "retired"]}, [], False),
    ],
)
def test_a_page_of_models_stands_where_it_is_asked_for(server, published, asked, ids, more):
    with server.http() as http:
        page = http.get("/v1/models", params=asked).json()
    assert ([model["id"] for model in page["data"]], page["has_more"]) == (ids, more)
    assert (page["first_id"], page["last_id"]) == ((ids[0], ids[-1]) if ids else (None, None))


@pytest.mark.parametrize("asked", [{"limit": "0"}, {"limit": "x"}, {"lifecycle[]": "sleeping"}])
def test_a_page_that_cannot_be_given_is_refused(server, asked):
    with server.http() as http:
        assert http.get("/v1/models", params=asked).status_code == 400


def test_an_unknown_model_is_not_found(server, published):
    with pytest.raises(anthropic.NotFoundError, match="Model `none/such` not found"):
        server.sdk().models.retrieve("none/such")
