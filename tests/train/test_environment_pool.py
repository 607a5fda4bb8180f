"""Environments in processes of their own: they hang, die and fail, and episodes end instead of the run."""

import os
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from ropewalk.chat.template import Template
from ropewalk.config.run import parse_run
from ropewalk.errors import BadInput, ConfigError, TrainingStopped
from ropewalk.train import outage
from ropewalk.train.environment import Failed, Generated, Step, run_episode
from ropewalk.train.environment_pool import EnvironmentPool, environment_of, limits_of
from ropewalk.train.environment_worker import EnvironmentSpec, load, step_of
from ropewalk.train.rewards import specs_of
from ropewalk.train.talk import TemplateTalk

MODULE = textwrap.dedent(
    """
    import asyncio, os, signal, time
    from ropewalk.train.environment import Step

    ASK = [{"role": "user", "content": "say"}]

    class Obeys:
        living = 0

        def __init__(self):
            Obeys.living += 1

        def reset(self, row):
            self.row, self.said = row, []
            return ASK

        async def step(self, reply):
            await asyncio.sleep(0)
            self.said.append(reply)
            if reply == "hang":
                time.sleep(60)
            if reply == "die":
                os.kill(os.getpid(), signal.SIGSEGV)
            if reply == "raise":
                return self.row["no such column"]
            if reply == "nan":
                return Step(ASK, reward=float("nan"))
            if reply == "odd":
                return [{"role": "user", "content": object()}], 0, False
            if reply == "nothing":
                return Step()
            told = f"{self.said} {self.row} {Obeys.living} {os.getpid()}"
            return [{"role": "user", "content": told}], 0.5, reply == "end"

        def close(self):
            Obeys.living -= 1

    no_class = 3

    class NoStep:
        def reset(self, row):
            return ASK
    """
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with a user's module of environments."""
    folder = tmp_path_factory.mktemp("own")
    (folder / "own_worlds.py").write_text(MODULE)
    return folder


def pool(folder, workers=1, name="own_worlds.Obeys", seconds=5.0):
    return EnvironmentPool(EnvironmentSpec(name, (str(folder),), seconds), workers)


def answers(env, *replies):
    """What it says to these."""
    return [env.step(reply).result(10) for reply in replies]


def test_every_episode_has_an_object_of_its_own_which_ends_with_it(folder):
    with pool(folder) as envs:
        one, other = envs.begin(), envs.begin()
        assert [env.reset({"number": number}).result(10) for number, env in enumerate((one, other))] == [
            [{"role": "user", "content": "say"}]
        ] * 2
        first, second = answers(one, "a", "b")
        (third,) = answers(other, "c")
        assert (first.reward, first.done) == (0.5, False)
        assert second.messages[0]["content"].startswith("['a', 'b'] {'number': 0} 2 ")
        assert third.messages[0]["content"].startswith("['c'] {'number': 1} 2 ")
        one.close()
        assert answers(other, "end")[0].messages[0]["content"].startswith("['c', 'end'] {'number': 1} 1 ")
        assert (envs.failures, envs.replaced) == (0, [])


def test_episodes_are_spread_over_the_processes(folder):
    with pool(folder, workers=2) as envs:
        living = [envs.begin() for _ in range(4)]
        for env in living:
            env.reset({})
        where = [answers(env, "a")[0].messages[0]["content"].split()[-1] for env in living]
        assert sorted(map(int, where)) == sorted(envs.processes * 2)


@pytest.mark.parametrize(("reply", "what"), [("hang", "took longer than 0.5 seconds"), ("die", "died (SIGSEGV)")])
def test_a_process_that_hangs_or_dies_is_named_and_replaced_and_its_episodes_fail(folder, reply, what):
    with pool(folder, seconds=0.5) as envs:
        before = envs.processes[0]
        guilty, idle, waiting = envs.begin(), envs.begin(), envs.begin()
        for env in (guilty, idle, waiting):
            env.reset({}).result(10)
        coming = [guilty.step(reply), waiting.step("a")]
        new = envs.begin()
        begun = new.reset({})  # stands behind them, and is begun in the next process
        said = f"environment 'own_worlds.Obeys': environment worker 1 (process {before}) {what} and was replaced"
        assert [one.result(10) for one in coming] == [Failed(said)] * 2
        assert answers(idle, "a") == [Failed(said)]
        assert begun.result(10)[0]["content"] == "say"
        assert isinstance(answers(new, "a")[0], Step)
        assert envs.failures == 3
        assert envs.processes != [before]
        assert not os.path.exists(f"/proc/{before}")


def test_what_an_environment_does_wrong_is_a_failure_that_says_so(folder):
    with pool(folder) as envs:
        for reply, said in [
            ("raise", "KeyError: 'no such column'"),
            ("nan", "step gave the reward nan; expected a finite number"),
            ("odd", "expected messages of plain data"),
            ("nothing", "step gave no message and is not done"),
        ]:
            env = envs.begin()
            env.reset({}).result(10)
            (failed,) = answers(env, reply)
            assert said in failed.error
            assert "environment_worker.py" not in failed.error
        assert envs.failures == 4


def test_an_environment_that_only_fails_stops_the_run_with_its_error(folder, monkeypatch):
    monkeypatch.setattr(outage, "MOST_FAILURES", 2)
    monkeypatch.setattr(outage, "OUTAGE_SECONDS", 0.0)
    with pool(folder) as envs:
        for reply in ("raise", "a", "raise", "raise"):
            env = envs.begin()
            env.reset({})
            answers(env, reply)
            env.close()
        with pytest.raises(
            TrainingStopped, match=r"(?s)failed 2 episodes in a row, for 0 seconds; the last time: .*no such column"
        ):
            envs.begin()


def test_an_episode_is_played_with_an_environment_elsewhere(base):
    example = Path(__file__).parents[2] / "examples"
    talk = TemplateTalk(Template.load(base))
    coming = iter(["50", "42"])

    def generate(ids):
        said = [*talk.template.encode(next(coming)), 2]
        return Generated(said, [-0.5] * len(said), [0] * len(said), True)

    with pool(example, name="guess_number.py:GuessNumber") as envs:
        found = run_episode(envs.begin(), {"number": 42}, talk, generate)
        assert (found.end, found.reward, found.replies) == ("done", 1.0, ["50", "42"])
        assert not any(envs._living.values())


def test_what_is_asked_of_a_pool_that_ends_is_told(folder):
    envs = pool(folder, seconds=60)
    envs.start()
    env = envs.begin()
    env.reset({}).result(10)
    coming = env.step("hang")
    envs.close()
    with pytest.raises(TrainingStopped, match="environment workers have been ended"):
        coming.result(5)
    env.close()


def test_processes_end_with_a_trainer_that_is_killed_even_in_the_middle_of_a_call(folder):
    code = (
        "import time\n"
        "from ropewalk.train.environment_pool import EnvironmentPool\n"
        "from ropewalk.train.environment_worker import EnvironmentSpec\n"
        f"pool = EnvironmentPool(EnvironmentSpec('own_worlds.Obeys', ({str(folder)!r},), 60.0), 2)\n"
        "pool.start()\n"
        "env = pool.begin()\n"
        "env.reset({}).result(10)\n"
        "env.step('hang')\n"
        "print(*pool.processes, flush=True)\n"
        "time.sleep(60)\n"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as trainer:
        pids = trainer.stdout.readline().split()
        trainer.kill()
    assert len(pids) == 2
    until = time.monotonic() + 10
    while any(running(pid) for pid in pids):
        assert time.monotonic() < until, pids
        time.sleep(0.05)


def running(pid):
    """Whether a process is there and not just waiting to be reaped by whoever adopted it."""
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def test_a_class_that_is_no_environment_is_told_at_the_start(folder):
    with (
        pytest.raises(BadInput, match=r"environment 'own_worlds.Obey': own_worlds has no 'Obey'; it has"),
        pool(folder, name="own_worlds.Obey"),
    ):
        pass
    for name, said in [
        ("own_worlds.no_class", "is 3; expected a class"),
        ("own_worlds.NoStep", r"has no method 'step'; expected reset\(row\) and step\(reply\)"),
        ("nowhere.py:World", "there is no file nowhere.py in"),
    ]:
        with pytest.raises(BadInput, match=said):
            load(EnvironmentSpec(name, (str(folder),)), None)


def test_numbers_of_other_libraries_and_whole_numbers_are_rewards():
    import numpy as np

    assert step_of(([], np.float32(0.5), True)) == Step([], 0.5, True)
    assert step_of(Step(reward=1, done=True)) == Step([], 1.0, True)
    with pytest.raises(BadInput, match=r"step gave 0.5; expected Step\(messages, reward, done\)"):
        step_of(0.5)


def test_a_configuration_names_an_environment_and_its_limits():
    text = "base_model: b\nlearning_rate: 1\nsequence_len: 300\nrl: grpo\ndatasets: [{path: a.jsonl}]\ntrl: "
    run = parse_run(text + "{environment: own_worlds.Obeys, max_turns: 3, reward_seconds: 2}")
    assert (environment_of(run).name, environment_of(run).seconds) == ("own_worlds.Obeys", 2)
    assert (limits_of(run).turns, limits_of(run).tokens) == (3, 300)
    assert specs_of(run) == ()
    assert environment_of(parse_run(text + "{reward_funcs: [exact]}")) is None
    with pytest.raises(ConfigError, match=r"key 'trl.environment': environment 'Obeys' names no Class; expected module.Class"):
        environment_of(parse_run(text + "{environment: Obeys}"))
