"""Completions by a vLLM server: the ids, log-probabilities and versions are right, and whatever is wrong with the server is said.

The server is a fake with the same answers (vllm_fake.py); no real vLLM is run here.
"""

import json
import threading
import time
from contextlib import contextmanager

import pytest
import torch

from ropewalk.cli import main
from ropewalk.config.run import ignored_keys, load_run, parse_run
from ropewalk.config.vllm import by_server, server_url
from ropewalk.engine.request import Sampling
from ropewalk.errors import ConfigError, Overloaded, UpstreamFailed, UpstreamTimedOut, VerificationFailed
from ropewalk.train import vllm_server
from ropewalk.train.prepare import prepare
from ropewalk.train.progress import read_events
from ropewalk.train.pupil import Pupil
from ropewalk.train.trainer import train
from ropewalk.train.vllm_generator import VllmGenerator
from train.test_sharded import alone, same, together
from train.vllm_fake import FakeVllm

WARM = Sampling(temperature=1.0, seed=3)


@contextmanager
def serving(base, **options):
    with FakeVllm(base, **options) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        thread.start()
        try:
            yield server
        finally:
            server.held.set()
            server.shutdown()
            thread.join()


@pytest.fixture
def pupil(config):
    """A model whose adapter says something."""
    prepared = prepare(load_run(config(sample_packing=False)), quiet=True)
    made = Pupil.load(prepared, torch.device("cpu"))
    stir(made, 1)
    prepared.folder.close()
    return made


def stir(pupil, seed):
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, parameter in pupil.adapter.named_parameters().items():
            if name.endswith("lora_B"):
                parameter.normal_(std=0.3)


@contextmanager
def writing(pupil, server, folder, **options):
    made = VllmGenerator(
        pupil, url=server.url, folder=folder, **{"running": 4, "longest": 48, "sampling": WARM, "seconds": 5.0} | options
    )
    try:
        yield made
    finally:
        made.close()


def drained(generator, seconds=20.0):
    """All that comes to its end."""
    found, end = [], time.monotonic() + seconds
    while generator.busy:
        assert time.monotonic() < end
        found += generator.step()
    return found


def here(pupil, prompt, ids, temperature=1.0):
    """log p of the ids behind the prompt, the plain way."""
    with torch.no_grad():
        logits = pupil.model.eval()(input_ids=torch.tensor([[*prompt, *ids]])).logits[0].double() / temperature
    found = logits.log_softmax(-1)
    return [float(found[len(prompt) - 1 + at, token]) for at, token in enumerate(ids)]


def test_what_a_server_writes_has_the_ids_log_probs_and_versions_of_the_adapter_that_wrote_it(pupil, base, tmp_path):
    with serving(base) as server, writing(pupil, server, tmp_path / "vllm") as generator:
        generator.version = 7
        generator.submit("a", [5, 6, 7], samples=3, max_tokens=9, sampling=WARM, stop_ids=[2])
        generator.submit("b", [8, 9], samples=1, max_tokens=4, sampling=WARM, stop_ids=[2])
        found = drained(generator)
        assert sorted((key, sample) for key, sample, _ in found) == [("a", 0), ("a", 1), ("a", 2), ("b", 0)]
        for key, _, got in found:
            assert got.logprobs == pytest.approx(here(pupil, [5, 6, 7] if key == "a" else [8, 9], got.ids), abs=1e-3)
            assert set(got.versions) == {7}
            assert len(got.versions) == len(got.ids)
            assert got.ended == (got.ids[-1] == 2)
        assert len({tuple(got.ids) for key, _, got in found if key == "a"}) == 3
        assert generator.spent.tokens == sum(len(got.ids) for _, _, got in found)
        asked = [body for path, body in server.asked if path == "/v1/completions"]
        assert all(body["stop_token_ids"] == [2] and body["ignore_eos"] for body in asked[1:])
        stir(pupil, 2)
        before = list(server.adapters)
        generator.publish()
        generator.submit("c", [5, 6, 7], samples=1, max_tokens=9, sampling=WARM, stop_ids=[2])
        ((_, _, got),) = drained(generator)
        assert got.logprobs == pytest.approx(here(pupil, [5, 6, 7], got.ids), abs=1e-3)
        assert set(got.versions) == {8}
        assert len(server.adapters) == 1
        assert server.adapters != before
    assert server.adapters == []
    assert list((tmp_path / "vllm").iterdir()) == []


def test_what_is_being_written_when_an_adapter_is_published_ends_under_the_old_one(pupil, base, tmp_path):
    with serving(base) as server, writing(pupil, server, tmp_path) as generator:
        server.held.clear()
        generator.submit("old", [5, 6], samples=1, max_tokens=5, sampling=WARM, stop_ids=[])
        while len(server.asked) < 3:  # an adapter, the comparison, and this
            time.sleep(0.01)
        generator.publish()
        generator.submit("new", [5, 6], samples=1, max_tokens=5, sampling=WARM, stop_ids=[])
        assert len(server.adapters) == 2  # what writes is not taken away
        server.held.set()
        assert {key: set(got.versions) for key, _, got in drained(generator)} == {"old": {0}, "new": {1}}
        generator.publish()
        assert len(server.adapters) == 1


def test_what_is_cancelled_does_not_come(pupil, base, tmp_path):
    with serving(base) as server, writing(pupil, server, tmp_path) as generator:
        server.held.clear()
        generator.submit("gone", [5, 6], samples=2, max_tokens=5, sampling=WARM, stop_ids=[])
        generator.submit("kept", [5, 6], samples=1, max_tokens=5, sampling=WARM, stop_ids=[])
        generator.cancel("gone")
        server.held.set()
        assert [key for key, _, _ in drained(generator)] == ["kept"]


def test_an_overloaded_server_is_asked_again_and_at_last_told(pupil, base, tmp_path, monkeypatch):
    monkeypatch.setattr(vllm_server, "PAUSE_SECONDS", 0.01)
    with serving(base) as server, writing(pupil, server, tmp_path) as generator:
        server.overloaded = 3
        generator.submit("a", [5, 6], samples=1, max_tokens=2, sampling=WARM, stop_ids=[])
        assert len(drained(generator)) == 1
        server.overloaded = 100
        generator.submit("b", [5, 6], samples=1, max_tokens=2, sampling=WARM, stop_ids=[])
        with pytest.raises(Overloaded, match="overloaded, asked 6 times"):
            drained(generator)


def test_a_server_that_is_gone_or_slow_is_said_within_a_bound(pupil, base, tmp_path, monkeypatch):
    monkeypatch.setattr(vllm_server, "PAUSE_SECONDS", 0.01)
    with serving(base) as server:
        url = server.url
        with writing(pupil, server, tmp_path) as generator:
            server.held.clear()
            generator.server.completion_seconds = 0.2
            generator.submit("a", [5, 6], samples=1, max_tokens=2, sampling=WARM, stop_ids=[])
            with pytest.raises(UpstreamTimedOut, match=r"within 0\.2 seconds"):
                drained(generator)
            server.held.set()
            server.well = False
            with pytest.raises(UpstreamTimedOut, match="it answers 503"):
                generator.server.wait_until_well(0.2)
    with pytest.raises(UpstreamTimedOut, match="no vLLM server is well at"):
        VllmGenerator(pupil, url=url, folder=tmp_path, running=1, longest=48, sampling=WARM, seconds=0.2)


def test_a_server_without_adapters_is_told_how_to_start(pupil, base, tmp_path):
    with (
        serving(base, lora=False) as server,
        pytest.raises(ConfigError, match="VLLM_ALLOW_RUNTIME_LORA_UPDATING=True vllm serve"),
    ):
        writing(pupil, server, tmp_path).__enter__()


def test_an_adapter_that_the_server_refuses_is_told_with_its_words(pupil, base, tmp_path, monkeypatch):
    with serving(base) as server:
        monkeypatch.setattr(
            server, "load", lambda *_: (_ for _ in ()).throw(ValueError("LoRA rank 4 is greater than max_lora_rank 2"))
        )
        with pytest.raises(UpstreamFailed, match=r"LoRA rank 4 is greater than max_lora_rank 2.*--max-lora-rank 4"):
            writing(pupil, server, tmp_path).__enter__()


def test_other_weights_and_another_vocabulary_are_found_out(pupil, base, tmp_path):
    with serving(base) as server:
        with torch.no_grad():
            for parameter in server.model.parameters():
                parameter.add_(0.3 * torch.randn_like(parameter))
        with pytest.raises(VerificationFailed, match="it serves other weights than"):
            writing(pupil, server, tmp_path).__enter__()
        assert server.adapters == []
    with serving(base) as server:
        server.wrong = 1000
        with pytest.raises(VerificationFailed, match="this base has 259"):
            writing(pupil, server, tmp_path).__enter__()


def test_log_probs_from_before_the_temperature_are_found_out(pupil, base, tmp_path):
    hot = Sampling(temperature=3.0, seed=1)
    with serving(base) as server, pytest.raises(ConfigError, match="--logprobs-mode processed_logprobs"):
        writing(pupil, server, tmp_path, sampling=hot).__enter__()
    with serving(base, processed=True) as server, writing(pupil, server, tmp_path, sampling=hot) as generator:
        generator.submit("a", [5, 6], samples=1, max_tokens=6, sampling=hot, stop_ids=[])
        ((_, _, got),) = drained(generator)
        assert got.logprobs == pytest.approx(here(pupil, [5, 6], got.ids, 3.0), abs=1e-3)


def test_a_server_for_shorter_texts_is_told_the_length(pupil, base, tmp_path):
    with serving(base, max_model_len=32) as server, pytest.raises(ConfigError, match="--max-model-len 48"):
        writing(pupil, server, tmp_path).__enter__()


def read(**trl):
    lines = [f"  {name}: {value}" for name, value in {"reward_funcs": "[length]", "use_vllm": "true", **trl}.items()]
    head = [
        "base_model: b",
        "learning_rate: 1e-5",
        "rl: grpo",
        "adapter: lora",
        "datasets: [{path: d.jsonl, type: chat_template}]",
    ]
    return parse_run("\n".join([*head, "trl:", *lines]) + "\n")


def test_the_keys_say_where_the_server_is():
    assert server_url(read()) == "http://127.0.0.1:8000"
    assert server_url(read(vllm_server_host="0.0.0.0", vllm_server_port=8001)) == "http://127.0.0.1:8001"
    assert server_url(read(vllm_server_host="gpu-2")) == "http://gpu-2:8000"
    assert by_server(read())
    assert not by_server(read(use_vllm="false"))


def test_in_one_process_the_own_engine_writes_and_that_is_said():
    run = read(vllm_mode="colocate")
    assert not by_server(run)
    assert "needs no vLLM" in ignored_keys(run)["trl.vllm_mode"]
    assert "no server is asked" in ignored_keys(read(use_vllm="false", vllm_server_port=8001))["trl.vllm_server_port"]


@pytest.mark.parametrize(
    ("trl", "words"),
    [
        ({"temperature": 0.7, "top_p": 0.9}, "write temperature: 1"),
        ({"replay_routing": "true"}, "needs the trainer's own engine"),
    ],
)
def test_what_a_server_cannot_do_is_refused(trl, words):
    with pytest.raises(ConfigError, match=words):
        read(**trl)


def test_a_run_by_rewards_is_written_by_the_server_from_the_first_step_to_the_last(config, base, tmp_path):
    with serving(base) as server:
        trl = {
            "use_vllm": True,
            "vllm_server_port": server.server_address[1],
            "reward_funcs": [{"kind": "length", "unit": "characters", "most": 5}],
            "num_generations": 2,
            "generation_batch_size": 4,
            "max_completion_length": 6,
        }
        keys = {"rl": "grpo", "trl": trl, "max_steps": 2, "sample_packing": False, "learning_rate": 1e-3}
        train(load_run(config(**keys)), quiet=True)
        told = [event for event in read_events(tmp_path / "run" / "events.jsonl") if event["event"] == "step"]
        written = [body for path, body in server.asked if path == "/v1/completions"]
        loaded = [body["lora_name"] for path, body in server.asked if path == "/v1/load_lora_adapter"]
    assert len(told) == 2
    assert all(event["mismatch"] < 1e-3 for event in told)  # the server has the adapter that learns
    assert len(loaded) >= 2
    assert len(written) == 1 + 2 * 4  # the comparison, and four completions a step
    assert {body["model"] for body in written[1:5]} == {loaded[0]}
    assert {body["model"] for body in written[5:]} == {loaded[1]}
    assert server.adapters == []


LATE = """
def late(completion, completion_ids):
    return sum(id > 130 for id in completion_ids) / 6
"""


def test_sharded_trainers_give_the_server_the_gathered_adapter_and_learn_as_one_does(config, base, tmp_path):
    (tmp_path / "rewards.py").write_text(LATE)
    with serving(base) as server:
        trl = {
            "use_vllm": True,
            "vllm_server_port": server.server_address[1],
            "reward_funcs": [f"{tmp_path}/rewards.py:late"],
            "num_generations": 2,
            "generation_batch_size": 6,  # of three prompts two are the first process's, which makes more passes than the other
            "max_completion_length": 6,
            "beta": 0.05,
        }
        keys = {"rl": "grpo", "trl": trl, "max_steps": 2, "sample_packing": False, "micro_batch_size": 1}
        alone(config(output_dir=str(tmp_path / "one"), **keys))
        before = len(server.asked)
        path = config(output_dir=str(tmp_path / "two"), fsdp_version=2, ddp_timeout=60, **keys)
        assert together(path, tmp_path) == ([0, 0], ["", ""])
        loaded = [body["lora_name"] for path, body in server.asked[before:] if path == "/v1/load_lora_adapter"]
        assert server.adapters == []
    names = ("reward", "loss", "gradient_norm", "kl", "length", "mismatch")
    one, two = (
        [[e[name] for name in names] for e in read_events(tmp_path / folder / "events.jsonl") if e["event"] == "step"]
        for folder in ("one", "two")
    )
    assert len(two) == 2
    assert all(step[2] > 0 for step in one)
    assert [value for step in two for value in step] == pytest.approx(
        [value for step in one for value in step], rel=1e-3, abs=1e-5
    )
    assert len(set(loaded)) == len(loaded) >= 2
    same(tmp_path / "one", tmp_path / "two", rtol=1e-2, atol=1e-5)


WORLD = """
class Twice:
    def reset(self, row):
        if "0 plus" in row["messages"][0]["content"]:
            raise ValueError("no world")
        self.turns = 0
        return row["messages"][:1]

    def step(self, reply):
        from ropewalk.train.environment import Step

        self.turns += 1
        return Step([{"role": "user", "content": "again"}], 0.25, done=self.turns == 2)
"""


def test_rewards_are_tried_on_episodes_that_the_server_writes_with_the_runs_adapter(config, pupil, base, tmp_path, capsys):
    (tmp_path / "world.py").write_text(WORLD)
    pupil.adapter.save(tmp_path / "begun")
    with serving(base, max_model_len=256) as server:
        trl = {
            "use_vllm": True,
            "vllm_server_port": server.server_address[1],
            "environment": f"{tmp_path}/world.py:Twice",
            "reward_funcs": [{"kind": "length", "unit": "characters", "most": 5, "weight": 2}],
            "num_generations": 2,
            "max_completion_length": 5,
        }
        keys = {"rl": "grpo", "sample_packing": False, "sequence_len": 256, "lora_model_dir": str(tmp_path / "begun")}
        assert main(["rewards", "check", str(config(trl=trl, **keys)), "--prompts", "12", "--json"]) == 0
        written = [body for path, body in server.asked if path == "/v1/completions"]
        assert server.adapters == []
    report = json.loads((said := capsys.readouterr()).out)
    assert "world.py:Twice" in said.err
    world, length = report["rewards"]
    failed = world["failed"]
    assert 0 < failed < report["samples"] == 24
    assert len(written) == 2 * (24 - failed)  # two turns of every other
    assert {body["model"][:15] for body in written} == {"ropewalk-check-"}
    assert len({body["seed"] for body in written}) == len(written)
    assert report["replies"] == pytest.approx(len(written) / 24)
    assert (world["name"], world["mean"], world["scored"]) == ("Twice", 0.5, 24 - failed)
    assert "ValueError: no world" in world["error"]
    assert f"Twice failed on {failed} of 24 completions" in report["warnings"]
    assert length["weight"] == 2
    assert report["total"]["scored"] == 24
