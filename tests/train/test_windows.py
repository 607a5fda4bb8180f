"""Rows longer than a layer's window: attention by spans in place of a mask over the whole row, for models with windows, wide heads and sinks."""

import pytest
import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from ropewalk.kernels.branching import Branching, Piece
from ropewalk.models.experts import NAME, expert_modules
from ropewalk.models.head import output_head
from ropewalk.models.lora import LoraSpec, attach
from ropewalk.train.branching import BranchingModel

SIZES = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
TYPES = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 5, "vocab_size": 99, "pad_token_id": 0}
MODELS = {
    "gemma4_text": {
        "head_dim": 16,
        "global_head_dim": 512,
        "num_global_key_value_heads": 1,
        "attention_k_eq_v": True,
        "enable_moe_block": True,
        "num_experts": 4,
        "top_k_experts": 2,
        "moe_intermediate_size": 32,
        "hidden_size_per_layer_input": 0,
        "final_logit_softcapping": 30.0,
    },
    "gpt_oss": {"head_dim": 16, "num_local_experts": 4, "num_experts_per_tok": 2},
}


@pytest.fixture(params=sorted(MODELS))
def taught(request):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[request.param](**SIZES, **TYPES, **MODELS[request.param]))
    model = model.double()
    adapter = attach(model, LoraSpec(r=4), seed=0, dtype=torch.float64)
    with torch.no_grad():
        for name, parameter in (*adapter.named_parameters().items(), *model.named_parameters()):
            if "lora" in name or "sinks" in name:
                parameter.normal_(std=0.3)
    model.set_experts_implementation(NAME)
    assert any(True for _ in expert_modules(model))
    branching = BranchingModel(model, output_head(model))
    assert branching.reason == ""
    assert branching.window == 5
    return model, adapter, branching


@pytest.mark.parametrize("lengths", [(40,), (17, 3, 20)])
def test_loss_and_gradients_are_those_of_dense_masks_over_each_sample(taught, lengths):
    """In float64: in float32 the gradients of so even a softmax are lost in its rounding, whoever computes them."""
    model, adapter, branching = taught
    ids = torch.randint(1, 99, (1, sum(lengths)), generator=torch.Generator().manual_seed(1))
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    labels = ids.masked_fill(positions == 0, -100)
    with branching.row(Branching((Piece(0, lengths),), ids.shape[1])) as attended:
        loss, _ = branching.head.loss(model, ids, labels, positions)
    assert attended == {0, 1}
    alone = [
        branching.head.loss(model, *part)[0]
        for part in zip(ids.split(lengths, 1), labels.split(lengths, 1), positions.split(lengths, 1))
    ]
    found = [[one.detach(), *torch.autograd.grad(one, list(adapter.parameters()))] for one in (loss, torch.stack(alone).sum())]
    for spans, mask in zip(*found):
        assert (spans - mask).abs().max() <= 1e-6 * mask.abs().max()
