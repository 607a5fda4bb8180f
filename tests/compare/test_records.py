"""Comparisons and verdicts as they are kept."""

from __future__ import annotations

import asyncio
import json
from dataclasses import replace

import pytest
from sqlalchemy import func, insert, select, update

from ropewalk.compare import records, tables
from ropewalk.compare.evidence import Evidence, Limits, Row
from ropewalk.compare.records import Plan
from ropewalk.compare.rule import RULE_VERSION, decide
from ropewalk.compare.state import State
from ropewalk.compare.suites import add_suite, delete_suite
from ropewalk.compare.verdict import Interval, Reason, Slice, Verdict
from ropewalk.database import now
from ropewalk.errors import BadInput, NotFound, PermissionDenied
from ropewalk.tenants.caller import Caller
from ropewalk.tenants.workspaces import archive_workspace, create_workspace

only_sqlite = pytest.mark.parametrize("settings", ["sqlite"], indirect=True)


async def candidate(store, caller, id, kind="adapter"):
    row = {"kind": kind, "name": id, "target": id, "digest": id, "family": "f", "template_digest": "t", "created_at": now()}
    owner = {"workspace_id": caller.workspace_id, "user_id": caller.user_id}
    async with store.database.writing() as connection:
        await connection.execute(insert(tables.candidates).values(id=id, **owner, **row))
    return id


async def three(store, caller):
    suite = await add_suite(store, caller, b'{"prompt": "a", "reference": "b"}', hold=0)
    return suite, [await candidate(store, caller, id) for id in ("cand_old", "cand_new", "cand_far")]


def test_a_comparison_is_kept_as_it_was_planned(opened):
    async def body(store, caller):
        suite, (old, new, far) = await three(store, caller)
        judge = await candidate(store, caller, "cand_judge")
        plan = Plan({"temperature": 0.5}, (judge,), True, 5.0, Limits(margin=0.01, cost_ratio=2.0), 3, 7, {"why": "x"})
        made = await records.create(
            store,
            caller,
            baseline_id=old,
            candidate_ids=[new, far],
            suite_id=suite.id,
            title=" Support\0 bot ",
            plan=plan,
            chosen_from={new: 8},
        )
        assert (made.title, made.state, made.rule_version, made.plan) == ("Support bot", "new", RULE_VERSION, plan)
        assert made.candidate_ids == (new, far)
        assert [(item.number, item.candidate_id, item.chosen_from, item.run_id) for item in made.items] == [
            (0, old, 1, None),
            (1, new, 8, None),
            (2, far, 1, None),
        ]
        assert made.item(new).chosen_from == 8
        assert await records.get_comparison(store, caller, made.id) == made
        later = await records.create(store, caller, baseline_id=old, candidate_ids=[far], suite_id=suite.id)
        assert later.title == "cand_old vs cand_far"
        assert [one.id for one in await records.list_comparisons(store, caller)] == [later.id, made.id]
        assert await records.list_comparisons(store, caller, limit=5, after=later.id) == [made]
        assert [one.id for one in await records.of_candidate(store, caller, new)] == [made.id]
        await delete_suite(store, caller, suite.id)
        assert (await records.get_comparison(store, caller, made.id)).suite_id == suite.id  # it says so still

    opened(body)


@only_sqlite
def test_what_cannot_be_compared_is_said(opened):
    async def body(store, caller):
        suite, (old, new, _) = await three(store, caller)
        card = await candidate(store, caller, "cand_card", "card")
        for more, said in (
            ({"candidate_ids": []}, "0 candidates; expected 1 to 32"),
            ({"candidate_ids": [new, new]}, "named twice"),
            ({"chosen_from": {"cand_x": 3}}, "'cand_x' is no candidate"),
            ({"chosen_from": {new: 0}}, "below 1"),
            ({"suite_id": None}, "name a suite"),
            ({"baseline_id": card}, "is a card, which cannot be run"),
            ({"plan": Plan(judges=(card,))}, "is a card, which cannot be asked"),
        ):
            with pytest.raises(BadInput, match=said):
                await records.create(store, caller, **{"baseline_id": old, "candidate_ids": [new], "suite_id": suite.id} | more)
        for more in ({"suite_id": "suite_none"}, {"baseline_id": "cand_none"}, {"candidate_ids": ["cand_none"]}):
            with pytest.raises(NotFound):
                await records.create(store, caller, **{"baseline_id": old, "candidate_ids": [new], "suite_id": suite.id} | more)
        reader = replace(caller, rights=frozenset({"read"}))
        with pytest.raises(PermissionDenied):
            await records.create(store, reader, baseline_id=old, candidate_ids=[new], suite_id=suite.id)
        cards = await records.create(store, caller, baseline_id=card, candidate_ids=[new])  # opinions need no suite
        assert cards.suite_id is None

    opened(body)


@only_sqlite
def test_one_held_against_itself_is_there_twice(opened):
    async def body(store, caller):
        suite, (old, _, _) = await three(store, caller)
        made = await records.create(
            store, caller, baseline_id=old, candidate_ids=[old], suite_id=suite.id, chosen_from={old: 4}
        )
        [again] = made.candidate_ids
        assert again != old
        assert made.item(again).chosen_from == 4
        assert made.title == "cand_old vs cand_old (again)"

    opened(body)


def test_states_and_runs_are_written_down(opened):
    async def body(store, caller):
        suite, (old, new, _) = await three(store, caller)
        made = await records.create(store, caller, baseline_id=old, candidate_ids=[new], suite_id=suite.id)
        running = await records.set_state(store, caller, made.id, "running")
        assert running.started_at >= made.created_at
        again = await records.set_state(store, caller, made.id, "running")
        assert again.started_at == running.started_at
        run = {"candidate_id": new, "suite_id": suite.id, "params": "{}", "path": "serving", "digest": "d", "state": "new"}
        async with store.database.writing() as connection:
            owner = {"workspace_id": caller.workspace_id, "created_at": now()}
            await connection.execute(insert(tables.runs).values(id="run_1", **owner, **run))
        await records.set_run(store, caller, made.id, new, "run_1")
        failed = await records.set_state(store, caller, made.id, "failed", "the model ended")
        assert (failed.state, failed.error, failed.item(new).run_id, failed.item(old).run_id) == (
            "failed",
            "the model ended",
            "run_1",
            None,
        )
        assert failed.finished_at >= running.started_at
        resumed = await records.set_state(store, caller, made.id, "running")
        assert (resumed.error, resumed.finished_at) == (None, None)

    opened(body)


def test_one_process_at_a_time_works_on_a_comparison(opened):
    async def body(store, caller):
        suite, (old, new, _) = await three(store, caller)
        made = await records.create(store, caller, baseline_id=old, candidate_ids=[new], suite_id=suite.id)
        taken = await asyncio.gather(*(records.claim(store, made.id, f"p{n}", 60) for n in range(4)))
        assert sorted(taken) == [False, False, False, True]
        holder = f"p{taken.index(True)}"
        assert await records.claim(store, made.id, holder, 60)  # who holds it keeps it
        await records.release(store, made.id, "another")
        assert not await records.claim(store, made.id, "another", 60)
        await records.release(store, made.id, holder)
        assert await records.claim(store, made.id, "another", 0)
        assert await records.claim(store, made.id, holder, 60)  # the other is believed dead

    opened(body)


def test_what_a_dead_process_left_is_found_with_whose_it_is(opened):
    async def body(store, caller):
        user = replace(caller, user_id="u1")
        suite, (old, new, _) = await three(store, user)
        made = [await records.create(store, user, baseline_id=old, candidate_ids=[new], suite_id=suite.id) for _ in range(3)]
        for one in made[:2]:
            await records.set_state(store, user, one.id, "running")
        await records.claim(store, made[1].id, "alive", 60)
        [(whose, id)] = await records.unfinished(store)
        assert (whose.workspace_id, whose.user_id, id) == (caller.workspace_id, "u1", made[0].id)
        other = await create_workspace(store.database, store.vault, "other")
        async with store.database.writing() as connection:
            await connection.execute(update(tables.comparisons).values(workspace_id=other.id))
        assert len(await records.unfinished(store)) == 1
        await archive_workspace(store.database, other.id)
        assert await records.unfinished(store) == []

    opened(body)


FULL = Verdict(
    candidate="cand_new",
    baseline="cand_old",
    state=State.SHIP_CHEAPER,
    reasons=(Reason("It costs half.", ("m_1",)), Reason("It is the same.")),
    rule_version=RULE_VERSION,
    interval=Interval(0.01, -0.02, 0.03),
    p=0.2,
    p_adjusted=0.4,
    method="t on groups",
    n_prompts=300,
    n_groups=96,
    worst=Slice("refunds", Interval(-0.1, -0.2, 0.0), 30, False),
    regressions=("prompt_1",),
    fixed=("prompt_2", "prompt_3"),
    length_controlled=Interval(0.0, -0.1, 0.1),
    needs_confirmation=True,
    confirmed=True,
    held=Interval(0.02, -0.01, 0.05),
)


@pytest.mark.parametrize(
    "verdict", [FULL, replace(FULL, interval=None, worst=None, held=None, length_controlled=None, n_more=900)]
)
def test_a_verdict_comes_back_from_json_as_it_was(verdict):
    assert records.restored(json.loads(json.dumps(verdict.as_dict()))) == verdict


def test_verdicts_are_added_edition_by_edition_and_never_changed(opened):
    async def body(store, caller):
        suite, (old, new, far) = await three(store, caller)
        made = await records.create(store, caller, baseline_id=old, candidate_ids=[new, far], suite_id=suite.id)
        assert await records.latest(store, caller, made.id) == []
        rows = [Row(f"p{n}", f"g{n}", old=float(n % 2), new=1.0) for n in range(200)]
        evidence = [Evidence(id, old, rows) for id in (new, far)]
        first = await records.save_verdicts(store, caller, made.id, decide(evidence), repr(evidence))
        assert [(one.edition, one.candidate_id, one.verdict.state) for one in first] == [
            (1, new, State.SHIP),
            (1, far, State.SHIP),
        ]
        second = await records.save_verdicts(store, caller, made.id, [replace(FULL, candidate=far), FULL], b"other")
        assert await records.latest(store, caller, made.id) == [second[1], second[0]]  # in the comparison's order
        assert await records.editions(store, caller, made.id) == [*first, second[1], second[0]]
        assert first[0].inputs_digest == first[1].inputs_digest != second[0].inputs_digest
        assert [one.edition for one in await records.verdicts_of(store, caller, new)] == [2, 1]
        at_once = [records.save_verdicts(store, caller, made.id, [FULL], b"") for _ in range(3)]
        assert sorted(one.edition for [one] in await asyncio.gather(*at_once)) == [3, 4, 5]
        async with store.database.reading() as connection:
            assert (await connection.execute(select(func.count()).select_from(tables.verdicts))).scalar() == 7
            row = (await connection.execute(select(tables.verdicts).where(tables.verdicts.c.id == first[0].id))).one()
        assert (row.state, row.effect) == ("SHIP", first[0].verdict.effect)

    opened(body)


def test_another_workspace_and_another_user_find_no_comparison(opened):
    async def body(store, caller):
        other = await create_workspace(store.database, store.vault, "other")
        user = replace(caller, user_id="u1")
        suite, (old, new, _) = await three(store, user)
        made = await records.create(store, user, baseline_id=old, candidate_ids=[new], suite_id=suite.id)
        await records.save_verdicts(store, user, made.id, [FULL], b"")
        assert await records.get_comparison(store, caller, made.id) == made  # who stands for all users
        for who in (Caller(caller.organization_id, other.id, None), replace(caller, user_id="u2")):
            assert await records.list_comparisons(store, who) == []
            for ask in (records.of_candidate, records.verdicts_of):
                with pytest.raises(NotFound, match="Candidate `"):
                    await ask(store, who, new)
            for id in (made.id, "cmp_none", "a\0b"):
                for ask in (
                    records.get_comparison(store, who, id),
                    records.latest(store, who, id),
                    records.set_state(store, who, id, "done"),
                    records.set_run(store, who, id, new, "run_1"),
                    records.save_verdicts(store, who, id, [], b""),
                ):
                    with pytest.raises(NotFound, match="Comparison `"):
                        await ask

    opened(body)
