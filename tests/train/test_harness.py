"""Episodes that outside code drives: what it asked is what is learnt from, id by id."""

import asyncio
import json
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from ropewalk.chat.replies import stop_ids
from ropewalk.chat.template import Template
from ropewalk.config.run import load_run, parse_run
from ropewalk.engine.request import Sampling
from ropewalk.errors import BadInput, ConfigError, TrainingStopped
from ropewalk.server.policy_endpoint import open_policy
from ropewalk.train import harness_pool, outage
from ropewalk.train.environment import Failed, Generated, Outcome
from ropewalk.train.harness_pool import HarnessPool, harness_of
from ropewalk.train.harness_worker import HarnessSpec, load, outcome_of
from ropewalk.train.policy_batches import lay_out
from ropewalk.train.policy_step import PolicyStep
from ropewalk.train.prepare import prepare
from ropewalk.train.progress import read_events
from ropewalk.train.sessions import Sessions
from ropewalk.train.trainer import fit, train
from ropewalk.train.user_code import load_named

EXAMPLES = Path(__file__).parents[2] / "examples"

TALKING = '''
import asyncio
import json

begun = []
together = asyncio.Event()


class Talking:
    """Two turns, which it writes down as they came; a third that begins anew, as a stream; every other rollout forgets a reply."""

    async def rollout(self, client, row):
        number = len(begun)
        begun.append(client.api_key)
        if len(begun) == 4:
            together.set()
        await asyncio.wait_for(together.wait(), 60)  # for the others of the group
        question = {"role": "user", "content": row["messages"][0]["content"]}
        ask = {"model": "policy", "max_tokens": 6, "logprobs": True, "extra_body": {"return_token_ids": True}}
        first = await client.chat.completions.create(messages=[question], **ask)
        said = "something else" if number % 2 else first.choices[0].message.content
        more = [question, {"role": "assistant", "content": said}, {"role": "user", "content": "again"}]
        second = await client.chat.completions.create(messages=more, **{**ask, "max_tokens": 20}, stop=["e", "o"])
        prompt, ids, logprobs = [], [], []
        async for chunk in await client.chat.completions.create(messages=[question], stream=True, **ask):
            prompt += chunk.model_extra.get("prompt_token_ids") or []
            for choice in chunk.choices:
                ids += choice.model_extra.get("token_ids") or []
                logprobs += [one.logprob for one in choice.logprobs.content] if choice.logprobs else []
        calls = [[one.prompt_token_ids, one.choices[0].token_ids, [t.logprob for t in one.choices[0].logprobs.content]]
                 for one in (first, second)]
        with open("FOLDER/calls.jsonl", "a") as file:
            told = {"calls": [*calls, [prompt, ids, logprobs]], "stopped": second.choices[0].message.content, "key": client.api_key}
            file.write(json.dumps({**told, "why": second.choices[0].finish_reason, "forgot": number % 2}) + "\\n")
        return {"reward": sum(id > 130 for _, ids, _ in calls for id in ids) / 26, "calls": 3}
'''


@pytest.fixture
def driven(config, tmp_path):
    """A configuration whose episodes a harness of this text drives."""

    def write(text, name, trl=None, **keys):
        (tmp_path / "own_harness.py").write_text(text.replace("FOLDER", str(tmp_path)))
        block = {
            "harness": f"own_harness.py:{name}",
            "num_generations": 4,
            "generation_batch_size": 4,
            "max_completion_length": 20,
        }
        more = {"rl": "grpo", "trl": block | (trl or {}), "sample_packing": None, "max_steps": 2, "sequence_len": 128}
        return config(**more | keys)

    return write


def sequences(calls):
    """What the calls of a rollout come to, worked out anew: ids, which of them were sampled, log-probs."""
    found = []
    for prompt, ids, logprobs in calls:
        before = next((one for one in found if prompt[: len(one[0])] == one[0]), None)
        if before is None:
            found.append(before := [[], [], []])
        new = prompt[len(before[0]) :]
        for part, values in zip(before, ([*new, *ids], [0] * len(new) + [1] * len(ids), [0.0] * len(new) + logprobs)):
            part += values
    return found


def test_what_a_harness_asked_is_learnt_from_as_it_was_answered(driven, tmp_path, monkeypatch):
    groups, apart = [], []
    learns = PolicyStep.learn_from

    def seen(self, given, found):
        advantage = learns(self, given, found)
        groups.extend(given)
        if not apart:
            for lesson in self.lessons:
                apart.append((self._quietly(lesson.batch) - lesson.behaviour).abs()[lesson.mask].max())
        return advantage

    monkeypatch.setattr(PolicyStep, "learn_from", seen)
    fit(prepare(load_run(driven(TALKING, "Talking"))), quiet=True, opens=open_policy)
    assert [one.error for group in groups for one in group.episodes] == [""] * 8
    assert max(apart) < 1e-4
    rollouts = [json.loads(line) for line in (tmp_path / "calls.jsonl").read_text().splitlines()]
    assert len({one["key"] for one in rollouts}) == len(rollouts) == 8
    episodes = [episode for group in groups for episode in group.episodes]
    told = [[(one.ids, [*map(int, one.trained)], pytest.approx(one.logprobs)) for one in e.sequences] for e in episodes]
    wanted = [[tuple(one) for one in sequences(rollout["calls"])] for rollout in rollouts]
    lengths = [(rollout["forgot"], len(one)) for rollout, one in zip(rollouts, wanted)]
    assert lengths.count((1, 3)) == 4  # what another reply is put in begins a sequence of its own
    assert lengths.count((0, 2)) >= 3  # a reply may end within a character, which its text does not tell
    for one in wanted:
        assert one in told
    version = {v for e in episodes[4:] for one in e.sequences for v, trained in zip(one.versions, one.trained) if trained}
    assert version == {1}
    template = Template.load(load_run(tmp_path / "run.yml").base_model)
    for rollout in rollouts:
        ids = rollout["calls"][1][1]
        *before, last = [{*template.decode([id], skip_special_tokens=False)} & {*"eo"} for id in ids]
        assert not any(before)
        assert (rollout["why"] == "stop") == (bool(last) or ids[-1] in stop_ids(template))
        assert not {*"eo"} & {*rollout["stopped"]}
    first = next(e for e in read_events(tmp_path / "run" / "events.jsonl") if e["event"] == "step")
    assert first["reward"] == first["rewards/Talking"] > 0
    assert first["metrics/calls"] == 3
    assert first["length"] == pytest.approx(sum(e.sampled for e in episodes[:4]) / 4)


BROKEN = """
import asyncio
import time

import openai


async def rollout(client, row):
    match row["what"]:
        case "hang":
            await asyncio.sleep(60)
        case "swallow":
            while True:
                try:
                    await asyncio.sleep(60)
                except asyncio.CancelledError:
                    pass
        case "block":
            time.sleep(60)
        case "raise":
            raise KeyError("no such column")
        case "exit":
            raise SystemExit(3)
        case "nan":
            return float("nan")
        case "none":
            return {"score": 1}
        case "ask":
            await client.models.list()
    return 1


def plain(client, row):
    return 1


class Nothing:
    pass
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with a user's module of harnesses."""
    folder = tmp_path_factory.mktemp("own")
    (folder / "own_broken.py").write_text(BROKEN)
    return folder


def pool(folder, seconds=30.0, name="own_broken.rollout"):
    return HarnessPool(HarnessSpec(name, (str(folder),), seconds))


def asked(rollouts, what):
    return rollouts.run({"what": what}, "http://127.0.0.1:9/v1", "a key")


def test_what_a_harness_does_wrong_is_a_failure_that_says_so(folder, monkeypatch):
    monkeypatch.setattr(outage, "MOST_FAILURES", 5)
    monkeypatch.setattr(outage, "OUTAGE_SECONDS", 0.0)
    with pool(folder) as rollouts:
        for what, said in [
            ("raise", "KeyError: 'no such column'"),
            ("exit", "SystemExit: 3"),
            ("fine", Outcome(1.0)),
            ("nan", "rollout gave the reward as nan; expected a finite number"),
            ("none", "rollout gave {'score': 1}; expected a number, or a mapping with 'reward'"),
            ("ask", "APIConnectionError"),
            ("raise", "own_broken.py"),
            ("exit", "SystemExit"),
        ]:
            found = asked(rollouts, what).result(30)
            assert found == said if isinstance(said, Outcome) else said in found.error
            assert "harness_worker.py" not in getattr(found, "error", "")
        assert rollouts.failures == 7
        with pytest.raises(TrainingStopped, match=r"(?s)harness 'own_broken.rollout' failed 5 rollouts in a row, .*SystemExit"):
            asked(rollouts, "fine")
        assert rollouts.replaced == []


def test_a_harness_that_hangs_costs_its_rollout_and_one_that_blocks_its_process(folder, monkeypatch):
    monkeypatch.setattr(harness_pool, "GRACE_SECONDS", 0.3)
    with pool(folder, seconds=0.5) as rollouts:
        before = rollouts.processes[0]
        begun = time.monotonic()
        hanging, fine = [asked(rollouts, "hang") for _ in range(12)], asked(rollouts, "fine")
        assert fine.result(10) == Outcome(1.0)
        said = Failed("harness 'own_broken.rollout' took longer than 0.5 seconds")
        assert [one.result(10) for one in hanging] == [said] * 12
        assert time.monotonic() - begun < 5  # side by side: one after the other they take 6
        assert rollouts.processes == [before]
        for what in ("swallow", "block"):
            lost, innocent = asked(rollouts, what), asked(rollouts, "hang")
            named = (
                f"harness 'own_broken.rollout': harness worker 1 (process {rollouts.processes[0]}) took longer than 0.8 seconds"
            )
            assert lost.result(10) == Failed(f"{named} and was replaced")
            assert isinstance(innocent.result(10), Failed)
        assert asked(rollouts, "fine").result(10) == Outcome(1.0)


def test_a_module_that_holds_no_harness_is_told_at_the_start(folder):
    for name, said in [
        ("own_broken.plain", r"expected `async def rollout\(client, row\)`, or a class"),
        ("own_broken.Nothing", r"expected `async def rollout"),
        ("own_broken.absent", "own_broken has no 'absent'; it has"),
    ]:
        with pytest.raises(BadInput, match=said):
            load(HarnessSpec(name, (str(folder),)))


def test_numbers_of_other_libraries_are_rewards_and_the_rest_of_a_mapping_is_told():
    assert outcome_of(torch.tensor(0.5)) == Outcome(0.5)
    assert outcome_of({"reward": 1, "turns": 3}) == Outcome(1.0, {"turns": 3.0})
    with pytest.raises(BadInput, match=r"rollout gave 'turns' as 'many'; expected a finite number"):
        outcome_of({"reward": 1, "turns": "many"})


def test_a_configuration_names_a_harness_alone():
    text = "base_model: b\nlearning_rate: 1\nsequence_len: 300\nrl: grpo\ndatasets: [{path: a.jsonl}]\ntrl: "
    run = parse_run(text + "{harness: own_broken.rollout, harness_seconds: 2}")
    assert (harness_of(run).name, harness_of(run).seconds) == ("own_broken.rollout", 2)
    assert harness_of(parse_run(text + "{reward_funcs: [exact]}")) is None
    with pytest.raises(ConfigError, match=r"key 'trl.harness': harness 'rollout' names no function; expected module.function"):
        harness_of(parse_run(text + "{harness: rollout}"))
    for more, said in [
        ("harness: a.b, environment: a.B", "exclude each other"),
        ("harness: a.b, max_turns: 3", "a harness ends by itself"),
        ("environment: a.B, harness_seconds: 3", "is of trl.harness"),
        ("harness: a.b, overlong_tokens: 3", "the limit of one reply"),
    ]:
        with pytest.raises(ConfigError, match=said):
            parse_run(text + f"{{{more}}}")


def test_a_harness_needs_the_endpoint_of_the_command(driven):
    with pytest.raises(ConfigError, match=r"trl.harness: own_harness.py:rollout is run by the command `ropewalk train`"):
        train(load_run(driven("async def rollout(client, row):\n    return 1\n", "rollout")), quiet=True)


FAILING = """
import asyncio

begun = 0


async def rollout(client, row):
    global begun
    begun += 1
    mine = begun
    if mine % 4 == 1:
        await asyncio.sleep(60)
    reply = await client.chat.completions.create(model="policy", messages=[{"role": "user", "content": "?"}], max_tokens=2 + mine % 4)
    if mine % 4 == 2:
        raise KeyError("no such column")
    return 100 + mine % 4
"""


def test_rollouts_that_fail_or_hang_teach_nothing_and_the_others_are_compared(driven, tmp_path, monkeypatch):
    groups, advantages = [], []
    learns = PolicyStep.learn_from

    def seen(self, given, found):
        groups.extend(given)
        advantages.append(learns(self, given, found))
        return advantages[-1]

    monkeypatch.setattr(PolicyStep, "learn_from", seen)
    path = driven(FAILING, "rollout", {"harness_seconds": 5.0}, max_steps=1)
    fit(prepare(load_run(path)), quiet=True, opens=open_policy)
    [group] = groups
    assert [one.end for one in group.episodes] == ["failed", "failed", "done", "done"]
    assert "took longer than 5 seconds" in group.episodes[0].error
    assert "no such column" in group.episodes[1].error
    [advantage] = advantages
    assert advantage[:2].tolist() == [0, 0]
    assert advantage[2:].tolist() == pytest.approx([0.70711, -0.70711], rel=1e-3)  # of 102 and 103, less 102.5, over 0.70711
    [step] = [e for e in read_events(tmp_path / "run" / "events.jsonl") if e["event"] == "step"]
    assert step["reward"] == 101.5
    assert step["failed"] == 0.5


TEXT = {1: "a", 2: "b", 3: "c", 4: "bc", 9: "|"}
RUN = Sampling(temperature=0.7)


def sessions():
    return Sessions(asked=RUN, most=5, longest=50, read=lambda ids: "".join(TEXT[id] for id in ids))


def wrote(*ids, versions=None):
    return Generated(list(ids), [-0.1 * id for id in ids], versions or [7] * len(ids), True)


def shown(episode):
    return [("".join(".x"[trained] for trained in one.trained), one.ids, one.versions) for one in episode.sequences]


def test_a_call_that_goes_on_lengthens_its_sequence_and_any_other_begins_one():
    session = sessions().begin(RUN)
    session.add([1, 9], wrote(2, 9), "b")
    session.add([1, 9, 2, 9, 3], wrote(1, versions=[8]), "a")
    session.add([1, 9, 2, 9, 1], wrote(3), "c")  # branches off where the first sequence has gone on
    session.add([1, 9], wrote(3), "c")
    episode = session.end(0.5, {"turns": 4.0}, "done")
    assert shown(episode) == [
        ("..xx.x", [1, 9, 2, 9, 3, 1], [0, 0, 7, 7, 0, 8]),
        (".....x", [1, 9, 2, 9, 1, 3], [0, 0, 0, 0, 0, 7]),
        ("..x", [1, 9, 3], [0, 0, 7]),
    ]
    assert episode.logprobs == pytest.approx([0, 0, -0.2, -0.9, 0, -0.1])
    assert (episode.prompt, episode.replies, episode.reward, episode.sampled) == (2, ["b", "a", "c", "c"], 0.5, 5)
    batches = lay_out([[episode]], tokens=64, shared=False, pad=0, multiple=1)
    assert [(batch.samples, batch.trained, batch.tokens) for batch in batches] == [((0, 0, 0), 5, 15)]


def test_text_that_was_sampled_keeps_its_ids_where_it_is_said_again():
    session = sessions().begin(RUN)
    session.add([1, 9], wrote(2, 3, 9), "bc")  # a tokenizer would have made 4 of it
    assert session.align([1, 9, 4, 9, 1]) == (1, 9, 2, 3, 9, 1)
    assert session.align([1, 9, 2, 3, 9, 1]) == (1, 9, 2, 3, 9, 1)
    assert session.align([1, 9, 3, 9, 1]) == (1, 9, 3, 9, 1)  # other words
    assert session.align([1, 9, 2]) == (1, 9, 2)
    session.add([2], wrote(2), "b")
    assert session.align([2, 4]) == (2, 4)  # "b" of it ends within an id
    assert (session.ends([1, 9, 2, 3, 9, 1]), session.ends([3, 3, 3])) == ([1, 5], [2])


def test_nothing_is_taken_after_the_end_of_a_rollout_and_each_call_has_a_seed():
    every = sessions()
    session = every.begin(Sampling(0.0, seed=3))
    assert every.find(session.key) is session
    assert session.key not in repr(session)
    seeds = {session.next_sampling().seed for _ in range(3)}
    assert len(seeds) == 3
    assert session.next_sampling().temperature == 0
    every.end(session)
    assert every.find(session.key) is None
    session.add([1], wrote(2), "b")
    episode = session.end(1.0, {}, "failed", "it broke")
    assert (episode.ids, episode.reward, episode.end, episode.error) == ([], 0.0, "failed", "it broke")


def test_the_example_plays_to_the_end():
    class Client:
        """Halves what is left."""

        def __init__(self):
            self.chat = self.completions = self
            self.least, self.most = 1, 100

        async def create(self, *, messages, **_):
            if messages[-1]["content"] == "higher":
                self.least = self.guess + 1
            elif messages[-1]["content"] == "lower":
                self.most = self.guess - 1
            self.guess = guess = (self.least + self.most) // 2
            return SimpleNamespace(choices=[SimpleNamespace(message=SimpleNamespace(content=f"Is it {guess}?"))])

    rollout = load_named("guess_by_client.py:rollout", (str(EXAMPLES),), kind="harness", noun="function")
    assert asyncio.run(rollout(Client(), {"number": 37})) == {"reward": 1.0, "guesses": 3}
    assert asyncio.run(rollout(Client(), {"number": 1})) == {"reward": 1.0, "guesses": 6}
    assert asyncio.run(rollout(Client(), {"number": 200})) == {"reward": 0.0, "guesses": 7}
