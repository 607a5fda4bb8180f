"""Every method of training by rewards on "four skills, one rewarded" (benchmarks/four_skills_task.py), and bugs planted into it.

    python benchmarks/four_skills.py [--quick] [--json FILE] [--methods a,b] [--seeds 0,1,2] [--planted a,b]

Each run is `ropewalk train` with `rl: grpo`: 120 steps of 16 prompts with 8 completions, LoRA of rank 8, from a model that has been
warmed up by ordinary fine-tuning, about one time in five right and greedily not. Held out: the share of 512 prompts that it never saw
which are answered rightly, greedily, by transformers and PEFT from the saved adapter, so that nothing of what has trained it judges it.
Curve: the mean reward of the last 20 steps. Exits 1 where a method ends below 0.85 held out or 0.75 on its curve, where our own
evaluation differs from the independent one, or where a planted bug passes. Runs with planted bugs are told to trust the beginning:
the comparison of generator and trainer that would stop some of them is off, and the curve alone must tell. In full, the default method
also learns from completions that were begun a step ahead (`dapo, async 1`).
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import four_skills_task as task
from measure import machine, table, watch, write_json
from peers.environments import FOLDER, OFFLINE

HERE = Path(__file__).resolve().parent
STEPS, LAST = 120, 20
HELD_OUT, CURVE = 0.85, 0.75  # what every method must reach
SECONDS = 60.0  # of the CPU, which each should stay under; told, never a reason to fail
STARTS_WITHIN = 0.12, 0.35  # how often a warmed-up model is right
QUICK_METHODS, QUICK_PLANTED = ("dapo", "grpo"), ("sign", "stale")
AGREES = 0.02  # by how much two ways of decoding greedily may differ over 512 prompts
ONE_THREAD = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
WARM_UP: dict[str, Any] = {
    "sequence_len": 16,
    "micro_batch_size": 64,
    "max_steps": 800,
    "learning_rate": 3e-3,
    "lr_scheduler": "cosine",
    "cosine_min_lr_ratio": 0.1,
    "warmup_steps": 20,
    "weight_decay": 0.0,
    "logging_steps": 200,
}
REWARDED: dict[str, Any] = {
    "rl": "grpo",
    "adapter": "lora",
    "lora_r": 8,
    "lora_alpha": 16,
    "sequence_len": 512,
    "micro_batch_size": 1,
    "max_steps": STEPS,
    "learning_rate": 5e-3,
    # A constant rate of this size is at the edge: once nearly all is right, one rare sample of a group, five times as far from its
    # mean as the others, can throw a policy back within a few steps, in a plain loop over PEFT as well as here.
    "lr_scheduler": "linear",
    "warmup_steps": 0,
    "weight_decay": 0.0,
    "max_grad_norm": 1.0,
    "logging_steps": 20,
}
TRL: dict[str, Any] = {
    "reward_funcs": [f"{HERE / 'four_skills_task.py'}:reverse"],
    "num_generations": 8,
    "generation_batch_size": 128,
    "max_completion_length": task.NEW,
}


@dataclass(frozen=True)
class Job:
    """One run."""

    method: str
    seed: int
    planted: str = ""
    steps: int = STEPS
    asynchronous: bool = False

    @property
    def name(self) -> str:
        odd = [self.planted or ("async" if self.asynchronous else "")]
        return "-".join([self.method, str(self.seed), *filter(None, odd), str(self.steps)])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="two methods, one seed, two planted bugs: under 3 minutes")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the result here")
    parser.add_argument("--keep", action="store_true", help="runs that the file of --json holds already are not run again")
    parser.add_argument("--methods", help="which (default: all; with --quick dapo and grpo)")
    parser.add_argument("--seeds", default=None, help="which (default: 0,1,2; with --quick 0)")
    parser.add_argument("--planted", help="which bugs (default: all; with --quick sign and stale)")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.worker:
        work(json.loads(given.worker))
        return 0
    from ropewalk.train.policy_losses import METHODS

    methods = _chosen(parser, given.methods, METHODS, QUICK_METHODS if given.quick else METHODS)
    planted = _chosen(parser, given.planted, ("sign", "permuted", "shifted", "stale"), QUICK_PLANTED if given.quick else None)
    seeds = [int(seed) for seed in (given.seeds or ("0" if given.quick else "0,1,2")).split(",")]
    at_start = machine()
    starts = {seed: warmed_up(seed) for seed in seeds}
    jobs = [Job(method, seed) for method in methods for seed in seeds] + [Job("dapo", seeds[0], bug) for bug in planted]
    if not given.quick:
        jobs += [Job("dapo", seed, asynchronous=True) for seed in seeds]
    results = runs_in(given.json) if given.keep and given.json else []
    done = {(r["method"], r["seed"], r["planted"], r["asynchronous"]) for r in results}
    for job in jobs:
        if (job.method, job.seed, job.planted, job.asynchronous) not in done:
            results.append(asdict(job) | run(job, starts[job.seed]["folder"]))
            result = summary(results, starts) | {"benchmark": "four_skills", "quick": given.quick, "machine": at_start}
            write_json(given.json, result)
    result = summary(results, starts) | {"benchmark": "four_skills", "quick": given.quick, "machine": at_start}
    print(report(result))
    write_json(given.json, result)
    return 0 if all(gate["passed"] for gate in result["gates"].values()) else 1


def runs_in(file: Path) -> list[dict[str, Any]]:
    """The runs of an earlier result."""
    if not file.exists():
        return []
    earlier = json.loads(file.read_text())
    return [r for method in earlier["methods"].values() for r in method["seeds"].values()] + [
        {key: value for key, value in bug.items() if key != "caught"} for bug in earlier["bugs"].values()
    ]


def _chosen(parser: argparse.ArgumentParser, asked: str | None, known: Any, default: Any) -> list[str]:
    if asked is None:
        return list(default or known)
    wanted = [name for name in asked.split(",") if name]
    if unknown := set(wanted) - set(known):
        parser.error(f"unknown: {sorted(unknown)}; there are {sorted(known)}")
    return wanted


# ---------------------------------------------------------------- the warm start


def warmed_up(seed: int) -> dict[str, Any]:
    """The model to begin with, made once for each seed and recipe, and how right it is."""
    recipe = json.dumps(WARM_UP, sort_keys=True) + Path(task.__file__).read_text()
    folder = FOLDER / "four_skills" / f"{hashlib.sha256(recipe.encode()).hexdigest()[:12]}-{seed}"
    facts = folder / "facts.json"
    if not facts.exists():
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        (FOLDER / ".gitignore").write_text("*\n")
        done = _watched({"warm_up": str(folder), "seed": seed}, folder)
        if done.code:
            raise SystemExit(f"the warm start of seed {seed} ended with {done.code}:\n{done.tail}")
        found = json.loads((folder / "found.json").read_text())
        facts.write_text(json.dumps(found | {"cpu_s": round(done.cpu_seconds, 1)}))
    made: dict[str, Any] = json.loads(facts.read_text()) | {"folder": str(folder / "run" / "model")}
    print(f"warm start, seed {seed}: right {made['sampled']:.3f} sampled, {made['greedy']:.3f} greedily", flush=True)
    return made


def run(job: Job, start: str) -> dict[str, Any]:
    """One run in a process of its own, and what it came to."""
    with tempfile.TemporaryDirectory(prefix="four-skills-") as folder:
        begun = time.monotonic()
        done = _watched({"job": asdict(job), "start": start, "folder": folder}, Path(folder))
        if done.code:
            raise SystemExit(f"{job.name} ended with {done.code}:\n{done.tail}")
        found: dict[str, Any] = json.loads((Path(folder) / "found.json").read_text())
    found |= {"cpu_s": round(done.cpu_seconds, 1), "wall_s": round(time.monotonic() - begun, 1)}
    said = found["stopped"] or f"held out {found['heldout']:.3f}, curve {found['curve']:.3f}"
    print(f"{job.name:<28} {said}  {found['cpu_s']:.0f} CPU s", flush=True)
    return found


def _watched(order: dict[str, Any], folder: Path) -> Any:
    command = [sys.executable, str(HERE / "four_skills.py"), "--worker", json.dumps(order)]
    home = {"ROPEWALK_HOME": str(folder / "home"), "HF_HOME": str(folder / "hub")}
    return watch(command, folder / "log.txt", pattern=r"^(\d+)$", environment=OFFLINE | ONE_THREAD | home, timeout=900)


# ---------------------------------------------------------------- in a process of its own


def work(order: dict[str, Any]) -> None:
    import torch

    torch.set_num_threads(1)
    if "warm_up" in order:
        warm_up(Path(order["warm_up"]), order["seed"])
    else:
        learn(Job(**order["job"]), Path(order["start"]), Path(order["folder"]))


def warm_up(folder: Path, seed: int) -> None:
    from transformers import AutoModelForCausalLM

    from ropewalk.train.trainer import train

    base = folder / "base"
    task.write_task(base, seed)
    task.new_model(seed).save_pretrained(base)
    rows = [{"path": str(base / "warm_start.jsonl"), "type": "chat_template"}]
    keys = WARM_UP | {"base_model": str(base), "datasets": rows, "output_dir": str(folder / "run"), "seed": seed}
    result = train(_configured(keys), restart=True, quiet=True)
    model = AutoModelForCausalLM.from_pretrained(result.adapter).eval()
    _, held = task.prompts(seed)
    found = {"sampled": right(model, held, greedy=False), "greedy": right(model, held), "seed": seed}
    (folder / "found.json").write_text(json.dumps(found))


def learn(job: Job, start: Path, folder: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    import four_skills_planted
    from ropewalk.errors import TrainingStopped
    from ropewalk.train.trainer import train

    data = start.parents[1] / "base"
    if job.planted:
        four_skills_planted.trust_the_beginning()
        four_skills_planted.plant(job.planted)
    keys = REWARDED | {
        "base_model": str(start),
        "datasets": [{"path": str(data / "train.jsonl"), "type": "chat_template"}],
        "test_datasets": [{"path": str(data / "held_out.jsonl"), "type": "chat_template"}],
        "output_dir": str(folder / "run"),
        "max_steps": job.steps,
        "seed": job.seed,
        "trl": TRL | {"loss_type": job.method, "async_prefetch": job.asynchronous},
    }
    stopped, heldout = "", 0.0
    try:
        result = train(_configured(keys), quiet=True)
        model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(start), result.adapter).eval()
        _, held = task.prompts(job.seed)
        heldout = right(model, held)
    except TrainingStopped as error:
        stopped = str(error)
    events = [json.loads(line) for line in (folder / "run/events.jsonl").read_text().splitlines()]
    steps = [event for event in events if event["event"] == "step"]
    evaluated = [event["reward"] for event in events if event["event"] == "eval"]
    rewards = [event["reward"] for event in steps]
    found = {
        "heldout": heldout,
        "evaluated": evaluated[-1] if evaluated else None,
        "curve": sum(rewards[-LAST:]) / max(1, len(rewards[-LAST:])),
        "first": sum(rewards[:LAST]) / max(1, len(rewards[:LAST])),
        "rewards": [round(reward, 4) for reward in rewards],
        "mismatch": max((event["mismatch"] for event in steps), default=None),
        "generate_share": sum(e["generate_seconds"] for e in steps) / max(1e-9, sum(e["seconds"] for e in steps)),
        "stopped": stopped,
    }
    (folder / "found.json").write_text(json.dumps(found))


def _configured(keys: dict[str, Any]) -> Any:
    from ropewalk.config.run import parse_run

    return parse_run(json.dumps(keys | {"bf16": False, "num_threads": 1}))  # JSON is YAML too


def right(model: Any, asked: task.Ids, *, greedy: bool = True) -> float:
    """The share of prompts that transformers' own generation answers rightly; sampled: the mean of four tries."""
    import torch

    torch.manual_seed(0)
    tries = asked if greedy else asked.repeat(4, axis=0)
    ids = torch.from_numpy(tries.copy())
    options: dict[str, Any] = {} if greedy else {"temperature": 1.0, "top_k": 0, "top_p": 1.0}
    with torch.no_grad():
        whole = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            do_sample=not greedy,
            max_new_tokens=task.NEW,
            min_new_tokens=task.NEW,
            eos_token_id=None,
            pad_token_id=task.PAD,
            **options,
        )
    return float(task.rewarded(tries, whole[:, task.PROMPT :].numpy()).mean())


# ---------------------------------------------------------------- what it comes to


def summary(results: list[dict[str, Any]], starts: dict[int, dict[str, Any]]) -> dict[str, Any]:
    """Of each method its worst seed, of each planted bug whether it was caught."""
    methods: dict[str, dict[str, Any]] = {}
    whole = [r for r in results if not r["planted"]]
    for name in dict.fromkeys(map(_title, whole)):
        mine = [r for r in whole if _title(r) == name]
        methods[name] = {
            "heldout": min(r["heldout"] for r in mine),
            "curve": round(min(r["curve"] for r in mine), 4),
            "cpu_s": max(r["cpu_s"] for r in mine),
            "seeds": {str(r["seed"]): r for r in mine},
        }
    bugs = {r["planted"]: r | {"caught": bool(r["stopped"]) or r["curve"] < CURVE} for r in results if r["planted"]}
    gates = {
        "warm_starts": _gate(
            STARTS_WITHIN[0] <= s["sampled"] <= STARTS_WITHIN[1] and s["greedy"] < 0.5 for s in starts.values()
        ),
        "methods": _gate(m["heldout"] >= HELD_OUT and m["curve"] >= CURVE for m in methods.values()),
        "evaluation_agrees": _gate(
            abs(r["heldout"] - r["evaluated"]) <= AGREES for r in results if r["evaluated"] is not None and not r["planted"]
        ),
        "planted_caught": _gate(bug["caught"] for bug in bugs.values()),
    }
    return {
        "methods": methods,
        "planted": len(bugs),
        "planted_caught": sum(bug["caught"] for bug in bugs.values()),
        "bugs": bugs,
        "warm_starts": {str(seed): {k: v for k, v in start.items() if k != "folder"} for seed, start in starts.items()},
        "gates": gates,
        "targets": {"heldout": HELD_OUT, "curve": CURVE, "cpu_s": SECONDS},
    }


def _title(result: dict[str, Any]) -> str:
    return f"{result['method']}, async 1" if result["asynchronous"] else str(result["method"])


def _gate(held: Any) -> dict[str, Any]:
    found = list(held)
    return {"passed": all(found), "of": len(found), "held": sum(found)}


def report(result: dict[str, Any]) -> str:
    rows = [
        [name, seed, r["heldout"], r["curve"], r["first"], r["cpu_s"], r["stopped"] or None]
        for name, method in result["methods"].items()
        for seed, r in method["seeds"].items()
    ]
    rows += [
        [
            f"planted: {name}",
            str(r["seed"]),
            r["heldout"],
            r["curve"],
            r["first"],
            r["cpu_s"],
            "caught" if r["caught"] else "PASSED",
        ]
        for name, r in result["bugs"].items()
    ]
    head = ["method", "seed", "held out", f"last {LAST}", f"first {LAST}", "CPU s", ""]
    worst = [[name, method["heldout"], method["curve"], method["cpu_s"]] for name, method in result["methods"].items()]
    lines = [table(head, rows), "", table(["method", "held out, worst", "curve, worst", "CPU s, most"], worst), ""]
    lines += [f"planted bugs caught: {result['planted_caught']} of {result['planted']}"]
    lines += [
        f"gate {name}: {'passed' if g['passed'] else 'FAILED'} ({g['held']} of {g['of']})"
        for name, g in result["gates"].items()
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    sys.exit(main())
