from __future__ import annotations

import copy
import json
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from ropewalk.errors import ConfigError, ModelError
from ropewalk.kernels.quant import Quantised
from ropewalk.models.load import load_base

TEXT = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "moe_intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GEMMA = {"enable_moe_block": True, "top_k_experts": 2, "hidden_size_per_layer_input": 0, "global_head_dim": 8}
VISION = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
}
IDS = torch.tensor([[5, 6, 7, 8, 9]])


@pytest.fixture(scope="module")
def qwen(tmp_path_factory):
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("qwen3_moe")
    model = AutoModelForCausalLM.from_config(CONFIG_MAPPING["qwen3_moe"](**TEXT)).eval()
    model.save_pretrained(folder, max_shard_size="40kB")
    return folder, model


def copy_of(folder, tmp_path):
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    return tmp_path


def test_a_model_loads_frozen_in_eval_mode_with_the_same_logits(qwen):
    folder, model = qwen
    base = load_base(folder, experts_implementation="grouped_mm")
    assert not base.training
    assert not any(p.requires_grad for p in base.parameters())
    assert base.config._attn_implementation == "sdpa"
    assert base.config._experts_implementation == "grouped_mm"
    torch.testing.assert_close(base(input_ids=IDS).logits, model(input_ids=IDS).logits)


def test_full_fine_tuning_gets_trainable_parameters(qwen):
    assert all(p.requires_grad for p in load_base(qwen[0], experts_implementation="eager", trainable=True).parameters())


def test_random_weights_have_the_shape_and_follow_the_seed(qwen):
    loaded = load_base(qwen[0], device="cpu", dtype="float32")
    torch.manual_seed(5)
    first = load_base(qwen[0], device="cpu", dtype="float32", trainable=True, random_weights=True)
    torch.manual_seed(5)
    second = load_base(qwen[0], device="cpu", dtype="float32", random_weights=True)
    for (name, own), (_, a), (_, b) in zip(loaded.named_parameters(), first.named_parameters(), second.named_parameters()):
        assert own.shape == a.shape
        assert torch.equal(a, b), name
        assert a.requires_grad
    assert not torch.equal(loaded.lm_head.weight, first.lm_head.weight)


def test_the_dtype_is_the_checkpoints_own_or_the_one_asked_for(qwen):
    assert load_base(qwen[0], experts_implementation="eager").dtype == torch.float32
    assert load_base(qwen[0], experts_implementation="eager", dtype="bfloat16").dtype == torch.bfloat16
    with pytest.raises(ConfigError, match="dtype 'bf17' is unknown"):
        load_base(qwen[0], dtype="bf17")


def test_a_multimodal_checkpoint_loads_as_its_text_part(tmp_path):
    torch.manual_seed(0)
    text = {**TEXT, **GEMMA, "num_kv_shared_layers": 0, "final_logit_softcapping": 30.0}
    config = CONFIG_MAPPING["gemma4"](text_config=text, vision_config={**VISION, "head_dim": 8}, audio_config=None)
    whole = AutoModelForCausalLM.from_config(config).eval()
    whole.save_pretrained(tmp_path)
    base = load_base(tmp_path, experts_implementation="grouped_mm")
    assert type(base).__name__ == "Gemma4ForCausalLM"
    assert not [name for name, _ in base.named_modules() if "vision" in name]
    assert base.lm_head.weight.data_ptr() == base.get_input_embeddings().weight.data_ptr()
    torch.testing.assert_close(base(input_ids=IDS).logits, whole(input_ids=IDS).logits)


def test_a_missing_shard_is_named(qwen, tmp_path):
    folder = copy_of(qwen[0], tmp_path)
    shard = sorted(folder.glob("*.safetensors"))[1]
    shard.unlink()
    with pytest.raises(ModelError, match=shard.name):
        load_base(folder)


def test_a_shard_cut_short_is_named(qwen, tmp_path):
    folder = copy_of(qwen[0], tmp_path)
    shard = sorted(folder.glob("*.safetensors"))[1]
    shard.write_bytes(shard.read_bytes()[:-10])
    with pytest.raises(ModelError, match=f"{shard.name} is cut short"):
        load_base(folder)


def test_a_tensor_that_no_file_holds_is_named(qwen, tmp_path):
    folder = copy_of(qwen[0], tmp_path)
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    name = "model.layers.1.self_attn.q_proj.weight"
    shard = folder / index["weight_map"].pop(name)
    tensors = load_file(shard)
    del tensors[name]
    save_file(tensors or {"unused": torch.zeros(1)}, shard)
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ModelError, match=r"lacks 1 of the model's tensors, first 'model.layers.1.self_attn.q_proj.weight'"):
        load_base(folder, experts_implementation="eager")


def test_code_that_comes_with_a_model_is_not_run_unless_asked(qwen, tmp_path):
    folder = copy_of(qwen[0], tmp_path)
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "homemade", "auto_map": {"AutoConfig": "homemade.Config"}}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "homemade.py").write_text("raise SystemExit('ran')")
    with pytest.raises(ModelError, match="--trust-remote-code"):
        load_base(folder)


def test_flash_attention_without_a_gpu_is_refused(qwen):
    with pytest.raises(ConfigError, match="needs a CUDA GPU"):
        load_base(qwen[0], device="cpu", attn_implementation="flash_attention_2")


def test_a_missing_folder_is_told_before_torch_is_imported(tmp_path):
    (tmp_path / "qwen3-tiny").mkdir()
    code = (
        "import sys\nfrom ropewalk.models.hub import resolve_base\nfrom ropewalk.errors import ModelError\n"
        f"try: resolve_base({str(tmp_path / 'qwen3-tyni')!r})\n"
        "except ModelError as error: print(error)\n"
        "print([name for name in ('torch', 'transformers') if name in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.splitlines()
    assert "qwen3-tyni' not found; did you mean" in out[0]
    assert out[0].endswith("qwen3-tiny'?")
    assert out[1] == "[]"


def dequantised_twin(model, quantised):
    """The plain model with every weight replaced by what its quantised form stands for."""
    for name, module in quantised.named_modules():
        if isinstance(module, Quantised):
            model.get_parameter(name).data = module.dequantize(torch.float32)
    return model


@pytest.mark.parametrize("quantize", ["nf4", "int8"])
def test_a_base_quantised_while_loading_computes_with_the_dequantised_weights(qwen, quantize):
    folder, model = qwen
    base = load_base(folder, quantize=quantize)
    twin = dequantised_twin(copy.deepcopy(model), base)
    torch.testing.assert_close(base(input_ids=IDS).logits, twin(input_ids=IDS).logits, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(base(input_ids=IDS).logits, model(input_ids=IDS).logits)


def test_linears_and_experts_are_quantised_and_nothing_else(qwen):
    base = load_base(qwen[0], quantize="nf4")
    kept = {name for name, module in base.named_modules() if isinstance(module, Quantised)}
    assert kept == {
        f"model.layers.{layer}.{name}"
        for layer in (0, 1)
        for name in (
            *(f"self_attn.{part}_proj.weight" for part in "qkvo"),
            "mlp.experts.gate_up_proj",
            "mlp.experts.down_proj",
        )
    }
    assert {name.rpartition(".")[2] for name, _ in base.named_parameters()} == {"weight"}
    assert base.lm_head.weight.dtype == torch.float32


def test_biases_of_quantised_layers_are_loaded(tmp_path):
    torch.manual_seed(0)
    config = CONFIG_MAPPING["qwen2"](**TEXT)  # q, k and v have biases
    model = AutoModelForCausalLM.from_config(config).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter)
    model.save_pretrained(tmp_path)
    base = load_base(tmp_path, quantize="int8")
    assert torch.equal(base.model.layers[0].self_attn.q_proj.bias, model.model.layers[0].self_attn.q_proj.bias)
    twin = dequantised_twin(model, base)
    torch.testing.assert_close(base(input_ids=IDS).logits, twin(input_ids=IDS).logits, rtol=1e-4, atol=1e-5)


def test_a_quantised_base_passes_gradients_to_its_input(qwen):
    base = load_base(qwen[0], quantize="nf4")
    inputs = base.get_input_embeddings()(IDS).detach().requires_grad_()
    base(inputs_embeds=inputs).logits.sum().backward()
    assert inputs.grad.abs().sum() > 0


def test_a_quantised_base_is_not_for_full_fine_tuning(qwen):
    with pytest.raises(ConfigError, match="cannot be trained whole"):
        load_base(qwen[0], quantize="nf4", trainable=True)
    with pytest.raises(ConfigError, match="quantize 'nf5' is unknown"):
        load_base(qwen[0], quantize="nf5")
