"""`ropewalk doctor`: what it finds is so, what is asked for and broken gives exit code 1, and looking changes nothing."""

import asyncio
import json
import sys
import tomllib
from pathlib import Path

import pytest

from ropewalk.cli import main
from ropewalk.doctor.findings import Finding, Looking, broken
from ropewalk.doctor.installed import FEATURES, installed
from ropewalk.doctor.places import places
from ropewalk.doctor.probe import self_test
from ropewalk.doctor.run import probed
from ropewalk.files.local import LocalFiles
from ropewalk.files.settings import Settings

ROOT = Path(__file__).parents[2]


@pytest.fixture
def settings(tmp_path, monkeypatch):
    """A store that nobody has opened yet, and a key file that nobody has made."""
    for name in ("ROPEWALK_ROOT_KEY", "ROPEWALK_ROOT_KEY_COMMAND", "ROPEWALK_DATABASE_URL", "ROPEWALK_BLOBS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("ROPEWALK_ROOT_KEY_FILE", str(tmp_path / "keys" / "root.key"))
    return Settings(data=tmp_path / "data")


def found(settings):
    """Name: the findings of that name, of which the last one counts."""
    return {finding.name: finding for finding in asyncio.run(places(settings))}


def test_every_extra_for_users_has_its_feature():
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert set(FEATURES) == set(extras) - {"dev", "docs"}


def test_an_extra_that_is_needed_and_lacks_is_broken_and_else_a_note(monkeypatch):
    monkeypatch.setattr("ropewalk.doctor.installed._version", lambda package: None if package == "obstore" else "99")
    states = {finding.name: finding for finding in installed(())}
    assert (states["extra buckets"].state, states["extra data"].state) == ("note", "ok")
    assert states["extra buckets"].fix == "pip install 'ropewalk[buckets]'"
    assert {finding.name: finding.state for finding in installed({"buckets"})}["extra buckets"] == "broken"


def test_a_package_older_than_is_asked_for_is_broken(monkeypatch):
    monkeypatch.setattr("ropewalk.doctor.installed._version", lambda package: "4.0" if package == "transformers" else "99")
    (one,) = [finding for finding in installed(()) if finding.name == "transformers"]
    assert one.state == "broken"
    assert one.text.startswith("4.0; expected ")
    assert broken([one])


def test_looking_at_a_place_where_nothing_is_makes_nothing(settings):
    assert {finding.state for finding in found(settings).values()} == {"ok"}
    assert "none yet" in found(settings)["root key"].text
    assert list(settings.data.parent.iterdir()) == []


def test_a_store_in_use_is_reached_migrated_writable_and_opened_by_its_key(settings):
    LocalFiles(settings).put(b"one", "one.txt")
    seen = found(settings)
    assert {name: finding.state for name, finding in seen.items()} == dict.fromkeys(
        ("data folder", "root key", "database", "blobs"), "ok"
    )
    assert "reached, at migration" in seen["database"].text
    assert "the next start brings it" not in seen["database"].text


def test_a_store_whose_key_is_gone_is_broken_and_no_new_key_is_made(settings):
    LocalFiles(settings).put(b"one", "one.txt")
    key = settings.data.parent / "keys" / "root.key"
    key.unlink()
    assert found(settings)["root key"].state == "broken"
    assert not key.exists()


def test_a_key_of_another_store_and_one_that_others_can_read_are_said(settings):
    LocalFiles(settings).put(b"one", "one.txt")
    key = settings.data.parent / "keys" / "root.key"
    key.chmod(0o644)
    assert found(settings)["root key"].fix == f"chmod 600 {key}"
    key.write_text("A" * 43 + "=\n")
    assert found(settings)["database"].state == "broken"
    assert "the root key does not open this store" in found(settings)["database"].text


def test_a_database_that_cannot_be_reached_is_broken(settings):
    away = Settings(data=settings.data, database_url="postgresql+asyncpg://nobody:secret@127.0.0.1:1/none")
    line = found(away)["database"]
    assert line.state == "broken"
    assert "secret" not in line.text


def test_a_database_of_a_newer_version_is_broken(settings, monkeypatch):
    LocalFiles(settings).put(b"one", "one.txt")
    monkeypatch.setattr("ropewalk.doctor.places.newest_migration", lambda: "0001_first")
    assert "knows none after 0001_first" in found(settings)["database"].text
    assert found(settings)["database"].state == "broken"


def test_what_raises_is_a_finding_and_the_looking_goes_on():
    look = Looking("part")
    with look.at("one"):
        raise ValueError("two\nlines")
    look.say("two", "ok", "fine")
    assert [(finding.state, finding.text) for finding in look.found] == [("broken", "ValueError: two lines"), ("ok", "fine")]


def test_a_probe_that_dies_is_told_with_what_it_was_doing():
    code = (
        "import json, os, sys; print(json.dumps({'begins': 'reply'}), flush=True); print('bus', file=sys.stderr); os._exit(3)"
    )
    (one,) = probed([sys.executable, "-c", code])
    assert (one.name, one.state, one.text) == ("reply", "broken", "the process ended with exit code 3: bus")


def test_a_probe_that_hangs_is_ended():
    (one,) = probed([sys.executable, "-c", "import time; time.sleep(60)"], seconds=0.2)
    assert "signal 9" in one.text


def test_the_command_prints_json_and_its_exit_code_says_whether_what_is_needed_is_there(settings, monkeypatch, capsys):
    ours = [Finding("device", "gpu", "broken", "none found")]
    monkeypatch.setattr("ropewalk.doctor.run.probed", lambda command: ours if "gpu" in command else [])
    data = ["doctor", "--data", str(settings.data), "--no-self-test"]
    assert main([*data, "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["ok"]
    assert {finding["part"] for finding in said["findings"]} == {"installed", "machine", "state"}
    assert main([*data, "--need", "gpu"]) == 1
    assert capsys.readouterr().out.endswith("1 broken: device: gpu\n")


def test_the_self_test_passes_in_a_home_of_its_own(settings, tmp_path, monkeypatch):
    monkeypatch.setenv("ROPEWALK_HOME", str(settings.data))
    said = []
    self_test(tmp_path, said.append)
    assert [(line["name"], line["state"]) for line in said if "name" in line] == [
        ("file", "ok"),
        ("training step", "ok"),
        ("reply", "ok"),
    ], said
    assert not settings.data.exists()
