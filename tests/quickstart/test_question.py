"""Questions to a published model: what the shipped base answers without any training."""

from __future__ import annotations

from pathlib import Path

import pytest

from ropewalk.quickstart.question import Asking
from ropewalk.quickstart.run import BASE
from ropewalk.registry import Registry

PASSAGE = "Kelmar is a town. The capital of Kelmar is Lodravo. Its code is QX. 4,312 people live there."


@pytest.fixture
def registry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Registry:
    monkeypatch.setenv("ROPEWALK_HOME", str(tmp_path / "home"))
    return Registry(tmp_path / "registry")


def test_the_shipped_base_copies_answers_out_of_an_invented_passage(registry: Registry) -> None:
    registry.publish_base("base", BASE)
    registry.ship("answers", "base")
    asked = [f"{PASSAGE}\n\n{question}" for question in ("What is the capital of Kelmar?", "How many people live in Kelmar?")]
    with Asking(registry) as asking:
        assert asking.answers("answers", asked) == ["Lodravo", "4,312"]
        (short,) = asking.answers("answers", asked[1:], 1)
    assert "4,312".startswith(short)
    assert len(short) < len("4,312")
