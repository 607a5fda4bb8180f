"""Optimizers and schedules by name."""

import math

import pytest
import torch

from ropewalk.errors import ConfigError, MissingExtra
from ropewalk.train.optim import clip, make_optimizer, rate_factor, set_rate


def test_warm_up_rises_from_the_first_step_and_reaches_one():
    assert [rate_factor("linear", s, 8, 4) for s in range(4)] == [0.25, 0.5, 0.75, 1.0]


def test_linear_falls_by_equal_parts():
    # 2 steps of warm-up, then (1 - done) with done = 0, 1/4, 2/4, 3/4
    assert [rate_factor("linear", s, 6, 2) for s in range(2, 6)] == [1.0, 0.75, 0.5, 0.25]


def test_cosine_is_half_way_in_the_middle_and_ends_at_its_floor():
    assert rate_factor("cosine", 5, 10, 0) == pytest.approx(0.5)
    assert rate_factor("cosine", 5, 10, 0, floor=0.2) == pytest.approx(0.2 + 0.8 * 0.5)


def test_cosine_with_a_constant_share_reaches_its_floor_there_and_stays():
    # the floor is reached at step 5 of 10
    values = [rate_factor("cosine", s, 10, 0, floor=0.1, constant_share=0.5) for s in (5, 7, 9)]
    assert values == pytest.approx([0.1, 0.1, 0.1])


def test_warmup_stable_decay_holds_then_falls_in_the_last_fifth():
    # 10 steps: the last 2 fall: 1, 0.5
    assert [rate_factor("warmup_stable_decay", s, 10, 0) for s in (0, 7, 8, 9)] == [1.0, 1.0, 1.0, 0.5]


def test_rex_lies_above_linear():
    # (1 - 0.5) / (1 - 0.25) = 2/3
    assert rate_factor("rex", 5, 10, 0) == pytest.approx(2 / 3)


def test_a_schedule_nobody_knows_is_an_error():
    with pytest.raises(ConfigError, match="constnat"):
        rate_factor("constnat", 1, 2, 0)


def named():
    shapes = {"q.lora_A.weight": (2, 4), "q.lora_B.weight": (4, 2), "norm.weight": (4,)}
    return [(name, torch.nn.Parameter(torch.ones(shape))) for name, shape in shapes.items()]


def test_loraplus_makes_b_factors_faster_and_vectors_do_not_decay():
    groups = make_optimizer("adamw_torch", named(), lr=1e-3, weight_decay=0.1, loraplus_ratio=16).param_groups
    found = {tuple(g["params"][0].shape): (g["lr"], g["weight_decay"]) for g in groups}
    assert found == {(2, 4): (1e-3, 0.1), (4, 2): (16e-3, 0.1), (4,): (1e-3, 0.0)}


def test_the_rate_of_every_group_is_its_own_full_rate_times_the_factor():
    optimizer = make_optimizer("adamw_torch", named(), lr=1e-3, loraplus_ratio=4)
    set_rate(optimizer, 0.5)
    set_rate(optimizer, 0.25)
    assert sorted({g["lr"] for g in optimizer.param_groups}) == pytest.approx([0.25e-3, 1e-3])


@pytest.mark.parametrize("name", ["adamw_torch_fused", "adamw_hf", "paged_adamw_32bit", "adafactor", "sgd"])
def test_every_optimizer_moves_against_the_gradient(name):
    parameters = named()
    optimizer = make_optimizer(name, parameters, lr=0.1)
    for _, p in parameters:
        p.grad = torch.ones_like(p)
    optimizer.step()
    assert all((p < 1).all() for _, p in parameters)


def test_an_optimizer_of_a_missing_package_says_what_to_install(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "torchao", None)
    with pytest.raises(MissingExtra, match=r"pip install 'ropewalk\[gpu\]'"):
        make_optimizer("adamw_torch_4bit", named(), lr=1e-3)


def test_gradients_are_scaled_down_to_the_limit_and_their_norm_is_told():
    parameters = [torch.nn.Parameter(torch.zeros(1)) for _ in range(2)]
    for p, g in zip(parameters, (3.0, 4.0), strict=True):
        p.grad = torch.tensor([g])
    assert clip(parameters, 1.0) == pytest.approx(5.0)  # sqrt(9 + 16)
    assert [float(p.grad) for p in parameters] == pytest.approx([0.6, 0.8], rel=1e-5)
    assert clip(parameters, 0) == pytest.approx(1.0, rel=1e-5)
    assert math.isclose(float(parameters[0].grad), 0.6, rel_tol=1e-5)
