"""A comparison that has run, as the runner would have written it down: answers are given, so that no model is asked."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace

from sqlalchemy import insert

from ropewalk.compare.candidates import get_candidate
from ropewalk.compare.records import Comparison, create, get_comparison, set_run, set_state
from ropewalk.compare.runs import Answered, add_output, start_run
from ropewalk.compare.suites import add_suite, prompts, suite_key
from ropewalk.compare.tables import candidates, lineage
from ropewalk.database import now
from ropewalk.files.store import Store
from ropewalk.ids import new_id
from ropewalk.tenants.caller import Caller

Answers = Callable[[str, int], str]  # of a candidate's name and a prompt's number


async def candidate(store: Store, caller: Caller, name: str, family: str = "", trained_on: str | None = None) -> str:
    """The id of a base that nobody serves."""
    id = new_id("cand")
    row = {"id": id, "workspace_id": caller.workspace_id, "user_id": caller.user_id, "kind": "base", "name": name}
    row |= {"target": name, "digest": name, "family": family, "template_digest": "", "created_at": now()}
    async with store.database.writing() as connection:
        await connection.execute(insert(candidates).values(row))
        if trained_on is not None:
            told = {"candidate_id": id, "role": "train_data", "ref": trained_on}
            await connection.execute(insert(lineage).values(told))
    return id


async def votable(
    store: Store,
    caller: Caller,
    answers: Answers = lambda name, number: f"{'one' if name == 'rope-seven' else 'two'} says {number}",
    *,
    count: int = 10,
    names: tuple[str, ...] = ("rope-seven", "hemp-nine"),
    hold: float = 0.0,
    suite: str = "support",
    trained_on: str | None = None,
    title: str = "",
) -> Comparison:
    """A comparison of these candidates on `count` prompts, done."""
    rows = [{"prompt": f"question {number}", "group": f"g{number}"} for number in range(1, count + 1)]
    source = "\n".join(map(json.dumps, rows)).encode()
    made = await add_suite(store, caller, source, name=suite, hold=hold)
    key = await suite_key(store, caller, made.id)
    ids = [await candidate(store, caller, name, trained_on=trained_on if number else None) for number, name in enumerate(names)]
    found = await create(store, caller, baseline_id=ids[0], candidate_ids=ids[1:], suite_id=made.id, title=title)
    for item in found.items:
        one = await get_candidate(store, caller, item.candidate_id)
        run = await start_run(store, caller, one, made.id, {}, None, one.digest)
        await set_run(store, caller, found.id, one.id, run.id)
        for prompt in await prompts(store, caller, made.id):
            answered = Answered(text=answers(one.name, prompt.number), finish="end_turn")
            await add_output(store, caller, run, key, prompt.id, 0, new_id("key"), answered)
    await set_state(store, caller, found.id, "done")
    return await get_comparison(store, caller, found.id)


def keyed(caller: Caller, key_id: str) -> Caller:
    """The same workspace, by another key."""
    return replace(caller, key_id=key_id)
