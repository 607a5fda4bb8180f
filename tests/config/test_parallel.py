"""The keys of several processes: what shards, what is told to be needless, and what is refused with another way."""

import pytest

from ropewalk.config.run import Run, ignored_keys, parse_run
from ropewalk.errors import ConfigError

BASE = "base_model: b\nlearning_rate: 1.0e-4\nadapter: lora\ndatasets: [{path: rows.jsonl, type: alpaca}]\n"


def run_of(more: str) -> Run:
    return parse_run(BASE + more)


@pytest.mark.parametrize(
    "more",
    [
        "fsdp_version: 2\n",
        "fsdp_version: 1\n",
        "fsdp: [full_shard, auto_wrap]\n",
        "fsdp: full_shard auto_wrap\n",
        "dp_shard_size: 2\n",
        "deepspeed: deepspeed_configs/zero3.json\n",
        "deepspeed: {zero_optimization: {stage: 1}}\n",
        "expert_parallel_size: 4\n",
        "fsdp_config: {fsdp_version: 2}\n",
        "fsdp_config: {fsdp_sharding_strategy: FULL_SHARD, offload_params: false}\n",
    ],
)
def test_any_of_axolotls_switches_shards(more: str) -> None:
    assert run_of(more).sharded


@pytest.mark.parametrize(
    "more",
    ["", "fsdp_version:\n", "fsdp: []\n", "fsdp_config: {}\n", "dp_shard_size: 1\n", "deepspeed: false\n", "ddp: true\n"],
)
def test_what_is_switched_off_shards_nothing(more: str) -> None:
    assert not run_of(more).sharded


def test_the_older_strategies_are_read() -> None:
    assert run_of("fsdp_version: 2\n").reshards
    assert not run_of("fsdp_config: {sharding_strategy: shard_grad_op}\n").reshards
    assert not run_of("fsdp_config: {reshard_after_forward: false}\n").reshards
    assert not run_of("fsdp: full_shard\nfsdp_config: {fsdp_sharding_strategy: NO_SHARD}\n").sharded
    assert run_of("fsdp_config: {activation_checkpointing: true}\n").recompute == "layer"


def test_keys_of_the_block_that_are_not_needed_are_told() -> None:
    run = run_of("fsdp_version: 1\nfsdp_config: {fsdp_state_dict_type: SHARDED_STATE_DICT, transformer_layer_cls_to_wrap: X}\n")
    told = ignored_keys(run)
    assert told["fsdp_config.state_dict_type"] == "the adapter and every checkpoint are written whole"
    assert "layer" in told["fsdp_config.transformer_layer_cls_to_wrap"]
    assert "FSDP2 does what they ask for" in told["fsdp_version"]


def test_adamw_of_few_bits_keeps_32_over_sharded_weights_and_says_so() -> None:
    run = run_of("fsdp_version: 2\noptimizer: adamw_bnb_8bit\n")
    assert run.moved_by == "adamw_torch_fused"
    assert "32 bits" in ignored_keys(run)["optimizer"]
    alone = run_of("optimizer: adamw_bnb_8bit\n")
    assert alone.moved_by == "adamw_bnb_8bit"
    assert "optimizer" not in ignored_keys(alone)


def test_a_misspelt_key_of_the_block_is_found() -> None:
    with pytest.raises(ConfigError, match="unknown key 'reshard_after_forwad'; did you mean 'reshard_after_forward'"):
        run_of("fsdp_config: {reshard_after_forwad: true}\n")


def test_by_rewards_weights_are_sharded_where_a_server_writes() -> None:
    asked = "fsdp_version: 2\nrl: grpo\ntrl: {reward_funcs: [length], use_vllm: true}\n"
    assert run_of(asked).sharded
    with pytest.raises(ConfigError, match="or have a vLLM server write them"):
        run_of(asked.replace("use_vllm: true", "use_vllm: false"))


@pytest.mark.parametrize(
    ("more", "way_out"),
    [
        ("context_parallel_size: 2\n", "gradient_checkpointing: offload"),
        ("sequence_parallel_degree: 4\n", "or fsdp_version: 2"),
        ("tensor_parallel_size: 2\n", "fsdp_version: 2 shards the same weights"),
        ("deepspeed: zero3.json\noptimizer: muon\n", "deepspeed gives each process a part"),
        ("kd_trainer: true\n", "train on text that the teacher wrote"),
        ("plugins: [axolotl.integrations.kd.KDPlugin]\n", "train on text that the teacher wrote"),
        ("fsdp_version: 2\ndp_replicate_size: 2\n", "shard over all of them"),
        ("fsdp_config: {sharding_strategy: HYBRID_SHARD}\n", "shard over all of them"),
        ("fsdp_version: 2\noptimizer: muon\n", "adamw_torch_fused"),
        ("fsdp_version: 2\nrl: grpo\ntrl: {reward_funcs: [{kind: numeric}]}\n", "adapter: qlora"),
        ("fsdp_version: 3\n", "one of 1, 2"),
    ],
)
def test_what_is_not_done_is_refused_with_another_way(more: str, way_out: str) -> None:
    with pytest.raises(ConfigError) as caught:
        run_of(more)
    assert way_out in str(caught.value)
