"""Large mixtures of experts trained on a GPU of so many GB: whole depth, true widths and vocabulary, 4 bits, streamed where they must be.

    python benchmarks/small_gpu.py --limit-gb 12 [--device cpu|cuda] [--shapes A,B] [--quick] [--json FILE]

Each shape is planned as `ropewalk check` plans examples/gpu/SHAPE-Ngb.yml, with rows of 4,096 tokens. On a GPU the process may then take
no more than the limit, the base is made of random weights tensor by tensor, and 20 steps are trained: `fits`, `tokens_per_s`, and the
allocator's peak beside the estimate. On a CPU the plan is that of the true shape, `fits` is what it says, and the steps are those of a
tiny model of the same architecture, streamed and recomputed in the same way.

`loss_band` is the largest difference of the losses of a tiny model trained with that plan from those of one that keeps everything on
the device. Streaming and recomputation change no bit, so on a CPU the script ends with 1 where it is not 0. On a GPU kernels may add up in
another order each time: there it ends with 1 where the band is wider than so many times `loss_band_of_plain`, the difference of two runs
without the plan, and a little more, since two runs show chance only roughly. It also ends with 1 where a shape that the plan lets in runs
out of memory.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import os
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import CONFIG_MAPPING

from ropewalk.config.run import Run, load_run
from ropewalk.errors import ModelError
from ropewalk.kernels.quant import FORMATS
from ropewalk.models.experts import NAME, expert_modules, register_experts
from ropewalk.models.head import output_head
from ropewalk.models.load import auto_class, load_config, pick_attention
from ropewalk.models.lora import attach
from ropewalk.models.norms import lean_norms
from ropewalk.models.quantized import replace, to_quantise
from ropewalk.models.recompute import Way, recompute
from ropewalk.models.rotary import lean_rotary
from ropewalk.models.shapes import SHAPES
from ropewalk.models.streaming import Streaming, stream
from ropewalk.models.tiny import shrink, tiny_config
from ropewalk.train.optim import make_optimizer
from ropewalk.train.pupil import lora_spec
from ropewalk.train.survey import Survey, survey

ROOT = Path(__file__).parents[1]
DEFAULT = ("qwen3-30b-a3b", "gemma-4-26b-a4b")
TOKENS, STEPS, WARM = 4096, 20, 3
TINY = {"num_hidden_layers": 6, "vocab_size": 512, "vocab_size_per_layer_input": 512}
TINY_TOKENS, TINY_STEPS = 96, 8
CHANCE_TIMES, CHANCE_MORE = 3.0, 1e-3  # of losses near 6


def planned(shape: str, limit: float) -> tuple[Run, Survey]:
    """The example for this size with rows of 4,096 tokens, and what is planned for it."""
    example = ROOT / "examples" / "gpu" / f"{shape}-{limit:g}gb.yml"
    run = load_run(example, [f"sequence_len={TOKENS}", f"gpu_memory_limit={limit:g}GiB", "gradient_accumulation_steps=1"])
    return run, survey(SHAPES / shape, run)


# ---------------------------------------------------------------- a base of random weights


@contextmanager
def without_weights() -> Iterator[None]:
    """Within it a module's parameters are made without memory, and its buffers with their values."""
    plain = nn.Module.register_parameter

    def register(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        if parameter is not None and not parameter.is_meta:
            parameter = nn.Parameter(parameter.to("meta"), requires_grad=False)
        plain(module, name, parameter)

    nn.Module.register_parameter = register  # type: ignore[method-assign]
    try:
        yield
    finally:
        nn.Module.register_parameter = plain  # type: ignore[method-assign]


def random_base(config: Any, run: Run, device: torch.device, to: torch.device, attention: str) -> Any:
    """The model of a configuration, each weight drawn on the device, quantised there, and taken to where it will wait."""
    register_experts()
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    with without_weights():
        model = auto_class(config).from_config(config, dtype=dtype, attn_implementation=attention)
    if any(True for _ in expert_modules(model)):
        model.set_experts_implementation(NAME)
    generator = torch.Generator(device).manual_seed(0)
    few_bits = set(to_quantise(model)) if run.quantization else set()
    made: dict[int, nn.Parameter] = {}
    for name, parameter in list(model.named_parameters(remove_duplicate=False)):
        path, _, leaf = name.rpartition(".")
        if name in few_bits:
            replace(model, name, FORMATS[str(run.quantization)].of(_drawn(name, parameter, device, dtype, generator)).to(to))
            continue
        if id(parameter) not in made:
            drawn = _drawn(name, parameter, device, dtype, generator).to(to)
            made[id(parameter)] = nn.Parameter(drawn, requires_grad=False)
        model.get_submodule(path)._parameters[leaf] = made[id(parameter)]
    for buffer in model.buffers():
        buffer.data = buffer.data.to(to)
    return model.requires_grad_(False).eval()


def _drawn(name: str, like: Tensor, device: torch.device, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    made = torch.empty(like.shape, dtype=dtype, device=device)
    if like.dim() < 2:
        return made.fill_(0.0 if name.endswith("bias") else 1.0)
    return made.normal_(0.0, 0.02, generator=generator)


# ---------------------------------------------------------------- training it


def train(
    config: Any, run: Run, ways: Any, streaming: Streaming | None, device: torch.device, tokens: int, steps: int, attention: str
) -> dict[str, Any]:
    """Losses and speed of so many steps, each over one row of random tokens."""
    begun = time.perf_counter()
    model = random_base(config, run, device, torch.device("cpu") if streaming else device, attention)
    host = stream(model, streaming, device).host_bytes if streaming else 0
    head = output_head(model)
    adapter = attach(model, lora_spec(run, model), seed=0)
    lean_norms(model)  # as the plan takes for granted
    lean_rotary(model)
    if set(ways) - {"keep"}:
        recompute(model, ways)
    optimizer = make_optimizer(
        run.optimizer if device.type == "cuda" else "adamw_torch", adapter.named_parameters().items(), lr=run.learning_rate
    )
    model.train()
    draw = torch.Generator().manual_seed(1)
    vocabulary = config.get_text_config().vocab_size
    loaded = time.perf_counter() - begun
    losses, times = [], []
    for _ in range(steps):
        ids = torch.randint(70, vocabulary, (1, tokens), generator=draw).to(device)
        begun = time.perf_counter()
        loss, count = head.loss(model, ids, ids, torch.arange(tokens, device=device)[None])
        (loss / count).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(float(loss.detach()) / count)  # waits for the device
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - begun)
    each = sorted(times[min(WARM, steps - 1) :])
    return {"losses": losses, "tokens_per_s": tokens / each[len(each) // 2], "host_mb": host / 1e6, "loading_s": loaded}


def tiny(shape: str) -> Any:
    """A tiny configuration of the shape's architecture."""
    true = load_config(SHAPES / shape)
    text = true.get_text_config()
    kinds = getattr(tiny_config(text.model_type), "layer_types", None)
    sizes = TINY | ({"layer_types": (list(kinds) * TINY["num_hidden_layers"])[: TINY["num_hidden_layers"]]} if kinds else {})
    return shrink(CONFIG_MAPPING[text.model_type], **sizes, tie_word_embeddings=text.tie_word_embeddings)


def tiny_run(run: Run) -> Run:
    """The run at ranks that fit a tiny model."""
    return run.model_copy(update={"lora_r": 4, "lora_alpha": 8.0, "lora_rank_pattern": None})


def loss_bands(
    shape: str, run: Run, ways: tuple[Way, ...], streaming: Streaming | None, device: torch.device
) -> dict[str, float]:
    """The largest difference between the losses of a tiny model with this plan and without, and that of two without."""
    attention = pick_attention(tiny(shape), "auto", torch.device("cpu"), SHAPES / shape)
    found = []
    for plan, waiting in ((("keep",), None), (ways, streaming), (("keep",), None)):
        config = tiny(shape)
        layers = config.get_text_config().num_hidden_layers
        each = [plan[number * len(plan) // layers] for number in range(layers)]
        found.append(train(config, tiny_run(run), each, waiting, device, TINY_TOKENS, TINY_STEPS, attention))
    plain, lean, again = (each["losses"] for each in found)
    assert not math.isnan(plain[-1])
    return {
        "loss_band": max(abs(a - b) for a, b in zip(plain, lean, strict=True)),
        "loss_band_of_plain": max(abs(a - b) for a, b in zip(plain, again, strict=True)),
        "tokens_per_s": found[1]["tokens_per_s"],
    }


def measured(shape: str, limit: float, device: torch.device, steps: int) -> dict[str, Any]:
    """Everything about one shape."""
    try:
        run, found = planned(shape, limit)
    except ModelError as error:
        return {"fits": False, "why": str(error)}
    told = {
        "estimate_mb": found.memory["total"] / 1e6,
        "host_mb": found.memory["host"] / 1e6,
        "streams": None if found.streaming is None else found.streaming.part,
        "slots": None if found.streaming is None else found.streaming.slots,
        "ways": {way: found.ways.count(way) for way in dict.fromkeys(found.ways)},
        "tokens": TOKENS,
    }
    told |= loss_bands(shape, run, found.ways, found.streaming, device)
    if device.type != "cuda":
        return told | {"fits": True, "dry_run": True}
    share = limit * 2**30 / torch.cuda.get_device_properties(device).total_memory
    torch.cuda.set_per_process_memory_fraction(min(1.0, share), device)
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    config = load_config(SHAPES / shape)
    attention = pick_attention(config, "auto", device, SHAPES / shape)
    try:
        result = train(config, run, found.ways, found.streaming, device, TOKENS, steps, attention)
    except torch.OutOfMemoryError as error:
        return told | {"fits": False, "out_of_memory": True, "tokens_per_s": None, "why": str(error).splitlines()[0]}
    return told | {
        "fits": True,
        "tokens_per_s": result["tokens_per_s"],
        "loading_s": result["loading_s"],
        "first_loss": result["losses"][0],
        "last_loss": result["losses"][-1],
        "steps": steps,
        "peak_mb": torch.cuda.max_memory_allocated(device) / 1e6,
        "reserved_mb": torch.cuda.max_memory_reserved(device) / 1e6,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--limit-gb", type=float, default=12, help="12, 16, 24 or 80: what the GPU has, in GiB")
    parser.add_argument("--shapes", default=",".join(DEFAULT), help="folders of src/ropewalk/models/shapes")
    parser.add_argument("--device", choices=["cpu", "cuda"], help="default: a GPU where there is one")
    parser.add_argument("--quick", action="store_true", help="five steps instead of twenty")
    parser.add_argument("--json", type=Path, help="write the result here")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    device = torch.device(arguments.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if device.type == "cuda":
        device = torch.device("cuda", torch.cuda.current_device())
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    shapes: dict[str, dict[str, Any]] = {}
    asked = arguments.shapes.split(",")
    for shape in asked:
        if len(asked) > 1 and device.type == "cuda":
            shapes |= _apart(shape, arguments)  # what one leaves behind would take from the other's room
        else:
            shapes[shape] = measured(shape, arguments.limit_gb, device, 5 if arguments.quick else STEPS)
            _tell(shape, shapes[shape])
        if arguments.json:
            name = torch.cuda.get_device_name() if device.type == "cuda" else "cpu"
            found = {"device": name, "torch": torch.__version__, "limit_gb": arguments.limit_gb, "shapes": shapes}
            arguments.json.write_text(json.dumps(found, indent=1) + "\n")
    wrong = [
        shape
        for shape, row in shapes.items()
        if row.get("loss_band", 0.0) > allowed(row.get("loss_band_of_plain", 0.0), device) or row.get("out_of_memory")
    ]
    if wrong:
        print(f"other losses than without the plan, or out of memory: {', '.join(wrong)}", file=sys.stderr)
    return 1 if wrong else 0


def allowed(of_plain: float, device: torch.device) -> float:
    """How wide the band of losses may be, by that of two plain runs."""
    return of_plain if device.type == "cpu" else CHANCE_TIMES * of_plain + CHANCE_MORE


def _apart(shape: str, arguments: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """One shape in a process of its own."""
    partial = (arguments.json or Path("small_gpu.json")).with_suffix(f".{shape}.json")
    command = [sys.executable, __file__, "--limit-gb", f"{arguments.limit_gb:g}", "--shapes", shape, "--device", "cuda"]
    subprocess.run([*command, "--json", str(partial), *["--quick"] * arguments.quick])
    if not partial.exists():
        return {shape: {"fits": False, "out_of_memory": True, "why": "its process died"}}
    found: dict[str, dict[str, Any]] = json.loads(partial.read_text())["shapes"]
    partial.unlink()
    return found


def _tell(shape: str, row: dict[str, Any]) -> None:
    if not row["fits"]:
        print(f"{shape:<18} does not fit: {row['why']}", flush=True)
        return
    peak = f"{row['peak_mb']:9.0f}" if "peak_mb" in row else "  dry run"
    print(
        f"{shape:<18} estimate {row['estimate_mb']:9.0f} MB, peak {peak}, host {row['host_mb']:8.0f} MB, streams {row['streams']}, "
        f"{row['tokens_per_s']:8.0f} tokens/s, loss band {row['loss_band']:g}",
        flush=True,
    )


if __name__ == "__main__":
    raise SystemExit(main())
