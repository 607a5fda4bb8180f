"""The task "four skills, one rewarded": its rows, its reward, and that a warm start is neither right nor lost."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest

from ropewalk.chat.template import Template
from ropewalk.train.reward_builtins import build, read_spec

FOLDER = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture(scope="module")
def task():
    sys.path.insert(0, str(FOLDER))
    try:
        import four_skills_task

        yield four_skills_task
    finally:
        sys.path.remove(str(FOLDER))


def test_no_prompt_is_held_out_and_trained_on(task):
    train, held = task.prompts()
    assert (train.shape, held.shape) == ((3584, 6), (512, 6))
    assert len({tuple(row) for row in np.concatenate([train, held])}) == 4096
    assert (train[:, 0] == task.BOS).all()
    assert (train[:, -1] == task.SEP).all()
    assert (task.prompts(1)[1] != held).any()


def test_the_skills_and_the_reward_by_hand(task):
    asked = np.array([[1, 7, 4, 6, 5, 3]])  # d a c b
    assert task.skills(asked).tolist() == [[[5, 6, 4, 7], [7, 4, 6, 5], [4, 5, 6, 7], [4, 6, 5, 7]]]
    assert task.targets(asked).tolist() == [[5, 6, 4, 7, 2]]
    right, copied = [5, 6, 4, 7, 2, 9], [7, 4, 6, 5, 2, 0]
    endless, early = [5, 6, 4, 7, 4, 2], [5, 6, 4, 2, 0, 0]
    for completion, value in ((right, 1), (copied, 0), (endless, 0), (early, 0)):
        assert task.rewarded(asked, np.array([completion])).tolist() == [value]


def test_a_demonstration_is_the_rewarded_one_about_a_fifth_of_the_time(task):
    train, _ = task.prompts()
    share = task.rewarded(train, task.demonstrations(train)).mean()
    assert 0.18 < share < 0.25  # a quarter, times 0.95 ** 4, and where another skill gives the same


def test_as_files_the_task_has_the_same_ids_and_the_same_reward(task, tmp_path):
    task.write_task(tmp_path)
    train, held = task.prompts()
    template = Template.load(tmp_path)
    rows = [json.loads(line) for line in (tmp_path / "held_out.jsonl").read_text().splitlines()]
    assert len(rows) == 512
    for row, ids, target in zip(rows[:20], held, task.targets(held)):
        assert template.render(row["prompt"], add_generation_prompt=True).ids == ids.tolist()
        assert template.encode(row["answer"]) == target[:-1].tolist()
    shown = [json.loads(line) for line in (tmp_path / "warm_start.jsonl").read_text().splitlines()]
    assert template.render(shown[0]["messages"]).ids == [*train[0].tolist(), *task.demonstrations(train)[0].tolist()]
    reward = build(read_spec("four_skills_task.py:reverse", [str(FOLDER)])).call
    text = template.decode(task.targets(held)[0])
    assert reward(text, rows[0]["answer"], task.targets(held)[0].tolist()) == 1
    assert reward(text, rows[0]["answer"], [*task.targets(held)[0].tolist()[:-1], 4]) == 0
    assert reward(text[:-2], rows[0]["answer"], [4, 4, 4, 2]) == 0


def test_the_model_is_as_small_as_it_says(task):
    assert sum(weight.numel() for weight in task.new_model().parameters()) == pytest.approx(133_000, rel=0.05)
