"""The keys of `trl` that have completions written by a vLLM server; their names and meaning are Axolotl's."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from ropewalk.config.keys import AboveZero, Group, Positive, key

if TYPE_CHECKING:
    from collections.abc import Iterator

    from ropewalk.config.document import Place
    from ropewalk.config.run import Run


class VllmKeys(Group):
    """Who writes the completions."""

    use_vllm: bool = key(
        "Have completions written by a vLLM server that is running, for a base that does not fit beside its own training.",
        False,
    )
    vllm_mode: Literal["server", "colocate"] = key(
        "server: the one at vllm_server_host; colocate: in the trainer's process, which its own engine does without vLLM.",
        "server",
    )
    vllm_server_host: str | None = key("Where that server is; default 127.0.0.1.")
    vllm_server_port: Positive | None = key("Its port; default 8000.")
    vllm_server_timeout: AboveZero | None = key("Seconds to wait for it to come up; default 240.")


def by_server(run: Run) -> bool:
    """Whether a vLLM server writes the completions."""
    return run.by_rewards and run.trl is not None and run.trl.use_vllm and run.trl.vllm_mode == "server"


def server_url(run: Run) -> str:
    """Where it is."""
    trl = run.trl
    host = (trl and trl.vllm_server_host) or "127.0.0.1"
    return f"http://{'127.0.0.1' if host == '0.0.0.0' else host}:{(trl and trl.vllm_server_port) or 8000}"


def conflicts_of_vllm(run: Run) -> Iterator[tuple[Place, str]]:
    """What a server of adapters cannot do."""
    trl = run.trl
    if trl is None or not by_server(run):
        return
    if run.adapter is None:
        yield ("trl", "use_vllm"), "trl.use_vllm publishes an adapter after every step; add adapter: lora, or remove use_vllm"
    for name in ("peft_use_dora", "lora_modules_to_save", "alora_invocation_tokens"):
        if getattr(run, name):
            yield (name,), f"key '{name}': a vLLM server takes the factors of LoRA alone; remove it, or trl.use_vllm"
    if trl.replay_routing:
        yield ("trl", "replay_routing"), "trl.replay_routing needs the trainer's own engine; remove it, or trl.use_vllm"
    if trl.temperature != 1 and (trl.top_p < 1 or trl.top_k or trl.min_p):
        yield (
            ("trl", "temperature"),
            f"a vLLM server gives log-probabilities either before the temperature {trl.temperature:g} or after top_p, top_k and "
            "min_p, and neither is what is learnt from; write temperature: 1, or remove top_p, top_k and min_p",
        )


def told_of_vllm(run: Run) -> dict[str, str]:
    """What of these keys is not needed in this run: key -> reason."""
    trl = run.trl
    if trl is None or by_server(run):
        return {}
    given = [name for name in VllmKeys.model_fields if name in trl.model_fields_set and getattr(trl, name)]
    if trl.use_vllm:
        reason = "the trainer's own engine writes in its process, over the same weights, and needs no vLLM"
    else:
        reason = "no server is asked; trl.use_vllm: true with vllm_mode: server asks one"
    return {f"trl.{name}": reason for name in given}
