"""`ropewalk train` itself, from the command to the adapter, on the device and, beside it, on the CPU.

    python benchmarks/gpu_train.py [--device cpu|cuda] [--quick] [--json FILE]

Short runs of tiny bases, each with what a GPU computes by other code than a CPU: samples packed into one row, windows shorter than a row, a
base in 4 bits, layers streamed, computed again and kept on the host, 8-bit AdamW. Both begin with the same weights and see the same rows.
Exits 1 where a run fails, where the losses of the first steps differ by more than BAND, or where they do not fall; 77 where --device cuda
finds no GPU. With --device cpu, or --quick, the first steps only.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from measure import machine, table, write_json
from ropewalk.quickstart import facts
from ropewalk.quickstart.run import BASE
from ropewalk.train.progress import read_events

STEPS, FEW = 24, 6
BAND = 0.1  # of one step's loss, near 6 at first: 16 bits round otherwise on every device
FALLS = 0.97  # the last loss beside the first, at most
LIMIT_S = 240.0
EVERYWHERE = """\
output_dir: {out}
datasets:
  - path: {rows}
    type: chat_template
adapter: lora
lora_r: 8
lora_alpha: 16
sequence_len: 512
micro_batch_size: 2
learning_rate: 5e-3
logging_steps: 1
bf16: true
seed: 7
max_steps: {steps}
"""
WINDOWED = {"base_model": "windowed", "overrides_of_model_config": {"sliding_window": 48}}
CASES: dict[str, dict[str, Any]] = {
    "4 bits, packed": {"base_model": str(BASE), "sample_packing": True, "load_in_4bit": True},
    "windows, packed": {**WINDOWED, "sample_packing": True},
    "windows, streamed, on the host, 8-bit AdamW": {
        **WINDOWED, "stream_weights": "layers", "gradient_checkpointing": "offload", "optimizer": "adamw_8bit", "load_in_4bit": True,
    },
}  # fmt: skip


@dataclass(frozen=True)
class Row:
    """One run beside the same on the CPU."""

    case: str
    device: str
    first_loss: float | None = None
    last_loss: float | None = None
    apart: float | None = None  # the largest difference of one step's losses; None: there is no other
    seconds: float | None = None
    note: str = ""

    @property
    def passed(self) -> bool:
        if self.note or self.first_loss is None or self.last_loss is None:
            return False
        return self.last_loss <= FALLS * self.first_loss and (self.apart is None or self.apart <= BAND)


class Training:
    """A run in a process of its own."""

    def __init__(self, folder: Path, case: str, device: str, steps: int) -> None:
        self.out = folder / f"{device}-{case.replace(' ', '-')}"
        file = self.out.with_suffix(".yml")
        keys = {key: str(folder / value) if value == "windowed" else value for key, value in CASES[case].items()}
        lines = [f"{key}: {json.dumps(value)}\n" for key, value in keys.items()]
        told = EVERYWHERE.format(out=self.out, rows=folder / "rows.jsonl", steps=steps)
        file.write_text(told + "".join(lines), encoding="utf-8")
        self.began = time.monotonic()
        self.log = self.out.with_suffix(".log").open("w+", encoding="utf-8")
        hidden = {"CUDA_VISIBLE_DEVICES": ""} if device == "cpu" else {}
        environment = os.environ | hidden | {"ROPEWALK_HOME": str(folder / "home")}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "ropewalk", "train", str(file)], env=environment, stdout=self.log, stderr=subprocess.STDOUT
        )

    def losses(self) -> list[float]:
        """Of every step, once it has ended; raises what it said where it failed."""
        try:
            code = self.process.wait(LIMIT_S)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
            raise RuntimeError(f"took more than {LIMIT_S:.0f} s") from None
        finally:
            self.seconds = time.monotonic() - self.began
        self.log.seek(0)
        said = self.log.read()
        self.log.close()
        if code:
            print(said[-6000:], file=sys.stderr)
            raise RuntimeError(f"ended with {code}: {said.strip().splitlines()[-1] if said.strip() else ''}"[:300])
        return [event["loss"] for event in read_events(self.out / "events.jsonl") if event["event"] == "step"]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--quick", action="store_true", help="the first steps")
    parser.add_argument("--json", type=Path, metavar="FILE")
    given = parser.parse_args()
    if given.device == "cuda":
        import torch

        if not torch.cuda.is_available():
            print("no GPU: nothing measured", file=sys.stderr)
            return 77
    steps = FEW if given.quick or given.device == "cpu" else STEPS
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        prepare(folder)
        others = {case: Training(folder, case, "cpu", FEW) for case in CASES} if given.device == "cuda" else {}
        for case in CASES:
            rows.append(row := run(folder, case, given.device, steps, others.get(case)))
            print(f"{row.case}: {row.first_loss} to {row.last_loss}, apart {row.apart}, {row.seconds} s {row.note}", flush=True)
            failed = [asdict(row) for row in rows if not row.passed]
            write_json(
                given.json, {"machine": machine(), "band": BAND, "failed": failed, "rows": [asdict(row) for row in rows]}
            )
    head = ["run", "first loss", "last", "apart from the CPU", "s", ""]
    print(table(head, [[r.case, r.first_loss, r.last_loss, r.apart, r.seconds, r.note] for r in rows]))
    return 0 if all(row.passed for row in rows) else 1


def prepare(folder: Path) -> None:
    """Rows of chat, and a base whose layers see a window."""
    trained_on, _ = facts.split()
    facts.write_rows(facts.questions(trained_on, len(facts.KINDS)), folder / "rows.jsonl", turns=3)
    command = [sys.executable, "-m", "ropewalk", "base", "make", str(folder / "windowed"), "--arch", "gemma4"]
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", "ROPEWALK_HOME": str(folder / "home")}
    subprocess.run(command, env=environment, check=True, stdout=subprocess.DEVNULL)


def run(folder: Path, case: str, device: str, steps: int, other: Training | None) -> Row:
    """One run, held beside the CPU's."""
    mine = Training(folder, case, device, steps)
    try:
        losses = mine.losses()
        beside = other.losses() if other else []
    except RuntimeError as error:
        return Row(case, device, note=str(error))
    apart = max((abs(a - b) for a, b in zip(losses, beside)), default=None)
    return Row(case, device, losses[0], min(losses[-3:]), apart, round(mine.seconds, 1))


if __name__ == "__main__":
    sys.exit(main())
