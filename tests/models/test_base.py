from __future__ import annotations

import pytest
import torch
from transformers import AutoTokenizer

from ropewalk.chat.template import Template
from ropewalk.errors import ModelError, OutputError
from ropewalk.models.base import END, make_base, text_at_hand, train_tokenizer
from ropewalk.models.load import load_base


@pytest.mark.parametrize("arch", ["qwen3_moe", "gemma4", "mixtral", "gpt_oss", "mistral4", "llama"])
def test_a_made_base_loads_chats_and_predicts(arch, tmp_path):
    made = make_base(tmp_path / arch, arch)
    base = load_base(tmp_path / arch)
    template = Template.load(tmp_path / arch)
    ids = template.render([{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi."}]).ids
    assert max(ids) < base.get_input_embeddings().weight.shape[0]
    logits = base(input_ids=torch.tensor([ids])).logits
    torch.testing.assert_close(logits, made(input_ids=torch.tensor([ids])).logits, rtol=1e-4, atol=1e-5)
    assert template.eos_id == base.config.eos_token_id == template.encode(END)[0]
    assert base.generation_config.eos_token_id == template.eos_id


def test_text_comes_back_exactly(tmp_path):
    tokenizer = train_tokenizer(iter(["some plain words, some more words"]), 400)
    odd = "Zażółć gęślą jaźń 日本 🙂\n\ttabs  and   spaces"
    assert tokenizer.decode(tokenizer.encode(odd).ids) == odd


def test_transformers_reads_the_tokenizer_and_its_template(tmp_path):
    make_base(tmp_path / "base", "llama")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "base")
    chat = [{"role": "user", "content": "Hello"}]
    text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    assert text == "<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n"
    assert tokenizer.eos_token == END


def test_the_text_at_hand_is_real_and_enough_for_a_small_vocabulary():
    assert train_tokenizer(text_at_hand(), 4096).get_vocab_size() == 4096


def test_the_seed_decides_the_weights(tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("a few words to cut into tokens " * 20)
    first, again, other = (
        make_base(tmp_path / name, "llama", text_files=[text], seed=seed).state_dict()["lm_head.weight"]
        for name, seed in (("a", 1), ("b", 1), ("c", 2))
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


@pytest.mark.parametrize("arch", ["qwen3_moe", "gemma4"])
def test_small_is_deeper_and_wider(arch, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("words")
    tiny = make_base(tmp_path / "tiny", arch, text_files=[text])
    small = make_base(tmp_path / "small", arch, size="small", text_files=[text])
    load_base(tmp_path / "small")
    assert small.config.num_hidden_layers == 2 * tiny.config.num_hidden_layers
    assert small.config.hidden_size == 4 * tiny.config.hidden_size
    assert 1e6 < small.num_parameters() < 2e7


def test_an_unknown_architecture_and_one_that_writes_no_text_are_errors(tmp_path):
    with pytest.raises(ModelError, match="'qwen99' is unknown"):
        make_base(tmp_path / "a", "qwen99")
    with pytest.raises(ModelError, match="no causal language model"):
        make_base(tmp_path / "b", "clip")
    assert not list(tmp_path.iterdir())


def test_a_folder_in_use_is_left_alone(tmp_path):
    (tmp_path / "mine.txt").write_text("kept")
    with pytest.raises(OutputError, match="exists already"):
        make_base(tmp_path, "llama")
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]
