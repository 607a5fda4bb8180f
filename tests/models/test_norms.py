"""Norms that keep less are the same norms: their result to the bit, their gradient to the last digit or two."""

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from ropewalk.kernels.rms_norm import Form, plain, rms_norm
from ropewalk.models.experts import register_experts
from ropewalk.models.norms import FORMS, lean_norms
from ropewalk.models.tiny import tiny_config

KINDS = ["llama", "qwen3_moe", "gemma2", "gemma4_text", "gpt_oss", "qwen3_5_moe_text"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_a_model_says_the_same_to_the_bit_and_learns_the_same(kind, dtype):
    torch.manual_seed(0)
    register_experts()
    model = AutoModelForCausalLM.from_config(tiny_config(kind, vocab_size=199), dtype=dtype).requires_grad_(False).train()
    embedded = model.get_input_embeddings()(torch.randint(70, 199, (1, 12))).detach()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.normal_(std=0.5)
    found = []
    for lean in (False, True):
        if lean:
            assert lean_norms(model) >= 4
        x = embedded.clone().requires_grad_()
        logits = model(inputs_embeds=x).logits
        found.append((logits.detach(), torch.autograd.grad(logits.float().square().mean(), x)[0]))
    (logits, slope), (mine, my_slope) = found
    assert torch.equal(mine, logits)
    assert (my_slope - slope).norm() <= (2e-5 if dtype == torch.float32 else 0.05) * slope.norm()


@pytest.mark.parametrize("form", FORMS)
def test_the_gradient_is_that_of_the_definition(form):
    draw = torch.Generator().manual_seed(0)
    x, weight, upstream = (torch.randn(s, generator=draw) for s in ((3, 5, 24), (24,), (3, 5, 24)))
    for w in (weight, None):
        grads = []
        for function in (plain, rms_norm):
            leaf = x.clone().requires_grad_()
            grads.append(torch.autograd.grad(function(leaf, w, 1e-6, form), leaf, upstream)[0])
        assert torch.allclose(*grads, rtol=1e-5, atol=1e-6)


def test_in_16_bits_only_the_input_and_a_number_a_row_are_kept():
    x = torch.randn(8, 32, dtype=torch.bfloat16).requires_grad_()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        rms_norm(x, torch.ones(32, dtype=torch.bfloat16), 1e-6, Form())
    assert sorted(tuple(t.shape) for t in kept) == [(8, 1), (8, 32), (32,)]
    assert all(t.dtype == torch.bfloat16 for t in kept if t.shape[-1] == 32)


def test_where_nothing_compiles_the_plain_text_goes_on_and_is_told_once(monkeypatch, caplog):
    def fails(function):
        raise RuntimeError("no compiler")

    monkeypatch.setattr("ropewalk.kernels.rms_norm.usable", lambda device: True)
    monkeypatch.setattr("ropewalk.kernels.rms_norm._compile", fails)
    monkeypatch.setattr("ropewalk.kernels.rms_norm._refused", [])
    x = torch.randn(3, 8).requires_grad_()
    y = rms_norm(x, None, 1e-6, Form())
    y.sum().backward()
    assert torch.equal(y, plain(x, None, 1e-6, Form()))
    assert [record.message for record in caplog.records] == ["norms are not compiled here: RuntimeError: no compiler"]


class SomeRMSNorm(nn.Module):
    """Looks like a norm."""

    def __init__(self, halved=False):
        super().__init__()
        self.weight, self.eps, self.halved = nn.Parameter(torch.ones(16), requires_grad=False), 1e-6, halved

    def forward(self, x):
        wide = x.float()
        return self.weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)) / (2 if self.halved else 1)


def test_what_computes_something_else_or_is_trained_stays_what_it_is():
    assert lean_norms(nn.Sequential(SomeRMSNorm())) == 1
    assert lean_norms(nn.Sequential(SomeRMSNorm(halved=True))) == 0
    assert lean_norms(nn.Sequential(SomeRMSNorm().requires_grad_())) == 0
    twice = nn.Sequential(SomeRMSNorm())
    assert (lean_norms(twice), lean_norms(twice)) == (1, 0)
