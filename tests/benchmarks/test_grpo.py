"""The benchmark of training by rewards: everybody's work is the same, and how costs become ratios and gates."""

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

FOLDER = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture(scope="module", autouse=True)
def _beside_the_scripts():
    sys.path.insert(0, str(FOLDER))
    yield
    sys.path.remove(str(FOLDER))


@pytest.fixture
def shape():
    from peers.grpo_assets import Shape

    return Shape(
        "llama", vocabulary=64, hidden=32, layers=2, heads=2, key_heads=1, head=16, inter=64, prompts=2, samples=3, median=9
    )


def test_prescribed_lengths_are_uneven_and_bounded(shape):
    from peers.grpo_assets import lengths

    many = [count for counts in lengths(replace(shape, prompts=200)) for count in counts]
    assert lengths(shape) == lengths(shape)
    assert (min(many) >= 2, max(many) <= 36) == (True, True)
    assert sorted(many)[300] == pytest.approx(9, abs=1)


def test_generation_ends_each_completion_where_it_is_prescribed(shape):
    from peers.grpo_assets import END, PAD, lengths, new_model, processor, prompt_ids

    asked = torch.tensor(prompt_ids(shape)).repeat_interleave(shape.samples, 0)
    whole = new_model(shape).generate(
        input_ids=asked,
        attention_mask=torch.ones_like(asked),
        do_sample=True,
        max_new_tokens=shape.longest,
        eos_token_id=END,
        pad_token_id=PAD,
        logits_processor=[processor(shape)(asked)],
    )
    written = whole[:, shape.prompt :]
    wanted = [count for counts in lengths(shape) for count in counts]
    assert [row.index(END) + 1 for row in written.tolist()] == wanted


def test_the_words_of_a_prompt_are_its_ids(shape, tmp_path):
    from peers.grpo_assets import make, prompt_ids, text
    from ropewalk.chat.template import Template

    make(tmp_path, shape)
    assert [Template.load(tmp_path).encode_document(text(ids)) for ids in prompt_ids(shape)] == prompt_ids(shape)


def lines(costs, **facts):
    """What a contender prints whose steps cost so much, one after another."""
    marks = [sum(costs[: n + 1]) for n in range(len(costs))]
    held = {"base_unchanged": True, "trained_dtypes": ["torch.float32"], "trainable": 5, "peak": 100, "loaded": 40}
    return [*({"step": mark, "tokens": 54} for mark in marks), held | facts]


def test_a_step_costs_what_those_between_the_first_and_the_last_cost(shape, monkeypatch):
    import grpo

    monkeypatch.setattr(grpo, "lengths", lambda shape: [[9] * 3] * 2)
    runs = {
        "A": [lines([50, 12, 12, 3])],
        "TRL": [lines([50, 8, 8, 3])],
        "A'": [lines([9, 6, 6, 1])],
        "B": [lines([9, 4, 4, 1]), lines([9, 5, 5, 1])],
        "C": [lines([9, 1, 3, 0])],  # two steps' completions in every second step
        "training": [lines([9, 1, 1, 0], peak=90)],
    }
    found = grpo.end_to_end(runs, shape, "cpu")
    assert found["step_cost"] == {"A": 12, "TRL": 8, "A'": 6, "B": 4, "C": 2, "training": 1}
    assert (found["vs_trl"], found["async_vs_sync"], found["c_vs_a"], found["c_vs_a_prime"]) == (2, 2, 6, 3)
    assert found["peak_vs_training"] == pytest.approx(60 / 50)
    gates = grpo.gates_of({"llama": found | {"parts": {"gates": {}}}})
    assert all(gate["passed"] for gate in gates.values())


def test_gates_fall_where_work_or_weights_differ(shape, monkeypatch):
    import grpo

    monkeypatch.setattr(grpo, "lengths", lambda shape: [[9] * 3] * 2)
    same = {name: [lines([9, 4, 4, 1])] for name in ("A", "A'", "training")}
    odd = {
        "B": [lines([9, 4, 4, 1], trained_dtypes=["torch.bfloat16"], trainable=6)],
        "C": [lines([9, 4, 4, 1], base_unchanged=False, weights_trainer=1 << 20, weights_both=2 << 20, adapter=1000)],
    }
    short = lines([9, 4, 4, 1])
    short[0]["tokens"] = 53
    found = grpo.end_to_end(same | odd | {"TRL": [short]}, shape, "cpu")
    gates = grpo.gates_of({"llama": found | {"parts": {"gates": {"greedy_ids": {"passed": True}}}}})
    failed = {name for name, gate in gates.items() if not gate["passed"]}
    assert failed == {
        "dtype_unchanged, B, llama",
        "base_unchanged, C, llama",
        "base_held_once, C, llama",
        "equal_tokens, llama",
        "equal_adapters, llama",
    }


def test_over_all_models_the_worst_one_counts():
    import grpo

    models = {
        "llama": {"rollout_vs_generate": 1.5},
        "qwen3": {"rollout_vs_generate": 1.9, "vs_trl": 3.0, "peak_vs_training": 1.1},
    }
    assert grpo.overall(models) == {"rollout_vs_generate": 1.5, "vs_trl": 3.0, "peak_vs_training": 1.1}


def test_without_a_plain_loop_there_are_no_ratios_to_it(shape, monkeypatch):
    import grpo

    monkeypatch.setattr(grpo, "lengths", lambda shape: [[9] * 3] * 2)
    runs = {"B": [lines([9, 4, 4, 1])], "C": [lines([9, 1, 3, 0])], "training": [lines([9, 1, 1, 0], peak=90)]}
    found = grpo.end_to_end(runs, shape, "cpu")
    assert found["async_vs_sync"] == 2
    assert not {"c_vs_a", "vs_trl"} & set(found)


def test_every_key_is_there_and_what_nobody_measured_is_null_and_said():
    import grpo

    decode = {
        dtype: {
            "expert_lora_decode": ours,
            "peft_expert_lora_decode": theirs,
            "cost": dict.fromkeys(("ours", "base", "peft", "transformers"), 0.01),
            "sequences": 32,
            "gates": {"expert_log_probs": {"passed": dtype == "float32"}},
        }
        for dtype, ours, theirs in (("float32", 1.1, 2.0), ("bfloat16", 1.15, 1.9))
    }
    result = grpo.findings({}, decode, {"TRL": "left out"}, {}, "cpu")
    assert (result["expert_lora_decode"], result["peft_expert_lora_decode"]) == (1.15, 1.9)
    assert set(grpo.KEYS) <= set(result)
    assert result["vs_trl"] is None
    assert result["gates"]["expert_log_probs, bfloat16"] == {"passed": False}
    said = grpo.report(result)
    assert "null: vs_trl" in said
    assert "missing: TRL: left out" in said


def test_pairs_are_compared_turn_by_turn():
    import grpo_decode

    # 2 / 1, 6 / 4, 9 / 3: of 2, 1.5 and 3 the middle one
    assert grpo_decode.paired([2, 6, 9], [1, 4, 3]) == 2
