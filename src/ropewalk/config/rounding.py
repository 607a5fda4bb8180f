"""The keys of training for quantisation: numbers are rounded while training as they will be afterwards; names and meaning are Axolotl's."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BeforeValidator

from ropewalk.config.keys import Count, Group, Positive, key

if TYPE_CHECKING:
    from collections.abc import Iterator

    from ropewalk.config.document import Place
    from ropewalk.config.run import Run

BLOCKS = {"nvfp4": 16, "mxfp4": 32}  # these have one size


def _float8(value: Any) -> Any:
    return "float8" if value in ("fp8", "float8_e4m3fn") else value


class QatKeys(Group):
    """The block `qat`."""

    weight_dtype: Annotated[Literal["int4", "int8", "float8", "nvfp4", "mxfp4"], BeforeValidator(_float8)] = key(
        "What weights of linear layers are rounded to.", "int8"
    )
    activation_dtype: Annotated[Literal["int8", "float8", "nvfp4", "mxfp4"] | None, BeforeValidator(_float8)] = key(
        "What the inputs of those layers are rounded to; default: nothing."
    )
    group_size: Positive | None = key("Neighbouring weights that share a scale, for int4 and int8; default 32.")
    quantize_embedding: bool = key("Embeddings are never rounded here: only false is accepted.", False)
    fake_quant_after_n_steps: Count | None = key("Round from this step on; default: from the first.")


class RoundingKeys(Group):
    """Training for quantisation"""

    qat: QatKeys | None = key("Train every weight while it is rounded to a format of few bits; see below.")
    use_onebitllms: bool = key("The same for BitNet's weights of -1, 0 and 1, with inputs of int8.", False)


def conflicts_of_rounding(run: Run) -> Iterator[tuple[Place, str]]:
    """Where the keys of this page contradict each other or the rest."""
    name = "qat" if run.qat else "use_onebitllms"
    if not (run.qat or run.use_onebitllms):
        return
    if run.qat and run.use_onebitllms:
        yield ("use_onebitllms",), "qat and use_onebitllms exclude each other; keep one"
    if run.adapter:
        yield (
            (name,),
            f"{name} trains every weight; remove adapter, or train an adapter over a 4-bit base (adapter: qlora) without it",
        )
    if run.by_rewards:
        yield (
            (name,),
            f"{name} with rl: {run.rl} is not supported; train with rewards first, then with {name} on what was written",
        )
    if run.qat is None:
        return
    if run.qat.quantize_embedding:
        yield ("qat", "quantize_embedding"), "key 'qat.quantize_embedding': embeddings are not rounded here; remove it"
    only = BLOCKS.get(run.qat.weight_dtype)
    if only and run.qat.group_size not in (None, only):
        yield (
            ("qat", "group_size"),
            f"key 'qat.group_size': {run.qat.weight_dtype} has blocks of {only}; write that, or leave it out",
        )
