"""The whole comparison of mixture-of-experts training: what is raced, in which order, and what it says in ratios. No torch."""

from __future__ import annotations

import os
import platform
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from ropewalk.bench import race
from ropewalk.bench.contenders import FOUR_BITS, IN_MODELS, ONCE, OURS, PRODUCTS, Entrant, groups, present
from ropewalk.bench.shapes import (
    CPU_MODELS,
    DRY_LAYERS,
    DRY_MODELS,
    GATE,
    QUICK_MODELS,
    SMALL_LAYERS,
    TRUE_LAYERS,
    Layer,
    Model,
    published,
)
from ropewalk.errors import RopewalkError

WRONG = 1e-5  # of the gradients of a small model in float32
WRONG_IN_MODEL = 1e-4  # of the gradients of a model that is raced, in float32
WRONG_IN_BF16 = 0.05
WORSE = 2.0  # times the error of the worst peer, in 16 bits, where a token that is nearly undecided may go elsewhere
SECONDS = 6.0  # for the steps of one model by one contender on a GPU
EAGER_FROM = (
    128  # experts of a model in which the loop over them races on a CPU: its steps take half a minute, and fewer show the same
)
LONG = 16384  # tokens of a layer from which the loop races on a GPU
PACKAGES = ("torch", "transformers", "peft", "triton", "axolotl", "unsloth_zoo", "liger_kernel", "ropewalk")


@dataclass(frozen=True)
class Plan:
    """What is raced."""

    device: str
    layers: tuple[tuple[Layer, int, str, str], ...]  # shape, tokens, dtype, format of the frozen stacks
    models: tuple[tuple[Model, str, str], ...]  # shape, dtype, format
    rounds: int
    lean: bool  # with the policies that keep less
    gate: bool = True
    lean_models: bool = True  # and models too
    without: tuple[str, ...] = ()  # contenders left out


@dataclass
class Result:
    """What was found."""

    plan: Plan
    missing: dict[str, str]
    errors: dict[str, float] = field(default_factory=dict)
    rows: list[dict[str, Any]] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)  # peers without an error, and why

    @property
    def right(self) -> bool:
        """Whether ours computed what it should, everywhere."""
        if self.errors.get(OURS, 0.0) > WRONG:
            return False
        return all(
            _right(row, rows) for rows in races(self.rows).values() for row in rows if row["contender"] in (OURS, PRODUCTS)
        )

    def ratios(self) -> dict[str, dict[str, Any]]:
        """For every race, how many times ours is faster than each peer at the same policy, and the share of its memory."""
        found: dict[str, dict[str, Any]] = {}
        for name, rows in races(self.rows).items():
            by = {(row["contender"], row["policy"]): row for row in rows}
            for policy in ("keep", "layer"):
                mine = by.get((OURS, policy))
                peers = {c: row for (c, p), row in by.items() if c not in (OURS, PRODUCTS) and p == policy and row.get("ms")}
                if mine is None or not mine.get("ms") or not peers:
                    continue
                fastest = min(peers.values(), key=lambda row: row["ms"])
                entry: dict[str, Any] = {
                    "best_peer": fastest["contender"],
                    "best_peer_ratio": fastest["ms"] / mine["ms"],
                    "times_faster": {c: row["ms"] / mine["ms"] for c, row in peers.items()},
                    "held": {c: mine["held_mb"] / row["held_mb"] for c, row in peers.items() if row["held_mb"]},
                    "peak": {c: mine["peak_mb"] / row["peak_mb"] for c, row in peers.items() if row["peak_mb"]},
                }
                if policy == "keep":
                    lean = [r for (c, _), r in by.items() if c == OURS and r.get("ms") and r["ms"] <= fastest["ms"]]
                    leanest = min(lean, key=lambda r: r["peak_mb"], default=None)
                    entry["as_fast_and_leanest"] = leanest and {
                        "policy": leanest["policy"],
                        "times_faster": fastest["ms"] / leanest["ms"],
                        "held": leanest["held_mb"] / fastest["held_mb"],
                        "peak": leanest["peak_mb"] / fastest["peak_mb"],
                    }
                else:
                    kept = by.get((OURS, "offload"))
                    if kept and kept["peak_mb"]:
                        entry["leanest_peak"] = {
                            c: kept["peak_mb"] / row["peak_mb"] for c, row in peers.items() if row["peak_mb"]
                        }
                found[f"{name}, {policy}"] = entry
        return found

    def extrapolated(self) -> list[dict[str, Any]]:
        """Steps of whole published models, worked out from those with fewer layers as a + b L; nobody ran them."""
        found = []
        depths = {m.name: m.depth for m, _, _ in self.plan.models if m.depth}
        of: dict[tuple[Any, ...], dict[int, float]] = {}
        for row in self.rows:
            if row["level"] == "model" and row["shape"] in depths and row.get("ms"):
                key = (row["shape"], row["dtype"], row["stored"], row["tokens"], row["contender"], row["policy"])
                of.setdefault(key, {})[row["layers"]] = row["ms"]
        for key, by_layers in of.items():
            if len(by_layers) > 1:
                (few, short), *_, (many, long) = sorted(by_layers.items())
                each = (long - short) / (many - few)
                shape, dtype, stored, tokens, contender, policy = key
                ms = short + each * (depths[shape] - few)
                found.append(
                    {"shape": shape, "dtype": dtype, "stored": stored, "tokens": tokens, "contender": contender, "policy": policy,
                     "layers": depths[shape], "extrapolated_ms": ms, "extrapolated_tokens_per_s": tokens / ms * 1e3}
                )  # fmt: skip
        return found

    def as_json(self) -> dict[str, Any]:
        ratios = self.ratios()
        return {
            "machine": machine(self.plan.device),
            "unit": "CPU milliseconds of one thread" if self.plan.device == "cpu" else "milliseconds between events",
            "max_grad_error": self.errors,
            "failed": self.failed,
            "missing": self.missing,
            "best_peer_ratio": {name: entry["best_peer_ratio"] for name, entry in ratios.items()},
            "ratios": ratios,
            "rows": self.rows,
            "extrapolated": self.extrapolated(),
        }


def _right(row: dict[str, Any], rows: list[dict[str, Any]]) -> bool:
    """Whether a row of ours was computed, and as it should."""
    if not row.get("ms"):
        return False
    if row["level"] == "layer":
        return True  # one that is wrong has no time
    error = row["max_error"]
    if error is None:
        return False
    if row["dtype"] == "float32":
        return bool(error <= WRONG_IN_MODEL)
    theirs = [r["max_error"] for r in rows if r["contender"] not in (OURS, PRODUCTS) and r.get("max_error") is not None]
    return bool(error <= max(WRONG_IN_BF16, WORSE * max(theirs, default=0.0)))


def races(rows: Sequence[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """Rows that can be compared with each other, by a name."""
    found: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        layers = f"{row['layers']} layers" if row["level"] == "model" else "one layer"
        name = f"{row['shape']}, {layers}, {row['dtype']}{' ' + row['stored'] if row['stored'] else ''}, T={row['tokens']}"
        found.setdefault(name, []).append(row)
    return found


def plan(device: str, *, quick: bool = False, dry: bool = False) -> Plan:
    """What `benchmarks/moe_lora.py` races: everything, or in under three minutes on two cores, or only whether it runs."""
    if dry:
        dtype = "bfloat16" if device == "cuda" else "float32"
        layers = [(DRY_LAYERS[0], 64, dtype, ""), (DRY_LAYERS[1], 64, dtype, "nf4")]
        return Plan(device, tuple(layers), tuple((m, dtype, "") for m in DRY_MODELS), 1, False)
    if device == "cuda":
        tokens = (4096,) if quick else (16384, 4096)
        layers = [(s, t, "bfloat16", f) for f in ("", "nf4") for t in tokens for s in TRUE_LAYERS]
        models = [(m, "bfloat16", f) for f in ("", "nf4") for m in published(tokens)]
        return Plan(device, tuple(layers), tuple(models), 8 if quick else 20, not quick)
    both = ("float32", "bfloat16")
    layers = [(s, 512 if quick else 1024, d, "") for s in SMALL_LAYERS for d in both]
    layers += [] if quick else [(s, 1024, "bfloat16", "nf4") for s in SMALL_LAYERS]
    models = [(m, d, "") for m in (QUICK_MODELS if quick else CPU_MODELS) for d in both]
    return Plan(device, tuple(layers), tuple(models), 2 if quick else 3, not quick)


def shown(device: str, *, quick: bool = False) -> Plan:
    """What `ropewalk bench moe` races: enough to see, in two minutes on a CPU."""
    if device == "cuda":
        return plan(device, quick=True) if quick else Plan(
            device, tuple((s, t, "bfloat16", f) for f in ("", "nf4") for t in (4096, 16384) for s in TRUE_LAYERS), (), 20, True
        )  # fmt: skip
    layers = ((SMALL_LAYERS[0], 1024, "float32", ""), (SMALL_LAYERS[0], 1024, "bfloat16", ""))
    models = () if quick else ((Model("64 experts", 2, 2, 512, 512, 256, 64, 8, vocab=1024), "float32", ""),)
    return Plan(device, layers[: 1 if quick else 2], models, 3, not quick, gate=not quick, lean_models=False)


def compare(plan: Plan, tell: Callable[[str], None]) -> Iterator[Result]:
    """The result as it grows, after every race."""
    names, missing = present(plan.device)
    names = [n for n in names if n not in plan.without]
    result = Result(plan, missing)
    if plan.gate:
        tell("gradients of a small model in float32")
        result.errors, result.failed = race.errors(GATE, [n for n in names if n != "liger"], plan.device)
        yield result
        if not result.right:
            return
    for shape, tokens, dtype, stored in plan.layers:
        tell(f"{shape.name}, one layer, {dtype} {stored}, {tokens} tokens")
        once = plan.device == "cpu" or tokens >= LONG
        entrants = [Entrant(n) for n in names if n != "liger" and (n != ONCE or once)]
        if plan.device == "cuda":
            entrants.insert(1, Entrant(PRODUCTS))
        if plan.lean:
            entrants += [
                Entrant(OURS, "experts"),
                *(Entrant(e.name, "layer") for e in entrants if e.name not in (ONCE, PRODUCTS)),
            ]
        result.rows += race.layer_rows(shape, tokens, dtype, plan.device, entrants, plan.rounds, stored)
        yield result
    if plan.device == "cuda":
        yield from _alone(plan, names, result, tell)
        return
    for model, dtype, stored in plan.models:
        who = [n for n in names if n != ONCE or model.experts >= EAGER_FROM or plan.device != "cpu"]
        for group in groups(who, plan.device, lean=plan.lean and plan.lean_models):
            rows = race.model_rows(model, dtype, plan.device, group, plan.rounds, tell, stored)
            known = {(r["contender"], r["policy"]) for r in races(result.rows).get(next(iter(races(rows))), [])}
            result.rows += [row for row in rows if (row["contender"], row["policy"]) not in known]
            yield result


def _alone(plan: Plan, names: list[str], result: Result, tell: Callable[[str], None]) -> Iterator[Result]:
    """Models one by one, each contender in a process: what keeps everything first, then leaner ways, then frozen weights of few bits."""
    floors: dict[race.Raced, float] = {}
    with tempfile.TemporaryDirectory() as folder:
        truths: dict[race.Raced, Path] = {}
        for entrants, races_here in queue(plan, names):
            for raced in races_here:
                if raced not in truths:
                    tell(f"{raced[0].name}, {raced[0].layers} layers, {raced[1]} {raced[2]}: the plain gradients")
                    truths[raced] = Path(folder) / str(len(truths))
                    try:
                        race.write_truth(raced, plan.device, truths[raced])
                    except RopewalkError as error:  # times are worth having all the same; the result is not called right
                        tell(str(error))
            tell(f"{len(races_here)} models by {', '.join(e.title for e in entrants)}")
            rows = race.models_alone(races_here, [truths[r] for r in races_here], entrants, plan.device, SECONDS)
            for row, raced in zip(rows, (r for r in races_here for _ in entrants), strict=True):
                if row["floor_ms"]:
                    floors[raced] = row["floor_ms"]
                elif row["ms"] and raced in floors:  # the least time is that of the same operations for everybody
                    row["share_of_ceiling"] = floors[raced] / row["ms"]
            result.rows += rows
            yield result
    for raced in plan.models:
        for name in (n for n in names if raced[2] and n != OURS):
            result.rows.append(race.left_out(raced, name, FOUR_BITS.get(name, IN_MODELS)))
    yield result


def queue(plan: Plan, names: list[str]) -> list[tuple[list[Entrant], list[race.Raced]]]:
    """Who runs which models in one process, in order."""
    whole = [raced for raced in plan.models if not raced[2]]
    stored = [raced for raced in plan.models if raced[2]]
    first, *lean = groups(names, plan.device, lean=plan.lean and plan.lean_models)
    found = [([entrant], whole) for entrant in first if entrant.policy == "keep"]
    for name in names if lean else []:
        ways = [e for e in dict.fromkeys((*first, *lean[0])) if e.name == name and e.policy != "keep"]
        found += [(ways, whole)] if ways else []
    found += [([Entrant(OURS)], stored)]
    return [(entrants, raced) for entrants, raced in found if raced]


def races_of(plan: Plan) -> int:
    """How many results `compare` gives."""
    names, _ = present(plan.device)
    if plan.device == "cuda":
        return int(plan.gate) + len(plan.layers) + len(queue(plan, names)) + 1
    return (
        int(plan.gate)
        + len(plan.layers)
        + len(plan.models) * len(groups(names, plan.device, lean=plan.lean and plan.lean_models))
    )


def machine(device: str) -> dict[str, Any]:
    """What a number was measured on."""
    found: dict[str, Any] = {
        "device": device,
        "cpu": _processor(),
        "cores": os.cpu_count(),
        "system": platform.platform(),
        "time": time.strftime("%Y-%m-%d %H:%M"),
        "versions": {},
    }
    if hasattr(os, "getloadavg"):
        found["load"] = round(os.getloadavg()[0], 2)
    for name in PACKAGES:
        try:
            found["versions"][name] = version(name)
        except PackageNotFoundError:
            continue
    if device == "cuda":
        import torch

        found["gpu"] = torch.cuda.get_device_name()
    return found


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())
