"""The expert kernel against its plain twin: every kind of experts, every gradient, and the traps of grouped products."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F

from ropewalk.kernels.expert_lora import Experts, Factors, expert_lora, expert_lora_plain
from ropewalk.kernels.gates import AnyGate, ClampedGlu, Glu

E, H, I, T, K = 5, 8, 8, 7, 2  # experts, hidden, intermediate, tokens, experts per token


def any_glu(gate_up):
    gate, up = gate_up.chunk(2, -1)
    return torch.relu(gate).square() * (up + 1)


GATES = {
    "silu": Glu("silu"),
    "gelu tanh, interleaved": Glu("gelu_tanh", True),
    "gelu": Glu("gelu"),
    "gpt-oss": ClampedGlu(1.2, 1.7, 1.0, True),
    "clamped silu": ClampedGlu(0.9),
    "any": AnyGate(any_glu),
    "without gate": AnyGate(lambda up: torch.relu(up).square()),
}


class Case:
    """Random experts where expert 2 gets no token and expert 4 gets all of them."""

    def __init__(self, dtype, gate="silu", transposed=False, bias=False, norm=False, full=False, rank=3, lora=True, tokens=T):
        torch.manual_seed(0)
        gate_object = GATES[gate]
        wide = I if gate == "without gate" else 2 * I
        make = lambda *shape, train=True: torch.randn(*shape, dtype=dtype).requires_grad_(train)
        self.ids = torch.stack([torch.full((tokens,), 4), torch.tensor([0, 1, 3])[torch.randint(0, 3, (tokens,))]], dim=1)
        self.trained = {"x": make(tokens, H), "weights": torch.rand(tokens, K, dtype=dtype).requires_grad_()}
        up = make(E, H, wide, train=full) if transposed else make(E, wide, H, train=full)
        down = make(E, I, H, train=full) if transposed else make(E, H, I, train=full)
        up_bias, down_bias = (make(E, wide, train=full), make(E, H, train=full)) if bias else (None, None)
        scale = make(H, train=norm)
        if lora:
            shapes = {"A1": (E, rank, H), "B1": (E, wide, rank), "A2": (E, rank, I), "B2": (E, H, rank)}
            self.trained |= {name: make(*shape) for name, shape in shapes.items()}
        if full:
            self.trained |= {"up": up, "down": down} | ({"up_bias": up_bias, "down_bias": down_bias} if bias else {})
        if norm:
            self.trained["scale"] = scale
        rms = lambda y: y * torch.rsqrt(y.square().mean(-1, keepdim=True) + 1e-3) * scale
        post = (rms, (scale,)) if norm else (None, ())
        self.experts = Experts(up, down, gate_object, up_bias, down_bias, transposed, *post)
        self.lora = lora

    def factors(self):
        t = self.trained
        return (Factors(t["A1"], t["B1"], 0.7), Factors(t["A2"], t["B2"], 0.3)) if self.lora else (None, None)

    def run(self, function, **how):
        t = self.trained
        return function(t["x"], self.ids, t["weights"], self.experts, *self.factors(), **how)

    def gradients(self, function, upstream, **how):
        out = self.run(function, **how)
        return {"out": out.detach()} | dict(zip(self.trained, torch.autograd.grad(out, list(self.trained.values()), upstream)))


def worst(found, truth):
    return max(((found[n] - t).norm() / t.norm().clamp_min(1e-30)).item() for n, t in truth.items())


@pytest.mark.parametrize("gate", GATES)
def test_every_kind_of_experts_equals_the_twin(gate):
    """Transposed or not, with and without biases, norm and trained weights, as tiles in float64 and float32, grouped in float32."""
    flags = itertools.product((False, True), repeat=4)
    for transposed, bias, norm, full in flags:
        for dtype, rows, tolerance in (
            (torch.float64, "tiles", 1e-12),
            (torch.float32, "tiles", 5e-6),
            (torch.float32, "grouped", 5e-6),
        ):
            case = Case(dtype, gate, transposed, bias, norm, full)
            upstream = torch.randn(T, H, dtype=dtype)
            truth, found = case.gradients(expert_lora_plain, upstream), case.gradients(expert_lora, upstream, rows=rows)
            assert worst(found, truth) < tolerance, (transposed, bias, norm, full, dtype, rows)
            with torch.no_grad():
                assert worst({"out": case.run(expert_lora, rows=rows)}, {"out": truth["out"]}) < tolerance
                assert worst({"out": case.run(expert_lora, rows="few")}, {"out": truth["out"]}) < tolerance


@pytest.mark.parametrize("narrow", [1, 1000])
def test_few_rows_of_large_experts_are_right_however_narrow_their_stacks(narrow, monkeypatch):
    monkeypatch.setattr("ropewalk.kernels.expert_few.LARGE", 1)
    monkeypatch.setattr("ropewalk.kernels.expert_few.NARROW", narrow)
    draw = torch.Generator().manual_seed(0)
    up, down = torch.randn(4, 48, 16, generator=draw), torch.randn(4, 16, 24, generator=draw)
    x, ids = torch.randn(6, 16, generator=draw), torch.tensor([[0, 1], [1, 3], [1, 0], [0, 3], [1, 3], [1, 0]])
    experts, weights = Experts(up, down, Glu("silu", False)), torch.full((6, 2), 0.5)
    with torch.no_grad():
        found = expert_lora(x, ids, weights, experts, rows="few")
        torch.testing.assert_close(found, expert_lora_plain(x, ids, weights, experts), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("tokens", [1, 2, 5, 40])
@pytest.mark.parametrize(
    ("dtype", "of_factors"),
    [(torch.float64, torch.float64), (torch.bfloat16, torch.bfloat16), (torch.bfloat16, torch.float32)],
    ids=["float64", "bfloat16", "float32 factors"],
)
def test_few_rows_with_all_experts_at_once_are_as_exact_as_one_by_one(tokens, dtype, of_factors, monkeypatch):
    """Also where stacks are wide enough to be turned round, and where too few experts are hit for a product with all."""
    truth = Case(torch.float64, rank=4, tokens=tokens)
    case = Case(torch.float64, rank=4, tokens=tokens)
    for tensors in (case.trained, case.experts.__dict__):
        for name, tensor in tensors.items():
            if isinstance(tensor, torch.Tensor):
                tensors[name] = tensor.detach().to(of_factors if name in ("A1", "B1", "A2", "B2") else dtype)
    with torch.no_grad():
        wanted = {"out": truth.run(expert_lora_plain)}
        plain = worst({"out": case.run(expert_lora_plain)}, wanted)
        for narrow, hit in ((1000, 1), (3, 1000), (3, 0)):
            monkeypatch.setattr("ropewalk.kernels.expert_few.NARROW", narrow)
            monkeypatch.setattr("ropewalk.kernels.expert_few.HIT", {2: hit, 8: hit})
            assert worst({"out": case.run(expert_lora, rows="few")}, wanted) < 1.5 * plain + 1e-12


@pytest.mark.parametrize("gate", ["silu", "gpt-oss", "any"])
def test_the_backward_is_the_derivative_of_the_forward(gate):
    case = Case(torch.float64, gate, transposed=True, bias=True, full=True, tokens=3)

    def function(*values):
        case.trained = dict(zip(case.trained, values))
        t = case.trained
        up, down, up_bias, down_bias = (t[n] for n in ("up", "down", "up_bias", "down_bias"))
        experts = Experts(up, down, case.experts.gate, up_bias, down_bias, True)
        return expert_lora(t["x"], case.ids, t["weights"], experts, *case.factors(), rows="tiles")

    assert torch.autograd.gradcheck(function, tuple(case.trained.values()))


def test_frozen_experts_without_lora_still_pass_gradients_to_input_and_router():
    case = Case(torch.float64, lora=False)
    upstream = torch.randn(T, H, dtype=torch.float64)
    assert worst(case.gradients(expert_lora, upstream), case.gradients(expert_lora_plain, upstream)) < 1e-12


@pytest.mark.parametrize("rows", ["tiles", "grouped"])
@pytest.mark.parametrize("rank", [1, 2, 4, 16])
def test_in_bfloat16_any_rank_works_and_rounding_is_that_of_the_plain_path(rank, rows):
    """grouped_mm alone rejects ranks that are not multiples of 8 in bfloat16."""
    truth_case, case = Case(torch.float64, rank=rank, tokens=64), Case(torch.float64, rank=rank, tokens=64)
    upstream = torch.randn(64, H, dtype=torch.float64)
    truth = truth_case.gradients(expert_lora_plain, upstream)
    for tensors in (case.trained, case.experts.__dict__):
        for name, tensor in tensors.items():
            if isinstance(tensor, torch.Tensor):
                tensors[name] = tensor.detach().bfloat16().requires_grad_(tensor.requires_grad)
    plain = worst(case.gradients(expert_lora_plain, upstream.bfloat16()), truth)
    assert worst(case.gradients(expert_lora, upstream.bfloat16(), rows=rows), truth) < 1.5 * plain


@pytest.mark.parametrize("rows", ["tiles", "grouped"])
def test_an_expert_without_tokens_gets_exactly_zero(rows):
    found = Case(torch.float32, full=True).gradients(expert_lora, torch.randn(T, H), rows=rows)
    for name in ("A1", "B1", "A2", "B2", "up", "down"):
        assert not found[name][2].any()
        assert found[name][4].any()


def test_slots_that_name_no_expert_are_never_read():
    """ids of E and more sort behind the last expert; NaN in their weights must not reach anything."""
    case = Case(torch.float32)
    case.ids[0, 1] = E
    with torch.no_grad():
        case.trained["weights"][0, 1] = float("nan")
    found = case.gradients(expert_lora, torch.randn(T, H), rows="tiles")
    assert all(torch.isfinite(g).all() for g in found.values())
    assert found["weights"][0, 1] == 0


def test_float32_factors_serve_a_bfloat16_base():
    case = Case(torch.float32, rank=4)
    experts = Experts(case.experts.up.bfloat16(), case.experts.down.bfloat16(), Glu())
    x = case.trained["x"].detach().bfloat16().requires_grad_()
    out = expert_lora(x, case.ids, case.trained["weights"], experts, *case.factors())
    out.sum().backward()
    assert (out.dtype, x.grad.dtype) == (torch.bfloat16, torch.bfloat16)
    assert case.trained["A1"].grad.dtype == case.trained["B2"].grad.dtype == torch.float32


def test_only_what_the_backward_needs_is_kept():
    """gate_up [S, 2I], A x and A h [S, r], x, weights and the order of rows: nothing of size [S, H] and no weights."""
    tokens, rank = 256, 4
    case = Case(torch.float32, rank=rank, tokens=tokens)
    own = {t.untyped_storage().data_ptr() for t in (*case.trained.values(), case.experts.up, case.experts.down)}
    kept = {}
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: kept.setdefault(t.untyped_storage().data_ptr(), t) is None or t, lambda t: t
    ):
        case.run(expert_lora, rows="tiles")
    size = sum(t.untyped_storage().nbytes() for p, t in kept.items() if p not in own)
    rows = tokens * K
    numbers = rows * (2 * I + 2 * rank) * 4 + rows * (4 + 3 * 8) + E * 4  # float32 rows; weight, token, order, place; ends
    assert size <= numbers


def test_tiles_of_many_rows_are_split_and_still_add_up():
    case = Case(torch.float64, tokens=1500)
    upstream = torch.randn(1500, H, dtype=torch.float64)
    assert worst(case.gradients(expert_lora, upstream), case.gradients(expert_lora_plain, upstream)) < 1e-12


def test_twice_the_same_is_bit_for_bit_the_same():
    upstream = torch.randn(T, H)
    first, second = (Case(torch.float32).gradients(expert_lora, upstream) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_packed_experts_are_unpacked_in_forward_and_backward():
    """The kernel asks a packed stack for its dense form twice and keeps none of it."""
    case = Case(torch.float64)

    class Packed:
        def __init__(self, dense):
            self.dense, self.shape, self.asked = dense, dense.shape, 0

        def dequantize(self, dtype):
            self.asked += 1
            return self.dense.to(dtype)

    up, down = Packed(case.experts.up.detach()), Packed(case.experts.down.detach())
    upstream = torch.randn(T, H, dtype=torch.float64)
    truth = case.gradients(expert_lora_plain, upstream)
    case.experts = Experts(up, down, Glu())
    assert worst(case.gradients(expert_lora, upstream), truth) < 1e-12
    assert (up.asked, down.asked) == (2, 2)


@pytest.mark.parametrize("gate", [g for g in GATES if g != "without gate"])
def test_a_gates_closed_form_is_its_definition(gate):
    gate_up = torch.randn(33, 2 * I, dtype=torch.float64) * 3
    dh = torch.randn(33, I, dtype=torch.float64)
    h, kept = GATES[gate].again(gate_up)
    leaf = gate_up.clone().requires_grad_()
    truth = GATES[gate].plain(leaf)
    (expected,) = torch.autograd.grad(truth, leaf, dh)
    assert torch.allclose(h, truth)
    assert torch.allclose(GATES[gate].forward(gate_up), truth)
    assert torch.allclose(GATES[gate].backward(gate_up, dh, kept)[0], expected)


def test_silu_and_its_gradient_by_hand():
    """gate 0, up 3: h = silu(0) * 3 = 0; d gate = dh * up * silu'(0) = 2 * 3 * 0.5 = 3; d up = dh * silu(0) = 0."""
    gate_up = torch.tensor([[0.0, 3.0]])
    h, kept = Glu().again(gate_up)
    d, _ = Glu().backward(gate_up, torch.tensor([[2.0]]), kept)
    assert h.tolist() == [[0.0]]
    assert d.tolist() == [[3.0, 0.0]]
    assert F.silu(torch.zeros(1)).item() == 0.0
