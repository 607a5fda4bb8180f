"""The kernel that turns queries and keys beside its twin, in Triton's interpreter: collected by test_expert_kernels.py."""

from __future__ import annotations

from itertools import product

import pytest
import torch

from ropewalk.kernels import rotary as rotaries
from ropewalk.kernels.rotary import Form, plain, rotary
from ropewalk.kernels.rotary_fused import turn

FORMS = [Form(*given) for given in product(("halves", "neighbours", "parted"), ("each", "first", "half"), (False, True))]
TOKENS = 3


def drawn(form, axis=1, heads=3, size=16, turned=16, sequences=2, dtype=torch.float32):
    """x [2, heads, T, size] or [2, T, heads, size], and angles, which are not those of any turn."""
    torch.manual_seed(0)
    x = torch.randn(2, TOKENS, heads, size).to(dtype)
    width = turned // 2 if form.angles == "half" else turned
    return x.transpose(1, 2) if axis == 1 else x, *torch.randn(2, sequences, TOKENS, width).to(dtype)


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_queries_and_their_gradients_are_the_twins_to_the_bit(form):
    for axis, size, turned, sequences in ((1, 16, 16, 2), (2, 20, 12, 1)):
        x, cos, sin = drawn(form, axis, size=size, turned=turned, sequences=sequences)
        for back in (False, True):
            found = turn(x, cos, sin, form, axis, back=back)
            assert torch.equal(found, plain(x, cos, sin, form, axis, back=back))
            assert found.stride() == x.stride()


@pytest.mark.parametrize("form", [Form(), Form("neighbours", wide=True)], ids=str)
def test_so_are_those_of_16_bits(form):
    """Of float16: the interpreter cuts off what bfloat16 rounds."""
    x, cos, sin = drawn(form, dtype=torch.float16)
    assert torch.equal(turn(x, cos, sin, form, 1, back=False), plain(x, cos, sin, form))
    if form.wide:
        cos, sin = cos.float(), sin.float()
        assert torch.equal(turn(x, cos, sin, form, 1, back=True), plain(x, cos, sin, form, back=True))


def test_heads_that_no_program_takes_all_and_gradients_that_lie_anyhow(monkeypatch):
    monkeypatch.setattr("ropewalk.kernels.rotary_fused.NUMBERS", 16)
    x, cos, sin = drawn(Form(), heads=5)
    for given in (
        x,
        x[:, :1].expand(2, 5, TOKENS, 16),
        x.transpose(2, 3).contiguous().transpose(2, 3),
        x[..., ::2].repeat(1, 1, 1, 2),
    ):
        assert torch.equal(turn(given, cos, sin, Form(), 1, back=True), plain(given, cos, sin, Form(), back=True))
    assert turn(x[:, :, :0], cos[:, :0], sin[:, :0], Form(), 1, back=False).shape == (2, 5, 0, 16)


def test_it_is_what_runs_where_it_runs(monkeypatch):
    monkeypatch.setattr(rotaries, "usable", lambda device: True)
    monkeypatch.setattr(rotaries, "refuse", None)  # a kernel that fails raises
    monkeypatch.setattr(rotaries, "plain", None)
    x, cos, sin = drawn(Form())
    x.requires_grad_()
    up = torch.randn(x.shape)
    (slope,) = torch.autograd.grad(rotary(x, cos, sin, Form()), x, up)
    assert torch.equal(slope, plain(up, cos, sin, Form(), back=True))
