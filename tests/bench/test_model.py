"""A model under training by every contender that runs on a CPU, in this process, at tiny sizes."""

import pytest
import torch

from ropewalk.bench.contenders import Entrant
from ropewalk.bench.cost import Ceiling
from ropewalk.bench.model import Racer, config_of, errors, one_by_one, write_truth
from ropewalk.bench.shapes import GEMMA, QWEN, Model
from ropewalk.models.head import output_head

TINY = Model("tiny", 1, 1, 32, 64, 32, 8, 2, vocab=128, rank=8)


def test_every_gradient_is_that_of_the_eager_model():
    found, failed = errors(TINY, ["ours", "grouped", "eager"], "float32", "cpu")
    assert all(error <= 1e-5 for error in found.values())
    assert (sorted(found), failed) == (["grouped", "ours"], {})


def test_without_peft_the_plain_layer_is_what_ours_is_compared_with():
    found, _ = errors(TINY, ["ours"], "float32", "cpu")
    assert found["ours"] <= 1e-5


def test_a_peer_that_fails_leaves_the_others_their_errors():
    found, failed = errors(TINY, ["ours", "liger"], "float32", "cpu")
    assert found["ours"] <= 1e-5
    assert "liger_kernel" in failed["liger"]


@pytest.mark.parametrize(("dtype", "stored", "bound"), [("float32", "", 1e-5), ("bfloat16", "", 0.1), ("float32", "nf4", 1e-5)])
def test_models_are_raced_one_by_one_and_each_is_held_beside_the_plain_one(dtype, stored, bound, tmp_path):
    told, truth = [], str(tmp_path / "truth")
    write_truth(TINY, dtype, "cpu", stored, truth)
    one_by_one([(TINY, dtype, stored, truth)], [Entrant("ours"), Entrant("ours", "layer")], "cpu", 0.0, told.append)
    assert [(row["race"], row["policy"], len(row["ms"])) for row in told] == [(0, "keep", 5), (0, "layer", 5)]
    assert all(0 <= row["max_error"] <= bound and row["floor_ms"] > 0 and row["peak_mb"] > 0 for row in told)


def test_a_model_that_fails_is_told_and_the_next_has_its_turn(tmp_path):
    told, truth = [], str(tmp_path / "none")
    one_by_one([(TINY, "float32", "", truth)], [Entrant("grouped", "offload"), Entrant("ours")], "cpu", 0.0, told.append)
    assert "has no policy offload" in told[0]["note"]
    assert (told[1]["max_error"], len(told[1]["ms"])) == (None, 5)


def test_the_loss_by_pieces_is_that_of_transformers():
    """On a GPU everybody has it."""
    racer = Racer(TINY, Entrant("grouped"), "float32", "cpu")
    wanted = racer.loss()
    racer._head = output_head(racer.model)
    assert torch.allclose(racer.loss(), wanted, rtol=1e-6)


@pytest.mark.parametrize("policy", ["keep", "experts", "layer", "offload"])
def test_leaner_policies_cost_no_bit_and_keep_less(policy):
    plain, lean = (Racer(TINY, Entrant("ours", p), "float32", "cpu") for p in ("keep", policy))
    wanted, found = plain.gradients(), lean.gradients()
    assert all(gradient.equal(found[name]) for name, gradient in wanted.items())
    assert lean.kept()["held_mb"] <= plain.kept()["held_mb"]


def test_the_floor_of_a_step_worked_out_by_hand():
    racer = Racer(TINY, Entrant("ours"), "float32", "cpu")
    # per token: q and o 64 x 64, k and v 64 x 16, the head 64 x 128; the router is no linear layer of torch's; 2 of 8 experts of
    # 64 x 64 and 32 x 64. LoRA of rank 8: q and o 8 * 128, k and v 8 * 80; experts 2 times 8 * (64 + 64) and 8 * (32 + 64).
    # Attention sees 16.5 keys of 32 on average, of 8 heads of 8.
    linear = 2 * (2 * 64 * 64 + 2 * 64 * 16 + 64 * 128 + 2 * (64 * 64 + 32 * 64))
    lora = 2 * (2 * 8 * 128 + 2 * 8 * 80 + 2 * (8 * 128 + 8 * 96))
    seen = 4 * 64 * 16.5
    wanted = 32 * (2 * linear + 3 * lora + 3.5 * seen)
    assert racer.floor(Ceiling(1e9, 1e30)) == pytest.approx(wanted / 1e6)


@pytest.mark.parametrize(
    ("name", "layers", "types"), [(QWEN, 2, None), (GEMMA, 4, ["sliding_attention"] * 3 + ["full_attention"])]
)
def test_published_models_have_fewer_layers_and_their_own_width(name, layers, types):
    config = config_of(Model(name, layers, 1, 4096, published=name))
    assert (config.num_hidden_layers, config.num_experts) == (layers, 128)
    assert types is None or config.layer_types == types
