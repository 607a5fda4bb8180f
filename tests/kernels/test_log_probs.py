"""Log-probabilities in chunks against whole logits, in value and every gradient."""

import pytest
import torch

from ropewalk.kernels.log_probs import linear_log_probs, plain_linear_log_probs


@pytest.mark.parametrize(
    ("softcap", "scale", "temperature"), [(None, 1.0, 1.0), (3.0, 0.5, 1.0), (None, 2.0, 0.7), (3.0, 0.5, 1.3)]
)
@pytest.mark.parametrize("chunk", [3, 64])
@pytest.mark.parametrize("entropy", [False, True])
def test_values_and_all_gradients_are_those_of_whole_logits(softcap, scale, temperature, chunk, entropy):
    draw = torch.Generator().manual_seed(1)
    hidden, weight, bias = (torch.randn(s, generator=draw, dtype=torch.float64) for s in ((11, 5), (13, 5), (13,)))
    labels = torch.randint(13, (11,), generator=draw)
    labels[[0, 4, 10]] = -100
    upstream = torch.randn(11, generator=draw, dtype=torch.float64)
    found = []
    for function, more in ((linear_log_probs, {"chunk": chunk}), (plain_linear_log_probs, {})):
        inputs = [t.clone().requires_grad_() for t in (hidden, weight, bias)]
        more |= {"bias": inputs[2], "softcap": softcap, "scale": scale, "temperature": temperature, "entropy": entropy}
        logp, entropies = function(inputs[0], inputs[1], labels, **more)
        found.append((logp.detach(), *torch.autograd.grad(logp @ upstream, inputs), *([entropies] if entropy else [])))
        assert entropy is (entropies is not None)
        assert not entropy or not entropies.requires_grad
    for ours, plain in zip(*found):
        assert torch.allclose(ours, plain, atol=1e-12)
    assert found[0][0][[0, 4, 10]].tolist() == [0, 0, 0]
    assert found[0][1][[0, 4, 10]].abs().sum() == 0


def test_a_head_that_does_not_learn_gives_hidden_states_their_gradient_alone():
    hidden, weight = torch.randn(4, 3, requires_grad=True), torch.randn(6, 3)
    linear_log_probs(hidden, weight, torch.tensor([1, 2, -100, 0])).of_labels.sum().backward()
    assert hidden.grad is not None
    assert hidden.grad[2].abs().sum() == 0


def test_no_label_is_no_value():
    assert linear_log_probs(torch.randn(3, 2), torch.randn(4, 2), torch.full((3,), -100)).of_labels.tolist() == [0, 0, 0]


def test_the_entropy_of_equal_logits_is_the_logarithm_of_the_vocabulary():
    found = linear_log_probs(torch.zeros(2, 3), torch.randn(8, 3), torch.tensor([5, -100]), entropy=True)
    assert found.entropy.tolist() == pytest.approx([2.0794415, 0])  # ln 8
