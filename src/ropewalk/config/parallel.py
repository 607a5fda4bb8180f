"""The keys of training with several processes: what is sharded over them, and how long one waits for another."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BeforeValidator

from ropewalk.config.keys import Group, Positive, Texts, key, one_or_more
from ropewalk.config.vllm import by_server

if TYPE_CHECKING:
    from collections.abc import Iterator

    from ropewalk.config.document import Place
    from ropewalk.config.run import Run

WAIT_SECONDS = 1800  # for another process, where nothing is said
# AdamW with a state of few bits, for which 32 are kept over sharded weights.
FEW_BITS = frozenset("adamw_8bit adamw_bnb_8bit adamw_torch_8bit paged_adamw_8bit adamw_torch_4bit".split())
WHOLE = frozenset(("muon", "adafactor"))  # optimizers that look at a whole tensor


def _strategy(value: Any) -> Any:
    return value.upper() if isinstance(value, str) else value


def _asked(value: Any) -> Any:
    return value or None


def _switches(value: Any) -> Any:
    """`fsdp: full_shard auto_wrap` and `fsdp: [full_shard, auto_wrap]`."""
    return tuple(value.split()) if isinstance(value, str) else one_or_more(value)


class FsdpKeys(Group):
    """The block `fsdp_config`; every key may be written with fsdp_ before it."""

    reshard_after_forward: bool | None = key(
        "Give a layer's gathered weights back after its forward pass, and gather them again in the backward; default true."
    )
    sharding_strategy: Annotated[
        Literal["FULL_SHARD", "SHARD_GRAD_OP", "NO_SHARD", "HYBRID_SHARD", "_HYBRID_SHARD_ZERO2"] | None,
        BeforeValidator(_strategy),
    ] = key("The older form: SHARD_GRAD_OP is reshard_after_forward: false, NO_SHARD shards nothing.")
    offload_params: bool = key("Keep each process's part, with its gradients and optimizer state, in the host's memory.", False)
    activation_checkpointing: bool = key("The same as gradient_checkpointing: true.", False)


class ParallelKeys(Group):
    """Several processes"""

    fsdp_version: Literal[1, 2] | None = key(
        "Shard weights, gradients and optimizer state over all processes (FSDP2), layer by layer; 1 means the same. See docs/scale.md."
    )
    fsdp_config: FsdpKeys | None = key("How; naming it switches sharding on. See below.")
    fsdp: Annotated[Texts | None, BeforeValidator(_switches)] = key("The older switch, such as [full_shard, auto_wrap].")
    deepspeed: Annotated[str | dict[str, Any] | None, BeforeValidator(_asked)] = key(
        "DeepSpeed's configuration: any of its stages is fsdp_version: 2 here, and nothing else in it is read."
    )
    expert_parallel_size: Positive | None = key(
        "Above 1 it switches sharding on, of experts as of everything else: the processes learn from as many rows."
    )
    dp_shard_size: Positive | None = key(
        "The processes to shard over, which must be all of them; above 1 it switches sharding on."
    )
    dp_replicate_size: Positive | None = key("The processes that each hold the whole model; above 1 only without sharding.")
    ddp_timeout: Positive | None = key("Seconds that a process waits for the others before the run ends; default 1800.")

    @property
    def sharded(self) -> bool:
        """Whether weights are to be sharded over the processes."""
        if self.fsdp_config is not None and self.fsdp_config.sharding_strategy == "NO_SHARD":
            return False
        above = max(self.dp_shard_size or 1, self.expert_parallel_size or 1) > 1
        return bool(self.fsdp_version or self.fsdp_config or self.fsdp or self.deepspeed or above)

    @property
    def reshards(self) -> bool:
        """Whether a layer's weights are given back between its forward and its backward pass."""
        asked = self.fsdp_config
        if asked is None or (asked.reshard_after_forward is None and asked.sharding_strategy is None):
            return True
        return (
            asked.sharding_strategy != "SHARD_GRAD_OP" if asked.reshard_after_forward is None else asked.reshard_after_forward
        )


def conflicts_of_parallel(run: Run) -> Iterator[tuple[Place, str]]:
    """Where the keys of this page contradict each other or the rest."""
    if not run.sharded:
        return
    switches = ("fsdp_version", "fsdp_config", "fsdp", "deepspeed", "dp_shard_size", "expert_parallel_size")
    asked = {name: getattr(run, name) for name in switches}
    switch = next(name for name, value in asked.items() if value and (value != 1 or name == "fsdp_version"))
    if (run.dp_replicate_size or 1) > 1 or (run.fsdp_config and "HYBRID" in (run.fsdp_config.sharding_strategy or "")):
        place: Place = ("dp_replicate_size",) if run.dp_replicate_size else ("fsdp_config", "sharding_strategy")
        yield (
            place,
            "sharding within groups of processes is not supported; shard over all of them (remove it), or over none (remove the keys of fsdp)",
        )
    if run.by_rewards and not by_server(run):
        yield (
            (switch,),
            f"rl: {run.rl} writes and learns from one copy of the weights, which cannot be sharded; remove {switch}: every process then "
            "holds the base (adapter: qlora holds it in 4 bits) and has its share of the completions; or have a vLLM server write them "
            "(trl.use_vllm: true)",
        )
    if run.sees:
        yield (
            (switch,),
            f"a model that sees is not sharded; remove {switch}, and every process holds it whole, or processor_type",
        )
    if run.lisa_n_layers and run.adapter is None:
        yield (
            ("lisa_n_layers",),
            f"LISA and {switch} exclude each other; name unfrozen_parameters instead, or remove {switch}",
        )
    if run.optimizer in WHOLE:
        yield (
            ("optimizer",),
            f"key 'optimizer': {run.optimizer} needs whole tensors, and {switch} gives each process a part of them; write "
            "adamw_torch_fused, whose state is divided by the number of processes",
        )
