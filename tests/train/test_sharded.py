"""Two processes train as one does, with the whole model in each or with a part of it, and what is saved is whole."""

import json
import multiprocessing
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from ropewalk.config.run import load_run
from ropewalk.errors import RopewalkError
from ropewalk.models.load import load_base
from ropewalk.models.quantized import Share
from ropewalk.train.progress import read_events
from ropewalk.train.survey import survey
from ropewalk.train.trainer import train

KEYS = {"max_steps": None, "num_epochs": 1, "sample_packing": False, "micro_batch_size": 4, "val_set_size": 4}
# 20 rows are 5 batches, 3 steps of two: in the last one, and in every evaluation, the second process has nothing of its own.
STEPS = 3


def losses(folder, event="step"):
    return [e["loss"] for e in read_events(folder / "events.jsonl") if e["event"] == event]


def alone(path, work=None):
    """One process trains."""
    train(load_run(path), quiet=True)


def _child(work, rank, size, port, path, home):
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size), "ROPEWALK_HOME": home}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "GLOO_SOCKET_IFNAME": "lo"}
    torch.set_num_threads(1)
    try:
        work(path)
    except RopewalkError as error:
        Path(f"{path}.{rank}.error").write_text(str(error))
        sys.exit(1)


def together(path, tmp_path, work=alone, size=2, while_running=None):
    """As many processes do it; the exit code of each, and what they failed with."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["ropewalk.train.trainer"])
    home = str(tmp_path / "home")
    children = [context.Process(target=_child, args=(work, rank, size, port, path, home)) for rank in range(size)]
    for child in children:
        child.start()
    if while_running is not None:
        while_running(children)
    for child in children:
        child.join(timeout=60)
        if child.is_alive():
            child.kill()
            pytest.fail("a process that waits for another does not end")
    said = [Path(f"{path}.{rank}.error") for rank in range(size)]
    return [child.exitcode for child in children], [file.read_text() if file.exists() else "" for file in said]


@pytest.fixture
def both(config, tmp_path):
    """Trains with one process and, sharded, with two; gives the folders of both."""

    def run(**keys):
        keys = KEYS | keys
        alone(config(output_dir=str(tmp_path / "one"), gradient_accumulation_steps=2, **keys))
        codes = together(config(**{"output_dir": str(tmp_path / "two"), "fsdp_version": 2, "ddp_timeout": 60} | keys), tmp_path)
        assert codes == ([0, 0], ["", ""])
        return tmp_path / "one", tmp_path / "two"

    return run


@pytest.fixture(scope="module")
def dense(tmp_path_factory, base):
    """A Llama of 3 layers whose output head is its embedding."""
    folder = tmp_path_factory.mktemp("dense")
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(base / name, folder / name)
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16}
    tokens = {"vocab_size": 259, "pad_token_id": 0, "eos_token_id": 2, "bos_token_id": None, "max_position_embeddings": 256}
    LlamaForCausalLM(LlamaConfig(**sizes, **tokens, intermediate_size=48, tie_word_embeddings=True)).save_pretrained(folder)
    return folder


def same(one, two, name="adapter/adapter_model.safetensors", **near):
    """The weights of both are close."""
    first, second = load_file(one / name), load_file(two / name)
    assert first.keys() == second.keys()
    for key, tensor in first.items():
        torch.testing.assert_close(second[key], tensor, **near)
    return second


def test_two_processes_train_a_mixture_as_one_does_and_save_the_whole_adapter(both, base, tmp_path):
    one, two = both(gradient_checkpointing=True)
    assert len(losses(one)) == STEPS
    assert losses(two) == pytest.approx(losses(one), rel=1e-5)
    assert losses(two, "eval") == pytest.approx(losses(one, "eval"), rel=1e-5)
    saved = same(one, two, rtol=1e-3, atol=1e-5)
    experts = 4
    for key, tensor in saved.items():
        if ".experts." in key and "lora_B" in key:  # [out, r * E], the expert fastest: both processes' rows of it
            assert tensor.view(tensor.shape[0], -1, experts).abs().sum((0, 1)).min() > 0, key
    assert any(".experts." in key for key in saved)

    from peft import PeftModel

    ids = torch.arange(3, 40)[None]
    answers = [
        PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), str(folder / "adapter"))(input_ids=ids).logits
        for folder in (one, two)
    ]
    torch.testing.assert_close(answers[1], answers[0], rtol=1e-3, atol=1e-4)


def test_two_processes_that_hold_everything_train_as_one_does(both):
    one, two = both(fsdp_version=None)
    assert losses(two) == pytest.approx(losses(one), rel=1e-5)
    assert losses(two, "eval") == pytest.approx(losses(one, "eval"), rel=1e-5)
    same(one, two, rtol=1e-3, atol=1e-5)


def test_a_sharded_run_goes_on_with_another_number_of_processes(both, config, tmp_path):
    one, two = both(save_steps=1, save_total_limit=9)
    for step in (2, 3):
        shutil.rmtree(two / "checkpoints" / f"step-{step:08d}")
    shutil.rmtree(two / "adapter")
    record = json.loads((two / "run.json").read_text())
    assert record["processes"] == 2
    (two / "run.json").write_text(json.dumps(record | {"state": "training"}))
    alone(config(output_dir=str(two), fsdp_version=2, save_steps=1, save_total_limit=9, **KEYS))
    assert losses(two) == pytest.approx(losses(one), rel=1e-5)
    same(one, two, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("more", [{"save_steps": 2}, {"qat": {"weight_dtype": "int8", "group_size": 16}}], ids=["plain", "qat"])
def test_every_weight_of_a_dense_model_is_trained_in_parts_and_saved_whole(both, dense, more):
    one, two = both(base_model=str(dense), adapter=None, lora_r=None, learning_rate=1e-3, weight_decay=0.1, **more)
    assert losses(two) == pytest.approx(losses(one), rel=1e-5)
    same(one, two, "model/model.safetensors", rtol=1e-3, atol=1e-5)
    assert json.loads((two / "model" / "config.json").read_text())["architectures"] == ["LlamaForCausalLM"]
    AutoModelForCausalLM.from_pretrained(two / "model")


def test_a_base_of_four_bits_is_sharded_too_with_what_it_computes_in_16(both, dense):
    one, two = both(base_model=str(dense), adapter="qlora", bf16=True, fsdp_config={"reshard_after_forward": False})
    assert losses(two) == pytest.approx(losses(one), rel=2e-3)
    assert losses(two) != losses(one)[:1] * STEPS


def test_the_plan_knows_what_each_process_will_hold(config, base):
    alone_, shared = (survey(base, load_run(config(**keys))).memory for keys in ({}, {"dp_shard_size": 2}))
    assert shared["optimizer"] * 2 == alone_["optimizer"]
    assert shared["adapter"] * 2 == alone_["adapter"]
    # half of everything, and the layers that are gathered: of two, both
    assert shared["weights"] == pytest.approx(1.5 * alone_["weights"], rel=1e-2)


@pytest.mark.parametrize("method", ["dpo", "kto"])
def test_preferences_are_learnt_from_in_parts(both, tmp_path, dense, method):
    rows = [{"prompt": f"{a}?", "chosen": str(a), "rejected": f"it is {a}"} for a in range(24)]
    if method == "kto":
        rows = [
            {"prompt": r["prompt"], "completion": r[k], "label": k == "chosen"} for r in rows for k in ("chosen", "rejected")
        ]
        rows = rows[:24]
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    one, two = both(rl=method, base_model=str(dense), datasets=[{"path": str(path), "type": "chat_template"}])
    assert len(losses(two)) >= 2
    assert losses(two) == pytest.approx(losses(one), rel=1e-4)
    told = [[e for e in read_events(f / "events.jsonl") if e["event"] == "step"][-1] for f in (one, two)]
    assert told[1]["rewards/margins" if method == "dpo" else "rewards/chosen"] == pytest.approx(
        told[0]["rewards/margins" if method == "dpo" else "rewards/chosen"], rel=1e-3, abs=1e-5
    )


def _hold(path):
    """Each process says how many bytes it holds of weights, of all, and whether a folder that lacks a part is noticed."""
    from ropewalk.errors import VerificationFailed
    from ropewalk.models.adapter_folder import WEIGHTS, verify_parts
    from ropewalk.models.lora import LoraSpec, attach
    from ropewalk.models.sharded import digests, fill, local, shard, whole
    from ropewalk.train.distributed import join_world

    config = json.loads(Path(path).read_text())
    with join_world(torch.device("cpu"), 60) as world:
        shares = []
        for quantize in (None, "nf4"):
            model = load_base(config["base"], device="cpu", quantize=quantize, on_host=True)
            adapter = attach(model, LoraSpec(r=4), seed=0)
            held = sum(p.nbytes for p in model.parameters()) + sum(
                b.nbytes for n, b in model.named_buffers() if n.endswith(("codes", "scales", "offsets"))
            )
            shard(model, torch.device("cpu"))
            shares.append(sum(local(p).nbytes for p in model.parameters()) / held)
        named = adapter.named_parameters()
        adapter.put = fill
        for parameter in named.values():
            local(parameter).fill_(1.0 + world.rank)
        found, told = {n: whole(p) for n, p in named.items()}, digests(named)
        if world.leads:
            folder = Path(config["folder"])
            adapter.gathered = found
            adapter.save(folder)
            verify_parts(adapter, folder, told)
        world.wait()
        for parameter in named.values():
            local(parameter).zero_()
        adapter.load(Path(config["folder"]))
        assert all(bool((local(parameter) == 1.0 + world.rank).all()) for parameter in named.values())
        world.wait()
        if world.leads:
            tensors = load_file(folder / WEIGHTS)
            key = next(k for k in tensors if "q_proj.lora_B" in k)
            tensors[key][len(tensors[key]) // 2 :] = 0  # what the second process has trained
            save_file(tensors, folder / WEIGHTS)
            found[key.removeprefix("base_model.model.").removesuffix(".weight")] = tensors[key]
            try:
                verify_parts(adapter, folder, told)
            except VerificationFailed as error:
                config["noticed"] = str(error)
            Path(f"{path}.told").write_text(json.dumps(config | {"shares": shares}))
        world.wait()


def test_each_process_holds_half_and_an_adapter_that_lacks_a_half_is_noticed(base, tmp_path):
    path = tmp_path / "hold.json"
    path.write_text(json.dumps({"base": str(base), "folder": str(tmp_path / "adapter")}))
    assert together(path, tmp_path, _hold) == ([0, 0], ["", ""])
    told = json.loads(Path(f"{path}.told").read_text())
    assert told["noticed"].endswith("q_proj.lora_B.weight lacks what process 1 has trained of it")
    for share in told["shares"]:  # whatever has one row only is not halved
        assert 0.49 < share < 0.56


@pytest.mark.parametrize("quantize", [None, "nf4"])
def test_a_process_reads_no_more_than_its_part_of_a_layers_weights(base, quantize):
    name = "model.layers.0.mlp.experts.down_proj" + (".codes" if quantize else "")
    torch.use_deterministic_algorithms(True)  # what is made and not written is filled: with not-a-numbers, or the highest code
    try:
        shares = [load_base(base, device="cpu", quantize=quantize, on_host=True, share=Share(rank, 2)) for rank in (0, 1)]
    finally:
        torch.use_deterministic_algorithms(False)
    held = [model.get_parameter(name) if quantize is None else model.get_buffer(name) for model in shares]
    whole = load_base(base, device="cpu", quantize=quantize)
    wanted = whole.get_parameter(name) if quantize is None else whole.get_buffer(name)
    assert torch.equal(torch.cat([held[0][:2], held[1][2:]]), wanted)
    for rest in (held[0][2:], held[1][:2]):
        assert bool((rest == 255).all() if quantize else rest.isnan().all())


# In a process of its own: one that has trained keeps what it frees, and takes nothing new from the system.
KEEP_A_PART = """
import os, pathlib, torch
from ropewalk.models.quantized import Share

def resident():
    return int(pathlib.Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

weight = torch.ones(4, 1 << 22)  # 64 MiB
before = resident()
kept = Share(1, 2).of(weight)
print(resident() - before)
assert kept.shape == weight.shape
assert torch.equal(kept[2:], weight[2:])
"""


def test_the_part_that_is_not_kept_takes_no_memory():
    done = subprocess.run([sys.executable, "-c", KEEP_A_PART], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert 30 << 20 < int(done.stdout) < 40 << 20


def test_a_process_whose_partner_dies_ends_and_says_so(config, tmp_path):
    path = config(fsdp_version=2, ddp_timeout=20, output_dir=str(tmp_path / "run"), **KEYS | {"num_epochs": 500})

    def kill(children):
        while not (tmp_path / "run" / "events.jsonl").exists() or not losses(tmp_path / "run"):
            assert all(child.is_alive() for child in children)
            time.sleep(0.05)
        os.kill(children[1].pid, signal.SIGKILL)

    codes, said = together(path, tmp_path, while_running=kill)
    assert codes == [1, -signal.SIGKILL]
    assert said[0].startswith("process 0 of 2 lost another one")


def test_torchrun_starts_the_processes(config, tmp_path):
    path = config(fsdp_version=2, **KEYS | {"num_epochs": None, "max_steps": 1, "val_set_size": 0})
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    env = os.environ | {"GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, "-m", "ropewalk", "train", str(path)], capture_output=True, text=True, env=env, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "sharded over 2 processes: " in done.stderr
    assert done.stderr.count("loading ") == 1
    assert (tmp_path / "run" / "adapter" / "adapter_model.safetensors").exists()
