from __future__ import annotations

import math

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from ropewalk.kernels.cross_entropy import linear_cross_entropy, plain_linear_cross_entropy

HEADS = [
    {},
    {"softcap": 3.0},
    {"scale": 0.25},
    {"bias": True},
    {"bias": True, "softcap": 2.0, "scale": 1.5},
]


def inputs(n: int, h: int, v: int, dtype: torch.dtype, bias: bool = False) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(7)
    hidden = torch.randn(n, h, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    weight = torch.randn(v, h, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    b = torch.randn(v, generator=generator, dtype=torch.float64).to(dtype).requires_grad_() if bias else None
    labels = torch.randint(0, v, (n,), generator=generator)
    labels[::3] = -100
    return hidden, weight, labels, b


def test_a_uniform_head_loses_ln_v_per_label():
    # logits are all zero, so each of the two labelled rows costs ln 5.
    loss = linear_cross_entropy(torch.ones(3, 4), torch.zeros(5, 4), torch.tensor([1, -100, 4]))
    assert loss.item() == pytest.approx(2 * math.log(5))
    assert loss.dtype == torch.float32


@pytest.mark.parametrize("head", HEADS)
def test_gradcheck_for_hidden_weight_and_bias(head):
    head = dict(head)
    hidden, weight, labels, bias = inputs(7, 3, 5, torch.float64, head.pop("bias", False))
    wanted = [t for t in (hidden, weight, bias) if t is not None]

    def loss(*tensors):
        return linear_cross_entropy(
            tensors[0], tensors[1], labels, bias=tensors[2] if bias is not None else None, chunk=2, **head
        )

    assert torch.autograd.gradcheck(loss, wanted)


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("chunk", [1, 16, 40, 41, 2048])
@pytest.mark.parametrize("n", [1, 16, 61])
def test_equals_the_plain_twin_at_any_chunk_boundary(head, chunk, n):
    head = dict(head)
    hidden, weight, labels, bias = inputs(n, 19, 37, torch.float32, head.pop("bias", False))
    wanted = [t for t in (hidden, weight, bias) if t is not None]
    ours = linear_cross_entropy(hidden, weight, labels, bias=bias, chunk=chunk, **head)
    twin = plain_linear_cross_entropy(hidden, weight, labels, bias=bias, **head)
    torch.testing.assert_close(ours, twin, rtol=1e-5, atol=1e-6)
    for got, expected in zip(torch.autograd.grad(0.3 * ours, wanted), torch.autograd.grad(0.3 * twin, wanted)):
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("softcap", [None, 5.0])
def test_bf16_is_no_worse_than_the_plain_path(softcap):
    hidden, weight, labels, _ = inputs(301, 64, 517, torch.bfloat16)
    exact_inputs = [t.detach().double().requires_grad_() for t in (hidden, weight)]
    exact = plain_linear_cross_entropy(*exact_inputs, labels, softcap=softcap)
    ours = linear_cross_entropy(hidden, weight, labels, softcap=softcap)
    plain = plain_linear_cross_entropy(hidden, weight, labels, softcap=softcap)
    assert abs(ours - exact) <= 1.05 * abs(plain - exact) + 1e-4 * exact

    exact_grads = torch.autograd.grad(exact, exact_inputs)
    pairs = zip(torch.autograd.grad(ours, [hidden, weight]), torch.autograd.grad(plain, [hidden, weight]), exact_grads)
    for ours_grad, plain_grad, exact_grad in pairs:
        assert ours_grad.dtype == torch.bfloat16
        assert (ours_grad - exact_grad).norm() <= 1.1 * (plain_grad - exact_grad).norm()


def test_only_the_gradients_asked_for_are_made():
    hidden, weight, labels, _ = inputs(10, 8, 11, torch.float32)
    linear_cross_entropy(hidden, weight.detach(), labels).backward()
    assert hidden.grad is not None
    assert weight.grad is None
    linear_cross_entropy(hidden.detach(), weight, labels).backward()
    assert weight.grad is not None


def test_without_grad_the_loss_is_the_same_and_has_no_history():
    hidden, weight, labels, _ = inputs(10, 8, 11, torch.float32)
    with torch.no_grad():
        loss = linear_cross_entropy(hidden, weight, labels)
    assert not loss.requires_grad
    torch.testing.assert_close(loss, linear_cross_entropy(hidden, weight, labels).detach())


def test_no_labels_at_all_is_zero_with_zero_gradients():
    hidden, weight, _, _ = inputs(6, 4, 9, torch.float32)
    loss = linear_cross_entropy(hidden, weight, torch.full((6,), -100))
    loss.backward()
    assert loss.item() == 0
    assert hidden.grad.abs().sum() == 0
    assert weight.grad.abs().sum() == 0


def test_rows_without_a_label_get_exactly_zero_gradient():
    hidden, weight, labels, _ = inputs(12, 4, 9, torch.float32)
    linear_cross_entropy(hidden, weight, labels).backward()
    assert (hidden.grad[labels == -100] == 0).all()
    assert (hidden.grad[labels != -100].abs().sum(-1) > 0).all()


def test_a_row_that_is_nan_but_has_no_label_does_no_harm():
    hidden, weight, labels, _ = inputs(12, 4, 9, torch.float32)
    with torch.no_grad():
        hidden[0] = float("nan")
    assert labels[0] == -100
    loss = linear_cross_entropy(hidden, weight, labels)
    loss.backward()
    assert torch.isfinite(loss)
    assert torch.isfinite(hidden.grad).all()


class LargestTensor(torch.utils._python_dispatch.TorchDispatchMode):
    """Remembers the most elements that any operation returned in one tensor."""

    largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor):
            self.largest = max(self.largest, out.numel())
        return out


def test_the_logits_never_exist_whole():
    hidden, weight, labels, _ = inputs(600, 8, 5003, torch.float32)
    with LargestTensor() as watch:
        linear_cross_entropy(hidden, weight, labels, chunk=32).backward()
    assert watch.largest == 5003 * 32  # a chunk; all labelled rows would be 5003 * 400
    with LargestTensor() as watch:
        plain_linear_cross_entropy(hidden, weight, labels).backward()
    assert watch.largest == 5003 * 600


@pytest.mark.parametrize(
    ("dtype", "softcap", "each"), [(torch.float32, None, 4), (torch.bfloat16, None, 6), (torch.float32, 5.0, 8)]
)
def test_a_chunks_logits_are_held_once_beside_what_they_are_made_of(dtype, softcap, each):
    """Bytes of a logit: 4, in 16 bits 2 more for those that the head gave or takes, and 4 for the slope of a cap."""
    rows, width, vocabulary = 64, 16, 5003
    hidden, weight, labels, _ = inputs(3 * rows, width, vocabulary, dtype)
    labels = labels.clamp(min=0)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        linear_cross_entropy(hidden, weight.detach(), labels, softcap=softcap, chunk=rows)
    events = [(e.start_ns(), e.nbytes()) for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    now = most = 0
    for _, size in sorted(events, key=lambda event: event[0]):
        now += size
        most = max(most, now)
    besides = hidden.nbytes + rows * width * 8 + 3 * rows * 64  # the gradient, a chunk's rows, and numbers of each row
    assert rows * vocabulary * each <= most <= rows * vocabulary * each + besides
