"""What people see of a run: lines, panel, plots and the page of samples, from the measures that events hold."""

import io
import json
import math
import re
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from rich.console import Console

from ropewalk.config.reinforcement import TrlKeys
from ropewalk.config.run import ignored_keys, load_run
from ropewalk.train.distributed import World
from ropewalk.train.headlines import end_line, evaluation_line, panel_rows, step_line
from ropewalk.train.policy_losses import METHODS
from ropewalk.train.progress import EventLog, Screen, write_plots
from ropewalk.train.report import Report
from ropewalk.train.run_plots import plots_of
from ropewalk.train.samples_page import samples_page

ALWAYS = {"step": 3, "epoch": 0.5, "loss": 0.25, "learning_rate": 1e-3, "gradient_norm": 0.5, "tokens_per_second": 900.0,
          "seconds": 2.0, "memory": 600e6}  # fmt: skip
REWARDED = ALWAYS | {
    "reward": 0.625, "reward_std": 0.3, "rewards/correct": 0.5, "rewards/form": 0.75, "length": 14.25, "length_max": 40, "ended": 0.875, "failed": 0.0,
    "entropy": 0.31, "ratio": 1.002, "clipped": 0.03, "kl": 0.01, "dropped": 0.0, "mismatch": 0.00012, "staleness": 0.8,
    "staleness_max": 2, "varied": 0.5, "generate_seconds": 1.0, "wait_rollouts_seconds": 0.5, "wait_trainer_seconds": 0.0,
    "decode_tokens_per_second": 412.4,
}  # fmt: skip
PREFERRED = ALWAYS | {"rewards/chosen": 0.2, "rewards/rejected": -0.1, "rewards/margins": 0.3, "rewards/accuracies": 0.75}
PAGE = (Path(__file__).parents[2] / "docs" / "grpo.md").read_text(encoding="utf-8")
SVG = "{http://www.w3.org/2000/svg}"


def sample(prompt="2 + 2?", completion="4", reward=1.0, advantage=0.5, **rewards):
    return {"prompt": prompt, "completion": completion, "reward": reward, "rewards": rewards, "advantage": advantage}


def test_the_line_of_a_rewarded_step_tells_reward_policy_age_and_waiting():
    assert step_line(REWARDED, 40, "0:00:41") == (
        "step 3/40  reward 0.625 (correct 0.500, form 0.750)  length 14.2, 88% ended  entropy 0.310  ratio 1.002, 3% clipped  "
        "0.80 versions behind  waiting: trainer 25%, generator 0%  412 tok/s decoded  600 MB  0:00:41 left"
    )


def test_a_single_reward_is_not_told_twice_and_one_that_says_nothing_is_a_dash():
    one = {k: v for k, v in REWARDED.items() if k != "rewards/form"}
    assert "reward 0.625  length" in step_line(one, 40, "0:00:41")
    assert "(correct 0.500, form -)" in step_line(REWARDED | {"rewards/form": float("nan")}, 40, "0:00:41")


def test_lines_of_supervised_and_preference_steps_tell_their_loss():
    assert step_line(ALWAYS, 40, "0:01:00") == "step 3/40  loss 0.2500  lr 1.00e-03  900 tok/s  600 MB  0:01:00 left"
    assert step_line(PREFERRED, 40, "0:01:00").endswith("0:01:00 left  margin 0.300  accuracy 0.750")


def test_an_evaluation_by_rewards_has_no_loss_to_tell():
    told = evaluation_line({"step": 4, "reward": 0.9, "rewards/a": 0.8, "rewards/b": 1.0, "length": 12.0, "ended": 1.0})
    assert told == "step 4  evaluation reward 0.900 (a 0.800, b 1.000)  length 12.0, 100% ended"
    told = evaluation_line({"step": 4, "loss": 0.5, "trained": 20, "best": True})
    assert told == "step 4  evaluation loss 0.5000 over 20 tokens  (best so far)"


def test_the_end_is_told_by_loss_or_by_what_the_first_and_the_last_steps_were_given():
    told = end_line([ALWAYS | {"loss": loss} for loss in (2.0, 1.0, 0.5)])
    assert told == "loss 2.0000 -> 0.5000 in 3 steps"
    steps = [REWARDED | {"reward": n / 10} for n in range(10)]  # means of 0, .1, ... .4 and of .5, .6, ... .9
    assert end_line(steps) == "reward 0.200 -> 0.700 (first and last 5 of 10 steps)"
    assert end_line([]) == "no step"


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (REWARDED, ["correct", "0.500", "0.860", "ended", "88%", "groups that teach", "trainer waits", "25%", "412", "0.80, at most 2"]),
        (PREFERRED, ["margin", "0.300", "accuracy", "0.750", "evaluation"]),
        (ALWAYS, ["loss", "0.2500", "tokens/s", "600 MB"]),
    ],
)  # fmt: skip
def test_the_panel_shows_what_the_run_measures(values, expected):
    cells = [cell for row in panel_rows(values, {"rewards/correct": 0.86}, 40, "0:00:41") for cell in row]
    assert set(expected) <= set(cells)


def test_the_live_panel_is_drawn_in_a_terminal(monkeypatch):
    out = io.StringIO()
    screen = Screen("grpo-tiny", 40)
    screen.console = Console(file=out, force_terminal=True, width=120)
    screen._last = REWARDED
    screen.console.print(screen._panel())
    assert "grpo-tiny" in out.getvalue()
    assert "versions behind" in out.getvalue()


def test_the_plots_are_those_that_the_log_has_measures_of():
    common = {"loss.svg", "throughput.svg", "rate.svg"}
    assert set(plots_of([{"event": "step", **ALWAYS}])) == common
    assert set(plots_of([{"event": "step", **PREFERRED}])) == common | {"rewards.svg", "accuracy.svg"}
    named = {f"{name}.svg" for name in ("reward", "length", "entropy", "ratio", "staleness", "waiting")}
    assert set(plots_of([{"event": "step", **REWARDED}])) == common | named
    few = ALWAYS | {"reward": 0.5, "length": 3.0}
    assert set(plots_of([{"event": "step", **few}])) - common == {"reward.svg", "length.svg"}


def test_a_plot_of_several_parts_has_a_curve_for_each_measure_and_one_for_the_evaluation():
    log = [{"event": "step", **REWARDED | {"step": n, "reward": n / 4}} for n in (1, 2, 3)]
    log.append({"event": "eval", "step": 3, "reward": 0.9, "length": 10.0, "ended": 1.0})
    tree = ElementTree.fromstring(plots_of(log)["reward.svg"])
    parts = tree.findall(f"{SVG}svg")
    points = [[len(curve.get("points").split()) for curve in part.findall(f"{SVG}polyline")] for part in parts]
    assert points == [[3, 1], [3, 3], [3]]  # training and evaluation; correct and form; groups that teach
    texts = {text.text for tag in ("text", "tspan") for text in tree.iter(SVG + tag)}
    assert {"training", "evaluation", "correct", "form", "Groups that teach"} <= texts


def test_the_page_shows_the_newest_and_the_first_steps_with_everything_escaped():
    log = [{"event": "samples", "step": n, "samples": [sample(completion=f"<b>{n}</b>")]} for n in range(1, 21)]
    page = samples_page(log, "a <run>")
    shown = [int(n) for n in re.findall(r"&lt;b&gt;(\d+)&lt;/b&gt;", page)]
    assert shown == [*range(20, 8, -1), 3, 2, 1]
    assert "5 more steps" in page
    assert "<b>" not in page
    assert "a &lt;run&gt;" in page


def test_completions_of_one_prompt_stand_together_the_best_first_with_their_rewards():
    samples = [
        sample("one", "bad", 0.25, -0.75, form=0.25, right=None),
        sample("two", "alone", 0.0, 0.0, form=0.0, right=0.0),
        sample("one", "good", 2.0, 1.5, form=1.0, right=1.0),
    ]
    page = samples_page([{"event": "samples", "step": 1, "samples": samples}], "r")
    assert page.index(">one<") < page.index(">good<") < page.index(">bad<") < page.index(">two<")
    assert [page.index(f">{name}<") > 0 for name in ("form", "right", "2.00", "-", "+1.50", "-0.75")] == [True] * 6


def test_a_log_without_samples_has_no_page(tmp_path):
    assert samples_page([{"event": "step", **REWARDED}], "r") == ""
    log = EventLog(tmp_path / "events.jsonl")
    log.write("step", **ALWAYS)
    write_plots(tmp_path / "events.jsonl", tmp_path / "plots")
    assert not (tmp_path / "samples.html").exists()
    log.write("samples", step=3, samples=[sample(prompt=[{"role": "user", "content": "2 + 2?"}])])
    write_plots(tmp_path / "events.jsonl", tmp_path / "plots")
    log.close()
    assert "user: 2 + 2?" in (tmp_path / "samples.html").read_text()
    assert json.loads((tmp_path / "events.jsonl").read_text().splitlines()[0])["event"] == "step"


@pytest.mark.parametrize("name", sorted(TrlKeys.model_fields))
def test_every_key_of_trl_is_explained_on_the_page(name):
    assert f"`{name}`" in PAGE or f"`{name}: " in PAGE  # or with a value


@pytest.mark.parametrize("name", sorted(METHODS))
def test_every_method_is_on_the_page(name):
    assert f"`{name}`" in PAGE


def test_every_plot_of_a_rewarded_run_is_explained_on_the_page():
    log = [{"event": "step", **REWARDED}]
    assert [
        name for name in plots_of(log) if f"`{name}`" not in PAGE and name not in plots_of([{"event": "step", **ALWAYS}])
    ] == []


def test_the_configuration_on_the_page_is_one(tmp_path):
    (block,) = re.findall(r"```yaml\n(.*?)```", PAGE, re.DOTALL)
    (tmp_path / "grpo.yml").write_text(block)
    run = load_run(tmp_path / "grpo.yml")
    assert (run.by_rewards, run.trl.generation_batch_size, ignored_keys(run)) == (True, 64, {})


def test_the_best_and_the_worst_are_written_down_of_prompts_that_teach_before_others():
    def group(name):
        episodes = [SimpleNamespace(ids=[1, 2], prompt=1, replies=[f"{name}{n}"]) for n in range(3)]
        return SimpleNamespace(episodes=episodes, scores=np.zeros((3, 1)))

    totals = np.array([1.0, 1.0, 1.0, 0.2, 0.9, math.nan, 0.0, 0.0, 0.0])
    found = SimpleNamespace(mine=slice(0, 9), total=totals)
    advantage = torch.tensor([0.0, 0.0, 0.0, -0.5, 0.5, 0.0, 0.0, 0.0, 0.0])
    report = Report(["late"], SimpleNamespace(decode=lambda ids: "asked"), World())
    shown = report.samples([group("a"), group("b"), group("c")], found, advantage)
    assert [(one["completion"], one["reward"], one["advantage"]) for one in shown] == [
        ("b1", 0.9, 0.5),
        ("b0", 0.2, -0.5),
        ("a0", 1.0, 0.0),
    ]
