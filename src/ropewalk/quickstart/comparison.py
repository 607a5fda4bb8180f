"""The quickstart's comparison: base against adapter on the held-out questions, through the path that serves; then the alias moves."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from ropewalk.compare.candidates import Candidate, add_candidate
from ropewalk.compare.outcomes import Outcome, outcomes
from ropewalk.compare.promotions import Promotion
from ropewalk.compare.records import Plan, StoredVerdict, create, get_comparison
from ropewalk.compare.report import SERVED_AT, page
from ropewalk.compare.runner import ComparisonRunner, Progress
from ropewalk.compare.runs import outputs, runs_of
from ropewalk.compare.ship import ship
from ropewalk.compare.suites import add_suite, list_suites, prompts
from ropewalk.compare.verdict import Verdict
from ropewalk.engine.models import Models
from ropewalk.files.store import Store
from ropewalk.quickstart.question import MAX_TOKENS, Asking
from ropewalk.server.compare_views import state_look
from ropewalk.tenants.caller import Caller

Tell = Callable[[str, float], None]  # what is being done, and how much of it is


@dataclass(frozen=True)
class Compared:
    """A comparison that was run, and what its two candidates answered, in the order of the questions."""

    stored: StoredVerdict
    baseline: Candidate
    candidate: Candidate
    outcomes: list[Outcome]  # the broken first
    before: list[str]
    after: list[str]

    @property
    def id(self) -> str:
        return self.stored.comparison_id

    @property
    def verdict(self) -> Verdict:
        return self.stored.verdict

    @property
    def look(self) -> str:
        """What colours the verdict."""
        return state_look(self.verdict.state)

    @property
    def headline(self) -> str:
        return self.verdict.reasons[0].sentence

    @property
    def url(self) -> str:
        return SERVED_AT + page(self.id)


def untold(doing: str, share: float) -> None:
    """For whoever does not watch."""


def compare(asking: Asking, file_id: str, baseline: str, candidate: str, tell: Tell = untold) -> Compared:
    """Makes a suite of a stored file, asks both, and decides; each question about one country is of one group."""

    async def work(store: Store, models: Models, caller: Caller) -> Compared:
        known = [suite for suite in await list_suites(store, caller) if suite.file_id == file_id]
        suite = known[0] if known else await add_suite(store, caller, file_id, name="held-out countries", hold=0)
        old, new = [await add_candidate(store, models, caller, name) for name in (baseline, candidate)]
        plan = Plan(sampling={"temperature": 0.0, "max_tokens": MAX_TOKENS})
        made = await create(store, caller, baseline_id=old.id, candidate_ids=[new.id], suite_id=suite.id, plan=plan)

        def told(progress: Progress) -> None:
            tell(progress.doing, progress.done / max(1, progress.total))

        stored = (await ComparisonRunner(store, models).run(caller, made.id, told))[0]
        done = await get_comparison(store, caller, made.id)
        runs = await runs_of(store, caller, done)
        asked = await prompts(store, caller, suite.id)
        said = {}
        for id in (old.id, new.id):
            found = {one.prompt_id: one.text or "" for one in await outputs(store, caller, runs[id].id) if one.sample == 0}
            said[id] = [found.get(prompt.id, "").strip() for prompt in asked]
        became = await outcomes(store, caller, done, new.id)
        return Compared(stored, old, new, became, said[old.id], said[new.id])

    return asking.run(work)


def ship_it(asking: Asking, compared: Compared, alias: str, tell: Tell = untold) -> Promotion:
    """Moves the alias to the candidate: hashes, loading, replay, swap."""

    async def work(store: Store, models: Models, caller: Caller) -> Promotion:
        candidate = compared.candidate.id
        return await ship(store, models, models.registry, caller, compared.id, candidate, alias, progress=tell)

    return asking.run(work)
