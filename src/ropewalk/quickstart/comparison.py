"""The quickstart's comparison: base against adapter on the held-out questions, through the path that serves; then the alias moves."""

from __future__ import annotations

from dataclasses import dataclass

from ropewalk.compare.candidates import add_candidate
from ropewalk.compare.promotions import Promotion
from ropewalk.compare.records import Plan, create, get_comparison
from ropewalk.compare.report import SERVED_AT, page
from ropewalk.compare.runner import ComparisonRunner
from ropewalk.compare.runs import outputs, runs_of
from ropewalk.compare.ship import ship
from ropewalk.compare.suites import add_suite, list_suites, prompts
from ropewalk.compare.verdict import Verdict
from ropewalk.engine.models import Models
from ropewalk.files.store import Store
from ropewalk.quickstart.question import MAX_TOKENS, Asking
from ropewalk.tenants.caller import Caller


@dataclass(frozen=True)
class Compared:
    """A comparison that was run, and what its two candidates answered, in the order of the questions."""

    id: str
    candidate_id: str
    verdict: Verdict
    before: list[str]
    after: list[str]

    @property
    def headline(self) -> str:
        return self.verdict.reasons[0].sentence

    @property
    def url(self) -> str:
        return SERVED_AT + page(self.id)


def compare(asking: Asking, file_id: str, baseline: str, candidate: str) -> Compared:
    """Makes a suite of a stored file, asks both, and decides; each question about one country is of one group."""

    async def work(store: Store, models: Models, caller: Caller) -> Compared:
        known = [suite for suite in await list_suites(store, caller) if suite.file_id == file_id]
        suite = known[0] if known else await add_suite(store, caller, file_id, name="held-out countries", hold=0)
        old, new = [await add_candidate(store, models, caller, name) for name in (baseline, candidate)]
        plan = Plan(sampling={"temperature": 0.0, "max_tokens": MAX_TOKENS})
        made = await create(store, caller, baseline_id=old.id, candidate_ids=[new.id], suite_id=suite.id, plan=plan)
        stored = (await ComparisonRunner(store, models).run(caller, made.id))[0]
        runs = await runs_of(store, caller, await get_comparison(store, caller, made.id))
        asked = await prompts(store, caller, suite.id)
        said = {}
        for id in (old.id, new.id):
            found = {one.prompt_id: one.text or "" for one in await outputs(store, caller, runs[id].id) if one.sample == 0}
            said[id] = [found.get(prompt.id, "").strip() for prompt in asked]
        return Compared(made.id, new.id, stored.verdict, said[old.id], said[new.id])

    return asking.run(work)


def ship_it(asking: Asking, compared: Compared, alias: str) -> Promotion:
    """Moves the alias to the candidate: hashes, loading, replay, swap."""

    async def work(store: Store, models: Models, caller: Caller) -> Promotion:
        return await ship(store, models, models.registry, caller, compared.id, compared.candidate_id, alias)

    return asking.run(work)
