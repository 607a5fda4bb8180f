"""A model under training by every contender that runs on a CPU, in this process, at tiny sizes."""

import pytest

from ropewalk.bench.contenders import Entrant
from ropewalk.bench.cost import Ceiling
from ropewalk.bench.model import Racer, config_of, errors
from ropewalk.bench.shapes import GEMMA, QWEN, Model

TINY = Model("tiny", 1, 1, 32, 64, 32, 8, 2, vocab=128, rank=8)


def test_every_gradient_is_that_of_the_eager_model():
    assert all(error <= 1e-5 for error in errors(TINY, ["ours", "grouped", "eager"], "float32", "cpu").values())


def test_without_peft_the_plain_layer_is_what_ours_is_compared_with():
    found = errors(TINY, ["ours"], "float32", "cpu")
    assert found["ours"] <= 1e-5


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
