"""Runs: the order of asking, what is kept, what is asked again and what is not, and what the rule makes of it."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
from sqlalchemy import insert, update

from compare.asked import FakeModels, candidates
from ropewalk.compare.asking import TRIES
from ropewalk.compare.candidates import add_cards, card_claims, link
from ropewalk.compare.claims import Claim, ClaimStatus
from ropewalk.compare.gather import panel_evidence, strengths
from ropewalk.compare.measures import measurements
from ropewalk.compare.records import Plan, create, get_comparison, latest, unfinished
from ropewalk.compare.runner import ComparisonRunner, cancel
from ropewalk.compare.runs import outputs, runs_of
from ropewalk.compare.state import State
from ropewalk.compare.suites import add_suite, delete_suite, prompts
from ropewalk.compare.tables import claims, comparisons
from ropewalk.errors import BadInput, NotFound, Overloaded, UpstreamFailed
from ropewalk.files.settings import Settings
from ropewalk.tenants.caller import Caller
from ropewalk.tenants.workspaces import create_workspace

BOTH = pytest.mark.parametrize("settings", ["sqlite", "postgresql"], indirect=True)


@pytest.fixture
def settings(request, tmp_path):
    """SQLite, and PostgreSQL for tests that ask for both."""
    if getattr(request, "param", "sqlite") == "sqlite":
        return Settings(data=tmp_path / "data")
    return Settings(data=tmp_path / "data", database_url=request.getfixturevalue("postgres_url"))


def lines(*rows):
    return "\n".join(json.dumps(row) for row in rows).encode()


def suite_of(count, **more):
    return lines(*({"prompt": f"question {n}", "reference": f"answer {n}", "group": f"g{n}", **more} for n in range(count)))


def knowing(share):
    """Answers this share of the questions, spread evenly."""

    def says(question):
        number = int(question.split()[-1])
        return f"answer {number}" if number % 100 < share * 100 else "I do not know"

    return says


async def compared(store, caller, models, source, *names, plan=None, hold=0.0, chosen_from=None):
    """A comparison of the first name with the others, not yet run."""
    suite = await add_suite(store, caller, source, name="s", hold=hold)
    base, *others = await candidates(store, models, caller, *names)
    ids = [one.id for one in others]
    return await create(
        store,
        caller,
        baseline_id=base.id,
        candidate_ids=ids,
        suite_id=suite.id,
        plan=plan or Plan(),
        chosen_from={ids[0]: chosen_from} if chosen_from else None,
    )


@BOTH
def test_a_better_candidate_ships_and_a_worse_one_is_skipped(opened, tmp_path):
    async def body(store, caller):
        models = FakeModels.of(store, tmp_path, old=knowing(0.5), better=knowing(0.9), worse=knowing(0.1))
        comparison = await compared(store, caller, models, suite_of(100), "old", "better", "worse")
        told = []
        better, worse = await ComparisonRunner(store, models).run(caller, comparison.id, told.append)
        assert (better.verdict.state, worse.verdict.state) == (State.SHIP, State.SKIP)
        assert better.verdict.low > 0
        assert "better than old" in better.verdict.reasons[0].sentence
        assert (await get_comparison(store, caller, comparison.id)).state == "done"
        assert await latest(store, caller, comparison.id) == [better, worse]
        assert (told[-1].done, told[-1].total) == (300, 300)
        assert len(models.asked) == 300
        ranked = await strengths(store, caller, await get_comparison(store, caller, comparison.id))
        assert [one.name for one in ranked] == [better.candidate_id, comparison.baseline_id, worse.candidate_id]
        read = await panel_evidence(store, caller, await get_comparison(store, caller, comparison.id))
        assert read[better.candidate_id].pass_rate_low.value < 0.9
        assert read[worse.candidate_id].regressions.value == pytest.approx(0.8)  # passes 10 of the 50 that passed before
        # 10 tokens in at 1 $ and 5 out at 2 $ for a million: 20 millionths; 90 of 100 pass
        assert read[better.candidate_id].cost.value == pytest.approx(20e-6 / 0.9)
        runs = await runs_of(store, caller, await get_comparison(store, caller, comparison.id))
        found = {one.metric: one for one in await measurements(store, caller, runs[better.candidate_id].id)}
        assert found["pass rate"].value == 0.9
        assert found["p95 latency"].unit == "ms"
        assert found["p95 latency"].low <= found["p95 latency"].value <= found["p95 latency"].high
        assert found["cost per passing answer"].detail["as_of"] == "2026-11-22"

    opened(body)


def test_candidates_take_turns_a_b_b_a(opened, tmp_path):
    async def body(store, caller):
        models = FakeModels.of(store, tmp_path, old=knowing(1), new=knowing(1))
        comparison = await compared(store, caller, models, suite_of(4), "old", "new", plan=Plan(more={"at_once": 1}))
        await ComparisonRunner(store, models).run(caller, comparison.id)
        assert [name for name, _ in models.asked] == ["old", "new", "new", "old", "old", "new", "new", "old"]
        asked = [question for _, question in models.asked]
        assert asked[::2] == asked[1::2]
        assert models.most_at_once == 1

    opened(body)


def test_so_many_are_asked_at_once_as_the_plan_says(opened, tmp_path):
    async def body(store, caller):
        models = FakeModels.of(store, tmp_path, old=knowing(1), new=knowing(1))
        comparison = await compared(store, caller, models, suite_of(20), "old", "new", plan=Plan(more={"at_once": 3}))
        await ComparisonRunner(store, models).run(caller, comparison.id)
        assert models.most_at_once == 3
        wrong = await compared(store, caller, models, suite_of(2), "old", "new", plan=Plan(more={"at_once": 0}))
        with pytest.raises(BadInput, match="at_once is 0"):
            await ComparisonRunner(store, models).run(caller, wrong.id)
        assert (await get_comparison(store, caller, wrong.id)).state == "failed"

    opened(body)


@BOTH
def test_what_was_cut_off_goes_on_and_asks_nothing_twice(opened, tmp_path):
    async def body(store, caller):
        models = FakeModels.of(store, tmp_path, old=knowing(0.5), new=knowing(0.9))
        comparison = await compared(store, caller, models, suite_of(60), "old", "new")

        def stops(progress):
            if progress.done == 47:
                task.cancel()

        task = asyncio.create_task(ComparisonRunner(store, models).run(caller, comparison.id, stops))
        with pytest.raises(asyncio.CancelledError):
            await task
        assert (await get_comparison(store, caller, comparison.id)).state == "running"
        assert [id for _, id in await unfinished(store)] == [comparison.id]
        cut = await get_comparison(store, caller, comparison.id)
        kept = [one for run in (await runs_of(store, caller, cut)).values() for one in await outputs(store, caller, run.id)]
        assert 40 < len(kept) < 60
        first = len(models.asked)
        (found,) = await ComparisonRunner(store, models).run(caller, comparison.id)
        assert len(models.asked) - first == 120 - len(kept)
        assert len({(one.run_id, one.prompt_id) for one in kept}) == len(kept)
        assert found.verdict.state is State.SHIP

        whole = FakeModels.of(store, tmp_path / "other", old=knowing(0.5), new=knowing(0.9))
        again = await compared(store, caller, whole, suite_of(60), "old", "new")
        (other,) = await ComparisonRunner(store, whole).run(caller, again.id)
        assert other.verdict.interval == found.verdict.interval
        assert len(other.verdict.regressions) == len(found.verdict.regressions)

    opened(body)


@BOTH
def test_a_second_comparison_on_the_suite_asks_only_what_is_new(opened, tmp_path):
    async def body(store, caller):
        models = FakeModels.of(store, tmp_path, old=knowing(0.5), new=knowing(0.9), third=knowing(0.7))
        comparison = await compared(store, caller, models, suite_of(30), "old", "new")
        await ComparisonRunner(store, models).run(caller, comparison.id)
        models.asked.clear()
        base, _, third = await candidates(store, models, caller, "old", "new", "third")
        more = await create(store, caller, baseline_id=base.id, candidate_ids=[third.id], suite_id=comparison.suite_id)
        await ComparisonRunner(store, models).run(caller, more.id)
        assert {name for name, _ in models.asked} == {"third"}
        assert len(models.asked) == 30
        runs = await runs_of(store, caller, await get_comparison(store, caller, more.id))
        assert all(one.cached_from for one in await outputs(store, caller, runs[base.id].id))
        warmer = await create(
            store,
            caller,
            baseline_id=base.id,
            candidate_ids=[third.id],
            suite_id=comparison.suite_id,
            plan=Plan(sampling={"temperature": 0.5, "max_tokens": 512}),
        )
        models.asked.clear()
        await ComparisonRunner(store, models).run(caller, warmer.id)
        assert len(models.asked) == 60

    opened(body)


def test_a_candidate_against_itself_is_a_tie_and_asked_once(opened, tmp_path):
    async def body(store, caller):
        models = FakeModels.of(store, tmp_path, old=knowing(0.5))
        comparison = await compared(store, caller, models, suite_of(30), "old", "old")
        (found,) = await ComparisonRunner(store, models).run(caller, comparison.id)
        assert found.verdict.state is State.TIE
        assert len(models.asked) == 30

    opened(body)


def test_a_candidate_that_cannot_be_reached_fails_clearly_and_loses_nothing(opened, tmp_path, monkeypatch):
    monkeypatch.setattr("ropewalk.compare.asking.PAUSE", 0.0)
    down = {"now": True}

    def broken(question):
        if down["now"] and int(question.split()[-1]) > 9:
            raise UpstreamFailed("connection refused")
        return knowing(0.9)(question)

    async def body(store, caller):
        models = FakeModels.of(store, tmp_path, old=knowing(0.5), new=broken, third=knowing(0.9))
        comparison = await compared(store, caller, models, suite_of(60), "old", "new", "third")
        new, third = await ComparisonRunner(store, models).run(caller, comparison.id)
        assert new.verdict.state is State.NO_VERDICT
        assert "connection refused" in new.verdict.reasons[0].sentence
        assert third.verdict.state is State.SHIP
        after = await get_comparison(store, caller, comparison.id)
        assert after.state == "failed"
        assert "new: 3 questions in a row had no answer" in after.error
        runs = await runs_of(store, caller, after)
        kept = await outputs(store, caller, runs[new.candidate_id].id)
        good = sum(one.error is None for one in kept)
        assert all(one.retries == TRIES - 1 for one in kept if one.error)
        down["now"] = False
        models.asked.clear()
        new, third = await ComparisonRunner(store, models).run(caller, comparison.id)
        assert (new.verdict.state, third.verdict.state) == (State.SHIP, State.SHIP)
        assert len(models.asked) == 60 - good
        assert {name for name, _ in models.asked} == {"new"}
        after = await get_comparison(store, caller, comparison.id)
        assert (after.state, after.error) == ("done", None)
        counted = {one.metric: one.value for one in await measurements(store, caller, runs[new.candidate_id].id)}
        assert counted["retries"] >= 3 * TRIES

    opened(body)


def test_a_prompt_that_a_candidate_cannot_answer_counts_as_failed(opened, tmp_path):
    def short(question):
        if question.endswith("7"):
            raise BadInput("prompt is too long")
        return knowing(1)(question)

    async def body(store, caller):
        models = FakeModels.of(store, tmp_path, old=knowing(1), new=short)
        comparison = await compared(store, caller, models, suite_of(100), "old", "new")
        (found,) = await ComparisonRunner(store, models).run(caller, comparison.id)
        assert len(found.verdict.regressions) == 10
        assert found.verdict.state is State.SKIP
        assert (await get_comparison(store, caller, comparison.id)).state == "done"

    opened(body)


def test_a_must_pass_prompt_that_fails_is_asked_again(opened, tmp_path):
    moods = {}

    def moody(question):
        """Fails question 3 once, and question 5 always."""
        moods[question] = moods.get(question, 0) + 1
        if question == "question 5" or (question == "question 3" and moods[question] == 1):
            return "no"
        return knowing(1)(question)

    async def body(store, caller):
        models = FakeModels.of(store, tmp_path, old=knowing(1), new=moody)
        comparison = await compared(store, caller, models, suite_of(20, must_pass=True), "old", "new")
        (found,) = await ComparisonRunner(store, models).run(caller, comparison.id)
        assert moods["question 3"] == moods["question 5"] == 2
        assert moods["question 4"] == 1
        assert found.verdict.state is State.SKIP
        ids = {prompt.text: prompt.id for prompt in await prompts(store, caller, comparison.suite_id)}
        assert found.verdict.reasons[0].evidence == (ids["question 5"],)

    opened(body)


def test_a_guardrail_that_breaks_is_told_with_its_prompt(opened, tmp_path):
    rows = [
        {
            "prompt": f"question {n}",
            "checks": [
                {"kind": "contains", "value": "answer"},
                {"kind": "length", "unit": "characters", "most": 40, "guardrail": True},
            ],
        }
        for n in range(20)
    ]

    async def body(store, caller):
        def long(question):
            return knowing(1)(question) + (" and much more" * 9 if question == "question 4" else "")

        models = FakeModels.of(store, tmp_path, old=knowing(1), new=long)
        comparison = await compared(store, caller, models, lines(*rows), "old", "new")
        (found,) = await ComparisonRunner(store, models).run(caller, comparison.id)
        assert found.verdict.state is State.SKIP
        assert found.verdict.reasons[0].sentence == "breaks the guardrail 'length' on prompt #5"

    opened(body)


def test_one_chosen_among_several_is_confirmed_on_the_half_that_was_held_back(opened, tmp_path):
    async def body(store, caller):
        models = FakeModels.of(store, tmp_path, old=knowing(0.2), new=knowing(0.9))
        comparison = await compared(store, caller, models, suite_of(100), "old", "new", hold=0.5, chosen_from=8)
        (found,) = await ComparisonRunner(store, models).run(caller, comparison.id)
        assert found.verdict.state is State.SHIP
        assert found.verdict.confirmed is True
        assert len(models.asked) == 200

        models = FakeModels.of(store, tmp_path / "b", old=knowing(0.5), new=knowing(0.5))
        comparison = await compared(store, caller, models, suite_of(100), "old", "new", hold=0.5, chosen_from=8)
        await ComparisonRunner(store, models).run(caller, comparison.id)
        held = sum(prompt.held for prompt in await prompts(store, caller, comparison.suite_id))
        assert len(models.asked) == 2 * (100 - held), "one that is not better needs no confirmation"

    opened(body)


def test_a_run_stops_early_when_the_verdict_is_certain(opened, tmp_path):
    async def body(store, caller):
        models = FakeModels.of(store, tmp_path, old=knowing(0), new=knowing(1))
        comparison = await compared(store, caller, models, suite_of(100), "old", "new", plan=Plan(stop_early=True))
        (found,) = await ComparisonRunner(store, models).run(caller, comparison.id)
        assert found.verdict.state is State.SHIP
        assert len(models.asked) < 80
        assert found.verdict.method.startswith("betting")
        assert any("were not asked: the verdict was certain" in reason.sentence for reason in found.verdict.reasons)
        asked = len(models.asked)
        await ComparisonRunner(store, models).run(caller, comparison.id)
        assert len(models.asked) == asked, "asking on would be another look"

    opened(body)


def test_a_budget_that_is_spent_ends_the_asking(opened, tmp_path):
    async def body(store, caller):
        models = FakeModels.of(store, tmp_path, old=knowing(0.5), new=knowing(0.9))
        plan = Plan(budget=41 * 20e-6, more={"at_once": 1})  # each answer costs 20 millionths
        comparison = await compared(store, caller, models, suite_of(100), "old", "new", plan=plan)
        (found,) = await ComparisonRunner(store, models).run(caller, comparison.id)
        assert 41 <= len(models.asked) <= 42
        assert any("the budget of" in reason.sentence for reason in found.verdict.reasons)
        assert found.verdict.n_prompts == 20
        asked = len(models.asked)
        await ComparisonRunner(store, models).run(caller, comparison.id)
        assert len(models.asked) == asked, "what was spent is spent"

    opened(body)


def test_a_cancelled_comparison_ends_and_may_go_on(opened, tmp_path, monkeypatch):
    monkeypatch.setattr("ropewalk.compare.runner.LOOK_SECONDS", 0.01)

    async def body(store, caller):
        models = FakeModels.of(store, tmp_path, old=knowing(0.5), new=knowing(0.9))
        comparison = await compared(store, caller, models, suite_of(60), "old", "new")
        hold = asyncio.Event()
        real = models.answerer

        async def slow(name, *, loaded=True):
            if len(models.asked) > 20:
                await hold.wait()
            return await real(name)

        monkeypatch.setattr(models, "answerer", slow)
        task = asyncio.create_task(ComparisonRunner(store, models).run(caller, comparison.id))
        while len(models.asked) <= 20:
            await asyncio.sleep(0.01)
        ended = await cancel(store, caller, comparison.id)
        assert (ended.state, ended.error) == ("failed", "cancelled")
        with pytest.raises(BadInput, match="was cancelled"):
            await task
        assert (await get_comparison(store, caller, comparison.id)).error == "cancelled"
        hold.set()
        (found,) = await ComparisonRunner(store, models).run(caller, comparison.id)
        assert found.verdict.state is State.SHIP

    opened(body)


def test_what_is_served_with_other_weights_is_not_asked(opened, tmp_path):
    async def body(store, caller):
        models = FakeModels.of(store, tmp_path, old=knowing(0.5), new=knowing(0.9))
        comparison = await compared(store, caller, models, suite_of(20), "old", "new")
        changed = FakeModels.of(store, tmp_path, {"new": "another"}, old=knowing(0.5), new=knowing(0.9))
        (found,) = await ComparisonRunner(store, changed).run(caller, comparison.id)
        assert found.verdict.state is State.NO_VERDICT
        assert "with other weights than when it was added" in found.verdict.reasons[0].sentence
        assert changed.asked == []

    opened(body)


def test_another_workspace_neither_runs_nor_cancels(opened, tmp_path):
    async def body(store, caller):
        models = FakeModels.of(store, tmp_path, old=knowing(0.5), new=knowing(0.9))
        comparison = await compared(store, caller, models, suite_of(10), "old", "new")
        other = await create_workspace(store.database, store.vault, "other")
        stranger = Caller(caller.organization_id, other.id, None)
        for attempt in (ComparisonRunner(store, models).run(stranger, comparison.id), cancel(store, stranger, comparison.id)):
            with pytest.raises(NotFound):
                await attempt
        assert models.asked == []

    opened(body)


def test_a_suite_that_is_deleted_meanwhile_ends_the_run(opened, tmp_path):
    async def body(store, caller):
        models = FakeModels.of(store, tmp_path, old=knowing(0.5), new=knowing(0.9))
        comparison = await compared(store, caller, models, suite_of(30), "old", "new")
        gone = []

        def deletes(progress):
            if progress.done == 11 and not gone:
                gone.append(asyncio.ensure_future(delete_suite(store, caller, comparison.suite_id)))

        with pytest.raises(NotFound):
            await ComparisonRunner(store, models).run(caller, comparison.id, deletes)
        await gone[0]
        after = await get_comparison(store, caller, comparison.id)
        assert after.state == "failed"

    opened(body)


def test_two_processes_do_not_run_one_comparison(opened, tmp_path, monkeypatch):
    monkeypatch.setattr("ropewalk.compare.runner.LEASE_SECONDS", 0.2)
    monkeypatch.setattr("ropewalk.compare.runner.LOOK_SECONDS", 0.02)

    async def body(store, caller):
        models = FakeModels.of(store, tmp_path, old=knowing(0.5), new=knowing(0.9))
        comparison = await compared(store, caller, models, suite_of(20), "old", "new")
        runner = ComparisonRunner(store, models)
        hold, real = asyncio.Event(), models.answerer

        async def slow(name, *, loaded=True):
            await hold.wait()
            return await real(name)

        monkeypatch.setattr(models, "answerer", slow)
        first = asyncio.create_task(runner.run(caller, comparison.id))
        await asyncio.sleep(0.1)
        with pytest.raises(Overloaded, match="is being run by another process"):
            await runner.run(caller, comparison.id)
        hold.set()
        await first
        assert len(models.asked) == 40
        assert (await get_comparison(store, caller, comparison.id)).state == "done"

    opened(body)


KILLED = """
import asyncio, sys
from pathlib import Path
from compare.asked import FakeModels
from compare.test_runner import knowing
from ropewalk.compare.runner import ComparisonRunner
from ropewalk.files.settings import Settings
from ropewalk.files.store import Store

async def main(data, comparison):
    store = await Store.open(Settings(data=Path(data)))
    models = FakeModels.of(store, Path(data) / "registry", old=knowing(0.1), new=knowing(0.3))
    await ComparisonRunner(store, models).run(await store.local_caller(), comparison)

asyncio.run(main(*sys.argv[1:]))
"""


def test_what_a_killed_process_wrote_is_there_and_the_rest_is_asked(opened, settings, tmp_path, monkeypatch):
    monkeypatch.setattr("ropewalk.compare.runner.LEASE_SECONDS", 0.5)

    async def body(store, caller):
        models = FakeModels.of(store, tmp_path / "data" / "registry", old=knowing(0.1), new=knowing(0.3))
        comparison = await compared(store, caller, models, suite_of(40), "old", "new")
        environment = {**os.environ, "ROPEWALK_FAILPOINT": "compare.output:33", "PYTHONPATH": str(Path(__file__).parents[1])}
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-c", KILLED, str(settings.data), comparison.id, env=environment
        )
        assert await process.wait() == -signal.SIGKILL
        cut = await get_comparison(store, caller, comparison.id)
        assert cut.state == "running"
        kept = [one for run in (await runs_of(store, caller, cut)).values() for one in await outputs(store, caller, run.id)]
        assert len(kept) == 33
        async with store.database.writing() as connection:  # the killed one's lease, which would be waited for
            await connection.execute(update(comparisons).values(lease_until=0))
        (found,) = await ComparisonRunner(store, models).run(caller, comparison.id)
        assert len(models.asked) == 80 - 33
        assert found.verdict.n_prompts == 40
        assert found.verdict.state is State.SHIP

    opened(body)


def test_a_card_that_is_linked_has_its_claims_tested_by_the_run(opened, tmp_path):
    async def body(store, caller):
        models = FakeModels.of(store, tmp_path, old=knowing(0.4), new=knowing(0.9))
        comparison = await compared(store, caller, models, suite_of(30), "old", "new")
        page = (Path(__file__).parent / "pages" / "one_tool.txt").read_text()
        (card, *_) = await add_cards(store, caller, page)
        claim = Claim("x", "2x cheaper", "cost", 2.0, "x", "cheaper")
        async with store.database.writing() as connection:
            row = {"id": "claim_x", "candidate_id": card.id, "number": 99, "content": json.dumps(asdict(claim))}
            await connection.execute(insert(claims).values(**row, metric="cost", status="untested"))
        await link(store, caller, card.id, comparison.candidate_ids[0])
        await ComparisonRunner(store, models).run(caller, comparison.id)
        found = {one.id: one for one in await card_claims(store, caller, card.id)}
        tested = found.pop("claim_x")
        # all thirty are answered by the second, and by the first too, whose numbers stay below 40: the same cost
        assert tested.status is ClaimStatus.CONTRADICTED
        assert tested.low == tested.high == 1.0
        assert tested.measurement_id
        assert {one.status for one in found.values()} == {ClaimStatus.UNTESTED}

    opened(body)


def test_cards_alone_are_opinion_only(opened, tmp_path):
    async def body(store, caller):
        page = (Path(__file__).parent / "pages" / "two_tools.txt").read_text()
        one, two = await add_cards(store, caller, page)
        comparison = await create(store, caller, baseline_id=one.id, candidate_ids=[two.id])
        (found,) = await ComparisonRunner(store, FakeModels.of(store, tmp_path)).run(caller, comparison.id)
        assert found.verdict.state is State.OPINION_ONLY
        assert (await get_comparison(store, caller, comparison.id)).state == "done"

    opened(body)


def test_of_several_samples_the_share_that_passes_counts(opened, tmp_path):
    async def body(store, caller):
        turns = {}

        def every_other(question):
            turns[question] = turns.get(question, 0) + 1
            return knowing(1)(question) if turns[question] % 2 else "no"

        models = FakeModels.of(store, tmp_path, old=knowing(1), new=every_other)
        plan = Plan(sampling={"temperature": 0.7, "max_tokens": 8}, samples=2)
        comparison = await compared(store, caller, models, suite_of(30), "old", "new", plan=plan)
        (found,) = await ComparisonRunner(store, models).run(caller, comparison.id)
        assert len(models.asked) == 120
        assert found.verdict.effect == -0.5
        assert found.verdict.state is State.SKIP

    opened(body)


def test_an_early_stop_still_asks_what_must_pass_and_asks_failures_again(opened, tmp_path):
    rows = [{"prompt": f"question {n}", "reference": f"answer {n}", "group": f"g{n}", "must_pass": n >= 97} for n in range(100)]

    async def body(store, caller):
        def new(question):
            return "no" if question == "question 99" else knowing(1)(question)

        def old(question):
            return knowing(1)(question) if question == "question 99" else "no"

        models = FakeModels.of(store, tmp_path, old=old, new=new)
        comparison = await compared(store, caller, models, lines(*rows), "old", "new", plan=Plan(stop_early=True))
        (found,) = await ComparisonRunner(store, models).run(caller, comparison.id)
        assert len(models.asked) < 100
        assert models.asked.count(("new", "question 99")) == 2
        assert found.verdict.state is State.SKIP
        assert "fails 1 of 3 must-pass prompts" in found.verdict.reasons[0].sentence

    opened(body)
