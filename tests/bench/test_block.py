"""One expert layer by every contender that runs on a CPU, in this process, at tiny sizes."""

import pytest
import torch

from ropewalk.bench import block as block_module
from ropewalk.bench.block import Block, _a, _b, _turns, race
from ropewalk.bench.contenders import Entrant
from ropewalk.bench.cost import Ceiling, memory
from ropewalk.bench.peers import FUSED
from ropewalk.bench.shapes import Layer
from ropewalk.kernels.expert_lora import Experts, Factors, expert_lora_plain
from ropewalk.kernels.gates import Glu

TINY = Layer("tiny", 64, 32, 8, 2)
EVERYBODY = [Entrant("ours"), Entrant("ours", "experts"), Entrant("ours", "layer"), Entrant("grouped"), Entrant("eager")]


@pytest.mark.parametrize("activation", ["silu", "gelu_pytorch_tanh"])
def test_everybody_computes_the_same_layer_and_is_timed(activation):
    shape = Layer("tiny", 64, 32, 8, 2, activation)
    rows = list(race(shape, 48, "float32", "cpu", EVERYBODY, 1))
    assert [(row.contender, row.policy) for row in rows] == [(e.name, e.policy) for e in EVERYBODY]
    assert all(row.max_error <= 1e-5 and row.ms > 0 and row.share_of_ceiling > 0 for row in rows)
    kept = {(row.contender, row.policy): row.held_mb for row in rows}
    # 96 rows keep gate_up (64) and two times 16 low-rank columns beside x and the routing; PEFT also a copy of both stacks
    assert kept["ours", "layer"] <= kept["ours", "experts"] < kept["ours", "keep"] < kept["grouped", "keep"]
    assert kept["ours", "keep"] == pytest.approx((96 * (64 + 2 * 16) * 4) / 1e6, rel=0.2)


def test_stacks_of_four_bits_are_raced_by_those_who_can_train_through_them():
    ours, grouped = race(TINY, 48, "float32", "cpu", [Entrant("ours"), Entrant("grouped")], 1, "nf4")
    assert ours.max_error <= 1e-5
    assert ours.ms
    assert grouped.ms is None
    assert "PEFT adapts none that is quantised" in grouped.note


def test_a_peers_kernels_get_stacks_of_few_bits_dequantised_in_each_pass(monkeypatch):
    """The peer here is the plain layer, through the stacks that its module has at that moment."""
    seen = []

    def peer(module, scale):
        def compute(x, ids, weights, own):
            seen.append(module.gate_up_proj)
            experts = Experts(module.gate_up_proj, module.down_proj, Glu())
            a1, b1, a2, b2 = own
            up, down = (Factors(_a(a, 8), _b(b, 16, 8), scale) for a, b in ((a1, b1), (a2, b2)))
            return expert_lora_plain(x, ids, weights, experts, up, down)

        return compute

    monkeypatch.setitem(FUSED, "axolotl", peer)
    (row,) = race(TINY, 48, "float32", "cpu", [Entrant("axolotl")], 1, "nf4")
    assert row.max_error <= 1e-5
    assert (row.ms > 0, row.note) == (True, "over stacks that our kernel dequantises in each pass")
    assert len({id(stack) for stack in seen}) == len(seen) > 2


def test_who_fails_is_a_row_with_the_reason_and_a_race_of_nobody_ends(monkeypatch):
    def failing(self, entrant):
        raise ValueError("no such tile")

    monkeypatch.setattr(Block, "contender", failing)
    rows = list(race(TINY, 8, "float32", "cpu", [Entrant("ours"), Entrant("grouped")], 1))
    assert [(row.ms, row.note) for row in rows] == [(None, "ValueError: no such tile")] * 2


def test_the_loop_over_experts_takes_part_in_few_rounds(monkeypatch):
    ran = []
    monkeypatch.setattr(block_module, "milliseconds", lambda work, device: work() or 1.0)
    block = Block(TINY, 8, torch.float32, "cpu")
    monkeypatch.setattr(block, "forward", lambda compute: ran.append(compute) or torch.zeros(8, 64, requires_grad=True))
    ready = {Entrant(name): [(name, [], False)] for name in ("ours", "eager")}
    assert _turns([block], ready, 6, "cuda") == {Entrant("ours"): 1.0, Entrant("eager"): 1.0}
    assert (ran.count("ours"), ran.count("eager")) == (7, 4)  # one to warm up


def test_who_computes_something_else_is_not_timed(monkeypatch):
    real = Block.contender

    def shifted(self, entrant):
        compute, own, by_expert = real(self, entrant)
        if entrant.name == "grouped":
            return lambda x, ids, w: compute(x, ids, w) * 1.001, own, by_expert
        return compute, own, by_expert

    monkeypatch.setattr(Block, "contender", shifted)
    ours, grouped = race(TINY, 48, "float32", "cpu", [Entrant("ours"), Entrant("grouped")], 1)
    assert ours.ms
    assert (grouped.ms, grouped.note) == (None, "wrong, and not timed")
    assert grouped.max_error == pytest.approx(1e-3, rel=0.1)


def test_the_floor_counts_operations_once_and_stacks_once_each_way():
    # S = 48 * 2 rows: 6 S H I = 1,179,648 operations forward and again backward; LoRA 2 S r (2 H + 3 I) = 688,128, twice backward
    block = Block(TINY, 48, torch.float32, "cpu")
    by_operations = 2 * 1_179_648 + 3 * 688_128
    assert block.floor(Ceiling(1e9, 1e30)) == pytest.approx(by_operations / 1e6)
    # stacks of 8 (64 * 64 + 64 * 32) numbers of 4 bytes
    assert block.floor(Ceiling(1e30, 1e9)) == pytest.approx(2 * 8 * 6144 * 4 / 1e6)


def test_memory_is_what_a_step_adds():
    x = torch.zeros(1000, 100, requires_grad=True)  # 400,000 bytes

    def forward():
        return (x * 2).square().sum()  # keeps x * 2; its square goes

    found = memory(forward, lambda loss: loss.backward(), "cpu")
    x.grad = None
    assert found.held == pytest.approx(400_000, rel=0.01)
    assert 800_000 <= found.peak <= 1_700_000  # with what the gradient is made of on its way
