"""Moments in 8 bits between the steps."""

import pytest
import torch

from ropewalk.kernels.eight_bits import BLOCK, book, code_book, dequantise, quantise

CPU = torch.device("cpu")


def there_and_back(x, signed):
    kind, codes, scales = book(signed, CPU), torch.empty(x.numel(), dtype=torch.uint8), torch.empty(x.numel() // BLOCK)
    quantise(x.clone(), codes, scales, kind)
    return dequantise(codes, scales, kind, torch.empty_like(x))


def numbers(count, signed):
    x = torch.randn(count, generator=torch.Generator().manual_seed(3)) * 1e-3
    return x if signed else x.square()


@pytest.mark.parametrize("signed", [True, False])
def test_a_code_book_has_256_numbers_over_seven_decades(signed):
    values = code_book(signed)
    assert values.unique().numel() == 256
    assert values.max() == 1
    assert 0 in values
    # the last decade of a mean is [0.1, 1] in 64 parts of 0.9 / 64, its lowest in one whose middle is 0.55, times a millionth
    assert values[-2] == pytest.approx(1 - 0.9 / (128 if signed else 256))
    assert values[values > 0][0] == pytest.approx(0.55e-6 if signed else 0.325e-6)
    assert int((values < 0).sum()) == (127 if signed else 0)


@pytest.mark.parametrize("signed", [True, False])
def test_the_numbers_of_the_code_book_come_back_exactly(signed):
    x = code_book(signed) * 4.0
    torch.testing.assert_close(there_and_back(x, signed), x, rtol=1e-6, atol=0)


@pytest.mark.parametrize("signed", [True, False])
def test_a_number_goes_to_its_nearest_code_but_for_float16s_own_rounding(signed):
    x, values = numbers(64 * BLOCK, signed), code_book(signed)
    back = there_and_back(x, signed)
    largest = x.view(-1, BLOCK).abs().amax(-1, keepdim=True)
    share = (x.view(-1, BLOCK) / largest).flatten()
    nearest = (share[:, None] - values).abs().amin(-1)
    found = ((back - x).view(-1, BLOCK) / largest).abs().flatten()
    # float16 has 11 bits, and is off by half of 1/1024 of a number, or below 6e-5 by half of 6e-8
    assert (found <= nearest + share.abs() / 1024 + 6e-8).all()


def test_means_lose_three_hundredths_and_squares_half_of_that():
    errors = [float((there_and_back(x, s) - x).norm() / x.norm()) for s in (True, False) for x in [numbers(256 * BLOCK, s)]]
    assert errors[0] < 0.03
    assert errors[1] < 0.015


@pytest.mark.parametrize("value", [0.0, 1e-37, 3e38])
def test_blocks_of_one_number_stay_that_number(value):
    x = torch.full((2 * BLOCK,), value)
    assert torch.equal(there_and_back(x, True), x)
    assert torch.equal(there_and_back(x, False), x)


def test_a_block_does_not_feel_its_neighbours():
    x = numbers(2 * BLOCK, True)
    louder = x.clone()
    louder[BLOCK:] *= 1e6
    assert torch.equal(there_and_back(x, True)[:BLOCK], there_and_back(louder, True)[:BLOCK])
