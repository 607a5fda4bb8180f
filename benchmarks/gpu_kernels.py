"""Every kernel beside its plain twin, and the engine beside transformers' own generation, on one device.

    python benchmarks/gpu_kernels.py [--device cpu|cuda] [--quick] [--json FILE]

    attend       result and log-sum-exp of attention, of every shape that the engine asks for, against float64; with the way that ran
    experts      the expert layer and all its gradients against autograd over W + s B A: tiles, grouped products and, on a GPU, Triton's
                 kernels, each of which expert_kernels.py looks at by itself
    head         the loss over a vocabulary in pieces, and its gradients
    rotary       queries, keys and their gradients turned by positions, in the forms of several architectures: no further from float64
                 than transformers' own function, and whether the bits are the same
    stored       weights of 4 and 8 bits, what is read back on the device against what is read back on the CPU
    engine       every kind of layer: greedy ids and log-probabilities against generate(), and a segment read again, bit for bit

On a GPU also milliseconds per call, the median between events. --quick leaves out the large shapes. Exits 1 if one is further from its
twin than `bound` says, beside the largest value of the twin; 77 where --device cuda finds no GPU.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

from measure import machine, table, write_json
from ropewalk.engine.day0 import architectures, serve
from ropewalk.kernels.attend import attend, plain, way
from ropewalk.kernels.cross_entropy import linear_cross_entropy, plain_linear_cross_entropy
from ropewalk.kernels.expert_lora import Experts, Factors, expert_lora, expert_lora_plain
from ropewalk.kernels.gates import ClampedGlu, Glu
from ropewalk.kernels.quant import FORMATS
from rotary import DTYPES, Turned
from rotary import FORMS as FORMS_OF_ROTARY

SERVED = ("llama", "gpt_oss", "gemma2", "gemma4", "gemma3n", "llama4", "deepseek_v3", "qwen3_5_moe", "jamba", "nemotron_h")
SMALL = ((7, 45, 16, 16), (40, 300, 64, 64), (16, 500, 72, 64))  # M, N, D, V
RANDOM = torch.Generator().manual_seed(0)
LARGE = ((64, 16384, 128, 128), (2048, 16384, 128, 128), (64, 16384, 576, 512), (512, 512, 256, 256))


@dataclass(frozen=True)
class Row:
    """One comparison: the largest difference beside the largest value of the twin, or of log-probabilities as it is."""

    kernel: str
    case: str
    how: str
    error: float
    bound: float
    milliseconds: float | None = None

    @property
    def passed(self) -> bool:
        return self.error <= self.bound  # false for a NaN


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--quick", action="store_true", help="without the large shapes")
    parser.add_argument("--json", type=Path, metavar="FILE")
    given = parser.parse_args()
    if given.device == "cuda" and not torch.cuda.is_available():
        print("no GPU: nothing measured", file=sys.stderr)
        return 77
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    device, rows = torch.device(given.device), []
    for part in (attention, experts, head, rotary, stored, engine):
        for row in tried(part, device, given.quick or given.device == "cpu"):
            rows.append(row)
            print(f"{row.kernel:<8} {row.case:<44} {row.how:<14} {row.error:.1e} {'' if row.passed else 'TOO FAR'}", flush=True)
        write_json(given.json, told(rows, device))
    print(
        "\n"
        + table(["", "", "", "error", "ms"], [[r.kernel, r.case, r.how, f"{r.error:.1e}", r.milliseconds or ""] for r in rows])
    )
    return 0 if all(row.passed for row in rows) else 1


def told(rows: list[Row], device: torch.device) -> dict[str, Any]:
    name = torch.cuda.get_device_name() if device.type == "cuda" else "cpu"
    failed = [asdict(row) for row in rows if not row.passed]
    return {"machine": machine() | {"device": name}, "failed": failed, "rows": [asdict(row) for row in rows]}


def tried(part: Callable[[torch.device, bool], Iterator[Row]], device: torch.device, quick: bool) -> Iterator[Row]:
    """The rows of a part; one that cannot go on is a failed row, and the next part may be right."""
    try:
        yield from part(device, quick)
    except Exception as error:
        if isinstance(error, torch.AcceleratorError):
            raise  # the device answers nothing any more
        yield Row(part.__name__, f"{type(error).__name__}: {error}"[:200], "failed", float("inf"), 0.0)


def attention(device: torch.device, quick: bool) -> Iterator[Row]:
    for dtype in (torch.float32, torch.bfloat16):
        for queries, keys, size, wide in SMALL if quick else (*SMALL, *LARGE):
            for masked in (False, True):
                for softcap in (None, 30.0):
                    q, k, v = (
                        normal(2, r, c).to(device, dtype)[None] for r, c in ((queries, size), (keys, size), (keys, wide))
                    )
                    seen = None
                    if masked:  # as of new ids at the end of a past
                        seen = torch.ones(queries, keys, dtype=torch.bool, device=device).tril(keys - queries)
                    given = (seen, size**-0.5, softcap)
                    found = attend(q, k, v, *given)
                    truth = plain(q.double(), k.double(), v.double(), *given)
                    case = f"{queries} x {keys} of {size}, {wide}{', masked' * masked}{', softcap' * bool(softcap)}, {str(dtype)[6:]}"
                    spent = milliseconds(lambda q=q, k=k, v=v, given=given: attend(q, k, v, *given), device)
                    chosen = way(q, k, v, seen, softcap)
                    yield Row("attend", case, chosen, worst(found, truth), bound(dtype, device), spent)


def experts(device: torch.device, quick: bool) -> Iterator[Row]:
    sizes = [(8, 64, 32, 50, 2)] if quick else [(8, 64, 32, 50, 2), (64, 1024, 512, 2048, 8)]  # E, H, I, T, k
    for dtype in (torch.float32, torch.bfloat16):
        for count, hidden, inter, tokens, k in sizes:
            for gate in (Glu("silu"), ClampedGlu(7.0, 1.702, 1.0, True)):
                shapes = {"x": (tokens, hidden), "A1": (count, 16, hidden), "B1": (count, 2 * inter, 16)}
                shapes |= {"A2": (count, 16, inter), "B2": (count, hidden, 16)}
                made = {n: (normal(*s) * 0.1).to(device, dtype) for n, s in shapes.items()}
                up, down = (
                    (normal(*s) * hidden**-0.5).to(device, dtype) for s in ((count, 2 * inter, hidden), (count, hidden, inter))
                )
                ids = torch.stack([torch.randperm(count, generator=RANDOM)[:k] for _ in range(tokens)]).to(device)
                weights = torch.rand(tokens, k, generator=RANDOM).to(device, dtype)

                def gradients(function: Callable[..., Tensor], cast: torch.dtype, made: Any = made, **how: Any) -> list[Tensor]:
                    t = {n: x.to(cast).requires_grad_() for n, x in made.items()}
                    layer = Experts(up.to(cast), down.to(cast), gate)  # noqa: B023  (used before the next turn)
                    factors = Factors(t["A1"], t["B1"], 0.5), Factors(t["A2"], t["B2"], 0.5)
                    out = function(t["x"], ids, weights.to(cast), layer, *factors, **how)  # noqa: B023
                    return [out.detach(), *torch.autograd.grad(out.float().square().sum(), list(t.values()))]

                truth = gradients(expert_lora_plain, torch.float64)
                for how in ("tiles", "grouped", "fused") if device.type == "cuda" else ("tiles", "grouped"):
                    found = gradients(expert_lora, dtype, rows=how)
                    spent = milliseconds(lambda how=how: gradients(expert_lora, dtype, rows=how), device)  # noqa: B023
                    case = f"{count} of {hidden} to {inter}, {tokens} tokens, {type(gate).__name__}, {str(dtype)[6:]}"
                    # a gradient passes through several products in 16 bits
                    yield Row(
                        "experts",
                        case,
                        how,
                        worst(found, truth),
                        bound(dtype, device) * (4 if dtype == torch.bfloat16 else 1),
                        spent,
                    )


def head(device: torch.device, quick: bool) -> Iterator[Row]:
    for dtype in (torch.float32, torch.bfloat16):
        for tokens, hidden, vocabulary in ((64, 64, 1000),) if quick else ((64, 64, 1000), (4096, 2048, 150_000)):
            x, w = normal(tokens, hidden).to(device, dtype), (normal(vocabulary, hidden) * hidden**-0.5).to(device, dtype)
            labels = torch.randint(0, vocabulary, (tokens,), generator=RANDOM).to(device)

            def gradients(function: Callable[..., Tensor], cast: torch.dtype) -> list[Tensor]:
                own = [t.to(cast).requires_grad_() for t in (x, w)]  # noqa: B023
                loss = function(*own, labels)  # noqa: B023
                return [loss.detach()[None], *torch.autograd.grad(loss, own)]

            truth = gradients(plain_linear_cross_entropy, torch.float32 if vocabulary > 10_000 else torch.float64)
            spent = milliseconds(lambda: gradients(linear_cross_entropy, dtype), device)  # noqa: B023
            error = worst(gradients(linear_cross_entropy, dtype), truth)
            yield Row(
                "head", f"{tokens} x {hidden} x {vocabulary}, {str(dtype)[6:]}", "pieces", error, bound(dtype, device), spent
            )


def rotary(device: torch.device, quick: bool) -> Iterator[Row]:
    for form in FORMS_OF_ROTARY:
        for tokens in (60,) if quick else (60, 16384):
            turned = Turned(form, tokens, device)
            truth = turned.answers(turned.own, torch.float64)
            for dtype in DTYPES:
                case, both = f"{turned.name}, {str(dtype)[6:]}", (turned.own, turned.lean)
                theirs, found = (turned.answers(f, dtype) for f in both)
                spent = [milliseconds(lambda f=f, t=turned, d=dtype: t.answers(f, d), device) for f in both]
                most, how = worst(theirs, truth), "same bits" if all(map(torch.equal, found, theirs)) else "other bits"
                yield Row("rotary", case, "transformers", most, bound(dtype, device), spent[0])
                yield Row("rotary", case, how, worst(found, truth), most, spent[1])


def stored(device: torch.device, quick: bool) -> Iterator[Row]:
    for name, kind in FORMATS.items():
        weight = normal(*((64, 192) if quick else (4096, 4096))) * 0.02
        kept: Any = kind.of(weight)
        truth = kept.dequantize(torch.float32)
        there = kept.to(device)
        spent = milliseconds(lambda there=there: there.dequantize(torch.bfloat16), device)
        yield Row(
            "stored", f"{name}, {tuple(weight.shape)}", "read", worst([there.dequantize(torch.float32)], [truth]), 1e-6, spent
        )


def engine(device: torch.device, quick: bool) -> Iterator[Row]:
    kinds = dict(architectures())
    for name in SERVED:
        if name not in kinds:
            continue  # an older transformers
        found = serve(name, kinds[name], device)
        error = found.error if found.same_ids and found.warm_as_cold else float("inf")
        yield Row("engine", f"{name}: {', '.join(found.layers)}", "float32", error, 1e-5 if device.type == "cpu" else 1e-4)


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=RANDOM)


def worst(found: Any, truth: Any) -> float:
    """The largest difference, beside the largest value of its tensor; not a number where one is not."""
    return max(
        float((f.double() - t.double()).abs().max() / t.double().abs().max().clamp_min(1e-30)) for f, t in zip(found, truth)
    )


def bound(dtype: torch.dtype, device: torch.device) -> float:
    if dtype == torch.bfloat16:
        return 2e-2
    return 1e-3 if device.type == "cuda" else 1e-4


def milliseconds(work: Callable[[], Any], device: torch.device) -> float | None:
    """Of one call, the median of ten; None on a CPU, where the machine may be busy."""
    if device.type != "cuda":
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


if __name__ == "__main__":
    sys.exit(main())
