"""`ropewalk files ...`: what is printed, and the exit codes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from ropewalk.cli import main
from ropewalk.files.local import open_local
from ropewalk.registry import Registry
from ropewalk.tenants.workspaces import create_workspace

Say = Callable[..., str]


@pytest.fixture
def say(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsysbinary: pytest.CaptureFixture[bytes]) -> Say:
    """Runs `ropewalk files ...` and gives what it printed."""
    monkeypatch.setenv("ROPEWALK_HOME", str(tmp_path / "home"))

    def run(*words: str | Path, code: int = 0) -> str:
        capsysbinary.readouterr()
        said = main(["files", *map(str, words)])
        out, err = capsysbinary.readouterr()
        assert said == code, err
        return (err if code else out).decode()

    return run


@pytest.fixture
def notes(tmp_path: Path) -> Path:
    path = tmp_path / "notes.txt"
    path.write_text("a note")
    return path


def test_a_file_is_put_listed_shown_and_got(say: Say, notes: Path, tmp_path: Path) -> None:
    first, second = say("put", notes, notes, "--tag", "a", "--tag", "b", "--expires-in", "3600").split()
    assert [line.split()[0] for line in say("list").splitlines()] == [second, first]
    listed = [json.loads(line) for line in say("list", "--json").splitlines()]
    assert [file["id"] for file in listed] == [second, first]
    known = json.loads(say("show", first, "--json"))
    assert (known["filename"], known["size_bytes"], known["tags"]) == ("notes.txt", 6, ["a", "b"])
    assert known["mime_type"] == "text/plain"
    assert known["expires_at"] > known["created_at"]
    assert "notes.txt" in say("show", first)
    assert say("get", first) == "a note"
    assert say("get", second, "--out", tmp_path / "got.txt") == ""
    assert (tmp_path / "got.txt").read_text() == "a note"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["got.txt", "home", "notes.txt"]


def test_another_name_and_json_on_put(say: Say, notes: Path) -> None:
    assert json.loads(say("put", notes, "--name", "other.md", "--json"))["filename"] == "other.md"
    assert "7776000" in say("put", notes, "--expires-in", "1", code=2)


def test_a_receipt_is_printed_or_saved_and_verifies_offline(say: Say, notes: Path, tmp_path: Path) -> None:
    first, second = say("put", notes, notes).split()
    assert json.loads(say("delete", first))["content"] == "shared"
    receipt, key = tmp_path / "receipt.json", tmp_path / "key.pem"
    assert say("delete", second, "--receipt", receipt) == ""
    assert say("list") == ""
    key.write_text(say("receipt-key"))
    assert json.loads(say("receipt-key", "--json"))["public_key"] == key.read_text()
    nowhere = tmp_path / "nowhere"
    offline = ("verify-receipt", receipt, "--public-key", key, "--data", nowhere)
    assert say(*offline, "--id", second).startswith("genuine: receipt 2")
    assert not nowhere.exists()
    assert say("verify-receipt", receipt).startswith("genuine")
    assert "another file" in say(*offline, "--id", first, code=1)
    receipt.write_text(receipt.read_text().replace('"size_bytes": 6', '"size_bytes": 7'))
    assert "signature does not match" in say(*offline, code=1)


def test_a_receipt_that_cannot_be_saved_is_printed(say: Say, notes: Path, tmp_path: Path) -> None:
    id = say("put", notes).strip()
    assert "cannot write" in say("delete", id, "--receipt", tmp_path / "no" / "folder.json", code=2)
    assert say("list") == ""


def test_several_files_cannot_share_one_receipt_file(say: Say, notes: Path, tmp_path: Path) -> None:
    ids = say("put", notes, notes).split()
    assert "one file" in say("delete", *ids, "--receipt", tmp_path / "receipt.json", code=2)
    assert len(say("list").splitlines()) == 2


def test_damage_is_found_named_and_healed(say: Say, notes: Path, tmp_path: Path) -> None:
    id = say("put", notes).strip()
    assert say("verify").startswith("1 contents, 6 bytes, 0 receipts verified")
    (blob,) = (path for path in (tmp_path / "home" / "files" / "blobs").rglob("*") if path.is_file())
    whole = blob.read_bytes()
    blob.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    say("verify", code=1)
    assert json.loads(_json_of(say, "verify"))["damaged"].keys() == {id}
    blob.unlink()
    assert json.loads(_json_of(say, "verify"))["damaged"].keys() == {id}
    blob.write_bytes(whole)
    assert json.loads(say("verify", "--json"))["whole"]


def _json_of(say: Say, verb: str) -> str:
    """What a failing command prints on its standard output."""
    import contextlib
    import io

    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        say(verb, "--json", code=1)
    return out.getvalue()


def test_the_receipt_lists_the_adapters_trained_on_the_file(say: Say, notes: Path, tmp_path: Path) -> None:
    id = say("put", notes).strip()
    registry = Registry(tmp_path / "home" / "registry")
    registry.publish_base("base", tmp_path)
    registry.publish_adapter("house", tmp_path, "base", {"file": f"file_first {id}"})
    registry.publish_adapter("other", tmp_path, "base", {"file": "file_other"})
    adapter = tmp_path / "run" / "adapter"  # as `ropewalk train` leaves it
    adapter.mkdir(parents=True)
    (tmp_path / "run" / "run.json").write_text(json.dumps({"config": {"datasets": [{"path": "rows.jsonl"}, {"path": id}]}}))
    assert main(["models", "add", "added", str(adapter), "--base", "base"]) == 0
    assert json.loads(say("delete", id))["adapters"] == ["added", "house"]


def test_files_and_models_are_those_of_the_folder_that_is_named(say: Say, notes: Path, tmp_path: Path) -> None:
    elsewhere = ["--data", str(tmp_path / "elsewhere")]
    id = say("put", notes, *elsewhere).strip()
    adapter = tmp_path / "run" / "adapter"
    adapter.mkdir(parents=True)
    (tmp_path / "run" / "run.json").write_text(json.dumps({"config": {"datasets": [{"path": id}]}}))
    assert main(["models", "add", "base", str(tmp_path), *elsewhere]) == 0
    assert main(["models", "add", "house", str(adapter), "--base", "base", *elsewhere]) == 0
    assert Registry(tmp_path / "home" / "registry").entries() == []
    assert say("list") == ""
    assert json.loads(say("delete", id, *elsewhere))["adapters"] == ["house"]


def test_workspaces_do_not_see_each_other(say: Say, notes: Path) -> None:
    open_local().run(lambda store, _: create_workspace(store.database, store.vault, "second"))
    id = say("put", notes, "--workspace", "second").strip()
    assert say("list") == ""
    assert id in say("list", "--workspace", "second")
    assert say("show", id, code=2) == f"ropewalk: File `{id}` not found.\n"


def test_the_sweep_tells_what_it_found(say: Say, notes: Path, tmp_path: Path) -> None:
    say("put", notes)
    (tmp_path / "home" / "files" / "blobs" / "ab").mkdir(exist_ok=True)
    (tmp_path / "home" / "files" / "blobs" / "ab" / "ab00").write_bytes(b"left by a crash")
    assert json.loads(say("sweep", "--json"))["orphans"] == 1
    assert say("sweep") == "0 expired, 0 abandoned, 0 orphans, 0 erased, 0 purged, 0 missing\n"
