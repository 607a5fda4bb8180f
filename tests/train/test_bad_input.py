"""What a user gets wrong is told as one clear last line, in under two seconds, before torch is imported, and leaves nothing half written."""

import json
import os
import subprocess
import sys

import pytest

from ropewalk.cli import main
from spent import spent


def attempt(path, *arguments):
    """Runs `ropewalk train` in a process of its own; gives exit code, last line, whether torch was imported, processor seconds."""
    code, _, told, seconds = spent(sys.executable, "-X", "importtime", "-m", "ropewalk", "train", str(path), *arguments)
    said = [line for line in told.splitlines() if not line.startswith("import time:")]
    imported = any(line.rsplit("|", 1)[-1].strip() == "torch" for line in told.splitlines() if line.startswith("import time:"))
    assert "Traceback" not in told
    return code, said[-1], imported, seconds


def refused(config, *words, **keys):
    code, last, imported, seconds = attempt(config(**keys))
    assert code == 2
    assert last.startswith("ropewalk: ")
    for word in words:
        assert word in last
    assert not imported
    assert seconds < 2
    return last


def test_a_misspelt_key_names_the_line_and_the_key_that_was_meant(config):
    path = config(sample_packing=None, sample_pakcing=True)
    line = next(i for i, text in enumerate(path.read_text().splitlines(), 1) if "sample_pakcing" in text)
    code, last, imported, _ = attempt(path)
    assert code == 2
    assert last == f"ropewalk: {path}:{line}: unknown key 'sample_pakcing'; did you mean 'sample_packing'?"
    assert not imported


def test_a_missing_model_folder(config, tmp_path):
    refused(config, str(tmp_path / "nowhere"), "not found", base_model=str(tmp_path / "nowhere"))


def test_a_broken_line_17(config, tmp_path, rows):
    lines = rows.read_text().splitlines()
    lines[16] = lines[16][:-3]
    broken = tmp_path / "broken.jsonl"
    broken.write_text("\n".join(lines) + "\n")
    refused(config, f"{broken}:17: malformed JSON", datasets=[{"path": str(broken), "type": "chat_template"}])
    assert not list((tmp_path / "home").rglob("*.bin"))


def test_a_row_without_an_assistant_turn(config, tmp_path, rows):
    lines = rows.read_text().splitlines()
    lines[4] = json.dumps({"messages": [{"role": "user", "content": "Anyone there?"}]})
    path = tmp_path / "alone.jsonl"
    path.write_text("\n".join(lines) + "\n")
    refused(config, f"{path}:5:", "assistant", datasets=[{"path": str(path), "type": "chat_template"}])


def test_an_output_folder_that_cannot_be_written(config, tmp_path):
    (tmp_path / "file").write_text("in the way")
    refused(config, f"output_dir {tmp_path}/file/run cannot be written", output_dir=str(tmp_path / "file" / "run"))


def test_a_full_disk_before_the_start(config, monkeypatch, capsys):
    full = os.statvfs_result((4096, 4096, 1000, 10, 10, 1000, 10, 10, 0, 255))
    monkeypatch.setattr("shutil.os.statvfs", lambda path: full)
    assert main(["train", str(config())]) == 2
    assert "the disk is full (0 MB free" in capsys.readouterr().err.splitlines()[-1]


def test_a_disk_that_fills_up_under_way_names_what_is_safe_and_leaves_no_torn_checkpoint(config, tmp_path):
    """Files of this process may not grow beyond 48 kB: the first checkpoint's optimizer state cannot be written."""
    path = config(lora_r=16)
    limited = "import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (48 << 10, 48 << 10)); import signal; "
    limited += "signal.signal(signal.SIGXFSZ, signal.SIG_IGN); from ropewalk.cli import main; sys.exit(main(sys.argv[1:]))"
    done = subprocess.run([sys.executable, "-c", limited, "train", str(path)], capture_output=True, text=True)
    assert done.returncode == 2, done.stderr
    assert "File too large" in done.stderr.splitlines()[-1]
    assert "run it again" in done.stderr.splitlines()[-1]
    assert not [p for p in (tmp_path / "run" / "checkpoints").iterdir() if not p.name.startswith(".")]
    assert main(["train", str(path)]) == 0  # with room again, the same command goes on


@pytest.mark.parametrize("text", ["", "- just\n- a list\n", "base_model: [unclosed\n"], ids=["empty", "list", "broken"])
def test_a_file_that_is_no_configuration(tmp_path, text):
    path = tmp_path / "run.yml"
    path.write_text(text)
    code, last, imported, _ = attempt(path)
    assert code == 2
    assert str(path) in last
    assert not imported


def test_two_processes_training_into_one_folder(config, tmp_path):
    from ropewalk.train.folder import open_folder

    held = open_folder(tmp_path / "run", {})
    (tmp_path / "run" / "run.json").unlink()
    refused(config, "another process is training into it")
    held.close()
