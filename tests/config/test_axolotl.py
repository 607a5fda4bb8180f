"""Every key of Axolotl's has an effect, or an answer of one line."""

from __future__ import annotations

import pytest

from ropewalk.config import axolotl
from ropewalk.config.faults import names_of
from ropewalk.config.run import Run, ignored_keys, parse_run
from ropewalk.errors import ConfigError

BASE = "base_model: b\nlearning_rate: 1e-4\ndatasets:\n  - path: rows.jsonl\n    type: alpaca\n"


def test_no_key_has_two_answers() -> None:
    ours = set(names_of(Run))
    assert not set(axolotl.IGNORED) & set(axolotl.REFUSED)
    assert not ours & axolotl.KEYS
    assert not ours & set(axolotl.MEANT)
    assert set(axolotl.MEANT.values()) <= ours


def test_every_answer_is_one_line() -> None:
    for reason in [*axolotl.IGNORED.values(), *axolotl.REFUSED.values(), *axolotl.SOURCE_KEYS.values()]:
        assert "\n" not in reason
        assert 10 < len(reason) < 160, reason


def test_keys_that_are_not_needed_are_listed_with_the_reason() -> None:
    run = parse_run(
        BASE + "adapter: lora\nliger_rope: true\nddp_find_unused_parameters: true\nfsdp_config: {fsdp_use_orig_params: true}\n"
    )
    assert set(ignored_keys(run)) == {"liger_rope", "ddp_find_unused_parameters", "fsdp_config.use_orig_params"}
    assert run.sharded


def test_keys_of_ours_without_effect_in_this_combination_are_listed_too() -> None:
    run = parse_run(BASE + "adapter: lora\nunfrozen_parameters: ['^lm_head']\nexperts_implementation: eager\n")
    assert set(ignored_keys(run)) == {"unfrozen_parameters", "experts_implementation"}


@pytest.mark.parametrize(
    ("more", "way_out"),
    [
        ("rl: ebft\n", "key 'rl': energy-based fine-tuning is not supported"),
        ("adapter: lora\nrl: dpo\ndpo_norm_loss: true\n", "this form of DPO is not supported"),
        ("rl: grpo\ntrl: {num_generations: 4}\n", "rl: grpo needs a reward; add trl.reward_funcs"),
        ("image_size: 512\n", "as the base's own processor shows them"),
        ("qat: {weight_dtype: int4, quantize_embedding: true}\n", "embeddings are not rounded here; remove it"),
        ("gptq: true\n", "name the original checkpoint"),
        ("relora: true\njagged_restart_steps: 5\n", "keys 'relora', 'jagged_restart_steps': ReLoRA is not supported"),
        ("adapter: lora\nreinit_weights: true\n", "an adapter over random weights learns nothing"),
        ("plugins: [my.own.Plugin]\n", "the plugin 'Plugin' is not known"),
        ("plugins: [axolotl.integrations.diffusion.DiffusionPlugin]\n", "diffusion language models"),
        ("bnb_config_kwargs: {bnb_4bit_quant_type: fp4}\n", "not fp4"),
        ("model_quantization_config: FineGrainedFP8Config\n", "name a plain checkpoint"),
        ("torch_dtype: bfloat16\n", "write bf16: true"),
        ("quantization: {weight_dtype: int4}\n", "`ropewalk merge`, and quantise the merged checkpoint with"),
        ("llmcompressor: {recipe: r}\n", "compress the merged checkpoint with llm-compressor"),
        ("plugins: [axolotl.integrations.llm_compressor.LLMCompressorPlugin]\n", "compress the merged checkpoint with"),
        (
            "    logprobs_field: l\n",
            "datasets.0.logprobs_field': a teacher's probabilities are not learnt from; leave this out",
        ),
        ("    temperature: 2\n", "train on the text that the teacher wrote"),
    ],
)
def test_what_would_change_the_run_is_refused_with_a_way_out(more: str, way_out: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_run(BASE + more)
    assert way_out in str(caught.value)


def test_refused_keys_that_are_switched_off_ask_for_nothing() -> None:
    run = parse_run(BASE + "rl:\nfp8: false\nreward_model: false\nqat: {}\ntensor_parallel_size: 1\nprocessor_type: ''\n")
    assert ignored_keys(run) == {}


def test_a_method_that_is_refused_explains_the_keys_of_its_data() -> None:
    with pytest.raises(ConfigError) as caught:
        parse_run(BASE + "rl: ebft\n", ["datasets.0.prompt_format=x"])
    assert "prompt_format" not in str(caught.value)
    with pytest.raises(ConfigError, match=r"key 'datasets\.0\.prompt_format': this belongs into the mapping of type"):
        parse_run(BASE, ["datasets.0.prompt_format=x"])


def test_misspelt_keys_inside_blocks_that_are_not_needed_are_still_errors() -> None:
    with pytest.raises(ConfigError, match="unknown key 'use_rentrant'; did you mean 'use_reentrant'"):
        parse_run(BASE + "gradient_checkpointing_kwargs: {use_rentrant: false}\n")
    parse_run(BASE + "fsdp_config: {fsdp_sharding_strategy: FULL_SHARD, offload_params: false}\n")


@pytest.mark.parametrize(
    ("key", "meant"),
    [
        ("context_parapllel_size", "context_parallel_size"),
        ("eta_min", "cosine_min_lr_ratio"),
        ("adam_eps", "adam_epsilon"),
        ("lora_target_linear_modules", "lora_target_modules"),
        ("learning_rat", "learning_rate"),
    ],
)
def test_misspelt_keys_seen_in_real_configurations_are_found(key: str, meant: str) -> None:
    with pytest.raises(ConfigError, match=f"unknown key '{key}'; did you mean '{meant}'"):
        parse_run(BASE + f"{key}: 1\n")


def test_a_file_that_is_no_training_is_told_so() -> None:
    with pytest.raises(ConfigError, match="no configuration of a training: it names no base_model"):
        parse_run("provider: x\ngpu: h100\nsecrets: [A]\n")
