from __future__ import annotations

import json

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM

from ropewalk.errors import ModelError, OutputError, VerificationFailed
from ropewalk.models.changes import Changes
from ropewalk.models.load import load_base
from ropewalk.models.lora import LoraSpec, attach
from ropewalk.models.merge import merge
from ropewalk.models.tiny import tiny_config

IDS = torch.tensor([[70, 71, 72, 99, 98, 97, 130, 131]])


def make_base(folder, architecture, dtype=torch.float32, **options):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(tiny_config(architecture), dtype=dtype)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(folder, **options)
    return folder


def make_adapter(folder, base, spec, **options):
    """An adapter of random factors, and the logits it gives."""
    model = load_base(base, **options)
    adapter = attach(model, spec, seed=1)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.copy_(parameter + torch.randn(parameter.shape, generator=generator) * 0.1)
        logits = model(input_ids=IDS).logits.float()
    adapter.save(folder)
    return logits


def close(a, b, tolerance):
    return (a - b).norm() <= tolerance * b.norm()


@pytest.mark.parametrize(
    "architecture",
    ["qwen3_moe", "mixtral", "gpt_oss", "gemma4", "deepseek_v3", "olmoe", "qwen3_5_moe", "glm4_moe", "llama", "phi3"],
)
def test_merged_logits_are_those_of_base_and_adapter(architecture, tmp_path):
    base = make_base(tmp_path / "base", architecture, max_shard_size="200kB")
    spec = LoraSpec(r=4, alpha=8, expert_r=8)
    wanted = make_adapter(tmp_path / "adapter", base, spec)
    difference = merge(base, tmp_path / "adapter", tmp_path / "merged")
    assert difference <= 1e-4
    plain = load_base(base)(input_ids=IDS).logits.float()
    found = load_base(tmp_path / "merged")(input_ids=IDS).logits.float()
    assert close(found, wanted, 1e-4)
    assert not close(found, plain, 1e-2)


def test_files_keep_their_layout_and_untouched_tensors_their_bytes(tmp_path):
    base = make_base(tmp_path / "base", "qwen3_moe", max_shard_size="200kB")
    (base / "tokenizer.json").write_text("{}")
    make_adapter(tmp_path / "adapter", base, LoraSpec(r=4, target_modules=("q_proj",), target_linear=False, experts=False))
    merge(base, tmp_path / "adapter", tmp_path / "merged")
    assert {path.name for path in base.iterdir()} == {path.name for path in (tmp_path / "merged").iterdir()}
    for path in base.glob("*.safetensors"):
        with safe_open(path, "pt") as before, safe_open(tmp_path / "merged" / path.name, "pt") as after:
            assert list(before.keys()) == list(after.keys())
            for name in before.keys():  # noqa: SIM118
                assert torch.equal(before.get_tensor(name), after.get_tensor(name)) == ("q_proj" not in name)


def test_the_sum_is_made_in_float32_and_rounded_once(tmp_path):
    base = make_base(tmp_path / "base", "llama", dtype=torch.bfloat16)
    make_adapter(tmp_path / "adapter", base, LoraSpec(r=4, target_modules=("q_proj",), target_linear=False))
    merge(base, tmp_path / "adapter", tmp_path / "merged")
    name = "model.layers.0.self_attn.q_proj.weight"
    with (
        safe_open(base / "model.safetensors", "pt") as old,
        safe_open(tmp_path / "merged" / "model.safetensors", "pt") as new,
        safe_open(tmp_path / "adapter" / "adapter_model.safetensors", "pt") as factors,
    ):
        a, b = (factors.get_tensor(f"base_model.model.{name.removesuffix('.weight')}.lora_{x}.weight") for x in "AB")
        expected = (old.get_tensor(name).float() + 32.0 / 4 * (b @ a)).bfloat16()  # alpha 32 over r 4
        assert torch.equal(new.get_tensor(name), expected)


@pytest.mark.parametrize(
    "options",
    [
        {"dora": True},
        {"rslora": True},
        {"alpha_pattern": {"q_proj": 3.0, "down_proj": 5.0}, "rank_pattern": {"k_proj": 2}},
        {"modules_to_save": ("lm_head",)},
    ],
)
def test_every_form_of_lora_merges(options, tmp_path):
    base = make_base(tmp_path / "base", "llama")
    wanted = make_adapter(tmp_path / "adapter", base, LoraSpec(r=4, **options))
    merge(base, tmp_path / "adapter", tmp_path / "merged")
    assert close(load_base(tmp_path / "merged")(input_ids=IDS).logits, wanted, 1e-4)


def test_bf16_merges_within_the_stated_tolerance(tmp_path):
    base = make_base(tmp_path / "base", "qwen3_moe", dtype=torch.bfloat16)
    make_adapter(tmp_path / "adapter", base, LoraSpec(r=8))
    assert 0 < merge(base, tmp_path / "adapter", tmp_path / "merged") <= 3e-2


def test_a_merge_that_differs_leaves_nothing(tmp_path, monkeypatch):
    base = make_base(tmp_path / "base", "qwen3_moe")
    make_adapter(tmp_path / "adapter", base, LoraSpec(r=4))
    right = Changes.delta
    monkeypatch.setattr(Changes, "delta", lambda self, name: right(self, name) * (0.9 if "down_proj" in name else 1))
    with pytest.raises(VerificationFailed, match="nothing was written"):
        merge(base, tmp_path / "adapter", tmp_path / "merged")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "base"]


def test_an_activated_lora_cannot_be_merged(tmp_path):
    base = make_base(tmp_path / "base", "llama")
    make_adapter(tmp_path / "adapter", base, LoraSpec(r=4, alora_invocation_tokens=(71, 72)))
    with pytest.raises(ModelError, match="activated LoRA"):
        merge(base, tmp_path / "adapter", tmp_path / "merged")


def test_an_adapter_of_another_model_is_refused(tmp_path):
    base, other = make_base(tmp_path / "base", "llama"), make_base(tmp_path / "other", "qwen3_moe")
    make_adapter(tmp_path / "adapter", other, LoraSpec(r=4))
    with pytest.raises(ModelError, match="which this base does not have"):
        merge(base, tmp_path / "adapter", tmp_path / "merged")


def test_lora_on_a_tied_head_is_refused_with_the_reason(tmp_path):
    base = make_base(tmp_path / "base", "gemma4")
    make_adapter(tmp_path / "adapter", base, LoraSpec(r=4, target_modules=("lm_head",), target_linear=False, experts=False))
    with pytest.raises(ModelError, match="shares the embedding's"):
        merge(base, tmp_path / "adapter", tmp_path / "merged")


def test_an_output_folder_that_exists_is_left_alone(tmp_path):
    base = make_base(tmp_path / "base", "llama")
    make_adapter(tmp_path / "adapter", base, LoraSpec(r=4))
    (tmp_path / "merged").mkdir()
    with pytest.raises(OutputError, match="exists already"):
        merge(base, tmp_path / "adapter", tmp_path / "merged")


def test_a_folder_that_is_no_adapter(tmp_path):
    base = make_base(tmp_path / "base", "llama")
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA"}))
    with pytest.raises(ModelError, match="no adapter folder"):
        merge(base, tmp_path / "adapter", tmp_path / "merged")
