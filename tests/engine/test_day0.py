"""Tiny models of architectures of every kind are served as by their own generate(); what the engine cannot serve it refuses."""

import pytest

from ropewalk.engine.day0 import architectures, build, serve
from ropewalk.engine.runner import Runner
from ropewalk.errors import ModelError

KINDS = dict(architectures())


@pytest.mark.parametrize("name", ["nemotron_h", "zamba2", "mamba", "minicpm3", "gemma2", "modernbert_decoder"])
def test_an_architecture_is_served_as_by_generate(name):
    served = serve(name, KINDS[name])
    assert served.passed, served


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("gptj", "without transformers' attention interface"),
        ("doge", "a mask of its own"),
        ("jetmoe", "not plainly to what it keeps"),
        ("bert", "looks ahead"),
        ("bart", "counts positions by itself"),
        ("deepseek_v32", "keeps its past as DynamicIndexedLayer"),
    ],
)
def test_an_architecture_that_would_be_read_wrong_is_refused_when_it_is_loaded(name, reason):
    with pytest.raises(ModelError, match=reason):
        Runner(build(KINDS[name]))
