"""Weights in blocks compute what plain ones do."""

import pytest
import torch

from ropewalk.kernels.blocked import Blocked, BlockedLinear, pays, plain
from ropewalk.kernels.expert_lora import Experts, expert_lora
from ropewalk.kernels.gates import Glu

needs_bf16 = pytest.mark.skipif(not pays(torch.zeros(1, dtype=torch.bfloat16)), reason="this CPU has no 16-bit products")


def weight(*shape: int) -> torch.Tensor:
    return (torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape))) * 0.1).bfloat16()


@needs_bf16
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("shape", [(24, 40), (3, 24, 40), (2, 33, 17)])
def test_the_plain_weight_comes_back_bit_for_bit(shape: tuple[int, ...], transposed: bool) -> None:
    given = weight(*shape)
    blocked = Blocked.of(given, transposed)
    assert blocked.shape == given.shape
    assert blocked.numel() == given.numel()
    assert torch.equal(blocked.dequantize(torch.bfloat16), given)


@needs_bf16
@pytest.mark.parametrize("rows", [1, 5, 64, 300])
def test_a_linear_layer_is_as_near_to_float32_as_the_plain_one(rows: int) -> None:
    given, bias, x = weight(96, 160), weight(96), weight(rows, 160)
    layer = BlockedLinear(Blocked.of(given), bias)
    truth = plain(x.float(), given.float(), bias.float())
    error = (layer(x).float() - truth).abs().max()
    assert error <= 1.5 * (plain(x, given, bias).float() - truth).abs().max() + 1e-6


@needs_bf16
@pytest.mark.parametrize("transposed", [False, True])
def test_experts_in_blocks_are_experts(transposed: bool) -> None:
    up, down = weight(4, 64, 48), weight(4, 48, 32)
    if transposed:
        up, down = up.transpose(1, 2).contiguous(), down.transpose(1, 2).contiguous()
    x, ids = weight(9, 48), torch.randint(0, 4, (9, 2), generator=torch.Generator().manual_seed(1))
    weights = torch.full((9, 2), 0.5)
    gate = Glu("silu", False)
    with torch.no_grad():
        expected = expert_lora(x.float(), ids, weights, Experts(up.float(), down.float(), gate, transposed=transposed))
        usual = expert_lora(x, ids, weights, Experts(up, down, gate, transposed=transposed))
        blocks = Experts(Blocked.of(up, transposed), Blocked.of(down, transposed), gate, transposed=transposed)
        found = expert_lora(x, ids, weights, blocks)
    assert (found.float() - expected).abs().max() <= 1.5 * (usual.float() - expected).abs().max() + 1e-6


@pytest.mark.parametrize("rows", [1, 16, 100])
def test_a_float32_layer_in_blocks_computes_the_same(rows: int) -> None:
    given, x = weight(96, 160).float(), weight(rows, 160).float()
    assert pays(given)
    torch.testing.assert_close(BlockedLinear(Blocked.of(given))(x), plain(x, given), atol=1e-6, rtol=1e-5)


def test_experts_in_float32_and_double_precision_stay_as_they_are() -> None:
    assert not pays(torch.zeros(2, 2, 2))
    assert not pays(torch.zeros(2, 2, dtype=torch.float64))
