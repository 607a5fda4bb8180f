"""Episodes over several turns: ids stay as they were sampled, and the environment's are never trained."""

import importlib.util
from concurrent.futures import Future
from pathlib import Path

import pytest
import torch

from ropewalk.chat.template import Template
from ropewalk.train.environment import Failed, Generated, Limits, Step, play, run_episode, single
from ropewalk.train.talk import TemplateTalk

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
        return Generated(said, [-0.5] * len(said), [3] * len(said), end)

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
    assert found.versions == [3 if own else 0 for own in found.trained]
    assert (found.reward, found.end, found.ended, found.replies) == (1.0, "done", True, ["50", "Is it 42?"])
    assert not any(found.trained[: found.prompt])


def test_ids_that_tokenising_would_not_give_are_kept(talk, game):
    spelt = [talk.template.encode(letter)[0] for letter in "50"]

    def generate(ids):
        return Generated([*spelt, 0, 2], [-0.1] * 4, [0] * 4, True)  # an id in the middle that no text has

    found = run_episode(game(), {"number": 1}, talk, generate, Limits(turns=1))
    assert found.ids[found.prompt :] == [*spelt, 0, 2]
    assert found.end == "turns"


def test_a_reply_without_an_end_is_given_one_that_is_not_trained(talk, game):
    found = run_episode(game(), {"number": 2}, talk, says(talk, "1", "2", end=False))
    text = talk.template.decode(found.ids[found.prompt :], skip_special_tokens=False)
    assert text == "1<|im_end|>\n<|im_start|>user\nhigher<|im_end|>\n<|im_start|>assistant\n2"
    assert (sum(found.trained), found.ended) == (2, False)


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
            one.send(Generated([*talk.template.encode(reply), 2], [0.0, 0.0], [0, 0], True))
        ends.append(stopped.value.value.end)
    assert ends == ["done", "done"]


def test_a_plain_completion_is_an_episode_of_one_turn():
    found = single([5, 6], Generated([7, 2], [-0.1, -0.2], [4, 5], True, routed(3)), "seven")
    assert (found.ids, found.trained, found.prompt) == ([5, 6, 7, 2], [False, False, True, True], 2)
    assert (found.logprobs, found.versions) == ([0.0, 0.0, -0.1, -0.2], [0, 0, 4, 5])
    assert (found.replies, found.reward, found.end, found.ended) == (["seven"], 0.0, "done", True)
    assert found.routing[:, 0, 0].tolist() == [0, 1, 2, -1]  # the last id was never read
    assert single([5], Generated([7], [-0.1], [0], False), "seven").end == "tokens"
    with pytest.raises(ValueError, match="1 log-probs and 2 versions for 2 ids"):
        single([5], Generated([7, 2], [-0.1], [0, 0], True), "seven")


def test_the_routing_of_an_id_is_that_of_its_first_reading(talk, game):
    lengths = []

    def generate(ids):
        lengths.append(len(ids) + 2)
        said = [*talk.template.encode("1" if len(lengths) == 1 else "2"), 2]
        routing = routed(lengths[-1] - 1, 10 * len(lengths))
        routing[1] = -1  # came from what was read before, by another request
        return Generated(said, [0.0, 0.0], [0, 0], True, routing)

    found = run_episode(game(), {"number": 2}, talk, generate)
    first, second = lengths
    known = found.routing[:, 0, 0].tolist()
    assert (found.end, found.routing.shape) == ("done", (second, 2, 3))
    assert known == [10, -1, *range(12, 10 + first - 1), *range(20 + first - 1, 20 + second - 1), -1]


def test_an_environment_elsewhere_is_waited_for_and_its_failure_ends_the_episode(talk):
    class Elsewhere:
        def __init__(self):
            self.answers = [Future(), Future(), Future()]
            self.coming = iter(self.answers)

        def reset(self, row):
            return next(self.coming)

        def step(self, reply):
            return next(self.coming)

    env = Elsewhere()
    playing = play(env, {}, talk)
    assert next(playing) is env.answers[0]
    ids = playing.send([{"role": "user", "content": "?"}])
    assert talk.template.decode(ids).endswith("?\nassistant\n")
    said = Generated([*talk.template.encode("a"), 2], [0.0, 0.0], [0, 0], True)
    assert playing.send(said) is env.answers[1]
    assert len(playing.send(Step([{"role": "user", "content": "!"}], reward=0.5))) > len(ids)
    assert playing.send(said) is env.answers[2]
    with pytest.raises(StopIteration) as stopped:
        playing.send(Failed("it hung"))
    found = stopped.value.value
    assert (found.end, found.reward, found.error, sum(found.trained)) == ("failed", 0.0, "it hung", 4)


def routed(length, first=0):
    """Row i of expert first + i."""
    return torch.arange(first, first + length, dtype=torch.int16)[:, None, None].repeat(1, 2, 3)
