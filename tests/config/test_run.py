"""One YAML becomes one frozen Run; whatever is wrong is said with key, line and way out."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pydantic
import pytest

from ropewalk.config.reference import reference_page, schema
from ropewalk.config.run import Run, as_yaml, ignored_keys, load_run, parse_run
from ropewalk.errors import ConfigError

BASE = """\
base_model: runs/tiny
datasets:
  - path: rows.jsonl
    type: chat_template
learning_rate: 1e-4
"""
PAGE = Path(__file__).parents[2] / "docs" / "config.md"


def run_of(more: str = "", *overrides: str) -> Run:
    return parse_run(BASE + more, overrides)


def message(more: str = "", *overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        run_of(more, *overrides)
    assert caught.value.exit_code == 2
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_misspelt_key_names_its_line_and_the_nearest_key(tmp_path: Path) -> None:
    path = tmp_path / "run.yml"
    path.write_text(BASE + "sample_pakcing: true\n")
    with pytest.raises(ConfigError) as caught:
        load_run(path)
    assert str(caught.value) == f"{path}:6: unknown key 'sample_pakcing'; did you mean 'sample_packing'?"
    assert caught.value.line == 6


def test_the_command_line_ends_with_that_message_and_code_2(tmp_path: Path) -> None:
    path = tmp_path / "run.yml"
    path.write_text(BASE + "sample_pakcing: true\n")
    done = subprocess.run([sys.executable, "-m", "ropewalk", "train", str(path)], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    last = done.stderr.strip().splitlines()[-1]
    assert f"{path}:6" in last
    assert "sample_pakcing" in last
    assert "sample_packing" in last


def test_reading_a_configuration_imports_neither_torch_nor_transformers(tmp_path: Path) -> None:
    path = tmp_path / "run.yml"
    path.write_text(BASE)
    code = (
        "import sys; from ropewalk.config.run import load_run; load_run(sys.argv[1]); "
        "assert not {'torch', 'transformers', 'numpy'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code, str(path)], check=True)


def test_every_problem_is_told_at_once_in_the_order_of_the_file() -> None:
    text = message("sample_pakcing: true\nlr_scheduler: constnat\nlora_r: fast\nmicro_batch_size: true\nfp8: true\n")
    parts = [
        "unknown key 'sample_pakcing'",
        "line 7: key 'lr_scheduler': 'constnat' is not one of cosine",
        "(did you mean 'constant'?)",
        "line 8: key 'lora_r': 'fast' is not a whole number",
        "line 9: key 'micro_batch_size': True is not a number",
        "line 10: key 'fp8': FP8 compute is not supported yet",
    ]
    places = [text.index(part) for part in parts]
    assert places == sorted(places)


def test_unknown_keys_inside_blocks_are_found() -> None:
    data = "base_model: b\nlearning_rate: 1\ndatasets:\n  - path: x\n    feild_messages: m\n"
    with pytest.raises(ConfigError, match="unknown key 'feild_messages'; did you mean 'field_messages'"):
        parse_run(data)
    assert "did you mean 'pad_token'?" in message("special_tokens:\n  pad_tokn: <pad>\n")
    assert "did you mean 'reshard_after_forward'?" in message("fsdp_config:\n  reshard_after_forwad: true\n")
    assert "unknown key 'field_otput'; did you mean 'field_output'?" in message("", "datasets.0.type={field_otput: x}")


def test_a_key_given_twice_is_an_error_with_both_lines() -> None:
    assert message("lora_r: 8\nlora_r: 16\n") == "key 'lora_r' is given twice, first on line 6; keep one"


def test_text_that_is_no_yaml_names_the_line(tmp_path: Path) -> None:
    path = tmp_path / "run.yml"
    path.write_text("base_model: [a\nlearning_rate: 1\n")
    with pytest.raises(ConfigError) as caught:
        load_run(path)
    assert caught.value.line == 2
    with pytest.raises(ConfigError, match="there is no configuration file"):
        load_run(tmp_path / "absent.yml")
    with pytest.raises(ConfigError, match="mapping of keys to values"):
        parse_run("- a\n- b\n")


def test_python_objects_in_yaml_are_refused() -> None:
    with pytest.raises(ConfigError, match="YAML tag"):
        run_of("wandb_name: !!python/name:os.system x\n")


def test_numbers_may_be_written_as_people_write_them() -> None:
    assert run_of().learning_rate == 0.0001
    assert run_of("", "learning_rate=2E-5").learning_rate == 2e-5
    assert run_of("", "learning_rate='3e-4'").learning_rate == 3e-4
    assert run_of("adam_epsilon: 1_000e-3\n").adam_epsilon == 1.0
    assert run_of("wandb_name: 2024-01-01\n").wandb_name == "2024-01-01"


def test_blank_keys_are_not_given() -> None:
    run = run_of("adapter:\nlora_r:\nwandb_project:\nresume_from_checkpoint:\nfsdp:\n")
    assert run.adapter is None
    assert "lora_r" not in run.model_fields_set
    assert ignored_keys(run) == {}
    assert "sample_pakcing" in message("sample_pakcing:\n")


def test_overrides_reach_any_depth_and_are_named_in_errors() -> None:
    run = run_of("", "datasets.0.path=other.jsonl", "datasets.1.path=third.csv", "special_tokens.pad_token=<pad>", "lora_r=")
    assert [source.path for source in run.sources] == ["other.jsonl", "third.csv"]
    assert run.special_tokens is not None
    assert run.special_tokens.pad_token == "<pad>"
    assert message("", "learning_rate=fast") == "override 'learning_rate=fast': key 'learning_rate': 'fast' is not a number"
    assert "expected key=value" in message("", "learning_rate")
    assert "there is no 'datasets.3'" in message("", "datasets.3.path=x")


def test_anchors_and_merges_of_yaml_work() -> None:
    run = parse_run(
        "base_model: b\nlearning_rate: 1\ndatasets:\n  - &a\n    path: x\n    type: alpaca\n  - <<: *a\n    path: y\n"
    )
    assert [(s.path, s.type) for s in run.sources] == [("x", "alpaca"), ("y", "alpaca")]


def test_a_run_is_frozen_and_its_yaml_gives_the_same_run() -> None:
    run = run_of("adapter: qlora\neval_strategy: no\nval_set_size: 0.1\n")
    with pytest.raises(pydantic.ValidationError):
        run.lora_r = 3  # type: ignore[misc]
    assert parse_run(as_yaml(run)).model_dump() == run.model_dump()


def test_axolotls_names_and_defaults_hold() -> None:
    run = run_of()
    assert (run.sequence_len, run.micro_batch_size, run.accumulation, run.num_epochs) == (512, 1, 1, 1.0)
    assert (run.optimizer, run.schedule, run.weight_decay, run.max_grad_norm) == ("adamw_torch_fused", "cosine", 0.0, 1.0)
    assert (run.adam_beta1, run.adam_beta2, run.adam_epsilon, run.seed) == (0.9, 0.999, 1e-8, 42)
    assert (run.adapter, run.packing, run.shuffle_merged_datasets, run.train_on_inputs) == (None, False, True, False)
    assert run_of("model_config: {rope_theta: 1e6}\n").overrides_of_model_config == {"rope_theta": 1e6}
    assert run_of("eval_steps: 5\nevaluation_strategy: steps\n").eval_strategy == "steps"


def test_intent_is_resolved() -> None:
    lora = run_of("adapter: lora\n")
    assert (lora.rank, lora.alpha, lora.adapts_experts, lora.targets_linear, lora.quantization) == (16, 32.0, True, True, None)
    assert run_of("adapter: qlora\n").quantization == "nf4"
    assert run_of("adapter: lora\nload_in_8bit: true\n").quantization == "int8"
    named = run_of("adapter: lora\nlora_target_modules: [q_proj]\nlora_target_parameters: experts.down_proj\n")
    assert (named.targets_linear, named.adapts_experts, named.lora_target_parameters) == (False, False, ("experts.down_proj",))
    assert run_of("adapter: lora\nexperts_implementation: eager\n").experts == "ropewalk"
    assert run_of("experts_implementation: eager\n").experts == "eager"
    assert run_of("flash_attention: true\n").attention == "flash_attention_2"
    assert run_of("bf16: true\n").dtype_name == "bfloat16"
    assert run_of("bf16: false\nfp16: false\n").dtype_name == "float32"
    assert run_of("bf16: auto\n").dtype_name == "auto"
    assert run_of("sample_packing: true\n").eval_packing
    assert not run_of("sample_packing: true\neval_sample_packing: false\n").eval_packing
    assert run_of("batch_size: 12\nmicro_batch_size: 3\n").accumulation == 4
    assert run_of("activation_offloading: true\n").recompute == "offload"
    assert run_of("wandb_project: p\nreport_to: mlflow\n").trackers == ("wandb", "mlflow")
    assert run_of("wandb_project: p\nuse_wandb: false\n").trackers == ()


def test_moments_follow_from_whichever_key_was_given() -> None:
    # 10 steps per epoch, 30 in all.
    assert run_of().save_every(10, 30) == 10
    assert run_of("saves_per_epoch: 4\n").save_every(10, 30) == 2
    assert run_of("saves_per_epoch: 0\n").save_every(10, 30) == 0
    assert run_of("save_steps: 0.1\n").save_every(10, 30) == 3
    assert run_of("save_steps: 7\n").save_every(10, 30) == 7
    assert run_of("evals_per_epoch: 2\n").eval_every(10, 30) == 0
    assert run_of("val_set_size: 0.1\nevals_per_epoch: 2\n").eval_every(10, 30) == 5
    assert run_of("val_set_size: 0.1\neval_strategy: no\n").eval_every(10, 30) == 0
    assert run_of().warmup(1000) == 30
    assert run_of().warmup(10_000) == 100
    assert run_of("warmup_ratio: 0.1\n").warmup(1000) == 100
    assert run_of("warmup_steps: 0.1\n").warmup(1000) == 100
    assert run_of("warmup_steps: 7\n").warmup(1000) == 7


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ("load_in_4bit: true\n", "a quantised base cannot be trained whole; add adapter: qlora"),
        ("adapter: qlora\nload_in_8bit: true\n", "for an 8-bit one write adapter: lora"),
        ("adapter: qlora\nload_in_4bit: false\n", "adapter: qlora means a 4-bit base"),
        ("adapter: lora\nload_in_4bit: true\nload_in_8bit: true\n", "exclude each other"),
        ("lora_r: 8\n", "key 'lora_r' is given without an adapter; add adapter: lora"),
        ("fp16: true\n", "write bf16: auto"),
        ("streaming: true\n", "add max_steps"),
        ("val_set_size: 0.1\ntest_datasets:\n  - path: t.jsonl\n", "exclude each other; keep one"),
        ("early_stopping_patience: 3\n", "needs an evaluation; add val_set_size"),
        ("warmup_steps: 5\nwarmup_ratio: 0.1\n", "exclude each other"),
        ("save_steps: 5\nsaves_per_epoch: 1\n", "exclude each other"),
        ("batch_size: 5\nmicro_batch_size: 2\n", "not a multiple of micro_batch_size"),
        ("attn_implementation: flash\n", "did you mean 'flash_attention_2'?"),
        ("chat_template: jinja\n", "needs chat_template_jinja"),
        ("chat_template: chatlm\n", "did you mean 'chatml'?"),
        ("metric_for_best_model: bleu\nval_set_size: 0.1\n", "only eval_loss is"),
        ("lora_dropout: 1.5\n", "1.5 is not less than 1"),
        ("val_set_size: -1\n", "-1 is not at least 0"),
        ("num_epochs: .nan\n", "key 'num_epochs'"),
        ("stream_weights: layers\n", "is for weights that stay as they are; add an adapter"),
        ("layer_offloading: true\n", "layer_offloading: true is for weights that stay as they are; add an adapter"),
        (
            "adapter: lora\nlayer_offloading: true\nstream_weights: off\n",
            "layer_offloading means stream_weights: layers, not off",
        ),
        ("adapter: lora\npeft_use_dora: true\nstream_weights: layers\n", "write stream_weights: experts"),
        ("adapter: lora\nstream_weights: on\n", "key 'stream_weights'"),
    ],
)
def test_contradictions_are_one_message_with_a_way_out(more: str, said: str) -> None:
    assert said in message(more)


def test_what_is_required_is_named() -> None:
    with pytest.raises(ConfigError, match="key 'base_model' is missing"):
        parse_run("learning_rate: 1\ndatasets: [{path: x}]\n")
    with pytest.raises(ConfigError, match="there is nothing to train on; add datasets"):
        parse_run("learning_rate: 1\nbase_model: b\n")
    with pytest.raises(ConfigError, match=r"key 'path' is missing in datasets\.0"):
        parse_run("learning_rate: 1\nbase_model: b\ndatasets: [{type: alpaca}]\n")


def test_the_reference_page_is_in_step() -> None:
    assert PAGE.read_text(encoding="utf-8") == reference_page(), "run: ropewalk config docs > docs/config.md"


def test_every_key_has_a_sentence_and_stands_in_the_schema() -> None:
    known = schema()["properties"]
    for name, info in Run.model_fields.items():
        assert info.description, name
        assert info.description.endswith((".", ",")), name
        assert name in known
    assert known["liger_rope"]["deprecated"]


@pytest.mark.parametrize(
    "value",
    ["{? [1, 2] : 3}", "&a [*a]", "!!binary aGk=", "[null]", "0x1F", "|\n  a\n  b", "{a: {b: c}}", "1e999", "[[1]]", "{1: 2}"],
)
def test_odd_yaml_is_read_or_refused_in_one_line(value: str) -> None:
    for name in ("learning_rate", "datasets", "lora_target_modules", "roles", "rl", "fsdp_config", "special_tokens"):
        said = ""
        try:
            run_of("", f"{name}={value}") if name in BASE else run_of(f"{name}: {value}\n")
        except ConfigError as error:
            said = str(error)
        assert "\n" not in said.replace(value, "")
