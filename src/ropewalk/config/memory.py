"""The keys that a run trades memory with, apart from what is computed again: the base in few bits, the optimizer's state, gradients."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from ropewalk.config.keys import Group, key

if TYPE_CHECKING:
    from collections.abc import Iterator

    from ropewalk.config.document import Place
    from ropewalk.config.run import Run

EIGHT_BITS = ("adamw_8bit", "adamw_bnb_8bit", "adamw_torch_8bit", "paged_adamw_8bit")
MASTERED = frozenset(("adamw_torch", "adamw_torch_fused", "adamw_hf", "paged_adamw_32bit", *EIGHT_BITS))


class MemoryKeys(Group):
    """Memory"""

    bnb_4bit_quant_type: Literal["nf4", "int4"] | None = key(
        "What 4 bits stand for: nf4, the levels of a normal distribution in blocks of 64 (4.13 bits a weight, the default), or own: "
        "int4, even steps in blocks of 32 (4.26 bits)."
    )
    peft_autocast_adapter_dtype: bool = key(
        "Keep the adapter's factors in float32; off: in the type that is computed in, which takes half of it.", True
    )
    float32_master: bool = key(
        "Own: AdamW keeps what is trained in 16 bits in float32 too, and rounds it from there. Off: 8-bit AdamW rounds stochastically, "
        "the others to the nearest.",
        False,
    )
    step_in_backward: bool = key(
        "Own: use each gradient as soon as it is there and let go of it, so that they are never held together; needs max_grad_norm: 0 "
        "and one forward pass per step.",
        False,
    )


def conflicts_of_memory(run: Run) -> Iterator[tuple[Place, str]]:
    """Where the keys of this page contradict each other or the rest."""
    if run.bnb_4bit_quant_type and run.quantization not in ("nf4", "int4"):
        yield (
            ("bnb_4bit_quant_type",),
            f"bnb_4bit_quant_type: {run.bnb_4bit_quant_type} is about a 4-bit base; write adapter: qlora or load_in_4bit: true, or remove it",
        )
    if not run.peft_autocast_adapter_dtype and run.adapter is None:
        yield ("peft_autocast_adapter_dtype",), "there is no adapter to keep in 16 bits; add adapter: lora, or remove it"
    if run.float32_master and run.optimizer not in MASTERED:
        yield (
            ("float32_master",),
            f"float32_master is kept by AdamW, not by {run.optimizer}; write optimizer: adamw_8bit or adamw_torch, or remove it",
        )
    if run.float32_master and run.sharded:
        yield ("float32_master",), "float32_master is not kept of sharded weights; remove it, or the keys of fsdp"
    if run.step_in_backward:
        yield from _in_backward(run)


def _in_backward(run: Run) -> Iterator[tuple[Place, str]]:
    if run.max_grad_norm:
        yield (
            ("max_grad_norm" if "max_grad_norm" in run.model_fields_set else "step_in_backward",),
            f"step_in_backward lets go of gradients before the norm of all of them is known, so that max_grad_norm {run.max_grad_norm:g} "
            "cannot be kept; write max_grad_norm: 0 (and perhaps a lower learning_rate), or remove step_in_backward",
        )
    if run.accumulation > 1:
        yield (
            ("step_in_backward",),
            f"step_in_backward needs one forward pass per step, and gradient_accumulation_steps makes {run.accumulation}; write 1 "
            "(and a larger micro_batch_size), or remove step_in_backward",
        )
    if run.sharded:
        yield ("step_in_backward",), "step_in_backward is for one process, and fsdp shards over several; keep one of them"
    if run.by_rewards:
        yield ("step_in_backward",), f"rl: {run.rl} takes a step over several passes; remove step_in_backward"
