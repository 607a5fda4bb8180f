from __future__ import annotations

import hashlib
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from ropewalk.errors import NotFound, OutputError
from ropewalk.files import local as store_module
from ropewalk.files.local import Store, is_id, resolve


def test_bytes_come_back_under_their_id_and_digest(tmp_path: Path) -> None:
    store = Store(tmp_path / "files")
    file = store.put(b"hello", "greeting.txt")
    assert store.get(file.id).read_bytes() == b"hello"
    assert (file.filename, file.size, file.sha256) == ("greeting.txt", 5, hashlib.sha256(b"hello").hexdigest())
    assert store.show(file.id) == file


def test_equal_bytes_are_kept_once_and_erased_with_their_last_file(tmp_path: Path) -> None:
    store = Store(tmp_path)
    first, second = store.put(b"same", "a"), store.put(b"same", "b")
    assert first.id != second.id
    content = store.get(first.id)
    assert content == store.get(second.id)
    store.delete(first.id)
    assert content.read_bytes() == b"same"
    store.delete(second.id)
    assert not content.exists()
    assert store.list() == []


def test_a_path_is_put_under_its_own_name(tmp_path: Path) -> None:
    source = tmp_path / "rows.jsonl"
    source.write_text("{}\n")
    assert Store(tmp_path / "s").put(source).filename == "rows.jsonl"


def test_an_unknown_id_is_not_found_and_names_the_id(tmp_path: Path) -> None:
    with pytest.raises(NotFound, match="file_0000"):
        Store(tmp_path).get("file_0000")
    with pytest.raises(NotFound, match="no id of a file"):
        Store(tmp_path).get("../../etc/passwd")


def test_a_path_where_nothing_is_is_not_found(tmp_path: Path) -> None:
    with pytest.raises(NotFound, match=r"rows\.jsonl"):
        Store(tmp_path).put(tmp_path / "rows.jsonl")


def test_putting_and_deleting_the_same_bytes_at_once_never_loses_what_is_kept(tmp_path: Path) -> None:
    store = Store(tmp_path)

    def work(_: int) -> bool:
        file = store.put(b"shared by all", "x")
        kept = store.get(file.id).read_bytes() == b"shared by all"
        store.delete(file.id)
        return kept

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(work, range(100)))
    assert store.list() == []


def test_a_crash_while_writing_leaves_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store(tmp_path)

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OutputError, match="No space left"):
        store.put(b"lost", "lost.txt")
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def test_resolve_follows_ids_and_leaves_paths_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ROPEWALK_HOME", str(tmp_path))
    file = Store(tmp_path / "files").put(b"x", "x")
    assert resolve(file.id).read_bytes() == b"x"
    assert resolve("data/rows.jsonl") == Path("data/rows.jsonl")
    assert resolve("file_rows.jsonl") == Path("file_rows.jsonl")
    assert not is_id("file_rows.jsonl")


def test_the_home_is_taken_from_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ROPEWALK_HOME", str(tmp_path))
    assert store_module.home() == tmp_path
