"""Optimizers and learning-rate schedules by name, as Axolotl's configs name them."""

from __future__ import annotations

import importlib.util
import math
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ropewalk.config.memory import EIGHT_BITS, MASTERED
from ropewalk.errors import ConfigError, MissingExtra
from ropewalk.train.adam import FlatAdamW

Factory = Callable[..., "Optimizer"]


def _torchao(name: str) -> Factory:
    """An optimizer of torchao with state of few bits, imported when it is asked for."""

    def make(groups: Any, **options: Any) -> torch.optim.Optimizer:
        try:
            from torchao import optim as low_bit
        except ImportError:
            raise MissingExtra("torchao", "gpu", f"the optimizer {name} (or set `optimizer: adamw_torch_fused`)") from None
        optimizer: torch.optim.Optimizer = getattr(low_bit, name)(groups, **options)
        return optimizer

    return make


def _without_betas(make: Factory, keep: Sequence[str] = ("lr", "weight_decay")) -> Factory:
    return lambda groups, **options: make(groups, **{k: v for k, v in options.items() if k in keep})


def _sgd(groups: Any, **options: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(groups, lr=options["lr"], weight_decay=options["weight_decay"], momentum=options["betas"][0])


_adamw: Callable[..., torch.optim.Optimizer] = partial(torch.optim.AdamW, fused=True)
_adamw_8bit: Factory = partial(FlatAdamW, few_bits=True)
_adamw_4bit = _torchao("AdamW4bit")


def _adamw_torch_8bit(groups: Any, **options: Any) -> Optimizer:
    """torchao's where it is installed, for float32 on a GPU, for which it compiles a kernel; ours otherwise."""
    fits = all(p.is_cuda and p.dtype == torch.float32 for group in groups for p in group["params"])
    installed = importlib.util.find_spec("torchao") is not None
    return _torchao("AdamW8bit")(groups, **options) if fits and installed else _adamw_8bit(groups, **options)


class Muon:
    """Muon (torch's; Jordan et al. 2024) for the matrices inside the model, AdamW for embeddings, output head, stacks and vectors.

    Both parts behave as one optimizer; they share the groups' rates.
    """

    def __init__(self, matrices: list[dict[str, Any]], others: list[dict[str, Any]], **options: Any) -> None:
        own = {"lr": options["lr"], "weight_decay": options["weight_decay"]}
        self.parts: list[torch.optim.Optimizer] = []
        if matrices:
            self.parts.append(torch.optim.Muon(matrices, **own))
        if others:
            self.parts.append(_adamw(others, **options))

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        return [group for part in self.parts for group in part.param_groups]

    @property
    def state(self) -> dict[Any, Any]:
        return {key: value for part in self.parts for key, value in part.state.items()}

    def step(self) -> None:
        for part in self.parts:
            part.step()

    def zero_grad(self, set_to_none: bool = True) -> None:
        for part in self.parts:
            part.zero_grad(set_to_none)

    def state_dict(self) -> dict[str, Any]:
        return {"parts": [part.state_dict() for part in self.parts]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for part, saved in zip(self.parts, state["parts"]):
            part.load_state_dict(saved)


Optimizer = torch.optim.Optimizer | Muon | FlatAdamW

OPTIMIZERS: dict[str, Factory] = {
    "adamw_torch": _adamw,
    "adamw_torch_fused": _adamw,
    "adamw_hf": _adamw,
    "adamw_8bit": _adamw_8bit,
    "adamw_bnb_8bit": _adamw_8bit,
    "adamw_torch_8bit": _adamw_torch_8bit,
    "paged_adamw_8bit": _adamw_8bit,
    "paged_adamw_32bit": _adamw,
    "adamw_torch_4bit": _adamw_4bit,
    "adafactor": _without_betas(torch.optim.Adafactor),
    "sgd": _sgd,
}


def make_optimizer(
    name: str,
    named: Iterable[tuple[str, nn.Parameter]],
    *,
    lr: float,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    loraplus_ratio: float | None = None,
    embedding_lr: float | None = None,
    master: bool = False,
) -> Optimizer:
    """Groups the parameters (decay or not; LoRA B faster under LoRA+, arXiv 2402.12354) and gives the named optimizer over them.

    master: AdamW keeps parameters of 16 bits in float32 too.
    """
    if name not in OPTIMIZERS and name != "muon":
        raise ConfigError(f"optimizer: '{name}' is not known; one of {', '.join(sorted([*OPTIMIZERS, 'muon']))}")
    groups: dict[tuple[float, float, bool], list[nn.Parameter]] = {}
    for key, parameter in named:
        decay = weight_decay if parameter.dim() > 1 else 0.0
        if loraplus_ratio and "lora_embedding_B" in key:
            rate = embedding_lr or lr
        else:
            rate = lr * loraplus_ratio if loraplus_ratio and "lora_B" in key else lr
        matrix = name == "muon" and parameter.dim() == 2 and not re.search(r"embed|lm_head|wte|wpe", key)
        groups.setdefault((rate, decay, matrix), []).append(parameter)
    tables: dict[bool, list[dict[str, Any]]] = {True: [], False: []}
    for (rate, decay, matrix), parameters in groups.items():
        tables[matrix].append({"params": parameters, "lr": rate, "weight_decay": decay})
    options: dict[str, Any] = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
    optimizer: Optimizer
    if name == "muon":
        optimizer = Muon(tables[True], tables[False], **options)
    elif master:
        assert name in MASTERED, "refused with the configuration"
        optimizer = FlatAdamW(tables[False], few_bits=name in EIGHT_BITS, master=True, **options)
    else:
        optimizer = OPTIMIZERS[name](tables[False], **options)
    for group in optimizer.param_groups:
        group["full_lr"] = float(group["lr"])
    return optimizer


def remarks(name: str, optimizer: Optimizer, *, master: bool) -> Iterator[str]:
    """What a reader of the name alone would not know."""
    ours = isinstance(optimizer, FlatAdamW)
    if name == "adamw_torch_8bit":
        yield f"optimizer {name} is {'our own, as adamw_8bit is' if ours else 'that of the installed torchao'}"
    if master and isinstance(optimizer, FlatAdamW) and all(lane.master is None for lane in optimizer.lanes):
        yield "float32_master has nothing to do: what is trained is in float32"


def set_rate(optimizer: Optimizer, factor: float) -> None:
    """Sets every group to its full rate times `factor`."""
    for group in optimizer.param_groups:
        rate = group["full_lr"] * factor
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(rate)
        else:
            group["lr"] = rate


def clip(parameters: Sequence[nn.Parameter], limit: float | None) -> float:
    """The 2-norm of all gradients together, which are scaled down to `limit` where they exceed it (no limit: only measured)."""
    gradients = [p.grad for p in parameters if p.grad is not None]
    norm = nn.utils.get_total_norm(gradients, foreach=True) if gradients else torch.zeros(())
    if limit:
        nn.utils.clip_grads_with_norm_(parameters, limit, norm, foreach=True)
    return float(norm)


def rate_factor(
    kind: str, step: int, total: int, warmup: int, *, floor: float = 0.0, constant_share: float = 0.0, decay_share: float = 0.2
) -> float:
    """The share of the full rate at a step (0-based) of `total`; warm-up counts from 1/warmup: no step is spent at rate zero.

    `floor` is the share that cosine and rex end at; `constant_share`: cosine has reached its floor at that share of the steps
    and stays there; `decay_share` is the share of the steps in which warmup_stable_decay falls.
    """
    if step < warmup:
        return (step + 1) / warmup
    if kind in ("constant", "constant_with_warmup"):
        return 1.0
    end = max(warmup + 1, int(total * constant_share)) if constant_share and kind == "cosine" else total
    start = max(warmup, total - math.ceil(total * decay_share)) if kind == "warmup_stable_decay" else warmup
    done = min(1.0, max(0.0, (step - start) / max(1, end - start)))
    if kind == "cosine":
        return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * done))
    if kind in ("linear", "warmup_stable_decay"):
        return 1 - done
    if kind == "rex":  # arXiv 2107.04197
        return floor + (1 - floor) * (1 - done) / (1 - done / 2)
    raise ConfigError(f"lr_scheduler: '{kind}' is not known")
