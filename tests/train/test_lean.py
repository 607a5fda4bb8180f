"""Runs that trade something for memory: what they give, and that they can be gone on with."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file

from ropewalk.config.run import load_run
from ropewalk.errors import ConfigError
from ropewalk.models.merge import merge
from ropewalk.train.distributed import World
from ropewalk.train.in_backward import in_backward
from ropewalk.train.progress import read_events
from ropewalk.train.trainer import train


def losses(folder):
    return [event["loss"] for event in read_events(folder / "events.jsonl") if event["event"] == "step"]


def fresh(config, folder, **keys):
    train(load_run(config(output_dir=str(folder), **keys)), quiet=True)
    return losses(folder)


def adapter(folder):
    return (folder / "adapter" / "adapter_model.safetensors").read_bytes()


def rewind(folder, step):
    """The run folder as a kill after this step's checkpoint would have left it."""
    for path in (folder / "checkpoints").iterdir():
        if int(path.name.removeprefix("step-")) > step:
            shutil.rmtree(path)
    shutil.rmtree(folder / "adapter")
    record = json.loads((folder / "run.json").read_text())
    (folder / "run.json").write_text(json.dumps(record | {"state": "training"}))


SIXTEEN = {"bf16": True, "peft_autocast_adapter_dtype": False}


@pytest.mark.parametrize("keys", [{}, SIXTEEN], ids=["float32", "bf16"])
def test_8_bit_adam_learns_and_a_run_gone_on_with_ends_with_the_same_bits(config, tmp_path, keys):
    keys = {"optimizer": "adamw_8bit", "save_steps": 4, "max_steps": 8, **keys}
    whole = fresh(config, tmp_path / "whole", **keys)
    assert whole[-1] < whole[0] - 0.1
    first = adapter(tmp_path / "whole")
    rewind(tmp_path / "whole", 4)
    assert fresh(config, tmp_path / "whole", **keys) == whole
    assert adapter(tmp_path / "whole") == first


def test_factors_of_16_bits_are_saved_as_such_and_verified(config, tmp_path):
    fresh(config, tmp_path / "run", max_steps=1, **SIXTEEN)
    saved = load_file(tmp_path / "run" / "adapter" / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in saved.values()} == {torch.bfloat16}


@pytest.mark.parametrize("optimizer", ["adamw_torch_fused", "adamw_8bit"])
def test_a_step_during_the_backward_pass_gives_the_same_run(config, tmp_path, monkeypatch, optimizer):
    monkeypatch.setattr("ropewalk.train.in_backward.AT_ONCE", 1000)
    keys = {
        "max_grad_norm": 0,
        "optimizer": optimizer,
        "gradient_checkpointing": True,
        "lora_dropout": 0.1,
    }
    plain, found = (
        fresh(config, tmp_path / name, **keys, step_in_backward=asked) for name, asked in (("plain", False), ("found", True))
    )
    assert found == plain
    assert adapter(tmp_path / "found") == adapter(tmp_path / "plain")
    told = [
        [event["gradient_norm"] for event in read_events(tmp_path / name / "events.jsonl") if event["event"] == "step"]
        for name in ("plain", "found")
    ]
    assert told[0] == told[1]


def test_gradients_of_several_processes_are_not_used_before_they_are_added_up(config):
    run = load_run(config(step_in_backward=True, max_grad_norm=0))
    with pytest.raises(ConfigError, match="those of 2 processes are added up"):
        in_backward(run, None, [], World(0, 2))


def test_what_was_trained_over_int4_is_merged_into_the_plain_base(config, base, tmp_path):
    held = fresh(config, tmp_path / "run", max_steps=8, load_in_4bit=True, bnb_4bit_quant_type="int4")
    assert held[-1] < held[0] - 0.1
    assert merge(base, tmp_path / "run" / "adapter", tmp_path / "merged") < 1e-4
    assert load_file(tmp_path / "merged" / "model.safetensors").keys() == load_file(base / "model.safetensors").keys()
