"""Recorded prompts asked again before an alias is moved: what is about to be served answers as what was measured did."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence

from sqlalchemy import select

from ropewalk.checks import score
from ropewalk.compare.asking import ask, request_for, sampling_of
from ropewalk.compare.candidates import Candidate
from ropewalk.compare.promotions import Replay
from ropewalk.compare.records import Comparison
from ropewalk.compare.runs import Output, get_run, outputs
from ropewalk.compare.suites import Prompt, prompt
from ropewalk.compare.tables import check_results
from ropewalk.compare.tables import outputs as output_rows
from ropewalk.engine.models import Models
from ropewalk.errors import BadInput, NotFound, VerificationFailed
from ropewalk.files.store import Store
from ropewalk.tenants.caller import Caller

MOST = 20
SHOWN = 60  # characters of an answer that an error shows


async def answered_again(
    store: Store,
    models: Models,
    caller: Caller,
    comparison: Comparison,
    candidate_id: str,
    candidate: Candidate,
    progress: Callable[[float], None] = lambda share: None,
) -> Replay:
    """Asks some of the recorded prompts through the path that serves; VerificationFailed where one fares worse than it did.

    `candidate` is what was run for the comparison's `candidate_id`, which may be a card.

    The recorded text is as good as the checks: where it comes again nothing is scored, and where another comes it must pass whatever
    the recorded one passed. One that no check looks at must come again, unless it was drawn by chance.
    """
    run_id = comparison.item(candidate_id).run_id
    if run_id is None or comparison.suite_id is None:
        raise BadInput(f"nothing is recorded of '{candidate.name}' in comparison `{comparison.id}`; run it first")
    sampling = sampling_of((await get_run(store, caller, run_id)).params.get("sampling", {}))
    try:
        chosen = await _chosen(store, run_id, by_chance=sampling["temperature"] > 0)
        recorded = {one.prompt_id: one for one in await outputs(store, caller, run_id, chosen) if one.sample == 0}
        asked = [await prompt(store, caller, id) for id in chosen]
    except NotFound as error:
        raise BadInput(
            f"the suite of comparison `{comparison.id}` is gone, and what was answered with it; compare again"
        ) from error
    if not asked:
        raise BadInput(f"no answer of '{candidate.name}' is left that could be asked for again; compare again")
    equal = passed = 0
    for number, one in enumerate(asked, 1):
        before = recorded[one.id]
        if await _again(models, caller, candidate, one, before, sampling):
            equal += 1
        else:
            passed += 1
        progress(number / len(asked))
    return Replay(len(asked), equal, passed)


async def _again(
    models: Models, caller: Caller, candidate: Candidate, one: Prompt, before: Output, sampling: Mapping[str, object]
) -> bool:
    """Whether the very answer came; False where another did that is as good."""
    now = await ask(models, caller, request_for(one, candidate.target, sampling))
    if now.text is None:
        raise VerificationFailed(
            f"prompt {one.number} of the suite was answered when it was recorded, and is not now: {now.error}"
        )
    if now.text == before.text:
        return True
    was = {check.number for check in before.checks if check.passed}
    if not before.checks:
        raise VerificationFailed(
            f"prompt {one.number} of the suite is answered {_short(now.text)}, and was answered {_short(before.text or '')}"
        )
    for number in sorted(was):
        outcome = await asyncio.to_thread(score, one.checks[number], now.text, one.reference)
        if not outcome.passed:
            raise VerificationFailed(
                f"prompt {one.number} of the suite fails a check that it passed, {one.checks[number].kind}: {outcome.detail}; "
                f"it is answered {_short(now.text)}, and was answered {_short(before.text or '')}"
            )
    return False


async def _chosen(store: Store, run_id: str, *, by_chance: bool) -> Sequence[str]:
    """Prompts with an answer, from one end of the run to the other; those with checks first, and only those where answers are drawn."""
    answered = (output_rows.c.run_id == run_id) & (output_rows.c.sample == 0) & output_rows.c.error.is_(None)
    checked = select(check_results.c.output_id).where(check_results.c.output_id == output_rows.c.id).exists()
    query = select(output_rows.c.prompt_id, checked.label("checked")).where(answered)
    async with store.database.reading() as connection:
        rows = (await connection.execute(query.order_by(output_rows.c.created_at, output_rows.c.id))).all()
    with_checks = _spread([row.prompt_id for row in rows if row.checked], MOST)
    if by_chance:
        return with_checks
    return [*with_checks, *_spread([row.prompt_id for row in rows if not row.checked], MOST - len(with_checks))]


def _spread(ids: Sequence[str], count: int) -> list[str]:
    """So many of them, at even distances."""
    if len(ids) <= count:
        return list(ids)
    return [ids[index * len(ids) // count] for index in range(count)]


def _short(text: str) -> str:
    return repr(text if len(text) <= SHOWN else text[: SHOWN - 3] + "...")
