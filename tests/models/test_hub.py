from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from huggingface_hub import constants

from ropewalk.errors import ModelError, OutputError
from ropewalk.models.hub import cached_folder, ensure_tokenizer, pull, resolve_base

_spec = importlib.util.spec_from_file_location("hub_server", Path(__file__).with_name("hub_server.py"))
hub_server = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(hub_server)
COMMIT = hub_server.COMMIT


def safetensors(values: int, fill: int = 7) -> bytes:
    """A safetensors file of one uint8 tensor, written out by hand."""
    header = json.dumps({"a": {"dtype": "U8", "shape": [values], "data_offsets": [0, values]}}).encode()
    return len(header).to_bytes(8, "little") + header + bytes([fill]) * values


@pytest.fixture
def hub(tmp_path, monkeypatch):
    with hub_server.serving() as serving:
        monkeypatch.setattr(constants, "ENDPOINT", serving.url)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", serving.url + "/{repo_id}/resolve/{revision}/{filename}")
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_PROGRESS_BARS", True)
        serving.models["org/tiny"] = {
            "config.json": b'{"model_type": "llama"}',
            "tokenizer.json": b"{}",
            "model.safetensors": safetensors(300_000),
            "pytorch_model.bin": b"pickle",
            "original/consolidated.safetensors": safetensors(10),
            "modeling_tiny.py": b"raise SystemExit",
            "README.md": b"---\nlicense: apache-2.0\n---",
        }
        yield serving


def test_a_pull_is_pinned_shows_the_licence_and_takes_no_pickle_and_no_code(hub):
    said = []
    pulled = pull("org/tiny", tell=said.append)
    assert pulled.commit == COMMIT
    assert pulled.licence == "apache-2.0"
    assert said[0].startswith(f"org/tiny at {COMMIT[:12]}: licence apache-2.0, 4 files")
    assert {path.name for path in pulled.folder.iterdir()} == {
        "config.json",
        "tokenizer.json",
        "model.safetensors",
        "README.md",
    }
    assert (pulled.folder / "model.safetensors").read_bytes() == safetensors(300_000)
    assert cached_folder("org/tiny") == pulled.folder


def test_code_is_fetched_only_when_it_is_trusted(hub):
    assert (pull("org/tiny", trust_remote_code=True).folder / "modeling_tiny.py").is_file()


def test_a_cached_model_needs_no_hub(hub, monkeypatch):
    folder = pull("org/tiny").folder
    hub.asked.clear()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert resolve_base("org/tiny") == folder
    assert resolve_base("org/tiny", COMMIT) == folder
    assert hub.asked == []
    with pytest.raises(ModelError, match="HF_HUB_OFFLINE forbids"):
        resolve_base("org/other")


def test_a_cut_download_goes_on_where_it_stopped_in_a_later_pull(hub):
    hub.cut_after = 1000
    with pytest.raises(ModelError, match="run it again to go on from here"):
        pull("org/tiny")
    parts = list(Path(constants.HF_HUB_CACHE).rglob("*.part"))
    have = parts[0].stat().st_size
    assert have == 4 * 1000  # four attempts, each cut after 1000 bytes, none starting over
    hub.cut_after = None
    hub.asked.clear()
    pulled = pull("org/tiny")
    assert ("model.safetensors", f"bytes={have}-") in hub.asked
    assert pulled.fetched == len(safetensors(300_000)) - have
    assert (pulled.folder / "model.safetensors").read_bytes() == safetensors(300_000)
    assert not list(Path(constants.HF_HUB_CACHE).rglob("*.part"))


def test_a_file_that_arrives_damaged_is_not_kept(hub):
    hub.cut_after = 1000
    with pytest.raises(ModelError, match="run it again"):
        pull("org/tiny")
    part = next(Path(constants.HF_HUB_CACHE).rglob("*.part"))
    part.write_bytes(b"x" * part.stat().st_size)
    hub.cut_after = None
    with pytest.raises(ModelError, match=r"model\.safetensors arrived damaged"):
        pull("org/tiny")
    assert pull("org/tiny").folder.is_dir()


def test_a_damaged_cache_is_completed(hub):
    folder = pull("org/tiny").folder
    (folder / "model.safetensors").resolve().unlink()
    assert resolve_base("org/tiny") == folder
    assert (folder / "model.safetensors").read_bytes() == safetensors(300_000)


def test_a_full_disk_is_told_before_anything_is_fetched(hub, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 9, 1))
    with pytest.raises(OutputError, match=r"org/tiny still needs 300 kB and .* has 0 kB free; .*HF_HOME"):
        pull("org/tiny")
    assert hub.asked == []


def test_a_name_that_nobody_knows(hub):
    with pytest.raises(ModelError, match="neither a folder here nor a model on the hub"):
        resolve_base("org/nothing")


def test_a_revision_that_does_not_exist(hub):
    with pytest.raises(ModelError, match="org/tiny has no revision 'v9'"):
        pull("org/tiny", "v9")


def test_a_hub_that_does_not_answer(hub, monkeypatch):
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(ModelError, match="does not answer"):
        resolve_base("org/elsewhere")


def test_a_model_of_pickles_only_is_refused(hub):
    del hub.models["org/tiny"]["model.safetensors"]
    with pytest.raises(ModelError, match="no safetensors weights"):
        pull("org/tiny")


def test_a_folder_of_pickles_only_is_refused(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "pytorch_model.bin").write_bytes(b"pickle")
    with pytest.raises(ModelError, match="safetensors only"):
        resolve_base(tmp_path)


@pytest.mark.parametrize("name", ["./nowhere", "../nowhere/deep", "/no/where", "~/nowhere", "a/b/c"])
def test_what_looks_like_a_path_is_never_looked_up_on_the_hub(hub, name):
    with pytest.raises(ModelError, match="not found"):
        resolve_base(name)
    assert hub.asked == []


def test_a_folder_without_config_says_what_it_has(tmp_path):
    (tmp_path / "notes.txt").write_text("")
    with pytest.raises(ModelError, match=r"no config.json, only notes.txt"):
        resolve_base(tmp_path)


def test_a_model_with_a_tokenizer_keeps_it_and_one_without_is_an_error(tmp_path):
    with pytest.raises(ModelError, match="has no tokenizer"):
        ensure_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    assert ensure_tokenizer(tmp_path) == tmp_path


def test_a_pull_works_in_a_process_that_has_imported_nothing_else(hub, tmp_path):
    code = "from ropewalk.models.hub import pull; print(pull('org/tiny').commit)"
    environment = {**os.environ, "HF_ENDPOINT": hub.url, "HF_HUB_CACHE": str(tmp_path / "other")}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == COMMIT
