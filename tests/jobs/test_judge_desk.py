"""A job's judges: the socket asks the models that the job named, as its owner, and no other."""

import asyncio

from ropewalk.errors import Overloaded, UpstreamFailed
from ropewalk.jobs.judge_desk import PLACE, URL, JudgeDesk
from ropewalk.tenants.caller import Caller
from ropewalk.train import reward_judge
from ropewalk.train.reward_judge import judge

OWNER = Caller("org", "workspace", None)


def marked(monkeypatch, tmp_path, asks, *completions, model="big"):
    """What the reward gives for these, with a desk that asks so."""

    async def run():
        async with JudgeDesk(asks, OWNER, ["big"]).opened() as place:
            monkeypatch.setenv(PLACE, str(place))
            reward = judge({"url": URL, "model": model, "least": 1, "most": 5, "cache": str(tmp_path / "marks.sqlite")})
            found = await asyncio.gather(*(reward(one, prompt="Why?") for one in completions), return_exceptions=True)
        assert not place.parent.exists()
        return found

    return asyncio.run(run())


def test_the_model_is_asked_as_the_jobs_owner_and_its_mark_is_kept(monkeypatch, tmp_path):
    asked = []

    async def asks(caller, model, words, least, most):
        asked.append((caller, model, least, most))
        assert "Because" in words
        return '{"mark": 4}'

    assert marked(monkeypatch, tmp_path, asks, "Because", "Because") == [0.75, 0.75]
    assert marked(monkeypatch, tmp_path, asks, "Because") == [0.75]
    assert asked == [(OWNER, "big", 1.0, 5.0)]


def test_a_model_that_is_being_loaded_is_waited_for(monkeypatch, tmp_path):
    busy = [Overloaded("big is being loaded")]
    busy[0].retry_after = 0.01

    async def asks(*_):
        if busy:
            raise busy.pop()
        return '{"mark": 5}'

    assert marked(monkeypatch, tmp_path, asks, "x") == [1.0]


def test_what_the_desk_does_not_do_is_an_answer_without_a_mark(monkeypatch, tmp_path):
    async def asks(*_):
        return "I would say four."

    [error] = marked(monkeypatch, tmp_path, asks, "x")
    assert isinstance(error, UpstreamFailed)
    [error] = marked(monkeypatch, tmp_path, asks, "x", model="another")
    assert "no judge of this job; it has big" in str(error)


def test_the_two_ends_have_the_same_words_for_it():
    assert (reward_judge.SERVER, reward_judge.SOCKET) == (URL, PLACE)
