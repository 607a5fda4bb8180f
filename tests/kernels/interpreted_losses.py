"""The softmax's gradient out of the Triton kernel beside its twin, in Triton's interpreter: collected by test_expert_kernels.py."""

from __future__ import annotations

import pytest
import torch

from ropewalk.kernels import cross_entropy
from ropewalk.kernels.cross_entropy import linear_cross_entropy, plain_linear_cross_entropy
from ropewalk.kernels.log_probs import linear_log_probs, plain_linear_log_probs
from ropewalk.kernels.softmax_gradient import softmax_gradient, softmax_gradient_plain


@pytest.mark.parametrize(
    ("softcap", "scale", "temperature"), [(None, 1.0, 1.0), (None, 0.25, 0.7), (3.0, 1.0, 1.0), (2.0, 1.5, 1.3)]
)
@pytest.mark.parametrize("width", [5, 64, 149])
def test_log_probs_gradients_and_entropy_are_the_twins(softcap, scale, temperature, width):
    torch.manual_seed(0)
    z, targets = torch.randn(6, width) * 5, torch.randint(0, width, (6,))
    z[1, 0], z[2] = 80.0, 7.0
    targets[0], targets[3], targets[4] = width - 1, -100, 0
    log_p, slope, entropy = softmax_gradient_plain(z, targets, softcap, scale, temperature)
    left, found = z.clone(), torch.empty(6)
    assert torch.allclose(softmax_gradient(left, targets, softcap, scale, temperature, False, found, 64), log_p, atol=2e-5)
    assert torch.equal(left, z)
    assert torch.allclose(found, entropy, atol=2e-5)
    assert torch.allclose(softmax_gradient(left, targets, softcap, scale, temperature, True, None, 64), log_p, atol=2e-5)
    assert torch.allclose(left, slope, atol=1e-6, rtol=1e-5)
    assert not left[3].any()


def test_what_is_ruled_out_weighs_nothing():
    z = torch.tensor([[1.0, -float("inf"), 2.0]])
    entropy, before = torch.empty(1), torch.softmax(torch.tensor([1.0, 2.0]), 0)
    softmax_gradient(z, torch.tensor([2]), None, 1.0, 1.0, True, entropy, 16)
    assert entropy.item() == pytest.approx(-(before * before.log()).sum().item(), abs=1e-6)
    assert z[0].tolist() == pytest.approx([before[0].item(), 0.0, before[1].item() - 1], abs=1e-6)


def test_losses_and_log_probs_run_on_it_and_read_rows_without_a_label_never(monkeypatch):
    monkeypatch.setattr(cross_entropy, "usable", lambda device: True)
    monkeypatch.setattr(cross_entropy, "refuse", None)  # a kernel that fails raises
    monkeypatch.setattr(cross_entropy, "LOGITS_IN_PLACE", 64 * 37)
    torch.manual_seed(0)
    hidden, weight, bias = (torch.randn(*shape).requires_grad_() for shape in ((70, 8), (37, 8), (37,)))
    labels = torch.randint(0, 37, (70,))
    labels[::3] = -100
    given = (hidden, weight, bias)
    for function, plain in ((linear_cross_entropy, plain_linear_cross_entropy), (linear_log_probs, plain_linear_log_probs)):
        results = [f(hidden, weight, labels, bias=bias, softcap=4.0) for f in (function, plain)]
        ours, truth = (r if isinstance(r, torch.Tensor) else r.of_labels for r in results)
        assert torch.allclose(ours, truth, rtol=1e-5, atol=1e-5)
        up = torch.randn(ours.shape)
        for mine, theirs in zip(torch.autograd.grad(ours, given, up), torch.autograd.grad(truth, given, up)):
            assert torch.allclose(mine, theirs, atol=1e-5, rtol=1e-4)
