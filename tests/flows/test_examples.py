"""Every example does what its first lines say."""

from pathlib import Path

import pytest

from ropewalk.cli import main

EXAMPLES = Path(__file__).parents[2] / "examples"
TINY = ["sft-tiny.yml", "full-tiny.yml", "dpo.yml", "reward-model.yml"]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bases") / "tiny-moe"
    assert main(["base", "make", str(folder), "--arch", "qwen3_moe"]) == 0
    return folder


@pytest.mark.parametrize("name", TINY)
def test_a_tiny_example_trains(name, base, tmp_path, monkeypatch):
    monkeypatch.setenv("ROPEWALK_HOME", str(tmp_path / "home"))
    monkeypatch.chdir(EXAMPLES.parent)
    run = [str(EXAMPLES / name), f"base_model={base}", f"output_dir={tmp_path / 'run'}", "num_threads=1"]
    assert main(["check", *run]) == 0
    assert main(["train", *run]) == 0
    assert list((tmp_path / "run").glob("*/*.safetensors"))


@pytest.mark.parametrize("name", sorted({p.name for p in EXAMPLES.glob("*.yml")} - set(TINY)))
def test_every_other_example_is_a_configuration_that_is_accepted(name, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(EXAMPLES.parent)
    rows = EXAMPLES / "data" / "capitals.jsonl"
    named = [key for key in ("datasets", "test_datasets") if f"\n{key}:" in (EXAMPLES / name).read_text()]
    assert main(["check", str(EXAMPLES / name), "--offline", *(f"{key}.0.path={rows}" for key in named)]) == 0
    assert capsys.readouterr().out.startswith("Base ")


def test_the_example_suite_is_one(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("ROPEWALK_HOME", str(tmp_path / "home"))
    assert main(["compare", "suite", str(EXAMPLES / "data" / "questions.jsonl")]) == 0
    assert "questions.jsonl  6 prompts of 4 groups" in capsys.readouterr().out
