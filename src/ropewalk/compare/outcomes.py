"""What became of each prompt of a comparison: broke, fixed, both wrong, both right, the same; without opening any answer."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import select
from sqlalchemy.ext.asyncio import AsyncConnection

from ropewalk.compare.diff import Answers, Change, change
from ropewalk.compare.records import Comparison
from ropewalk.compare.suites import Prompt, prompts
from ropewalk.compare.tables import check_results, judgements, judges, outputs
from ropewalk.errors import NotFound
from ropewalk.files.store import Store
from ropewalk.tenants.caller import Caller


@dataclass(frozen=True)
class Outcome:
    """What became of one prompt under one candidate, against the baseline."""

    prompt: Prompt
    change: Change
    old_passed: bool | None  # None: no check looked
    new_passed: bool | None
    preference: float | None  # of the judges, for the candidate


async def outcomes(store: Store, caller: Caller, comparison: Comparison, candidate_id: str) -> list[Outcome]:
    """Every prompt that both answered, the broken first and otherwise in the suite's order; nothing when the suite is gone."""
    runs = [comparison.item(id).run_id for id in (comparison.baseline_id, candidate_id)]
    if comparison.suite_id is None or None in runs:
        return []
    try:
        asked = await prompts(store, caller, comparison.suite_id)
    except NotFound:  # its texts went with it
        return []
    async with store.database.reading() as connection:
        columns = outputs.c.id, outputs.c.run_id, outputs.c.prompt_id, outputs.c.sample, outputs.c.text_hash, outputs.c.error
        # Beyond the samples that were planned lie questions that were asked again.
        counted = outputs.c.run_id.in_(runs) & (outputs.c.sample < comparison.plan.samples)
        query = select(*columns).where(counted).order_by(outputs.c.sample)
        rows = (await connection.execute(query)).all()
        results = select(check_results.c.output_id, check_results.c.passed).join(
            outputs, outputs.c.id == check_results.c.output_id
        )
        passes: dict[str, bool] = {}
        for id, passed in await connection.execute(results.where(outputs.c.run_id.in_(runs))):
            passes[id] = passes.get(id, True) and passed
        preferences = await _preferences(connection, comparison, candidate_id)
    return await asyncio.to_thread(_outcomes, asked, rows, runs, passes, preferences)


def counts(found: Iterable[Outcome]) -> dict[Change, int]:
    """How many prompts of each kind."""
    counted = Counter(one.change for one in found)
    return {kind: counted[kind] for kind in Change}


def _outcomes(
    asked: Sequence[Prompt],
    rows: Sequence[Any],
    runs: Sequence[str | None],
    passes: Mapping[str, bool],
    preferences: Mapping[str, float],
) -> list[Outcome]:
    by_place: dict[tuple[str | None, str], list[Any]] = {}
    for row in rows:
        by_place.setdefault((row.run_id, row.prompt_id), []).append(row)
    found = []
    for prompt in asked:
        old, new = (by_place.get((run, prompt.id), []) for run in runs)
        if not old or not new:
            continue
        old_passed, new_passed = _passed(old, passes), _passed(new, passes)
        preference = preferences.get(prompt.id)
        if old_passed is not None and new_passed is not None:
            held = old_passed, new_passed
        else:  # a judge prefers one of the two, or neither
            score = 0.5 if preference is None else preference
            held = score <= 0.5, score >= 0.5
        became = change(Answers(prompt.id, old[0].text_hash or "", new[0].text_hash or "", *held))
        found.append(Outcome(prompt, became, old_passed, new_passed, preference))
    order = list(Change)
    return sorted(found, key=lambda one: order.index(one.change))


def _passed(samples: Sequence[Any], passes: Mapping[str, bool]) -> bool | None:
    """Whether most of the samples passed; an answer that ended in an error did not."""
    known = [passes.get(row.id, False) for row in samples if row.id in passes or row.error]
    return 2 * sum(known) > len(known) if known else None


async def _preferences(connection: AsyncConnection, comparison: Comparison, candidate_id: str) -> dict[str, float]:
    """By prompt, the mean of the admitted judges' scores."""
    query = (
        select(judgements.c.prompt_id, judgements.c.score)
        .join(judges, judges.c.id == judgements.c.judge_id)
        .where(judgements.c.comparison_id == comparison.id, judgements.c.candidate_id == candidate_id)
        .where(judgements.c.score.is_not(None), judges.c.admitted.is_(True))
    )
    scores: dict[str, list[float]] = {}
    for prompt_id, score in await connection.execute(query):
        scores.setdefault(prompt_id, []).append(score)
    return {id: sum(given) / len(given) for id, given in scores.items()}
