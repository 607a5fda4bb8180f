"""Rewards: functions as users write them, processes that hang and die, and the arithmetic."""

import os
import subprocess
import sys
import textwrap
import time

import numpy as np
import pytest

from ropewalk.errors import BadInput, TrainingStopped
from ropewalk.train import outage, reward_pool
from ropewalk.train.reward_builtins import RewardSpec, build, read_spec
from ropewalk.train.reward_functions import Sample, form_of
from ropewalk.train.rewards import Rewards, as_array, combine

MODULE = textwrap.dedent(
    """
    import asyncio, os, signal, time

    def length(completion, **row):
        return len(completion)

    def batch_length(completions, bonus, **columns):
        return [len(text) + more for text, more in zip(completions, bonus)]

    async def slow_length(completion: str):
        await asyncio.sleep(0.2)
        return len(completion)

    async def batch_async(prompts, completions):
        await asyncio.sleep(0)
        return [float(len(prompt)) for prompt in prompts]

    def backwards(completion):
        time.sleep(0.05 if completion == "a" else 0)
        return {"a": 1, "b": 2, "c": 3}[completion]

    def hangs(completion):
        while completion == "hang":
            time.sleep(60)
        return 1.0

    def dies(completion):
        if completion == "die":
            os.kill(os.getpid(), signal.SIGSEGV)
        return 1.0

    def raises(completion):
        return int(completion)

    def leaves(completion):
        raise SystemExit("done")

    def sometimes(completion):
        return None if completion == "" else 1

    def short_batch(completions):
        time.sleep(0.01)
        return [0.0]

    def text_of_messages(completions, prompts, **columns):
        return [len(reply[0]["content"]) + len(prompt) for reply, prompt in zip(completions, prompts)]

    def process(completion):
        print("on the output")
        return os.getpid()

    def slow_batch(completions):
        time.sleep(60 if "slow" in completions else 0)
        return [1.0] * len(completions)

    async def waits(completion):
        await asyncio.sleep(60 if completion == "slow" else 0.01)
        return 1.0

    async def blocks(completion):
        time.sleep(60 if completion == "slow" else 0)
        return 1.0

    def no_number(completion):
        return float("nan")
    """
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with a user's module of rewards."""
    folder = tmp_path_factory.mktemp("own")
    (folder / "own_rewards.py").write_text(MODULE)
    return folder


def named(folder, *names, limit=5.0):
    return [read_spec({"function": f"own_rewards.{name}", "limit": limit}, [str(folder)]) for name in names]


def of(*completions, **row):
    return [Sample(text, "why?", row) for text in completions]


def values(scores):
    return [[one.value for one in row] for row in scores]


def test_samples_batches_and_both_kinds_of_async_give_their_scores_in_order(folder):
    specs = named(folder, "length", "batch_length", "slow_length", "batch_async", "backwards")
    with Rewards(specs, workers=2) as rewards:
        begun = time.monotonic()
        found = rewards.score(of("c", "a", "b", bonus=10))
        taken = time.monotonic() - begun
    assert values(found) == [[1, 11, 1, 4, 3], [1, 11, 1, 4, 1], [1, 11, 1, 4, 2]]
    assert found[0][2].seconds >= 0.2
    assert taken < 5


def test_completions_of_messages_are_messages_for_a_batch_function(folder):
    samples = [Sample("four", [{"role": "user", "content": "why?"}])]
    with Rewards(named(folder, "text_of_messages")) as rewards:
        assert values(rewards.score(samples)) == [[5]]


def test_a_reward_that_hangs_is_named_and_its_worker_replaced(folder):
    with Rewards(named(folder, "hangs", limit=0.5)) as rewards:
        before = rewards.pool.processes
        found = rewards.score(of("hang", "x", "y"))
        assert values(found) == [[0.0], [1.0], [1.0]]
        assert (
            f"'hangs': reward worker 1 (process {before[0]}) took longer than 0.5 seconds and was replaced" in found[0][0].error
        )
        assert 0.5 <= found[0][0].seconds < 5
        assert rewards.pool.processes != before
        assert not os.path.exists(f"/proc/{before[0]}")
        assert rewards.failures == [1]


def test_a_slow_batch_costs_all_its_samples_and_the_next_batch_none(folder):
    with Rewards(named(folder, "slow_batch", limit=0.5)) as rewards:
        slow, quick = rewards.pool.submit(of("x", "slow")), rewards.pool.submit(of("y", "z"))
        found = rewards.pool.wait_for(slow)
        assert values(found) == [[0.0], [0.0]]
        assert "took longer than 0.5 seconds and was replaced" in found[1][0].error
        assert values(rewards.pool.wait_for(quick)) == [[1.0], [1.0]]


def test_an_asynchronous_sample_that_is_slow_costs_itself_alone(folder):
    with Rewards(named(folder, "waits", limit=0.5)) as rewards:
        found = rewards.score(of("x", "slow", "y"))
        assert values(found) == [[1.0], [0.0], [1.0]]
        assert found[1][0].error == "reward 'waits' took longer than 0.5 seconds"
        assert rewards.pool.replaced == []


def test_an_asynchronous_function_that_blocks_its_loop_is_ended_from_outside(folder, monkeypatch):
    with Rewards(named(folder, "blocks", limit=0.2)) as rewards:
        monkeypatch.setattr(reward_pool, "GRACE_SECONDS", 0.3)
        found = rewards.score(of("slow", "y"))
        assert values(found) == [[0.0], [0.0]]
        assert "was replaced" in found[0][0].error
        assert values(rewards.score(of("y"))) == [[1.0]]


def test_a_worker_that_dies_is_replaced_and_the_other_samples_are_scored(folder):
    with Rewards(named(folder, "dies", "length")) as rewards:
        found = rewards.score(of("die", "xy"))
        assert values(found) == [[0.0, 3.0], [1.0, 2.0]]
        assert "died (SIGSEGV) and was replaced" in found[0][0].error
        assert len(rewards.pool.replaced) == 1


def test_an_exception_of_a_function_is_a_zero_with_its_traceback(folder):
    with Rewards(named(folder, "raises", "leaves", "no_number", "short_batch")) as rewards:
        (row, _) = rewards.score(of("many", "2"))
    assert [one.value for one in row] == [0.0, 0.0, 0.0, 0.0]
    assert "own_rewards.py" in row[0].error
    assert "return int(completion)" in row[0].error
    assert "reward_worker.py" not in row[0].error
    assert row[0].error.endswith("ValueError: invalid literal for int() with base 10: 'many'")
    assert "SystemExit: done" in row[1].error
    assert "returned nan; expected a finite number" in row[2].error
    assert "returned 1 values for 2 completions" in row[3].error


def test_a_reward_that_only_fails_stops_the_run_with_its_error(folder, monkeypatch):
    monkeypatch.setattr(outage, "MOST_FAILURES", 5)
    with Rewards(named(folder, "raises")) as rewards:
        rewards.score(of("x", "x", "x", "x"))
        with pytest.raises(TrainingStopped, match=r"(?s)'raises' failed 5 times in a row; the last time: .*int\(completion\)"):
            rewards.score(of("x"))


def test_a_reward_that_has_worked_may_fail_for_a_while(folder, monkeypatch):
    monkeypatch.setattr(outage, "MOST_FAILURES", 5)
    monkeypatch.setattr(outage, "OUTAGE_SECONDS", 0.3)
    with Rewards(named(folder, "raises")) as rewards:
        rewards.score(of("1", *"xxxxxxxxx"))  # all at once
        time.sleep(0.3)
        rewards.score(of("2", *"xxxxxxxxx"))
        assert rewards.failures == [18]
        time.sleep(0.3)
        with pytest.raises(TrainingStopped, match=r"'raises' failed 10 times in a row, for \d seconds; the last time: "):
            rewards.score(of("x"))


def test_functions_run_outside_of_this_process_and_none_is_left_behind(folder, capfd):
    with Rewards(named(folder, "process"), workers=2) as rewards:
        pids = {int(row[0].value) for row in rewards.score(of(*"abcdefgh"))}
        assert os.getpid() not in pids
        assert pids <= set(rewards.pool.processes)
    assert not [pid for pid in pids if os.path.exists(f"/proc/{pid}")]
    assert "on the output" not in capfd.readouterr().out


def test_what_is_submitted_later_waits_for_nobody_and_what_is_closed_is_told(folder):
    rewards = Rewards(named(folder, "hangs", limit=60))
    rewards.pool.start()
    first, second = rewards.pool.submit(of("hang")), rewards.pool.submit(of("x"))
    rewards.pool.close()
    for future in (first, second):
        with pytest.raises(TrainingStopped, match="have been ended"):
            future.result(5)


def test_workers_end_with_a_trainer_that_is_killed_even_in_the_middle_of_a_call(folder):
    code = (
        "import sys, time\n"
        "from ropewalk.train.reward_builtins import read_spec\n"
        "from ropewalk.train.reward_functions import Sample\n"
        "from ropewalk.train.reward_pool import RewardPool\n"
        f"pool = RewardPool([read_spec({{'function': 'own_rewards.hangs', 'limit': 60}}, [{str(folder)!r}])], 2)\n"
        "pool.start()\n"
        "pool.submit([Sample('hang'), Sample('x')])\n"
        "print(*pool.processes, flush=True)\n"
        "time.sleep(60)\n"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as trainer:
        pids = trainer.stdout.readline().split()
        trainer.kill()
    assert len(pids) == 2
    until = time.monotonic() + 10
    while left := [pid for pid in pids if running(pid)]:
        assert time.monotonic() < until, left
        time.sleep(0.05)


def running(pid):
    """Whether a process is there and not just waiting to be reaped by whoever adopted it."""
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("own_rewards.lenght", "own_rewards has no 'lenght'; it has length, batch_length"),
        ("no_such_module.f", "there is no module 'no_such_module' in"),
        ("nowhere.py:f", "there is no file nowhere.py in"),
    ],
)
def test_a_function_that_is_not_there_is_told_at_the_start(folder, name, said):
    with pytest.raises(BadInput, match=said), Rewards([read_spec(name, [str(folder)])]):
        pass


def test_a_module_that_cannot_be_imported_is_told_with_its_traceback(tmp_path):
    (tmp_path / "broken_rewards.py").write_text("ready = 1 / 0\n")
    with (
        pytest.raises(BadInput, match="cannot be loaded") as caught,
        Rewards([read_spec("broken_rewards.py:f", [str(tmp_path)])]),
    ):
        pass
    assert 'broken_rewards.py", line 1' in str(caught.value)
    assert str(caught.value).endswith("ZeroDivisionError: division by zero")


def test_the_form_of_a_function_is_read_from_its_signature():
    form = form_of(lambda completion, answer, hint="": 0, "f")
    assert (form.batch, form.required, form.rest) == (False, ("answer",), False)
    assert form.columns(["answer", "hint", "other"]) == ["answer", "hint"]
    assert form_of(lambda completions, **rest: 0, "f").columns(["answer", "prompt"]) == ["answer"]
    with pytest.raises(BadInput, match=r"'f' takes \(text, answer\); expected 'completion', for one sample"):
        form_of(lambda text, answer: 0, "f")
    with pytest.raises(BadInput, match="both 'completion' and 'completions'"):
        form_of(lambda completion, completions: 0, "f")
    with pytest.raises(BadInput, match="'completions' and 'prompt', which belong to different forms"):
        form_of(lambda completions, prompt: 0, "f")
    with pytest.raises(BadInput, match="by place only"):
        form_of(lambda completion, answer, /: 0, "f")


# -- built-ins


def reward(entry, completion, **row):
    return build(read_spec(entry)).call(completion=completion, **row)


@pytest.mark.parametrize(
    ("entry", "completion", "row", "value"),
    [
        ("exact", " Paris\n", {"answer": "Paris"}, 1.0),
        ("exact", "Rome", {"answer": "Paris"}, 0.0),
        ({"kind": "contains", "reference": "city"}, "It is Paris.", {"city": "Paris"}, 1.0),
        ({"kind": "numeric", "tolerance": 0.5}, "so it is 72.4", {"answer": "72"}, 1.0),
        (
            {"kind": "numeric", "after": "####", "reference_after": "####"},
            "3 and 4 #### 7",
            {"answer": "3 + 4 = #### 7"},
            1.0,
        ),
        ({"kind": "numeric", "after": "####"}, "7", {"answer": 7}, 0.0),
        ({"kind": "choice", "choices": ["A", "B"]}, "The answer is (B).", {"answer": "B"}, 1.0),
        ({"kind": "regex", "pattern": "^[0-9]+$"}, "42", {}, 1.0),
        ({"kind": "length", "most": 2}, "one two three", {}, 0.0),
        ({"kind": "schema", "schema": {"type": "object", "required": ["a"]}}, '{"a": 1}', {}, 1.0),
        ("format", "<think>so</think> <answer>7</answer>", {}, 1.0),
        ("format", "well <think>so</think><answer>7</answer>", {}, 0.0),
        ("format", "<answer>7</answer><think>so</think>", {}, 0.0),
        ({"kind": "format", "partial": True}, "<think>so</think>", {}, 0.5),
        ({"kind": "repetition", "n": 2}, "a b a b a", {}, -0.5),  # ab ba ab ba: two of four
        ("repetition", "all of it new", {}, 0.0),
    ],
)
def test_a_built_in_reward_of_an_answer(entry, completion, row, value):
    assert reward(entry, completion, **row) == value


@pytest.mark.parametrize(
    ("entry", "said"),
    [
        ("exakt", "'exakt' is no kind of reward; did you mean 'exact'?"),
        ({"kind": "numeric", "tolerence": 1}, "has no 'tolerence'; did you mean 'tolerance'?"),
        ({"kind": "format", "tag": ["a"]}, "has no 'tag'; did you mean 'tags'?"),
        ({"kind": "format", "tags": "answer"}, "tags is 'answer'; expected a list of words"),
        ({"kind": "repetition", "n": 0}, "n is 0; expected a whole number from 1"),
        ({"kind": "exact", "weight": "much"}, "weight is 'much'; expected a number"),
        ({"kind": "exact", "limit": 0}, "limit is 0; expected a number of seconds above 0"),
        ({"kind": "judge", "url": "http://x"}, "needs 'model', a text"),
        ({"weight": 2}, "expected one with 'kind'"),
        ({"function": "a.b", "answer": 3}, "'answer' cannot be given to a function"),
    ],
)
def test_an_entry_that_is_no_reward_is_told_before_anything_starts(entry, said):
    with pytest.raises(BadInput) as caught:
        read_spec(entry)
    assert said in str(caught.value)


def test_a_name_with_a_slash_is_a_reward_model():
    assert read_spec("org/reward-1b") == RewardSpec("model", "model", {"path": "org/reward-1b"}, seconds=120.0)


def test_a_reference_that_is_missing_is_told():
    with pytest.raises(BadInput, match="needs the prompt's 'reference'"):
        reward("exact", "Paris")
    with pytest.raises(BadInput, match="the row has no 'solution' to hold an answer against; it has city"):
        reward({"kind": "exact", "reference": "solution"}, "Paris", city="Paris")


def test_code_is_run_confined_with_tests_from_the_row_and_reaches_no_network():
    entry = {"kind": "code", "from_row": {"tests": "unit_tests"}}
    right = "```python\ndef double(n):\n    return 2 * n\n```"
    online = "```python\nimport socket\ndef double(n):\n    socket.create_connection(('127.0.0.1', 9))\n    return 2 * n\n```"
    with Rewards([read_spec(entry)]) as rewards:
        scores = rewards.score(of(right, right.replace("2", "3"), online, unit_tests="assert double(4) == 8"))
        refused = rewards.score(
            of(
                "```python\nimport socket\n\ndef double(n):\n    return 8\n```",
                unit_tests="try:\n    socket.socket()\n    assert False\nexcept PermissionError:\n    pass",
            )
        )
    assert values(scores) == [[1.0], [0.0], [0.0]]
    assert values(refused) == [[1.0]]  # the network was refused, which is what this test of the code asks for


# -- arithmetic, by hand


def test_rewards_are_added_up_by_weight_and_what_does_not_apply_is_left_out():
    scores = np.array([[1.0, 2.0], [np.nan, 2.0], [1.0, np.nan], [np.nan, np.nan]])
    found = combine(scores, np.array([1.0, 0.5]))
    np.testing.assert_allclose(found[:3], [2.0, 1.0, 1.0])
    assert np.isnan(found[3])


def test_none_does_not_apply_and_is_told_apart_from_zero(folder):
    with Rewards(named(folder, "sometimes")) as rewards:
        found = as_array(rewards.score(of("", "x")))
    assert np.isnan(found[0, 0])
    assert found[1, 0] == 1.0
