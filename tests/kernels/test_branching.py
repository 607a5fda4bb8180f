"""Attention of branches to their prompt and themselves, against one mask over the whole row, in value and every gradient."""

import pytest
import torch

from ropewalk.kernels import branching as module
from ropewalk.kernels.branching import Branching, Piece, branching, flex, plain

PIECES = (Piece(7, (3, 5, 1)), Piece(0, (4,)), Piece(2, (9, 9)), Piece(0, (1, 6)))


def drawn(row, heads=4, kv=2, size=8, wide=8, dtype=torch.float64):
    draw = torch.Generator().manual_seed(0)
    shapes = ((row.length, heads, size), (row.length, kv, size), (row.length, kv, wide), (row.length, heads, wide))
    return [torch.randn(shape, generator=draw, dtype=dtype) for shape in shapes]


def both(row, window, sinks=None, **sizes):
    *inputs, upstream = drawn(row, **sizes)
    found = []
    for function in (branching, plain):
        given = [t.clone().requires_grad_() for t in (*inputs, *([] if sinks is None else [sinks]))]
        out = function(*given[:3], row, 0.3, window, *given[3:])
        found.append((out.detach(), *torch.autograd.grad(out, given, upstream)))
    return found


@pytest.mark.parametrize("window", [0, 1, 2, 3, 6, 8, 40])
@pytest.mark.parametrize("padding", [0, 3])
def test_values_and_gradients_are_those_of_one_mask(window, padding):
    row = Branching(PIECES, sum(piece.length for piece in PIECES) + padding)
    for ours, expected in zip(*both(row, window)):
        assert torch.allclose(ours, expected, atol=1e-12)


@pytest.mark.parametrize("window", [0, 4, 40])
def test_sinks_take_weight_and_learn(window, monkeypatch):
    monkeypatch.setattr(module, "APART", 5)
    monkeypatch.setattr(module, "BLOCK", 3)
    sinks = torch.tensor([-2.0, 0.0, 0.5, 3.0], dtype=torch.float64)
    for ours, expected in zip(*both(Branching(PIECES, 50), window, sinks)):
        assert torch.allclose(ours, expected, atol=1e-12)
    exact = both(Branching(PIECES, 50), window)[0]
    assert (both(Branching(PIECES, 50), window, sinks)[0][0].norm() < 0.8 * exact[0].norm()).item()


def test_in_float32_a_window_over_heads_of_512_is_one_mask_to_five_digits():
    for ours, expected in zip(
        *both(Branching((Piece(0, (700, 90)),), 790), 128, heads=2, kv=1, size=512, wide=512, dtype=torch.float32)
    ):
        assert (ours - expected).abs().max() <= 1e-5 * expected.abs().max()


@pytest.mark.parametrize("sizes", [{"kv": 4}, {"wide": 4}, {"kv": 1, "wide": 16}])
def test_any_heads_and_widths(sizes):
    for ours, expected in zip(*both(Branching(PIECES, 52), 5, **sizes)):
        assert torch.allclose(ours, expected, atol=1e-12)


@pytest.mark.parametrize("window", [0, 4])
def test_long_spans_are_taken_by_themselves_and_windows_in_blocks(window, monkeypatch):
    monkeypatch.setattr(module, "APART", 5)
    monkeypatch.setattr(module, "BLOCK", 3)
    for ours, expected in zip(*both(Branching(PIECES, 50), window)):
        assert torch.allclose(ours, expected, atol=1e-12)


@pytest.mark.parametrize("window", [0, 4])
def test_flex_attention_with_its_block_mask_is_the_same(window):
    row = Branching(PIECES, 52)
    *inputs, _ = drawn(row, dtype=torch.float32)
    assert torch.allclose(flex(*inputs, row, 0.3, window), plain(*inputs, row, 0.3, window), atol=1e-5)
    sinks = torch.tensor([-2.0, 0.0, 0.5, 3.0])
    assert torch.allclose(flex(*inputs, row, 0.3, window, sinks), plain(*inputs, row, 0.3, window, sinks), atol=1e-5)


def test_what_sees_what_worked_out_by_hand():
    """A prompt of 2 with branches of 2 and 1, and a branch alone of 2; windows count from the prompt on."""
    row = Branching((Piece(2, (2, 1)), Piece(0, (2,))), 7)
    assert row.positions().tolist() == [0, 1, 2, 3, 2, 0, 1]
    assert row.seen(0).int().tolist() == [
        [1, 0, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0, 0],
        [1, 1, 1, 0, 0, 0, 0],
        [1, 1, 1, 1, 0, 0, 0],
        [1, 1, 0, 0, 1, 0, 0],
        [0, 0, 0, 0, 0, 1, 0],
        [0, 0, 0, 0, 0, 1, 1],
    ]
    assert row.seen(2).int().tolist() == [
        [1, 0, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0, 0],
        [0, 1, 1, 0, 0, 0, 0],
        [0, 0, 1, 1, 0, 0, 0],
        [0, 1, 0, 0, 1, 0, 0],
        [0, 0, 0, 0, 0, 1, 0],
        [0, 0, 0, 0, 0, 1, 1],
    ]


def test_bfloat16_is_no_further_off_than_one_mask_in_it():
    row = Branching(PIECES, 50)
    exact = both(row, 0)[1]
    ours, mask = both(row, 0, dtype=torch.bfloat16)
    for mine, theirs, true in zip(ours, mask, exact):
        assert (mine.double() - true).norm() <= 1.5 * (theirs.double() - true).norm() + 1e-3
