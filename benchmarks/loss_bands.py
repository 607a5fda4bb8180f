"""The quickstart's loss curve under everything that saves memory, beside the plain one: equal to the bit, or within a band.

    python benchmarks/loss_bands.py [--quick] [--json FILE] [--rows "NAME;NAME"] [--steps N]

The job is the quickstart's own: its base (a mixture of 8 experts), its questions, LoRA of rank 16 on attention and experts, 160 steps,
every step with the same rows in every run. Plain is bfloat16. Kept to the bit are what only moves memory about: what is computed again,
weights streamed from the host, a step taken during the backward pass. A band holds what rounds otherwise: the base in few bits, moments in
8, factors in 16. On a GPU, where kernels may add up in another order each time, what is kept to the bit on a CPU is held to a narrow band,
and whether the bits are equal is told. A curve is smoothed over 10 steps; a run with another seed shows how far apart two plain ones end.
Exits 1 where a curve leaves its band or bits differ.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import sys
import tempfile
import time
import warnings
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from measure import machine, table, write_json

SMOOTH = 10  # steps
PLAIN, UNCLIPPED, CHANCE = "bf16 plain", "bf16 plain, not clipped", "bf16 plain, another seed"


@dataclass(frozen=True)
class Row:
    """A run: what is laid over the plain configuration, and what it is held beside."""

    name: str
    keys: dict[str, Any] = field(default_factory=dict)
    beside: str | None = PLAIN
    band: float | None = None  # of the smoothed curve; None: equal to the bit
    quick: bool = True


FOUR_BITS, EIGHT_BITS, SIXTEEN = 0.1, 0.05, 0.05
CHANCE_ON_GPU = 0.02
UNIT = {"max_grad_norm": 0}
NF4, INT4 = {"load_in_4bit": True}, {"load_in_4bit": True, "bnb_4bit_quant_type": "int4"}
ROWS = (
    Row(PLAIN, beside=None),
    Row("NF4", NF4, band=FOUR_BITS),
    Row("int4", INT4, band=FOUR_BITS),
    Row("int8", {"load_in_8bit": True}, band=EIGHT_BITS),
    Row("8-bit Adam", {"optimizer": "adamw_8bit"}, band=EIGHT_BITS),
    Row("experts computed again", {"gradient_checkpointing": "experts"}),
    Row("layers computed again", {"gradient_checkpointing": True}),
    Row("layers computed again, inputs on the host", {"gradient_checkpointing": "offload"}, quick=False),
    Row("experts streamed", {"stream_weights": "experts"}),
    Row("layers streamed", {"stream_weights": "layers"}, quick=False),
    Row("NF4, layers streamed and computed again", {**NF4, "stream_weights": "layers", "gradient_checkpointing": True}, "NF4"),
    Row(UNCLIPPED, UNIT, beside=None),
    Row("step in backward", {**UNIT, "step_in_backward": True}, UNCLIPPED),
    Row("the leanest: NF4, layers streamed and computed again, 8-bit Adam, 16-bit factors, step in backward",
        {**NF4, **UNIT, "stream_weights": "layers", "gradient_checkpointing": True, "optimizer": "adamw_8bit",
         "peft_autocast_adapter_dtype": False, "step_in_backward": True}, UNCLIPPED, band=FOUR_BITS, quick=False),
    Row("float32", {"bf16": False}, band=SIXTEEN),
    Row(CHANCE, {"seed": 8}, beside=None, quick=False),
    Row("16-bit factors, 8-bit Adam, stochastic rounding", {"optimizer": "adamw_8bit", "peft_autocast_adapter_dtype": False},
        band=SIXTEEN, quick=False),
    Row("16-bit factors, 8-bit Adam, float32 master",
        {"optimizer": "adamw_8bit", "peft_autocast_adapter_dtype": False, "float32_master": True}, band=SIXTEEN, quick=False),
    Row("step in backward, 8-bit Adam", {**UNIT, "step_in_backward": True, "optimizer": "adamw_8bit"}, UNCLIPPED, band=EIGHT_BITS,
        quick=False),
    Row("the same again", quick=False),
)  # fmt: skip


@dataclass(frozen=True)
class Curve:
    """What a run left behind."""

    losses: tuple[float, ...]
    evaluation: float  # the loss of questions about countries that were held out
    adapter: bytes
    cpu_s: float


@dataclass(frozen=True)
class Beside:
    """A run beside the one that it is held to."""

    name: str
    beside: str | None
    last: float  # loss of the last ten steps
    evaluation: float
    cpu_s: float
    identical: bool | None
    largest: float | None  # difference of one step's losses
    smoothed: float | None
    band: float | None
    passed: bool


class Job:
    """The quickstart's training, with keys laid over it."""

    def __init__(self, folder: Path, steps: int) -> None:
        from ropewalk.quickstart import facts
        from ropewalk.quickstart.run import BASE, YAML

        trained_on, held_out = facts.split()
        self.folder, self.steps = folder, steps
        facts.write_rows(facts.questions(trained_on, len(facts.KINDS)), folder / "train.jsonl", turns=3)
        facts.write_rows(facts.questions(held_out, 2), folder / "held-out.jsonl")
        self.config = folder / "train.yml"
        filled = YAML.format(
            path=self.config,
            base=BASE,
            file=folder / "train.jsonl",
            filename="train.jsonl",
            out=folder / "run",
            steps=steps,
            saves=steps,
        )
        held = f"test_datasets:\n  - path: {folder / 'held-out.jsonl'}\n    type: chat_template\n"
        self.config.write_text(filled.replace("bf16: false", "bf16: true") + held, encoding="utf-8")

    def run(self, keys: dict[str, Any]) -> Curve:
        """One training from the beginning."""
        from ropewalk.config.run import load_run
        from ropewalk.train.progress import read_events
        from ropewalk.train.trainer import train

        shutil.rmtree(self.folder / "run", ignore_errors=True)
        began = time.process_time()
        given = {"eval_steps": self.steps, "num_threads": 1, **keys}
        result = train(load_run(self.config, [f"{key}={str(value).lower()}" for key, value in given.items()]), quiet=True)
        losses = tuple(event["loss"] for event in read_events(result.folder / "events.jsonl") if event["event"] == "step")
        assert result.evaluation_loss is not None
        adapter = (result.adapter / "adapter_model.safetensors").read_bytes()
        return Curve(losses, result.evaluation_loss, adapter, time.process_time() - began)


def smooth(losses: tuple[float, ...]) -> list[float]:
    """Means over so many steps, of every stretch."""
    width = min(SMOOTH, len(losses))
    return [statistics.fmean(losses[end - width : end]) for end in range(width, len(losses) + 1)]


def compare(row: Row, curve: Curve, other: Curve | None) -> Beside:
    """The run's curve beside the other, judged."""
    last = statistics.fmean(curve.losses[-SMOOTH:])
    finite = all(loss == loss and abs(loss) < 1e9 for loss in curve.losses)
    if other is None:
        return Beside(row.name, None, last, curve.evaluation, curve.cpu_s, None, None, None, None, finite)
    identical = curve.losses == other.losses and curve.adapter == other.adapter
    largest = max(abs(a - b) for a, b in zip(curve.losses, other.losses, strict=True))
    smoothed = max(abs(a - b) for a, b in zip(smooth(curve.losses), smooth(other.losses), strict=True))
    passed = finite and (identical if row.band is None else smoothed <= row.band)
    return Beside(
        row.name, row.beside, last, curve.evaluation, curve.cpu_s, identical, largest, smoothed, row.band, passed
    )  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="20 steps, and some of the rows")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the result here")
    parser.add_argument("--rows", help="these rows alone, separated by ;, and those that they are held beside")
    parser.add_argument("--steps", type=int, help="how many (default: 160, with --quick 20)")
    arguments = parser.parse_args()
    wanted = arguments.rows.split(";") if arguments.rows else [row.name for row in ROWS if row.quick or not arguments.quick]
    named = {row.name: row for row in ROWS}
    if unknown := [name for name in wanted if name not in named]:
        parser.error(f"unknown rows {unknown}; there are {list(named)}")
    wanted += [beside for name in wanted if (beside := named[name].beside) and beside not in wanted]
    warnings.simplefilter("ignore")
    begun, on_gpu = machine(), torch.cuda.is_available()
    steps = arguments.steps or (20 if arguments.quick else 160)
    curves: dict[str, Curve] = {}
    found: list[Beside] = []
    with tempfile.TemporaryDirectory() as folder:
        job = Job(Path(folder), steps)
        for row in (row for row in ROWS if row.name in wanted):
            curves[row.name] = curve = job.run(row.keys)
            held = replace(row, band=CHANCE_ON_GPU) if on_gpu and row.band is None else row
            found.append(compare(held, curve, curves[row.beside] if row.beside else None))
            write_json(arguments.json, told_of(found, curves, begun, steps, arguments.quick))
            done = found[-1]
            told = (
                ""
                if done.largest is None
                else f"  differs by {done.largest:.4f}, smoothed {done.smoothed:.4f}, band {done.band}"
            )
            print(f"{row.name}: {done.last:.4f}, {done.cpu_s:.0f} CPU s{told}{'' if done.passed else '  FAILED'}", flush=True)
    print(report(found))
    failed = [row.name for row in found if not row.passed]
    if failed:
        print(f"out of its band, or not equal to the bit: {', '.join(failed)}", file=sys.stderr)
    return int(bool(failed))


def told_of(found: list[Beside], curves: dict[str, Curve], begun: dict[str, Any], steps: int, quick: bool) -> dict[str, Any]:
    """The result as JSON, of the runs there are."""
    keys = {row.name: row.keys for row in ROWS}
    rows = [{**asdict(row), "keys": keys[row.name], "losses": curves[row.name].losses} for row in found]
    return {"benchmark": "loss_bands", "quick": quick, "machine": begun, "steps": steps, "smoothed_over": SMOOTH, "rows": rows}


def report(found: list[Beside]) -> str:
    head = ["run", "beside", "last ten", "held out", "largest step", "smoothed", "held to", "holds"]
    rows = []
    for row in found:
        held = None if row.beside is None else "the bit" if row.band is None else f"{row.band:g}"
        numbers = (None, None) if row.largest is None or row.smoothed is None else (f"{row.largest:.4f}", f"{row.smoothed:.4f}")
        rows.append([row.name, row.beside, f"{row.last:.4f}", f"{row.evaluation:.4f}", *numbers, held, row.passed])
    return table(head, rows)


if __name__ == "__main__":
    sys.exit(main())
