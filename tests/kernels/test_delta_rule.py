"""The gated delta rule in one piece is the rule id after id, and transformers' own."""

import pytest
import torch
from transformers.models.qwen3_5_moe.modeling_qwen3_5_moe import torch_chunk_gated_delta_rule

from ropewalk.kernels.delta_rule import LONGEST, delta_rule, plain


def case(length: int, decay: float, each: int = 2, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, ...]:
    draw = torch.Generator().manual_seed(length)
    query, key = (torch.randn(2, length, 3, 8, generator=draw, dtype=torch.float64) for _ in range(2))
    value = torch.randn(2, length, 3 * each, 6, generator=draw, dtype=torch.float64)
    g = -decay * torch.rand(2, length, 3 * each, generator=draw, dtype=torch.float64)
    beta = torch.rand(2, length, 3 * each, generator=draw, dtype=torch.float64)
    return query.to(dtype), key.to(dtype), value.to(dtype), g.float(), beta.to(dtype)


def state_of(each: int = 2) -> torch.Tensor:
    return torch.randn(2, 3 * each, 8, 6, generator=torch.Generator().manual_seed(7))


@pytest.mark.parametrize("decay", [0.01, 1.0, 50.0])
@pytest.mark.parametrize("length", [1, 2, 17, LONGEST])
@pytest.mark.parametrize("each", [1, 2])
@pytest.mark.parametrize("follows", [True, False])
def test_in_one_piece_and_id_after_id(length, decay, each, follows):
    given, state = case(length, decay, each), state_of(each) if follows else None
    for mine, truth in zip(delta_rule(*given, state, True), plain(*given, state, True)):
        assert mine.shape == truth.shape
        torch.testing.assert_close(mine, truth, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("unit", [True, False])
def test_it_is_what_transformers_computes(unit):
    query, key, value, g, beta = case(40, 3.0)
    key = key if unit else key / 4  # keys of any length would make the rule itself grow without bound
    mine = delta_rule(query, key, value, g, beta, state_of(), unit)
    more = {"initial_state": state_of(), "output_final_state": True, "use_qk_l2norm_in_kernel": unit}
    its = torch_chunk_gated_delta_rule(query, key, value, g=g, beta=beta, **more)
    for a, b in zip(mine, its):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


def test_in_16_bits_it_computes_in_32():
    given = case(20, 1.0, dtype=torch.bfloat16)
    out, state = delta_rule(*given, state_of(), True)
    assert out.dtype == torch.bfloat16
    wide, wide_state = delta_rule(*(t.float() for t in given), state_of(), True)
    assert torch.equal(out, wide.bfloat16())
    assert state.dtype == torch.float32
    assert torch.equal(state, wide_state)


def test_what_decayed_long_ago_is_neither_infinite_nor_no_number():
    query, key, value, g, beta = case(LONGEST, 1.0)
    g = torch.full_like(g, -200.0)
    for found in delta_rule(query, key, value, g, beta, state_of(), True):
        assert found.isfinite().all()
