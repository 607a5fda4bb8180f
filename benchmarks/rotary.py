"""Rotary positions as a model under training turns them beside transformers' own function: bits, time, memory.

    python benchmarks/rotary.py [--device cpu|cuda] [--quick] [--json FILE]

Queries and keys of one layer, forward and backward, in the forms of several architectures: CPU milliseconds of one thread, or on a GPU
those between events, the best of several in turns, and the median of what theirs takes over ours; what waits for the backward pass and the most at
any moment, beyond the gradient that came. Exits 1 where a result or a gradient is further from float64 than theirs; 77 where --device
cuda finds no GPU.
"""

from __future__ import annotations

import argparse
import importlib
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from measure import machine, table, write_json
from ropewalk.bench.cost import memory, milliseconds
from ropewalk.models.rotary import Lean

FORMS = {  # heads, heads of keys, D, and how many cosines a token has
    ("llama", "apply_rotary_pos_emb"): (32, 8, 128, 128),
    ("qwen3_5_moe", "apply_rotary_pos_emb"): (16, 2, 256, 64),
    ("gpt_oss", "apply_rotary_pos_emb"): (64, 8, 64, 32),
    ("glm4", "apply_rotary_pos_emb"): (32, 2, 128, 64),
    ("cohere", "apply_rotary_pos_emb"): (32, 8, 128, 128),
    ("deepseek_v3", "apply_rotary_pos_emb_interleave"): (32, 1, 64, 64),
}
DTYPES = (torch.float32, torch.bfloat16)
WARM, TURNS = 1, 7


class Turned:
    """Queries, keys, their positions and their gradients, and who turns them."""

    def __init__(self, form: tuple[str, str], tokens: int, device: torch.device) -> None:
        kind, name = form
        heads, fewer, size, angles = FORMS[form]
        self.own = getattr(importlib.import_module(f"transformers.models.{kind}.modeling_{kind}"), name)
        lean = Lean.of(self.own)
        assert lean is not None, f"{kind}: of no known form"
        self.lean: Callable[..., Any] = lean
        self.name, self.device = f"{kind}, {heads} + {fewer} heads of {size}, {tokens} tokens", device
        draw = torch.Generator().manual_seed(0)
        made = [torch.randn(1, tokens, n, size, generator=draw).to(device) for n in (heads, fewer, heads, fewer)]
        self._given, self._ups = made[:2], made[2:]
        self._angles = torch.randn(1, tokens, angles, generator=draw).to(device)

    def ready(
        self, function: Callable[..., Any], dtype: torch.dtype
    ) -> tuple[Callable[[], Any], Callable[[Any], list[Tensor]]]:
        """What goes forward, and what of its result goes back."""
        leaves = [t.to(dtype, copy=True).transpose(1, 2).requires_grad_() for t in self._given]
        ups = [t.to(dtype, copy=True).transpose(1, 2) for t in self._ups]
        cos, sin = self._angles.cos().to(dtype), self._angles.sin().to(dtype)
        return lambda: function(*leaves, cos, sin), lambda out: list(torch.autograd.grad(out, leaves, ups))

    def answers(self, function: Callable[..., Any], dtype: torch.dtype) -> list[Tensor]:
        """Results and gradients."""
        forward, backward = self.ready(function, dtype)
        out = forward()
        return [*(t.detach() for t in out), *backward(out)]

    def cost(self, dtype: torch.dtype) -> dict[str, dict[str, float]]:
        """Of both, in turns."""
        works = {name: self.ready(f, dtype) for name, f in (("transformers", self.own), ("ropewalk", self.lean))}
        spent: dict[str, list[float]] = {name: [] for name in works}
        for turn in range(WARM + TURNS):
            for name, (forward, backward) in works.items():
                took = milliseconds(lambda f=forward, b=backward: b(f()), self.device.type)
                spent[name] += [took] * (turn >= WARM)
        found = {name: {"ms": min(times)} for name, times in spent.items()}
        for name, (forward, backward) in works.items():
            kept = memory(forward, backward, self.device.type)
            found[name] |= {"held_mb": kept.held / 1e6, "peak_mb": kept.peak / 1e6}
        found["ropewalk"]["times_faster"] = statistics.median(a / b for a, b in zip(*spent.values()))
        return found


def furthest(found: list[Tensor], truth: list[Tensor]) -> float:
    """The largest difference, beside the largest value of its tensor."""
    return max(float((f.double() - t.double()).abs().max() / t.double().abs().max()) for f, t in zip(found, truth))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--quick", action="store_true", help="few tokens")
    parser.add_argument("--json", type=Path, metavar="FILE")
    given = parser.parse_args()
    if given.device == "cuda" and not torch.cuda.is_available():
        print("no GPU: nothing measured", file=sys.stderr)
        return 77
    torch.set_num_threads(1)
    tokens = 256 if given.quick else (1024 if given.device == "cpu" else 16384)
    rows: list[dict[str, Any]] = []
    for form in FORMS:
        turned = Turned(form, tokens, torch.device(given.device))
        truth = turned.answers(turned.own, torch.float64)
        for dtype in DTYPES:
            theirs, ours = (turned.answers(f, dtype) for f in (turned.own, turned.lean))
            errors = {"error": furthest(ours, truth), "their_error": furthest(theirs, truth)}
            same = all(map(torch.equal, ours, theirs))
            rows.append({"form": turned.name, "dtype": str(dtype)[6:], "same_bits": same, **errors, **turned.cost(dtype)})
    head = ["", "", "bits", "error", "ms, theirs", "ours", "times faster", "held MB, theirs", "ours", "peak MB, theirs", "ours"]
    print(table(head, [line(row) for row in rows]))
    failed = [row for row in rows if not row["error"] <= row["their_error"]]
    write_json(given.json, {"machine": machine(), "tokens": tokens, "failed": failed, "rows": rows})
    return int(bool(failed))


def line(row: dict[str, Any]) -> list[Any]:
    ours, theirs = row["ropewalk"], row["transformers"]
    pairs = [f"{side[what]:.1f}" for what in ("held_mb", "peak_mb") for side in (theirs, ours)]
    bits = "same" if row["same_bits"] else "others"
    times = [f"{theirs['ms']:.1f}", f"{ours['ms']:.1f}", f"{ours['times_faster']:.2f}"]
    return [row["form"], row["dtype"], bits, f"{row['error']:.1e}", *times, *pairs]


if __name__ == "__main__":
    sys.exit(main())
