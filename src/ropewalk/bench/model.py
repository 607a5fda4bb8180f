"""One model under training by every contender: the same weights, targets, ranks and first values; a step is forward, loss, backward, AdamW.

Attention is transformers' own for everybody. So is the loss on a CPU; on a GPU, where logits of such vocabularies in float32 would not fit,
everybody but "liger" has ours, which goes by pieces, so that what differs is the experts. Ours has besides its experts and LoRA what
`ropewalk train` does to any model: norms that keep less, rotary positions in one pass, and on a CPU memory that is kept
between steps.
Legend: T tokens, E experts, k experts per token, H hidden, V vocabulary, r rank.
"""

from __future__ import annotations

import gc
import json
import sys
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, Qwen3MoeConfig

from ropewalk.bench.contenders import OURS, Entrant
from ropewalk.bench.cost import Ceiling, ceiling, memory, milliseconds
from ropewalk.bench.peers import FUSED, PROJECTIONS, fused_in_model, with_liger
from ropewalk.bench.shapes import Model
from ropewalk.kernels.quant import FORMATS
from ropewalk.models.adapter_folder import from_disk, to_disk
from ropewalk.models.experts import LORA, expert_modules, register_experts, stack_sizes
from ropewalk.models.head import output_head
from ropewalk.models.host_memory import keep_freed
from ropewalk.models.lora import LoraSpec, attach
from ropewalk.models.norms import lean_norms
from ropewalk.models.quantized import replace, to_quantise
from ropewalk.models.recompute import Way, recompute
from ropewalk.models.rotary import lean_rotary
from ropewalk.models.shapes import SHAPES

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
ALPHA = 2  # times the rank
CHECKED = 64  # tokens over which gradients are compared before a step is timed
WARM, STEPS, FEWEST = 3, 20, 5  # steps of a model that is alone: before the first that counts, at most, and at least
SPREAD = 0.1  # of a router's weights: a trained one spreads its tokens, a fresh one is nearly even


def config_of(shape: Model) -> Any:
    """transformers' configuration of it."""
    if not shape.published:
        return Qwen3MoeConfig(
            vocab_size=shape.vocab, hidden_size=shape.hidden, intermediate_size=4 * shape.hidden, num_hidden_layers=shape.layers,
            num_attention_heads=8, num_key_value_heads=2, head_dim=shape.hidden // 8, num_experts=shape.experts,
            num_experts_per_tok=shape.topk, moe_intermediate_size=shape.inner, norm_topk_prob=True, mlp_only_layers=[],
            max_position_embeddings=shape.length, use_cache=False,
        )  # fmt: skip
    given = json.loads((SHAPES / shape.published / "config.json").read_text(encoding="utf-8"))
    given |= {"num_hidden_layers": shape.layers, "use_cache": False}
    if types := given.get("layer_types"):
        given["layer_types"] = types[: shape.layers - 1] + types[-1:]  # the last attends to everything, as in the whole
    return CONFIG_MAPPING[given["model_type"]](**given)


class Racer:
    """A contender's model and its trained tensors, by the names of models/lora.py."""

    def __init__(self, shape: Model, entrant: Entrant, dtype: str, device: str, stored: str = "") -> None:
        self.shape, self.entrant, self.device = shape, entrant, device
        config = config_of(shape)
        if entrant.name == "liger":
            with_liger(config.model_type.removesuffix("_text"))
        torch.manual_seed(0)
        implementation = "eager" if entrant.name in (OURS, "eager") else "grouped_mm"
        with torch.device(device):
            self.model: Any = AutoModelForCausalLM.from_config(
                config, experts_implementation=implementation, attn_implementation="sdpa", dtype=getattr(torch, dtype)
            )
        for name, parameter in self.model.named_parameters():
            if name.endswith(("mlp.gate.weight", "router.proj.weight")):
                nn.init.normal_(parameter, std=SPREAD)
        self.model.train().requires_grad_(False)
        if stored:
            for name in to_quantise(self.model):
                replace(self.model, name, FORMATS[stored].of(self.model.get_parameter(name)))
        self._head = output_head(self.model) if device == "cuda" and entrant.name != "liger" else None
        self.trained = self._adapted()
        _fill(self.trained)
        self._policy()
        ids = torch.randint(0, config.vocab_size, (shape.rows, shape.length), generator=torch.Generator().manual_seed(1))
        self.ids = ids.to(device)
        few = min(CHECKED, shape.length)
        self.checked = torch.randint(0, config.vocab_size, (1, few), generator=torch.Generator().manual_seed(2)).to(device)
        self._optimizer = torch.optim.AdamW(self.trained.values(), lr=1e-5, fused=True)

    def _adapted(self) -> dict[str, Tensor]:
        rank = self.shape.rank
        if self.entrant.name == OURS:
            register_experts()
            lean_norms(self.model)
            lean_rotary(self.model)
            if self.device == "cpu":
                keep_freed()
            spec = LoraSpec(rank, ALPHA * rank, target_modules=ATTENTION, target_linear=False)
            return dict(attach(self.model, spec, 0).named_parameters())
        if self.entrant.name in FUSED:
            made = fused_in_model(self.entrant.name, self.model, rank, ALPHA)
            return {**_peft(self.model, rank, experts=False), **{n: p.requires_grad_() for n, p in made.items()}}
        return _peft(self.model, rank, experts=True)

    def _policy(self) -> None:
        way: Any = self.entrant.policy
        if self.entrant.name == OURS:
            chosen: Way = way
            recompute(self.model, chosen)
        elif way == "layer":
            self.model.gradient_checkpointing_enable({"use_reentrant": False})
        else:
            assert way == "keep", f"{self.entrant.name} has no policy {way}"

    def loss(self, ids: Tensor | None = None) -> Tensor:
        ids = self.ids if ids is None else ids
        if self._head is None:
            made: Tensor = self.model(input_ids=ids, labels=ids).loss
            return made
        total, count = self._head.loss(self.model, ids, ids)
        return total / count

    def step(self) -> None:
        self.loss().backward()  # type: ignore[no-untyped-call]
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)

    def milliseconds(self) -> float:
        return milliseconds(self.step, self.device)

    def kept(self) -> dict[str, float]:
        """Megabytes. On a GPU, what waits on the host is what the same layers would keep on the device."""
        found = memory(self.loss, lambda loss: loss.backward(), self.device)  # type: ignore[no-untyped-call]
        self._optimizer.zero_grad(set_to_none=True)
        held, peak = found.held, found.peak
        if self.device == "cuda" and self.entrant.policy == "offload":
            host = (
                self.shape.layers
                * self.ids.numel()
                * int(self.model.config.get_text_config().hidden_size)
                * self.model.dtype.itemsize
            )
            held, peak = held + host, peak + host
        return {"held_mb": held / 1e6, "peak_mb": peak / 1e6}

    def timed(self, seconds: float) -> list[float]:
        """Milliseconds of each step, of as many as the time allows."""
        for _ in range(WARM):
            self.milliseconds()
        found: list[float] = []
        end = time.monotonic() + seconds
        while len(found) < FEWEST or (len(found) < STEPS and time.monotonic() < end):
            found.append(self.milliseconds())
        return found

    def gradients(self, ids: Tensor | None = None) -> dict[str, Tensor]:
        """Of every factor, as PEFT lays it out on disk."""
        self.loss(ids).backward()  # type: ignore[no-untyped-call]
        found = {name: to_disk(name, p.grad).cpu() for name, p in self.trained.items() if p.grad is not None}
        self._optimizer.zero_grad(set_to_none=True)
        return found

    def error(self, truth: str) -> float:
        """How far the gradients are from those in that file: the largest of the factors', and of experts' the one in their middle.

        A token that is nearly undecided goes elsewhere where something rounds otherwise, and few experts are then far off.
        """
        truths = torch.load(truth, weights_only=True)
        experts = max(stack_sizes(m, PROJECTIONS[0])[0] for _, m in expert_modules(self.model))
        return max(
            _apart_in_the_middle(name, g.float(), truths[name], experts) for name, g in self.gradients(self.checked).items()
        )

    def floor(self, limit: Ceiling) -> float:
        """The least milliseconds of a step: operations counted once, frozen weights read once each way; no dW, nothing again."""
        tokens, linear, size = self.ids.numel(), 0.0, 0
        for name, module in self.model.named_modules():
            if isinstance(module, nn.Linear) and "lora" not in name and LORA not in name:
                linear += 2.0 * module.in_features * module.out_features
                size += _bytes(module.weight)
        for _, module in expert_modules(self.model):
            topk = _topk(self.model)
            for projection in PROJECTIONS:
                experts, inputs, outputs = stack_sizes(module, projection)
                linear += 2.0 * topk * inputs * outputs
                size += _bytes(getattr(module, projection))
        experts = max((stack_sizes(m, PROJECTIONS[0])[0] for _, m in expert_modules(self.model)), default=1)
        lora = sum(
            2.0 * p.numel() * (_topk(self.model) / experts if "experts" in name else 1) for name, p in self.trained.items()
        )
        seen = self._seen()
        return limit.milliseconds(
            [(tokens * (linear + lora + seen), float(size)), (tokens * (linear + 2 * lora + 2.5 * seen), float(size))]
        )

    def _seen(self) -> float:
        """Operations of attention for a token, as many keys as it sees on average."""
        config = self.model.config.get_text_config()
        length, types = self.shape.length, getattr(config, "layer_types", None) or []
        found = 0.0
        for number in range(self.shape.layers):
            sliding = len(types) > number and types[number] == "sliding_attention"
            window = min(length, int(config.sliding_window)) if sliding else length
            size = getattr(config, "global_head_dim", None) if not sliding else None
            keys = window - window * (window - 1) / (2 * length)  # the first see fewer
            found += 4.0 * config.num_attention_heads * int(size or config.head_dim) * keys
        return found


def _topk(model: Any) -> int:
    config = model.config.get_text_config()
    return int(getattr(config, "num_experts_per_tok", None) or config.top_k_experts)


def _bytes(weight: Any) -> int:
    return int(weight.nbytes)


def _peft(model: Any, rank: int, *, experts: bool) -> dict[str, Tensor]:
    """The model under PEFT, with factors in float32 as it makes them -> those, by our names."""
    from peft import LoraConfig, get_peft_model

    parameters = [f"experts.{p}" for p in PROJECTIONS] if experts else None
    config = LoraConfig(r=rank, lora_alpha=ALPHA * rank, target_modules=list(ATTENTION), target_parameters=parameters)
    trained: dict[str, Tensor] = {}
    for name, parameter in get_peft_model(model, config).named_parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
            name = name.removeprefix("base_model.model.").replace(".default.weight", "")
            name = name.replace("experts.base_layer.lora", "experts.gate_up_proj.lora")
            trained[name.replace("experts.lora", "experts.down_proj.lora")] = parameter
    return trained


def _fill(trained: dict[str, Tensor]) -> None:
    """The same values for everybody: PEFT's layout is filled, ours is what `from_disk` makes of it."""
    for name, parameter in trained.items():
        flat = to_disk(name, parameter.detach())
        generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
        values = torch.randn(flat.shape, generator=generator) * 0.02
        parameter.data.copy_(from_disk(name, values, parameter))


def errors(shape: Model, names: list[str], dtype: str, device: str) -> tuple[dict[str, float], dict[str, str]]:
    """The largest difference of any factor's gradient from the plain model's, beside its norm, for each contender; and who fails, and why.

    The plain model is the eager one under PEFT; where there is no PEFT, ours computed expert by expert with the delta written out.
    """
    truth = (
        plain_gradients(shape, device)
        if "eager" not in names
        else Racer(shape, Entrant("eager"), "float32", device).gradients()
    )
    found, failed = {}, {}
    for name in names:
        if name == "eager":
            continue
        try:
            found[name] = _apart(Racer(shape, Entrant(name), dtype, device).gradients(), truth)
        except Exception as error:
            if name == OURS or isinstance(error, torch.AcceleratorError):
                raise
            failed[name] = f"{type(error).__name__}: {error}"[:200]
    return found, failed


def _apart(found: dict[str, Tensor], truth: dict[str, Tensor]) -> float:
    return max(float((found[name].float() - t).norm() / t.norm()) for name, t in truth.items())


def _apart_in_the_middle(name: str, found: Tensor, truth: Tensor, experts: int) -> float:
    """The norm of the difference beside the norm; of factors of experts, the median over those that have any."""
    if "experts" not in name:
        found, truth = found[None], truth[None]
    elif name.endswith("lora_A"):
        found, truth = (t.view(experts, -1, t.shape[1]) for t in (found, truth))
    else:
        found, truth = (t.view(len(t), -1, experts).permute(2, 0, 1) for t in (found, truth))
    size = truth.flatten(1).norm(dim=1)
    apart = (found - truth).flatten(1).norm(dim=1)
    return float((apart / size)[size > 0].median())


def write_truth(shape: Model, dtype: str, device: str, stored: str, file: str) -> None:
    """The gradients of the plain model in float32, of the weights as they are in this dtype and format, into a file."""
    with _plain():
        racer = Racer(shape, Entrant(OURS), dtype, device, stored)
        racer.model.float()
        torch.save(racer.gradients(racer.checked), file)


def plain_gradients(shape: Model, device: str) -> dict[str, Tensor]:
    """By `expert_lora_plain` and autograd."""
    with _plain():
        return Racer(shape, Entrant(OURS), "float32", device).gradients()


@contextmanager
def _plain() -> Iterator[None]:
    """Within it experts are computed by `expert_lora_plain` and autograd."""
    from unittest import mock

    from ropewalk.kernels.expert_lora import expert_lora_plain

    with mock.patch("ropewalk.models.experts.expert_lora", expert_lora_plain):
        yield


def serve(
    shape: Model, entrant: Entrant, dtype: str, device: str, stored: str, truth: str, asked: Any, tell: Callable[[Any], None]
) -> None:
    """Answers one request a line: what a step costs, and once what it keeps and how far it is from the truth."""
    racer = Racer(shape, entrant, dtype, device, stored)
    error = racer.error(truth)
    tell({"ready": True})
    for line in asked:
        if line.strip() == "kept":
            tell({**_beside(racer, dtype), "max_error": error})
        else:
            tell({"ms": [racer.milliseconds()]})


def one_by_one(
    races: Sequence[tuple[Model, str, str, str]],
    entrants: Sequence[Entrant],
    device: str,
    seconds: float,
    tell: Callable[[Any], None],
) -> None:
    """Each model under each policy by one contender, held alone on the device; one that fails is told with its reason."""
    for number, (shape, dtype, stored, truth) in enumerate(races):
        for entrant in entrants:
            found: dict[str, Any] = {}
            try:
                racer = Racer(shape, entrant, dtype, device, stored)
                found["max_error"] = racer.error(truth) if Path(truth).exists() else None
                found["ms"] = racer.timed(
                    seconds
                )  # before memory is looked at, which a kernel's search for its tiling would fill
                found |= _beside(racer, dtype)
            except Exception as error:
                print(f"{entrant}: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
                found["note"] = f"{type(error).__name__}: {error}"[:200]
                if isinstance(error, torch.AcceleratorError):
                    tell({"race": number, "policy": entrant.policy, **found})
                    raise
            racer = None  # type: ignore[assignment]  # before the next is made
            gc.collect()
            torch.cuda.empty_cache()
            tell({"race": number, "policy": entrant.policy, **found})


def _beside(racer: Racer, dtype: str) -> dict[str, float]:
    return {**racer.kept(), "floor_ms": racer.floor(ceiling(getattr(torch, dtype), racer.device))}
