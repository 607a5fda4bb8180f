"""The examples for GPUs of 12 to 80 GB: each is accepted, and what it needs fits the size that it is for."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from ropewalk.config.run import load_run
from ropewalk.models.shapes import KNOWN
from ropewalk.train.plan import check

ROOT = Path(__file__).parents[2]
EXAMPLES = sorted((ROOT / "examples" / "gpu").glob("*.yml"))


@pytest.mark.parametrize("path", EXAMPLES, ids=[path.stem for path in EXAMPLES])
def test_the_example_fits_the_gpu_it_is_for(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr("ropewalk.train.plan.cached_folder", lambda *_: None)
    plan = check(load_run(path), offline=True)
    found = re.fullmatch(r"(.+)-(\d+)gb", path.stem)
    assert found is not None
    assert KNOWN[plan.base_model] == found[1]
    assert plan.memory is not None
    assert 0.7 * int(found[2]) * 2**30 < plan.memory["total"] <= 0.95 * int(found[2]) * 2**30
    assert "GiB planned for" in plan.text()


def test_every_known_shape_has_its_examples() -> None:
    assert {re.sub(r"-\d+gb$", "", path.stem) for path in EXAMPLES} == set(KNOWN.values())
