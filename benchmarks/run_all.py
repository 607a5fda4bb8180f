"""Every benchmark in turn: `make bench` (QUICK=1: the short form of each). Results go to benchmarks/results/."""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
SCRIPTS = (
    *("day0.py", "day0_serving.py", "moe_lora.py", "memory.py", "rotary.py", "small_gpu.py", "loading.py", "loss_bands.py"),
    *("train_cpu.py", "resume.py", "crash_grpo.py"),
    *("four_skills.py", "grpo.py"),
    *("files.py", "crash_files.py", "quota_race.py", "fuzz_files.py"),
    *("serve.py", "many_files.py", "load_messages.py", "fuzz_messages.py", "crash_batches.py", "crash_jobs.py", "soak.py"),
)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="under three minutes each")
    arguments = parser.parse_args()
    results = HERE / "results"
    results.mkdir(exist_ok=True)
    failed = []
    for script in SCRIPTS:
        print(f"== {script}", flush=True)
        command = [sys.executable, str(HERE / script), "--json", str(results / Path(script).with_suffix(".json"))]
        if subprocess.run(command + ["--quick"] * arguments.quick).returncode:
            failed.append(script)
    if failed:
        print("a correctness gate failed in: " + ", ".join(failed))
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
