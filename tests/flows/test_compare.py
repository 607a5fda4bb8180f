"""Compare, end to end on the quickstart's base: verdicts, the judge that may not judge, and an alias that moves under load."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Callable, Coroutine, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import anthropic
import pytest

from ropewalk.cli import main
from ropewalk.compare.candidates import add_candidate
from ropewalk.compare.promotions import list_promotions, standing
from ropewalk.compare.records import Comparison, Plan, StoredVerdict, create, get_comparison, latest
from ropewalk.compare.runner import ComparisonRunner
from ropewalk.compare.ship import may, rollback, ship
from ropewalk.compare.state import State
from ropewalk.compare.suites import Suite, add_suite
from ropewalk.config.run import load_run
from ropewalk.config.serving import EngineOptions, Serving
from ropewalk.engine.models import Models
from ropewalk.errors import BadInput, NotShipped, PermissionDenied
from ropewalk.files.settings import Settings
from ropewalk.files.store import Store
from ropewalk.models.base import make_base
from ropewalk.quickstart import facts
from ropewalk.quickstart.facts import Question
from ropewalk.quickstart.run import BASE
from ropewalk.registry import Registry
from ropewalk.server.settings import ServerSettings
from ropewalk.tenants.caller import Caller
from ropewalk.train.trainer import train
from server.conftest import Running, running, wait_until
from trained import CONFIG, House

SLICE = "population"  # what the spoilt adapter gets wrong
KINDS = (SLICE, "capital", "code")
PATIENCE = 300
CLIENTS, REPLAYED = 3, 6
GREEDILY = {"temperature": 0}
GREEDY = Plan(sampling={"temperature": 0.0, "max_tokens": 40})


@dataclass(frozen=True)
class Served:
    """A server over the house's home, and the work of Compare in its own loop."""

    server: Running
    asked: Sequence[Question]
    suite: Suite

    @property
    def registry(self) -> Registry:
        return self.server.app.state.registry

    def run(self, work: Callable[[Store, Models, Caller], Coroutine[Any, Any, Any]]) -> Any:
        async def done() -> Any:
            caller = await self.server.store.local_caller()
            return await work(self.server.store, self.server.app.state.models, caller)

        return asyncio.run_coroutine_threadsafe(done(), self.server.loop).result(PATIENCE)

    def compare(self, baseline: str, *names: str, **more: Any) -> tuple[Comparison, list[StoredVerdict]]:
        """A comparison that was run, and its verdicts."""

        async def work(store: Store, models: Models, caller: Caller) -> tuple[Comparison, list[StoredVerdict]]:
            ids = [(await add_candidate(store, models, caller, name)).id for name in (baseline, *names)]
            made = await create(
                store, caller, baseline_id=ids[0], candidate_ids=ids[1:], **{"suite_id": self.suite.id, "plan": GREEDY, **more}
            )
            verdicts = await ComparisonRunner(store, models).run(caller, made.id)
            return await get_comparison(store, caller, made.id), verdicts

        return self.run(work)

    def ship(self, comparison: Comparison, alias: str, **more: Any) -> Any:
        id, candidate = comparison.id, comparison.candidate_ids[0]
        return self.run(lambda store, models, caller: ship(store, models, self.registry, caller, id, candidate, alias, **more))

    def rollback(self, alias: str) -> Any:
        return self.run(lambda store, models, caller: rollback(store, models, self.registry, caller, alias))


@pytest.fixture(scope="module")
def served(house: House) -> Iterator[Served]:
    settings = ServerSettings(serving=Serving(engine=EngineOptions(threads=1, memory_gb=0.25, disk_gb=0.5)))
    asked = [q for q in facts.questions(facts.split()[1][:20], len(facts.KINDS)) if q.kind in KINDS]
    facts.write_suite(asked, house.home / "suite.jsonl")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("ropewalk.engine.models.START_SECONDS", PATIENCE)
        patch.setattr("ropewalk.compare.replay.MOST", REPLAYED)
        with running(house.home, Settings(data=house.home), settings) as server:
            made = Served(server, asked, None)  # type: ignore[arg-type]
            path = house.home / "suite.jsonl"
            yield replace(made, suite=made.run(lambda store, models, caller: add_suite(store, caller, path, hold=0)))


@pytest.fixture(scope="module")
def spoilt(house: House, served: Served) -> str:
    """The name of an adapter that went on from the house's, on rows whose populations are wrong."""
    rows = [
        replace(q, answer="many (population, from the file)") if q.kind == SLICE else q
        for q in facts.questions(facts.split()[0][:60], len(facts.KINDS))
    ]
    facts.write_rows(rows, house.home / "spoilt.jsonl", turns=3)
    (house.home / "spoilt.yml").write_text(
        CONFIG.format(base=BASE, rows=house.home / "spoilt.jsonl", out=house.home / "spoilt", steps=15)
        + f"lora_model_dir: {house.registry.resolve('reader-house').path}\n"
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ROPEWALK_HOME", str(house.home))
        result = train(load_run(house.home / "spoilt.yml"), quiet=True)
    house.registry.publish_adapter("reader-spoilt", result.adapter, "reader")
    return "reader-spoilt"


@pytest.fixture(scope="module")
def better(served: Served) -> Comparison:
    comparison, _ = served.compare("reader", "reader-house")
    return comparison


def verdict(served: Served, comparison: Comparison) -> StoredVerdict:
    return served.run(lambda store, models, caller: latest(store, caller, comparison.id))[0]


def test_the_adapter_is_shipped_over_the_base_with_an_interval_above_zero(served: Served, better: Comparison) -> None:
    found = verdict(served, better).verdict
    assert found.state is State.SHIP
    assert found.low is not None
    assert found.low > 0
    assert (found.n_prompts, found.n_groups) == (60, 20)


def test_an_adapter_that_fails_one_slice_is_skipped_and_the_slice_is_named(served: Served, spoilt: str) -> None:
    _, (stored,) = served.compare("reader-house", spoilt)
    assert stored.verdict.state is State.SKIP
    assert stored.verdict.worst is not None
    assert stored.verdict.worst.name == SLICE
    assert stored.verdict.worst.fell
    assert any(f"slice {SLICE} fell" in reason.sentence for reason in stored.verdict.reasons)


def test_an_adapter_against_itself_is_no_reason_to_ship(served: Served) -> None:
    comparison, (stored,) = served.compare("reader-house", "reader-house")
    assert stored.verdict.state in (State.TIE, State.NOT_ENOUGH)
    with pytest.raises(NotShipped, match=f"permission: the verdict on .* is {stored.verdict.state}"):
        served.ship(comparison, "itself", override=None)


def test_the_reward_of_a_run_may_not_judge_what_the_run_made(served: Served, house: House) -> None:
    make_base(house.home / "judge", "llama", size="tiny")
    path = house.registry.resolve("reader-house").path
    house.registry.publish_base("reward", house.home / "judge")
    house.registry.publish_adapter("reader-grpo", path, "reader", {"reward_model": "reward"})
    rows = [{"prompt": q.prompt, "group": q.country} for q in served.asked[:3]]  # nothing checks them: judges must

    async def work(store: Store, models: Models, caller: Caller) -> tuple[Suite, str]:
        suite = await add_suite(store, caller, "\n".join(map(json.dumps, rows)).encode(), name="judged", hold=0)
        return suite, (await add_candidate(store, models, caller, "reward")).id

    suite, judge = served.run(work)
    _, (stored,) = served.compare("reader", "reader-grpo", suite_id=suite.id, plan=replace(GREEDY, judges=(judge,)))
    assert stored.verdict.state is State.NO_VERDICT
    assert any("reward was the reward that reader-grpo was trained for" in r.sentence for r in stored.verdict.reasons)


def test_no_request_fails_while_an_alias_is_shipped_and_rolled_back(served: Served, better: Comparison) -> None:
    served.registry.ship("answers", "reader")
    right = served.asked[1]
    stop = threading.Event()
    said: list[str] = []

    def ask(client: anthropic.Anthropic) -> int:
        count = 0
        while not stop.is_set():
            reply = client.messages.create(
                model="answers", max_tokens=40, messages=[{"role": "user", "content": right.prompt}], extra_body=GREEDILY
            )
            said.append(reply.content[0].text)
            count += 1
        return count

    def answered() -> None:
        """Waits until every client has been answered once more by what the alias stands for now."""
        enough = len(said) + 2 * CLIENTS
        wait_until(lambda: len(said) >= enough)

    with served.server.sdk(default_headers={"anthropic-version": "2023-06-01"}) as client:
        file = client.files.upload(file=("country.txt", right.passage.encode(), "text/plain"))
        about = [{"type": "document", "source": {"type": "file", "file_id": file.id}}, {"type": "text", "text": right.question}]
        client.messages.create(model="answers", max_tokens=5, messages=[{"role": "user", "content": about}])
        with ThreadPoolExecutor(CLIENTS) as pool:
            asking = [pool.submit(ask, client) for _ in range(CLIENTS)]
            try:
                first = served.ship(better, "answers")
                answered()
                served.rollback("answers")
                answered()
                second = served.ship(better, "answers")
            finally:
                stop.set()
            counts = [one.result() for one in asking]  # raises what failed
        assert min(counts) > 0
        assert len(set(said)) == 2, "the base's answer and the adapter's, and no other"
        now = client.messages.create(model="answers", max_tokens=5, messages=[{"role": "user", "content": about}])
        assert now.usage.cache_read_input_tokens > now.usage.input_tokens, "the file was read for it before it was served"
    assert (first.from_name, first.to_name, first.override_reason) == ("reader", "reader-house", None)
    assert (first.replay.asked, first.replay.equal + first.replay.passed, first.replay.files) == (REPLAYED, REPLAYED, 1)

    async def kept(store: Store, models: Models, caller: Caller) -> Any:
        return await standing(store, caller, served.registry), await list_promotions(store, caller, "answers")

    stands, moves = served.run(kept)
    assert [move.id for move in moves] == [second.id, first.id]
    assert [move.rolled_back_at is None for move in moves] == [True, False]
    assert stands["answers"].id == second.id
    assert served.rollback("answers").id == second.id
    assert served.registry.resolve("answers").name == "reader"


def test_what_speaks_against_shipping_leaves_the_alias_as_it_was(served: Served, better: Comparison, house: House) -> None:
    registry = served.registry
    registry.ship("held", "reader-house")
    with pytest.raises(BadInput, match="points at 'reader-house' already"):
        served.ship(better, "held")
    registry.publish_base("other", house.home / "judge")
    registry.ship("held", "other")
    against = "the verdict is against reader, and alias 'held' serves 'other'"
    id, candidate = better.id, better.candidate_ids[0]
    assert against == served.run(lambda store, models, caller: may(store, models, registry, caller, id, candidate, "held"))
    with pytest.raises(NotShipped, match=f"permission: {against}"):
        served.ship(better, "held")
    with pytest.raises(NotShipped, match="an override needs a reason"):
        served.ship(better, "held", override="  ")

    # Bytes that are not those that were measured.
    weights = Path(registry.resolve("reader-house").path) / "adapter_model.safetensors"
    whole = weights.read_bytes()
    try:
        weights.write_bytes(whole[:-4] + bytes(4 * [whole[-1] ^ 1]))
        with pytest.raises(NotShipped, match="hashes: 'reader-house' is not what was measured"):
            served.ship(better, "held", override="the other was a mistake")
    finally:
        weights.write_bytes(whole)
    assert registry.history("held") == ["reader-house", "other"]
    promotion = served.ship(better, "held", override="the other was a mistake")
    assert (promotion.override_reason, promotion.from_name) == ("the other was a mistake", "other")
    assert registry.history("held") == ["reader-house", "other", "reader-house"]


def test_a_commit_that_fails_leaves_the_alias_as_it_was(
    served: Served, better: Comparison, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def fails(*_: Any, **__: Any) -> None:
        raise BadInput("the disk is full")

    monkeypatch.setattr("ropewalk.compare.ship.promotions.write", fails)
    with pytest.raises(NotShipped, match="swap: the disk is full; the alias is as it was") as told:
        served.ship(better, "fresh")
    assert told.value.step == "swap"
    assert "fresh" not in served.registry.aliases()


def test_a_rollback_by_another_workspace_is_written_down_and_tells_it_nothing(served: Served, better: Comparison) -> None:
    served.registry.ship("shared", "reader")
    promotion = served.ship(better, "shared")
    other, _ = served.server.workspace("other")

    async def work(store: Store, models: Models, caller: Caller) -> tuple[Any, Any]:
        stranger = replace(caller, workspace_id=other.id)
        told = await rollback(store, models, served.registry, stranger, "shared")
        return told, (await list_promotions(store, caller, "shared"))[0]

    told, kept = served.run(work)
    assert told is None
    assert (kept.id, kept.rolled_back_at is not None) == (promotion.id, True)
    assert served.registry.resolve("shared").name == "reader"


def test_who_may_not_move_aliases_is_told_so(served: Served, better: Comparison) -> None:
    async def work(store: Store, models: Models, caller: Caller) -> None:
        weak = replace(caller, rights=frozenset({"read", "write"}))
        await ship(store, models, served.registry, weak, better.id, better.candidate_ids[0], "answers")

    with pytest.raises(PermissionDenied, match="it needs the right 'admin'"):
        served.run(work)


def test_the_command_line_goes_from_two_names_to_a_moved_alias(
    served: Served, house: House, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("ROPEWALK_HOME", str(house.home))

    def told(*words: str, code: int = 0) -> str:
        assert main(["compare", *words]) == code
        return capsys.readouterr().out.strip()

    served.registry.ship("desk", "reader")
    made = json.loads(told("suite", str(house.home / "suite.jsonl"), "--hold", "0", "--name", "countries", "--json"))
    assert (made["name"], made["n_prompts"], made["n_groups"]) == ("countries", 60, 20)
    # What the comparisons before it have asked of this suite is not asked again.
    found = json.loads(told("run", "reader", "reader-house", "--suite", served.suite.id, "--max-tokens", "40", "--json"))
    assert [one["state"] for one in found["verdicts"]] == ["SHIP"]
    assert "SHIP  reader-house\n  better than reader: " in told("show", found["id"])
    shown = json.loads(told("show", found["id"], "--json", "--candidate", "reader-house"))
    assert (shown["exit_code"], shown["verdicts"][0]["low"] > 0) == (0, True)
    assert "| reader-house | **SHIP** |" in told("show", found["id"], "--md")
    assert f"{found['id']}  reader vs reader-house  reader-house SHIP" in told("list").splitlines()
    assert told("ship", found["id"], "--alias", "desk").startswith("desk -> reader-house  (before: reader; 6 of 6 recorded")
    assert told("list", "promotions").splitlines()[0].startswith("desk -> reader-house")
    assert told("rollback", "desk") == "desk -> reader"
    assert main(["compare", "show", "cmp_none"]) == 2


def test_a_review_page_is_opinion_only_and_exits_50(
    house: House, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("ROPEWALK_HOME", str(house.home))
    page = Path(__file__).parents[1] / "compare" / "pages" / "two_tools.txt"
    assert main(["compare", "add", str(page)]) == 0
    lines = capsys.readouterr().out.splitlines()
    ids = [line.split()[0] for line in lines if line.startswith("cand_")]
    assert len(ids) == 2
    assert any(line.startswith("  note: ") for line in lines)
    assert main(["compare", "run", *ids, "--json"]) == 0
    comparison = json.loads(capsys.readouterr().out)["id"]
    assert main(["compare", "show", comparison]) == 50
    assert "OPINION ONLY" in capsys.readouterr().out
    assert main(["compare", "ship", comparison, "--alias", "words"]) == 2
    assert "a card is words on a page" in capsys.readouterr().err
