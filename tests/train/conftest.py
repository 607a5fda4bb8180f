"""A tiny mixture of experts with a tokenizer and a few chat rows: what the trainer's tests train."""

import json

import pytest

from train.rewarded import keys_of

TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]


@pytest.fixture(scope="session")
def base(tmp_path_factory):
    """A Qwen3-MoE of 2 layers and 4 experts with a byte tokenizer, in a folder."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    folder = tmp_path_factory.mktemp("base")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator([], trainers.BpeTrainer(vocab_size=259, special_tokens=SPECIAL, initial_alphabet=alphabet))
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>", "tokenizer_class": "PreTrainedTokenizerFast"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16}
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "intermediate_size": 32}
    tokens = {"vocab_size": 259, "pad_token_id": 0, "eos_token_id": 2, "bos_token_id": None, "max_position_embeddings": 256}
    Qwen3MoeForCausalLM(Qwen3MoeConfig(**sizes, **experts, **tokens)).save_pretrained(folder)
    return folder


def chat(question, answer):
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


@pytest.fixture(scope="session")
def rows(tmp_path_factory):
    """24 conversations as JSONL."""
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    lines = [json.dumps(chat(f"{a} plus {b}?", str(a + b))) for a in range(6) for b in range(4)]
    path.write_text("\n".join(lines) + "\n")
    return path


@pytest.fixture
def config(base, rows, tmp_path, monkeypatch):
    """Writes a configuration file (keys given replace or add) and gives its path."""
    monkeypatch.setenv("ROPEWALK_HOME", str(tmp_path / "home"))

    return lambda **keys: written(tmp_path, base, rows, keys)


def written(folder, base, rows, keys):
    """The path of a configuration file in the folder."""
    values = {
        "base_model": str(base),
        "datasets": [{"path": str(rows), "type": "chat_template"}],
        "output_dir": str(folder / "run"),
        "adapter": "lora",
        "lora_r": 4,
        "sequence_len": 64,
        "sample_packing": True,
        "micro_batch_size": 2,
        "max_steps": 4,
        "learning_rate": 1e-2,
        "lr_scheduler": "constant",
        "warmup_steps": 0,
        "num_threads": 1,
    } | keys
    path = folder / "run.yml"
    lines = [f"{key}: {json.dumps(value)}" for key, value in values.items() if value is not None]
    path.write_text("\n".join(lines) + "\n")
    return path


@pytest.fixture
def rewarded(config, tmp_path):
    """Writes a configuration that learns to write the later half of the vocabulary, and gives its path."""
    return lambda trl=None, **keys: config(**keys_of(tmp_path, trl, **keys))


@pytest.fixture(scope="session")
def rewarding(base, rows, tmp_path_factory):
    """The same for runs that several tests look at, each in a folder of its own."""

    def write(trl=None, **keys):
        folder = tmp_path_factory.mktemp("rewarding")
        return written(folder, base, rows, keys_of(folder, trl, **keys))

    return write
