"""What the benchmarks share: watching a process tree, tables, the assets of the side-by-side job."""

from __future__ import annotations

import hashlib
import json
import signal
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).resolve().parents[2] / "benchmarks"
pytestmark = pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads /proc")


@pytest.fixture(autouse=True)
def _beside_the_scripts(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))


def test_the_memory_and_cpu_of_a_child_process_are_counted(tmp_path):
    from measure import watch

    child = "import time; x = bytearray(150 << 20); t = time.process_time()\nwhile time.process_time() - t < 0.6: pass\ntime.sleep(0.5)"
    parent = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"
    done = watch([sys.executable, "-c", parent], tmp_path / "log")
    assert done.code == 0
    assert 150 < done.peak_rss / 2**20 < 260  # the child's 150 MB and two interpreters
    assert 0.6 <= done.cpu_seconds < 2.0


def test_a_line_that_matches_is_a_mark_even_when_drawn_over_with_a_carriage_return(tmp_path):
    from measure import watch

    code = "import sys; sys.stdout.write('bar\\r{\\'loss\\': 2.5}\\rbar\\nloss of nothing\\n{\\'loss\\': 1.25}')"
    done = watch([sys.executable, "-c", code], tmp_path / "log", pattern=r"'loss': ([0-9.]+)")
    assert [mark.value for mark in done.marks] == [2.5, 1.25]
    assert done.marks[0].seconds <= done.seconds


def test_a_command_that_does_not_end_is_killed_with_its_children(tmp_path):
    from measure import watch

    code = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'import time; time.sleep(60)'])"
    done = watch([sys.executable, "-c", code], tmp_path / "log", timeout=1.0)
    assert done.code == -signal.SIGKILL
    assert done.seconds < 20


def test_a_table_aligns_numbers_and_shows_what_is_missing():
    from measure import table

    # "1,032,192" and "-" stand to the right; texts to the left.
    assert table(("name", "n"), [["ours", 1032192], ["peer", None]]).splitlines() == [
        "| name |         n |",
        "|------|----------:|",
        "| ours | 1,032,192 |",
        "| peer |         - |",
    ]


def test_the_rows_of_the_job_are_the_same_everywhere():
    from peers.assets import chat_rows

    rows = chat_rows()
    assert len(rows) == 2000
    digest = hashlib.sha256(json.dumps(rows).encode()).hexdigest()
    assert digest == "02051c8bb846893069823dd3e9c053830ff8c34578f1e9f975f99767e46625b2"


def test_trained_parameters_are_counted_from_the_header_of_the_saved_adapter(tmp_path):
    import torch
    from safetensors.torch import save_file

    from train_cpu import parameters_in

    save_file({"a": torch.zeros(3, 4), "b": torch.zeros(5)}, tmp_path / "x.safetensors", metadata={"format": "pt"})
    assert parameters_in(tmp_path / "x.safetensors") == 17  # 3 * 4 + 5


def test_a_peer_that_cannot_take_part_is_named_in_the_report():
    from train_cpu import report

    result = {
        "contenders": {},
        "missing": {"axolotl": "`pip install ...` ended with 1"},
        "ratios": {},
        "targets": {},
        "gates": {},
        "machine": {"cpu": "x", "cores": 2, "load": 0.1},
        "job": {"repeats": 1, "steps": 20, "threads": 1, "window": [6, 20]},
    }
    assert "Axolotl" in report(result)
    assert "ended with 1" in report(result)
