"""Fine-tuning a mixture of experts with LoRA: our expert layer beside transformers' with PEFT, one model step at a time.

    python benchmarks/moe_lora.py [--device cpu|cuda] [--quick] [--json FILE] [--rounds N]

Contenders, the same model, targets, ranks and first values for all of them, each in a process of its own, taking turns:
    ours      experts_implementation "ropewalk" and models/lora.py
    grouped   experts_implementation "grouped_mm" and PEFT's target_parameters
    eager     the model's own loop over experts and PEFT's target_parameters
A step is forward, loss, backward and AdamW. On a CPU its cost is CPU seconds of one thread, the least over all rounds, since the machine
may be busy; on a GPU it is milliseconds between events, the median. `held` is what autograd keeps for the backward besides parameters.
Before anything is timed, every LoRA gradient of every contender is compared with that of the eager one in float32 on a small shape;
the script exits 1 if ours is further from it than 1e-5, and never because something was slow.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

CONTENDERS = ("ours", "grouped", "eager")


@dataclass(frozen=True)
class Shape:
    """A qwen3_moe model: `tokens` in `rows` rows, rank 16 on experts and attention."""

    name: str
    hidden: int
    inter: int
    experts: int
    topk: int
    layers: int
    rows: int
    length: int
    rank: int = 16
    vocab: int = 4096


SMALL = Shape("gate", 128, 64, 16, 4, 2, 2, 64, rank=8, vocab=512)
CPU = (Shape("64 experts", 512, 256, 64, 8, 4, 4, 512), Shape("128 experts", 512, 256, 128, 8, 2, 4, 256))
QUICK = (
    Shape("64 experts", 512, 256, 64, 8, 1, 2, 512, vocab=1024),
    Shape("128 experts", 512, 256, 128, 8, 1, 1, 512, vocab=1024),
)
CUDA = (Shape("qwen3-30b", 2048, 768, 128, 8, 2, 1, 16384), Shape("gemma4-26b", 2816, 704, 128, 8, 2, 1, 16384))


def model_of(shape: Shape, contender: str, dtype: str, device: str) -> tuple[Any, dict[str, Any]]:
    """The model of one contender and its trained tensors, by the names of models/lora.py and in its layout."""
    import torch
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        vocab_size=shape.vocab, hidden_size=shape.hidden, intermediate_size=4 * shape.hidden, num_hidden_layers=shape.layers,
        num_attention_heads=8, num_key_value_heads=2, head_dim=shape.hidden // 8, num_experts=shape.experts,
        num_experts_per_tok=shape.topk, moe_intermediate_size=shape.inter, norm_topk_prob=True, mlp_only_layers=[],
        max_position_embeddings=shape.length, use_cache=False,
    )  # fmt: skip
    implementation = {"ours": "eager", "grouped": "grouped_mm", "eager": "eager"}[contender]
    with torch.device(device):
        model = Qwen3MoeForCausalLM._from_config(config, experts_implementation=implementation, attn_implementation="sdpa")
    for name, parameter in model.named_parameters():
        if name.endswith("mlp.gate.weight"):
            torch.nn.init.normal_(parameter, std=0.1)  # a trained router spreads its tokens; a fresh one is nearly even
    model.to(getattr(torch, dtype)).train()
    trained = _ours(model, shape) if contender == "ours" else _peft(model, shape)
    _fill(trained)
    return model, trained


def _ours(model: Any, shape: Shape) -> dict[str, Any]:
    from ropewalk.models.lora import LoraSpec, attach

    targets = ("q_proj", "k_proj", "v_proj", "o_proj")
    return dict(
        attach(model, LoraSpec(shape.rank, 2 * shape.rank, target_modules=targets, target_linear=False), 0).named_parameters()
    )


def _peft(model: Any, shape: Shape) -> dict[str, Any]:
    from peft import LoraConfig, get_peft_model

    peft = get_peft_model(
        model,
        LoraConfig(
            r=shape.rank, lora_alpha=2 * shape.rank, target_modules=["q_proj", "k_proj", "v_proj", "o_proj"],
            target_parameters=["experts.gate_up_proj", "experts.down_proj"],
        ),
    )  # fmt: skip
    trained = {}
    for name, parameter in peft.named_parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
            name = name.removeprefix("base_model.model.").replace(".default.weight", "")
            name = name.replace("experts.base_layer.lora", "experts.gate_up_proj.lora").replace(
                "experts.lora", "experts.down_proj.lora"
            )
            trained[name] = parameter
    return trained


def _fill(trained: dict[str, Any]) -> None:
    """The same values for everybody: PEFT's layout is filled, ours is what `from_disk` makes of it."""
    import zlib

    import torch

    from ropewalk.models.adapter_folder import from_disk, to_disk

    for name, parameter in trained.items():
        flat = to_disk(name, parameter.detach())
        generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
        values = torch.randn(flat.shape, generator=generator) * 0.02
        parameter.data.copy_(from_disk(name, values, parameter))


def gradients(contender: str, file: str, device: str) -> None:
    """Write the loss and every LoRA gradient of one step on the small shape in float32, in PEFT's layout."""
    import torch

    from ropewalk.models.adapter_folder import to_disk

    model, trained = model_of(SMALL, contender, "float32", device)
    ids = torch.randint(0, SMALL.vocab, (SMALL.rows, SMALL.length), generator=torch.Generator().manual_seed(1)).to(device)
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    torch.save({"loss": loss.item(), **{n: to_disk(n, p.grad).cpu() for n, p in trained.items()}}, file)


def worker(shape: Shape, contender: str, dtype: str, device: str, steps: int) -> None:
    """One contender: prints a line for each request on standard input, a step's cost or the bytes held."""
    import torch

    torch.set_num_threads(1 if device == "cpu" else torch.get_num_threads())
    model, trained = model_of(shape, contender, dtype, device)
    optimizer = torch.optim.AdamW(trained.values(), lr=1e-5, fused=True)
    ids = torch.randint(0, shape.vocab, (shape.rows, shape.length), generator=torch.Generator().manual_seed(1)).to(device)

    def step() -> None:
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    print(json.dumps({"ready": True}), flush=True)
    for line in sys.stdin:
        if line.strip() == "held":
            answer = {"held": held(model, ids)}
        else:
            answer = {"cost": [cost(step, device) for _ in range(steps)]}
        print(json.dumps(answer), flush=True)


def cost(step: Any, device: str) -> float:
    """CPU seconds, or milliseconds on a GPU."""
    import torch

    if device == "cpu":
        before = time.process_time()
        step()
        return time.process_time() - before
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    step()
    end.record()
    torch.cuda.synchronize()
    return float(start.elapsed_time(end))


def held(model: Any, ids: Any) -> int:
    """Bytes of distinct storage that autograd keeps between forward and backward, parameters and buffers left out."""
    import torch

    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    seen: dict[int, tuple[int, Any]] = {}

    def keep(tensor: Any) -> Any:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            seen[storage.data_ptr()] = (storage.nbytes(), tensor)  # held, so that no address is used twice
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        model(input_ids=ids, labels=ids)
    return sum(size for size, _ in seen.values())


# ---------------------------------------------------------------- the referee, which imports no torch


class Process:
    """A contender at work in its own process."""

    def __init__(self, shape: Shape, contender: str, dtype: str, device: str, steps: int) -> None:
        task = json.dumps({"shape": asdict(shape), "contender": contender, "dtype": dtype, "device": device, "steps": steps})
        self.child = subprocess.Popen(
            [sys.executable, __file__, "--worker", task],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=_one_thread(),
        )
        self.read()

    def read(self) -> dict[str, Any]:
        assert self.child.stdout is not None
        line = self.child.stdout.readline()
        if not line:
            raise SystemExit("a contender's process ended; its error is above")
        return dict(json.loads(line))

    def ask(self, what: str) -> dict[str, Any]:
        assert self.child.stdin is not None
        self.child.stdin.write(what + "\n")
        self.child.stdin.flush()
        return self.read()

    def end(self) -> None:
        assert self.child.stdin is not None
        self.child.stdin.close()
        self.child.wait()


def _one_thread() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "TRANSFORMERS_VERBOSITY": "error", "PYTHONWARNINGS": "ignore"}


def gate(device: str) -> dict[str, float]:
    """The largest relative difference of any LoRA gradient from the eager contender's, for the others."""
    import torch

    with tempfile.TemporaryDirectory() as folder:
        found = {}
        for contender in CONTENDERS:
            file = str(Path(folder) / contender)
            subprocess.run([sys.executable, __file__, "--gradients", contender, file, device], check=True, env=_one_thread())
            found[contender] = torch.load(file)
    truth = found.pop("eager")
    return {
        name: max(float((g[n] - t).norm() / t.norm()) for n, t in truth.items() if n != "loss") for name, g in found.items()
    }


def race(shape: Shape, dtype: str, device: str, rounds: int) -> dict[str, Any]:
    """Turns of every contender in another order each round -> costs, bytes held and the three ratios."""
    slow = device == "cpu"
    names = [c for c in CONTENDERS if slow or c != "eager"]
    costs: dict[str, list[float]] = {n: [] for n in names}
    processes = {n: Process(shape, n, dtype, device, 1 if slow else 10) for n in names}
    for turn in range(rounds + 1):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            if name == "eager" and turn:
                continue  # one step of it takes longer than all the others together, and its ratio is far from close
            cost = processes[name].ask("step")["cost"]
            costs[name] += cost if turn or name == "eager" else []  # the first turn warms the others up
    best = {n: (min(c) if slow else statistics.median(c)) for n, c in costs.items()}
    kept = {n: processes[n].ask("held")["held"] for n in names if n != "eager"}
    for process in processes.values():
        process.end()
    return {
        "cost": best,
        "held_bytes": kept,
        "step_vs_grouped": best["grouped"] / best["ours"],
        "step_vs_eager": best["eager"] / best["ours"] if "eager" in best else None,
        "held_vs_grouped": kept["ours"] / kept["grouped"],
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--quick", action="store_true", help="small shapes, under 3 minutes on 2 cores")
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--gradients", nargs=3, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.worker:
        task = json.loads(given.worker)
        worker(Shape(**task.pop("shape")), **task)
        return 0
    if given.gradients:
        gradients(*given.gradients)
        return 0
    errors = gate(given.device)
    print(
        "largest relative LoRA gradient error against eager + PEFT, float32: "
        + ", ".join(f"{n} {e:.1e}" for n, e in errors.items())
    )
    if errors["ours"] > 1e-5:
        print("ours is wrong; nothing is timed")
        return 1
    shapes = CUDA if given.device == "cuda" else QUICK if given.quick else CPU
    unit = "s" if given.device == "cpu" else "ms"
    print(
        f"\n{'shape':<14}{'dtype':<10}"
        + "".join(f"{n + ' ' + unit:>12}" for n in CONTENDERS)
        + f"{'x grouped':>11}{'x eager':>9}{'held MB':>9}{'held':>7}"
    )
    rows = {}
    for shape in shapes:
        for dtype in ("bfloat16",) if given.device == "cuda" else ("float32", "bfloat16"):
            row = race(shape, dtype, given.device, given.rounds if not given.quick else min(given.rounds, 2))
            rows[f"{shape.name}, {dtype}"] = row
            costs = "".join(f"{row['cost'].get(n, float('nan')):>12.3f}" for n in CONTENDERS)
            eager = f"{row['step_vs_eager']:>9.2f}" if row["step_vs_eager"] else f"{'':>9}"
            mb = row["held_bytes"]["ours"] / 1e6
            print(
                f"{shape.name:<14}{dtype:<10}{costs}{row['step_vs_grouped']:>11.2f}{eager}{mb:>9.0f}{row['held_vs_grouped']:>7.2f}",
                flush=True,
            )
    result = {
        "machine": {"processor": _processor(), "system": platform.platform(), "device": given.device},
        "quick": given.quick,
        "max_grad_error": errors["ours"],
        "max_grad_error_grouped": errors["grouped"],
        **{key: {n: row[key] for n, row in rows.items()} for key in ("step_vs_grouped", "step_vs_eager", "held_vs_grouped")},
        "rows": {n: {"cost": row["cost"], "held_bytes": row["held_bytes"]} for n, row in rows.items()},
        "shapes": [asdict(s) for s in shapes],
    }
    if given.json:
        given.json.write_text(json.dumps(result, indent=2) + "\n")
    return 0


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    names = (
        [line.partition(":")[2].strip() for line in info.read_text().splitlines() if line.startswith("model name")]
        if info.exists()
        else []
    )
    return names[0] if names else platform.processor()


if __name__ == "__main__":
    raise SystemExit(main())
