"""The one command for a GPU: order, time limits, and one file that says what each part found, with a Python that only pretends to measure."""

import json
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PRETEND = """#!/bin/sh
case $1 in
*gpu_results.py) exec {python} "$@" ;;
esac
echo "$@" >> {log}
for word in "$@"; do file=$word; done
case $* in
*moe_lora.py*--models-only*) exit 1 ;;
*grpo.py*) sleep 60 ;;
esac
echo '{{"script": "'$(basename $1)'"}}' > "$file"
"""


@pytest.fixture
def measure(tmp_path):
    """Runs gpu.sh -> its exit code, the file it filled, and the commands that it ran."""
    log, pretend = tmp_path / "log", tmp_path / "python"
    pretend.write_text(PRETEND.format(python=sys.executable, log=log))
    pretend.chmod(pretend.stat().st_mode | stat.S_IXUSR)

    def run(*words, **environment):
        given = {"PYTHON": str(pretend), "RESULTS": str(tmp_path / "results"), "COMMIT": "abc", **environment}
        done = subprocess.run(
            ["sh", str(ROOT / "benchmarks" / "gpu.sh"), *words], env=os.environ | given, capture_output=True, text=True
        )
        files = sorted((tmp_path / "results").rglob("*.json"))
        found = json.loads(files[0].read_text()) if files else None
        return done, found, log.read_text().splitlines() if log.exists() else []

    return run


def test_parts_run_the_most_valuable_first_and_go_on_after_one_that_fails_or_hangs(measure):
    done, found, ran = measure("kernels", "layers", "models", "grpo", "serve", DRY="1", GRPO_SECONDS="1")
    assert done.returncode == 1, done.stderr
    assert [line.split()[0].rpartition("/")[2] for line in ran] == [
        "gpu_kernels.py",
        "moe_lora.py",
        "moe_lora.py",
        "grpo.py",
        "serve.py",
    ]
    assert all("--device cpu" in line for line in ran)
    assert "--dry-run --layers-only" in ran[1]
    parts = found["parts"]
    statuses = {name: part["status"] for name, part in parts.items()}
    assert statuses == {"kernels": "0", "layers": "0", "models": "1", "grpo": "124", "serve": "0"}
    assert parts["serve"]["found"] == {"script": "serve.py"}
    assert "found" not in parts["models"]
    assert (found["commit"], found["name"]) == ("abc", "dry-run")


def test_a_second_call_adds_to_the_days_file_and_without_time_nothing_starts(measure):
    measure("kernels", DRY="1")
    done, found, ran = measure("serve", DRY="1", MINUTES="0")
    assert done.returncode == 0
    assert (found["parts"]["kernels"]["status"], found["parts"]["serve"]["status"]) == ("0", "no time left")
    assert len(ran) == 1


def test_without_a_gpu_nothing_is_measured(measure):
    done, found, ran = measure(CUDA_VISIBLE_DEVICES="")
    assert (done.returncode, found, ran) == (77, None, [])
    assert "no GPU" in done.stderr


def test_an_unknown_option_is_refused(measure):
    done, _, ran = measure("--quikc")
    assert (done.returncode, ran) == (2, [])
