"""The Triton kernels of expert layers beside their plain twins, in Triton's interpreter: collected by test_expert_kernels.py.

The interpreter is right in float32 alone. Sizes fill no block: 37 and 21 columns, ranks of 3 and 20.
"""

from __future__ import annotations

import os

import pytest
import torch

from ropewalk.kernels.dequantised import dequantised
from ropewalk.kernels.expert_combine import combine, combine_plain
from ropewalk.kernels.expert_gemm import Lora, Tiling, expert_gemm, expert_gemm_plain
from ropewalk.kernels.expert_glu import expert_glu, expert_glu_backward, expert_glu_backward_plain, expert_glu_plain
from ropewalk.kernels.expert_gram import expert_gram, expert_gram_plain
from ropewalk.kernels.expert_routing import cut, cut_plain, route_sorted, route_sorted_plain
from ropewalk.kernels.expert_scratch import dequantised_plain
from ropewalk.kernels.gates import ClampedGlu, Glu
from ropewalk.kernels.quant import Int4, Int8, Nf4

pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered in exp:RuntimeWarning")  # a sigmoid far out, in numpy
E = 5
SMALL = Tiling(16, 16, 1, 1)  # so that sums and outputs take several
ROUTES = ("even", "skewed", "one expert", "one token", "some nowhere")


def ids_of(route):
    """[T, k] of a kind of routing; expert 2 has no token in any but the first."""
    torch.manual_seed(0)
    if route == "even":
        return torch.stack([torch.randperm(E)[:2] for _ in range(34)])
    if route == "skewed":
        return torch.stack([torch.full((34,), 4), torch.tensor([0, 1, 3])[torch.randint(0, 3, (34,))]], dim=1)
    if route == "one expert":
        return torch.full((20, 1), 3)
    if route == "one token":
        return torch.tensor([[4, 0]])
    ids = torch.randint(0, E + 2, (15, 3))
    return torch.where(ids == 2, E, ids)


def routed(route):
    ids = ids_of(route)
    found = route_sorted_plain(ids, torch.rand(ids.shape), E)
    return found, cut_plain(found.ends, ids.numel(), 16), ids.numel(), int(found.ends[-1])


def close(found, truth, tolerance=2e-6):
    assert (found - truth).norm() <= tolerance * truth.norm().clamp_min(1e-30)


def poisoned(rows, width, used):
    """Random rows; those behind the last expert's must not be read."""
    made = torch.randn(rows, width)
    made[used:] = float("nan")
    return made


@pytest.mark.parametrize("route", ROUTES)
def test_rows_are_sorted_by_expert_and_cut_into_tiles(route):
    ids = ids_of(route)
    weights = torch.rand(ids.shape)
    found, truth = route_sorted(ids, weights, E), route_sorted_plain(ids, weights, E)
    for name in ("token", "weight", "order", "place", "ends"):
        assert torch.equal(getattr(found, name), getattr(truth, name)), name
    for rows in (16, 64):
        tiles, plain = cut(found.ends, ids.numel(), rows), cut_plain(found.ends, ids.numel(), rows)
        count = int(plain.ends[-1])
        assert torch.equal(tiles.ends, plain.ends)
        assert torch.equal(tiles.expert[:count], plain.expert[:count])
        assert torch.equal(tiles.start[:count], plain.start[:count])
        assert tiles.most == plain.most >= count


def test_more_experts_and_slots_than_one_program_takes_are_sorted_too():
    ids = torch.randint(0, 70, (300, 1))
    found, truth = route_sorted(ids, torch.rand(300, 1), 70), route_sorted_plain(ids, torch.rand(300, 1), 70)
    assert torch.equal(found.order, truth.order)
    assert torch.equal(found.ends, truth.ends)


@pytest.mark.parametrize(("route", "rank"), [*zip(ROUTES, (3, 20, 8, 3, 17))])
def test_products_with_each_rows_own_expert(route, rank):
    """Gathered or not, turned round by strides or not, with LoRA, with a bias that is weighed or not."""
    way, tiles, slots, used = routed(route)
    w, b, bias = torch.randn(E, 37, 21), torch.randn(E, rank, 21), torch.randn(E, 21)
    lora = Lora(poisoned(slots, rank, used), b, 0.7)
    tokens = torch.randn(slots // way.k, 37)
    for how in ({}, {"lora": lora, "bias": bias, "weight": way.weight}, {"bias": bias}):
        found = expert_gemm(tokens, w, tiles, slots, token=way.token, tiling=SMALL, **how)
        close(found[:used], expert_gemm_plain(tokens, w, way.ends, slots, token=way.token, **how)[:used])
    rows, turned = poisoned(slots, 21, used), w.transpose(1, 2)
    close(expert_gemm(rows, turned, tiles, slots, tiling=SMALL)[:used], expert_gemm_plain(rows, turned, way.ends, slots)[:used])


def test_products_of_some_experts_leave_the_others_rows():
    way, tiles, slots, _ = routed("even")
    x, w = torch.randn(slots, 32), torch.randn(E, 32, 16)
    found = torch.full((slots, 16), 7.0)
    for first, last in ((0, 2), (2, 4)):
        expert_gemm(x, w[first:last], tiles, slots, first=first, out=found)
    end = int(way.ends[3])
    close(found[:end], expert_gemm_plain(x, w, way.ends, slots)[:end])
    assert (found[end:] == 7).all()


GATES = (Glu("silu"), Glu("gelu"), Glu("gelu_tanh", True), ClampedGlu(0.9, 1.7, 1.0, True), ClampedGlu(1.2))


@pytest.mark.parametrize(("gate", "route"), [*zip(GATES, ROUTES)])
def test_gates_with_the_low_rank_products_of_both_sides(gate, route):
    way, tiles, slots, used = routed(route)
    gate_up, a, b = poisoned(slots, 42, used), torch.randn(E, 21, 3), torch.randn(E, 3, 42)
    for weight, lora in ((way.weight, True), (None, False)):
        h, ha = expert_glu(gate_up, weight, gate, tiles, a if lora else None)
        truth = expert_glu_plain(gate_up, weight, gate, way.ends, a if lora else None)
        close(h[:used], truth[0][:used])
        dh, d_weight = torch.randn(slots, 21), torch.zeros(slots)
        wanted, d_wanted = None if weight is None else d_weight, torch.zeros(slots)
        twin = expert_glu_backward_plain(gate_up, dh, weight, gate, way.ends, b if lora else None, d_wanted)
        found = expert_glu_backward(gate_up, dh, weight, gate, tiles, b if lora else None, wanted)
        close(found[0][:used], truth[0][:used])
        close(found[1][:used], twin[1][:used])
        if lora:
            close(ha[:used], truth[1][:used])
            close(found[2][:used], twin[2][:used])
            close(d_weight[:used], d_wanted[:used])
            assert not d_weight[used:].any()
        else:
            assert ha is None
            assert found[2] is None


@pytest.mark.parametrize("route", ROUTES)
def test_tokens_add_their_rows(route):
    way, _, slots, used = routed(route)
    y = poisoned(slots, 37, used)
    for weight in (None, way.weight):
        close(combine(y, way.place, way.ends, way.k, weight), combine_plain(y, way.place, way.ends, way.k, weight))


@pytest.mark.parametrize(("route", "rank"), [*zip(ROUTES, (20, 3, 1, 16, 3))])
def test_gradients_of_factors_are_sums_over_each_experts_rows(route, rank):
    way, _, slots, used = routed(route)
    narrow, wide, tokens = poisoned(slots, rank, used), poisoned(slots, 37, used), torch.randn(slots // way.k, 37)
    counts = torch.diff(way.ends, prepend=way.ends.new_zeros(1))
    for turned in (False, True):
        found = expert_gram(narrow, wide, way.ends, 0.3, turned=turned)
        close(found, expert_gram_plain(narrow, wide, way.ends, 0.3, turned=turned))
        assert not found[counts == 0].any()
    found = expert_gram(narrow, tokens, way.ends, 0.3, token=way.token)
    close(found, expert_gram_plain(narrow, tokens, way.ends, 0.3, token=way.token))


@pytest.mark.parametrize("kind", ["nf4", "int4", "int8"])
def test_a_linear_layers_matrix_is_read_as_the_twin_reads_it(kind, monkeypatch):
    kept = {"int8": Int8.of, "int4": Int4.of, "nf4": Nf4.of}[kind](torch.randn(40, 520))
    truth = kept.dequantize(torch.float32)
    monkeypatch.setattr("ropewalk.kernels.quant.usable", lambda device: True)
    monkeypatch.setattr(type(kept), "write", None)
    close(kept.dequantize(torch.float32), truth, 1e-7)


@pytest.mark.parametrize("shape", [(3, 8, 32), (3, 10, 21), (3, 40, 520)])
@pytest.mark.parametrize("kind", ["nf4", "nf4, plain maxima", "int4", "int8"])
def test_stored_experts_are_read_as_the_twin_reads_them(shape, kind):
    weight = torch.randn(shape)
    stack = {"int8": Int8.of, "int4": Int4.of, "nf4": Nf4.of}.get(kind, lambda w: Nf4.of(w, double=False))(weight)
    for first, count in ((0, 3), (1, 2), (2, 1)):
        out = torch.full((3, *shape[1:]), 7.0)
        found = dequantised(stack, first, count, out)
        close(found, dequantised_plain(stack, first, count, torch.empty_like(out)), 1e-7)
        assert (out[count:] == 7).all()


STRIDE = 2**26  # numbers between two rows: the 33rd row of a tensor begins at 2^31


@pytest.fixture
def far_apart(tmp_path):
    """Lays a matrix out with such a stride, in a file that is all holes but for its rows."""

    def lay(rows):
        file = tmp_path / f"{len(list(tmp_path.iterdir()))}"
        size = (len(rows) - 1) * STRIDE + rows.shape[1]
        file.touch()
        os.truncate(file, 4 * size)
        laid = torch.from_file(str(file), shared=True, size=size).as_strided(rows.shape, (STRIDE, 1))
        laid.copy_(rows)
        assert (len(rows) - 1) * laid.stride(0) > 2**31
        return laid

    return lay


def test_rows_are_found_beyond_the_reach_of_32_bits(far_apart):
    """Of what is gathered, of what is not, and of what is put back to its tokens."""
    way, tiles, slots, _ = routed("even")  # 68 rows of 34 tokens
    w, a = torch.randn(E, 21, 16), torch.randn(E, 10, 3)
    tokens, rows, gate_up, narrow = (
        torch.randn(slots // 2, 21),
        torch.randn(slots, 21),
        torch.randn(slots, 20),
        torch.randn(slots, 3),
    )
    far_tokens, far_rows, far_gate_up = far_apart(tokens), far_apart(rows), far_apart(gate_up)
    close(
        expert_gemm(far_tokens, w, tiles, slots, token=way.token, tiling=SMALL),
        expert_gemm_plain(tokens, w, way.ends, slots, token=way.token),
    )
    close(expert_gemm(far_rows, w, tiles, slots, tiling=SMALL), expert_gemm_plain(rows, w, way.ends, slots))
    for found, truth in zip(
        expert_glu(far_gate_up, way.weight, Glu("silu"), tiles, a),
        expert_glu_plain(gate_up, way.weight, Glu("silu"), way.ends, a),
    ):
        close(found, truth)
    close(combine(far_rows, way.place, way.ends, 2), combine_plain(rows, way.place, way.ends, 2))
    for wide, far, token in ((tokens, far_tokens, way.token), (rows, far_rows, None)):
        close(expert_gram(narrow, far, way.ends, 1.0, token=token), expert_gram_plain(narrow, wide, way.ends, 1.0, token=token))


def test_products_are_written_beyond_the_reach_of_32_bits(far_apart):
    way, tiles, slots, _ = routed("even")
    x, w = torch.randn(slots, 21), torch.randn(E, 21, 16)
    out = far_apart(torch.zeros(slots, 16))
    close(expert_gemm(x, w, tiles, slots, tiling=SMALL, out=out), expert_gemm_plain(x, w, way.ends, slots))
