"""Our implementation of transformers' experts: gates known by their values, and the way into the interface."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from ropewalk.errors import ModelError
from ropewalk.kernels.gates import AnyGate, ClampedGlu, Glu
from ropewalk.models.experts import _candidates, adapted_experts, experts_forward, gate_of, recognise, register_experts
from ropewalk.models.tiny import expert_architectures

ARCHITECTURES = dict(expert_architectures())


def experts_of(architecture):
    from ropewalk.models.day0 import build
    from ropewalk.models.experts import expert_modules

    return next(module for _, module in expert_modules(build(ARCHITECTURES[architecture])))


@pytest.mark.parametrize(
    ("architecture", "gate"),
    [
        ("mixtral", Glu("silu")),
        ("gemma4", Glu("gelu_tanh")),
        ("gpt_oss", ClampedGlu(7.0, 1.702, 1.0, True)),
        ("deepseek_v4", ClampedGlu(10.0, 1.0, 0.0)),
        ("minimax_m3_vl", ClampedGlu(7.0, 1.702, 1.0)),
    ],
)
def test_a_gate_is_known_by_what_it_computes(architecture, gate):
    assert gate_of(experts_of(architecture)) == gate


def test_an_unknown_gate_is_differentiated_as_it_is():
    module = SimpleNamespace(is_concatenated=True, limit=7.0)
    function = lambda z: z.chunk(2, -1)[0].tanh() * z.chunk(2, -1)[1]
    assert isinstance(recognise(function, _candidates(module)), AnyGate)


def test_a_clamp_is_not_taken_for_a_plain_gate():
    """Within the limit both are the same; the probe must reach beyond it."""
    function = ClampedGlu(100.0).plain
    assert isinstance(recognise(function, iter([Glu("silu")])), AnyGate)


def test_registering_makes_the_implementation_known():
    register_experts()
    register_experts()
    assert ALL_EXPERTS_FUNCTIONS["ropewalk"] is adapted_experts


def test_split_experts_are_refused_with_the_way_out():
    module = experts_of("mixtral")
    module._is_expert_parallel = True
    with pytest.raises(ModelError, match="grouped_mm"):
        experts_forward(module, torch.zeros(1, 64), torch.zeros(1, 2, dtype=torch.int64), torch.ones(1, 2))


def test_decoding_gives_what_the_models_own_experts_give():
    """Greedy generation with a key-value cache, one token at a time."""
    from ropewalk.models.tiny import tiny_config

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(tiny_config("qwen3_moe"), experts_implementation="eager").eval()
    ids = torch.randint(64, 256, (2, 5))
    how = {
        "max_new_tokens": 8,
        "do_sample": False,
        "pad_token_id": 0,
        "eos_token_id": None,
        "attention_mask": torch.ones_like(ids),
    }
    truth = model.generate(ids, **how)
    register_experts()
    model.set_experts_implementation("ropewalk")
    assert torch.equal(model.generate(ids, **how), truth)


def test_a_recomputed_layer_that_routes_anew_is_consistent_in_itself():
    """A replay may choose other experts where two are nearly even; its backward must then use the replay's rows alone."""
    from torch.utils.checkpoint import checkpoint

    from ropewalk.kernels.expert_lora import Experts, expert_lora

    torch.manual_seed(0)
    x, weights = torch.randn(6, 8, requires_grad=True), torch.rand(6, 2)
    experts = Experts(torch.randn(4, 16, 8), torch.randn(4, 8, 8), Glu())
    first, second = torch.tensor([[0, 1]] * 6), torch.tensor([[3, 1]] * 5 + [[2, 3]])
    choices = iter([first, second])
    out = checkpoint(
        lambda x: expert_lora(x, next(choices), weights, experts), x, use_reentrant=False, determinism_check="none"
    )
    (found,) = torch.autograd.grad(out.sum(), x)
    (truth,) = torch.autograd.grad(expert_lora(x, second, weights, experts).sum(), x)
    assert torch.allclose(found, truth, atol=1e-6)
