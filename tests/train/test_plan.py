"""`ropewalk check` tells what a run will do before any weight is loaded."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from ropewalk.config.run import Run, parse_run
from ropewalk.errors import ConfigError, DataError, ModelError
from ropewalk.train.plan import check, check_command, joined

ROWS = [
    {"messages": [{"role": "user", "content": "Capital of France?"}, {"role": "assistant", "content": "Paris"}]},
    {"messages": [{"role": "user", "content": "Capital of Italy?"}, {"role": "assistant", "content": "Rome"}]},
]


@pytest.fixture(scope="module")
def base(tokenizer_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny mixture of experts with a tokenizer, as a model folder."""
    from transformers import AutoModelForCausalLM

    from ropewalk.models.tiny import tiny_config

    folder = tmp_path_factory.mktemp("base")
    AutoModelForCausalLM.from_config(tiny_config("qwen3_moe")).save_pretrained(folder)
    shutil.copytree(tokenizer_folder, folder, dirs_exist_ok=True)
    return folder


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return path


def run_of(base: Path | str, rows: Path | str, more: str = "") -> Run:
    return parse_run(
        f"base_model: {base}\nlearning_rate: 1e-3\nadapter: lora\nlora_r: 8\nchat_template: chatml\n"
        f"datasets:\n  - path: {rows}\n    type: chat_template\n{more}"
    )


def test_the_plan_names_shape_coverage_steps_and_what_is_not_needed(base: Path, rows: Path) -> None:
    more = "lora_rank_pattern: {experts.*: 2}\nmicro_batch_size: 2\ngradient_accumulation_steps: 3\nsequence_len: 64\nliger_rope: true\n"
    plan = check(run_of(base, rows, more), offline=True)
    assert plan.model is not None
    assert plan.model["model_type"] == "qwen3_moe"
    assert plan.model["experts"] > plan.model["experts_per_token"] > 0
    assert plan.model["active"] < plan.model["parameters"]
    by_name = {row["family"].rsplit(".", 1)[-1]: row for row in plan.coverage}
    assert {"q_proj", "k_proj", "v_proj", "o_proj", "gate_up_proj", "down_proj"} <= set(by_name)
    q, up = by_name["q_proj"], by_name["gate_up_proj"]
    # r (in + out) per layer; experts have a factor pair each.
    assert q["parameters"] == q["count"] * 8 * (q["inputs"] + q["outputs"])
    assert up["parameters"] == up["count"] * up["experts"] * 2 * (up["inputs"] + up["outputs"])
    assert plan.trained == sum(row["parameters"] for row in plan.coverage)
    assert plan.steps["most_tokens_per_step"] == 2 * 3 * 64
    assert set(plan.ignored) == {"liger_rope"}
    assert plan.memory is not None
    # Factors are float32, and AdamW keeps two numbers for each.
    assert (plan.memory["adapter"], plan.memory["optimizer"]) == (4 * plan.trained, 8 * plan.trained)
    assert plan.memory["total"] == sum(n for name, n in plan.memory.items() if name not in ("total", "free"))
    assert plan.unchecked == {}
    text = plan.text()
    for part in ("8 experts", "gate_up_proj", "384 tokens", "liger_rope", "Memory    about", "Preview"):
        assert part in text


def test_the_preview_marks_exactly_what_is_trained(base: Path, rows: Path) -> None:
    plan = check(run_of(base, rows), offline=True)
    assert [["".join(t for t, on in joined(row) if on)] for row in plan.preview] == [["Paris<|im_end|>"], ["Rome<|im_end|>"]]
    assert "Capital of France?" in plan.text()
    assert "⟦Paris<|im_end|>⟧" in plan.text()


def test_full_fine_tuning_trains_every_weight(base: Path, rows: Path) -> None:
    text = (
        f"base_model: {base}\nlearning_rate: 1\nchat_template: chatml\ndatasets:\n  - path: {rows}\n    type: chat_template\n"
    )
    plan = check(parse_run(text), offline=True)
    assert plan.model is not None
    assert plan.trained == plan.model["parameters"]
    assert "every weight" in plan.text()


def test_a_target_that_matches_nothing_is_an_error(base: Path, rows: Path) -> None:
    with pytest.raises(ModelError, match="q_prj"):
        check(run_of(base, rows, "lora_target_modules: [q_prj]\n"), offline=True)


@pytest.mark.parametrize("prefix", ["model.language_model", "language_model.model", r"model\.text_model", "model"])
def test_expressions_written_for_a_model_that_sees_mean_its_text_part(base: Path, rows: Path, prefix: str) -> None:
    pattern = rf"{prefix}.layers.[\d]+.(mlp|self_attn).(up|down|gate|q|k|v|o)_proj"
    plan = check(run_of(base, rows, f"lora_experts: false\nlora_target_modules: '{pattern}'\n"), offline=True)
    assert [row["family"].rsplit(".", 1)[-1] for row in plan.coverage] == ["q_proj", "k_proj", "v_proj", "o_proj"]


def test_a_rank_pattern_that_matches_nothing_is_an_error(base: Path, rows: Path) -> None:
    with pytest.raises(ModelError, match="'experts' matches no adapted layer"):
        check(run_of(base, rows, "lora_rank_pattern: {experts: 4}\n"), offline=True)


def test_a_value_that_the_model_does_not_have_is_an_error(base: Path, rows: Path) -> None:
    with pytest.raises(ConfigError, match="has no 'output_router_logit'; did you mean 'output_router_logits'"):
        check(run_of(base, rows, "model_config: {output_router_logit: true}\n"), offline=True)


def test_a_base_in_bits_that_cannot_be_read_back_is_an_error(base: Path, rows: Path, tmp_path: Path) -> None:
    shutil.copytree(base, tmp_path / "awq")
    config = json.loads((base / "config.json").read_text())
    (tmp_path / "awq" / "config.json").write_text(
        json.dumps(config | {"quantization_config": {"quant_method": "awq", "bits": 4}})
    )
    with pytest.raises(ModelError, match="stored as awq, which cannot be read back"):
        check(run_of(tmp_path / "awq", rows), offline=True)


def test_offline_nothing_is_fetched_and_what_is_missing_is_named(rows: Path) -> None:
    plan = check(run_of("nobody/nothing-here", "nobody/no-such-set"), offline=True)
    assert plan.unchecked == {
        "base_model": "nobody/nothing-here: not checked (offline): not on this disk",
        "datasets.0": "nobody/no-such-set: not checked (offline): not on this disk",
    }
    assert plan.model is None
    assert "Not checked" in plan.text()


def test_what_is_meant_as_a_path_must_be_there(base: Path, rows: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="not found"):
        check(run_of(tmp_path / "absent", rows), offline=True)
    with pytest.raises(DataError, match=r"rows\.jsonl'\?"):
        check(run_of(base, tmp_path / "row.jsonl"), offline=True)


def test_an_unknown_format_names_its_line(rows: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"override 'datasets\.0\.type=chatt_template': type: 'chatt_template'"):
        check(
            parse_run("base_model: a/b\nlearning_rate: 1\n", [f"datasets.0.path={rows}", "datasets.0.type=chatt_template"]),
            offline=True,
        )


def test_the_command_prints_the_plan_or_its_json(
    base: Path, rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "run.yml"
    path.write_text(
        f"base_model: {base}\nlearning_rate: 1e-3\nadapter: lora\nchat_template: chatml\n"
        f"datasets:\n  - path: {rows}\n    type: chat_template\n"
    )
    assert check_command(path, ["lora_r=4"], offline=True, as_json=True) == 0
    plan = json.loads(capsys.readouterr().out)
    assert {row["rank"] for row in plan["coverage"]} == {4}
    assert check_command(path, [], offline=True, as_json=False) == 0
    assert "Trained   an adapter" in capsys.readouterr().out


def test_a_bad_configuration_is_told_without_torch(tmp_path: Path) -> None:
    path = tmp_path / "run.yml"
    path.write_text("base_model: a/b\nlearning_rate: 1\ndatasets: [{path: x/y, type: chatt_template}]\n")
    code = (
        "import sys\nfrom pathlib import Path\nfrom ropewalk.errors import ConfigError\n"
        "from ropewalk.train.plan import check_command\n"
        "try:\n    check_command(Path(sys.argv[1]), [], True, False)\nexcept ConfigError:\n"
        "    assert not {'torch', 'transformers'} & set(sys.modules)\nelse:\n    raise SystemExit('accepted')\n"
    )
    subprocess.run([sys.executable, "-c", code, str(path)], check=True)


def test_a_published_shape_is_planned_for_without_its_files(rows: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ropewalk.train.plan.cached_folder", lambda *_: None)
    plan = check(run_of("mistralai/Mixtral-8x7B-v0.1", rows, "load_in_4bit: true\nsequence_len: 256\n"), offline=True)
    assert plan.model is not None
    assert plan.model["parameters"] == 46_702_792_704
    assert plan.memory is not None
    assert "its shape is the published one" in plan.unchecked["base_model"]


def test_a_run_that_cannot_fit_is_refused_with_what_each_way_out_would_need(
    rows: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ropewalk.train.plan.cached_folder", lambda *_: None)
    keys = "gpu_memory_limit: 24GiB\nsequence_len: 128\n"
    run = run_of("openai/gpt-oss-20b", rows, f"{keys}stream_weights: off\n")
    with pytest.raises(ModelError) as error:
        check(run, offline=True)
    message = str(error.value)
    assert "24.5 GB of the GPU can be filled" in message  # 24 GiB are 25.77 GB, of which a twentieth is left
    # 41.8 GB of weights in bfloat16 become 12.5 GB in nf4.
    assert "adapter: qlora (then about" in message
    assert "optimizer: adamw_torch_8bit" in message
    # 38.2 of them are experts'; in 24 layers, two of which are on the GPU at a time, that is 3.2.
    assert "stream_weights: experts (then about" in message
    streamed = check(run_of("openai/gpt-oss-20b", rows, keys), offline=True)
    assert streamed.streamed is not None
    assert streamed.streamed["part"] == "experts"
    assert streamed.memory is not None
    assert streamed.memory["host"] == pytest.approx(38.2e9, rel=0.01)
    assert streamed.memory["total"] < 24.5e9
    assert (
        f"the experts of {streamed.streamed['slots']} layers are on the GPU at a time, the others wait on the host"
        in streamed.text()
    )
    assert f"and {streamed.memory['host'] / 2**30:.2f} GiB of the host's" in streamed.text()


def test_what_layers_keep_is_told(base: Path, rows: Path) -> None:
    plan = check(run_of(base, rows, "gradient_checkpointing: experts\nsequence_len: 64\n"), offline=True)
    assert plan.ways == ["experts"] * len(plan.ways)
    assert f"Keeps     all but what experts compute in {len(plan.ways)} layers" in plan.text()
