"""The optimizer's step while the backward pass runs."""

import pytest
import torch
from torch import nn

from ropewalk.train.in_backward import StepInBackward
from ropewalk.train.optim import clip, make_optimizer


def model(dtype=torch.float32):
    torch.manual_seed(0)
    shared = nn.Linear(64, 64)
    return nn.Sequential(nn.Linear(32, 64), nn.Tanh(), shared, nn.Tanh(), shared, nn.LayerNorm(64), nn.Linear(64, 96)).to(dtype)


def run(name, worth=None, steps=4, dtype=torch.float32, most_held=None):
    made = model(dtype)
    own = list(made.parameters())
    optimizer = make_optimizer(name, list(made.named_parameters()), lr=1e-2, weight_decay=0.1)
    stepping = StepInBackward(optimizer, own, worth) if worth is not None else None
    if most_held is not None:
        for parameter in own:
            parameter.register_post_accumulate_grad_hook(
                lambda _: most_held.append(sum(p.grad.nbytes for p in own if p.grad is not None))
            )
    norms = []
    for step in range(steps):
        x = torch.randn(16, 32, generator=torch.Generator().manual_seed(step)).to(dtype)
        made(x).square().mean().backward()
        if stepping is not None:
            norms.append(stepping.finish())
        else:
            norms.append(clip(own, None))
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
    return own, norms


@pytest.mark.parametrize("name", ["adamw_torch_fused", "adamw_8bit", "sgd", "muon"])
@pytest.mark.parametrize("worth", [0, 20_000])
def test_it_gives_the_numbers_of_a_step_after_the_pass(name, worth):
    plain, norms = run(name)
    found, told = run(name, worth)
    assert all(torch.equal(a, b) for a, b in zip(plain, found, strict=True))
    assert told == norms


def test_stochastic_rounding_does_not_feel_the_order():
    plain, _ = run("adamw_8bit", dtype=torch.bfloat16)
    found, _ = run("adamw_8bit", 0, dtype=torch.bfloat16)
    assert all(torch.equal(a, b) for a, b in zip(plain, found, strict=True))


def test_gradients_are_never_held_together():
    held = []
    own, _ = run("adamw_torch_fused", 0, steps=2, most_held=held)
    assert held  # the hooks ran after the step's own
    assert max(held) == 0
    assert all(p.grad is None for p in own)
    held = []
    run("adamw_torch_fused", 10**9, steps=1, most_held=held)
    assert max(held) == sum(p.numel() * 4 for p in own)
