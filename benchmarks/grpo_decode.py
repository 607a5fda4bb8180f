"""Decoding a full batch with LoRA on attention and experts beside decoding with the base alone: ours, and transformers with PEFT.

Imported by grpo_ours.py in a process of its own. All four have read the same prompts and write on together, a few ids at a time in
turns, so that every turn with the adapter has one without it beside it; what is told is the median of those pairs. In float32 the
log-probabilities of what ours has written with the adapter are held to one forward pass of PEFT's model.
"""

from __future__ import annotations

import statistics
import tempfile
from types import SimpleNamespace
from typing import Any, Protocol

import torch

from grpo_ours import loaded_pupil
from grpo_rollouts import as_peft, clock
from peers.grpo_assets import Shape, prompt_ids
from ropewalk.engine.request import Sampling
from ropewalk.train.generator import Generator

IDS = 16  # of a turn, for each sequence
BEFORE = 4  # steps that read the prompts and warm up
FIRST = "0"  # the request that is compared with PEFT
AGREES = 1e-4


class Decoding(Protocol):
    """A batch under way."""

    def step(self) -> None: ...


class Ours:
    """The engine as training by rewards has it, every slot taken."""

    def __init__(self, pupil: Any, shape: Shape, ids: int) -> None:
        self.generator = Generator(pupil, running=shape.completions, longest=shape.prompt + ids + 1)
        self.first: Any = None  # what the first sample of the first request came to
        for number, asked in enumerate(prompt_ids(shape)):
            sampling = Sampling(seed=number)
            self.generator.submit(str(number), asked, samples=shape.samples, max_tokens=ids, sampling=sampling, stop_ids=())

    def step(self) -> None:
        for key, sample, generated in self.generator.step():
            if (key, sample) == (FIRST, 0):
                self.first = generated


class Peer:
    """A plain loop over a model of transformers, with its own cache."""

    def __init__(self, model: Any, shape: Shape) -> None:
        self.model, self.random = model, torch.Generator(device=model.device).manual_seed(0)
        self.cache: Any = None
        self.ids = torch.tensor(prompt_ids(shape), device=model.device).repeat_interleave(shape.samples, 0)

    @torch.no_grad()
    def step(self) -> None:
        found = self.model(input_ids=self.ids, past_key_values=self.cache, use_cache=True, logits_to_keep=1)
        self.cache = found.past_key_values
        self.ids = torch.multinomial(found.logits[:, -1].float().softmax(-1), 1, generator=self.random)


def measure_decode(order: dict[str, Any], shape: Shape) -> dict[str, Any]:
    from transformers import AutoModelForCausalLM

    turns = order["turns"]
    ids = BEFORE + (turns + 1) * IDS
    with loaded_pupil(order | {"experts": True}, shape) as pupil, tempfile.TemporaryDirectory() as folder:
        peer = as_peft(pupil, order, folder)
        alone = AutoModelForCausalLM.from_pretrained(order["base"], dtype=pupil.model.dtype).to(order["device"]).eval()
        ours = Ours(pupil, shape, ids)
        everybody: dict[str, Decoding] = {
            "ours": ours,
            "base": without_adapter(pupil, shape, ids),
            "peft": Peer(peer, shape),
            "transformers": Peer(alone, shape),
        }
        costs = in_turns(everybody, turns, order["device"])
        while ours.generator.busy:
            ours.step()
        apart = furthest(peer, prompt_ids(shape)[0], ours.first)
    exact = shape.dtype == "float32"
    return {
        "expert_lora_decode": paired(costs["ours"], costs["base"]),
        "peft_expert_lora_decode": paired(costs["peft"], costs["transformers"]),
        "cost": {name: statistics.median(turns) / IDS for name, turns in costs.items()},  # of an id for every sequence
        "runs": costs,
        "sequences": shape.completions,
        "gates": {"expert_log_probs": {"passed": apart <= AGREES, "furthest": apart}} if exact else {},
        "furthest": apart,
    }


def without_adapter(pupil: Any, shape: Shape, ids: int) -> Ours:
    """The same engine over the same weights, and nothing put into its layers."""
    pupil.adapter.detach()
    try:
        return Ours(SimpleNamespace(model=pupil.model, adapter=None, config=pupil.config), shape, ids)
    finally:
        pupil.adapter.reattach()


def in_turns(everybody: dict[str, Decoding], turns: int, device: str) -> dict[str, list[float]]:
    """The cost of every turn of each; the first warms up and is left out.

    Every other turn goes the other way round, since who shares weights with the one before finds them in the caches.
    """
    for one in everybody.values():
        for _ in range(BEFORE):
            one.step()
    costs: dict[str, list[float]] = {name: [] for name in everybody}
    for turn in range(turns + 1):
        for name, one in list(everybody.items())[:: -1 if turn % 2 else 1]:
            before = clock(device)
            for _ in range(IDS):
                one.step()
            costs[name] += [clock(device) - before] * bool(turn)
    return costs


def paired(dear: list[float], cheap: list[float]) -> float:
    return statistics.median(one / other for one, other in zip(dear, cheap))


@torch.no_grad()
def furthest(peer: Any, prompt: list[int], written: Any) -> float:
    """By how much a log-probability that came with an id differs from one forward pass over the whole."""
    ids = torch.tensor([[*prompt, *written.ids]], device=peer.device)
    logits = peer(input_ids=ids).logits[0, len(prompt) - 1 : -1].float()
    true = torch.log_softmax(logits, -1).gather(1, ids[0, len(prompt) :, None])[:, 0]
    return float((true.cpu() - torch.tensor(written.logprobs)).abs().max())
