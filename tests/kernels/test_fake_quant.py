"""Numbers rounded to formats of few bits: by hand, never further than half a step, and with the gradient of what they were."""

import pytest
import torch

from ropewalk.kernels.fake_quant import E2M1, TOKENS, WEIGHTS, straight_through


def rounded(values, kind, block=4, table=WEIGHTS):
    x = torch.tensor([values])
    return (table[kind](x, block) if table is WEIGHTS else table[kind](x))[0].tolist()


def test_integers_by_hand():
    # the largest is 7.5: a step is 1; 7.5 rounds to 8, which 4 bits end below; blocks have scales of their own
    assert rounded([7.5, 3.4, -3.6, 0.2, 75, 31, -76, 0], "int4") == pytest.approx(
        [7, 3, -4, 0, 70.9333, 30.4, -76 * 8 / 7.5, 0]
    )
    assert rounded([127.5, 1.2, -3.7, 0.4], "int8") == pytest.approx([127, 1, -4, 0])


def test_inputs_of_int8_have_a_zero_point_and_hold_zero_exactly():
    # from -1 to 1.55 in steps of 0.01
    assert rounded([-1.0, 1.55, 0.0, 0.104], "int8", table=TOKENS) == pytest.approx([-1, 1.55, 0, 0.1], abs=1e-6)
    assert rounded([127.0, -3.4, 0.6, 0], "int8 symmetric", table=TOKENS) == pytest.approx([127, -3, 1, 0])


def test_four_bit_floats_by_hand():
    # mxfp4: 6 has the exponent 2, e2m1's own: a scale of 1; ties go to the even one
    values = [6.0, 5.0, 2.5, 3.5, 0.25, 0.75, -1.25, 1.75, 4.9, *[0.0] * 23]
    expected = [6, 4, 2, 4, 0, 1, -1, 2, 4, *[0] * 23]
    assert rounded(values, "mxfp4") == expected
    # 8 has the exponent 3: a scale of 2, and 3 is 1.5 steps; 15.9 / 2 is beyond the largest
    assert rounded([15.9, 3.0, *[0.0] * 30], "mxfp4")[:2] == [12, 3]
    # nvfp4: the largest of all is exact, and so is its half; the other block has a scale of its own
    found = rounded([6.0, 3.0, 2.6, *[0.0] * 13, 0.6, 0.3, *[0.0] * 14], "nvfp4")
    assert found[:3] == pytest.approx([6, 3, 3])
    assert found[16:18] == pytest.approx([0.6, 0.3], rel=0.04)


def test_ternary_by_hand():
    # the mean magnitude is 1
    assert rounded([1.6, -0.4, 0.3, -1.7], "ternary") == pytest.approx([1, 0, 0, -1])


def test_float8_keeps_three_bits_of_mantissa():
    assert rounded([448.0, 17.0, 1.06, 0.0], "float8") == pytest.approx([448, 16, 1.0, 0])


@pytest.mark.parametrize(("kind", "table"), [*((k, WEIGHTS) for k in WEIGHTS), *((k, TOKENS) for k in TOKENS)])
def test_what_is_rounded_once_stays_and_rows_do_not_feel_each_other(kind, table):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(4, 64, generator=generator)
    of = (lambda x: table[kind](x, 32)) if table is WEIGHTS else table[kind]
    once = of(x)
    assert (once - x).norm() < 0.6 * x.norm()
    assert once.abs().sum() > 0
    if kind not in ("int4", "int8", "ternary", "nvfp4", "float8"):  # whose scales are taken anew from what was rounded
        assert torch.allclose(of(once), once, rtol=0.01)
    if table is TOKENS:
        changed = torch.cat([x[:2], 100 * x[2:]])
        assert torch.equal(of(changed)[:2], once[:2])
    assert torch.equal(of(torch.zeros_like(x)), torch.zeros_like(x))


def test_the_gradient_goes_straight_through():
    x = torch.randn(2, 32, requires_grad=True)
    straight_through(x, WEIGHTS["int4"](x.detach(), 32)).sum().backward()
    assert torch.equal(x.grad, torch.ones_like(x))


def test_weights_that_are_trained_while_they_are_rounded_fit_better_than_weights_that_are_rounded_afterwards():
    # least squares over inputs that resemble each other, so that one weight can make up for another's rounding
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(256, 1, generator=generator) + 0.3 * torch.randn(256, 16, generator=generator)
    y = x @ torch.randn(16, 8, generator=generator)

    def lost(weight):
        return float((x @ WEIGHTS["int4"](weight, 16).T - y).square().mean())

    exact = torch.linalg.lstsq(x, y).solution.T.contiguous()
    weight = exact.clone().requires_grad_()
    for step in range(400):
        used = straight_through(weight, WEIGHTS["int4"](weight.detach(), 16))
        (gradient,) = torch.autograd.grad((x @ used.T - y).square().mean(), weight)
        weight.data -= 0.3 * (1 - step / 400) * gradient
    assert lost(weight.detach()) < 0.7 * lost(exact)


def test_the_numbers_of_e2m1_are_the_sixteen_of_its_bits():
    # sign, two bits of exponent with a bias of 1, one of mantissa
    made = {(1 + m / 2) * 2.0 ** (e - 1) if e else m / 2 for e in range(4) for m in range(2)}
    assert made == set(E2M1)
