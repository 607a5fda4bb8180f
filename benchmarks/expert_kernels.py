"""Each Triton kernel of an expert layer beside float32 and beside what torch does without it; then the whole layer.

    python benchmarks/expert_kernels.py [--device cpu|cuda] [--quick] [--json FILE]

Error is the norm of the difference beside the norm of the twin's in float32 (float64 on a CPU). A kernel may err no more than the plain
path in the same dtype errs, but for a tenth that is chance. Shapes that fill no block, and on a GPU one whose rows lie beyond the reach of
32 bits, are among them. On a CPU everything runs at tiny sizes in Triton's interpreter, in float32 and without times.
On a GPU: milliseconds of the kernel and of torch's own products, the median of ten between events, and how products of other tilings fare.
Exits 1 if a kernel errs more; 77 where --device cuda finds no GPU or there is no Triton. A kernel that does not compile is a failed row.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import statistics
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

if "cuda" not in sys.argv:
    os.environ["TRITON_INTERPRET"] = "1"  # read when Triton is imported

import torch
from torch import Tensor

from measure import machine, table, write_json
from ropewalk.kernels.expert_lora import Experts, Factors, expert_lora, expert_lora_plain
from ropewalk.kernels.expert_rows import Combine, Grouped, route
from ropewalk.kernels.gates import ClampedGlu, Gate, Glu
from ropewalk.kernels.quant import Int4, Int8, Nf4

RANK = 16
CHANCE = 1.1  # times the plain path's own error
RANDOM = torch.Generator().manual_seed(0)


ALONE = ("dequantised", "layer", "combine")  # what torch does without grouped products


@dataclass(frozen=True)
class Shape:
    """One model's expert layer."""

    name: str
    experts: int
    hidden: int
    inner: int
    k: int
    gate: Gate
    bias: bool = False
    rank: int = RANK

    @property
    def aligned(self) -> bool:
        """Whether torch's grouped products take it: rows of whole 16 bytes, in 16 bits too."""
        return not (self.hidden % 8 or self.inner % 8)


TINY = (Shape("tiny", 6, 40, 24, 2, Glu()), Shape("tiny, gpt-oss", 6, 40, 24, 2, ClampedGlu(7.0, 1.702, 1.0, True), True))
ODD = Shape("odd", 7, 1004, 300, 3, Glu(), rank=12)  # no width, rank or number of experts fills anything
TINY_ODD = Shape("tiny, odd", 5, 37, 21, 2, Glu(), rank=3)
# 2^18 tokens to 8 experts: 2^21 rows of 2,048 columns are 2^32 numbers
FAR = Shape("2^32 numbers", 8, 64, 1024, 8, Glu())
NEAR = Shape("few numbers", 4, 16, 8, 4, Glu(), rank=4)  # the same where there is no GPU
FAR_TOKENS, FAR_SEEN = 2**18, 64
TRUE = (
    Shape("Qwen3-30B-A3B", 128, 2048, 768, 8, Glu()),
    Shape("Gemma-4-26B-A4B", 128, 2816, 704, 8, Glu("gelu_tanh")),
    Shape("gpt-oss-20b", 32, 2880, 2880, 4, ClampedGlu(7.0, 1.702, 1.0, True), True),
)


@dataclass(frozen=True)
class Row:
    """One kernel at one shape: how far it is from its twin, how far the plain path is, and what both cost."""

    case: str
    kernel: str
    error: float
    plain_error: float
    ms: float | None = None
    torch_ms: float | None = None
    teraflops: float | None = None
    held_mb: float | None = None
    torch_held_mb: float | None = None
    note: str = ""

    @property
    def passed(self) -> bool:
        return self.error <= max(CHANCE * self.plain_error, 2e-6)  # false for a NaN


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--quick", action="store_true", help="one model and 4096 tokens")
    parser.add_argument("--json", type=Path, metavar="FILE")
    given = parser.parse_args()
    if importlib.util.find_spec("triton") is None:
        print("no Triton: nothing measured", file=sys.stderr)
        return 77
    if given.device == "cuda" and not torch.cuda.is_available():
        print("no GPU: nothing measured", file=sys.stderr)
        return 77
    torch.backends.cuda.matmul.allow_tf32 = False  # truth is float32
    rows: list[Row] = []
    for shape, tokens, skewed in cases(given.device, given.quick):
        for row in Case(shape, tokens, skewed, given.device).rows():
            rows.append(row)
            print(f"{row.case:<44} {row.kernel:<22} {'' if row.passed else 'TOO FAR'} {figures(row)}", flush=True)
        if given.device == "cuda":
            torch.cuda.empty_cache()
    rows.append(row := far("cuda", FAR, FAR_TOKENS) if given.device == "cuda" else far("cpu", NEAR, 80))
    print(f"{row.case:<44} {row.kernel:<22} {'' if row.passed else 'TOO FAR'} {figures(row)}", flush=True)
    head = ["", "kernel", "error", "plain", "ms", "torch ms", "ratio", "TFLOP/s", "held MB", "torch", ""]
    print("\n" + table(head, [[row.case, row.kernel, *figures(row)] for row in rows]))
    failed = [asdict(row) for row in rows if not row.passed]
    device = torch.cuda.get_device_name() if given.device == "cuda" else "cpu, interpreted"
    write_json(given.json, {"machine": machine() | {"device": device}, "failed": failed, "rows": [asdict(row) for row in rows]})
    return 1 if failed else 0


def cases(device: str, quick: bool) -> Iterator[tuple[Shape, int, bool]]:
    if device == "cpu":
        yield from ((shape, 12, skewed) for shape in TINY[: 1 if quick else 2] for skewed in (False, True))
        yield TINY_ODD, 13, True
        return
    yield from ((ODD, 1001, skewed) for skewed in (False, True))
    for shape in TRUE[:1] if quick else TRUE:
        for tokens in (4096,) if quick else (1, 4096, 16384):
            for skewed in (False, True) if tokens > 1 else (False,):
                yield shape, tokens, skewed


class Case:
    """Random operands of one layer, in the dtype that is trained in, and how each kernel is called with them."""

    def __init__(self, shape: Shape, tokens: int, skewed: bool, device: str) -> None:
        self.shape, self.tokens, self.device = shape, tokens, torch.device(device)
        self.dtype, self.truth = (torch.float32, torch.float64) if device == "cpu" else (torch.bfloat16, torch.float32)
        self.name = f"{shape.name}, {tokens} tokens{', skewed' * skewed}"
        e, h, i = shape.experts, shape.hidden, shape.inner
        self.x, self.d_out = self.normal(tokens, h), self.normal(tokens, h)
        self.up, self.down = self.normal(e, 2 * i, h) * h**-0.5, self.normal(e, h, i) * i**-0.5
        r = shape.rank
        self.a1, self.b1 = self.normal(e, r, h) * h**-0.5, self.normal(e, 2 * i, r) * 0.1
        self.a2, self.b2 = self.normal(e, r, i) * i**-0.5, self.normal(e, h, r) * 0.1
        self.biases = (self.normal(e, 2 * i), self.normal(e, h)) if shape.bias else (None, None)
        # skewed: one expert has every token, a quarter of the others none
        likely = torch.rand(tokens, e, generator=RANDOM)
        if skewed:
            likely[:, 0] = 2
            likely[:, 1 : 1 + e // 4] = -1
        self.ids = likely.topk(shape.k, dim=1).indices.to(self.device)
        self.weights = torch.rand(tokens, shape.k, generator=RANDOM).to(self.device, self.dtype)
        self.slots = tokens * shape.k

    def normal(self, *size: int) -> Tensor:
        return torch.randn(*size, generator=RANDOM).to(self.device, self.dtype)

    def rows(self) -> Iterator[Row]:
        for part in (
            self.routing,
            self.products,
            self.gates,
            self.combining,
            self.grams,
            self.stored,
            self.layer,
            self.tilings,
        ):
            try:
                yield from part()
            except Exception as error:  # the next kernel may be right
                if isinstance(error, torch.AcceleratorError):
                    raise
                yield Row(self.name, part.__name__, float("inf"), 0, note=f"{type(error).__name__}: {error}"[:300])

    def routing(self) -> Iterator[Row]:
        from ropewalk.kernels.expert_gemm import rows_for
        from ropewalk.kernels.expert_routing import cut, route_sorted, route_sorted_plain

        experts = self.shape.experts
        self.way = route_sorted(self.ids, self.weights, experts)
        plain = route_sorted_plain(self.ids, self.weights, experts)
        same = all(torch.equal(getattr(self.way, n), getattr(plain, n)) for n in ("token", "weight", "order", "place", "ends"))
        self.tiles = cut(self.way.ends, self.slots, rows_for(self.slots, experts, self.dtype))
        self.grouped = Grouped(self.way.ends, self.slots)
        ms = self.time(lambda: cut(route_sorted(self.ids, self.weights, experts).ends, self.slots, 128))
        other = self.time(lambda: route(self.ids, self.weights, experts, self.dtype, True))
        yield Row(self.name, "route", 0.0 if same else float("inf"), 0.0, ms, other)

    def products(self) -> Iterator[Row]:
        from ropewalk.kernels.expert_gemm import Lora, expert_gemm, expert_gemm_plain

        way, token = self.way, self.way.token
        turned = [f.transpose(1, 2) for f in (self.a1, self.b1, self.a2, self.b2)]
        a1, b1, a2, b2 = turned
        i = self.shape.inner
        self.xa, self.h_rows = self.normal(self.slots, self.shape.rank), self.normal(self.slots, i)
        self.gate_up, self.dh = self.normal(self.slots, 2 * i), self.normal(self.slots, i)
        kinds: dict[str, tuple[Tensor, Tensor, Any, dict[str, Any]]] = {
            "X A1": (self.x, a1, None, {"token": token}),
            "up": (self.x, self.up.transpose(1, 2), b1, {"token": token, "bias": self.biases[0]}),
            "down": (self.h_rows, self.down.transpose(1, 2), b2, {"bias": self.biases[1], "weight": way.weight}),
            "dh": (self.d_out, self.down, a2.transpose(1, 2), {"token": token}),
            "dx": (self.gate_up, self.up, a1.transpose(1, 2), {}),
        }
        for name, (x, w, b, how) in kinds.items():
            lora = None if b is None else Lora(self.xa, b, 0.5)

            def plain(dtype: torch.dtype, x: Any = x, w: Any = w, lora: Any = lora, how: Any = how) -> list[Tensor]:
                into = None if lora is None else Lora(lora.xa.to(dtype), lora.b.to(dtype), lora.scale)
                cast = {n: t.to(dtype) if isinstance(t, Tensor) and t.is_floating_point() else t for n, t in how.items()}
                return [expert_gemm_plain(x.to(dtype), w.to(dtype), way.ends, self.slots, lora=into, **cast)]

            def ours(x: Any = x, w: Any = w, lora: Any = lora, how: Any = how) -> list[Tensor]:
                return [expert_gemm(x, w, self.tiles, self.slots, lora=lora, **how)]

            def torchs(x: Any = x, w: Any = w, lora: Any = lora, how: Any = how) -> None:
                rows = x if how.get("token") is None else x.index_select(0, token)
                y = self.grouped.mm(rows, w)
                if lora is not None:
                    self.grouped.mm_add_(y, lora.xa, lora.b, lora.scale)
                if how.get("bias") is not None:
                    self.grouped.bias_(y, how["bias"], way.weight[:, None] if "weight" in how else None)

            work = 2 * self.slots * w.shape[1] * w.shape[2]
            yield self.row(f"product {name}", ours, plain, torchs, work)

    def gates(self) -> Iterator[Row]:
        from ropewalk.kernels.expert_glu import expert_glu, expert_glu_backward, expert_glu_backward_plain, expert_glu_plain

        way, gate, gate_up, dh = self.way, self.shape.gate, self.gate_up, self.dh
        a2, b1 = self.a2.transpose(1, 2), self.b1.transpose(1, 2)
        w = way.weight[:, None]

        def d_weight(dtype: torch.dtype) -> Tensor:
            return torch.zeros(self.slots, dtype=dtype, device=self.device)

        def backward() -> list[Tensor]:
            found = d_weight(torch.float32)
            return [*expert_glu_backward(gate_up, dh.clone(), way.weight, gate, self.tiles, b1, found), found]

        def backward_plain(dtype: torch.dtype) -> list[Tensor]:
            found = d_weight(dtype)
            given = (gate_up.to(dtype), dh.to(dtype), way.weight.to(dtype), gate, way.ends, None)
            h, d_gate_up, _ = expert_glu_backward_plain(*given, found)
            return [h, d_gate_up, loop(d_gate_up, b1.transpose(1, 2).to(dtype), way.ends), found]

        def forward_plain(dtype: torch.dtype) -> list[Tensor]:
            h = expert_glu_plain(gate_up.to(dtype), way.weight.to(dtype), gate, way.ends, None)[0]
            return [h, loop(h, a2.to(dtype), way.ends)]

        def torchs_forward() -> None:
            self.grouped.mm(gate.forward(gate_up).mul_(w), a2)

        def torchs_backward() -> None:
            own = dh.clone()
            h, kept = gate.again(gate_up)
            (own * h).sum(-1, dtype=torch.float32)
            h.mul_(w)
            d, _ = gate.backward(gate_up, own.mul_(w), kept)
            self.grouped.mm(d, self.b1)

        yield self.row(
            "gate", lambda: list(expert_glu(gate_up, way.weight, gate, self.tiles, a2)), forward_plain, torchs_forward
        )
        # both are timed with the copy of dh that they overwrite
        yield self.row("gate backward", backward, backward_plain, torchs_backward)

    def combining(self) -> Iterator[Row]:
        from ropewalk.kernels.expert_combine import combine, combine_plain

        y, way, k = self.normal(self.slots, self.shape.hidden), self.way, self.shape.k
        sorted_way = route(self.ids, self.weights, self.shape.experts, self.dtype, True)

        def torchs() -> None:
            total = Combine(sorted_way, self.x)
            total.add(self.grouped, y)
            total.result()

        ours = lambda: [combine(y, way.place, way.ends, k)]
        yield self.row("combine", ours, lambda dtype: [combine_plain(y.to(dtype), way.place, way.ends, k)], torchs)

    def grams(self) -> Iterator[Row]:
        from ropewalk.kernels.expert_gram import expert_gram, expert_gram_plain

        way, narrow = self.way, self.xa
        for name, wide, turned, token in (
            ("dA1", self.x, False, way.token),
            ("dB1", self.gate_up, True, None),
            ("dA2", self.h_rows, False, None),
            ("dB2", self.d_out, True, way.token),
        ):
            how = {"turned": turned, "token": token}
            factor = torch.zeros(self.shape.experts, wide.shape[1], self.shape.rank, dtype=self.dtype, device=self.device)

            def torchs(wide: Any = wide, token: Any = token, factor: Any = factor) -> None:
                self.grouped.gram_(factor, wide if token is None else wide.index_select(0, token), narrow, 0.5)

            def ours(wide: Any = wide, how: Any = how) -> list[Tensor]:
                return [expert_gram(narrow, wide, way.ends, 0.5, **how)]

            def plain(dtype: torch.dtype, wide: Any = wide, how: Any = how) -> list[Tensor]:
                made = expert_gram_plain(narrow, wide, way.ends, 0.5, **how)  # in float32
                return [made.to(dtype)]

            yield self.row(f"gram {name}", ours, plain, torchs, 2 * self.slots * self.shape.rank * wide.shape[1])

    def stored(self) -> Iterator[Row]:
        from ropewalk.kernels.dequantised import dequantised
        from ropewalk.kernels.expert_scratch import experts_at_once

        count = self.shape.experts
        for kind in (Nf4, Int4, Int8):
            kept: Any = kind.of(self.up)
            step = experts_at_once(kept.shape, self.dtype)
            out = self.up.new_empty(step, *self.up.shape[1:])

            def ours(kept: Any = kept, step: int = step, out: Any = out) -> list[Tensor]:
                last = (count - 1) // step * step
                for first in range(0, count, step):
                    dequantised(kept, first, min(step, count - first), out)
                return [out[: count - last]]

            def plain(dtype: torch.dtype, kept: Any = kept, step: int = step) -> list[Tensor]:
                return [kept.dequantize(dtype)[(count - 1) // step * step :]]

            yield self.row(f"dequantised {kind.__name__}", ours, plain, lambda kept=kept: kept.dequantize(self.dtype))

    def layer(self) -> Iterator[Row]:
        trained = [self.x, self.weights, self.a1, self.b1, self.a2, self.b2]

        def gradients(function: Callable[..., Tensor], dtype: torch.dtype, **how: Any) -> list[Tensor]:
            x, weights, a1, b1, a2, b2 = own = [t.detach().to(dtype).requires_grad_() for t in trained]
            biases = [None if t is None else t.to(dtype) for t in self.biases]
            experts = Experts(self.up.to(dtype), self.down.to(dtype), self.shape.gate, *biases)
            out = function(x, self.ids, weights, experts, Factors(a1, b1, 0.5), Factors(a2, b2, 0.5), **how)
            self.held = max(self.held, torch.cuda.memory_allocated()) if self.device.type == "cuda" else 0
            return [out.detach(), *torch.autograd.grad(out, own, self.d_out.to(dtype))]

        held, other = [], "grouped" if self.shape.aligned else "tiles"
        for how in ("fused", other):
            self.held = 0
            gradients(expert_lora, self.dtype, rows=how)
            self.held = 0
            before = torch.cuda.memory_allocated() if self.device.type == "cuda" else 0
            gradients(expert_lora, self.dtype, rows=how)
            held.append(round((self.held - before) / 1e6, 1) if before else None)
        plain = lambda dtype: gradients(expert_lora_plain, dtype)
        found = self.row(
            "layer, both ways",
            lambda: gradients(expert_lora, self.dtype, rows="fused"),
            plain,
            lambda: gradients(expert_lora, self.dtype, rows=other),
            # forward and backward by the frozen stacks
            2 * 2 * 3 * self.slots * self.shape.hidden * self.shape.inner,
        )
        yield Row(**asdict(found) | {"held_mb": held[0], "torch_held_mb": held[1]})

    def tilings(self) -> Iterator[Row]:
        """How the large product fares with other tilings than `tiling_for` takes."""
        from ropewalk.kernels.expert_gemm import Tiling, expert_gemm, tiling_for

        if self.device.type != "cuda" or self.tokens == 1 or not self.shape.aligned:
            return
        chosen = tiling_for(self.device, self.dtype, self.tiles.rows, self.up.shape[1])
        w = self.up.transpose(1, 2)
        for columns, depth, warps, stages in (
            (64, 64, 4, 4), (128, 32, 4, 4), (128, 64, 4, 3), (128, 64, 8, 3), (128, 64, 8, 4), (256, 32, 8, 4),
            (256, 64, 8, 3), (256, 64, 8, 4),
        ):  # fmt: skip
            tiling = Tiling(columns, depth, warps, stages)
            try:
                ms = self.time(
                    lambda tiling=tiling: expert_gemm(self.x, w, self.tiles, self.slots, token=self.way.token, tiling=tiling)
                )
            except Exception as error:
                if isinstance(error, torch.AcceleratorError):
                    raise
                ms = None  # more than its shared memory
            rate = None if ms is None else round(2 * self.slots * w.shape[1] * w.shape[2] / ms / 1e9, 1)
            name = f"up in {columns} x {depth}, {warps} warps, {stages} stages"
            yield Row(self.name, name, 0, 0, ms, teraflops=rate, note="chosen" if tiling == chosen else "")

    def row(
        self,
        kernel: str,
        ours: Callable[[], list[Tensor]],
        plain: Callable[[torch.dtype], list[Tensor]],
        torchs: Callable[[], Any],
        work: int | None = None,
    ) -> Row:
        truth = plain(self.truth)
        error, plain_error = distance(ours(), truth), distance(plain(self.dtype), truth)
        del truth
        runs = self.shape.aligned or kernel.startswith(ALONE)
        if runs:
            torchs()
        ms, torch_ms = self.time(ours), self.time(torchs) if runs else None
        rate = round(work / ms / 1e9, 1) if work and ms else None
        return Row(self.name, kernel, error, plain_error, ms, torch_ms, rate)

    def time(self, work: Callable[[], Any]) -> float | None:
        """Milliseconds of one call, the median of ten; None on a CPU."""
        if self.device.type != "cuda":
            work()
            return None
        spent = []
        for _ in range(13):
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            work()
            end.record()
            torch.cuda.synchronize()
            spent.append(start.elapsed_time(end))
        return round(statistics.median(spent[3:]), 4)


def far(device: str, shape: Shape, tokens: int) -> Row:
    """A layer of so many rows that their places need more than 32 bits: its last tokens beside the same tokens by themselves."""
    case = Case(shape, 1, False, device)
    e, h, dtype = shape.experts, shape.hidden, case.dtype
    x = torch.randn(tokens, h, device=device, dtype=dtype)
    ids = torch.arange(e, device=device).expand(tokens, e)[:, : shape.k]
    weights = torch.rand(tokens, shape.k, device=device, dtype=dtype)
    d_out = torch.zeros(tokens, h, device=device, dtype=dtype)
    d_out[-FAR_SEEN:] = torch.randn(FAR_SEEN, h, device=device, dtype=dtype)

    def gradients(function: Callable[..., Tensor], cast: torch.dtype, count: int, **how: Any) -> list[Tensor]:
        own = [t.detach().to(cast).requires_grad_() for t in (x[-count:], weights[-count:], case.a1, case.b1, case.a2, case.b2)]
        experts = Experts(case.up.to(cast), case.down.to(cast), shape.gate)
        factors = Factors(own[2], own[3], 0.5), Factors(own[4], own[5], 0.5)
        out = function(own[0], ids[-count:], own[1], experts, *factors, **how)
        found = torch.autograd.grad(out, own, d_out[-count:].to(cast))
        return [out.detach()[-FAR_SEEN:], found[0][-FAR_SEEN:], found[1][-FAR_SEEN:], *found[2:]]

    name = f"{shape.name}, {tokens} tokens"
    try:
        truth = gradients(expert_lora_plain, case.truth, FAR_SEEN)
        found = gradients(expert_lora, dtype, tokens, rows="fused")
        return Row(
            name,
            "layer, the last tokens",
            distance(found, truth),
            distance(gradients(expert_lora_plain, dtype, FAR_SEEN), truth),
        )
    except Exception as error:
        if isinstance(error, torch.AcceleratorError):
            raise
        return Row(name, "layer, the last tokens", float("inf"), 0, note=f"{type(error).__name__}: {error}"[:300])


def loop(rows: Tensor, stack: Tensor, ends: Tensor) -> Tensor:
    """rows [S, i] with each one's own of stack [E, i, o]."""
    bounds = [0, *ends.tolist()]
    return torch.cat([rows[start:end] @ stack[e] for e, (start, end) in enumerate(pairwise(bounds))])


def distance(found: list[Tensor], truth: list[Tensor]) -> float:
    """The largest of the tensors' own, the norm of the difference beside the norm."""
    return max(float((f.to(t.dtype) - t).norm() / t.norm().clamp_min(1e-30)) for f, t in zip(found, truth))


def figures(row: Row) -> list[Any]:
    ratio = round(row.torch_ms / row.ms, 2) if row.ms and row.torch_ms else None
    some = (row.ms, row.torch_ms, ratio, row.teraflops, row.held_mb, row.torch_held_mb)
    return [f"{row.error:.1e}", f"{row.plain_error:.1e}", *("" if v is None else v for v in some), row.note]


if __name__ == "__main__":
    sys.exit(main())
