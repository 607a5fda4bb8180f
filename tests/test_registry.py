from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from ropewalk.errors import BadInput, NotFound, OutputError
from ropewalk.registry import Registry


def published(folder: Path) -> Registry:
    registry = Registry(folder / "registry")
    (folder / "weights").mkdir(exist_ok=True)
    registry.publish_base("base", folder / "weights", {"origin": "a test"})
    registry.publish_adapter("adapter", folder / "weights", "base", {"file": "file_1"})
    return registry


def test_what_is_published_is_found_by_name(tmp_path: Path) -> None:
    registry = published(tmp_path)
    entry = registry.resolve("adapter")
    assert (entry.kind, entry.base, entry.path, entry.lineage) == (
        "adapter",
        "base",
        str(tmp_path / "weights"),
        {"file": "file_1"},
    )
    assert [e.name for e in Registry(tmp_path / "registry").entries()] == ["adapter", "base"]


def test_an_alias_moves_and_moves_back(tmp_path: Path) -> None:
    registry = published(tmp_path)
    registry.ship("answers", "base")
    registry.ship("answers", "adapter")
    registry.ship("answers", "adapter")
    assert registry.resolve("answers").name == "adapter"
    assert registry.history("answers") == ["base", "adapter"]
    assert registry.rollback("answers").name == "base"
    assert registry.aliases() == {"answers": "base"}
    with pytest.raises(BadInput, match="nothing but 'base'"):
        registry.rollback("answers")


def test_an_alias_that_somebody_else_has_moved_is_left_as_it_is(tmp_path: Path) -> None:
    registry = published(tmp_path)
    registry.ship("answers", "base", only_from=[])
    registry.ship("answers", "adapter", only_from=["base"])
    with pytest.raises(BadInput, match="moved by somebody else meanwhile and now points at 'adapter'"):
        registry.ship("answers", "base", only_from=["base"])
    with pytest.raises(BadInput, match="moved by somebody else"):
        registry.rollback("answers", only_from=["base"])
    assert registry.history("answers") == ["base", "adapter"]


def test_an_alias_gets_back_the_history_it_had(tmp_path: Path) -> None:
    registry = published(tmp_path)
    registry.ship("answers", "adapter")
    registry.restore("answers", [])
    assert registry.aliases() == {}
    registry.restore("answers", ["base", "adapter"])
    assert registry.rollback("answers").name == "base"


def test_a_name_that_nobody_knows_is_answered_with_those_that_are_known(tmp_path: Path) -> None:
    registry = published(tmp_path)
    with pytest.raises(NotFound, match="'adaptor'; known: adapter, base"):
        registry.ship("answers", "adaptor")
    with pytest.raises(NotFound, match="no alias"):
        registry.rollback("answers")


def test_an_adapter_needs_a_published_base_under_it(tmp_path: Path) -> None:
    registry = published(tmp_path)
    with pytest.raises(NotFound, match="'other'"):
        registry.publish_adapter("x", tmp_path, "other")
    with pytest.raises(BadInput, match="is an adapter"):
        registry.publish_adapter("x", tmp_path, "adapter")
    with pytest.raises(NotFound, match="no folder"):
        registry.publish_base("x", tmp_path / "missing")


def test_names_and_aliases_do_not_shadow_each_other(tmp_path: Path) -> None:
    registry = published(tmp_path)
    registry.ship("answers", "base")
    with pytest.raises(BadInput, match="is an alias"):
        registry.publish_base("answers", tmp_path)
    with pytest.raises(BadInput, match="choose another alias"):
        registry.ship("adapter", "base")


def test_a_failed_change_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    registry = published(tmp_path)
    before = registry.file.read_bytes()

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OutputError, match="No space left"):
        registry.ship("answers", "base")
    assert registry.file.read_bytes() == before


WRITER = (
    "import sys; from ropewalk.registry import Registry; "
    "[Registry(sys.argv[1]).publish_base(f'base{i}', '.') for i in range(int(sys.argv[2]), int(sys.argv[2]) + 10)]"
)


def test_two_processes_that_write_at_once_lose_nothing(tmp_path: Path) -> None:
    writers = [subprocess.Popen([sys.executable, "-c", WRITER, str(tmp_path), start]) for start in ("0", "10")]
    assert [writer.wait() for writer in writers] == [0, 0]
    assert len(json.loads((tmp_path / "registry.json").read_text())["entries"]) == 20
