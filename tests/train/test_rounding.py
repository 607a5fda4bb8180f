"""Training for quantisation: what is told while training is what a result that is rounded afterwards gives."""

import json
import shutil

import pytest
import torch

from ropewalk.config.run import load_run, parse_run
from ropewalk.errors import ConfigError, ModelError
from ropewalk.kernels.fake_quant import WEIGHTS
from ropewalk.models.load import load_base
from ropewalk.train.progress import read_events
from ropewalk.train.trainer import train


@pytest.fixture(scope="session")
def dense(base, tmp_path_factory):
    """A dense model with the tokenizer of the mixture."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    folder = tmp_path_factory.mktemp("dense") / "base"
    shutil.copytree(base, folder, ignore=shutil.ignore_patterns("*.safetensors", "config.json", "generation_config.json"))
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16}
    torch.manual_seed(0)
    tokens = {"vocab_size": 259, "pad_token_id": 0, "eos_token_id": 2, "bos_token_id": None, "max_position_embeddings": 256}
    Qwen3ForCausalLM(Qwen3Config(**sizes, **tokens, intermediate_size=64)).save_pretrained(folder)
    return folder


@pytest.fixture
def whole(config, dense, tmp_path):
    """Trains every weight and gives the events of a kind."""

    def run(name, event="eval", **keys):
        path = config(
            **{
                "base_model": str(dense),
                "output_dir": str(tmp_path / name),
                "adapter": None,
                "lora_r": None,
                "max_steps": 12,
                "val_set_size": 8,
                "eval_steps": 6,
                "learning_rate": 5e-3,
                **keys,
            }
        )
        train(load_run(path), quiet=True)
        return [e["loss"] for e in read_events(tmp_path / name / "events.jsonl") if e["event"] == event]

    return run


def rounded(folder, kind):
    """The result with its linear layers rounded for good, as a checkpoint."""
    model = load_base(folder / "model", dtype="float32", device="cpu")
    with torch.no_grad():
        for name, module in model.named_modules():
            if isinstance(module, torch.nn.Linear) and name != "lm_head":
                module.weight.copy_(WEIGHTS[kind](module.weight, 16))
    model.save_pretrained(folder / "rounded")
    for file in (folder / "model").iterdir():
        if not (folder / "rounded" / file.name).exists():
            shutil.copy(file, folder / "rounded")
    return folder / "rounded"


@pytest.mark.parametrize(
    "keys", [{"qat": {"weight_dtype": "int4", "group_size": 16}}, {"use_onebitllms": True}], ids=["int4", "ternary"]
)
def test_a_result_that_is_rounded_afterwards_has_the_loss_that_was_told(whole, tmp_path, keys):
    kind = "ternary" if "use_onebitllms" in keys else "int4"
    told = whole("rounding", **keys)
    assert told[-1] < told[0]
    tries = {"max_steps": 1, "learning_rate": 1e-12}
    plain = whole("plain", base_model=str(tmp_path / "rounding" / "model"), **tries)[-1]
    found = whole("again", base_model=str(rounded(tmp_path / "rounding", kind)), **tries)[-1]
    # beside ternary weights the inputs were rounded too, to 8 bits
    assert found == pytest.approx(told[-1], rel=1e-4 if kind == "int4" else 2e-3)
    assert abs(plain - told[-1]) > 4 * abs(found - told[-1])


@pytest.mark.parametrize("kind", ["int8", "float8", "nvfp4", "mxfp4"])
def test_inputs_are_rounded_too_and_only_from_the_step_that_is_named(whole, kind):
    blocks = {"nvfp4": 16, "mxfp4": 32}.get(kind, 16)
    qat = {"weight_dtype": "int4" if kind == "int8" else kind, "activation_dtype": kind, "group_size": blocks}
    plain = whole("plain", "step", max_steps=4)
    late = whole("late", "step", max_steps=4, qat=qat | {"fake_quant_after_n_steps": 2})
    first = whole("first", "step", max_steps=4, qat=qat)
    weights = whole("weights", "step", max_steps=4, qat=qat | {"activation_dtype": None})
    assert late[:2] == plain[:2]
    assert late[2] != plain[2]
    assert first[0] != plain[0]
    assert weights[0] != first[0]


def test_a_layer_that_the_blocks_do_not_fit_and_a_mixture_are_refused(whole, base):
    with pytest.raises(ModelError, match=r"q_proj has 32 inputs, which are no whole number of blocks of 24"):
        whole("uneven", qat={"weight_dtype": "int4", "group_size": 24})
    with pytest.raises(ModelError, match="experts are stacks"):
        whole("mixture", base_model=str(base), qat={"weight_dtype": "int4", "group_size": 16})


BASE = "base_model: b\nlearning_rate: 1e-4\ndatasets: [{path: rows.jsonl, type: chat_template}]\n"


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"qat": {"weight_dtype": "int4"}, "adapter": "lora"}, "qat trains every weight; remove adapter"),
        ({"qat": {"weight_dtype": "nvfp4", "group_size": 32}}, "nvfp4 has blocks of 16"),
        ({"qat": {"weight_dtype": "int4", "quantize_embedding": True}}, "embeddings are not rounded here"),
        ({"qat": {"weight_dtype": "int4"}, "use_onebitllms": True}, "exclude each other"),
        ({"qat": {"weight_dtype": "int3"}}, "int4, int8, float8, nvfp4, mxfp4"),
    ],
)
def test_what_cannot_go_together_is_told(keys, words):
    with pytest.raises(ConfigError, match=words):
        parse_run(BASE + "".join(f"{name}: {json.dumps(value)}\n" for name, value in keys.items()))
