"""Log-probabilities in chunks against whole logits, in value and every gradient."""

import pytest
import torch

from ropewalk.kernels.log_probs import linear_log_probs, plain_linear_log_probs


@pytest.mark.parametrize(("softcap", "scale"), [(None, 1.0), (3.0, 0.5)])
@pytest.mark.parametrize("chunk", [3, 64])
def test_values_and_all_gradients_are_those_of_whole_logits(softcap, scale, chunk):
    draw = torch.Generator().manual_seed(1)
    hidden, weight, bias = (torch.randn(s, generator=draw, dtype=torch.float64) for s in ((11, 5), (13, 5), (13,)))
    labels = torch.randint(13, (11,), generator=draw)
    labels[[0, 4, 10]] = -100
    upstream = torch.randn(11, generator=draw, dtype=torch.float64)
    found = []
    for function, more in ((linear_log_probs, {"chunk": chunk}), (plain_linear_log_probs, {})):
        inputs = [t.clone().requires_grad_() for t in (hidden, weight, bias)]
        logp = function(inputs[0], inputs[1], labels, bias=inputs[2], softcap=softcap, scale=scale, **more)
        found.append((logp.detach(), *torch.autograd.grad(logp @ upstream, inputs)))
    for ours, plain in zip(*found):
        assert torch.allclose(ours, plain, atol=1e-12)
    assert found[0][0][[0, 4, 10]].tolist() == [0, 0, 0]
    assert found[0][1][[0, 4, 10]].abs().sum() == 0


def test_a_head_that_does_not_learn_gives_hidden_states_their_gradient_alone():
    hidden, weight = torch.randn(4, 3, requires_grad=True), torch.randn(6, 3)
    linear_log_probs(hidden, weight, torch.tensor([1, 2, -100, 0])).sum().backward()
    assert hidden.grad is not None
    assert hidden.grad[2].abs().sum() == 0


def test_no_label_is_no_value():
    assert linear_log_probs(torch.randn(3, 2), torch.randn(4, 2), torch.full((3,), -100)).tolist() == [0, 0, 0]
