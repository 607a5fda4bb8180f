from __future__ import annotations

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from ropewalk.kernels.quant import FORMATS, LEVELS, Int4, Int8, Nf4, QuantLinear

SHAPES = [(48, 64), (7, 13), (1, 1), (5, 24, 32), (3, 6, 11)]


def weight(*shape, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(5)).to(dtype) * 0.02


def test_a_block_made_of_the_levels_themselves_comes_back_exactly():
    values = torch.tensor(LEVELS).repeat(4).view(1, 64) * 0.5
    assert torch.equal(Nf4.of(values, double=False).dequantize(torch.float32), values)


def test_two_codes_share_a_byte_the_first_in_the_upper_half():
    # of the block (-1, 0, ..., 0): level 0 is -1 and level 7 is 0, so the first byte is 0x07 and the others 0x77
    values = torch.zeros(1, 64)
    values[0, 0] = -1
    assert Nf4.of(values).codes[0, :2].tolist() == [0x07, 0x77]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("double", [False, True])
def test_nf4_is_off_by_at_most_half_the_widest_gap(shape, double):
    w = weight(*shape)
    back = Nf4.of(w, double=double).dequantize(torch.float32)
    # the widest gap between levels is 1 - 0.6962 = 0.3038, so no value is off by more than 0.152 of its block's maximum;
    # double quantisation moves a maximum by at most half of 1/255 of the range
    assert back.shape == w.shape
    assert (back - w).abs().max() <= (0.152 + 0.002 * double) * w.abs().max()


def test_nf4_loses_a_tenth_and_int8_a_hundredth_of_a_normal_weight():
    w = weight(256, 256)
    errors = {name: float((made.of(w).dequantize(torch.float32) - w).norm() / w.norm()) for name, made in FORMATS.items()}
    assert 0.08 < errors["nf4"] < 0.10  # QLoRA reports about 0.095 for normal weights at block size 64
    # even steps of 1/8 of a block's maximum, whose square is 5.4 variances among 32 normal numbers: sqrt(5.4 / 64 / 12) = 0.084
    assert 0.080 < errors["int4"] < 0.088
    assert 0.003 < errors["int8"] < 0.01


@pytest.mark.parametrize("sign", [1, -1])
def test_16_even_steps_come_back_exactly_and_the_largest_keeps_its_sign(sign):
    values = sign * torch.arange(-7, 9).repeat(2).view(1, 32) / 8
    assert torch.equal(Int4.of(values, double=False).dequantize(torch.float32), values)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("double", [False, True])
def test_int4_is_off_by_half_a_step_or_at_the_far_end_by_one(shape, double):
    w = weight(*shape)
    off = (Int4.of(w, double=double).dequantize(torch.float32) - w).abs().flatten(w.dim() - 2)
    blocks = torch.nn.functional.pad(w.flatten(w.dim() - 2), (0, -off.shape[-1] % 32)).unflatten(-1, (-1, 32))
    largest = blocks.abs().amax(-1).repeat_interleave(32, -1)[..., : off.shape[-1]]
    # 16 steps of 1/8 end at -7/8 on the side that the largest is not on; double quantisation moves a maximum by half of 1/255 of
    # the range, which with both signs is twice the largest
    slack = w.abs().max() / 255 * double + 1e-9
    assert (off <= largest / 8 + slack).all()
    assert float((off <= largest / 16 + slack).float().mean()) > 0.97


def test_int8_is_off_by_at_most_half_a_step_of_its_row():
    w = weight(9, 33)
    back = Int8.of(w).dequantize(torch.float32)
    assert ((back - w).abs() <= w.abs().amax(dim=-1, keepdim=True) / 254 * 1.001).all()


@pytest.mark.parametrize("made", FORMATS.values())
def test_zeros_and_rows_of_zeros_stay_zero(made):
    w = weight(4, 64)
    w[2] = 0
    back = made.of(w).dequantize(torch.float32)
    assert (back[2] == 0).all()
    assert torch.isfinite(back).all()
    assert (made.of(torch.zeros(2, 64)).dequantize(torch.float32) == 0).all()


@pytest.mark.parametrize("made", FORMATS.values())
def test_an_expert_of_a_stack_is_quantised_as_if_it_were_alone(made):
    w = weight(5, 24, 32)
    stack = made.of(w).dequantize(torch.float32)
    for expert in range(5):
        assert torch.equal(stack[expert], made.of(w[expert]).dequantize(torch.float32))


@pytest.mark.parametrize("made", FORMATS.values())
def test_chunks_of_experts_make_no_difference(made, monkeypatch):
    w = weight(5, 24, 32)
    whole = made.of(w).dequantize(torch.bfloat16)
    monkeypatch.setattr("ropewalk.kernels.quant.AT_ONCE", 24 * 32 * 2)
    for most in (24 * 32 * 2, 24 * 32 - 1, 65):
        monkeypatch.setattr("ropewalk.kernels.quant.READ_AT_ONCE", most)
        assert torch.equal(made.of(w).dequantize(torch.bfloat16), whole)
    assert torch.equal(made.of(w).dequantize(torch.bfloat16), whole)


@pytest.mark.parametrize("made", FORMATS.values())
@pytest.mark.parametrize("shape", [(300, 700), (5, 300, 70)])
def test_pieces_of_a_matrix_make_no_difference_and_little_is_held_beside_it(made, shape, monkeypatch):
    kept = made.of(weight(*shape))
    whole = kept.dequantize(torch.bfloat16)
    monkeypatch.setattr("ropewalk.kernels.quant.AT_ONCE", 2**14)
    kept.dequantize(torch.bfloat16)  # its tables are there from here on
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        assert torch.equal(kept.dequantize(torch.bfloat16), whole)
    now = most = 0
    events = [(e.start_ns(), e.nbytes()) for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    for _, size in sorted(events, key=lambda event: event[0]):
        now += size
        most = max(most, now)
    # besides the bfloat16: of a piece the codes as indices, the values in float32 once or twice, and a few maxima
    assert whole.nbytes <= most <= whole.nbytes + 12 * 2**14 + whole.numel()  # and a byte each of what equal() compares


def test_bytes_kept_are_what_is_promised():
    # 256 x 1024 values = 4096 blocks = 16 groups of maxima
    w = weight(256, 1024, dtype=torch.bfloat16)
    n = 256 * 1024
    assert Nf4.of(w, double=False).nbytes == n // 2 + 4 * n // 64  # 4.5 bits
    assert Nf4.of(w).nbytes == n // 2 + n // 64 + 2 * 4 * n // 64 // 256  # 4.129 bits
    assert Int4.of(w).nbytes == n // 2 + n // 32 + 2 * 4 * n // 32 // 256  # 4.258 bits
    assert Int8.of(w).nbytes == n + 4 * 256


@pytest.mark.parametrize("made", FORMATS.values())
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_are_those_through_the_dequantised_weight(made, dtype):
    bias = torch.nn.Parameter(torch.randn(7).to(dtype))
    layer = QuantLinear(made.of(weight(7, 13, dtype=dtype)), bias)
    layer.bias = bias
    x = torch.randn(2, 5, 13).to(dtype).requires_grad_()
    y = layer(x)
    plain = torch.nn.functional.linear(x, layer.weight.dequantize(dtype), bias)
    torch.testing.assert_close(y, plain)
    upstream = torch.randn_like(y)
    for got, expected in zip(torch.autograd.grad(y, (x, bias), upstream), torch.autograd.grad(plain, (x, bias), upstream)):
        torch.testing.assert_close(got, expected)


def test_nothing_of_the_weights_size_is_kept_for_backward():
    layer = QuantLinear(Nf4.of(weight(64, 32)))
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        layer(torch.randn(3, 32, requires_grad=True))
    assert kept == []


def test_a_quantised_layer_looks_like_the_layer_it_replaces():
    layer = QuantLinear(Nf4.of(weight(7, 13, dtype=torch.bfloat16)))
    assert isinstance(layer, torch.nn.Linear)
    assert (layer.in_features, layer.out_features, tuple(layer.weight.shape)) == (13, 7, (7, 13))
    assert layer.weight.dtype == torch.bfloat16
    assert not list(layer.parameters())


def test_casting_the_model_changes_the_computation_and_not_the_scales():
    layer = torch.nn.Sequential(QuantLinear(Nf4.of(weight(8, 64), double=False))).to(torch.bfloat16)
    assert layer[0].weight.dtype == torch.bfloat16
    assert layer[0].weight.scales.dtype == torch.float32
    assert layer(torch.randn(2, 64, dtype=torch.bfloat16)).dtype == torch.bfloat16


def test_a_quantised_layer_survives_its_state_dict():
    first, second = (QuantLinear(Nf4.of(w)) for w in (weight(8, 64), weight(8, 64) * 3 + 1))
    second.load_state_dict(first.state_dict())
    assert torch.equal(first.weight.dequantize(torch.float32), second.weight.dequantize(torch.float32))
