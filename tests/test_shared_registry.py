"""The registry of servers that share a PostgreSQL: as a single one, at once at all of them, each with folders of its own."""

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest

from ropewalk.errors import BadInput, NotFound
from ropewalk.registry import Registry
from ropewalk.shared_registry import SharedRegistry, open_registry


@pytest.fixture
def two(tmp_path, postgres_url):
    """Two servers' sight of it."""
    both = [open_registry(tmp_path / name, postgres_url) for name in "ab"]
    for name in ("base", "a/house", "b/house"):
        (tmp_path / name).mkdir(parents=True)
    yield both
    for one in both:
        one.close()


def test_what_one_does_the_other_sees_at_once(two, tmp_path):
    one, other = two
    assert isinstance(one, SharedRegistry)
    one.publish_base("base", tmp_path / "base")
    other.publish_adapter("house", tmp_path / "b" / "house", "base", {"workspace": "w"})
    assert [(entry.name, entry.path) for entry in one.entries()] == [
        ("base", str(tmp_path / "base")),  # at the same place for both
        ("house", str(tmp_path / "a" / "house")),  # of each its own
    ]
    assert other.ship("answers", "base").path == str(tmp_path / "base")
    one.ship("answers", "house", only_from=["base"])
    with pytest.raises(BadInput, match="moved by somebody else"):
        other.ship("answers", "base", only_from=["base"])
    with pytest.raises(NotFound, match="known: answers, base, house"):
        other.ship("answers", "none")
    assert other.rollback("answers").name == "base"
    one.ship("answers", "house")
    assert other.resolve("answers").path == str(tmp_path / "b" / "house")
    assert other.withdraw("workspace", "w") == ["house"]
    assert (one.aliases(), [entry.name for entry in one.entries()]) == ({"answers": "base"}, ["base"])


def test_two_that_write_at_once_lose_nothing(two, tmp_path):
    def publish(number):
        two[number % 2].publish_base(f"base{number}", tmp_path / "base")

    with ThreadPoolExecutor(8) as threads:
        list(threads.map(publish, range(16)))
    assert len(two[0].entries()) == 16


def test_what_a_server_knew_before_is_brought_along_and_commands_see_it(tmp_path, postgres_url):
    alone = Registry(tmp_path / "registry")
    (tmp_path / "jobs" / "house").mkdir(parents=True)
    alone.publish_base("base", tmp_path)
    alone.publish_adapter("house", tmp_path / "jobs" / "house", "base")
    command = [sys.executable, "-W", "error", "-m", "ropewalk", "models"]
    by_environment = {"ROPEWALK_HOME": str(tmp_path), "ROPEWALK_DATABASE_URL": postgres_url}
    by_flags = ["--data", str(tmp_path), "--database-url", postgres_url]
    for verb, more in ((["ship", "answers", "house"], by_environment), (["list", *by_flags], {})):
        done = subprocess.run([*command, *verb], capture_output=True, text=True, env={**os.environ, **more})
        assert (done.returncode, done.stderr) == (0, "")
    assert "answers -> house" in done.stdout
    assert json.loads(alone.file.read_text())["aliases"] == {}
    other = open_registry(tmp_path / "elsewhere", postgres_url)
    assert other.resolve("answers").path == str(tmp_path / "elsewhere" / "jobs" / "house")
    other.close()
