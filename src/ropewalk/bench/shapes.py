"""What is raced over: single expert layers, and models of them. No torch.

Legend: E experts, k experts per token, H hidden, I expert intermediate, r rank.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Layer:
    """One expert layer, with LoRA on both stacks."""

    name: str
    hidden: int
    inner: int
    experts: int
    topk: int
    activation: str = "silu"  # as transformers' configurations name it
    rank: int = 16


@dataclass(frozen=True)
class Model:
    """A whole model: a Qwen3 mixture of these numbers, or `published` with its own width and vocabulary and this many layers."""

    name: str
    layers: int
    rows: int
    length: int
    hidden: int = 0
    inner: int = 0
    experts: int = 0
    topk: int = 0
    vocab: int = 4096
    rank: int = 16
    published: str = ""  # a folder of models/shapes
    depth: int = 0  # how many layers the published model has

    @property
    def tokens(self) -> int:
        return self.rows * self.length


GATE = Model("gate", 2, 2, 64, 128, 64, 16, 4, vocab=512, rank=8)
QWEN, GEMMA = "qwen3-30b-a3b", "gemma-4-26b-a4b"

SMALL_LAYERS = (Layer("64 experts", 512, 256, 64, 8), Layer("128 experts", 512, 256, 128, 8))
TRUE_LAYERS = (Layer(QWEN, 2048, 768, 128, 8), Layer(GEMMA, 2816, 704, 128, 8, "gelu_pytorch_tanh"))
DRY_LAYERS = (Layer("tiny", 64, 32, 8, 2), Layer("tiny, gelu", 64, 32, 8, 2, "gelu_pytorch_tanh"))

CPU_MODELS = (
    Model("64 experts", 4, 4, 512, 512, 256, 64, 8),
    Model("128 experts", 1, 4, 256, 512, 256, 128, 8),
)
QUICK_MODELS = (
    Model("64 experts", 1, 2, 512, 512, 256, 64, 8, vocab=1024),
    Model("128 experts", 1, 1, 512, 512, 256, 128, 8, vocab=1024),
)
DRY_MODELS = tuple(Model("tiny", layers, 1, 64, 64, 32, 8, 2, vocab=256, rank=8, depth=8) for layers in (1, 2))


def published(tokens: tuple[int, ...]) -> tuple[Model, ...]:
    """Two and four layers of both published models, of which the whole is worked out."""
    return tuple(
        Model(name, layers, 1, length, published=name, depth=depth)
        for name, depth in ((QWEN, 48), (GEMMA, 30))
        for length in tokens
        for layers in (2, 4)
    )
