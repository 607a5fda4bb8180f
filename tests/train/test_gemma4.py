"""Gemma 4 under training: what is its own, held against gradients that autograd gives of transformers' plain model."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import pytest
import torch
from transformers import Gemma4ForCausalLM, Gemma4TextConfig

from ropewalk.models.head import output_head
from ropewalk.models.lora import LoraSpec, attach

COMMON: dict[str, Any] = {
    "vocab_size": 67,
    "vocab_size_per_layer_input": 67,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "head_dim": 16,
    "sliding_window": 6,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "final_logit_softcapping": 2.0,
    "pad_token_id": 0,
    "attn_implementation": "eager",
}
SHAPES: dict[str, dict[str, Any]] = {
    "26B-A4B: wide heads whose keys are their values, experts with a scale each": {
        "num_key_value_heads": 2,
        "num_global_key_value_heads": 1,
        "global_head_dim": 512,
        "attention_k_eq_v": True,
        "hidden_size_per_layer_input": 0,
        "enable_moe_block": True,
        "num_experts": 4,
        "top_k_experts": 2,
        "moe_intermediate_size": 16,
    },
    "E2B: keys and values that layers share, inputs of every layer's own": {
        "num_key_value_heads": 1,
        "global_head_dim": 32,
        "num_kv_shared_layers": 2,
        "use_double_wide_mlp": True,
        "hidden_size_per_layer_input": 8,
    },
}


def near(found: torch.Tensor, wanted: torch.Tensor) -> None:
    assert (found - wanted).norm() <= 3e-4 * wanted.norm()


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_gradients_of_the_adapter_are_those_of_the_weights_it_is_laid_over(shape: dict[str, Any]) -> None:
    torch.manual_seed(0)
    model = Gemma4ForCausalLM(Gemma4TextConfig(**COMMON | shape))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(1.0 if "scale" in name or "norm" in name else 0.0, 0.3)
    plain = deepcopy(model)
    plain.set_experts_implementation("eager")
    ids = torch.randint(1, 67, (2, 20))
    labels = ids.masked_fill(torch.rand(2, 20) < 0.4, -100)
    labels[:, 0] = -100
    expected = plain(input_ids=ids, labels=labels).loss * (labels != -100).sum()
    expected.backward()
    assert plain(input_ids=ids).logits.abs().max() > 1.5  # the cap bites

    adapter = attach(model, LoraSpec(r=2, alpha=3.0), 0)
    model.train()
    loss, _ = output_head(model).loss(model, ids, labels)
    loss.backward()
    assert float(loss.detach()) == pytest.approx(float(expected.detach()), rel=1e-5)
    dense = dict(plain.named_parameters())
    # W + s B A with B = 0: the gradient of B is s (dL/dW) A^T
    for name, lora in adapter.linears.items():
        wanted = lora.scale * dense[f"{name}.weight"].grad @ lora.A.T
        near(lora.B.grad, wanted)
    for name, stack in adapter.experts.items():
        for projection, scale in stack.scales.items():
            a, b = stack.factors_of(projection)
            wanted = scale * torch.einsum("eoi,eri->eor", dense[f"{name}.{projection}"].grad, a)
            near(b.grad, wanted)
    assert bool(adapter.experts) == bool(shape.get("enable_moe_block"))
    adapted = {name.rpartition(".")[2] for name in adapter.linears}
    assert {"q_proj", "k_proj", "o_proj", "down_proj"} <= adapted
