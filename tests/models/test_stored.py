"""Checkpoints that keep weights in few bits: MXFP4 as gpt-oss has it, FP8 in blocks as DeepSeek has it."""

from __future__ import annotations

import copy
import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from ropewalk.errors import ModelError
from ropewalk.kernels.quant import Nf4, Quantised
from ropewalk.models.load import load_base
from ropewalk.models.lora import LoraSpec, attach
from ropewalk.models.merge import merge
from ropewalk.models.quantized import Share
from ropewalk.models.stored import stored_as

IDS = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6]])
SIZE = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
}
FP4 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])


def mxfp4(weight):
    """[E, in, out] on the grid -> codes [E, out, in / 32, 16], two to a byte, and exponents [E, out, in / 32]; its own numbers."""
    blocks = weight.transpose(1, 2).unflatten(2, (-1, 32))
    exponent = (blocks.abs().amax(-1).log2().floor() - 2).clamp(min=-127)
    codes = (blocks[..., None] / exponent.exp2()[..., None, None] - FP4).abs().argmin(-1).to(torch.uint8)
    meant = (FP4[codes.long()] * exponent.exp2()[..., None]).flatten(2).transpose(1, 2)
    return codes[..., 0::2] | codes[..., 1::2] << 4, (exponent + 127).to(torch.uint8), meant.contiguous()


def fp8(weight):
    """[out, in] -> numbers in e4m3, a scale for each quarter [2, 2]; what they stand for."""
    quarters = weight.unflatten(1, (2, -1)).unflatten(0, (2, -1))  # [2, out / 2, 2, in / 2]
    scales = quarters.abs().amax((1, 3)) / 448
    stored = (quarters / scales[:, None, :, None]).flatten(2).flatten(0, 1).to(torch.float8_e4m3fn)
    meant = stored.float().unflatten(1, (2, -1)).unflatten(0, (2, -1)) * scales[:, None, :, None]
    return stored, scales, meant.flatten(2).flatten(0, 1)


def write(folder, tensors, told):
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": told}))


def built(kind, folder, **more):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[kind](**SIZE, **more)).eval()
    model.save_pretrained(folder)
    return model, load_file(folder / "model.safetensors")


@pytest.fixture(scope="session")
def gpt_oss(tmp_path_factory):
    folder = tmp_path_factory.mktemp("mxfp4")
    model, tensors = built("gpt_oss", folder, num_local_experts=4, num_experts_per_tok=2)
    for name, parameter in model.named_parameters():
        if name.endswith(("experts.gate_up_proj", "experts.down_proj")):
            tensors[f"{name}_blocks"], tensors[f"{name}_scales"], parameter.data = mxfp4(parameter.data)
            del tensors[name]
    write(folder, tensors, {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn", "lm_head"]})
    return folder, model


@pytest.fixture(scope="session")
def qwen3_moe(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fp8")
    more = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
    model, tensors = built("qwen3_moe", folder, **more)
    for name in [name for name in tensors if name.endswith("_proj.weight")]:
        tensors[name], tensors[f"{name}_scale_inv"], meant = fp8(tensors[name])
        if "experts" not in name:
            model.get_parameter(name).data = meant
            continue
        path, _, rest = name.partition("experts.")
        expert, projection, _ = rest.split(".")
        stack = model.get_parameter(f"{path}experts.{'down_proj' if projection == 'down_proj' else 'gate_up_proj'}")[
            int(expert)
        ]
        rows = {"gate_proj": slice(0, 32), "up_proj": slice(32, 64), "down_proj": slice(None)}[projection]
        stack.data[rows] = meant
    write(folder, tensors, {"quant_method": "fp8", "weight_block_size": [32, 32], "activation_scheme": "dynamic"})
    return folder, model


@pytest.fixture(params=["gpt_oss", "qwen3_moe"])
def stored(request):
    return request.getfixturevalue(request.param)


def test_read_as_the_numbers_that_it_stands_for(stored):
    folder, model = stored
    base = load_base(folder)
    found = dict(base.named_parameters())
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(found[name].data, parameter.data, rtol=1e-6, atol=1e-9)
    assert not hasattr(base.config, "quantization_config")
    torch.testing.assert_close(base(input_ids=IDS).logits, model(input_ids=IDS).logits, rtol=1e-4, atol=1e-5)
    assert load_base(folder, dtype="bfloat16").dtype == torch.bfloat16


def test_held_in_4_bits_and_adapted(stored):
    folder, model = stored
    base = load_base(folder, quantize="nf4")
    held = {name: module for name, module in base.named_modules() if isinstance(module, Quantised)}
    assert len(held) == 2 * 6  # of each layer four projections of attention and two stacks of experts
    twin = copy.deepcopy(model)
    for name, module in held.items():
        plain = model.get_parameter(name).data
        torch.testing.assert_close(
            module.dequantize(torch.float32), Nf4.of(plain).dequantize(torch.float32), rtol=1e-5, atol=1e-7
        )
        twin.get_parameter(name).data = module.dequantize(torch.float32)
    torch.testing.assert_close(base(input_ids=IDS).logits, twin(input_ids=IDS).logits, rtol=1e-4, atol=1e-5)
    adapter = attach(base, LoraSpec(r=4), seed=0)
    base(input_ids=IDS, labels=IDS).loss.backward()
    assert all(factor.grad is not None for factor in adapter.parameters())


def test_a_share_of_it_is_read(stored):
    folder, model = stored
    base = load_base(folder, share=Share(0, 2))
    name = next(name for name, _ in model.named_parameters() if name.endswith("experts.down_proj"))
    half = model.get_parameter(name).shape[0] // 2
    torch.testing.assert_close(base.get_parameter(name)[:half], model.get_parameter(name)[:half])


def test_merged_into_a_plain_checkpoint(stored, tmp_path):
    folder, _ = stored
    base = load_base(folder)
    adapter = attach(base, LoraSpec(r=4), seed=0)
    with torch.no_grad():
        for factor in adapter.parameters():
            factor.add_(torch.randn(factor.shape, generator=torch.Generator().manual_seed(1)) * 0.1)
        wanted = base(input_ids=IDS).logits
    adapter.save(tmp_path / "adapter")
    assert merge(folder, tmp_path / "adapter", tmp_path / "merged") <= 1e-4
    assert stored_as(tmp_path / "merged") is None
    torch.testing.assert_close(load_base(tmp_path / "merged")(input_ids=IDS).logits, wanted, rtol=1e-3, atol=1e-4)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "merged"]


def test_a_format_that_cannot_be_read_back_is_refused(tmp_path, gpt_oss):
    shutil.copy(gpt_oss[0] / "config.json", tmp_path)
    write(tmp_path, load_file(gpt_oss[0] / "model.safetensors"), {"quant_method": "gptq", "bits": 4})
    with pytest.raises(ModelError, match=r"stored as gptq, which cannot be read back .* in 16 bits that it was made from"):
        load_base(tmp_path)
