"""The whole job, side by side: from the command to a trained adapter, ours and peers, each in an environment of its own.

    python benchmarks/train_cpu.py [--quick] [--json FILE] [--peers trl,axolotl,...] [--repeats N]

One tiny Qwen3 mixture of experts, 2,000 rows of chat packed to 256 tokens, 4 of them a step, LoRA of rank 16 on attention and
experts, 60 steps, a checkpoint every 20, float32, one thread. Every run starts cold: new output, new caches. Contenders take turns.
Exits 1 where ours fails a correctness gate (equal losses for equal seeds, packed samples kept apart), never for a speed.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import struct
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from measure import Watched, machine, middle, table, watch, write_json
from peers.assets import recipe
from peers.environments import AXOLOTL, FOLDER, LLAMAFACTORY, OFFLINE, TRANSFORMERS, TRL, Environment, NotInstalled
from ropewalk.bench.bars import Panel, dot_plot

HERE = Path(__file__).resolve().parent
ASSETS, RUNS = FOLDER / "assets", FOLDER / "runs"
ONE_THREAD = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
PRINTED_BY_TRAINER = r"['\"]loss['\"]: '?([0-9.eE+-]+|nan|inf)"
QUICK_SECONDS = 165.0  # after so many, what has not begun is left out and named


@dataclass(frozen=True)
class Contender:
    """Somebody who does the job: its command for so many steps, and where it leaves what it found."""

    name: str
    title: str
    command: Callable[[int], list[str]]
    environment: Environment | None = None
    pattern: str = PRINTED_BY_TRAINER
    adapter: str = "out/adapter_model.safetensors"
    variables: dict[str, str] = field(default_factory=dict)
    note: str = ""


def _ropewalk() -> str:
    return str(Path(sys.executable).with_name("ropewalk"))


OURS = Contender(
    "ropewalk",
    "Ropewalk",
    lambda steps: [_ropewalk(), "train", str(HERE / "peers/axolotl.yml"), f"max_steps={steps}", "num_threads=1"],
    pattern=r"step \d+/\d+\s+loss ([0-9.]+|nan|inf)",
    adapter="out/adapter/adapter_model.safetensors",
    note="Axolotl's YAML as it is",
)
PEERS = (
    Contender(
        "trl",
        "TRL",
        lambda steps: [TRL.program("python"), str(HERE / "peers/trl_sft.py"), str(steps)],
        TRL,
    ),
    Contender(
        "transformers",
        "transformers + PEFT",
        lambda steps: [TRANSFORMERS.program("python"), str(HERE / "peers/transformers_sft.py"), str(steps)],
        TRANSFORMERS,
        note="no packing: 16 padded rows a step",
    ),
    Contender(
        "axolotl",
        "Axolotl",
        lambda steps: [AXOLOTL.program("axolotl"), "train", str(HERE / "peers/axolotl.yml"), "--max-steps", str(steps)],
        AXOLOTL,
        variables={"AXOLOTL_DO_NOT_TRACK": "1"},
        note="attn_implementation: sdpa",
    ),
    Contender(
        "llamafactory",
        "LLaMA-Factory",
        lambda steps: [
            LLAMAFACTORY.program("llamafactory-cli"),
            "train",
            str(HERE / "peers/llamafactory.yml"),
            f"max_steps={steps}",
        ],
        LLAMAFACTORY,
        note="lighter job: attention only",
    ),
)


@dataclass(frozen=True)
class Measured:
    """One run of one contender."""

    first_loss_s: float
    first_loss_cpu_s: float
    steps_per_s: float
    cpu_s_per_step: float
    tokens_per_step: float
    peak_rss_mb: float
    total_s: float
    losses: tuple[float, ...]
    trainable: int
    load: float

    @property
    def tokens_per_s(self) -> float:
        return self.tokens_per_step * self.steps_per_s


class RunFailed(Exception):
    """A run that did not end with 0 or that printed no losses."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="20 steps, one repeat (two of ours), peers already installed")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the result here, and a plot beside it as .svg")
    parser.add_argument("--peers", default=",".join(p.name for p in PEERS), help="which peers (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=None, help="runs of each (default: 3, with --quick 1)")
    arguments = parser.parse_args()
    begun = time.monotonic()
    wanted = arguments.peers.split(",") if arguments.peers else []
    if unknown := set(wanted) - {p.name for p in PEERS}:
        parser.error(f"unknown peers {sorted(unknown)}; there are {[p.name for p in PEERS]}")
    steps, warm = (20, 5) if arguments.quick else (60, 10)
    repeats = arguments.repeats or (1 if arguments.quick else 3)
    at_start = machine()
    job = ensure_assets() | {"steps": steps, "window": [warm + 1, steps], "threads": 1, "repeats": repeats}
    versions: dict[str, dict[str, str]] = {"ropewalk": at_start["versions"]}
    missing: dict[str, str] = {}
    for peer in PEERS:
        if peer.name in wanted and peer.environment:
            try:
                versions[peer.name] = peer.environment.ensure(install=not arguments.quick)
            except NotInstalled as reason:
                missing[peer.name] = str(reason)
    present = [OURS, *(p for p in PEERS if p.name in versions)]
    runs: dict[str, list[Measured]] = {}
    for number in range(max(repeats, 2)):
        for contender in present:
            if (contender is not OURS and number >= repeats) or contender.name in missing:
                continue
            if arguments.quick and contender is not OURS and time.monotonic() - begun > QUICK_SECONDS - 60:
                missing[contender.name] = "no time left for it in --quick"
                continue
            try:
                runs.setdefault(contender.name, []).append(measured := measure(contender, number, steps, warm, job))
                _tell(contender, measured)
            except RunFailed as reason:
                missing[contender.name] = str(reason)
    gates = check_gates(runs.get("ropewalk", []), missing)
    contenders = {c.name: summary(c, runs[c.name], versions[c.name]) for c in present if runs.get(c.name)}
    result = {
        "benchmark": "train_cpu",
        "quick": arguments.quick,
        "machine": at_start,
        "job": job,
        "contenders": contenders,
        "missing": missing,
        "ratios": ratios(contenders),
        "gates": gates,
    }
    result["targets"] = targets(contenders)
    print(report(result))
    write_json(arguments.json, result)
    if arguments.json and contenders:
        arguments.json.with_suffix(".svg").write_text(plot(contenders, runs), encoding="utf-8")
    return 0 if all(gate["passed"] for gate in gates.values()) else 1


def ensure_assets() -> dict[str, Any]:
    """The base and the rows, made in a process of their own where they are not there."""
    facts = ASSETS / "assets.json"
    if not facts.exists() or json.loads(facts.read_text())["recipe"] != recipe():
        FOLDER.mkdir(exist_ok=True)
        (FOLDER / ".gitignore").write_text("*\n")
        subprocess.run(
            [sys.executable, str(HERE / "peers/assets.py"), str(ASSETS)], env=os.environ | OFFLINE | ONE_THREAD, check=True
        )
    found: dict[str, Any] = json.loads(facts.read_text())
    return found


def measure(contender: Contender, number: int, steps: int, warm: int, job: dict[str, Any]) -> Measured:
    """Runs the job once in a new folder, with new caches."""
    folder = RUNS / f"{contender.name}-{number}"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    cold = {"HF_HOME": str(folder / "hub"), "ROPEWALK_HOME": str(folder / "home"), "PYTHONWARNINGS": "ignore"}
    own = (contender.environment.variables if contender.environment else {}) | contender.variables
    load = os.getloadavg()[0]
    done = watch(
        contender.command(steps),
        folder / "log.txt",
        pattern=contender.pattern,
        cwd=folder,
        environment=OFFLINE | ONE_THREAD | cold | own,
    )
    losses, tokens = found_losses(contender, folder, job)
    if done.code or len(done.marks) < steps or len(losses) < steps:
        raise RunFailed(f"ended with {done.code} after {len(done.marks)} of {steps} losses: {done.tail[-300:]}")
    return measured_of(done, losses, tokens, warm, parameters_in(folder / contender.adapter), load)


def measured_of(done: Watched, losses: tuple[float, ...], tokens: float, warm: int, trainable: int, load: float) -> Measured:
    first, begin, end = done.marks[0], done.marks[warm - 1], done.marks[-1]
    counted = len(done.marks) - warm
    return Measured(
        first_loss_s=first.seconds,
        first_loss_cpu_s=first.cpu_seconds,
        steps_per_s=counted / (end.seconds - begin.seconds),
        cpu_s_per_step=(end.cpu_seconds - begin.cpu_seconds) / counted,
        tokens_per_step=tokens,
        peak_rss_mb=done.peak_rss / 2**20,
        total_s=done.seconds,
        losses=losses,
        trainable=trainable,
        load=load,
    )


def found_losses(contender: Contender, folder: Path, job: dict[str, Any]) -> tuple[tuple[float, ...], float]:
    """Every loss as the contender recorded it, with all its digits, and the real tokens of a step."""
    if contender is OURS:
        lines = (folder / "out/events.jsonl").read_text().splitlines() if (folder / "out/events.jsonl").exists() else []
        steps = [e for e in map(json.loads, lines) if e["event"] == "step"]
        return tuple(e["loss"] for e in steps), steps[-1]["tokens"] / len(steps) if steps else 0.0
    states = sorted(folder.glob("out/checkpoint-*/trainer_state.json"), key=lambda p: int(p.parent.name.split("-")[1]))
    if not states:
        return (), 0.0
    history = [e for e in json.loads(states[-1].read_text())["log_history"] if "loss" in e]
    # The share of an epoch that a step is counts no padding, as the token counters of some do.
    tokens = job["tokens"] * history[-1]["epoch"] / history[-1]["step"]
    return tuple(e["loss"] for e in history), tokens


def parameters_in(adapter: Path) -> int:
    """Trained parameters, by the header of the saved adapter."""
    if not adapter.exists():
        return 0
    with adapter.open("rb") as file:
        header = json.loads(file.read(struct.unpack("<Q", file.read(8))[0]))
    total = 0
    for name, tensor in header.items():
        if name != "__metadata__":
            size = 1
            for side in tensor["shape"]:
                size *= side
            total += size
    return total


def check_gates(ours: list[Measured], missing: dict[str, str]) -> dict[str, dict[str, Any]]:
    """What must hold for ours, whatever the speed."""
    ran = len(ours) >= 2 and "ropewalk" not in missing
    gates: dict[str, dict[str, Any]] = {
        "ran": {"passed": ran, "reason": missing.get("ropewalk", "")},
        "losses_equal": {"passed": ran and equal(ours), "runs": len(ours)},
    }
    if ran:
        command = [sys.executable, str(HERE / "peers/isolation.py"), str(HERE / "peers/axolotl.yml")]
        folder = RUNS / "isolation"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        variables = os.environ | OFFLINE | ONE_THREAD | {"ROPEWALK_HOME": str(folder / "home")}
        done = subprocess.run(command, cwd=folder, env=variables, capture_output=True, text=True, check=False)
        found = json.loads(done.stdout.splitlines()[-1]) if done.returncode == 0 else {"error": done.stderr[-500:]}
        gates["packing_isolated"] = {"passed": bool(found.get("isolated")), **found}
    return gates


def equal(runs: list[Measured]) -> bool | None:
    """Whether every loss was the same in every run; None where there was only one."""
    return all(run.losses == runs[0].losses for run in runs) if len(runs) > 1 else None


def summary(contender: Contender, runs: list[Measured], versions: dict[str, str]) -> dict[str, Any]:
    """The best of the runs for what is timed, the median for memory, and all of them."""
    names = ("first_loss_s", "first_loss_cpu_s", "steps_per_s", "tokens_per_s", "cpu_s_per_step", "peak_rss_mb", "total_s")
    values = {name: [round(getattr(run, name), 3) for run in runs] for name in names}
    best = {name: max(v) if name.endswith("_per_s") else min(v) for name, v in values.items()}
    median = {name: round(middle(v), 3) for name, v in values.items()}
    return {
        **best,
        "peak_rss_mb": median["peak_rss_mb"],
        "losses_equal": equal(runs),
        "trainable": runs[0].trainable,
        "first_loss": runs[0].losses[0],
        "last_losses": round(sum(runs[0].losses[-10:]) / len(runs[0].losses[-10:]), 4),
        "note": contender.note,
        "versions": versions,
        "median": median,
        "runs": values | {"load": [round(run.load, 2) for run in runs]},
    }


def ratios(contenders: dict[str, dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Ours by each peer's: below 1 is better for times and memory, above 1 for rates."""
    ours = contenders.get("ropewalk")
    names = ("first_loss_s", "first_loss_cpu_s", "steps_per_s", "tokens_per_s", "cpu_s_per_step", "peak_rss_mb")
    peers = {n: c for n, c in contenders.items() if n != "ropewalk"} if ours else {}
    return {peer: {name: round(ours[name] / found[name], 3) for name in names} for peer, found in peers.items() if ours}


def targets(contenders: dict[str, dict[str, Any]]) -> dict[str, bool | None]:
    """What this benchmark is meant to reach; None where the peer was not there."""
    ours, trl, axolotl = (contenders.get(name) for name in ("ropewalk", "trl", "axolotl"))
    both_trl, both_axolotl = ours and trl, ours and axolotl
    return {
        "first loss no later than TRL's": ours["first_loss_s"] <= trl["first_loss_s"] if both_trl else None,
        "first loss in a quarter of Axolotl's time": 4 * ours["first_loss_s"] <= axolotl["first_loss_s"]
        if both_axolotl
        else None,
        "steps/s at least Axolotl's": ours["steps_per_s"] >= axolotl["steps_per_s"] if both_axolotl else None,
        "peak memory at most TRL's": ours["peak_rss_mb"] <= trl["peak_rss_mb"] if both_trl else None,
        "every loss the same for the same seed": ours["losses_equal"] if ours else None,
    }


def report(result: dict[str, Any]) -> str:
    """The tables."""
    found = result["contenders"]
    titles = {c.name: c.title for c in (OURS, *PEERS)}
    head = (
        "contender",
        "first loss s",
        "CPU s to it",
        "steps/s",
        "tokens/s",
        "CPU s/step",
        "peak MB",
        "losses equal",
        "trained",
        "note",
    )
    keys = ("first_loss_s", "first_loss_cpu_s", "steps_per_s", "tokens_per_s", "cpu_s_per_step", "peak_rss_mb")
    more = ("losses_equal", "trainable", "note")
    rows = [[titles[name], *(c[k] for k in (*keys, *more))] for name, c in found.items()]
    rows += [[titles[name], *[None] * 8, reason.splitlines()[0][:80]] for name, reason in result["missing"].items()]
    middles = [[titles[n], *(c["median"][k] for k in keys)] for n, c in found.items()]
    shares = [[f"Ropewalk / {titles[n]}", *(r[k] for k in keys)] for n, r in result["ratios"].items()]
    box, job = result["machine"], result["job"]
    parts = [
        f"{box['cpu']}, {box['cores']} cores, load {box['load']}; {job['steps']} steps, {job['threads']} thread, "
        f"rates over steps {job['window'][0]} to {job['window'][1]}",
        "Best run of each (memory: median)\n" + table(head, rows),
        "Median\n" + table(head[:7], middles),
        *["Ratios of the best\n" + table(head[:7], shares)] * bool(shares),
        *(
            f"{'met    ' if met else 'not met' if met is not None else 'unknown'}  {text}"
            for text, met in result["targets"].items()
        ),
        *(f"gate {name}: {'passed' if gate['passed'] else 'FAILED'}  {gate}" for name, gate in result["gates"].items()),
    ]
    return "\n".join(part + "\n" if "\n" in part else part for part in parts)


def plot(contenders: dict[str, dict[str, Any]], runs: dict[str, list[Measured]]) -> str:
    """One panel per quantity."""
    titles = {c.name: c.title for c in (OURS, *PEERS)}
    quantities = {
        "first_loss_s": "command to first loss, seconds (less is better)",
        "steps_per_s": "steps per second (more is better)",
        "cpu_s_per_step": "CPU seconds per step (less is better)",
        "peak_rss_mb": "peak memory of the process tree, MB (less is better)",
    }
    panels = [
        Panel(text, [(titles[n], c[key], [getattr(r, key) for r in runs[n]], n == "ropewalk") for n, c in contenders.items()])
        for key, text in quantities.items()
    ]
    return dot_plot("Fine-tuning a tiny mixture of experts with LoRA, one thread", panels)


def _tell(contender: Contender, run: Measured) -> None:
    print(
        f"{contender.title:20} first loss {run.first_loss_s:6.1f} s  {run.steps_per_s:5.2f} steps/s  {run.cpu_s_per_step:.2f} CPU s/step  "
        f"{run.peak_rss_mb:5.0f} MB  load {run.load:.1f}",
        file=sys.stderr,
        flush=True,
    )


if __name__ == "__main__":
    sys.exit(main())
