"""The estimated memory of a training step beside what the allocator counts, for every way of its layers and with streamed weights.

    python benchmarks/memory.py [--device cpu|cuda] [--quick] [--json FILE]

A step is forward, backward, clipping and AdamW, with the gradients coming anew, in float32 on a CPU. `estimate_mb` is what
models/memory.py says of the model on the meta device; `measured_mb` is what weights, adapter and optimizer hold, and the most that
the allocator had given out besides at any moment of the third step, by its own events. Where weights are streamed, those that wait are
not counted, since on a GPU they wait on the host; `host_mb` is what they take there, estimated and measured. On a GPU the shapes are
larger, weights have 16 bits, and the allocator itself says the most it had given out; what CUDA and its libraries take for themselves,
which the estimate has as CONTEXT and the allocator knows only in part, is left out of both. Exits 1 if one is off by more than 5 %; 77
where --device cuda finds no GPU.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from ropewalk.models.experts import NAME, expert_modules, register_experts
from ropewalk.models.head import output_head
from ropewalk.models.lora import LoraSpec, attach
from ropewalk.models.memory import CONTEXT, Estimate
from ropewalk.models.norms import lean_norms
from ropewalk.models.recompute import recompute
from ropewalk.models.rotary import lean_rotary
from ropewalk.models.streaming import Streaming, stream

OFF_BY = 0.05
SIZES = {
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "vocab_size": 8192,
}
EXPERTS = {"moe_intermediate_size": 128, "num_experts": 16}
SLIDING, FULL = "sliding_attention", "full_attention"
SHAPES: dict[str, dict[str, Any]] = {
    "llama": {"num_hidden_layers": 6},
    "qwen3_moe": {"num_hidden_layers": 6, **EXPERTS, "num_experts_per_tok": 4},
    "gemma4_text": {
        "num_hidden_layers": 4,
        "layer_types": [SLIDING, SLIDING, SLIDING, FULL],
        "sliding_window": 128,
        "global_head_dim": 64,
        **EXPERTS,
        "top_k_experts": 4,
        "enable_moe_block": True,
        "hidden_size_per_layer_input": 0,
        "final_logit_softcapping": 30.0,
    },
    "qwen3_5_moe_text": {
        "num_hidden_layers": 4,
        "layer_types": ["linear_attention"] * 3 + [FULL],
        "linear_num_value_heads": 4,
        "linear_num_key_heads": 2,
        "linear_key_head_dim": 32,
        "linear_value_head_dim": 32,
        **EXPERTS,
        "num_experts_per_tok": 4,
        "shared_expert_intermediate_size": 128,
    },
    "gpt_oss": {
        "num_hidden_layers": 4,
        "layer_types": [SLIDING, FULL] * 2,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
        "intermediate_size": 256,
    },
}


LARGER = 4  # times every width on a GPU, so that what its libraries round up to does not count
WIDTHS = ("hidden_size", "intermediate_size", "head_dim", "vocab_size", "moe_intermediate_size", "global_head_dim", "sliding_window",
          "linear_key_head_dim", "shared_expert_intermediate_size")  # fmt: skip


def sizes(shape: str, larger: int) -> dict[str, Any]:
    """Of a shape's configuration."""
    found = SIZES | SHAPES[shape]
    return found | {name: found[name] * larger for name in WIDTHS if name in found}


def made(shape: str, device: str, larger: int = 1, dtype: torch.dtype = torch.float32) -> tuple[Any, Any]:
    """The model with its adapter."""
    torch.manual_seed(0)
    register_experts()
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[shape](**sizes(shape, larger)), dtype=dtype)
    if any(True for _ in expert_modules(model)):
        model.set_experts_implementation(NAME)
    adapter = attach(model, LoraSpec(r=8), seed=0)
    lean_norms(model)  # as in training
    lean_rotary(model)
    return model, adapter


def measured(shape: str, tokens: int, way: Any, streaming: Streaming | None = None) -> tuple[int, int]:
    """What is held, and the most that is given out besides in one step; and what waits on the host."""
    model, adapter = made(shape, "cpu")
    streams = stream(model, streaming, torch.device("cpu")) if streaming else None
    ring = streams.ring.buffers if streams else []
    model.train()
    recompute(model, way)
    trained = list(adapter.parameters())
    optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=True)
    head, ids = output_head(model), torch.randint(1, SIZES["vocab_size"], (1, tokens))

    def step() -> None:
        head.loss(model, ids, ids)[0].backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0, foreach=True)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    for _ in range(2):
        step()
    gc.collect()
    states = [t for state in optimizer.state.values() for t in state.values()]
    held = {
        t.untyped_storage().data_ptr(): t.untyped_storage().nbytes()
        for t in (*model.parameters(), *model.buffers(), *trained, *states, *ring)
    }
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step()
    events = [(e.start_ns(), e.nbytes()) for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    now = most = 0
    for _, size in sorted(events, key=lambda event: event[0]):
        now += size
        most = max(most, now)
    return sum(held.values()) + most, streams.host_bytes if streams else 0


def measured_on_gpu(shape: str, tokens: int, way: Any, streaming: Streaming | None = None) -> tuple[int, int]:
    """The most that the allocator has given out at any moment of the third step, without what cuBLAS keeps; and what waits on the host."""
    device, before = torch.device("cuda", torch.cuda.current_device()), workspaces()
    model, adapter = made(shape, "cpu" if streaming else "cuda", LARGER, torch.bfloat16)
    streams = stream(model, streaming, device) if streaming else None
    model.train()
    recompute(model, way)
    trained = list(adapter.parameters())
    optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=True)
    head, ids = output_head(model), torch.randint(1, SIZES["vocab_size"], (1, tokens), device=device)
    for number in range(3):
        if number == 2:
            gc.collect()
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        head.loss(model, ids, ids)[0].backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0, foreach=True)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    torch.cuda.synchronize()
    found = torch.cuda.max_memory_allocated() - before, streams.host_bytes if streams else 0
    del model, adapter, streams, trained, optimizer, head
    gc.collect()
    torch.cuda.empty_cache()
    return found


def workspaces() -> int:
    """Bytes that cuBLAS takes from the allocator, in the thread of the forward pass and in that of the backward one."""
    for dtype in (torch.float32, torch.bfloat16):
        x, w = (torch.randn(256, 256, device="cuda", dtype=dtype, requires_grad=True) for _ in range(2))
        torch.nn.functional.linear(x, w).sum().backward()
    x = w = None
    gc.collect()
    torch.cuda.synchronize()
    return torch.cuda.memory_allocated()


def compare(shape: str, tokens: int, ways: list[Any], device: str) -> dict[str, Any]:
    """Both numbers for each way."""
    on_gpu = device == "cuda"
    dtype = torch.bfloat16 if on_gpu else torch.float32
    model, adapter = made(shape, "meta", LARGER if on_gpu else 1, dtype)
    options: dict[str, Any] = {"dtype": dtype, "on_gpu": on_gpu, "accumulates": False, "optimizer": "adamw_torch_fused"}
    found = Estimate(model, rows=1, tokens=tokens, adapter=adapter.parameters(), **options)
    rows = {}
    streams = [None, *(Streaming(part) for part in ("experts", "layers") if any(found.waiting(part)))]
    for way in ways:
        for streaming in streams if way == "layer" else [None]:
            if found.possible(way):
                measure = measured_on_gpu if on_gpu else measured
                expected, (there, host) = found.of(way, streaming), measure(shape, tokens, way, streaming)
                rows[f"{way}, {streaming.part} streamed" if streaming else way] = {
                    "estimate_mb": (expected.total - (CONTEXT if on_gpu else 0)) / 1e6,
                    "measured_mb": there / 1e6,
                    "host_mb": [expected.host / 1e6, host / 1e6],
                }
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--quick", action="store_true", help="one length of rows")
    parser.add_argument("--json", type=Path, help="write the result here")
    arguments = parser.parse_args()
    on_gpu = arguments.device == "cuda"
    if on_gpu and not torch.cuda.is_available():
        print("no GPU: nothing measured", file=sys.stderr)
        return 77
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    result: dict[str, dict[str, Any]] = {}
    wrong = []
    lengths = (2048, 4096) if on_gpu else (256, 640)
    for tokens in lengths[:1] if arguments.quick else lengths:
        for shape in SHAPES:
            try:
                rows = compare(shape, tokens, ["keep", "experts", "layer"], arguments.device)
            except Exception as error:  # the next shape may run
                if isinstance(error, torch.AcceleratorError):
                    raise
                print(f"{shape:<18} {tokens:>5} {type(error).__name__}: {error}", flush=True)
                wrong.append(f"{shape} {tokens}")
                continue
            for way, row in rows.items():
                waits = row["host_mb"]
                offs = [row["estimate_mb"] / row["measured_mb"] - 1, waits[0] / waits[1] - 1 if waits[1] else 0.0]
                off = max(offs, key=abs)
                result.setdefault(f"{shape} T={tokens}", {})[way] = {**row, "off_by": off}
                print(
                    f"{shape:<18} {tokens:>5} {way:<23} {row['estimate_mb']:9.1f} {row['measured_mb']:9.1f} {off:+7.1%}",
                    flush=True,
                )
                wrong += [f"{shape} {tokens} {way}"] if abs(off) > OFF_BY else []
            if arguments.json:
                name = torch.cuda.get_device_name() if on_gpu else "cpu"
                told = {"torch": torch.__version__, "device": name, "off_by_at_most": OFF_BY, "shapes": result}
                arguments.json.write_text(json.dumps(told, indent=1) + "\n")
    if wrong:
        print(f"off by more than {OFF_BY:.0%}: {', '.join(wrong)}", file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    raise SystemExit(main())
