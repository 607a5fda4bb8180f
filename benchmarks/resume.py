"""Kills a training with SIGKILL at random moments, starts it again with the same command, and compares with one left in peace.

    python benchmarks/resume.py [--quick] [--json FILE] [--kills N] [--seed S]

Moments are drawn evenly over the whole life of the process: while it reads, tokenises, imports torch, loads, steps, evaluates,
writes checkpoints and the result. A run that ends before its next kill is compared and another begins, until N kills are done.
Equal means: every loss in events.jsonl bit for bit, every step exactly once, and the bytes of the adapter. Exits 1 where not.
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
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from measure import machine, table, write_json
from peers.environments import OFFLINE
from train_cpu import ASSETS, ensure_assets

ROWS, STEPS = 300, 24  # more than an epoch of packed rows, so that a kill can fall into either
CONFIG: dict[str, Any] = {
    "base_model": str(ASSETS / "base"),
    "datasets": [{"path": "rows.jsonl", "type": "chat_template"}],
    "val_set_size": 20,
    "sequence_len": 256,
    "sample_packing": True,
    "adapter": "lora",
    "lora_r": 8,
    "lora_dropout": 0.1,  # so that random state matters
    "micro_batch_size": 2,
    "gradient_accumulation_steps": 2,
    "max_steps": STEPS,
    "num_epochs": 4,
    "learning_rate": 0.002,
    "lr_scheduler": "cosine",
    "warmup_steps": 4,
    "save_steps": 3,
    "eval_steps": 8,
    "save_total_limit": 2,
    "num_threads": 1,
    "output_dir": "out",
}


@dataclass(frozen=True)
class Outcome:
    """What a finished run left."""

    losses: tuple[tuple[int, float], ...]  # (step, loss) of every event, in order
    evaluations: tuple[tuple[int, float], ...]
    adapter: str  # digest


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="5 kills")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the result here")
    parser.add_argument("--kills", type=int, default=None, help="default: 20, with --quick 5")
    parser.add_argument("--seed", type=int, default=0, help="of the moments (default: %(default)s)")
    arguments = parser.parse_args()
    wanted = arguments.kills or (5 if arguments.quick else 20)
    at_start = machine()
    ensure_assets()
    work = Path(tempfile.mkdtemp(prefix="ropewalk-resume-"))
    try:
        peace = work / "peace"
        life = run_to_end(peace)
        reference = outcome(peace)
        found = torture(work, reference, life, wanted, random.Random(arguments.seed))
    finally:
        shutil.rmtree(work, ignore_errors=True)
    same = all(run["equal"] for run in found)
    kills = sum(len(run["kills"]) for run in found)
    result = {
        "benchmark": "resume",
        "machine": at_start,
        "kills": kills,
        "equal": same,
        "life_s": round(life, 1),
        "runs": found,
    }
    rows = [[i, len(r["kills"]), ", ".join(str(s) for s in r["kills"]), r["equal"]] for i, r in enumerate(found)]
    print(table(("run", "kills", "killed after step", "equal to the undisturbed run"), rows))
    print(f"{kills} kills, {'all equal' if same else 'NOT EQUAL'}; undisturbed: {STEPS} steps in {life:.1f} s")
    write_json(arguments.json, result)
    return 0 if same else 1


def torture(work: Path, reference: Outcome, life: float, wanted: int, rng: random.Random) -> list[dict[str, Any]]:
    """Runs with kills, each to its end; what was killed where, and whether the end is the same."""
    runs: list[dict[str, Any]] = []
    kills = 0
    while kills < wanted:
        folder = work / f"run-{len(runs)}"
        at: list[int] = []
        while kills < wanted:
            if ended_after := run_for(folder, rng.uniform(0, life)):
                # The machine may have become faster: later moments should not all fall after the end.
                life = life if at else min(life, ended_after)
                break
            at.append(steps_done(folder))
            kills += 1
            print(f"kill {kills} of {wanted}: after step {at[-1]}", file=sys.stderr, flush=True)
        else:
            run_to_end(folder)
        ended = outcome(folder)
        runs.append({"kills": at, "equal": ended == reference, "losses": [loss for _, loss in ended.losses]})
    return runs


def run_to_end(folder: Path) -> float:
    """The command, left in peace; its seconds."""
    begun = time.perf_counter()
    process = start(folder)
    if process.wait():
        raise SystemExit(f"the run ended with {process.returncode}:\n{(folder / 'log.txt').read_text()[-2000:]}")
    return time.perf_counter() - begun


def run_for(folder: Path, seconds: float) -> float | None:
    """The command, killed with all its processes after so long; its seconds if it had ended by itself before."""
    begun = time.perf_counter()
    process = start(folder)
    try:
        if process.wait(seconds):
            raise SystemExit(f"the run ended with {process.returncode}:\n{(folder / 'log.txt').read_text()[-2000:]}")
        return time.perf_counter() - begun
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        return None


def start(folder: Path) -> subprocess.Popen[bytes]:
    """`ropewalk train`, the same command every time, with a cache of its own so that a torn cache would show."""
    if not folder.exists():
        folder.mkdir(parents=True)
        rows = (ASSETS / "sft.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)[:ROWS]
        (folder / "rows.jsonl").write_text("".join(rows), encoding="utf-8")
        (folder / "run.yml").write_text(json.dumps(CONFIG, indent=1))
    variables = os.environ | OFFLINE | {"ROPEWALK_HOME": str(folder / "home"), "OMP_NUM_THREADS": "1"}
    command = [str(Path(sys.executable).with_name("ropewalk")), "train", "run.yml"]
    with (folder / "log.txt").open("ab") as log:
        return subprocess.Popen(command, cwd=folder, env=variables, stdout=log, stderr=log, start_new_session=True)


def outcome(folder: Path) -> Outcome:
    events = [json.loads(line) for line in (folder / "out/events.jsonl").read_text().splitlines()]
    adapter = (folder / "out/adapter/adapter_model.safetensors").read_bytes()
    of = {kind: tuple((e["step"], e["loss"]) for e in events if e["event"] == kind) for kind in ("step", "eval")}
    return Outcome(of["step"], of["eval"], hashlib.sha256(adapter).hexdigest())


def steps_done(folder: Path) -> int:
    """The last step that the killed run had told of."""
    path = folder / "out/events.jsonl"
    lines = path.read_text().split("\n")[:-1] if path.exists() else []
    return max((json.loads(line).get("step", 0) for line in lines), default=0)


if __name__ == "__main__":
    sys.exit(main())
