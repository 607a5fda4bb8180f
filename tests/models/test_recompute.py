"""What a layer computes again is the same to the bit, in every way and mixture of ways."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM

from ropewalk.errors import ModelError
from ropewalk.models.experts import NAME, register_experts
from ropewalk.models.head import output_head
from ropewalk.models.lora import LoraSpec, attach
from ropewalk.models.recompute import WAYS, _Rerouted, _Routed, decoder_layers, recompute
from ropewalk.models.tiny import tiny_config


@pytest.mark.parametrize("architecture", ["llama", "qwen3_moe", "gemma4_text", "qwen3_5_moe_text", "gpt_oss"])
def test_every_way_gives_the_same_gradients_to_the_bit(architecture: str) -> None:
    torch.manual_seed(0)
    register_experts()
    model = AutoModelForCausalLM.from_config(tiny_config(architecture, vocab_size=199))
    if architecture != "llama":
        model.set_experts_implementation(NAME)
    adapter = attach(model, LoraSpec(r=4), seed=0)
    for parameter in adapter.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    head, ids = output_head(model), torch.randint(70, 199, (2, 24))
    model.train()

    def gradients() -> list[torch.Tensor]:
        for parameter in adapter.parameters():
            parameter.grad = None
        head.loss(model, ids, ids)[0].backward()
        return [p.grad.clone() for p in adapter.parameters() if p.grad is not None]

    plain = gradients()
    assert any(g.abs().max() > 0 for g in plain)
    mixed = [WAYS[1 + i % 3] for i in range(len(decoder_layers(model)))]
    for ways in ("experts", "layer", "offload", mixed, "keep"):
        recompute(model, ways)
        assert all(map(torch.equal, plain, gradients())), ways


def test_a_model_without_layers_to_compute_again_says_so() -> None:
    with pytest.raises(ModelError, match="leave gradient_checkpointing out"):
        recompute(torch.nn.Linear(2, 2), "layer")


def test_what_is_compiled_stays_compiled_while_choices_are_kept():
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    torch.compiler.reset()
    compiled = torch.compile(lambda x: x.sin() + 1, backend=backend)
    first = _Routed()
    with first:
        compiled(torch.ones(3))
        chosen = torch.ones(3).topk(1).indices
    with _Rerouted(first):
        compiled(torch.ones(3))
        assert torch.equal(torch.ones(3).topk(1).indices, chosen)
    assert len(graphs) == 1
