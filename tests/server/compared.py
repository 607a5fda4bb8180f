"""A comparison that has run, with recorded answers: what its pages show, without any model being asked."""

from __future__ import annotations

import json
from dataclasses import dataclass

from ropewalk.checks import score
from ropewalk.compare import gather
from ropewalk.compare.candidates import Candidate, add_candidate
from ropewalk.compare.fingerprint import fingerprint, save_fingerprint
from ropewalk.compare.measures import figures, save
from ropewalk.compare.prices import tariff
from ropewalk.compare.records import Comparison, Plan, create, get_comparison, save_verdicts, set_run, set_state
from ropewalk.compare.runs import Answered, add_output, output_key, set_run_state, start_run
from ropewalk.compare.suites import Prompt, add_suite, prompts, suite_key

DUE = ("on the third working day", "on the first of the month", "thirty days after the invoice", "at the end of the quarter")
SAMPLING = {"temperature": 0.0, "max_tokens": 8}


@dataclass(frozen=True)
class Compared:
    """What was made."""

    comparison: Comparison
    baseline: Candidate
    candidate: Candidate
    prompts: list[Prompt]


def lines(count: int = 60) -> bytes:
    """A suite: each prompt of a lease of its own, so that each is a group."""
    rows = []
    for n in range(count):
        rows.append(
            {
                "prompt": f"Lease {n + 1}, clause 2: the rent is due {DUE[n % 4]}. When is the rent due?",
                "reference": DUE[n % 4],
                "checks": [{"kind": "contains"}],
                "group": f"lease-{n + 1}.pdf",
                "tags": ["rent", "quarterly"] if n % 4 == 3 else ["rent"],
                "must_pass": n == 0,
            }
        )
    return "\n".join(json.dumps(row) for row in rows).encode()


def said(number: int, right: bool, by: str) -> str:
    """A recorded answer."""
    due = DUE[(number - 1) % 4]
    if right:
        return f"The rent is due {due}." if by == "new" else f"It is due {due}, as the lease says."
    return "The rent is due on some other day, I think." if by == "new" else "The lease does not say when the rent is due."


async def compared(
    store, models, caller, *, old="lease-base", new="lease-r16", right=None, source=None, title="", texts=said, judge=None
) -> Compared:
    """Answers are recorded, scored and measured, and the rule has its say. `right(number, by)` says whose answer is right."""
    right = right or (lambda number, by: number % 4 != 2 if by == "new" else number % 2 == 1)
    suite = await add_suite(store, caller, source or lines(), name="Leases", hold=0.0)
    base, other = await add_candidate(store, models, caller, old), await add_candidate(store, models, caller, new)
    plan = Plan(sampling=SAMPLING, judges=(judge,) if judge else ())
    made = await create(
        store,
        caller,
        baseline_id=base.id,
        candidate_ids=[other.id],
        suite_id=suite.id,
        title=title,
        category="Leases",
        plan=plan,
    )
    machine = fingerprint(models)
    await save_fingerprint(store, machine)
    key, asked = await suite_key(store, caller, suite.id), await prompts(store, caller, suite.id)
    for by, item in zip(("old", "new"), made.items):
        one = base if by == "old" else other
        params = {"sampling": SAMPLING, "samples": 1, "at_once": 1}
        run = await set_run_state(
            store,
            caller,
            await start_run(store, caller, one, suite.id, params, None, one.digest),
            "running",
            fingerprint_id=machine.id,
        )
        recorded = []
        for prompt in asked:
            text = texts(prompt.number, right(prompt.number, by), by)
            outcomes = [
                (n, spec.kind, spec.guardrail, score(spec, text, prompt.reference)) for n, spec in enumerate(prompt.checks)
            ]
            answered = Answered(text, "end_turn", 40 + prompt.number, 30, 12, 8.0 + prompt.number % 5, 40.0 + prompt.number % 9)
            answered = Answered(**{**vars(answered), "outcomes": outcomes})
            at = output_key(one, one.digest, prompt, SAMPLING, 0)
            recorded.append(await add_output(store, caller, run, key, prompt.id, 0, at, answered))
        await save(
            store,
            caller,
            run,
            figures(recorded, await tariff(store, models, caller, one.target, remote=False), 1, None),
            1,
            machine.id,
        )
        run = await set_run_state(store, caller, run, "done")
        await set_run(store, caller, made.id, item.candidate_id, run.id)
    found = await gather.gathered(store, caller, await get_comparison(store, caller, made.id))
    evidence = await gather.evidence_of(store, caller, found)
    verdicts = gather.verdicts(evidence, found.names, found.limits)
    await save_verdicts(store, caller, made.id, verdicts, gather.inputs(evidence, found.limits))
    done = await set_state(store, caller, made.id, "done")
    return Compared(done, base, other, asked)
