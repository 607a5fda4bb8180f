"""The generator beside transformers' `generate` with PEFT, and shared prompts beside plain rows: what must hold, then turns of each.

Imported by grpo_ours.py in a process of its own. What must hold, in float32: greedy ids are those of `generate`; every log-probability
that comes with an id is that of one forward pass over the whole; gradients with shared prompts are those without.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from grpo_ours import loaded_pupil, now, prescribe
from peers.grpo_assets import END, PAD, Shape, lengths, make, processor, prompt_ids
from ropewalk.engine.request import Sampling
from ropewalk.train.environment import Episode, single
from ropewalk.train.generator import Generator
from ropewalk.train.policy_batches import lay_out

NEW = 64  # tokens of even completions
SMALL = {
    "vocabulary": 512,
    "hidden": 128,
    "layers": 3,
    "inter": 256,
    "prompts": 4,
    "samples": 4,
    "prompt": 24,
    "median": 12,
    "row": 256,
}
SHARP = 8.0  # what the head of the small model is multiplied by, so that the likeliest id is so clearly
Turn = Callable[[], Any]


def measure_rollouts(order: dict[str, Any], shape: Shape) -> dict[str, Any]:
    gates = check(order, shape)
    found: dict[str, Any] = {"gates": gates}
    with loaded_pupil(order, shape) as pupil, tempfile.TemporaryDirectory() as folder:
        peer = as_peft(pupil, order, folder)
        rounds = order["rounds"]
        generator = Generator(pupil, running=shape.completions, longest=shape.prompt + max(shape.longest, NEW) + 1)
        found["even"] = turns(
            order, rounds, {"ours": lambda: even(generator, shape), "generate": lambda: peer_even(peer, shape)}
        )
        prescribe(shape)
        found["uneven"] = turns(
            order, rounds, {"ours": lambda: uneven(generator, shape), "generate": lambda: peer_uneven(peer, shape)}
        )
    found["shared"] = shared_training(order, shape)
    found["even"]["tokens"], found["uneven"]["tokens"] = shape.completions * NEW, sum(map(sum, lengths(shape)))
    return found


# ---------------------------------------------------------------- what is timed


def even(generator: Generator, shape: Shape) -> int:
    """Every completion has NEW tokens."""
    for number, ids in enumerate(prompt_ids(shape)):
        generator.submit(str(number), ids, samples=shape.samples, max_tokens=NEW, sampling=Sampling(), stop_ids=())
    return _written(generator)


def uneven(generator: Generator, shape: Shape) -> int:
    """As `lengths` says, see `prescribe`."""
    return even(generator, shape)


def _written(generator: Generator) -> int:
    tokens = 0
    while generator.busy:
        tokens += sum(len(generated.ids) for _, _, generated in generator.step())
    return tokens


def peer_even(peer: Any, shape: Shape) -> int:
    return _generated(peer, shape, max_new_tokens=NEW, eos_token_id=None)


def peer_uneven(peer: Any, shape: Shape) -> int:
    asked = torch.tensor(prompt_ids(shape)).repeat_interleave(shape.samples, 0)
    return _generated(
        peer, shape, max_new_tokens=shape.longest, eos_token_id=END, logits_processor=[processor(shape)(asked.to(peer.device))]
    )


def _generated(peer: Any, shape: Shape, **options: Any) -> int:
    asked = torch.tensor(prompt_ids(shape), device=peer.device).repeat_interleave(shape.samples, 0)
    with torch.no_grad():
        whole = peer.generate(
            input_ids=asked,
            attention_mask=torch.ones_like(asked),
            do_sample=True,
            temperature=1.0,
            top_k=0,
            top_p=1.0,
            pad_token_id=PAD,
            **options,
        )
    return int((whole[:, shape.prompt :] != PAD).sum())


def shared_training(order: dict[str, Any], shape: Shape) -> dict[str, Any]:
    """Forward and backward over groups whose prompts are twice as long as their completions.

    On a CPU the model knows fewer words: a head of 8,192 would be two fifths of one so small, and of a real one it is a tenth. It is
    computed for completions alone, so that nothing of it is saved.
    """
    lean = replace(shape, vocabulary=min(shape.vocabulary, 2048)) if order["device"] == "cpu" else shape
    groups = made_up(lean, prompt=2 * order["completion"], completion=order["completion"], groups=order["groups"])
    ways = {"shared": (lean.row, True), "packed": (lean.row, False), "alone": (1, False)}  # alone: each a row of its own
    batches = {
        name: lay_out(groups, tokens=tokens, shared=shared, pad=PAD, multiple=8) for name, (tokens, shared) in ways.items()
    }
    with tempfile.TemporaryDirectory() as folder:
        base = Path(order["base"])
        if lean != shape:
            base = Path(folder) / "base"
            make(base, lean)
        with loaded_pupil(order | {"base": str(base), "folder": folder}, lean) as pupil:
            contenders = {name: lambda name=name: _learn(pupil, batches[name]) for name in batches}
            found = turns(order, order["rounds"], contenders)
    return found | {
        "tokens_shared": sum(b.tokens for b in batches["shared"]),
        "tokens_plain": sum(b.tokens for b in batches["packed"]),
    }


def _learn(pupil: Any, batches: Any) -> float:
    total = 0.0
    for batch in batches:
        weight = torch.from_numpy(batch.sample).flatten().to(pupil.model.device).float().cos()
        loss = (pupil.policy_log_probs(batch, 1.0) * weight).sum()
        loss.backward()
        total += float(loss.detach())
    return total


def turns(order: dict[str, Any], rounds: int, contenders: dict[str, Turn]) -> dict[str, Any]:
    """Each contender in turn; the least CPU seconds of all rounds, on a GPU the median of seconds."""
    costs: dict[str, list[float]] = {name: [] for name in contenders}
    results: dict[str, Any] = {}
    for turn in range(rounds + 1):
        for name, work in contenders.items():
            before = clock(order["device"])
            results[name] = work()
            costs[name] += [clock(order["device"]) - before] * bool(turn)  # the first turn warms up
    best = min if order["device"] == "cpu" else statistics.median
    return {"cost": {name: best(all_of) for name, all_of in costs.items()}, "runs": costs, "results": results}


def clock(device: str) -> float:
    return time.process_time() if device == "cpu" else now(device)


def made_up(shape: Shape, *, prompt: int, completion: int, groups: int) -> list[list[Episode]]:
    random = torch.Generator().manual_seed(5)

    def ids(count: int) -> list[int]:
        return torch.randint(3, shape.vocabulary, (count,), generator=random).tolist()

    from ropewalk.train.environment import Generated

    asked = [ids(prompt) for _ in range(groups)]
    zeros = [0.0] * completion
    return [
        [single(one, Generated(ids(completion), zeros, [0] * completion, False), "") for _ in range(shape.samples)]
        for one in asked
    ]


# ---------------------------------------------------------------- what must hold


def check(order: dict[str, Any], shape: Shape) -> dict[str, Any]:
    """On a small model of the same kind in float32."""
    small = replace(shape, **SMALL, dtype="float32")
    with tempfile.TemporaryDirectory() as folder:
        base = Path(folder) / "base"
        make(base, small)
        _sharpen(base)
        here = order | {"base": str(base), "folder": folder}
        with loaded_pupil(here, small) as pupil:
            peer = as_peft(pupil, here, str(Path(folder) / "adapter"))
            return {**_same_ids(pupil, peer, small), **_same_gradients(pupil, small)}


def _sharpen(base: Path) -> None:
    from safetensors.torch import load_file, save_file

    file = base / "model.safetensors"
    tensors = load_file(file)
    tensors["lm_head.weight"] *= SHARP
    save_file(tensors, file, metadata={"format": "pt"})


def _same_ids(pupil: Any, peer: Any, shape: Shape) -> dict[str, Any]:
    generator = Generator(pupil, running=7, longest=512)  # fewer than there are completions
    asked = [ids[: shape.prompt - 5 * number] for number, ids in enumerate(prompt_ids(shape))]
    greedy, sampled = {}, {}
    for number, ids in enumerate(asked):
        generator.submit(f"g{number}", ids, samples=1, max_tokens=20, sampling=Sampling(temperature=0.0), stop_ids=())
        generator.submit(f"s{number}", ids, samples=4, max_tokens=20, sampling=Sampling(0.7, seed=number), stop_ids=())
    while generator.busy:
        for key, sample, generated in generator.step():
            (greedy if key[0] == "g" else sampled)[int(key[1:]), sample] = generated
    equal = 0
    for (number, _), generated in greedy.items():
        ids = torch.tensor([asked[number]], device=peer.device)
        whole = peer.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=20,
            eos_token_id=None,
            pad_token_id=PAD,
        )
        equal += whole[0, ids.shape[1] :].tolist() == generated.ids
    furthest = 0.0
    for (number, _), generated in sampled.items():
        ids = torch.tensor([asked[number] + generated.ids], device=peer.device)
        with torch.no_grad():
            logits = peer(input_ids=ids).logits[0, len(asked[number]) - 1 : -1].float() / 0.7
        true = torch.log_softmax(logits, -1).gather(1, ids[0, len(asked[number]) :, None])[:, 0]
        furthest = max(furthest, float((true.cpu() - torch.tensor(generated.logprobs)).abs().max()))
    return {
        "greedy_ids": {"passed": equal == len(greedy) == len(asked), "equal": equal, "of": len(asked)},
        "log_probs": {"passed": furthest <= 1e-4, "furthest": furthest, "of": 20 * len(sampled)},
    }


def _same_gradients(pupil: Any, shape: Shape) -> dict[str, Any]:
    groups = made_up(shape, prompt=24, completion=12, groups=3)
    found: dict[bool, dict[str, Tensor]] = {}
    for shared in (True, False):
        batches = lay_out(groups, tokens=shape.row, shared=shared, pad=PAD, multiple=8)
        assert any(batch.shared is not None for batch in batches) == shared, "no prompt is shared"
        pupil.model.zero_grad(set_to_none=True)
        for batch in batches:
            weight = torch.tensor([batch.samples[s] for s in batch.sample.flatten()], device=pupil.model.device).float().cos()
            (pupil.policy_log_probs(batch, 0.7) * weight).sum().backward()
        found[shared] = {name: parameter.grad.clone() for name, parameter in pupil.trainable()}
    apart = max(float((found[True][n] - g).norm() / g.norm()) for n, g in found[False].items())
    return {"shared_gradients": {"passed": apart <= 1e-4, "furthest": apart}}


def as_peft(pupil: Any, order: dict[str, Any], folder: str) -> Any:
    """The same base and adapter in transformers and PEFT."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    pupil.save_weights(Path(folder))
    base = AutoModelForCausalLM.from_pretrained(order["base"], dtype=pupil.model.dtype).to(order["device"])
    return PeftModel.from_pretrained(base, folder).eval()
