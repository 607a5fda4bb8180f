"""Every mixture-of-experts architecture of the installed transformers, against its own eager experts and W + s B A written out."""

from __future__ import annotations

import pytest

from ropewalk.models.day0 import compare
from ropewalk.models.tiny import expert_architectures

ARCHITECTURES = dict(expert_architectures())
FAILING: dict[str, str] = {}  # architecture -> reason; docs/day0.md lists the same

MUST_PASS = ("gemma4", "qwen3_moe", "qwen3_5_moe", "mixtral", "mistral4", "gpt_oss", "deepseek_v3", "glm4_moe", "olmoe")


def test_the_known_families_are_among_them_and_few_fail():
    assert not [name for name in MUST_PASS if name in FAILING]
    assert len(ARCHITECTURES) - len(FAILING) >= 56 or len(ARCHITECTURES) < 60  # older versions of transformers have fewer
    assert FAILING.keys() <= ARCHITECTURES.keys()


@pytest.mark.parametrize("name", [n for n in ARCHITECTURES if n not in FAILING])
def test_loss_and_every_gradient_agree(name):
    """One expert of each layer gets every token and one gets none; the largest relative error is 1e-5."""
    result = compare(name, ARCHITECTURES[name])
    assert result.passed, (
        f"{result.dtype}: {result.error:.1e} at {result.where}, loss {result.loss:.1e}, {result.layers} expert layers"
    )
    assert result.factors > 0
