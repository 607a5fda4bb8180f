"""The second question about a document beside the first: CPU seconds of one thread, the same weights, the same greedy ids.

For models shaped like Qwen3, Gemma 4 (sliding windows, experts) and Qwen3.5-MoE (recurrent layers, experts), with random weights:

    ttft_ratio_4k, _16k           CPU seconds to the first id, first question : second question about a document of so many ids
    ttft_ratio_16k_restart        the same after the engine was closed: keys and values come from disk, sealed
    ttft_ratio_16k_other_adapter  the same for an activated adapter, over what the base has read
    warm_cold_max_logit_diff      of the next id's log-probability, the second time and the first
    users16_ratio                 16 users decoding over one document: CPU seconds per id of transformers' own `generate`, one after
                                  the other : ours together, measured in turns, the likeliest id and nothing else

Correctness gates: the greedy ids of the second time are those of the first, and the first ids are those of transformers' own
generation over its own cache (in bfloat16 a difference is told, not failed). Each model is measured in float32, whose ids are exact, and,
without --quick, in bfloat16, where a first question is two to three times cheaper and its ratio to the second is smaller for that.
With --device cuda all seconds are those of the clock, once the GPU is done.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import (
    DynamicCache,
    Gemma4ForCausalLM,
    Gemma4TextConfig,
    Qwen3_5MoeForCausalLM,
    Qwen3_5MoeTextConfig,
    Qwen3Config,
    Qwen3ForCausalLM,
)
from transformers.generation.streamers import BaseStreamer

from measure import machine, table, write_json
from ropewalk.engine.adapters import Adapters
from ropewalk.engine.engine import Engine
from ropewalk.engine.prefixes import Prefixes
from ropewalk.engine.request import Event, Keep, Request, Sampling, Span
from ropewalk.engine.runner import Runner
from ropewalk.engine.scheduler import Limits
from ropewalk.models.blocked import arrange
from ropewalk.models.lora import LoraSpec, attach

VOCABULARY = 32_000
LENGTHS = 4096, 16_384  # of the documents, in ids
QUESTION = 32  # ids
INVOCATION = (7, 8, 9)
NEW = 8  # ids that are compared
AGAIN = 12  # times that a second question is asked; the least counts, since what takes 50 ms is easily disturbed
TURNS, STEPS = 5, 6  # of decoding, ours and theirs, and the ids of each in a turn; the least counts here too
GREEDY = Sampling(temperature=0)
DEVICE = torch.device("cpu")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass
class Result:
    """What one architecture showed."""

    architecture: str
    dtype: str = "float32"
    ttft_ratio_4k: float = 0.0
    ttft_ratio_16k: float = 0.0
    ttft_ratio_16k_restart: float = 0.0
    ttft_ratio_16k_other_adapter: float = 0.0
    warm_cold_max_logit_diff: float = 0.0
    users16_ratio: float = 0.0
    cold_16k_cpu_s: float = 0.0
    ours_ms_per_id: float = 0.0
    sequential_ms_per_id: float = 0.0
    equal_to_generate: bool = True


def qwen3(**size: Any) -> Any:
    return Qwen3ForCausalLM(Qwen3Config(**size, num_key_value_heads=2, head_dim=64, tie_word_embeddings=True))


def gemma4(**size: Any) -> Any:
    layers = size["num_hidden_layers"]
    return Gemma4ForCausalLM(
        Gemma4TextConfig(
            **size,
            num_key_value_heads=4,
            head_dim=64,
            global_head_dim=128,
            num_global_key_value_heads=2,
            attention_k_eq_v=True,
            sliding_window=1024,
            hidden_size_per_layer_input=0,
            vocab_size_per_layer_input=VOCABULARY,
            enable_moe_block=True,
            num_experts=8,
            top_k_experts=2,
            moe_intermediate_size=384,
            layer_types=[*["sliding_attention"] * 3, "full_attention"] * (layers // 4),
        )
    )


def qwen3_5_moe(**size: Any) -> Any:
    layers = size.pop("num_hidden_layers")
    size.pop("intermediate_size")
    return Qwen3_5MoeForCausalLM(
        Qwen3_5MoeTextConfig(
            **size,
            num_hidden_layers=layers,
            num_key_value_heads=2,
            head_dim=64,
            linear_key_head_dim=64,
            linear_value_head_dim=64,
            linear_num_key_heads=4,
            linear_num_value_heads=8,
            linear_conv_kernel_dim=4,
            moe_intermediate_size=256,
            shared_expert_intermediate_size=256,
            num_experts=16,
            num_experts_per_tok=4,
            layer_types=[*["linear_attention"] * 3, "full_attention"] * (layers // 4),
        )
    )


ARCHITECTURES: dict[str, Callable[..., Any]] = {"qwen3": qwen3, "gemma4": gemma4, "qwen3_5_moe": qwen3_5_moe}


def build(name: str, quick: bool, dtype: torch.dtype = torch.bfloat16) -> Any:
    torch.manual_seed(0)
    size = {
        "vocab_size": VOCABULARY,
        "hidden_size": 256 if quick else 512,
        "intermediate_size": 768 if quick else 1536,
        "num_hidden_layers": 4 if quick else 8,
        "num_attention_heads": 8,
        "max_position_embeddings": 65_536,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    return ARCHITECTURES[name](**size).to(DEVICE, dtype).eval()


def ids(count: int, seed: int) -> tuple[int, ...]:
    return tuple(torch.randint(100, VOCABULARY, (count,), generator=torch.Generator().manual_seed(seed)).tolist())


def cpu(work: Callable[[], Any]) -> tuple[float, Any]:
    """CPU seconds of this process, or those until a GPU is done, and what came of them."""
    gc.collect()
    before = clock()
    found = work()
    return clock() - before, found


def clock() -> float:
    if DEVICE.type == "cpu":
        return time.process_time()
    torch.cuda.synchronize()
    return time.perf_counter()


def answer(engine: Engine, request: Request) -> tuple[float, list[Event]]:
    """CPU seconds to the first id, and all events."""
    events: list[Event] = []

    def first() -> None:
        engine.submit(request)
        while not any(event.ids for event in events):
            events.extend(engine.step())

    seconds, _ = cpu(first)
    while engine.busy:
        events.extend(engine.step())
    return seconds, events


def texts(events: list[Event]) -> list[int]:
    return [id for event in events for id in event.ids]


def measure(name: str, dtype: str, quick: bool, folder: Path) -> Result:
    result = Result(name, dtype)
    model = build(name, quick, DTYPES[dtype])
    adapters = {n: save_adapter(name, quick, folder / f"adapter{n}", n) for n in (1, 2)}
    runner = Runner(model)
    arrange(model)
    over = Adapters(model)
    for number, path in adapters.items():
        over.load(str(number), path)
    gc.collect()
    gc.freeze()  # collecting garbage before each question does not go through all of these again

    def opened() -> tuple[Engine, Prefixes]:
        prefixes = Prefixes(
            runner.layout, name, memory_bytes=4 << 30, disk_bytes=8 << 30, folder=folder / "segments", device=DEVICE
        )
        return Engine(runner, prefixes, over, limits=Limits(running=64, chunk=2048)), prefixes

    def asked(
        id: str, length: int, question: int, adapter: str | None = None, new: int = NEW, logprobs: bool = True
    ) -> Request:
        keep = Keep(str(folder / "segments" / f"{name}{length}"), b"k" * 32)
        tail = ids(QUESTION, 100 + question)
        tail = (*tail[: -len(INVOCATION) - 1], *INVOCATION, tail[-1])
        return Request(id, (Span(ids(length, length), keep),), tail, new, adapter, GREEDY, logprobs=logprobs)

    engine, prefixes = opened()
    ratios = []
    for length in LENGTHS:
        cold, first = answer(engine, asked(f"cold{length}", length, 1))
        prefixes.flush()
        warm = min(answer(engine, asked(f"warm{length}{n}", length, 2))[0] for n in range(AGAIN))
        _, repeated = answer(engine, asked(f"again{length}", length, 1))
        if texts(repeated) != texts(first):
            raise SystemExit(f"{name}: the second time, other ids than the first")
        difference = max(abs(a - b) for x, y in zip(first, repeated) for a, b in zip(x.logprobs, y.logprobs))
        result.warm_cold_max_logit_diff = max(result.warm_cold_max_logit_diff, difference)
        ratios.append(cold / warm)
        if length == LENGTHS[-1]:
            result.cold_16k_cpu_s = cold
            restarts = []
            for _ in range(AGAIN // 2):
                engine, _ = opened()
                restarted, found = answer(engine, asked("restart", length, 1))
                restarts.append(restarted)
            if texts(found) != texts(first) or found[0].read != length:
                raise SystemExit(f"{name}: after a restart, other ids or nothing found on disk")
            result.ttft_ratio_16k_restart = cold / min(restarts)
            answer(engine, asked("adapter0", length, 3, "1"))
            other, events = min(
                (answer(engine, asked(f"adapter{n}", length, 3, "2")) for n in range(AGAIN)), key=lambda found: found[0]
            )
            if events[0].read != length:
                raise SystemExit(f"{name}: an activated adapter read the document anew")
            result.ttft_ratio_16k_other_adapter = cold / other
    result.ttft_ratio_4k, result.ttft_ratio_16k = ratios
    together = users(engine, asked, LENGTHS[-1])
    alone, first_ids = sequential(build(name, quick, DTYPES[dtype]), LENGTHS[-1])
    turns = [(together(), alone()) for _ in range(TURNS)]
    result.ours_ms_per_id, result.sequential_ms_per_id = (min(times) * 1e3 for times in zip(*turns))
    result.users16_ratio = result.sequential_ms_per_id / result.ours_ms_per_id
    result.equal_to_generate = first_ids == texts(first)
    if dtype == "float32" and not result.equal_to_generate:
        raise SystemExit(f"{name}: in float32, other ids than transformers' own")
    return result


def users(engine: Engine, asked: Callable[..., Request], length: int) -> Callable[[], float]:
    """16 users who decode over one document -> a function that gives the CPU seconds of an id, over some more of them."""
    for user in range(16):
        engine.submit(asked(f"user{user}", length, 10 + user, new=STEPS * TURNS + 40, logprobs=False))
    produced: set[str] = set()
    while len(produced) < 16:
        produced |= {event.id for event in engine.step() if event.ids}

    def decode() -> float:
        seconds, events = cpu(lambda: [event for _ in range(STEPS) for event in engine.step()])
        return seconds / len(texts(events))

    return decode


class Ticks(BaseStreamer):  # type: ignore[misc]
    """The clock at every id that a generation gives."""

    def __init__(self) -> None:
        self.at: list[float] = []

    def put(self, value: Tensor) -> None:
        self.at.append(clock())

    def end(self) -> None:
        pass


@torch.inference_mode()
def sequential(model: Any, length: int) -> tuple[Callable[[], float], list[int]]:
    """transformers' own `generate` for one user, over its own cache -> the same function, and the first ids."""
    model.set_attn_implementation("sdpa")
    cache = DynamicCache(config=model.config.get_text_config(decoder=True))
    tail = ids(QUESTION, 101)
    tail = (*tail[: -len(INVOCATION) - 1], *INVOCATION, tail[-1])
    text = torch.tensor([[*ids(length, length), *tail]], device=DEVICE)
    torch.set_num_threads(os.cpu_count() or 1)  # this is not timed
    for start in range(0, length, 2048):
        model(input_ids=text[:, start : min(start + 2048, length)], past_key_values=cache, use_cache=True, logits_to_keep=1)
    torch.set_num_threads(1)

    @torch.inference_mode()
    def more(count: int) -> float:
        """So many ids more -> seconds of each but the first two, of which one reads what the cache lacks."""
        nonlocal text
        ticks = Ticks()
        text = model.generate(
            text,
            attention_mask=torch.ones_like(text),
            past_key_values=cache,
            max_new_tokens=count,
            do_sample=False,
            eos_token_id=None,
            streamer=ticks,
        )
        first, *_, last = ticks.at[-count + 1 :]
        return (last - first) / (count - 2)

    more(NEW)
    begun = text[0, length + QUESTION :].tolist()

    def decode() -> float:
        gc.collect()
        return more(STEPS + 2)

    return decode, begun


def save_adapter(name: str, quick: bool, folder: Path, seed: int) -> Path:
    """An activated adapter whose factors are not zero, saved as the trainer saves it."""
    adapter = attach(build(name, quick), LoraSpec(r=8, alora_invocation_tokens=INVOCATION), seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.02)
    adapter.save(folder)
    return folder


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="smaller models, in one precision; under three minutes")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--only", choices=sorted(ARCHITECTURES), help="one architecture")
    parser.add_argument("--dtype", choices=sorted(DTYPES), help="this one only; otherwise both, and with --quick float32")
    parser.add_argument(
        "--peers",
        action="store_true",
        help="also what serve_peers.py measures over HTTP, beside other servers (they are installed)",
    )
    parser.add_argument("--json", type=Path, help="write the figures here")
    arguments = parser.parse_args()
    if arguments.peers:
        import serve_peers  # which imports this module
    global DEVICE
    DEVICE = torch.device(arguments.device)
    torch.set_num_threads(1)
    results = []
    dtypes = [arguments.dtype] if arguments.dtype else list(DTYPES)[: 1 if arguments.quick else None]
    for name, dtype in product([arguments.only] if arguments.only else ARCHITECTURES, dtypes):
        with tempfile.TemporaryDirectory() as folder:
            results.append(measure(name, dtype, arguments.quick, Path(folder)))
        gc.unfreeze()
        print(json.dumps({k: round(v, 4) if isinstance(v, float) else v for k, v in asdict(results[-1]).items()}), flush=True)
    names = [field for field in asdict(results[0]) if field != "architecture"]
    print(table(["", *(r.architecture for r in results)], [[n, *(_shown(getattr(r, n)) for r in results)] for n in names]))
    if arguments.json:
        found: dict[str, Any] = {"machine": machine() | {"device": _device()}, "quick": arguments.quick}
        for result in results:  # the first dtype's figures under the architecture itself, the second's under its own name
            entry = found.setdefault(result.architecture, asdict(result))
            if entry["dtype"] != result.dtype:
                entry[result.dtype] = asdict(result)
        if arguments.peers:
            for architecture, figures in serve_peers.peers(arguments.quick, arguments.only).items():
                found.setdefault(architecture, {})["peers"] = figures
        write_json(arguments.json, found)
    return 0


def _device() -> str:
    return torch.cuda.get_device_name() if DEVICE.type == "cuda" else "cpu"


def _shown(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    sys.exit(main())
