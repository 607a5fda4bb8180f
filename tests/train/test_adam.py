"""AdamW over parameters laid end to end."""

import copy

import pytest
import torch

from ropewalk.errors import ModelError
from ropewalk.models.memory import _states
from ropewalk.train.adam import FlatAdamW, chances, round_stochastically
from ropewalk.train.checkpoint import restore_optimizer
from ropewalk.train.optim import make_optimizer

SHAPES = [(40, 130), (7,), (64, 100), (3, 50, 41), (1,)]
OPTIONS = {"lr": 1e-2, "betas": (0.9, 0.98), "eps": 1e-8, "weight_decay": 0.1}


def parameters(dtype=torch.float32):
    made = torch.Generator().manual_seed(1)
    return [torch.nn.Parameter(torch.randn(shape, generator=made).to(dtype)) for shape in SHAPES]


def gradients(own, step, without=()):
    made = torch.Generator().manual_seed(100 + step)
    for number, parameter in enumerate(own):
        drawn = torch.randn(parameter.shape, generator=made).to(parameter.dtype)
        parameter.grad = None if number in without else drawn


def trained(steps=6, dtype=torch.float32, without=(), **how):
    own = parameters(dtype)
    optimizer = FlatAdamW([{"params": own}], **{"few_bits": False, **OPTIONS, **how})
    for step in range(steps):
        gradients(own, step, without)
        optimizer.step()
    return own, optimizer


def equal(first, second):
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("piece", [None, 512])
def test_with_float32_moments_it_is_torchs_adamw(piece):
    own, _ = trained(piece=piece)
    theirs = parameters()
    optimizer = torch.optim.AdamW(theirs, **OPTIONS)
    for step in range(6):
        gradients(theirs, step)
        optimizer.step()
    for mine, other in zip(own, theirs, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-6, atol=1e-6)


def test_with_8_bits_it_goes_almost_the_same_way_and_small_tensors_exactly_the_same():
    plain, packed = trained(steps=30)[0], trained(steps=30, few_bits=True)[0]
    start = parameters()
    for number in (0, 2, 3):
        gone = (plain[number] - start[number]).norm()
        assert 0 < (packed[number] - plain[number]).norm() < 0.03 * gone
    assert equal([plain[1], plain[4]], [packed[1], packed[4]])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_how_the_numbers_are_cut_into_pieces_makes_no_difference(dtype):
    assert equal(trained(few_bits=True, dtype=dtype)[0], trained(few_bits=True, dtype=dtype, piece=512)[0])


def test_a_parameter_without_gradient_stays_and_so_do_its_moments():
    start, (own, optimizer) = parameters(), trained(steps=2, few_bits=True, without=(2,))
    assert torch.equal(own[2], start[2])
    steps = {id(p): step for lane in optimizer.lanes for p, step in zip(lane.parameters, lane.steps, strict=True)}
    assert [steps[id(p)] for p in own] == [2, 2, 0, 2, 2]
    gradients(own, 2)
    optimizer.step()  # its first step, beside others' third
    # Adam's first step is the rate in every number, whatever the gradient's size
    moved = own[2] - start[2] * (1 - OPTIONS["lr"] * OPTIONS["weight_decay"])
    torch.testing.assert_close(moved.abs(), torch.full_like(moved, OPTIONS["lr"]), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("how", [{}, {"few_bits": True}, {"few_bits": True, "dtype": torch.bfloat16, "master": True}])
def test_a_run_gone_on_with_gives_the_same_bits(how, tmp_path):
    whole, _ = trained(steps=6, **how)
    own, optimizer = trained(steps=3, **how)
    torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
    own = [torch.nn.Parameter(p.detach().clone()) for p in own]
    again = FlatAdamW([{"params": own}], **{"few_bits": False, **OPTIONS, **{k: v for k, v in how.items() if k != "dtype"}})
    restore_optimizer(tmp_path, again)
    for step in range(3, 6):
        gradients(own, step)
        again.step()
    assert equal(own, whole)


def test_the_state_of_another_optimizer_is_refused():
    _, eight = trained(few_bits=True)
    plain = torch.optim.AdamW(parameters())
    with pytest.raises(ModelError, match="of another optimizer"):
        eight.load_state_dict(plain.state_dict())
    with pytest.raises(ModelError, match="--restart"):
        eight.load_state_dict(trained()[1].state_dict())


def test_without_master_small_steps_are_not_lost_and_with_one_the_sum_is_exact():
    """A thousand steps of a ten-thousandth each, from 1: bfloat16 has nothing between 1 and 1.0078, nor 0.9961."""
    found = {}
    for name, how in {"stochastic": {"few_bits": True}, "master": {"few_bits": True, "master": True}}.items():
        own = [torch.nn.Parameter(torch.ones(8192, dtype=torch.bfloat16))]
        optimizer = FlatAdamW([{"params": own}], **{**OPTIONS, "lr": 1e-4, "weight_decay": 0.0, **how})
        for _ in range(1000):
            own[0].grad = torch.full_like(own[0], 0.5)
            optimizer.step()
        found[name] = own[0].detach().float()
    assert found["stochastic"].mean() == pytest.approx(0.9, abs=2e-3)
    assert (found["master"] - 0.9).abs().max() < 2e-3  # half a step of bfloat16 below 1
    nearest = torch.ones(1, dtype=torch.bfloat16)
    for _ in range(1000):
        nearest -= 1e-4
    assert nearest == 1


def test_rounding_goes_up_as_often_as_it_should():
    third = 1 + 2**-7 / 3  # a third of the way from 1 to the next number
    x = torch.full((60_000,), third)
    round_stochastically(x, 0, 1, 0)
    assert set(x.unique().tolist()) == {1.0, 1 + 2**-7}
    assert float((x > 1).float().mean()) == pytest.approx(1 / 3, abs=0.01)  # five standard deviations of 60,000 draws
    exact = torch.tensor([0.0, -1.5, 2.0**-100])
    rounded = exact.clone()
    round_stochastically(rounded, 0, 1, 0)
    assert torch.equal(rounded, exact)


def test_chances_follow_from_place_and_step_and_are_even():
    whole = chances(4096, 0, 3, 0, torch.device("cpu"))
    assert torch.equal(whole[1000:1100], chances(100, 1000, 3, 0, torch.device("cpu")))
    other = chances(4096, 0, 4, 0, torch.device("cpu"))
    assert (whole == other).float().mean() < 0.01
    assert abs(float(torch.corrcoef(torch.stack([whole, other]).float())[0, 1])) < 0.08
    assert float(whole.float().mean()) == pytest.approx(32767.5, rel=0.03)


@pytest.mark.parametrize(
    ("name", "dtype", "master"),
    [
        ("adamw_8bit", torch.float32, False),
        ("adamw_8bit", torch.bfloat16, False),
        ("adamw_8bit", torch.bfloat16, True),
        ("adamw_torch", torch.bfloat16, True),
    ],
)
def test_the_estimate_of_its_state_is_what_it_takes(name, dtype, master):
    own = parameters(dtype)
    optimizer = make_optimizer(name, [(str(n), p) for n, p in enumerate(own)], lr=1e-3, master=master)
    held = sum(tensor.nbytes for part in optimizer.state_dict()["flat_adamw"] for key, tensor in part.items() if key != "steps")
    assert sum(_states(p, name, master) for p in own) == pytest.approx(held, rel=0.03)  # blocks are filled up


def test_names_of_8_bit_adamw_mean_ours_where_torchao_is_not():
    made = {
        n: make_optimizer(n, [("p", parameters()[0])], lr=1e-3) for n in ("adamw_8bit", "adamw_bnb_8bit", "paged_adamw_8bit")
    }
    assert {type(o) for o in made.values()} == {FlatAdamW}
    assert all(lane.few_bits for o in made.values() for lane in o.lanes)
    assert isinstance(make_optimizer("adamw_torch_8bit", [("p", parameters()[0])], lr=1e-3), FlatAdamW)  # on a CPU


def test_rates_are_set_from_outside_and_read_at_every_step():
    own, optimizer = trained(steps=1)
    before = copy.deepcopy([p.detach() for p in own])
    optimizer.param_groups[0]["lr"] = 0.0
    gradients(own, 1)
    optimizer.step()
    assert equal(own, before)
