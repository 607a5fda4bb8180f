"""The one command for a GPU: order, time limits, and one file that says what each part found, with a Python that only pretends to measure."""

import importlib.util
import json
import os
import shutil
import stat
import subprocess
import sys
import zipfile
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


def test_wheels_that_came_along_are_seen_from_an_environment_within_another(tmp_path):
    """As on a machine whose Python is one: a third would not see the packages of the first."""
    (tmp_path / "wheels").mkdir()
    with zipfile.ZipFile(tmp_path / "wheels" / "ropewalk_probe-1-py3-none-any.whl", "w") as wheel:
        wheel.writestr("ropewalk_probe.py", "")
        for name, text in (
            ("METADATA", "Metadata-Version: 2.1\nName: ropewalk_probe\nVersion: 1\n"),
            ("WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"),
            ("RECORD", ""),
        ):
            wheel.writestr(f"ropewalk_probe-1.dist-info/{name}", text)
    pretend = tmp_path / "python"
    pretend.write_text(
        "#!/bin/sh\ncase $1 in -m) ;; *gpu_results.py) "
        f"{sys.executable} -c 'import ropewalk_probe, torch; print(ropewalk_probe.__file__)' >&2; exit 1 ;; esac\n"
        f'exec {sys.executable} "$@"\n'
    )
    pretend.chmod(0o755)
    copy = tmp_path / "copy"
    (copy / "benchmarks").mkdir(parents=True)
    shutil.copy(ROOT / "benchmarks" / "gpu.sh", copy / "benchmarks")
    given = {"PYTHON": str(pretend), "WHEELS": str(tmp_path / "wheels"), "DRY": "1"}
    done = subprocess.run(["sh", str(copy / "benchmarks" / "gpu.sh")], env=os.environ | given, capture_output=True, text=True)
    assert done.returncode == 77
    assert str(copy / ".gpu" / "ropewalk_probe.py") in done.stderr


def test_what_was_found_is_a_table_too(tmp_path):
    row = {
        "contender": "ours",
        "shape": "s",
        "dtype": "bfloat16",
        "stored": "",
        "tokens": 8,
        "policy": "keep",
        "ms": 6.5,
        "held_mb": 1.0,
    }
    found = {"rows": [row], "best_peer_ratio": {"s, keep": 1.5}, "ratios": {"s, keep": {"times_faster": {"grouped": 2.5}}}}
    parts = {
        "layers": {"status": "0", "seconds": 9, "found": found},
        "gpu_12": {"status": "124", "seconds": 9, "found": {"shapes": {"qwen": {"fits": True, "tokens_per_s": 1000.0}}}},
        "memory": {"status": "no time left", "seconds": 0},
    }
    file = tmp_path / "2026-01-01.json"
    file.write_text(json.dumps({"name": "GPU", "commit": "abc", "parts": parts}))
    said = subprocess.run(
        [sys.executable, ROOT / "benchmarks" / "gpu_results.py", "show", file], capture_output=True, text=True, check=True
    )
    assert (tmp_path / "2026-01-01.md").read_text().strip() == said.stdout.strip()
    for wanted in ("GPU, 2026-01-01, abc", "cut off", "no time left", "times as fast as grouped", "6.50", "tokens_per_s"):
        assert wanted in said.stdout


@pytest.mark.parametrize("asked", ["torch>=2", "huggingface_hub>=1.0", "numpy"])
def test_wheels_are_collected_of_what_a_machine_with_torch_lacks(asked):
    path = ROOT / "benchmarks" / "gpu_wheels.py"
    spec = importlib.util.spec_from_file_location("gpu_wheels", path)
    wheels = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(wheels)
    project = f'[project]\ndependencies = ["{asked}", "sqlalchemy[asyncio]>=2.1"]'
    assert wheels.needed(project) == ["sqlalchemy[asyncio]>=2.1"]


def test_without_a_gpu_nothing_is_measured(measure):
    done, found, ran = measure(CUDA_VISIBLE_DEVICES="")
    assert (done.returncode, found, ran) == (77, None, [])
    assert "no GPU" in done.stderr


def test_an_unknown_option_is_refused(measure):
    done, _, ran = measure("--quikc")
    assert (done.returncode, ran) == (2, [])
