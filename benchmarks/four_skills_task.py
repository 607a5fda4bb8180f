"""The task "four skills, one rewarded": a model that reverses, copies, sorts or rotates four symbols is to learn to reverse only.

    prompt      <s> d a c b <sep>          4096 of them, 512 held out
    warm start  one of the four skills at random, each symbol wrong with a chance of 1 in 20
    reward      1 for the reverse and the end of the sequence, else 0

A model that has just been warmed up is right about one time in five, and greedily not either: what is learnt is learnt from rewards,
and a wrong sign, credit, shift or a stale generator shows at once. `write_task` makes what a run of Ropewalk takes; numbers suffice
for everything else here.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

PAD, BOS, EOS, SEP, FIRST = 0, 1, 2, 3, 4
SYMBOLS, LENGTH = "abcdefgh", 4
VOCABULARY = FIRST + len(SYMBOLS)
PROMPT, NEW = LENGTH + 2, LENGTH + 2  # tokens of a prompt; the most of a completion, one more than the right one has
HELD_OUT = 512
NOISE = 0.05
TEMPLATE = "{{ bos_token }}{% for m in messages %}{{ m['content'] }}{% if m['role'] == 'user' %}<sep>{% else %}</s>{% endif %}{% endfor %}"

Ids = NDArray[np.int64]


def prompts(seed: int = 0) -> tuple[Ids, Ids]:
    """Training and held-out prompts, [N, 6]."""
    all_of_them = np.array(list(itertools.product(range(FIRST, VOCABULARY), repeat=LENGTH)), dtype=np.int64)
    shuffled = np.random.default_rng(seed).permutation(all_of_them)
    ends = np.ones((len(shuffled), 1), dtype=np.int64)
    whole = np.concatenate([ends * BOS, shuffled, ends * SEP], axis=1)
    return whole[:-HELD_OUT], whole[-HELD_OUT:]


def skills(asked: Ids) -> Ids:
    """What the four skills make of prompts, [N, 4 skills, 4]: reverse, copy, sort, rotate."""
    symbols = asked[:, 1 : 1 + LENGTH]
    return np.stack([symbols[:, ::-1], symbols, np.sort(symbols, axis=1), np.roll(symbols, -1, axis=1)], axis=1)


def demonstrations(asked: Ids, seed: int = 0) -> Ids:
    """One skill at random for each prompt, with noise, [N, 5] with the end: what the warm start is trained on."""
    random = np.random.default_rng(seed)
    shown = skills(asked)[np.arange(len(asked)), random.integers(4, size=len(asked))]
    wrong = random.random(shown.shape) < NOISE
    shown = np.where(wrong, random.integers(FIRST, VOCABULARY, size=shown.shape), shown)
    return with_end(shown)


def targets(asked: Ids) -> Ids:
    """The one completion that is rewarded, [N, 5]."""
    return with_end(skills(asked)[:, 0])


def with_end(symbols: Ids) -> Ids:
    return np.concatenate([symbols, np.full((len(symbols), 1), EOS)], axis=1)


def rewarded(asked: Ids, completions: Ids) -> NDArray[np.float64]:
    """1 where the completion is the target, whatever stands after its end; [N, 6], [N, 5 or more] -> [N]."""
    return (completions[:, : LENGTH + 1] == targets(asked)).all(axis=1).astype(np.float64)


def reverse(completion: str, answer: str, completion_ids: Sequence[int]) -> float:
    """The same as a reward function of a configuration: the text must be right, and end."""
    return float(completion.split() == answer.split() and completion_ids[LENGTH : LENGTH + 1] == [EOS])


def write_task(folder: Path, seed: int = 0) -> None:
    """Tokenizer, rows of the warm start, prompts for training and held out, each prompt with its answer."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    folder.mkdir(parents=True, exist_ok=True)
    special = ["<pad>", "<s>", "</s>", "<sep>"]
    tokenizer: Any = Tokenizer(models.WordLevel({word: id for id, word in enumerate([*special, *SYMBOLS])}, "<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.decoder = decoders.WordPiece(prefix="##", cleanup=False)
    tokenizer.add_special_tokens(special)
    tokenizer.save(str(folder / "tokenizer.json"))
    named = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "tokenizer_class": "PreTrainedTokenizerFast"}
    (folder / "tokenizer_config.json").write_text(json.dumps(named))
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    train, held = prompts(seed)
    for name, asked in (("train", train), ("held_out", held)):
        rows = [{"prompt": [_turn("user", p[1:-1])], "answer": _text(t[:-1])} for p, t in zip(asked, targets(asked))]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    shown = zip(train, demonstrations(train, seed))
    rows = [{"messages": [_turn("user", p[1:-1]), _turn("assistant", d[:-1])]} for p, d in shown]
    (folder / "warm_start.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def new_model(seed: int = 0) -> Any:
    """A Llama of two layers with random weights, 133 thousand of them."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    sizes = {"hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4}
    tokens = {"vocab_size": VOCABULARY, "bos_token_id": BOS, "eos_token_id": EOS, "pad_token_id": PAD}
    return LlamaForCausalLM(LlamaConfig(**sizes, **tokens, max_position_embeddings=64))


def _turn(role: str, ids: Ids) -> dict[str, str]:
    return {"role": role, "content": _text(ids)}


def _text(ids: Ids) -> str:
    return " ".join(SYMBOLS[id - FIRST] for id in ids)
