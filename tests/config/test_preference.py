"""The keys of training by preferences: what contradicts itself is said with its way out."""

import pytest

from ropewalk.config.preference import KEYS_OF, METHODS
from ropewalk.config.run import Run, ignored_keys, parse_run
from ropewalk.errors import ConfigError

BASE = "base_model: b\nlearning_rate: 1e-4\ndatasets:\n  - path: rows.jsonl\n    type: chat_template\nadapter: lora\n"


@pytest.mark.parametrize("method", METHODS)
def test_every_method_is_accepted(method):
    assert parse_run(BASE + f"rl: {method}\nrl_beta: 0.2\n").rl_beta == 0.2


def test_keys_are_known_by_their_other_names_and_as_one_or_several():
    run = parse_run(BASE + "rl: dpo\ndpo_beta: 0.3\ndpo_loss_type: hinge\n")
    assert (run.rl_beta, run.dpo_loss_type) == (0.3, ("hinge",))
    assert parse_run(BASE + "rl: dpo\ndpo_loss_type: [sigmoid, ipo]\n").dpo_loss_type == ("sigmoid", "ipo")


def test_every_key_of_a_method_is_a_key():
    assert set(KEYS_OF) <= set(Run.model_fields)


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ("simpo_gamma: 0.7\n", "key 'simpo_gamma' is for rl: simpo; add that, or remove the key"),
        ("rl: dpo\nkto_desirable_weight: 2\n", "key 'kto_desirable_weight' is for rl: kto"),
        ("rl: dpo\nlora_model_dir: a\n", "merge it first (`ropewalk merge`)"),
        ("rl: kto\nstreaming: true\nmax_steps: 3\n", "rl: kto cannot be streamed; name datasets"),
        ("rl: orpo\ntrain_on_inputs: true\n", "compares answers alone; remove train_on_inputs"),
        ("rl: dpo\ndpo_loss_type: [ipo, hinge]\ndpo_loss_weights: [1]\n", "has 1 weights for 2 of dpo_loss_type"),
        ("rl: dpo\ndpo_loss_type: robust\n", "robust needs dpo_label_smoothing"),
        ("rl: dpo\ndpo_label_smoothing: 0.5\n", "0.5 is not less than 0.5"),
        ("rl: dpp\n", "did you mean 'dpo'?"),
    ],
)
def test_contradictions_are_one_message_with_a_way_out(more, said):
    with pytest.raises(ConfigError) as caught:
        parse_run(BASE + more)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_what_compares_with_the_base_cannot_begin_from_random_weights():
    whole = BASE.replace("adapter: lora\n", "reinit_weights: true\n")
    with pytest.raises(ConfigError, match="compares with the base, which new random weights are not; remove reinit_weights"):
        parse_run(whole + "rl: dpo\n")
    assert parse_run(whole + "rl: simpo\n").rl == "simpo"


def test_columns_of_answers_without_a_method_are_told():
    with pytest.raises(ConfigError, match="is for preferences; add rl: dpo, orpo, simpo or kto"):
        parse_run(BASE, ["datasets.0.field_chosen=good"])


def test_what_is_not_needed_is_listed():
    ignored = ignored_keys(parse_run(BASE + "rl: dpo\nprecompute_ref_log_probs: true\ndpo_padding_free: true\n"))
    assert "adapter switched off" in ignored["precompute_ref_log_probs"]
    assert "packed tokens" in ignored["dpo_padding_free"]
