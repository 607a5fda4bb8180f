"""A run from its configuration to a verified adapter."""

import json
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch

from ropewalk.cli import main
from ropewalk.config.run import load_run
from ropewalk.errors import ConfigError, ModelError, TrainingStopped
from ropewalk.train.progress import read_events
from ropewalk.train.trainer import train


def losses(folder):
    return [e["loss"] for e in read_events(folder / "events.jsonl") if e["event"] == "step"]


def run(path, **options):
    return train(load_run(path), quiet=True, **options)


def fresh(config, tmp_path, name, **keys):
    """Trains into a folder of its own and gives the losses."""
    run(config(output_dir=str(tmp_path / name), **keys))
    return losses(tmp_path / name)


def test_a_run_learns_and_leaves_what_it_promises(config, tmp_path):
    result = run(config(max_steps=20, val_set_size=4))
    assert result.last_loss < result.first_loss - 0.3
    assert result.steps == 20
    assert result.evaluation_loss < result.first_loss
    folder = tmp_path / "run"
    assert {p.name for p in (folder / "adapter").iterdir()} >= {
        "adapter_model.safetensors",
        "adapter_config.json",
        "tokenizer.json",
    }
    assert {p.name for p in (folder / "plots").iterdir()} == {"loss.svg", "throughput.svg", "rate.svg"}
    record = json.loads((folder / "run.json").read_text())
    assert record["state"] == "finished"
    assert record["config"]["lora_r"] == 4
    assert record["versions"]["torch"] == torch.__version__


def test_the_adapter_gives_the_same_answers_through_peft(config, base, tmp_path):
    from peft import PeftModel

    from ropewalk.models.load import load_base

    result = run(config(max_steps=10))
    model = load_base(base, dtype="float32", device="cpu", experts_implementation=None)
    ids = torch.arange(5, 25)[None]
    before = model(input_ids=ids).logits
    after = PeftModel.from_pretrained(model, str(result.adapter))(input_ids=ids).logits
    assert (after - before).abs().max() > 0.1


def test_the_first_loss_is_that_of_the_untouched_base(config, base):
    from ropewalk.chat.template import Template
    from ropewalk.data.dataset import open_data
    from ropewalk.data.packing import batches
    from ropewalk.models.head import output_head
    from ropewalk.models.load import load_base

    path = config(max_steps=1)
    given = load_run(path)
    first = batches(open_data(given, Template.load(base)).train, given, seed=given.seed, epoch=0)[0]
    model = load_base(base, dtype="float32", device="cpu", experts_implementation="eager")
    tensors = [torch.from_numpy(a) for a in (first.ids, first.labels, first.position_ids)]
    total, count = output_head(model).loss(model, *tensors)
    assert run(path).first_loss == pytest.approx(float(total) / count, rel=1e-5)


def test_the_same_seed_gives_the_same_losses_and_another_seed_others(config, tmp_path):
    one, two, other = (fresh(config, tmp_path, n, seed=s, lora_dropout=0.1) for n, s in (("a", 1), ("b", 1), ("c", 2)))
    assert one == two
    assert one != other


@pytest.mark.parametrize(
    "keys", [{"gradient_checkpointing": True}, {"gradient_checkpointing": "offload"}], ids=["layers", "offload"]
)
def test_recomputing_changes_memory_and_nothing_else(config, tmp_path, keys):
    assert fresh(config, tmp_path, "with", **keys) == pytest.approx(fresh(config, tmp_path, "without"), rel=1e-6)


def test_full_fine_tuning_learns_and_writes_a_plain_checkpoint(config, base):
    from transformers import AutoModelForCausalLM

    result = run(config(adapter=None, lora_r=None, max_steps=15, learning_rate=3e-3))
    assert result.last_loss < result.first_loss - 0.3
    assert result.adapter.name == "model"
    again = AutoModelForCausalLM.from_pretrained(result.adapter)
    before = AutoModelForCausalLM.from_pretrained(base)
    name, weight = next(iter(again.named_parameters()))
    assert not torch.equal(weight, before.get_parameter(name))


def test_only_unfrozen_parameters_move(config, base):
    from transformers import AutoModelForCausalLM

    result = run(config(adapter=None, lora_r=None, unfrozen_parameters=["model.layers.1.*"]))
    before = dict(AutoModelForCausalLM.from_pretrained(base).named_parameters())
    after = dict(AutoModelForCausalLM.from_pretrained(result.adapter).named_parameters())
    moved = {n for n in before if not torch.equal(before[n], after[n])}
    assert moved
    assert all(n.startswith("model.layers.1.") for n in moved)


@pytest.mark.parametrize(
    "keys",
    [{"peft_use_dora": True}, {"peft_use_rslora": True}, {"loraplus_lr_ratio": 8}, {"lora_rank_pattern": {"experts.*": 2}}],
    ids=["dora", "rslora", "lora+", "rank_pattern"],
)
def test_every_variant_of_lora_has_an_effect_and_is_verified(config, tmp_path, keys):
    plain = fresh(config, tmp_path, "plain")
    varied = fresh(config, tmp_path, "varied", **keys)
    assert varied[0] == pytest.approx(plain[0], rel=1e-5)  # the base is untouched at first
    assert varied[2:] != plain[2:]


def test_activated_lora_trains_only_from_its_invocation_on(config, tmp_path):
    # "assistant\n" as bytes of the tokenizer: the adapter acts on the answers alone
    from ropewalk.chat.template import Template

    base = load_run(config()).base_model
    invocation = Template.load(base).encode("assistant\n")
    result = run(config(alora_invocation_tokens=invocation, max_steps=8))
    saved = json.loads((result.adapter / "adapter_config.json").read_text())
    assert saved["alora_invocation_tokens"] == invocation
    assert result.last_loss < result.first_loss


def test_early_stopping_ends_the_run_and_takes_the_best_weights(config):
    # at this rate the evaluation loss only rises
    result = run(
        config(max_steps=40, learning_rate=3.0, val_set_size=4, eval_steps=2, early_stopping_patience=2, max_grad_norm=0)
    )
    events = read_events(result.folder / "events.jsonl")
    evaluations = [e["loss"] for e in events if e["event"] == "eval"]
    assert result.steps < 40
    assert result.evaluation_loss == min(evaluations)


def test_a_loss_that_stays_above_the_threshold_stops_the_run(config):
    with pytest.raises(TrainingStopped, match=r"above loss_watchdog_threshold 0\.5 for the 2th time"):
        run(config(loss_watchdog_threshold=0.5, loss_watchdog_patience=2))


def test_a_loss_that_is_not_a_number_names_step_and_batch(config, monkeypatch):
    from ropewalk.train.pupil import Pupil

    whole = Pupil.loss
    seen = []

    def broken(self, *tensors):
        seen.append(1)
        return whole(self, *tensors) * (float("nan") if len(seen) == 3 else 1.0)

    monkeypatch.setattr(Pupil, "loss", broken)
    with pytest.raises(TrainingStopped, match=r"step 3: the loss of batch \d+ of epoch \d is nan"):
        run(config())


def test_a_finished_run_is_not_trained_again(config, capsys):
    path = config()
    first = run(path)
    assert train(load_run(path)) == first
    assert "finished; --restart moves it aside" in capsys.readouterr().err
    assert main(["train", str(path), "--processes", "2"]) == 0
    assert "finished; --restart moves it aside" in capsys.readouterr().err


def test_another_configuration_in_the_same_folder_is_refused_and_restart_moves_the_old_run_aside(config, tmp_path):
    run(config())
    before = losses(tmp_path / "run")
    path = config(learning_rate=1e-3)
    with pytest.raises(ConfigError, match=r"learning_rate \(0.01 there, 0.001 now\)"):
        run(path)
    run(path, restart=True)
    assert losses(tmp_path / "run" / "before-1") == before
    assert losses(tmp_path / "run") != before


def test_a_lora_target_that_matches_nothing_is_an_error(config):
    with pytest.raises(ModelError, match="q_prj"):
        run(config(lora_target_modules=["q_prj"]))


def rewind(folder, step):
    """The run folder as a kill after this step's checkpoint would have left it."""
    for path in (folder / "checkpoints").iterdir():
        if int(path.name.removeprefix("step-")) > step:
            shutil.rmtree(path)
    shutil.rmtree(folder / "adapter")
    record = json.loads((folder / "run.json").read_text())
    (folder / "run.json").write_text(json.dumps(record | {"state": "training"}))


def test_a_stream_goes_on_from_the_row_where_it_was(config, tmp_path):
    keys = {"streaming": True, "max_steps": 9, "save_steps": 2, "save_total_limit": 9, "streaming_multipack_buffer_size": 5}
    whole = fresh(config, tmp_path, "stream", **keys)
    rewind(tmp_path / "stream", 4)
    assert fresh(config, tmp_path, "stream", **keys) == whole
    assert len(set(whole)) == 9


def _train(path, home):
    os.environ["ROPEWALK_HOME"] = home
    train(load_run(path), quiet=True)


def test_killed_at_twenty_random_moments_a_run_ends_with_the_same_numbers(config, tmp_path):
    keys = {"max_steps": 24, "save_steps": 2, "lora_dropout": 0.1, "val_set_size": 4, "eval_steps": 6, "save_total_limit": 2}
    whole = fresh(config, tmp_path, "whole", **keys)
    path = config(output_dir=str(tmp_path / "killed"), **keys)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["ropewalk.train.trainer"])
    chance, kills, pause = random.Random(0), 0, 1.0
    while kills < 20:
        worker = context.Process(target=_train, args=(path, str(tmp_path / "home")))
        worker.start()
        worker.join(timeout=chance.uniform(0.05, pause))
        if worker.is_alive():
            os.kill(worker.pid, signal.SIGKILL)
            worker.join()
            kills += 1
        elif worker.exitcode == 0:  # it came to its end: begin again, killing sooner
            (tmp_path / "killed").rename(tmp_path / f"ended-{kills}")
            pause *= 0.8
        else:
            pytest.fail(f"a resumed run failed with exit code {worker.exitcode}")
    run(path)
    assert losses(tmp_path / "killed") == whole
    weights = [(tmp_path / n / "adapter" / "adapter_model.safetensors").read_bytes() for n in ("whole", "killed")]
    assert weights[0] == weights[1]


def test_asked_to_stop_a_run_saves_and_goes_on_later(config, tmp_path):
    keys = {"max_steps": 300, "save_strategy": "no"}
    path = config(**keys)
    command = [sys.executable, "-m", "ropewalk", "train", str(path)]
    worker = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    while not (tmp_path / "run" / "events.jsonl").exists() or len(losses(tmp_path / "run")) < 3:
        assert worker.poll() is None, worker.communicate()[1]
        time.sleep(0.02)
    worker.send_signal(signal.SIGINT)
    _, said = worker.communicate()
    assert worker.returncode == 1
    assert "the same command goes on from there" in said.splitlines()[-1]
    done = len(losses(tmp_path / "run"))
    assert 3 <= done < 300
    assert f"stopped at step {done}" in said


def test_the_result_is_uploaded_where_the_configuration_says(config, monkeypatch):
    calls = []

    class Hub:
        def create_repo(self, name, private, exist_ok):
            return f"address of {name}"

        def create_branch(self, name, branch, exist_ok):
            calls.append((name, branch))

        def upload_folder(self, repo_id, folder_path, revision, commit_message):
            calls.append((repo_id, sorted(p.name for p in folder_path.iterdir())[0], revision))

    monkeypatch.setattr("huggingface_hub.HfApi", Hub)
    run(config(max_steps=1, hub_model_id="me/mine", hub_revision="first"))
    assert calls == [("me/mine", "first"), ("me/mine", "adapter_config.json", "first")]


@pytest.mark.parametrize("name", ["wandb", "mlflow"])
def test_a_tracker_gets_the_numbers_of_every_step(config, monkeypatch, name):
    """The real packages are extras; this one keeps what it is told, through the calls that both have."""
    import types

    got = []
    fake = types.SimpleNamespace(
        init=lambda **settings: types.SimpleNamespace(log=lambda values, step: got.append((step, values)), finish=lambda: None),
        set_tracking_uri=lambda uri: None,
        set_experiment=lambda name: None,
        start_run=lambda run_name: None,
        log_params=lambda values: None,
        log_metrics=lambda values, step: got.append((step, values)),
        end_run=lambda: None,
    )
    monkeypatch.setitem(sys.modules, name, fake)
    result = run(config(max_steps=2, report_to=name))
    assert [step for step, _ in got] == [1, 2]
    assert got[0][1]["train/loss"] == result.first_loss


def test_a_tracker_that_is_not_installed_says_what_to_install(config, monkeypatch):
    from ropewalk.errors import MissingExtra

    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(MissingExtra, match=r"pip install 'ropewalk\[wandb\]'"):
        run(config(report_to="wandb"))


@pytest.mark.parametrize("keys", [{"adapter": "qlora"}, {"load_in_8bit": True}], ids=["nf4", "int8"])
def test_a_quantised_base_trains_and_its_adapter_is_verified(config, tmp_path, keys):
    plain = fresh(config, tmp_path, "plain")
    held = fresh(config, tmp_path, "held", max_steps=20, **keys)
    assert held[0] == pytest.approx(plain[0], abs=0.1)  # a quantised base is near the base, and not the same
    assert held[0] != plain[0]
    assert held[-1] < held[0] - 0.3


def test_lisa_moves_only_the_layers_that_are_awake(config, base):
    from transformers import AutoModelForCausalLM

    result = run(config(adapter=None, lora_r=None, lisa_n_layers=1, lisa_step_interval=10, max_steps=3))
    before = dict(AutoModelForCausalLM.from_pretrained(base).named_parameters())
    after = dict(AutoModelForCausalLM.from_pretrained(result.adapter).named_parameters())
    moved = {n.split(".")[2] for n in before if ".layers." in n and not torch.equal(before[n], after[n])}
    assert len(moved) == 1  # one of the two layers for all three steps
    assert not torch.equal(before["model.embed_tokens.weight"], after["model.embed_tokens.weight"])


def test_muon_learns_and_goes_on_from_its_checkpoint(config, tmp_path):
    keys = {"adapter": None, "lora_r": None, "optimizer": "muon", "learning_rate": 2e-2, "max_steps": 6, "save_steps": 3}
    whole = fresh(config, tmp_path, "muon", **keys)
    assert whole[-1] < whole[0] - 0.1
    path = tmp_path / "muon"
    (path / "adapter").mkdir()  # what rewind clears; a full run's result is model/
    rewind(path, 3)
    assert fresh(config, tmp_path, "muon", **keys) == whole


def test_resume_false_begins_anew_and_keeps_the_old_run_aside(config, tmp_path):
    run(config())
    run(config(resume=False))
    assert losses(tmp_path / "run" / "before-1") == losses(tmp_path / "run")


def test_rows_left_out_are_told_in_the_event_log(config, tmp_path, rows):
    path = tmp_path / "some.jsonl"
    path.write_text(rows.read_text() + '{"messages": []}\n')
    run(config(datasets=[{"path": str(path), "type": "chat_template"}], on_bad_row="skip"))
    (bad,) = [e for e in read_events(tmp_path / "run" / "events.jsonl") if e["event"] == "bad_row"]
    assert bad["line"] == 25
    assert bad["path"].endswith("some.jsonl")


def test_a_large_seed_is_a_seed(config):
    assert run(config(seed=2**40 + 7, max_steps=1)).steps == 1
