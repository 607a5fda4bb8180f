"""One expert layer forward and backward, by every contender, over the same weights, factors, routing and gradient that comes in.

Each is first compared with the plain layer in float32, in its result and in every gradient; who is too far off is not timed.
Legend: T tokens, S = T*k routed rows, E experts, H hidden, I expert intermediate, r rank. Factors lie as PEFT lays them out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ropewalk.bench.contenders import FOUR_BITS, ONCE, OURS, PRODUCTS, Entrant
from ropewalk.bench.cost import Ceiling, ceiling, memory, milliseconds
from ropewalk.bench.peers import FUSED, PROJECTIONS, experts_module, with_peft
from ropewalk.bench.shapes import Layer
from ropewalk.kernels.expert_lora import Experts, Factors, expert_lora, expert_lora_plain
from ropewalk.kernels.gates import Glu
from ropewalk.kernels.quant import FORMATS

GATES = {"silu": "silu", "gelu_pytorch_tanh": "gelu_tanh"}
SCALE = 2.0
TOO_FAR = {"float32": 1e-5, "bfloat16": 2e-2}  # the norm of the difference beside the norm
UNEVEN = 0.5  # how far experts' popularity differs, as a trained router's does
FEW = 3  # rounds of who is so slow that more show nothing
SETS = 2  # of weights on a GPU, taken in turns, so that none is found in its cache


@dataclass(frozen=True)
class Row:
    """What one contender did with one layer."""

    shape: str
    dtype: str
    stored: str  # "" or the format of the frozen stacks
    tokens: int
    contender: str
    policy: str
    max_error: float | None = None
    ms: float | None = None
    held_mb: float | None = None
    peak_mb: float | None = None
    share_of_ceiling: float | None = None
    note: str = ""


class Block:
    """Weights, factors and a batch of one layer."""

    def __init__(self, shape: Layer, tokens: int, dtype: torch.dtype, device: str, stored: str = "", seed: int = 0) -> None:
        self.shape, self.tokens, self.device, self.stored = shape, tokens, device, stored
        generator = torch.Generator(device).manual_seed(seed)

        def normal(*size: int, spread: float) -> Tensor:
            return torch.randn(*size, generator=generator, device=device).mul_(spread).to(dtype)

        e, h, i, r = shape.experts, shape.hidden, shape.inner, shape.rank
        self.up, self.down = normal(e, 2 * i, h, spread=h**-0.5), normal(e, h, i, spread=i**-0.5)
        self.kept: Any = [FORMATS[stored].of(stack) if stored else stack for stack in (self.up, self.down)]
        if stored:
            self.up, self.down = (stack.dequantize(dtype) for stack in self.kept)
        self.factors = [
            normal(e * r, h, spread=h**-0.5), normal(2 * i, r * e, spread=0.05),
            normal(e * r, i, spread=i**-0.5), normal(h, r * e, spread=0.05),
        ]  # fmt: skip
        self.x, self.d_out = normal(tokens, h, spread=1.0), normal(tokens, h, spread=tokens**-0.5)
        popular = UNEVEN * torch.randn(e, generator=generator, device=device)
        likely = torch.softmax(torch.randn(tokens, e, generator=generator, device=device) + popular, -1)
        weights, self.ids = likely.topk(shape.topk, -1)
        self.weights = (weights / weights.sum(-1, keepdim=True)).to(dtype)

    @property
    def gate(self) -> Glu:
        return Glu(GATES[self.shape.activation])

    def truth(self) -> list[Tensor]:
        """Result and gradients of the plain layer in float32."""
        e, r = self.shape.experts, self.shape.rank
        experts = Experts(self.up.float(), self.down.float(), self.gate)
        wide = [f.detach().float().requires_grad_() for f in self.factors]
        up, down = (Factors(_a(a, e), _b(b, r, e), SCALE) for a, b in (wide[:2], wide[2:]))
        return self._through(lambda x, ids, w: expert_lora_plain(x, ids, w, experts, up, down), wide, torch.float32)

    def contender(self, entrant: Entrant) -> tuple[Callable[[Tensor, Tensor, Tensor], Tensor], list[Tensor], bool]:
        """What computes, its factors, and whether those are laid out expert by expert."""
        if entrant.name in (OURS, PRODUCTS):
            e, r = self.shape.experts, self.shape.rank
            laid = [_a(self.factors[0], e), _b(self.factors[1], r, e), _a(self.factors[2], e), _b(self.factors[3], r, e)]
            own = [f.detach().clone().requires_grad_() for f in laid]
            kept_up, kept_down = self.kept
            experts = Experts(kept_up, kept_down, self.gate, recompute=entrant.policy == "experts")
            up, down = Factors(own[0], own[1], SCALE), Factors(own[2], own[3], SCALE)
            how = "grouped" if entrant.name == PRODUCTS else None
            return _again(entrant, lambda x, ids, w: expert_lora(x, ids, w, experts, up, down, rows=how)), own, True
        implementation = "eager" if entrant.name == "eager" else "grouped_mm"
        module = experts_module(self.up, self.down, self.shape.activation, self.shape.topk, implementation)
        if entrant.name in FUSED:
            own = [f.detach().clone().requires_grad_() for f in self.factors]
            fused = FUSED[entrant.name](module, SCALE)
            if self.stored:
                fused = self._dequantised(module, fused)
            return _again(entrant, lambda x, ids, w: fused(x, ids, w, own)), own, False
        compute, own = with_peft(module, self.factors, SCALE)
        return _again(entrant, compute), own, False

    def _dequantised(self, module: Any, fused: Any) -> Any:
        """A peer's kernels over stacks dequantised anew in each pass, which is what those do that come with them; by our kernel for it."""

        def compute(x: Tensor, ids: Tensor, weights: Tensor, own: list[Tensor]) -> Tensor:
            for name, kept in zip(PROJECTIONS, self.kept):
                module._parameters[name] = nn.Parameter(kept.dequantize(x.dtype), requires_grad=False)
            made: Tensor = fused(x, ids, weights, own)
            for name, whole in zip(PROJECTIONS, (self.up, self.down)):  # what the backward pass needs, autograd keeps
                module._parameters[name] = nn.Parameter(whole, requires_grad=False)
            return made

        return compute

    def forward(self, compute: Callable[..., Tensor]) -> Tensor:
        """With gradients wanted of the input and of the routing's weights, as within a model."""
        x, weights = (t.detach().requires_grad_() for t in (self.x, self.weights))
        return compute(x, self.ids, weights)

    def result(self, compute: Callable[..., Tensor], own: list[Tensor], by_expert: bool) -> list[Tensor]:
        """Result and gradients, factors' as PEFT lays them out."""
        found = self._through(compute, own, self.x.dtype)
        if by_expert:
            found[3:] = [g.flatten(0, 1) if n % 2 == 0 else g.permute(1, 2, 0).flatten(1) for n, g in enumerate(found[3:])]
        return found

    def _through(self, compute: Callable[..., Tensor], own: list[Tensor], dtype: torch.dtype) -> list[Tensor]:
        x, weights = (t.detach().to(dtype).requires_grad_() for t in (self.x, self.weights))
        out = compute(x, self.ids, weights)
        return [out.detach(), *torch.autograd.grad(out, (x, weights, *own), self.d_out.to(dtype))]

    def floor(self, limit: Ceiling) -> float:
        """The least milliseconds: operations counted once, and frozen stacks read once each way."""
        s, h, i, r = self.tokens * self.shape.topk, self.shape.hidden, self.shape.inner, self.shape.rank
        base, lora = 6.0 * s * h * i, 2.0 * s * r * (2 * h + 3 * i)
        size = float(sum(stack.nbytes for stack in self.kept))
        return limit.milliseconds([(base + lora, size), (base + 2 * lora, size)])


def race(
    shape: Layer, tokens: int, dtype: str, device: str, entrants: list[Entrant], rounds: int, stored: str = ""
) -> Iterator[Row]:
    """One row for each contender."""
    kind = getattr(torch, dtype)
    blocks = [Block(shape, tokens, kind, device, stored, seed) for seed in range(SETS if device == "cuda" else 1)]
    truth, floor = blocks[0].truth(), blocks[0].floor(ceiling(kind, device))
    rows: dict[Entrant, dict[str, Any]] = {}
    ready: dict[Entrant, list[tuple[Callable[..., Tensor], list[Tensor], bool]]] = {}
    for entrant in entrants:
        row = rows[entrant] = {"contender": entrant.name, "policy": entrant.policy}
        if stored and entrant.name in FOUR_BITS:
            row["note"] = FOUR_BITS[entrant.name]
            continue
        try:
            made = [block.contender(entrant) for block in blocks]
            found: list[list[Tensor]] = []
            once = milliseconds(lambda made=made, found=found: found.append(blocks[0].result(*made[0])), device)  # type: ignore[misc]
            row["max_error"] = max(float((f.float() - t).norm() / t.norm()) for f, t in zip(found[0], truth, strict=True))
            row.update(_kept(blocks[0], made[0], device))
        except Exception as error:  # the others go on
            row["note"] = f"{type(error).__name__}: {error}"[:200]
            if isinstance(error, torch.AcceleratorError):
                break  # the device answers nothing any more
            continue
        if not row["max_error"] <= TOO_FAR[dtype]:
            row["note"] = "wrong, and not timed"
        elif device == "cpu" and entrant.name == ONCE:
            row["ms"], row["note"] = once, "once"
        else:
            ready[entrant] = made
            if stored and entrant.name in FUSED:
                row["note"] = "over stacks that our kernel dequantises in each pass"
    for entrant, ms in _turns(blocks, ready, rounds, device).items():
        rows[entrant]["ms"] = ms
    for row in rows.values():
        if row.get("ms"):
            row["share_of_ceiling"] = floor / row["ms"]
        yield Row(shape.name, dtype, stored, tokens, **row)


def _turns(blocks: list[Block], ready: dict[Entrant, Any], rounds: int, device: str) -> dict[Entrant, float]:
    """Everybody in turns, in another order each round: the least on a CPU, the median on a GPU."""
    took: dict[Entrant, list[float]] = {entrant: [] for entrant in ready}
    order = list(ready)
    if not order:
        return {}
    for turn in range(rounds + 1):
        for entrant in order[turn % len(order) :] + order[: turn % len(order)]:
            if entrant.name == ONCE and turn > FEW:
                continue
            block, (compute, own, _) = blocks[turn % len(blocks)], ready[entrant][turn % len(blocks)]

            def step(block: Block = block, compute: Any = compute, own: Any = own) -> None:
                block.forward(compute).backward(block.d_out)  # type: ignore[no-untyped-call]
                for factor in own:
                    factor.grad = None

            spent = milliseconds(step, device)
            if turn:  # the first warms up
                took[entrant].append(spent)
    return {e: min(t) if device == "cpu" else sorted(t)[len(t) // 2] for e, t in took.items() if t}


def _kept(block: Block, made: Any, device: str) -> dict[str, float]:
    compute, own, _ = made
    found = memory(lambda: block.forward(compute), lambda out: out.backward(block.d_out), device)  # type: ignore[no-untyped-call]
    for factor in own:
        factor.grad = None
    result = block.d_out.nbytes  # what comes out is nobody's to avoid
    return {"held_mb": (found.held - result) / 1e6, "peak_mb": (found.peak - result) / 1e6}


def _again(entrant: Entrant, compute: Callable[..., Tensor]) -> Callable[..., Tensor]:
    if entrant.policy not in ("layer", "offload"):
        return compute
    return lambda *given: checkpoint(compute, *given, use_reentrant=False, preserve_rng_state=False)


def _a(flat: Tensor, experts: int) -> Tensor:
    """[E r, in] -> [E, r, in]."""
    return flat.view(experts, -1, flat.shape[1])


def _b(flat: Tensor, rank: int, experts: int) -> Tensor:
    """[out, r E] -> [E, out, r]."""
    return flat.view(-1, rank, experts).permute(2, 0, 1)
