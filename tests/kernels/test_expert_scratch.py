"""Stored experts, some at a time: the same numbers, in the right order on any lane."""

import contextlib

import pytest
import torch

from ropewalk.kernels import expert_scratch
from ropewalk.kernels.expert_lora import Experts, Factors, expert_lora
from ropewalk.kernels.expert_scratch import Stored, dequantised_plain, some_at_a_time
from ropewalk.kernels.gates import Glu
from ropewalk.kernels.quant import FORMATS, Int8

E, H, I, T = 7, 24, 16, 30


@pytest.fixture
def few(monkeypatch):
    """Halves that hold two experts of [2I, H] in float32."""
    monkeypatch.setattr(expert_scratch, "SCRATCH", 2 * 2 * 2 * I * H * 4)


@pytest.fixture
def stack():
    return Int8.of(torch.randn(E, 2 * I, H, generator=torch.Generator().manual_seed(0)))


def test_all_of_a_stack_comes_some_at_a_time(few, stack):
    found = [(first, some.clone()) for first, some in some_at_a_time(stack, torch.float32)]
    assert [(first, len(some)) for first, some in found] == [(0, 2), (2, 2), (4, 2), (6, 1)]
    assert torch.equal(torch.cat([some for _, some in found]), stack.dequantize(torch.float32))


class Late:
    """A lane on which nothing is filled or read before somebody has to wait for it: as two streams may run it."""

    def __init__(self):
        self.waiting = {0: [], 1: []}  # what fills each half, not yet done
        self.reading = {0: False, 1: False}
        self.half = None

    def begin(self):
        pass

    @contextlib.contextmanager
    def filling(self, half):
        assert not self.reading[half], "a half is filled while it is read"
        self.half = half
        yield
        self.half = None

    def fill(self, *given):
        self.waiting[self.half].append(given)
        *_, count, out = given
        return out[:count]

    def await_filled(self, half):
        for given in self.waiting[half]:
            dequantised_plain(*given)
        self.waiting[half].clear()
        self.reading[half] = True

    def was_read(self, half):
        self.reading[half] = False


def test_the_next_are_asked_for_while_these_are_read_and_never_over_them(few, stack):
    lane, whole, ahead = Late(), stack.dequantize(torch.float32), []
    for first, some in some_at_a_time(stack, torch.float32, lane.fill, lane):
        ahead.append(sum(map(len, lane.waiting.values())))
        assert torch.equal(some, whole[first : first + len(some)])
    assert ahead == [1, 1, 1, 0]


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("form", sorted(FORMATS))
def test_a_layer_over_stored_stacks_is_to_the_bit_the_one_over_what_they_hold(form, recompute, transposed):
    draw = torch.Generator().manual_seed(1)
    normal = lambda *size: torch.randn(*size, generator=draw) * 0.1
    up, down = (normal(E, H, 2 * I), normal(E, I, H)) if transposed else (normal(E, 2 * I, H), normal(E, H, I))
    kept = [FORMATS[form].of(stack) for stack in (up, down)]
    trained = [normal(T, H), normal(T, 2), normal(E, 8, H), normal(E, 2 * I, 8), normal(E, 8, I), normal(E, H, 8)]
    ids = torch.stack([torch.randperm(E, generator=draw)[:2] for _ in range(T)])
    found = []
    for stacks in (kept, [s.dequantize(torch.float32) for s in kept]):
        x, w, a1, b1, a2, b2 = own = [t.clone().requires_grad_() for t in trained]
        experts = Experts(*stacks, Glu(), transposed=transposed, recompute=recompute)
        out = expert_lora(x, ids, w, experts, Factors(a1, b1, 0.5), Factors(a2, b2, 0.5))
        found.append([out, *torch.autograd.grad(out.square().sum(), own)])
    assert all(torch.equal(a, b) for a, b in zip(*found))


def test_one_expert_is_made_at_a_time_and_once_for_both_ways_round(stack, monkeypatch):
    made = []
    monkeypatch.setattr(
        expert_scratch, "dequantised_plain", lambda s, first, n, out: made.append(first) or dequantised_plain(s, first, n, out)
    )
    stored = Stored(stack, torch.float32)
    whole = stack.dequantize(torch.float32)
    assert torch.equal(stored[3], whole[3])
    assert torch.equal(stored.transpose(1, 2)[3], whole[3].t())
    assert torch.equal(stored[4], whole[4])
    assert made == [3, 4]
    assert (stored.shape, stored.transpose(1, 2).shape) == ((E, 2 * I, H), (E, H, 2 * I))
