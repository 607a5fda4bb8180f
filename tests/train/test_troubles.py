"""Rewards that fail in a run: counted in every step, told with their first traceback, and the end of a run where nothing else comes."""

import io

import pytest
from rich.console import Console

from ropewalk.errors import TrainingStopped
from ropewalk.train import outage, progress
from ropewalk.train.progress import Screen
from ropewalk.train.run_plots import plots_of
from train.rewarded import events, fit, steps

FAILING = """
import os
from pathlib import Path


def late(completion, completion_ids):
    mark = Path(__file__).with_name("died")
    if not mark.exists():
        mark.touch()
        os._exit(7)
    if completion_ids[0] % 5 < 3:
        raise ValueError(f"no idea of {completion_ids[0]}")
    return sum(id > 130 for id in completion_ids) / 8


def never(completion):
    raise ValueError("no idea of anything")
"""


def test_failures_and_replaced_workers_are_counted_and_told_with_their_traceback(rewarded, tmp_path):
    path = rewarded(max_steps=2, val_set_size=4)
    (tmp_path / "rewards.py").write_text(FAILING)
    fit(path)
    found = events(tmp_path / "run", "failures")
    before, first = found[:2]  # an evaluation of what is there at first, which the worker dies in, and a step
    assert (before["step"], before["evaluation"], before["samples"], before["workers_replaced"]) == (0, True, 4, 1)
    (died,) = before["replaced"]
    assert died.startswith("reward worker 1 (process ")
    assert died.endswith("died (exit code 7)")
    assert (first["step"], first["samples"], first["replaced"], first["workers_replaced"]) == (1, 16, [], 0)
    failed = first["failed"]["late"]
    assert 4 <= failed <= 15
    assert 'rewards.py", line 12, in late' in first["errors"]["late"]
    assert "ValueError: no idea of" in first["errors"]["late"]
    assert steps(tmp_path / "run")[0]["failed"] == failed / 16
    assert events(tmp_path / "run", "eval")[0]["failed"] == before["failed"]["late"] / 4
    assert [e["step"] for e in found] == sorted(e["step"] for e in found)


def test_a_reward_that_does_nothing_but_fail_for_several_steps_ends_the_run(rewarded, tmp_path, monkeypatch):
    monkeypatch.setattr(outage, "MOST_FAILURES", 20)
    path = rewarded({"reward_funcs": [f"{tmp_path}/rewards.py:never"]}, max_steps=4)
    (tmp_path / "rewards.py").write_text(FAILING)
    with pytest.raises(TrainingStopped, match=r"(?s)'never' failed 20 times in a row; the last time: .*no idea of anything"):
        fit(path)
    assert [step["failed"] for step in steps(tmp_path / "run")] == [1.0]
    assert [e["failed"] for e in events(tmp_path / "run", "failures")] == [{"never": 16}]


def failures(step, **more):
    told = {
        "failed": {"late": 9},
        "samples": 16,
        "errors": {"late": "Traceback\nValueError: no"},
        "replaced": [],
        "workers_replaced": 0,
    }
    return {"step": step, **told, **more}


def test_the_screen_tells_a_traceback_once_and_stops_telling_after_a_while(monkeypatch):
    monkeypatch.setattr(progress, "MOST_TOLD", 3)
    screen = Screen("run", 9)
    screen.console = Console(file=(out := io.StringIO()), width=200)
    for step in range(1, 6):
        screen.failed(
            failures(
                step, replaced=["reward worker 1 (process 5) died (SIGSEGV)"][: step == 2], workers_replaced=3 * (step == 2)
            )
        )
    screen.failed(failures(6, failed={"late": 1, "Env": 2}, errors={"late": "again", "Env": "KeyError: 3"}, evaluation=True))
    assert out.getvalue().splitlines() == [
        "step 1  late failed on 9 of 16 completions",
        "  Traceback",
        "  ValueError: no",
        "step 2  late failed on 9 of 16 completions",
        "step 2  reward worker 1 (process 5) died (SIGSEGV) and was replaced",
        "step 2  2 more workers were replaced",
        "step 3  late failed on 9 of 16 completions",
        "further failures are written down in events.jsonl alone, and counted in every step as failed",
        "step 6, evaluation  late failed on 1 of 16 completions",
        "step 6, evaluation  Env failed on 2 of 16 completions",
        "  KeyError: 3",
    ]


def test_failures_are_drawn_where_there_are_any():
    step = {"event": "step", "step": 1, "loss": 0.0, "learning_rate": 1.0, "tokens_per_second": 1.0, "reward": 0.5}
    assert "Completions whose rewards failed" not in plots_of([step | {"failed": 0.0}])["reward.svg"]
    assert (
        "Completions whose rewards failed"
        in plots_of([step | {"failed": 0.0}, step | {"step": 2, "failed": 0.6}])["reward.svg"]
    )
