"""The arguments of `bench`."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from ropewalk.verbs import Verbs, add_verb, json_argument


def add_verbs(verbs: Verbs) -> None:
    """`bench moe`."""
    group = add_verb(verbs, "bench", "how fast this machine does what Ropewalk is for", "ropewalk bench moe")
    moe = add_verb(
        group.add_subparsers(metavar="VERB"),
        "moe",
        "LoRA of a mixture of experts forward and backward, beside transformers with PEFT and what else is installed: "
        "exactness first, then time and memory",
        "ropewalk bench moe --plot moe.svg",
        _moe,
    )
    moe.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="(default: a GPU if there is one)")
    moe.add_argument("--quick", action="store_true", help="one layer only, in half a minute")
    moe.add_argument("--plot", type=Path, default=Path("bench-moe.svg"), metavar="FILE", help="(default: %(default)s)")
    json_argument(moe)


def _moe(arguments: argparse.Namespace) -> int:
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    from ropewalk.bench.moe import compare, races_of, shown
    from ropewalk.bench.report import plot, screen, show
    from ropewalk.errors import BadInput, OutputError, RopewalkError

    device = arguments.device
    if device != "cpu":
        import torch

        if device == "cuda" and not torch.cuda.is_available():
            raise BadInput("--device cuda finds no GPU that torch can use; leave it out to measure on the CPU")
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if not arguments.plot.parent.is_dir():
        raise OutputError(f"--plot {arguments.plot}: there is no folder {arguments.plot.parent}; make it, or name another")
    plan = shown(device, quick=arguments.quick)
    result = None
    columns = (BarColumn(24), TextColumn("{task.description}"), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("", total=races_of(plan))
        for found in compare(plan, lambda line: progress.update(task, description=line)):
            result = found
            progress.advance(task)
    assert result is not None
    arguments.plot.write_text(plot(result), encoding="utf-8")
    if arguments.json:
        print(json.dumps(result.as_json() | {"plot": str(arguments.plot)}, indent=1))
    else:
        console = screen()
        show(result, console)
        console.print(f"the plot is {arguments.plot}")
    if not result.right:
        print(json.dumps(result.errors), file=sys.stderr)
        raise RopewalkError(
            "what was computed differs from the plain layer by more than it may; please report it with this output"
        )
    return 0
