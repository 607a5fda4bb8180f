"""Kills a training by rewards with SIGKILL at random moments, starts it again with the same command, and compares with one left in peace.

    python benchmarks/crash_grpo.py [--quick] [--json FILE] [--kills N] [--seed S]

Only the training's own process is killed: its reward workers must end by themselves. Moments are drawn evenly over the whole life of
the process: while it imports, loads, writes completions, scores, learns, is examined, writes checkpoints and the result. A run that
ends before its next kill is compared and another begins, until N kills are done. Equal means: all that events.jsonl says, but for
what a clock says, every step exactly once, and the bytes of the adapter. Exits 1 where a run is not equal or a process is left.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from measure import machine, table, write_json
from peers.environments import OFFLINE
from resume import steps_done
from train_cpu import ASSETS, ensure_assets

STEPS, PROMPTS = 20, 60
REWARD = """
def late(completion, completion_ids):
    return sum(id % 7 < 2 for id in completion_ids) / 16


def short(completion, completion_ids):
    return -len(completion_ids) / 16
"""
CONFIG: dict[str, Any] = {
    "base_model": str(ASSETS / "base"),
    "datasets": [{"path": "prompts.jsonl"}],
    "val_set_size": 6,
    "rl": "grpo",
    "trl": {
        "reward_funcs": ["rewards.late", "rewards.short"],
        "reward_num_workers": 2,
        "num_generations": 4,
        "generation_batch_size": 16,
        "max_completion_length": 16,
    },
    "sequence_len": 128,
    "adapter": "lora",
    "lora_r": 8,
    "micro_batch_size": 4,
    "max_steps": STEPS,
    "learning_rate": 0.002,
    "lr_scheduler": "cosine",
    "save_steps": 3,
    "eval_steps": 8,
    "save_total_limit": 2,
    "num_threads": 1,
    "output_dir": "out",
}
TOLD = {
    "step": ("step", "loss", "gradient_norm", "tokens", "reward", "reward_std", "rewards/late", "rewards/short", "length", "ended",
             "entropy", "ratio", "clipped", "varied", "staleness", "mismatch"),
    "samples": ("step", "samples"),
    "eval": ("step", "reward", "length"),
    "checkpoint": ("step",),
}  # fmt: skip
GRACE = 10.0  # seconds in which workers notice that nobody asks them any more


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="3 kills")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the result here")
    parser.add_argument("--kills", type=int, default=None, help="default: 10, with --quick 3")
    parser.add_argument("--seed", type=int, default=0, help="of the moments (default: %(default)s)")
    arguments = parser.parse_args()
    wanted = arguments.kills or (3 if arguments.quick else 10)
    at_start = machine()
    ensure_assets()
    work = Path(tempfile.mkdtemp(prefix="ropewalk-crash-grpo-"))
    try:
        begun = time.perf_counter()
        run(work / "peace", None)
        life = time.perf_counter() - begun
        runs = torture(work, outcome(work / "peace"), life, wanted, random.Random(arguments.seed))
    finally:
        shutil.rmtree(work, ignore_errors=True)
    kills, left = sum(len(one["kills"]) for one in runs), sum(one["left"] for one in runs)
    same = all(one["equal"] for one in runs)
    rows = [[n, len(one["kills"]), ", ".join(map(str, one["kills"])), one["left"], one["equal"]] for n, one in enumerate(runs)]
    print(table(("run", "kills", "killed after step", "processes left", "equal to the undisturbed run"), rows))
    print(
        f"{kills} kills, {'all equal' if same else 'NOT EQUAL'}, {left} processes left; undisturbed: {STEPS} steps in {life:.1f} s"
    )
    found = {
        "benchmark": "crash_grpo",
        "machine": at_start,
        "kills": kills,
        "equal": same,
        "left": left,
        "life_s": round(life, 1),
    }
    write_json(arguments.json, found | {"runs": runs})
    return 0 if same and not left else 1


def torture(work: Path, peace: Any, life: float, wanted: int, rng: random.Random) -> list[dict[str, Any]]:
    """Runs with kills, each to its end; what was killed where, what was left, and whether the end is the same."""
    runs: list[dict[str, Any]] = []
    kills = 0
    while kills < wanted:
        folder, at, left, ended = work / f"run-{len(runs)}", list[int](), 0, False
        while kills < wanted and not ended:
            ended, more = run(folder, rng.uniform(0, life))
            if not ended:
                left += more
                kills += 1
                at.append(steps_done(folder))
                print(f"kill {kills} of {wanted}: after step {at[-1]}", file=sys.stderr, flush=True)
        if not ended:
            run(folder, None)
        runs.append({"kills": at, "left": left, "equal": outcome(folder) == peace})
    return runs


def run(folder: Path, seconds: float | None) -> tuple[bool, int]:
    """The command, killed after so long; whether it had ended by itself before, and how many processes it left behind."""
    if not folder.exists():
        folder.mkdir(parents=True)
        asked = [{"prompt": f"Write about {n} and {n * n}:"} for n in range(PROMPTS)]
        (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in asked), encoding="utf-8")
        (folder / "rewards.py").write_text(REWARD, encoding="utf-8")
        (folder / "run.yml").write_text(json.dumps(CONFIG, indent=1), encoding="utf-8")
    variables = os.environ | OFFLINE | {"ROPEWALK_HOME": str(folder / "home"), "OMP_NUM_THREADS": "1"}
    command = [str(Path(sys.executable).with_name("ropewalk")), "train", "run.yml"]
    with (folder / "log.txt").open("ab") as log:
        process = subprocess.Popen(command, cwd=folder, env=variables, stdout=log, stderr=log)
    try:
        if process.wait(seconds):
            raise SystemExit(f"the run ended with {process.returncode}:\n{(folder / 'log.txt').read_text()[-2000:]}")
        return True, 0
    except subprocess.TimeoutExpired:
        workers = below(process.pid)
        process.send_signal(signal.SIGKILL)
        process.wait()
        end = time.monotonic() + GRACE
        while (left := sum(alive(pid) == began for pid, began in workers.items())) and time.monotonic() < end:
            time.sleep(0.05)
        return False, left


def below(pid: int) -> dict[int, str]:
    """Of all processes below this one: their numbers, and when each began, as numbers are given again."""
    found, waiting = dict[int, str](), [pid]
    while waiting:
        for path in Path(f"/proc/{waiting.pop()}/task").glob("*/children"):
            try:
                children = [int(word) for word in path.read_text().split()]
            except OSError:
                continue
            found |= {child: began for child in children if (began := alive(child))}
            waiting += children
    return found


def alive(pid: int) -> str:
    """When it began; nothing where it has ended."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return ""
    return "" if fields[0] in "ZX" else fields[19]


def outcome(folder: Path) -> tuple[list[list[Any]], str]:
    """What the log says, without what a clock says, and the adapter's digest."""
    events = [json.loads(line) for line in (folder / "out/events.jsonl").read_text(encoding="utf-8").splitlines()]
    story = [[e["event"], *(e[name] for name in TOLD[e["event"]])] for e in events if e["event"] in TOLD]
    adapter = (folder / "out/adapter/adapter_model.safetensors").read_bytes()
    return story, hashlib.sha256(adapter).hexdigest()


if __name__ == "__main__":
    sys.exit(main())
