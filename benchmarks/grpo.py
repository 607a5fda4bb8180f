"""Training by rewards, end to end and in parts: ours beside a plain loop over transformers and PEFT, and beside TRL's GRPOTrainer.

    python benchmarks/grpo.py [--device cpu|cuda] [--quick] [--json FILE] [--kinds qwen3,qwen3_moe] [--rounds N] [--no-peer]

One model of random weights in a folder, the same prompts, completions of the same prescribed lengths (lognormal, a deviation of 0.5, at
most 4 times their median), LoRA of rank 8, the same reward. Contenders, each in a process of its own, taking turns:

    A    synchronous: `generate`, padded rows, a pass for the old log-probabilities, PEFT (benchmarks/peers/plain_grpo.py)
    TRL  GRPOTrainer without vLLM, which needs no such pass here (benchmarks/peers/trl_grpo.py)
    A'   ours, synchronous, every completion laid out whole: A with another engine
    B    ours, synchronous: prompts of a group laid out once where that pays
    C    ours, async 1: a step's completions are begun before the step before them is learnt from

and `training`: C with random ids in the generator's place, for what training alone holds in memory. On a CPU a step costs CPU seconds of
one thread, the least over all rounds, since the machine may be busy; on a GPU seconds, the median, and peaks are the allocator's.
On a CPU nothing can overlap: `async_vs_sync`, which is B / C, only shows what fuller batches bring there, and what being late costs.

Exits 1 where a gate fails: greedy ids, log-probabilities and gradients as transformers and PEFT have them (grpo_rollouts.py), the base
untouched and held once, what is trained in its own dtype, equal tokens and parameters for all. Never because something was slow.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from dataclasses import asdict, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

from measure import machine, table, write_json
from peers.environments import FOLDER, OFFLINE, TRL, NotInstalled
from peers.grpo_assets import Shape, lengths, recipe

HERE = Path(__file__).resolve().parent
ONE_THREAD = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
SHAPES = {
    # An expert is as wide as the model; those of published mixtures are narrower still.
    "cpu": {kind: Shape(kind, prompts=4, **wide) for kind, wide in (("llama", {}), ("qwen3", {}), ("qwen3_moe", {"inter": 256}))},
    # Qwen3's 1.7 B, and a mixture with the layers of its 30 B-A3B, of which there are 12
    "cuda": {
        "qwen3": Shape(
            "qwen3", 151936, 2048, 28, 16, 8, 128, 6144, dtype="bfloat16", prompts=32, prompt=256, median=224, micro=8, row=16384
        ),
        "qwen3_moe": Shape(
            "qwen3_moe", 151936, 2048, 12, 32, 4, 128, 768, 128, 8, "bfloat16", 32, prompt=256, median=224, micro=8, row=16384
        ),
    },
}  # fmt: skip
ENDS = ("A", "TRL", "A'", "B", "C", "training")
OURS = {
    "A'": {"shared": False},
    "B": {},
    "C": {"async": True},
    "training": {"replayed": True},
}
TARGETS = {"rollout_vs_generate": 1.3, "rollout_uneven_vs_generate": 2.0, "shared_prompt_training": 2.0, "vs_trl": 2.0}
GPU_TARGETS = {"c_vs_a_prime": 1.6, "c_vs_a": 4.0, "peak_vs_training": 1.15}


class Failed(Exception):
    """A contender that did not come to its end."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--quick", action="store_true", help="one model end to end, fewer steps: under 3 minutes on 2 cores")
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--kinds", help="which models (default: all; with --quick qwen3 alone)")
    parser.add_argument("--rounds", type=int, default=None, help="turns of each (default 2, with --quick 1)")
    parser.add_argument("--steps", type=int, default=None, help="of each turn, an even number (default 6, with --quick 4)")
    parser.add_argument("--no-peer", action="store_true", help="leave TRL out")
    given = parser.parse_args()
    at_start = machine("trl")
    shapes = SHAPES[given.device]
    if given.quick and given.device == "cuda":
        shapes = {kind: replace(shape, prompts=8) for kind, shape in shapes.items()}
    kinds = given.kinds.split(",") if given.kinds else (["qwen3"] if given.quick else list(shapes))
    if unknown := set(kinds) - set(shapes):
        parser.error(f"unknown models {sorted(unknown)}; there are {sorted(shapes)}")
    rounds = given.rounds or (1 if given.quick else 2)
    steps = given.steps or (4 if given.quick else 6)
    missing: dict[str, str] = {}
    versions: dict[str, str] = {}
    try:
        if given.no_peer:
            raise NotInstalled("left out")
        versions = TRL.ensure(install=not given.quick)
    except NotInstalled as reason:
        missing["TRL"] = str(reason)
    models = {}
    with tempfile.TemporaryDirectory(prefix="grpo-") as folder:
        for kind in kinds:
            models[kind] = measure(shapes[kind], given.device, Path(folder), rounds, steps, missing, whole=kind != "llama")
            print(report_of(kind, models[kind]), flush=True)
            result = {
                "benchmark": "grpo",
                "quick": given.quick,
                "machine": at_start,
                "device": given.device,
                **overall(models),
                "models": models,
                "gates": gates_of(models),
                "missing": missing,
                "versions": versions,
                "targets": TARGETS | (GPU_TARGETS if given.device == "cuda" else {}),
            }
            write_json(given.json, result)
    print(report(result))
    return 0 if all(gate["passed"] for gate in result["gates"].values()) else 1


def measure(
    shape: Shape, device: str, folder: Path, rounds: int, steps: int, missing: dict[str, str], *, whole: bool
) -> dict[str, Any]:
    """The parts in turns, and, for the `whole`, everybody end to end in turns."""
    base = ensure_base(shape)
    order = {"shape": asdict(shape), "base": str(base), "device": device, "steps": steps, "rounds": rounds}
    parts = contender(
        "ours",
        order | {"what": "rollouts", "rounds": 2 * rounds, "completion": max(64, shape.prompt // 2), "groups": 2},
        folder / "parts",
    )[-1]
    found: dict[str, Any] = {"parts": parts, **part_ratios(parts)}
    if not whole:
        return found
    runs: dict[str, list[list[dict[str, Any]]]] = {}
    for number in range(rounds):
        for name in ENDS:
            if name not in missing and not (name == "training" and number):
                try:
                    told = contender(name, order | {"what": "run"} | OURS.get(name, {}), folder / f"{name[0]}{number}")
                    runs.setdefault(name, []).append(told)
                except Failed as reason:
                    missing[f"{name}, {shape.kind}"] = str(reason)
                    if name != "TRL":
                        raise SystemExit(f"{name} failed: {reason}") from None
    return found | end_to_end(runs, shape, device)


def ensure_base(shape: Shape) -> Path:
    base = FOLDER / "grpo" / recipe(shape)
    if not (base / "config.json").exists():
        FOLDER.mkdir(exist_ok=True)
        (FOLDER / ".gitignore").write_text("*\n")
        fresh = base.with_name(base.name + ".new")
        shutil.rmtree(fresh, ignore_errors=True)
        command = [sys.executable, str(HERE / "peers/grpo_assets.py"), str(fresh), json.dumps(asdict(shape))]
        subprocess.run(command, env=_variables(), check=True, capture_output=True)
        fresh.rename(base)
    return base


def contender(name: str, order: dict[str, Any], folder: Path) -> list[dict[str, Any]]:
    """Runs one in a new folder; the lines of JSON that it printed."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    programs = {
        "A": [sys.executable, str(HERE / "peers/plain_grpo.py")],
        "TRL": [TRL.program("python"), str(HERE / "peers/trl_grpo.py")],
    }
    program = programs.get(name, [sys.executable, str(HERE / "grpo_ours.py")])
    task = json.dumps(order | {"folder": str(folder)})
    done = subprocess.run(
        [*program, task],
        cwd=folder,
        env=_variables(order["device"]) | {"ROPEWALK_HOME": str(folder / "home")},
        capture_output=True,
        text=True,
    )
    lines = [line for line in done.stdout.splitlines() if line.startswith('{"')]
    if done.returncode or not lines:
        raise Failed(f"{name} ended with {done.returncode}: {done.stderr[-800:]}")
    return [json.loads(line) for line in lines]


def _variables(device: str = "cpu") -> dict[str, str]:
    threads = ONE_THREAD if device == "cpu" else {}
    return os.environ | OFFLINE | threads | {"PYTHONWARNINGS": "ignore", "TRANSFORMERS_VERBOSITY": "error"}


# ---------------------------------------------------------------- what it comes to


def part_ratios(parts: dict[str, Any]) -> dict[str, float]:
    even, uneven, shared = (parts[name]["cost"] for name in ("even", "uneven", "shared"))
    return {
        "rollout_vs_generate": even["generate"] / even["ours"],
        "rollout_uneven_vs_generate": uneven["generate"] / uneven["ours"],
        "shared_prompt_training": shared["alone"] / shared["shared"],
        "shared_prompt_vs_packed": shared["packed"] / shared["shared"],
    }


def end_to_end(runs: dict[str, list[list[dict[str, Any]]]], shape: Shape, device: str) -> dict[str, Any]:
    """Of everybody what a step costs on average, the first one, which warms up, and the last, ahead of which nothing is begun, left out.

    The number of those between is even: C writes two steps' completions together in every second step.
    """
    clock, best = ("step", min) if device == "cpu" else ("wall", statistics.median)
    costs, facts = {}, {}
    for name, told in runs.items():
        per_step = []
        for lines in told:
            marks = [line[clock] for line in lines if clock in line]
            per_step.append([after - before for before, after in pairwise(marks[:-1])])
        costs[name] = float(best(statistics.mean(steps) for steps in per_step))
        facts[name] = {"steps": per_step, **told[0][-1], "tokens": _tokens(told[0], shape)}
    peak = {name: facts[name]["peak"] - facts[name].get("loaded", 0) for name in ("C", "training") if name in facts}
    base = costs["C"]
    found: dict[str, Any] = {
        "step_cost": costs,
        "contenders": facts,
        "tokens_per_step": sum(map(sum, lengths(shape))),
        "async_vs_sync": costs["B"] / base,
        "c_vs_a": costs["A"] / base,
        "c_vs_a_prime": costs["A'"] / base,
        "a_prime_vs_a": costs["A"] / costs["A'"],
        "peak_vs_training": peak["C"] / peak["training"],
    }
    if "TRL" in costs:
        found |= {"vs_trl": costs["TRL"] / costs["B"], "c_vs_trl": costs["TRL"] / base}
    return found


def _tokens(lines: list[dict[str, Any]], shape: Shape) -> float | None:
    """Sampled tokens of a step, as the contender counted them."""
    for line in lines:
        if "tokens" in line:
            return float(line["tokens"])
        if "mean_length" in line:
            return round(line["mean_length"] * shape.completions, 1)
    return None


def overall(models: dict[str, dict[str, Any]]) -> dict[str, float]:
    """Of each ratio the model that it is worst for: the least gain, the highest peak."""
    names = ("rollout_vs_generate", "rollout_uneven_vs_generate", "shared_prompt_training", "async_vs_sync", "vs_trl")
    names += ("c_vs_a", "c_vs_a_prime", "a_prime_vs_a", "c_vs_trl")
    found = {
        name: min(m[name] for m in models.values() if name in m) for name in names if any(name in m for m in models.values())
    }
    peaks = [m["peak_vs_training"] for m in models.values() if "peak_vs_training" in m]
    return found | ({"peak_vs_training": max(peaks)} if peaks else {})


def gates_of(models: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = {}
    for kind, model in models.items():
        for name, gate in model["parts"]["gates"].items():
            found[f"{name}, {kind}"] = gate
        for name, fact in model.get("contenders", {}).items():
            if name not in ("A", "TRL"):
                found |= {f"{gate}, {name}, {kind}": {"passed": held} for gate, held in _held(fact).items()}
        if "contenders" in model:
            everybody = model["contenders"]
            tokens = {name: fact["tokens"] for name, fact in everybody.items()}
            found[f"equal_tokens, {kind}"] = {"passed": set(tokens.values()) == {float(model["tokens_per_step"])}, **tokens}
            sizes = {name: fact["trainable"] for name, fact in everybody.items()}
            found[f"equal_adapters, {kind}"] = {"passed": len(set(sizes.values())) == 1, **sizes}
    return found


def _held(fact: dict[str, Any]) -> dict[str, bool]:
    held = {"base_unchanged": bool(fact["base_unchanged"]), "dtype_unchanged": fact["trained_dtypes"] == ["torch.float32"]}
    if "weights_both" in fact:  # the generator's own is its adapter, and small buffers that follow from the configuration
        held["base_held_once"] = fact["weights_both"] <= fact["weights_trainer"] + 1.01 * fact["adapter"] + 2**16
    return held


def report_of(kind: str, model: dict[str, Any]) -> str:
    parts = model["parts"]
    rows = [
        ["rollout, even", parts["even"]["cost"]["generate"], parts["even"]["cost"]["ours"], model["rollout_vs_generate"]],
        [
            "rollout, uneven",
            parts["uneven"]["cost"]["generate"],
            parts["uneven"]["cost"]["ours"],
            model["rollout_uneven_vs_generate"],
        ],
        [
            "training, shared prompts",
            parts["shared"]["cost"]["alone"],
            parts["shared"]["cost"]["shared"],
            model["shared_prompt_training"],
        ],
    ]
    lines = [f"\n{kind}", table(["part", "peer s", "ours s", "x"], rows)]
    if "step_cost" in model:
        costs = model["step_cost"]
        steps = [
            [name, cost, cost / costs["C"], sum(map(len, model["contenders"][name]["steps"]))] for name, cost in costs.items()
        ]
        lines.append(table(["end to end", "s a step", "by C", "steps"], steps))
        lines.append(f"peak memory of C over training alone: {model['peak_vs_training']:.2f}")
    return "\n".join(lines)


def report(result: dict[str, Any]) -> str:
    names = [
        name
        for name in result
        if name in TARGETS or name in GPU_TARGETS or name in ("async_vs_sync", "a_prime_vs_a", "c_vs_trl")
    ]
    names += [name for name in ("c_vs_a", "c_vs_a_prime", "peak_vs_training") if name in result and name not in names]
    rows = [[name, result[name], result["targets"].get(name)] for name in names]
    failed = [f"gate FAILED: {name} {gate}" for name, gate in result["gates"].items() if not gate["passed"]]
    held = len(result["gates"]) - len(failed)
    missing = [f"missing: {name}: {reason}" for name, reason in result["missing"].items()]
    head = ["the model it is worst for", "ratio", "wanted"]
    return "\n".join(["", table(head, rows), f"gates: {held} of {len(result['gates'])} hold", *failed, *missing])


if __name__ == "__main__":
    sys.exit(main())
