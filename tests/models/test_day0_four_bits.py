"""Architectures of each kind of checkpoint, in 4 bits and merged; benchmarks/day0.py does the same for every one there is."""

from __future__ import annotations

import pytest

from ropewalk.kernels import quant
from ropewalk.models.day0_four_bits import hold
from ropewalk.models.tiny import expert_architectures

ARCHITECTURES = dict(expert_architectures())
SOME = {
    "qwen3_moe": "experts one by one on disk",
    "gpt_oss": "stacks with biases, transposed",
    "gemma4": "the text part of a checkpoint that also sees",
    "qwen3_5_moe": "linear attention, the text part too",
    "deepseek_v3": "latent attention",
    "minimax_m3_vl": "a text part whose conversion transformers knows for the whole only",
    "inkling": "a text part without the names that others have",
    "laguna": "an adapter of which PEFT loses keys",
    "openai_privacy_filter": "tokens are scored",
}


@pytest.mark.parametrize("name", [name for name in SOME if name in ARCHITECTURES])
def test_held_in_4_bits_adapted_and_merged(name, tmp_path):
    result = hold(name, ARCHITECTURES[name], tmp_path)
    assert result.passed, result.faults
    assert result.files > 1
    assert result.factors == 2 * result.held  # a pair for everything that is in 4 bits
    assert result.merged is not None
    assert result.rounded > 0.9  # of what rounding allows: numbers were changed, and rounded


@pytest.mark.skipif("diffusion_gemma" not in ARCHITECTURES, reason="transformers does not know it")
def test_layers_that_two_models_share_are_in_4_bits_once_and_not_merged(tmp_path):
    result = hold("diffusion_gemma", ARCHITECTURES["diffusion_gemma"], tmp_path)
    assert result.passed, result.faults
    assert result.unmerged.endswith("are one tensor, and a merge would change both; serve it as an adapter instead")


def test_a_backward_pass_that_is_a_thousandth_off_is_seen(tmp_path, monkeypatch):
    right = quant._MatmulQuantised.backward

    def wrong(ctx, upstream):
        return right(ctx, upstream * 1.001)

    monkeypatch.setattr(quant._MatmulQuantised, "backward", staticmethod(wrong))
    assert hold("mixtral", ARCHITECTURES["mixtral"], tmp_path).faults.startswith("gradient of ")
