"""Episodes over several turns: ids stay as they were sampled, and the environment's are never trained."""

import importlib.util
from pathlib import Path

import pytest

from ropewalk.chat.template import Template
from ropewalk.train.environment import Limits, Step, TemplateTalk, play, run_episode

EXAMPLE = Path(__file__).parents[2] / "examples" / "guess_number.py"


@pytest.fixture(scope="module")
def talk(base):
    return TemplateTalk(Template.load(base))


@pytest.fixture(scope="module")
def game():
    spec = importlib.util.spec_from_file_location("guess_number", EXAMPLE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.GuessNumber


def says(talk, *replies, end=True):
    """A model that says these, in turn."""
    coming = iter(replies)

    def generate(ids):
        said = talk.template.encode(next(coming)) + ([2] if end else [])
        return said, [-0.5] * len(said)

    return generate


def test_an_episode_is_the_conversation_as_the_template_writes_it_and_only_replies_are_trained(talk, game):
    found = run_episode(game(), {"number": 42}, talk, says(talk, "50", "Is it 42?"))
    turns = [
        {"role": "user", "content": "I think of a number from 1 to 100. Guess it."},
        {"role": "assistant", "content": "50"},
        {"role": "user", "content": "lower"},
        {"role": "assistant", "content": "Is it 42?"},
    ]
    whole = talk.template.render(turns).ids
    assert found.ids == whole[: len(found.ids)]
    assert talk.template.decode(whole[len(found.ids) :]) == "\n"  # which the template writes after the last end
    trained = [id for id, own in zip(found.ids, found.trained) if own]
    assert talk.template.decode(trained, skip_special_tokens=False) == "50<|im_end|>Is it 42?<|im_end|>"
    assert [value for value, own in zip(found.logprobs, found.trained) if not own] == [0.0] * found.trained.count(False)
    assert {value for value, own in zip(found.logprobs, found.trained) if own} == {-0.5}
    assert (found.reward, found.end, found.replies) == (1.0, "done", ["50", "Is it 42?"])
    assert not any(found.trained[: found.prompt])


def test_ids_that_tokenising_would_not_give_are_kept(talk, game):
    spelt = [talk.template.encode(letter)[0] for letter in "50"]

    def generate(ids):
        return [*spelt, 0, 2], [-0.1] * 4  # an id in the middle that no text has

    found = run_episode(game(), {"number": 1}, talk, generate, Limits(turns=1))
    assert found.ids[found.prompt :] == [*spelt, 0, 2]
    assert found.end == "turns"


def test_a_reply_without_an_end_is_given_one_that_is_not_trained(talk, game):
    found = run_episode(game(), {"number": 2}, talk, says(talk, "1", "2", end=False))
    text = talk.template.decode(found.ids[found.prompt :], skip_special_tokens=False)
    assert text == "1<|im_end|>\n<|im_start|>user\nhigher<|im_end|>\n<|im_start|>assistant\n2"
    assert sum(found.trained) == 2


def test_rewards_add_up_and_turns_and_tokens_are_bounded(talk, game):
    found = run_episode(game(), {"number": 7}, talk, says(talk, "none", "none", "7"), Limits(turns=2))
    assert (found.end, len(found.replies)) == ("turns", 2)
    assert found.reward == pytest.approx(-0.2)
    found = run_episode(game(), {"number": 7}, talk, says(talk, "1", "7"), Limits(tokens=found.prompt + 10))
    assert (found.end, len(found.replies)) == ("tokens", 1)
    assert len(found.ids) <= found.prompt + 10


def test_an_environment_that_fails_ends_its_episode_with_its_traceback(talk):
    class Broken:
        def reset(self, row):
            return [{"role": "user", "content": row["question"]}]

        def step(self, reply):
            return Step(reward=1 / 0)

    found = run_episode(Broken(), {"question": "?"}, talk, says(talk, "a"))
    assert (found.end, found.reward) == ("failed", 0.0)
    assert found.error.endswith("ZeroDivisionError: division by zero")
    found = run_episode(Broken(), {}, talk, says(talk, "a"))
    assert (found.end, found.ids) == ("failed", [])
    assert "KeyError: 'question'" in found.error


def test_episodes_are_played_side_by_side(talk, game):
    games = [play(game(), {"number": number}, talk) for number in (1, 2)]
    begun = [next(one) for one in games]
    assert begun[0] == begun[1]
    ends = []
    for one, reply in zip(games, ("1", "2")):
        with pytest.raises(StopIteration) as stopped:
            one.send(([*talk.template.encode(reply), 2], [0.0, 0.0]))
        ends.append(stopped.value.value.end)
    assert ends == ["done", "done"]
