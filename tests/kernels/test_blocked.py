"""Weights in blocks compute what plain ones do."""

import pytest
import torch

from ropewalk.kernels import blocked as module
from ropewalk.kernels.blocked import FEW, Blocked, BlockedLinear, Blocks, Panels, Widened, pays, plain
from ropewalk.kernels.expert_lora import Experts, Factors, expert_lora
from ropewalk.kernels.gates import Glu


@pytest.fixture(params=["as this CPU does", "widened"])
def computed(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """16 bits as this CPU computes them, and as one does that does not multiply them."""
    if request.param == "widened":
        monkeypatch.setattr(module, "_computes", lambda dtype: False)
        monkeypatch.setattr(module, "WIDENED", 2000)


def weight(*shape: int) -> torch.Tensor:
    return (torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape))) * 0.1).bfloat16()


@pytest.mark.usefixtures("computed")
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("shape", [(24, 40), (3, 24, 40), (2, 33, 17)])
def test_the_plain_weight_comes_back_bit_for_bit(shape: tuple[int, ...], transposed: bool) -> None:
    given = weight(*shape)
    blocked = Blocked.of(given, transposed)
    assert blocked.shape == given.shape
    assert blocked.numel() == given.numel()
    assert torch.equal(blocked.dequantize(torch.bfloat16), given)


@pytest.mark.usefixtures("computed")
@pytest.mark.parametrize("rows", [1, 5, 64, 300])
def test_a_linear_layer_is_as_near_to_float32_as_the_plain_one(rows: int) -> None:
    given, bias, x = weight(96, 160), weight(96), weight(rows, 160)
    layer = BlockedLinear(Blocked.of(given), bias)
    truth = plain(x.float(), given.float(), bias.float())
    error = (layer(x).float() - truth).abs().max()
    assert error <= 1.5 * (plain(x, given, bias).float() - truth).abs().max() + 1e-6


@pytest.mark.usefixtures("computed")
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


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("shape", [(64, 32), (3, 96, 64)])
def test_panels_give_the_plain_weight_back(shape: tuple[int, ...], transposed: bool) -> None:
    given = weight(*shape).float()
    given = given.transpose(-1, -2).contiguous() if transposed else given
    panels = Blocked.of(given, transposed)
    assert isinstance(panels, Panels)
    assert torch.equal(panels.dequantize(torch.float32), given)


@pytest.mark.parametrize("rows", [1, FEW, FEW + 1])
@pytest.mark.parametrize("lead", [(), (2,)])
def test_a_layer_in_panels_computes_the_same(rows: int, lead: tuple[int, ...]) -> None:
    given, bias, x = weight(96, 160).float(), weight(96).float(), weight(*lead, rows, 160).float()
    layer = BlockedLinear(Blocked.of(given), bias)
    assert isinstance(layer.weight, Panels)
    torch.testing.assert_close(layer(x), plain(x, given, bias), atol=1e-6, rtol=1e-5)


def test_what_is_large_or_no_whole_number_of_panels_lies_in_onednns_blocks() -> None:
    assert isinstance(Blocked.of(torch.zeros(40, 64)), Blocks)
    assert isinstance(Blocked.of(torch.zeros(1 << 13, 1 << 9)), Blocks)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("tokens", [5, 90, 3 * FEW])
@pytest.mark.parametrize("adapted", [False, True])
def test_experts_in_panels_are_experts(tokens: int, transposed: bool, adapted: bool) -> None:
    up, down, bias = weight(4, 64, 32).float(), weight(4, 32, 32).float(), weight(4, 64).float()
    if transposed:
        up, down = up.transpose(1, 2).contiguous(), down.transpose(1, 2).contiguous()
    x = weight(tokens, 32).float()
    ids = torch.rand(tokens, 4, generator=torch.Generator().manual_seed(1)).topk(2).indices % 3  # nobody goes to the last one
    weights = torch.full((tokens, 2), 0.5)
    factors = [Factors(weight(4, 3, 32).float(), weight(4, wide, 3).float(), 2.0) if adapted else None for wide in (64, 32)]
    gate = Glu("silu", False)
    plain_ones = Experts(up, down, gate, up_bias=bias, transposed=transposed)
    panels = Experts(Blocked.of(up, transposed), Blocked.of(down, transposed), gate, up_bias=bias, transposed=transposed)
    with torch.no_grad():
        found, expected = (expert_lora(x, ids, weights, e, *factors) for e in (panels, plain_ones))
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_cpu_without_16_bit_products_widens_both_kinds(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_computes", lambda dtype: False)
    given, x = weight(96, 160).to(dtype), weight(3, 7, 160).to(dtype)
    assert pays(given)
    layer = BlockedLinear(Blocked.of(given))
    assert isinstance(layer.weight, Widened)
    assert layer(x).dtype == dtype
    torch.testing.assert_close(layer(x), plain(x.float(), given.float()).to(dtype))


def test_what_does_not_pay_stays_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_computes", lambda dtype: True)
    assert not pays(torch.zeros(2, 2, dtype=torch.float16))
    assert not pays(torch.zeros(2, 2, 2))
    assert not pays(torch.zeros(2, 2, dtype=torch.float64))
