"""`ropewalk rewards check`: what rewards say of completions, sampled by the base or given in a file."""

import json

import pytest

from ropewalk.cli import main
from ropewalk.config.run import parse_run
from ropewalk.errors import DataError
from ropewalk.train import reward_writer
from ropewalk.train.prompts import prompts, some_prompts

REWARDS = """
def brief(completion):
    return -len(completion)

def broken(completion, answer):
    return 1 / 0

def even(completion_ids, completion):
    return None if len(completion_ids) % 2 else 1.0
"""


def given(tmp_path, *rows):
    path = tmp_path / "completions.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def told(capsys):
    return json.loads(capsys.readouterr().out)


def test_the_distribution_of_each_reward_over_given_completions(config, tmp_path, capsys):
    (tmp_path / "own.py").write_text(REWARDS)
    path = config(rl="grpo", trl={"reward_funcs": ["own.py:brief", {"kind": "numeric", "weight": 10}, "repetition"]})
    rows = given(
        tmp_path,
        {"prompt": "2 + 2 =", "answer": "4", "completions": ["4", "5"]},
        {"prompt": "3 + 3 =", "answer": "6", "completions": ["six!", "none"]},
    )
    assert main(["rewards", "check", str(path), "--completions", rows, "--json"]) == 0
    report = told(capsys)
    brief, numeric, repetition = report["rewards"]
    assert (report["groups"], report["samples"]) == (2, 4)
    # -1, -1, -4, -4: mean -2.5, squares 4 * 2.25, over 3; each group alike.
    assert (brief["mean"], brief["least"], brief["most"], brief["flat_groups"]) == (-2.5, -4.0, -1.0, 1.0)
    assert brief["std"] == pytest.approx(3**0.5)
    assert (numeric["name"], numeric["mean"], numeric["flat_groups"], numeric["weight"]) == ("numeric", 0.25, 0.5, 10.0)
    assert numeric["examples"][0] == {"prompt": "2 + 2 =", "completion": "4", "value": 1.0}
    # 10 - 1, -1, -4, -4
    assert (report["total"]["mean"], report["total"]["most"]) == (0.0, 9.0)
    assert "repetition is 0 for every completion, so 100% of the groups teach nothing by it" in report["warnings"]
    assert repetition["slowest"] >= 0


def test_a_reward_that_always_fails_is_told_with_its_traceback_and_the_exit_code(config, tmp_path, capsys):
    (tmp_path / "own.py").write_text(REWARDS)
    path = config(trl={"reward_funcs": ["own.py:broken", "own.py:even"]})
    rows = given(tmp_path, {"completions": ["a", "b"], "answer": "x"})
    assert main(["rewards", "check", str(path), "--completions", rows]) == 1
    text = capsys.readouterr().out
    assert "broken, the first failure:" in text
    assert "ZeroDivisionError: division by zero" in text
    assert "warning: broken failed on 2 of 2 completions" in text


def test_a_column_that_is_not_there_is_told_before_any_reward_is_computed(config, tmp_path, capsys):
    (tmp_path / "own.py").write_text(REWARDS)
    path = config(trl={"reward_funcs": ["own.py:broken"]})
    rows = given(tmp_path, {"completions": ["a", "b"], "target": "x"})
    assert main(["rewards", "check", str(path), "--completions", rows]) == 2
    assert "reward 'broken' asks for 'answer', which is no column of the data; it has target" in capsys.readouterr().err


def test_a_configuration_without_rewards_and_a_misspelt_one_are_told_with_their_line(config, capsys):
    assert main(["rewards", "check", str(config())]) == 2
    assert "no reward is named; add trl.reward_funcs" in capsys.readouterr().err
    path = config(trl={"reward_funcs": ["brief.py:f", {"kind": "numric"}]})
    assert main(["rewards", "check", str(path)]) == 2
    said = capsys.readouterr().err
    assert f"{path}:" in said
    assert "'numric' is no kind of reward; did you mean 'numeric'?" in said


def test_completions_are_sampled_from_the_base_as_the_run_holds_it_for_rows_of_the_data(config, tmp_path, capsys, monkeypatch):
    held, settings = [], reward_writer.EngineSettings
    monkeypatch.setattr(
        reward_writer, "EngineSettings", lambda *given, **named: held.append(named) or settings(*given, **named)
    )
    (tmp_path / "own.py").write_text("def ids(completion_ids, completion, reference):\n    return len(completion_ids)\n")
    trl = {"reward_funcs": ["own.py:ids", "exact"], "num_generations": 3, "max_completion_length": 5}
    path = config(rl="grpo", adapter="qlora", trl=trl, num_threads=1)
    assert main(["rewards", "check", str(path), "--prompts", "2", "--json"]) == 0
    assert held[0]["quantize"] == "nf4"
    report = told(capsys)
    assert report["replies"] is None
    assert (report["groups"], report["samples"]) == (2, 6)
    assert report["rewards"][0]["failed"] == 0
    assert 1 <= report["rewards"][0]["mean"] <= 5
    assert "plus" in report["rewards"][1]["examples"][0]["prompt"]


def test_an_environment_and_a_harness_need_more_than_given_completions(config, tmp_path, capsys):
    rows = given(tmp_path, {"completions": ["a", "b"]})
    path = config(rl="grpo", trl={"environment": "world.py:Twice"})
    assert main(["rewards", "check", str(path), "--completions", rows]) == 2
    assert "leave --completions out" in capsys.readouterr().err
    path = config(rl="grpo", trl={"harness": "world.py:play", "reward_funcs": [{"kind": "length", "most": 3}]})
    assert main(["rewards", "check", str(path)]) == 2
    assert "max_steps=1" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("row", "asked", "reference"),
    [
        ({"prompt": "2 + 2 =", "answer": "4"}, "2 + 2 =", None),
        ({"prompt": [{"role": "user", "content": "2 + 2?"}]}, [{"role": "user", "content": "2 + 2?"}], None),
        (
            {"messages": [{"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": "4"}]},
            [{"role": "user", "content": "2 + 2?"}],
            "4",
        ),
        ({"messages": [{"role": "user", "content": "2 + 2?"}]}, [{"role": "user", "content": "2 + 2?"}], None),
    ],
)
def test_a_row_as_a_prompt(tmp_path, row, asked, reference):
    (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n")
    run = parse_run(f"base_model: b\nlearning_rate: 1\ndatasets: [{{path: {tmp_path}/rows.jsonl}}]\n")
    (prompt,) = prompts(run)
    assert prompt.asked == asked
    assert prompt.row.get("reference") == reference


def test_a_text_prompt_of_a_chat_is_a_turn_of_the_user_and_an_instruction_is_its_format(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"prompt": "2 + 2?"}\n')
    (tmp_path / "b.jsonl").write_text('{"instruction": "Add.", "input": "2 2", "output": "4"}\n')
    run = parse_run(
        "base_model: b\nlearning_rate: 1\ndatasets:\n"
        f"- {{path: {tmp_path}/a.jsonl, type: chat_template}}\n- {{path: {tmp_path}/b.jsonl, type: alpaca}}\n"
    )
    turn, instruction = prompts(run)
    assert turn.asked == [{"role": "user", "content": "2 + 2?"}]
    assert "Add." in instruction.asked
    assert instruction.row["reference"] == "4"
    assert {one.line for one in some_prompts(run, 5)} == {1}


def test_a_row_without_a_prompt_is_told_with_its_place(tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a"}\n{"question": "b"}\n')
    run = parse_run(f"base_model: b\nlearning_rate: 1\ndatasets: [{{path: {tmp_path}/rows.jsonl}}]\n")
    with pytest.raises(DataError, match=r"rows\.jsonl:2"):
        list(prompts(run))
