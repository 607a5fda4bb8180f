"""Training by rewards, end to end and in parts: ours beside a plain loop over transformers and PEFT, and beside TRL's GRPOTrainer.

    python benchmarks/grpo.py [--device cpu|cuda] [--quick] [--json FILE] [--kinds qwen3,qwen3_moe] [--rounds N] [--steps N] [--no-peer]

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

`expert_lora_decode` is what an id costs a full batch of a mixture whose experts are as wide as the model, with LoRA on attention and
experts, over what it costs with the base alone: the worse of float32 and bfloat16. `peft_expert_lora_decode` is the same of transformers
with PEFT, the better of both. A key is null where its contender is missing, which is said.

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
from collections.abc import Sequence
from dataclasses import asdict, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

from measure import machine, table, write_json
from peers.environments import FOLDER, OFFLINE, TRL_BESIDE, NotInstalled
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
QUICK_ENDS = ("TRL", "B", "C", "training")
OURS = {
    "A'": {"shared": False},
    "B": {},
    "C": {"async": True},
    "training": {"replayed": True},
}
TARGETS = {"rollout_vs_generate": 1.3, "rollout_uneven_vs_generate": 2.0, "shared_prompt_training": 2.0, "vs_trl": 2.0}
MOST = {"expert_lora_decode": 1.2}  # these are to stay below
TYPES = {"cpu": ("float32", "bfloat16"), "cuda": ("bfloat16",)}  # in which decoding is measured
TURNS, QUICK_TURNS = 8, 4  # of decoding, an even number
KEYS = (
    *(
        "rollout_vs_generate",
        "rollout_uneven_vs_generate",
        "shared_prompt_training",
        "async_vs_sync",
        "vs_trl",
        "peak_vs_training",
    ),
    *("expert_lora_decode", "peft_expert_lora_decode"),
)
GPU_TARGETS = {"c_vs_a_prime": 1.6, "c_vs_a": 4.0, "peak_vs_training": 1.15}


class Failed(Exception):
    """A contender that did not come to its end."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--quick", action="store_true", help="one model, without A and A': under 3 minutes on 2 cores")
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--kinds", help="which models (default: qwen3,qwen3_moe; with --quick qwen3 alone)")
    parser.add_argument("--rounds", type=int, default=None, help="turns of each (default 1)")
    parser.add_argument("--steps", type=int, default=None, help="of each turn, an even number from 4 on (default 4)")
    parser.add_argument("--no-peer", action="store_true", help="leave TRL out")
    given = parser.parse_args()
    at_start = machine("trl")
    shapes = SHAPES[given.device]
    if given.quick and given.device == "cuda":
        shapes = {kind: replace(shape, prompts=8) for kind, shape in shapes.items()}
    kinds = given.kinds.split(",") if given.kinds else ["qwen3"] if given.quick else ["qwen3", "qwen3_moe"]
    if unknown := set(kinds) - set(shapes):
        parser.error(f"unknown models {sorted(unknown)}; there are {sorted(shapes)}")
    if given.steps is not None and (given.steps < 4 or given.steps % 2):
        parser.error(
            f"--steps {given.steps}: an even number from 4 on is needed, since the first step and the last are left out"
        )
    rounds, steps, ends = given.rounds or 1, given.steps or 4, QUICK_ENDS if given.quick and given.device == "cpu" else ENDS
    missing: dict[str, str] = {}
    versions: dict[str, str] = {}
    try:
        if given.no_peer:
            raise NotInstalled("left out")
        versions = TRL_BESIDE.ensure(install=True)
    except NotInstalled as reason:
        missing["TRL"] = str(reason)
    asked = {"quick": given.quick, "rounds": rounds, "steps": steps, "kinds": kinds, "device": given.device}
    fixed = {"benchmark": "grpo", **asked, "machine": at_start}
    models: dict[str, dict[str, Any]] = {}
    decode: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory(prefix="grpo-") as folder:
        for kind in kinds:
            models[kind] = measure(
                shapes[kind], given.device, Path(folder), rounds, steps, missing, ends if kind != "llama" else ()
            )
            print(report_of(kind, models[kind]), flush=True)
            write_json(given.json, fixed | findings(models, decode, missing, versions, given.device))
        for dtype in TYPES[given.device]:
            turns = QUICK_TURNS if given.quick else TURNS
            decode[dtype] = decoding(shapes["qwen3_moe"], dtype, given.device, Path(folder), turns)
            result = fixed | findings(models, decode, missing, versions, given.device)
            write_json(given.json, result)
    print(report(result))
    return 0 if all(gate["passed"] for gate in result["gates"].values()) else 1


def findings(
    models: dict[str, Any], decode: dict[str, Any], missing: dict[str, str], versions: dict[str, str], device: str
) -> dict[str, Any]:
    """The result as far as it has come; a key that nobody has measured is null."""
    return {
        **dict.fromkeys(KEYS),
        **overall(models),
        **overall_decoding(decode),
        "models": models,
        "decode": decode,
        "gates": gates_of(models) | gates_of_decoding(decode),
        "missing": missing,
        "versions": versions,
        "targets": TARGETS | MOST | (GPU_TARGETS if device == "cuda" else {}),
    }


def measure(
    shape: Shape, device: str, folder: Path, rounds: int, steps: int, missing: dict[str, str], ends: Sequence[str]
) -> dict[str, Any]:
    """The parts in turns, and `ends` end to end in turns."""
    base = ensure_base(shape)
    order = {"shape": asdict(shape), "base": str(base), "device": device, "steps": steps, "rounds": rounds}
    parts = contender(
        "ours",
        order | {"what": "rollouts", "rounds": 2 * rounds, "completion": max(64, shape.prompt // 2), "groups": 2},
        folder / "parts",
    )[-1]
    found: dict[str, Any] = {"parts": parts, **part_ratios(parts)}
    if not ends:
        return found
    runs: dict[str, list[list[dict[str, Any]]]] = {}
    for number in range(rounds):
        for name in ends:
            if name not in missing and not (name == "training" and number):
                try:
                    told = contender(name, order | {"what": "run"} | OURS.get(name, {}), folder / f"{name[0]}{number}")
                    runs.setdefault(name, []).append(told)
                except Failed as reason:
                    missing[f"{name}, {shape.kind}"] = str(reason)
                    if name != "TRL":
                        raise SystemExit(f"{name} failed: {reason}") from None
    return found | end_to_end(runs, shape, device)


def decoding(shape: Shape, dtype: str, device: str, folder: Path, turns: int) -> dict[str, Any]:
    """A full batch that goes on, with an adapter on attention and experts and without.

    On a CPU the model knows fewer words: a head of 8,192 would be two fifths of one so small, and hide what the adapter costs.
    """
    typed = replace(shape, vocabulary=min(shape.vocabulary, 2048) if device == "cpu" else shape.vocabulary, dtype=dtype)
    order = {"shape": asdict(typed), "base": str(ensure_base(typed)), "device": device, "what": "decode", "turns": turns}
    return contender("ours", order, folder / dtype)[-1]


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
        "TRL": [TRL_BESIDE.program("python"), str(HERE / "peers/trl_grpo.py")],
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
        "peak_vs_training": peak["C"] / peak["training"],
    }
    if "A" in costs:
        found |= {"c_vs_a": costs["A"] / base, "c_vs_a_prime": costs["A'"] / base, "a_prime_vs_a": costs["A"] / costs["A'"]}
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


def overall_decoding(decode: dict[str, dict[str, Any]]) -> dict[str, float]:
    if not decode:
        return {}
    return {
        "expert_lora_decode": max(found["expert_lora_decode"] for found in decode.values()),
        "peft_expert_lora_decode": min(found["peft_expert_lora_decode"] for found in decode.values()),
    }


def gates_of_decoding(decode: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    return {f"{name}, {dtype}": gate for dtype, found in decode.items() for name, gate in found["gates"].items()}


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


def report_of_decoding(decode: dict[str, dict[str, Any]]) -> str:
    rows = []
    for dtype, found in decode.items():
        costs = {name: 1000 * cost for name, cost in found["cost"].items()}
        rows.append([f"{dtype}, ours", costs["base"], costs["ours"], found["expert_lora_decode"]])
        rows.append([f"{dtype}, PEFT", costs["transformers"], costs["peft"], found["peft_expert_lora_decode"]])
    count = next(iter(decode.values()))["sequences"]
    return table([f"an id for each of {count}, qwen3_moe", "base ms", "with LoRA on experts ms", "x"], rows)


def report(result: dict[str, Any]) -> str:
    others = ("async_vs_sync", "a_prime_vs_a", "c_vs_trl", "peft_expert_lora_decode")
    names = [name for name in result if name in {**TARGETS, **MOST, **GPU_TARGETS} or name in others]
    names += [name for name in ("c_vs_a", "c_vs_a_prime", "peak_vs_training") if name in result and name not in names]
    rows = [[name, result[name], result["targets"].get(name)] for name in names]
    failed = [f"gate FAILED: {name} {gate}" for name, gate in result["gates"].items() if not gate["passed"]]
    held = len(result["gates"]) - len(failed)
    missing = [f"missing: {name}: {reason}" for name, reason in result["missing"].items()]
    missing += [f"null: {name}, since nobody measured it" for name in KEYS if result[name] is None]
    head = ["the model it is worst for", "ratio", "wanted"]
    return "\n".join(
        [
            "",
            report_of_decoding(result["decode"]),
            "",
            table(head, rows),
            f"gates: {held} of {len(result['gates'])} hold",
            *failed,
            *missing,
        ]
    )


if __name__ == "__main__":
    sys.exit(main())
