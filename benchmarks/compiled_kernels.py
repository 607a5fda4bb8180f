"""The Triton kernels of an expert layer and of rotary positions compiled for GPUs that are not here: whether they compile, and what of a GPU they take.

    python benchmarks/compiled_kernels.py [--sm N ...] [--quick] [--json FILE]

An expert layer goes forward and backward, and queries are turned, over tensors that say they lie on a GPU; nothing is launched, and what
would be is compiled down to machine code by the assembler that comes with Triton. Shared memory beyond the device's and registers
spilled are counted.
Exits 1 if a kernel does not compile or takes more shared memory than there is; 77 without Triton.
"""

from __future__ import annotations

import argparse
import importlib.util
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from measure import machine, table, write_json
from ropewalk.kernels import expert_lora as layers
from ropewalk.kernels.gates import ClampedGlu, Gate, Glu
from ropewalk.kernels.quant import Int8, Nf4
from ropewalk.kernels.rotary import Form

SHARED = {80: 166_912, 86: 101_376, 89: 101_376, 90: 232_448, 100: 232_448, 120: 101_376}  # bytes of a block, CUDA's own tables


@dataclass(frozen=True)
class Row:
    """One kernel for one kind of GPU."""

    sm: int
    case: str
    kernel: str
    shared: int
    most: int
    registers: int | None
    spilled: int | None  # bytes written to local memory
    warps: int
    note: str = ""

    @property
    def passed(self) -> bool:
        return not self.note and self.shared <= self.most


@dataclass(frozen=True)
class Case:
    name: str
    tokens: int  # with two experts, both taken by each
    hidden: int
    inner: int
    gate: Gate
    bias: bool = False
    stored: type[Nf4] | type[Int8] | None = None
    dtype: torch.dtype = torch.bfloat16


CASES = (
    Case("Qwen, 128 rows", 128, 2048, 768, Glu()),
    Case("Gemma, 64 rows, nf4", 48, 2816, 704, Glu("gelu_tanh"), stored=Nf4),
    Case("gpt-oss, 16 rows, int8", 1, 2880, 2880, ClampedGlu(7.0, 1.702, 1.0, True), True, Int8),
    Case("float32", 128, 256, 128, Glu("gelu"), dtype=torch.float32),
)

TURNS = {  # heads, D, angles of a token, type
    "rotary, 32 heads of 128": (Form(), 32, 128, 128, torch.bfloat16),
    "rotary, 16 heads of 256, 64 turned": (Form(), 16, 256, 64, torch.bfloat16),
    "rotary, neighbours in float32": (Form("neighbours", wide=True), 32, 128, 128, torch.bfloat16),
    "rotary, parted, float32": (Form("parted", "first"), 128, 64, 64, torch.float32),
}


class Pretend(TorchFunctionMode):
    """Tensors say that they lie on a GPU, and lie here."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if "device" in kwargs:
            kwargs["device"] = "cpu"
        if func == Tensor.device.__get__:  # type: ignore[attr-defined]  # another object each time
            return torch.device("cuda", 0)
        return func(*args, **kwargs)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sm", type=int, nargs="+", choices=tuple(SHARED), help="kinds of GPU (default: all, or 90 if quick)")
    parser.add_argument("--quick", action="store_true", help="the first of layers and of rotary positions")
    parser.add_argument("--json", type=Path, metavar="FILE")
    given = parser.parse_args()
    if importlib.util.find_spec("triton") is None:
        print("no Triton: nothing compiled", file=sys.stderr)
        return 77
    rows = []
    for sm in given.sm or ((90,) if given.quick else SHARED):
        for case, work in works(given.quick).items():
            for row in compiled(sm, case, work):
                rows.append(row)
                print(f"SM{sm} {case}: {row.kernel} {'' if row.passed else 'FAILED'} {row.note}", flush=True)
    head = ["SM", "case", "kernel", "shared", "registers", "spilled", "warps", ""]
    print(table(head, [[r.sm, r.case, r.kernel, r.shared, r.registers, r.spilled, r.warps, r.note] for r in rows]))
    failed = [asdict(row) for row in rows if not row.passed]
    write_json(given.json, {"machine": machine(), "failed": failed, "rows": [asdict(row) for row in rows]})
    return int(bool(failed))


def works(quick: bool) -> dict[str, Callable[[], None]]:
    """What launches kernels, by its name."""
    few = 1 if quick else None
    layers = {case.name: partial(layer, case) for case in CASES[:few]}
    return layers | {name: partial(turned, *TURNS[name]) for name in list(TURNS)[:few]}


def compiled(sm: int, case: str, work: Callable[[], None]) -> Iterator[Row]:
    """Every kernel that it would launch on such a GPU."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.runtime.jit import JITFunction

    found: dict[str, Any] = {}
    launch = JITFunction.run

    def compile_only(self: Any, *args: Any, **kwargs: Any) -> Any:
        made = launch(self, *args, **kwargs | {"warmup": True})
        found[f"{self.fn.__module__.split('.')[-1]}.{self.fn.__name__} {made.hash[:6]}"] = made
        return made

    from ropewalk.kernels.expert_routing import route_sorted, route_sorted_plain

    def routed(*given: Any) -> Any:
        route_sorted(*given)  # compiled, not run: torch's own indexing after it needs a real route
        return route_sorted_plain(*given)

    driver = mock.MagicMock()
    driver.get_current_target.return_value = GPUTarget("cuda", sm, 32)
    driver.get_current_device.return_value = sm  # compiled kernels are kept by device
    driver.get_current_stream.return_value = 0
    properties = mock.MagicMock(multi_processor_count=100)
    with (
        mock.patch.object(JITFunction, "run", compile_only),
        mock.patch("ropewalk.kernels.expert_fused.route_sorted", routed),
        mock.patch.object(torch.cuda, "get_device_capability", return_value=divmod(sm, 10)),
        mock.patch.object(torch.cuda, "get_device_properties", return_value=properties),
    ):
        triton.runtime.driver.set_active(driver)
        note = ""
        try:
            work()
        except Exception as error:
            note = f"{type(error).__name__}: {error}"[:400]
        for name, made in found.items():
            registers, spilled = assembled(made, sm)
            yield Row(sm, case, name, made.metadata.shared, SHARED[sm], registers, spilled, made.metadata.num_warps)
        if note:
            yield Row(sm, case, "whole", 0, SHARED[sm], None, None, 0, note)


def layer(case: Case) -> None:
    """Forward and backward of an expert layer in which two experts take every token."""
    ids = torch.arange(2).repeat(case.tokens, 1)
    make = lambda *shape: torch.randn(*shape, dtype=case.dtype)
    up, down = make(2, 2 * case.inner, case.hidden), make(2, case.hidden, case.inner)
    if case.stored is not None:
        up, down = case.stored.of(up), case.stored.of(down)
    biases = (make(2, 2 * case.inner), make(2, case.hidden)) if case.bias else (None, None)
    x, weights = make(case.tokens, case.hidden), torch.rand(case.tokens, 2).to(case.dtype)
    sizes = (2, 16, case.hidden), (2, 2 * case.inner, 16), (2, 16, case.inner), (2, case.hidden, 16)
    a1, b1, a2, b2 = (make(*size) for size in sizes)
    experts = layers.Experts(up, down, case.gate, *biases)
    plan, rest = (
        layers._Plan(experts, 0.5, 0.5, True, fused=True, forced=True),
        (up, biases[0], down, biases[1], a1, b1, a2, b2),
    )
    with Pretend(), torch.no_grad():  # not by autograd, whose threads do not pretend
        made = layers._try_fused(plan, x, ids, weights, *rest, keep=True)
        assert made is not None
        out, kept, way = made
        layers._try_fused_backward(plan, x, way, out, kept, rest, [True] * 12)


def turned(form: Form, heads: int, size: int, angles: int, dtype: torch.dtype) -> None:
    """Queries turned and their gradients turned back."""
    from ropewalk.kernels.rotary_fused import turn

    x = torch.randn(2, 8, heads, size, dtype=dtype).transpose(1, 2)
    cos, sin = torch.randn(2, 1, 8, angles, dtype=dtype)
    for back in (False, True):
        turn(x, cos, sin, form, 1, back=back)


def assembled(made: Any, sm: int) -> tuple[int | None, int | None]:
    """Registers of a thread and bytes that it spills, as the assembler tells them."""
    import triton

    assembler = next(Path(triton.__file__).parent.glob("backends/nvidia/bin/ptxas*"), None)
    if assembler is None:
        return None, None
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(made.asm["ptx"])
        file.flush()
        name = re.search(r"\.target (sm_\w+)", made.asm["ptx"])
        target = name[1] if name else f"sm_{sm}"
        for binary in sorted(assembler.parent.glob("ptxas*")):
            ran = subprocess.run(
                [binary, "-v", f"--gpu-name={target}", file.name, "-o", "/dev/null"], capture_output=True, text=True
            )
            if ran.returncode == 0:
                said = ran.stdout + ran.stderr
                registers, spilled = re.search(r"Used (\d+) registers", said), re.search(r"(\d+) bytes spill stores", said)
                return int(registers[1]) if registers else None, int(spilled[1]) if spilled else None
    return None, None


if __name__ == "__main__":
    sys.exit(main())
