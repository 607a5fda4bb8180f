"""The candidates of a comparison at work: each with its run, what it has answered so far, and what that measured."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from ropewalk.compare import measures
from ropewalk.compare.candidates import Candidate, current_digest
from ropewalk.compare.gather import runnable
from ropewalk.compare.prices import Tariff, tariff
from ropewalk.compare.records import Comparison, set_run
from ropewalk.compare.runs import Output, Run, State, get_run, origins, output_key, outputs, set_run_state, start_run
from ropewalk.compare.suites import Prompt
from ropewalk.engine.models import Models
from ropewalk.errors import RopewalkError
from ropewalk.files.store import Store
from ropewalk.tenants.caller import Caller


@dataclass
class Subject:
    """One candidate at work."""

    id: str  # of the comparison's item; for a card, what is asked is the candidate it is linked to
    candidate: Candidate
    run: Run
    tariff: Tariff
    outputs: dict[tuple[str, int], Output] = field(default_factory=dict)  # by prompt and sample; errors too
    lost: int = 0  # questions in a row without an answer
    failed: str | None = None  # why it cannot be asked
    asked: int = 0  # in this session

    def lacks(self, prompt: Prompt, sample: int) -> bool:
        """Whether this is still to be asked."""
        found = self.outputs.get((prompt.id, sample))
        return found is None or not found.answered

    def passed(self, prompt: Prompt, samples: int) -> bool | None:
        """Whether all its answers pass; None where one is missing, or nothing checks them."""
        found = [self.outputs.get((prompt.id, sample)) for sample in range(samples)]
        told = [one.passed if one is not None and one.answered else None for one in found]
        return None if None in told else all(told)

    def key(self, prompt: Prompt, sample: int) -> str:
        """Under which its answer is known in every comparison."""
        return output_key(self.candidate, self.run.digest, prompt, self.run.params["sampling"], sample)


async def open_subject(
    store: Store, models: Models, caller: Caller, comparison: Comparison, id: str, params: Mapping[str, Any], machine: str
) -> Subject | None:
    """A candidate with its run, ready to be asked, or with the reason why it cannot be; None for a card that nothing is linked to."""
    candidate = await runnable(store, caller, id)
    if candidate is None:
        return None
    assert comparison.suite_id is not None
    why = None
    try:
        if await current_digest(store, models, caller, candidate.target) != candidate.digest:
            why = f"'{candidate.target}' is served with other weights than when it was added; add it again"
    except (RopewalkError, OSError) as error:  # OSError: its folder is gone
        why = f"'{candidate.target}' is not served: {error}"
    run_id = comparison.item(id).run_id
    if run_id is None:
        run = await start_run(store, caller, candidate, comparison.suite_id, params, comparison.plan.seed, candidate.digest)
        await set_run(store, caller, comparison.id, id, run.id)
    else:
        run = await get_run(store, caller, run_id)
    run = await set_run_state(store, caller, run, "running", fingerprint_id=machine)
    price = await tariff(store, models, caller, candidate.target, remote=candidate.kind == "remote")
    known = {(one.prompt_id, one.sample): one for one in await outputs(store, caller, run.id)}
    return Subject(id, candidate, run, price, known, failed=why)


async def close_subject(
    store: Store, caller: Caller, subject: Subject, samples: int, peak_bytes: int | None, stopped: str | None
) -> None:
    """Writes down what its answers measured, and how its run ended."""
    run, at_once = subject.run, int(subject.run.params["at_once"])
    assert run.fingerprint_id is not None
    counted = [one for (_, sample), one in subject.outputs.items() if sample < samples]
    taken = await origins(store, [one.cached_from for one in counted if one.cached_from is not None])
    since = int(run.params.get("since", 0))

    def here(one: Output) -> bool:
        if one.cached_from is not None:
            return taken.get(one.cached_from) == (run.fingerprint_id, at_once)
        return one.created_at >= since

    timed = [one if here(one) else replace(one, ttft_ms=None, total_ms=None) for one in counted]
    found = measures.figures(timed, subject.tariff, at_once, peak_bytes)
    if found and (subject.asked or not await measures.measurements(store, caller, run.id)):
        await measures.save(store, caller, run, found, at_once, run.fingerprint_id)
    ended: State = "failed" if subject.failed else "done"
    subject.run = await set_run_state(store, caller, run, ended, subject.failed, stopped=stopped)
