"""Fine-tuning a mixture of experts with LoRA: single expert layers and whole models, ours beside its peers.

    python benchmarks/moe_lora.py [--device cpu|cuda] [--quick | --dry-run] [--json FILE [--add]] [--plot FILE] [--layers-only | --models-only]
                                  [--shapes NAME ...] [--dtypes NAME ...] [--rounds N] [--without CONTENDER ...]

Contenders and what each may keep for the backward pass are those of src/ropewalk/bench/contenders.py; a peer takes part where it is
installed. The same weights, factors, routing and upstream gradient for everybody; a layer is compared with the plain one in float32 in
its result and every gradient before it is timed. On a CPU a step costs CPU milliseconds of one thread, the least over all rounds; on a GPU
milliseconds between events, the median. `held_mb` is what waits for the backward pass, `peak_mb` the most at any moment, both beyond what
lives before the step and with what waits on the host; `share_of_ceiling` is the least time that the operations and the reading of the
frozen weights can take, at the rates of one large product and one large copy here, over the time taken. Steps of whole published models are
extrapolated from two and four layers, and named so. Exits 1 if ours is wrong somewhere, and never because something was slow.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

from measure import table, write_json
from ropewalk.bench.moe import Result, compare, plan, races
from ropewalk.bench.report import plot, screen, show


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--quick", action="store_true", help="small shapes, under 3 minutes on 2 cores")
    parser.add_argument("--dry-run", action="store_true", help="tiny shapes: whether everything runs")
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="an SVG")
    parser.add_argument("--rounds", type=int)
    parser.add_argument("--shapes", nargs="+", metavar="NAME", help="only these")
    parser.add_argument("--dtypes", nargs="+", metavar="NAME", help="only these")
    parser.add_argument("--add", action="store_true", help="what FILE has of other races stays in it")
    parser.add_argument("--without", nargs="+", default=[], metavar="CONTENDER", help="leave these out")
    only = parser.add_mutually_exclusive_group()
    only.add_argument("--layers-only", action="store_true")
    only.add_argument("--models-only", action="store_true")
    given = parser.parse_args()
    if given.device == "cuda":
        import torch

        if not torch.cuda.is_available():
            print("no GPU: nothing measured", file=sys.stderr)
            return 77
    chosen = plan(given.device, quick=given.quick, dry=given.dry_run)
    chosen = dataclasses.replace(
        chosen,
        rounds=given.rounds or chosen.rounds,
        layers=tuple(r for r in chosen.layers if not given.models_only and wanted(r[0].name, r[2], given)),
        models=tuple(r for r in chosen.models if not given.layers_only and wanted(r[0].name, r[1], given)),
        without=tuple(given.without),
    )
    before = json.loads(given.json.read_text(encoding="utf-8"))["rows"] if given.add and given.json.exists() else []
    result: Result | None = None
    for found in compare(chosen, lambda line: print(line, file=sys.stderr, flush=True)):
        result = dataclasses.replace(found, rows=[*others(before, found.rows), *found.rows])
        write_json(given.json, {"quick": given.quick, "dry_run": given.dry_run, **result.as_json()})
    assert result is not None
    show(result, screen())
    if further := result.extrapolated():
        head = ["extrapolated, nobody ran it", "layers", "T", "contender", "policy", "ms a step", "tokens/s"]
        keys = ("shape", "layers", "tokens", "contender", "policy", "extrapolated_ms", "extrapolated_tokens_per_s")
        print("\n" + table(head, [[row[key] for key in keys] for row in further]))
    if given.plot:
        given.plot.write_text(plot(result), encoding="utf-8")
    if not result.right:
        print("ours is wrong", file=sys.stderr)
    return 0 if result.right else 1


def wanted(shape: str, dtype: str, given: argparse.Namespace) -> bool:
    return shape in (given.shapes or [shape]) and dtype in (given.dtypes or [dtype])


def others(rows: list[dict[str, Any]], new: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows of races that are not run again."""
    return [row for name, rows_of in races(rows).items() if name not in races(new) for row in rows_of]


if __name__ == "__main__":
    raise SystemExit(main())
