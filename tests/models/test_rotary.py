"""Rotary positions that cost less are the same positions: results and gradients to the bit."""

import copy

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from ropewalk.kernels import rotary as rotaries
from ropewalk.kernels.rotary import Form, plain, rotary
from ropewalk.models.experts import register_experts
from ropewalk.models.rotary import FORMS, Lean, lean_rotary
from ropewalk.models.tiny import tiny_config

# halves, per tensor with the heads second, one angle a pair, partial, neighbours, neighbours in float32, neighbours parted
KINDS = ["llama", "qwen3_moe", "gemma4_text", "gpt_oss", "qwen3_5_moe_text", "glm4", "cohere", "deepseek_v3"]


def build(kind, dtype=torch.float32, seed=0):
    torch.manual_seed(seed)
    register_experts()
    model = AutoModelForCausalLM.from_config(tiny_config(kind, vocab_size=199), dtype=dtype, attn_implementation="eager")
    return model.requires_grad_(False).train()


def gradients(model, x):
    leaf = x.clone().requires_grad_()
    logits = model(inputs_embeds=leaf).logits
    return logits.detach(), torch.autograd.grad(logits.float().square().mean(), leaf)[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_a_model_says_and_learns_the_same_to_the_bit(kind, dtype, monkeypatch):
    model = build(kind, dtype)
    x = model.get_input_embeddings()(torch.randint(70, 199, (2, 9))).detach()
    own = gradients(model, x)
    attending = sum(type(module).__name__.endswith("Attention") for module in model.modules())
    assert lean_rotary(model) == attending > 0
    turned = []
    monkeypatch.setattr("ropewalk.models.rotary.rotary", lambda *given: turned.append(given) or rotary(*given))
    assert all(map(torch.equal, gradients(model, x), own))
    assert len(turned) == 2 * attending
    with torch.no_grad():
        assert torch.equal(model(inputs_embeds=x).logits, own[0])
    assert len(turned) == 2 * attending  # without a gradient nothing is exchanged


def test_another_model_of_the_same_classes_keeps_its_own(monkeypatch):
    taught, other = build("llama"), build("llama")
    assert lean_rotary(taught) == len(taught.model.layers)
    assert lean_rotary(taught) == 0  # it is done
    calls = []
    monkeypatch.setattr(Lean, "__call__", lambda self, *given: calls.append(self) or self.function(*given))
    x = torch.randn(1, 4, 64)
    gradients(other, x)
    assert not calls
    own = gradients(copy.deepcopy(taught), x)
    assert len(calls) == len(taught.model.layers)
    assert all(map(torch.equal, own, gradients(other, x)))


def turned(x, cos, sin, axis):
    half = x.shape[-1] // 2
    return x * cos.unsqueeze(axis) + torch.cat((-x[..., half:], x[..., :half]), dim=-1) * sin.unsqueeze(axis)


def turned_backwards(q, k, cos, sin, unsqueeze_dim=1):
    return turned(q, cos, -sin, unsqueeze_dim), turned(k, cos, -sin, unsqueeze_dim)


def turned_keys_twice(q, k, cos, sin, unsqueeze_dim=1):
    return turned(q, cos, sin, unsqueeze_dim), 2 * turned(k, cos, sin, unsqueeze_dim)


def turned_as_is_known(q, k, cos, sin, unsqueeze_dim=1):
    return turned(q, cos, sin, unsqueeze_dim), turned(k, cos, sin, unsqueeze_dim)


class Attention(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function


class Backwards(Attention):
    def forward(self, q, k, cos, sin):
        return turned_backwards(q, k, cos, sin)


class Twice(Attention):
    def forward(self, q, k, cos, sin):
        return turned_keys_twice(q, k, cos, sin)


class Known(Attention):
    def forward(self, q, k, cos, sin, axis=1):
        return turned_as_is_known(q, k, cos, sin, unsqueeze_dim=axis)


def test_what_computes_something_else_stays_what_it_is():
    assert [lean_rotary(kind(None)) for kind in (Backwards, Twice, Known)] == [0, 0, 1]


def test_what_was_not_compared_is_asked_of_the_function_itself(monkeypatch):
    monkeypatch.setattr("ropewalk.models.rotary.rotary", None)
    module = Known(None)
    lean_rotary(module)
    q, angles = torch.randn(1, 2, 3, 8, requires_grad=True), torch.randn(1, 3, 8)
    trained = angles.clone().requires_grad_()
    for given in ((q, q, trained, trained), (q.double(), q.double(), angles.double(), angles.double())):
        found, truth = module(*given), turned_as_is_known(*(t.detach() for t in given))
        assert all(map(torch.equal, found, truth))
    with pytest.raises(TypeError):
        module(q, q, angles, angles)  # ours, which is gone


def definition(x, cos, sin, form):
    """Place by place, of [B, h, T, D]."""
    count, places = form.count(cos), list(x.unbind(-1))
    for i in range(count):
        here, there = (i, i + count) if form.pairs == "halves" else (2 * i, 2 * i + 1)
        a, b = (here, there) if form.angles == "each" else (i, i)
        c1, s1, c2, s2 = (t[..., at].unsqueeze(1) for at in (a, b) for t in (cos, sin))
        to, and_to = (i, i + count) if form.pairs == "parted" else (here, there)
        places[to] = x[..., here] * c1 - x[..., there] * s1
        places[and_to] = x[..., there] * c2 + x[..., here] * s2
    return torch.stack(places, dim=-1)


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_results_and_gradients_are_those_of_the_definition(form):
    torch.manual_seed(0)
    x, up = torch.randn(2, 2, 3, 4, 12)
    cos, sin = torch.randn(2, 2, 4, 4 if form.angles == "half" else 8)
    found = []
    for function in (rotary, definition):
        leaf = x.clone().requires_grad_()
        y = function(leaf, cos, sin, form)
        found.append((y.detach(), torch.autograd.grad(y, leaf, up)[0]))
    for mine, truth in zip(*found):
        assert torch.allclose(mine, truth, atol=1e-6)
    assert torch.equal(rotary(x.transpose(1, 2), cos, sin, form, 2).transpose(1, 2), found[0][0])


def test_only_cosines_and_sines_are_kept():
    x, cos, sin = torch.randn(1, 4, 6, 16, requires_grad=True), torch.randn(1, 6, 16), torch.randn(1, 6, 16)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        rotary(x, cos, sin, Form())
    assert [t.data_ptr() for t in kept] == [cos.data_ptr(), sin.data_ptr()]


def test_a_kernel_that_does_not_run_is_told_once_and_the_twin_goes_on(monkeypatch, caplog):
    pytest.importorskip("triton")
    asked = []

    def fails(*_, **__):
        asked.append(True)
        raise RuntimeError("no such kernel")

    monkeypatch.setattr("ropewalk.kernels.triton_kernels._refused", False)
    monkeypatch.setattr(rotaries, "usable", lambda device: not rotaries.refuse.__globals__["_refused"])
    monkeypatch.setattr("ropewalk.kernels.rotary_fused.turn", fails)
    x, cos, sin = torch.randn(1, 4, 6, 16, requires_grad=True), torch.randn(1, 6, 16), torch.randn(1, 6, 16)
    y = rotary(x, cos, sin, Form())
    y.sum().backward()
    assert torch.equal(y, plain(x.detach(), cos, sin, Form()))
    assert (len(asked), [r.getMessage().count("no such kernel") for r in caplog.records]) == (1, [1])
