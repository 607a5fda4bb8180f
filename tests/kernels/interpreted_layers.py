"""Whole expert layers out of the Triton kernels beside the plain twin, in Triton's interpreter: collected by test_expert_kernels.py."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from ropewalk.kernels import triton_kernels
from ropewalk.kernels.expert_lora import Experts, Factors, expert_lora, expert_lora_plain
from ropewalk.kernels.gates import ClampedGlu, Glu
from ropewalk.kernels.quant import Int4, Int8, Nf4

pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered in exp:RuntimeWarning")  # a sigmoid far out, in numpy
E, H, I = 4, 40, 24


class Layer:
    """Random experts; expert 2 gets no token."""

    def __init__(self, gate=None, transposed=False, bias=False, rank=3, tokens=12, k=2, lora=True):
        torch.manual_seed(0)
        self.ids = torch.stack([torch.tensor([0, 1, 3])[torch.randperm(3)[:k]] for _ in range(tokens)])
        self.trained = {"x": torch.randn(tokens, H), "weights": torch.rand(tokens, k)}
        if lora:
            self.trained |= {"A1": torch.randn(E, rank, H), "B1": torch.randn(E, 2 * I, rank)}
            self.trained |= {"A2": torch.randn(E, rank, I), "B2": torch.randn(E, H, rank)}
        for tensor in self.trained.values():
            tensor.requires_grad_()
        up, down = torch.randn(E, 2 * I, H), torch.randn(E, H, I)
        if transposed:
            up, down = up.transpose(1, 2).contiguous(), down.transpose(1, 2).contiguous()
        biases = (torch.randn(E, 2 * I), torch.randn(E, H)) if bias else (None, None)
        self.experts = Experts(up, down, gate or Glu(), *biases, transposed)
        self.upstream = torch.randn(tokens, H)

    def gradients(self, function, **how):
        t = self.trained
        factors = (Factors(t["A1"], t["B1"], 0.7), Factors(t["A2"], t["B2"], 0.3)) if "A1" in t else (None, None)
        out = function(t["x"], self.ids, t["weights"], self.experts, *factors, **how)
        return {"out": out.detach()} | dict(zip(t, torch.autograd.grad(out, list(t.values()), self.upstream)))

    def agrees(self, found=None):
        found, truth = found or self.gradients(expert_lora, rows="fused"), self.gradients(expert_lora_plain)
        return all((found[n] - t).norm() <= 5e-6 * t.norm() for n, t in truth.items())


KINDS = {
    "silu": {},
    "gelu tanh, interleaved, rank 20": {"gate": Glu("gelu_tanh", True), "rank": 20},
    "gpt-oss": {"gate": ClampedGlu(1.2, 1.7, 1.0, True), "transposed": True, "bias": True},
    "frozen": {"lora": False},
    "one token": {"tokens": 1, "rank": 1},
    "one expert of each": {"k": 1, "tokens": 20},
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_gradient_of_a_layer_is_the_twins(kind):
    layer = Layer(**KINDS[kind])
    found = layer.gradients(expert_lora, rows="fused")
    assert layer.agrees(found)
    if "A1" in found:
        assert not any(found[n][2].any() for n in ("A1", "B1", "A2", "B2"))


def test_what_is_not_kept_is_computed_again_to_the_bit():
    layer = Layer()
    kept = layer.gradients(expert_lora, rows="fused")
    layer.experts = replace(layer.experts, recompute=True)
    found = layer.gradients(expert_lora, rows="fused")
    assert all(torch.equal(kept[n], found[n]) for n in kept)


@pytest.mark.parametrize("kind", [Nf4, Int4, Int8])
def test_stored_experts_are_dequantised_some_at_a_time(kind, monkeypatch):
    monkeypatch.setattr("ropewalk.kernels.expert_scratch.SCRATCH", 2 * 3 * 2 * I * H * 4)
    layer = Layer()
    layer.experts = replace(layer.experts, up=kind.of(layer.experts.up), down=kind.of(layer.experts.down))
    assert layer.agrees()


def test_slots_that_name_no_expert_are_never_read():
    layer = Layer()
    layer.ids[0, 1], layer.ids[3, 0] = E, E + 3
    with torch.no_grad():
        layer.trained["weights"][0, 1] = float("nan")
    found = layer.gradients(expert_lora, rows="fused")
    assert all(torch.isfinite(g).all() for g in found.values())
    assert found["weights"][0, 1] == found["weights"][3, 0] == 0


@pytest.mark.parametrize("broken", ["expert_glu", "expert_gram"])
def test_a_kernel_that_does_not_run_is_told_once_and_grouped_products_go_on(broken, monkeypatch, caplog):
    """In the forward, and in the backward after a forward by kernels."""

    def fails(*_, **__):
        raise RuntimeError("out of resource: shared memory")

    monkeypatch.setattr(f"ropewalk.kernels.expert_fused.{broken}", fails)
    monkeypatch.setattr("ropewalk.kernels.expert_lora.usable", lambda device: not triton_kernels._refused)
    monkeypatch.setattr("ropewalk.kernels.expert_lora._rows_for", lambda *_: "grouped")
    monkeypatch.setattr("ropewalk.kernels.triton_kernels._refused", False)
    layer = Layer()
    for _ in range(2):
        assert layer.agrees(layer.gradients(expert_lora))
    assert [record.getMessage().count("out of resource: shared memory") for record in caplog.records] == [1]


def test_memory_that_ran_out_is_no_fault_of_a_kernel(monkeypatch):
    monkeypatch.setattr("ropewalk.kernels.triton_kernels._refused", False)
    with pytest.raises(torch.OutOfMemoryError):
        triton_kernels.refuse(torch.OutOfMemoryError("none left"))
    assert not triton_kernels._refused
