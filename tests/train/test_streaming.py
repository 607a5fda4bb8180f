"""Runs whose frozen weights come from the host: the same numbers, whatever else the run does."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file

from ropewalk.config.run import load_run
from ropewalk.errors import TrainingStopped
from ropewalk.models.load import load_base
from ropewalk.models.streaming import Streamed
from ropewalk.train import trainer
from ropewalk.train.progress import read_events
from ropewalk.train.trainer import train

ASKED = {
    "max_steps": 4,
    "val_set_size": 4,
    "eval_steps": 2,
    "save_steps": 2,
    "gradient_accumulation_steps": 2,
    "lora_dropout": 0.1,
}


def numbers(config, tmp_path, name, **keys):
    """Every loss of a run, of training and of evaluation, and its adapter."""
    result = train(load_run(config(output_dir=str(tmp_path / name), **ASKED | keys)), quiet=True)
    told = [e["loss"] for e in read_events(tmp_path / name / "events.jsonl") if e["event"] in ("step", "eval")]
    return told, load_file(result.adapter / "adapter_model.safetensors")


def same(one, other):
    return one[0] == other[0] and all(torch.equal(one[1][key], other[1][key]) for key in one[1].keys() | other[1].keys())


@pytest.fixture
def poisoned(monkeypatch):
    """Every ring from now on fills what is given back with not-a-number."""
    plain = Streamed.__init__

    def init(self, *args):
        plain(self, *args)
        self.ring.poisoned = True

    monkeypatch.setattr(Streamed, "__init__", init)


@pytest.mark.parametrize("keys", [{}, {"adapter": "qlora"}], ids=["plain", "4 bit"])
def test_a_streamed_run_gives_the_numbers_of_a_plain_one_to_the_bit(config, tmp_path, poisoned, keys):
    plain = numbers(config, tmp_path, "plain", **keys)
    assert len(plain[0]) == 6
    assert same(plain, numbers(config, tmp_path, "experts", stream_weights="experts", **keys))
    layers = {"stream_weights": "layers", "gradient_checkpointing": True}
    assert same(plain, numbers(config, tmp_path, "layers", **layers, **keys))


def test_a_streamed_run_goes_on_from_its_checkpoint_with_the_same_numbers(config, tmp_path, poisoned, monkeypatch):
    plain = numbers(config, tmp_path, "plain")
    after = trainer.Fit._after_step

    def stop(self):
        after(self)
        if self.position.step == 3:
            raise TrainingStopped("enough")

    with monkeypatch.context() as patched:
        patched.setattr(trainer.Fit, "_after_step", stop)
        with pytest.raises(TrainingStopped):
            numbers(config, tmp_path, "stopped", stream_weights="layers")
    assert same(plain, numbers(config, tmp_path, "stopped", stream_weights="layers"))


def test_weights_are_quantised_while_they_come_to_the_host(base):
    model = load_base(base, quantize="nf4", device="cpu", on_host=True)
    truth = load_base(base, quantize="nf4", device="cpu")
    assert all(map(torch.equal, model.state_dict().values(), truth.state_dict().values()))
