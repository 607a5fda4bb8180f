"""What every contender in training by rewards is given: a model of random weights, prompts, prescribed lengths, a reward.

    python benchmarks/peers/grpo_assets.py FOLDER SHAPE     (SHAPE as JSON)

Imported by contenders in environments of their own, so that only the making of models wants torch. Completions of random weights have
no length of their own: each is cut where `lengths` says, so that all contenders write and learn the same number of tokens. There are
as many prompts as a step takes, so that every step is the same amount of work.
"""

from __future__ import annotations

import hashlib
import json
import math
import random
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

PAD, BEGIN, END = 0, 1, 2
SPREAD, CAP = 0.5, 4.0  # lengths are lognormal with this deviation, at most so many times their median


@dataclass(frozen=True)
class Shape:
    """A model, and what a step of training it by rewards is."""

    kind: str  # llama, qwen3, qwen3_moe
    vocabulary: int = 8192
    hidden: int = 256
    layers: int = 4
    heads: int = 8
    key_heads: int = 4
    head: int = 32
    inter: int = 1024
    experts: int = 8
    active: int = 2
    dtype: str = "float32"
    prompts: int = 8
    samples: int = 8
    prompt: int = 64  # tokens
    median: int = 28  # tokens of a completion
    micro: int = 16  # padded completions of a peer's micro-batch
    row: int = 1024  # tokens of one of our packed rows

    @property
    def longest(self) -> int:
        return int(CAP * self.median)

    @property
    def completions(self) -> int:
        return self.prompts * self.samples


LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
ATTENTION = LINEAR[:4]


def targets(shape: Shape) -> list[str]:
    """What is adapted: every linear layer, of a mixture of experts its attention, which is what PEFT is fast at."""
    return list(ATTENTION if shape.kind == "qwen3_moe" else LINEAR)


def lengths(shape: Shape) -> list[list[int]]:
    """Tokens of each prompt's completions."""
    draw = random.Random(0)
    return [
        [max(2, min(shape.longest, round(shape.median * math.exp(draw.gauss(0, SPREAD))))) for _ in range(shape.samples)]
        for _ in range(shape.prompts)
    ]


def prompt_ids(shape: Shape) -> list[list[int]]:
    """The prompts; the words of the text of one are its ids."""
    draw = random.Random(1)
    return [[draw.randrange(3, shape.vocabulary) for _ in range(shape.prompt)] for _ in range(shape.prompts)]


def prescribed(shape: Shape) -> dict[tuple[int, ...], list[int]]:
    return {tuple(ids): counts for ids, counts in zip(prompt_ids(shape), lengths(shape))}


def text(ids: Sequence[int]) -> str:
    return " ".join(f"w{id}" for id in ids)


def share_of_even(completion_ids: Sequence[int]) -> float:
    """The reward: any two completions of a group differ in it, so that all of them are learnt from."""
    return sum(id % 2 == 0 for id in completion_ids) / max(1, len(completion_ids))


def reward(completion: str, completion_ids: Sequence[int]) -> float:
    return share_of_even(completion_ids)


def rewards(completion_ids: Sequence[Sequence[int]], **_: Any) -> list[float]:
    """The same as TRL calls it."""
    return [share_of_even(ids) for ids in completion_ids]


def recipe(shape: Shape) -> str:
    return hashlib.sha256((json.dumps(asdict(shape)) + Path(__file__).read_text()).encode()).hexdigest()[:12]


def make(folder: Path, shape: Shape) -> None:
    """The base, its tokenizer, whose words are the ids, and the prompts as rows."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    folder.mkdir(parents=True, exist_ok=True)
    words = ["<pad>", "<s>", "</s>", *(f"w{id}" for id in range(3, shape.vocabulary))]
    tokenizer: Any = Tokenizer(models.WordLevel({word: id for id, word in enumerate(words)}, "<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens(words[:3])
    tokenizer.save(str(folder / "tokenizer.json"))
    named = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "tokenizer_class": "PreTrainedTokenizerFast"}
    (folder / "tokenizer_config.json").write_text(json.dumps(named))
    (folder / "chat_template.jinja").write_text("{% for m in messages %}{{ m['content'] }} {% endfor %}")
    rows = "".join(json.dumps({"prompt": text(ids)}) + "\n" for ids in prompt_ids(shape))
    (folder / "prompts.jsonl").write_text(rows)
    new_model(shape).save_pretrained(folder)


def new_model(shape: Shape) -> Any:
    """The model with random weights, in its dtype."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes: dict[str, Any] = {
        "vocab_size": shape.vocabulary,
        "hidden_size": shape.hidden,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.key_heads,
        "head_dim": shape.head,
        "intermediate_size": shape.inter,
        "max_position_embeddings": max(2048, 2 * (shape.prompt + shape.longest)),
        "tie_word_embeddings": False,
        "pad_token_id": PAD,
        "bos_token_id": BEGIN,
        "eos_token_id": END,
    }
    if shape.kind == "qwen3_moe":
        sizes |= {"num_experts": shape.experts, "num_experts_per_tok": shape.active, "moe_intermediate_size": shape.inter}
        sizes |= {"norm_topk_prob": True, "mlp_only_layers": [], "decoder_sparse_step": 1}
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(shape.kind, **sizes), dtype=getattr(torch, shape.dtype))


def processor(shape: Shape) -> Any:
    """What makes `generate` end each completion where it is prescribed, and nowhere else."""
    import torch

    known = prescribed(shape)

    class Prescribed:
        def __init__(self, ids: Any) -> None:
            rows = [tuple(id for id in row if id != PAD) for row in ids.tolist()]
            seen: dict[tuple[int, ...], int] = {}
            counts = []
            for row in rows:
                counts.append(known[row][seen.get(row, 0) % shape.samples])
                seen[row] = seen.get(row, 0) + 1
            self.begin, self.counts = ids.shape[1], torch.tensor(counts, device=ids.device)

        def __call__(self, ids: Any, scores: Any) -> Any:
            last = self.counts == ids.shape[1] - self.begin + 1  # the scores are this call's own, and are changed in place
            scores[:, END] = float("-inf")
            scores[last] = float("-inf")
            scores[last, END] = 0.0
            return scores

    return Prescribed


if __name__ == "__main__":
    make(Path(sys.argv[1]), Shape(**json.loads(sys.argv[2])))
