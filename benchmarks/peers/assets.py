"""Makes what every contender is given: a tiny Qwen3 mixture of experts with random weights, and 2,000 rows of chat.

    python benchmarks/peers/assets.py FOLDER

Everything follows from seed 0 and from the text below, nothing from the machine, so that losses can be compared over machines
(as far as torch gives the same bits there). The weights are random: losses show that training moves, not that it is any good.
"""

from __future__ import annotations

import hashlib
import json
import random
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

ROWS, VOCABULARY = 2000, 4096
SYSTEM = "You are a careful assistant. Answer briefly, in one line if that is enough."
WORDS = (
    "apple river stone cloud paper green silver window garden table bright quiet engine forest market yellow candle bridge winter "
    "summer copper planet ladder button rocket pencil basket hammer violin carpet orange purple tunnel island doctor kitten marble "
    "saddle turtle wallet"
).split()
SPECIAL = ["<|pad|>", "<|im_start|>", "<|im_end|>", "<|endoftext|>"]
# `generation` marks what TRL's assistant_only_loss trains.
TEMPLATE = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}"
    "{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] + '<|im_end|>' }}{% endgeneration %}"
    "{% else %}{{ m['content'] + '<|im_end|>' }}{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

Task = Callable[[random.Random], tuple[str, str]]


def _two(low: int, high: int, ask: str, answer: str, work: Callable[[int, int], int]) -> Task:
    def task(rng: random.Random) -> tuple[str, str]:
        a, b = rng.randint(low, high), rng.randint(low, high)
        return ask.format(a=a, b=b), answer.format(a=a, b=b, c=work(a, b))

    return task


def _words(ask: str, work: Callable[[list[str]], list[str]]) -> Task:
    def task(rng: random.Random) -> tuple[str, str]:
        words = rng.sample(WORDS, 5)
        return f"{ask}: {' '.join(words)}", " ".join(work(words))

    return task


def _position(rng: random.Random) -> tuple[str, str]:
    words = rng.sample(WORDS, 5)
    place = rng.randrange(5)
    ask = f"Which position (starting at 1) does the word '{words[place]}' have in: {' '.join(words)}?"
    return ask, f"The word '{words[place]}' is at position {place + 1}."


def _largest(rng: random.Random) -> tuple[str, str]:
    numbers = [rng.randint(1, 50) for _ in range(5)]
    ask = f"Which is the largest of these numbers: {', '.join(map(str, numbers))}?"
    return ask, f"The largest number is {max(numbers)}."


TASKS: tuple[Task, ...] = (
    _two(2, 99, "What is {a} + {b}?", "{a} + {b} = {c}. The answer is {c}.", lambda a, b: a + b),
    _two(2, 99, "Subtract {b} from {a}.", "{a} - {b} = {c}. The answer is {c}.", lambda a, b: a - b),
    _two(1, 12, "Compute {a} times {b}.", "{a} * {b} = {c}. The answer is {c}.", lambda a, b: a * b),
    _words("Reverse the order of these words", lambda words: words[::-1]),
    _words("Sort these words alphabetically", sorted),
    _words("Write this in upper case", lambda words: [w.upper() for w in words]),
    _position,
    _largest,
)


def chat_rows() -> list[dict[str, list[dict[str, str]]]]:
    """The 2,000 conversations: system, user, assistant."""
    rng = random.Random(0)
    pairs = [TASKS[i % len(TASKS)](rng) for i in range(ROWS)]
    rng.shuffle(pairs)
    roles = ("system", "user", "assistant")
    return [{"messages": [{"role": r, "content": c} for r, c in zip(roles, (SYSTEM, ask, answer))]} for ask, answer in pairs]


def _invented_text() -> Iterator[str]:
    """Words of random syllables, of which byte-pair encoding learns enough merges to fill the vocabulary."""
    rng = random.Random(1)
    syllables = [a + b + c for a in "bcdfghklmnprstvw" for b in "aeiou" for c in ("", "n", "r", "s", "l")]
    words = ["".join(rng.choices(syllables, k=rng.randint(1, 3))) for _ in range(6000)]
    for _ in range(4000):
        yield " ".join(rng.choices(words, k=12))


def make_tokenizer(folder: Path, rows: list[dict[str, list[dict[str, str]]]]) -> int:
    """Byte-level BPE over the rows and invented words; gives the size of its vocabulary."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    texts = [m["content"] for row in rows for m in row["messages"]]
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator([*texts, *_invented_text()], trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="<|pad|>",
        eos_token="<|im_end|>",
        model_max_length=2048,
        additional_special_tokens=["<|im_start|>", "<|endoftext|>"],
    )
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    return len(tokenizer)


def make_model(folder: Path, vocabulary: int) -> int:
    """Qwen3-MoE, 4 layers, 16 experts, top 4; gives the number of its parameters."""
    import torch
    from transformers import GenerationConfig, Qwen3MoeConfig, Qwen3MoeForCausalLM

    torch.manual_seed(0)
    ends = {"pad_token_id": 0, "eos_token_id": SPECIAL.index("<|im_end|>"), "bos_token_id": None}
    config = Qwen3MoeConfig(
        vocab_size=vocabulary,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=32,
        num_experts=16,
        num_experts_per_tok=4,
        moe_intermediate_size=128,
        norm_topk_prob=True,
        max_position_embeddings=2048,
        router_aux_loss_coef=0.001,
        **ends,
    )
    model = Qwen3MoeForCausalLM(config).float()
    model.generation_config = GenerationConfig(do_sample=True, **ends)
    model.save_pretrained(folder)
    return sum(p.numel() for p in model.parameters())


def recipe() -> str:
    """Changes when this file does: assets of another recipe are made again."""
    return hashlib.sha256(Path(__file__).read_bytes()).hexdigest()[:16]


def make_assets(folder: Path) -> None:
    base = folder / "base"
    base.mkdir(parents=True, exist_ok=True)
    rows = chat_rows()
    (folder / "sft.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    # LLaMA-Factory finds data sets by name in such a file.
    columns = {
        "formatting": "sharegpt",
        "columns": {"messages": "messages"},
        "tags": {"role_tag": "role", "content_tag": "content", "user_tag": "user", "assistant_tag": "assistant"}
        | {"system_tag": "system"},
    }
    (folder / "dataset_info.json").write_text(json.dumps({"sft": {"file_name": "sft.jsonl", **columns}}, indent=1))
    parameters = make_model(base, make_tokenizer(base, rows))
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(base)
    tokens = sum(len(tokenizer.apply_chat_template(row["messages"])["input_ids"]) for row in rows)
    facts = {"recipe": recipe(), "rows": len(rows), "tokens": tokens, "parameters": parameters}
    (folder / "assets.json").write_text(json.dumps(facts, indent=1))


if __name__ == "__main__":
    make_assets(Path(sys.argv[1]))
