"""A sweep: every combination in a folder of its own, checked before anything is trained, and a table of what they came to."""

import json

import pytest

from ropewalk.config.run import load_run
from ropewalk.errors import ConfigError
from ropewalk.train.sweep import combinations, sweep
from ropewalk.train.trainer import train


@pytest.fixture
def written(tmp_path):
    """Writes the file of a sweep."""

    def write(text):
        path = tmp_path / "sweep.yml"
        path.write_text(text)
        return path

    return write


def start(arguments):
    """Trains here and now what a process of its own would train."""
    config, *overrides = arguments
    train(load_run(config, overrides), quiet=True)
    return 0


def test_every_combination_is_trained_once_and_the_best_stands_first(config, written, tmp_path, capsys):
    path = config(max_steps=6, val_set_size=4, sample_packing=False)
    file = written("learning_rate: [1.0e-9, 2.0e-2]\n_: [{lora_r: 2, lora_alpha: 4}]\n")
    assert sweep(path, (), file, start=start) == 0
    told = json.loads((tmp_path / "run" / "sweep.json").read_text())
    assert [one["name"] for one in told] == [
        "learning_rate=0.02,lora_r=2,lora_alpha=4",
        "learning_rate=1e-09,lora_r=2,lora_alpha=4",
    ]
    assert told[0]["loss"] < told[1]["loss"]
    assert all(one["evaluated"] for one in told)
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].split()[:3] == [told[0]["name"], f"{told[0]['loss']:.4f}", "evaluation"]
    recorded = json.loads((tmp_path / "run" / told[0]["name"] / "run.json").read_text())["config"]
    assert (recorded["lora_r"], recorded["learning_rate"]) == (2, 0.02)


def test_a_run_that_fails_is_told_and_the_others_go_on(config, written, capsys):
    begun = []

    def failing(arguments):
        begun.append(arguments)
        return 1

    assert sweep(config(), (), written("seed: [1, 2]"), ["--processes", "2"], start=failing) == 1
    assert [arguments[-2:] for arguments in begun] == [["--processes", "2"]] * 2
    assert capsys.readouterr().out.count("failed") == 2


def test_values_that_belong_together_are_taken_together(config, written):
    found = combinations(
        config(), ["seed=7"], written("_: [{lora_r: 2, lora_alpha: 4}, {lora_r: 8, lora_alpha: 8}]\nweight_decay: [0, 0.1]")
    )
    assert [one.name for one in found] == [
        "lora_r=2,lora_alpha=4,weight_decay=0",
        "lora_r=2,lora_alpha=4,weight_decay=0.1",
        "lora_r=8,lora_alpha=8,weight_decay=0",
        "lora_r=8,lora_alpha=8,weight_decay=0.1",
    ]
    assert all(one.overrides[0] == "seed=7" for one in found)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("lora_r: 8\n", "key 'lora_r': 8 is no list of values to take"),
        ("lora_rr: [8]\n", "unknown key 'lora_rr'"),
        ("lora_r: [8, -1]\n", "greater than 0"),
        ("output_dir: [a, b]\n", "each run's own"),
        ("_: [1]\n", "a list of mappings"),
        ("{}\n", "names keys with the values"),
        ("seed: [" + ", ".join(map(str, range(1001))) + "]\n", "1001 combinations"),
    ],
)
def test_what_is_wrong_is_said_before_anything_is_trained(config, written, text, said):
    with pytest.raises(ConfigError, match=r"sweep\.yml|override") as caught:
        combinations(config(), (), written(text))
    assert said in str(caught.value)
