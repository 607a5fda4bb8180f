"""Kills examples/grpo-tiny.yml with SIGKILL at random moments, starts it again with the same command, and compares with one left in peace.

    python benchmarks/crash_grpo.py [--quick] [--json FILE] [--kills N] [--seed S]

What it begins with is made by the quickstart's own code: the shipped base's adapter after 60 steps of the quickstart's run. The example
runs as it is, on one thread and with a checkpoint every 4 steps; with --quick 6 steps of 32 completions, and 24 questions at evaluations.
Only the training's own process is killed: its reward workers must end by themselves. Moments are drawn over the steps, one in each of N
equal parts from the start of the process to the end of the saved result, so that most fall inside the training: while it imports, loads,
is examined, writes completions, scores, learns, writes checkpoints. A run that ends before its next kill is compared and another begins,
until N kills are done. Equal means: all that events.jsonl says, but for what a clock says, every step exactly once, and the bytes of the
adapter. Exits 1 where a run is not equal, where a process is left, or where the whole example has not improved the model.
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
from peers.environments import FOLDER, OFFLINE

ROOT = Path(__file__).resolve().parents[1]
CONFIG = "examples/grpo-tiny.yml"
STEPS, QUICK_STEPS = 25, 6
ALWAYS = ("num_threads=1", "save_steps=4")
QUICK = (
    f"max_steps={QUICK_STEPS}",
    "eval_steps=4",
    "trl.generation_batch_size=32",
    "test_datasets.0.path=runs/quickstart/few.jsonl",
)
FEW = 24  # questions
# What `ropewalk quickstart` does before its training by rewards; it is ended once the adapter to begin with is there.
PREPARE = """
from pathlib import Path
from ropewalk.files.local import open_local
from ropewalk.quickstart import facts
from ropewalk.quickstart.run import BASE, FULL, fine_tune, keep, write_data

folder, (trained, held_out) = Path("runs/quickstart"), facts.split()
rows, asked = facts.questions(trained, len(facts.KINDS)), facts.questions(held_out, FULL.per_country)
folder.mkdir(parents=True)
write_data(folder, [*trained, *held_out], rows, asked)
fine_tune(folder / "train.yml", BASE, keep(open_local(), folder / "train.jsonl"), folder / "run", FULL.steps)
"""
BEGINS = "runs/quickstart/run/checkpoints/step-00000060"
TOLD = {
    "step": ("step", "loss", "gradient_norm", "tokens", "reward", "reward_std", "rewards/correct", "rewards/value", "length", "ended",
             "entropy", "ratio", "clipped", "varied", "staleness", "mismatch"),
    "samples": ("step", "samples"),
    "eval": ("step", "reward", "length"),
    "checkpoint": ("step",),
}  # fmt: skip
GRACE = 10.0  # seconds in which workers notice that nobody asks them any more
PATIENCE = 900.0  # seconds until a process that neither tells of a step nor ends is taken for hanging


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="3 kills of a shorter run")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the result here")
    parser.add_argument("--kills", type=int, default=None, help="default: 10, with --quick 3")
    parser.add_argument("--seed", type=int, default=0, help="of the moments (default: %(default)s)")
    arguments = parser.parse_args()
    wanted = arguments.kills or (3 if arguments.quick else 10)
    example = Example(begun(), (*ALWAYS, *(QUICK if arguments.quick else ())), QUICK_STEPS if arguments.quick else STEPS)
    at_start = machine()
    work = Path(tempfile.mkdtemp(prefix="ropewalk-crash-grpo-"))
    try:
        peace = work / "peace"
        begins = time.perf_counter()
        example.run(peace, None)
        life = time.perf_counter() - begins
        examined = [event["reward"] for event in events_of(peace) if event["event"] == "eval"]
        runs = torture(work, example, pace_of(peace, life), wanted, random.Random(arguments.seed))
    finally:
        shutil.rmtree(work, ignore_errors=True)
    kills, left = sum(len(one["kills"]) for one in runs), sum(one["left"] for one in runs)
    same, better = all(one["equal"] for one in runs), examined[-1] > examined[0]
    rows = [[n, len(one["kills"]), ", ".join(map(str, one["kills"])), one["left"], one["equal"]] for n, one in enumerate(runs)]
    print(table(("run", "kills", "killed after step", "processes left", "equal to the undisturbed run"), rows))
    print(f"{kills} kills, {'all equal' if same else 'NOT EQUAL'}, {left} processes left")
    print(
        f"undisturbed: {example.steps} steps in {life:.1f} s; right greedily {examined[0]:.3f} before, {examined[-1]:.3f} after"
    )
    found = {
        "benchmark": "crash_grpo",
        "quick": arguments.quick,
        "config": CONFIG,
        "overrides": example.overrides,
        "seed": arguments.seed,
        "machine": at_start,
        "steps": example.steps,
        "kills": kills,
        "inside": sum(0 < step < example.steps for one in runs for step in one["kills"]),
        "equal": same,
        "left": left,
        "before": examined[0],
        "after": examined[-1],
        "improved": better,
        "life_s": round(life, 1),
    }
    write_json(arguments.json, found | {"runs": runs})
    return 0 if same and not left and (better or arguments.quick) else 1


def begun() -> Path:
    """The quickstart's folder as the example needs it; made once for each base and recipe."""
    recipe = hashlib.sha256(PREPARE.encode())
    for path in sorted((ROOT / "src/ropewalk/quickstart").glob("**/*")):
        if path.is_file() and path.suffix in (".py", ".safetensors", ".csv", ".json", ".txt"):
            recipe.update(path.read_bytes())
    folder = FOLDER / "crash_grpo" / recipe.hexdigest()[:12]
    if not folder.exists():
        FOLDER.mkdir(exist_ok=True)
        (FOLDER / ".gitignore").write_text("*\n")
        fresh = folder.with_name(folder.name + ".new")
        shutil.rmtree(fresh, ignore_errors=True)
        fresh.mkdir(parents=True)
        log = fresh / "log.txt"
        with log.open("wb") as out:
            process = subprocess.Popen([sys.executable, "-c", PREPARE], cwd=fresh, env=variables(fresh), stdout=out, stderr=out)
        while process.poll() is None and not (fresh / BEGINS).exists():
            time.sleep(0.2)
        process.kill()
        process.wait()
        if not (fresh / BEGINS).exists():
            raise SystemExit(f"the quickstart's run ended with {process.returncode}:\n{log.read_text()[-2000:]}")
        rows = (fresh / "runs/quickstart/examined.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
        (fresh / "runs/quickstart/few.jsonl").write_text("".join(rows[:: len(rows) // FEW][:FEW]), encoding="utf-8")
        fresh.rename(folder)
    return folder / "runs/quickstart"


@dataclass(frozen=True)
class Pace:
    """How long the undisturbed run took."""

    first: float  # seconds from the start of the process to its first step's end
    step: float
    last: float  # from the last step's end to that of the process


@dataclass(frozen=True)
class Example:
    """The example's command."""

    begun: Path
    overrides: tuple[str, ...]
    steps: int

    def run(self, folder: Path, kill: tuple[int, float] | None) -> tuple[bool, int]:
        """In a folder, killed so many seconds after so many steps; whether it had ended by itself, and how many processes it left."""
        if not folder.exists():
            (folder / "runs").mkdir(parents=True)
            for name in ("src", "examples"):
                (folder / name).symlink_to(ROOT / name)
            (folder / "runs/quickstart").symlink_to(self.begun)
        command = [str(Path(sys.executable).with_name("ropewalk")), "train", CONFIG, *self.overrides]
        before = written(folder)
        with (folder / "log.txt").open("ab") as log:
            process = subprocess.Popen(command, cwd=folder, env=variables(folder), stdout=log, stderr=log)
        if kill is not None:
            until(
                lambda: process.poll() is not None or ((not kill[0] or written(folder) != before) and told(folder) >= kill[0])
            )
        try:
            if process.wait(kill and kill[1]):
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


def torture(work: Path, example: Example, pace: Pace, wanted: int, rng: random.Random) -> list[dict[str, Any]]:
    """Runs with kills, each to its end; what was killed where, what was left, and whether the end is the same."""
    runs: list[dict[str, Any]] = []
    kills, peace = 0, outcome(work / "peace")
    while kills < wanted:
        folder, at, left, ended = work / f"run-{len(runs)}", list[int](), 0, False
        for kill in moments(wanted - kills, example.steps, pace, rng):
            ended, more = example.run(folder, kill)
            if ended:
                break
            left += more
            kills += 1
            at.append(told(folder))
            print(f"kill {kills} of {wanted}: after step {at[-1]}", file=sys.stderr, flush=True)
        if not ended:
            example.run(folder, None)
        runs.append({"kills": at, "left": left, "equal": outcome(folder) == peace})
    return runs


def moments(count: int, steps: int, pace: Pace, rng: random.Random) -> list[tuple[int, float]]:
    """One in each of so many equal parts of a run, earlier ones first: steps that are done, and seconds after that."""
    found = []
    for part in range(count):
        done, share = divmod((part + rng.random()) * (steps + 1) / count, 1)
        seconds = pace.first if done == 0 else pace.last if done == steps else pace.step
        found.append((int(done), share * seconds))
    return found


def pace_of(folder: Path, life: float) -> Pace:
    steps = [event["seconds"] for event in events_of(folder) if event["event"] == "step"]
    (end,) = (event["seconds"] for event in events_of(folder) if event["event"] == "end")
    step = sum(steps) / len(steps)
    return Pace(life - end + steps[0], step, max(0.5, life - end) / 4)


def until(true: Any) -> None:
    end = time.monotonic() + PATIENCE
    while not true():
        if time.monotonic() > end:
            raise SystemExit(f"nothing was told for {PATIENCE:g} seconds")
        time.sleep(0.05)


def variables(folder: Path) -> dict[str, str]:
    return os.environ | OFFLINE | {"ROPEWALK_HOME": str(folder / "home"), "OMP_NUM_THREADS": "1"}


def log_of(folder: Path) -> Path:
    return folder / "runs/grpo-tiny/events.jsonl"


def written(folder: Path) -> int:
    """Another number whenever a process has begun to write the log, which drops what comes after its checkpoint."""
    return log_of(folder).stat().st_ino if log_of(folder).exists() else 0


def events_of(folder: Path) -> list[dict[str, Any]]:
    lines = log_of(folder).read_text(encoding="utf-8").split("\n")[:-1] if log_of(folder).exists() else []
    return [json.loads(line) for line in lines]


def told(folder: Path) -> int:
    """The last step that the log tells of."""
    return max((event["step"] for event in events_of(folder) if event["event"] == "step"), default=0)


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
    story = [[e["event"], *(e[name] for name in TOLD[e["event"]])] for e in events_of(folder) if e["event"] in TOLD]
    adapter = (folder / "runs/grpo-tiny/adapter/adapter_model.safetensors").read_bytes()
    return story, hashlib.sha256(adapter).hexdigest()


if __name__ == "__main__":
    sys.exit(main())
