"""The keys of reward models: what they need, what cannot stand beside them, and what is listed where nothing reads it."""

import pytest

from ropewalk.config.preference import held
from ropewalk.config.run import ignored_keys, parse_run
from ropewalk.errors import ConfigError

BASE = "base_model: b\nlearning_rate: 1e-4\ndatasets:\n  - path: rows.jsonl\n    type: {type}\n"
RANKED, STEPS = BASE.format(type="bradley_terry.chat_template"), BASE.format(type="stepwise_supervised")


def test_what_a_row_holds_follows_from_the_key():
    assert held(parse_run(RANKED + "reward_model: true\nnum_labels: 1\n")) == "ranked"
    assert held(parse_run(BASE.format(type="chatml.intel") + "reward_model: true\n")) == "ranked"
    assert held(parse_run(STEPS + "process_reward_model: true\nnum_labels: 2\n")) == "steps"
    assert held(parse_run(BASE.format(type="alpaca"))) is None


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (RANKED, "'bradley_terry.chat_template' is for reward_model: true; add that"),
        (STEPS, "stepwise_supervised is for process_reward_model: true; add that"),
        (RANKED + "process_reward_model: true\n", "process_reward_model reads type: stepwise_supervised; write that"),
        (STEPS + "process_reward_model: true\nreward_model: true\n", "exclude each other; keep one"),
        (RANKED + "reward_model: true\nrl: dpo\nadapter: lora\n", "and rl: dpo one that writes; keep one of them"),
        (RANKED + "reward_model: true\nnum_labels: 2\n", "a model under reward_model has 1, not 2; remove it"),
        (RANKED + "reward_model: true\nstreaming: true\nmax_steps: 3\n", "reward_model cannot be streamed; name datasets"),
        (RANKED + "reward_model: true\ntrain_on_inputs: true\n", "scores the end of an answer or step; remove train_on_inputs"),
        (RANKED + "    max_completion_length: 5\nreward_model: true\n", "is for type: stepwise_supervised; remove it"),
    ],
)
def test_what_cannot_go_together_is_told_with_the_way_out(text, said):
    with pytest.raises(ConfigError) as caught:
        parse_run(text)
    assert said in str(caught.value)


def test_what_nothing_reads_is_listed():
    ignored = ignored_keys(parse_run(BASE.format(type="alpaca") + "num_labels: 1\ncenter_rewards_coefficient: 0.1\n"))
    assert "reward_model: true is one" in ignored["num_labels"]
    assert "reward_model: true is one" in ignored["center_rewards_coefficient"]
    assert "num_labels" not in ignored_keys(parse_run(RANKED + "reward_model: true\nnum_labels: 1\n"))
