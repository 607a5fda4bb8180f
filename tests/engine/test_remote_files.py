"""Copies of files at another server: made once, used by their ids, deleted with the files; over real HTTP."""

import json
from collections.abc import Iterator
from typing import Any

import anthropic
import pytest

from engine.other_server import Answer, Other, asked, block, listening, message, said
from files.papers import pdf
from ropewalk.config.serving import Remote, ServedModel, Serving
from ropewalk.engine import upstream
from ropewalk.files.lifecycle import sweep
from ropewalk.files.settings import Settings
from ropewalk.server.settings import ServerSettings
from server.conftest import Running, running

TEXT = "Rent is 900 euros. It rises."


@pytest.fixture(scope="module")
def other() -> Iterator[Other]:
    with listening() as found:
        yield found


@pytest.fixture(scope="module")
def ours(other: Other, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    models = {"far": ServedModel(remote=Remote("anthropic", other.url, "far-1", "FAR_KEY", files="upload"))}
    data = tmp_path_factory.mktemp("remote-files")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ROPEWALK_ROOT_KEY_FILE", str(tmp_path_factory.mktemp("keys") / "root.key"))
        patch.setenv("FAR_KEY", "sk-far-away-0815")
        patch.setattr(upstream, "PAUSE_SECONDS", 0.01)
        with running(data, Settings(data=data), ServerSettings(serving=Serving(models))) as found, found.sdk() as sdk:
            # The first question about a document asks whether documents are read at all.
            other.says(*(counted(n) for n in (9, 24)), Answer(message(said("Yes."))))
            file = sdk.beta.files.upload(file=("a.txt", b"First.", "text/plain"))
            sdk.messages.create(**asked("far", about(file)))
            yield found


@pytest.fixture
def sdk(ours: Running) -> Iterator[anthropic.Anthropic]:
    with ours.sdk() as client:
        yield client


def counted(count: int) -> Answer:
    return Answer(json.dumps({"input_tokens": count}).encode())


def about(*files: Any, **more: Any) -> list[dict[str, Any]]:
    documents = [{"type": "document", "source": {"type": "file", "file_id": file.id}, **more} for file in files]
    return [*documents, {"type": "text", "text": "Well?"}]


def sources(other: Other) -> list[Any]:
    return [part.get("source") for part in other.body["messages"][0]["content"][:-1]]


def test_a_file_is_uploaded_once_and_known_by_its_id_there(sdk, other):
    notes = sdk.beta.files.upload(file=("a.html", f"<p>{TEXT}</p>".encode(), "text/html"))
    lease = sdk.beta.files.upload(file=("a.pdf", pdf("Rent is 900 euros."), "application/pdf"))
    before = other.uploads
    for _ in range(2):
        other.says(Answer(message(said("900"))))
        sdk.messages.create(**asked("far", about(notes, lease, title="Lease")))
    first, second = (source["file_id"] for source in sources(other))
    assert other.uploads == before + 2
    assert other.files[first] == (f"{notes.id}.txt", "text/plain", TEXT.encode())
    assert other.files[second] == (f"{lease.id}.pdf", "application/pdf", pdf("Rent is 900 euros."))
    assert TEXT not in json.dumps(other.body)
    assert other.body["messages"][0]["content"][0]["title"] == "Lease"
    other.says(counted(42))
    assert sdk.messages.count_tokens(model="far", messages=asked("far", about(notes))["messages"]).input_tokens == 42
    assert sources(other) == [{"type": "file", "file_id": first}]


def test_the_copy_goes_with_the_file_and_the_receipt_says_so(sdk, other, ours):
    file = sdk.beta.files.upload(file=("a.txt", TEXT.encode(), "text/plain"))
    other.says(Answer(message(said("900"))))
    sdk.messages.create(**asked("far", about(file)))
    (copy,) = (source["file_id"] for source in sources(other))
    assert copy in other.files
    receipt = ours.run(ours.store.delete(ours.run(ours.store.local_caller()), file.id))
    assert copy not in other.files
    assert "upstream" in receipt.derived


def test_a_copy_that_cannot_be_deleted_yet_is_deleted_by_the_sweep(sdk, other, ours):
    file = sdk.beta.files.upload(file=("a.txt", TEXT.encode(), "text/plain"))
    other.says(Answer(message(said("900"))))
    sdk.messages.create(**asked("far", about(file)))
    (copy,) = (source["file_id"] for source in sources(other))
    other.says(Answer(b"", 429, {"only": f"/v1/files/{copy}"}))
    sdk.beta.files.delete(file.id)
    assert copy in other.files
    assert ours.run(sweep(ours.store, thorough=False)).erased == 1
    assert copy not in other.files
    assert ours.run(sweep(ours.store, thorough=False)).erased == 0


def test_a_copy_that_somebody_has_deleted_there_is_made_anew(sdk, other):
    file = sdk.beta.files.upload(file=("a.txt", TEXT.encode(), "text/plain"))
    other.says(Answer(message(said("900"))))
    sdk.messages.create(**asked("far", about(file)))
    (copy,) = (source["file_id"] for source in sources(other))
    del other.files[copy]
    error = {"type": "error", "error": {"type": "not_found_error", "message": f"File not found: {copy}"}}
    other.says(Answer(json.dumps(error).encode(), 404), Answer(message(said("900"))))
    assert sdk.messages.create(**asked("far", about(file))).content[0].text == "900"
    (again,) = (source["file_id"] for source in sources(other))
    assert again != copy
    assert again in other.files


def test_each_file_has_a_copy_of_its_own(sdk, other):
    files = [sdk.beta.files.upload(file=(f"{n}.txt", TEXT.encode(), "text/plain")) for n in (1, 2)]
    before = other.uploads
    other.says(Answer(message(said("900"))))
    sdk.messages.create(**asked("far", about(*files)))
    assert other.uploads == before + 2
    sdk.beta.files.delete(files[0].id)
    left = [source["file_id"] for source in sources(other)]
    assert [id in other.files for id in left] == [False, True]


def test_a_failed_upload_is_told_and_not_repeated(sdk, other):
    file = sdk.beta.files.upload(file=("a.txt", TEXT.encode(), "text/plain"))
    before = other.uploads
    other.says(Answer(b"", 500, {"only": "/v1/files"}))
    with pytest.raises(anthropic.InternalServerError, match="answered 500"):
        sdk.messages.create(**asked("far", about(file)))
    assert (other.uploads, other.asked) == (before, [])


def test_pages_that_a_copy_is_cited_by_are_looked_up_here(sdk, other):
    file = sdk.beta.files.upload(file=("a.pdf", pdf("Rent is 900 euros.", "It rises."), "application/pdf"))

    def cited(first: int, last: int, text: str) -> dict[str, Any]:
        found = {"type": "page_location", "cited_text": text, "document_index": 0, "document_title": None}
        return {"type": "citations_delta", "citation": {**found, "start_page_number": first, "end_page_number": last}}

    deltas = cited(1, 2, "Rent is 900 euros."), cited(2, 3, "Rent is 900 euros."), cited(2, 3, "It rises."), cited(2, 4, "It")
    other.says(Answer(message(block(0, {"type": "text", "text": "", "citations": []}, *deltas))))
    reply = sdk.messages.create(**asked("far", about(file, citations={"enabled": True})))
    places = [(c.start_page_number, c.end_page_number, c.cited_text, c.file_id) for c in reply.content[0].citations]
    assert places == [(1, 2, "Rent is 900 euros.", file.id), (2, 3, "It rises.", file.id)]
