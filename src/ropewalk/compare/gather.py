"""What was recorded -> the evidence that the rule decides on, and what the panel reads."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import combinations
from statistics import mean
from typing import Any

from ropewalk.compare import judges
from ropewalk.compare.bradley_terry import Match, Strength, bradley_terry
from ropewalk.compare.candidates import Candidate, get_candidate
from ropewalk.compare.evidence import Evidence, Finding, Guardrail, Kind, Limits, Measurement, Metric, Row, Trouble
from ropewalk.compare.labels import Pair
from ropewalk.compare.leakage import leaks
from ropewalk.compare.measures import PASS_RATE, StoredMeasurement, measurements
from ropewalk.compare.panel import Exhibit, PanelEvidence
from ropewalk.compare.records import Comparison
from ropewalk.compare.rule import SLICE_PROMPTS, decide
from ropewalk.compare.runs import Output, Run, get_run, outputs
from ropewalk.compare.suites import Prompt, get_suite, prompts
from ropewalk.compare.verdict import Verdict
from ropewalk.files.store import Store
from ropewalk.tenants.caller import Caller

LOST = 0.02  # of the prompts may be without an answer; with more, those that are missing may be what decides
NAMED = 20  # prompts that a finding names at most
FORMS = ("schema", "regex", "length", "choice")  # checks of an answer's form
CUT_OFF = ("max_tokens", "model_context_window_exceeded")


@dataclass(frozen=True)
class Side:
    """One candidate of a comparison: what answered for it, and what was answered."""

    id: str  # of the comparison's item
    candidate: Candidate  # what was run: for a card, the candidate it is linked to
    run: Run
    outputs: Mapping[str, Sequence[Output]]  # by prompt; those of one prompt by sample
    samples: int
    measured: Mapping[str, StoredMeasurement]  # by metric

    def answers(self, prompt: Prompt) -> list[Output]:
        """What counts as its answers: without the one that is asked again for."""
        return [one for one in self.outputs.get(prompt.id, ()) if one.sample < self.samples and one.answered]

    def again(self, prompt: Prompt) -> Output | None:
        """What it answered when it was asked once more."""
        return next((one for one in self.outputs.get(prompt.id, ()) if one.sample >= self.samples and one.answered), None)

    def score(self, prompt: Prompt) -> float | None:
        """The share of its answers that pass; None where there is none, or nothing that checks them."""
        passed = [one.passed for one in self.answers(prompt) if one.passed is not None]
        return mean(passed) if passed else None

    def text(self, prompt: Prompt) -> str | None:
        """Its first answer."""
        return next((one.text for one in self.answers(prompt)), None)


@dataclass(frozen=True)
class Gathered:
    """All that one comparison recorded."""

    comparison: Comparison
    prompts: Sequence[Prompt]
    baseline: Side | None
    sides: Mapping[str, Side]  # by candidate, the baseline not among them; those without a run are missing
    bench: judges.Bench
    limits: Limits
    names: Mapping[str, str]  # of candidates
    lengths: Mapping[Pair, tuple[int, int]]  # of the answers that are left to judges, the baseline's first


async def gathered(store: Store, caller: Caller, comparison: Comparison) -> Gathered:
    """Reads all of it."""
    names = {item.candidate_id: (await get_candidate(store, caller, item.candidate_id)).name for item in comparison.items}
    if comparison.suite_id is None:
        return Gathered(comparison, (), None, {}, judges.Bench(), comparison.plan.limits, names, {})
    asked = await prompts(store, caller, comparison.suite_id)
    suite = await get_suite(store, caller, comparison.suite_id)
    found: dict[str, Side] = {}
    for item in comparison.items:
        candidate = await runnable(store, caller, item.candidate_id)
        if candidate is not None and item.run_id is not None:
            run = await get_run(store, caller, item.run_id)
            by_prompt: dict[str, list[Output]] = {}
            for one in await outputs(store, caller, run.id):
                by_prompt.setdefault(one.prompt_id, []).append(one)
            measured = {one.metric: one for one in await measurements(store, caller, run.id)}
            parts = item.candidate_id, candidate, run, by_prompt, comparison.plan.samples, measured
            found[item.candidate_id] = Side(*parts)
    baseline = found.pop(comparison.baseline_id, None)
    limits = comparison.plan.limits
    if limits.margin == Limits().margin:  # nobody set another for this comparison
        limits = replace(limits, margin=suite.margin)
    lengths = {}
    for prompt in asked:
        old = baseline.text(prompt) if baseline is not None and prompt.judged else None
        for id, side in found.items() if old is not None else ():
            if (new := side.text(prompt)) is not None:
                lengths[id, prompt.id] = len(old or ""), len(new)
    bench = await judges.bench(store, caller, comparison, lengths)
    return Gathered(comparison, asked, baseline, found, bench, limits, names, lengths)


async def runnable(store: Store, caller: Caller, candidate_id: str) -> Candidate | None:
    """What is asked where this candidate is: itself, or what a card is linked to; None for a card alone."""
    candidate = await get_candidate(store, caller, candidate_id)
    if candidate.runs:
        return candidate
    return await get_candidate(store, caller, candidate.linked_to) if candidate.linked_to is not None else None


async def evidence(store: Store, caller: Caller, comparison: Comparison) -> list[Evidence]:
    """All that the rule may look at, one for each candidate of the comparison in its order."""
    return await evidence_of(store, caller, await gathered(store, caller, comparison))


async def evidence_of(store: Store, caller: Caller, found: Gathered) -> list[Evidence]:
    """The same, of what was read."""
    return [await of_candidate(store, caller, found, id) for id in found.comparison.candidate_ids]


async def of_candidate(store: Store, caller: Caller, found: Gathered, id: str) -> Evidence:
    """What is known of one candidate."""
    comparison = found.comparison
    plain = Evidence(id, comparison.baseline_id, chosen_from=comparison.item(id).chosen_from)
    candidate = await runnable(store, caller, id)
    if candidate is None or comparison.suite_id is None:
        return replace(plain, ran=False)
    new, old = found.sides.get(id), found.baseline
    if new is None or old is None:
        which = "the baseline" if old is None else candidate.name
        return replace(plain, troubles=(Trouble(id, Finding.INCOMPLETE, f"{which} was not run"),))
    rows, missing = [], []
    for prompt in found.prompts:
        row = row_of(found, prompt, old, new)
        if row is not None:
            rows.append(row)
        elif not prompt.held or prompt.must_pass:
            missing.append(prompt)
    troubles = [*states(old, new), *mismatches(old, new), *incomplete(found, old, new, missing)]
    for side in (old, new):
        troubles += await leaks(store, caller, comparison.suite_id, side.candidate)
    judged = any(prompt.judged for prompt in found.prompts)
    return replace(
        plain,
        rows=rows,
        measurements=figures(old, new),
        guardrails=guardrails(found.prompts, old, new),
        # Where checks score everything, a judge that was refused is told, and nothing hangs on it.
        troubles=[*troubles, *(replace(one, blocks=one.blocks and judged) for one in found.bench.troubles)],
        judges=found.bench.records if judged else (),
        anytime=comparison.plan.stop_early,
        same_artifact=new.run.digest == old.run.digest and new.candidate.template_digest == old.candidate.template_digest,
    )


def row_of(found: Gathered, prompt: Prompt, old: Side, new: Side) -> Row | None:
    """One prompt that both answered and that was scored."""
    shared: dict[str, Any] = {
        "id": prompt.id,
        "group": prompt.group,
        "must_pass": prompt.must_pass,
        "held": prompt.held,
        "slices": prompt.tags,
    }
    if prompt.judged:
        preferred = found.bench.preferences.get((new.id, prompt.id))
        lengths = found.lengths.get((new.id, prompt.id))
        if found.bench.records and lengths is not None and old.text(prompt) == new.text(prompt):
            preferred = 0.5  # nobody need be asked
        if preferred is None or lengths is None:
            return None
        return Row(**shared, old=1 - preferred, new=preferred, kind=Kind.JUDGE, lengths=lengths)
    scores = old.score(prompt), new.score(prompt)
    if scores[0] is None or scores[1] is None:
        return None
    again = new.again(prompt)
    repeated = again is None or again.passed is not True  # one that passes when it is asked again is no confirmed failure
    return Row(**shared, old=scores[0], new=scores[1], repeated=repeated)


def states(old: Side, new: Side) -> Iterable[Trouble]:
    """Runs that did not come to an end."""
    for side in (old, new):
        if side.run.state == "failed":
            yield Trouble(side.run.id, Finding.INCOMPLETE, f"{side.candidate.name} could not be asked: {side.run.error}")


def mismatches(old: Side, new: Side) -> Iterable[Trouble]:
    """What was not the same for both."""
    for side in (old, new):
        if side.run.digest != side.candidate.digest:
            name = side.candidate.name
            yield Trouble(side.run.id, Finding.MISMATCH, f"what answered is not {name} as it was added; add it again")
    for what in ("sampling", "samples"):
        if old.run.params.get(what) != new.run.params.get(what):
            yield Trouble(new.run.id, Finding.MISMATCH, f"the two were asked with different {what}")
    if old.run.path != new.run.path:
        sentence = f"one was asked by way of {old.run.path}, the other of {new.run.path}"
        yield Trouble(new.run.id, Finding.MISMATCH, sentence)
    templates = old.candidate.template_digest, new.candidate.template_digest
    if all(templates) and templates[0] != templates[1]:  # as of two families it must be
        yield Trouble(new.run.id, Finding.MISMATCH, "the two write a conversation by different chat templates", blocks=False)


def incomplete(found: Gathered, old: Side, new: Side, missing: Sequence[Prompt]) -> Iterable[Trouble]:
    """Prompts without an answer or a score."""
    lost: list[Prompt] = []
    unjudged: list[Prompt] = []
    skipped = 0
    for prompt in missing:
        asked = [side.outputs.get(prompt.id) for side in (old, new)]
        if all(asked) and all(side.answers(prompt) for side in (old, new)):
            unjudged.append(prompt)
        elif not any(asked) and (old.run.stopped or new.run.stopped):
            skipped += 1
        else:
            lost.append(prompt)
    total = sum(not prompt.held or prompt.must_pass for prompt in found.prompts)
    ids = ", ".join(f"#{prompt.number}" for prompt in lost[:NAMED])
    if lost:
        blocks = len(lost) > LOST * total or any(prompt.must_pass for prompt in lost)
        yield Trouble(
            f"incomplete:{new.id}", Finding.INCOMPLETE, f"{len(lost)} of {total} prompts have no answer: {ids}", blocks
        )
    if skipped:
        why = new.run.stopped or old.run.stopped
        yield Trouble(f"stopped:{new.id}", Finding.INCOMPLETE, f"{skipped} of {total} prompts were not asked: {why}", False)
    if unjudged and not found.bench.troubles:  # else those say why
        alone = len(unjudged) == total
        why = "no judge was named" if not found.comparison.plan.judges else "no judge that was admitted said anything of them"
        sentence = f"{len(unjudged)} of {total} prompts have no check, and {why}"
        yield Trouble(f"unjudged:{new.id}", Finding.INCOMPLETE, sentence, alone)


def guardrails(asked: Sequence[Prompt], old: Side, new: Side) -> list[Guardrail]:
    """Checks that must hold whatever the score: broken where what is served keeps them, and again when it was asked again."""
    broken: list[Guardrail] = []
    held: dict[str, int] = {}
    for prompt in asked:
        for number, spec in enumerate(prompt.checks):
            if not spec.guardrail or not old.answers(prompt) or not new.answers(prompt):
                continue
            again = new.again(prompt)
            fails = not all(_held(one, number) for one in new.answers(prompt)) and not (again and _held(again, number))
            if fails and all(_held(one, number) for one in old.answers(prompt)):
                broken.append(Guardrail(prompt.id, f"breaks the guardrail '{spec.kind}' on prompt #{prompt.number}", True))
            elif not fails:
                held[spec.kind] = held.get(spec.kind, 0) + 1
    kept = [Guardrail(f"guardrail:{kind}", f"kept the guardrail '{kind}' on {n} prompts", False) for kind, n in held.items()]
    return broken[:NAMED] + kept


def figures(old: Side, new: Side) -> list[Measurement]:
    """What was measured of both."""
    found = []
    for metric in Metric:
        one, other = old.measured.get(metric), new.measured.get(metric)
        if one is not None and other is not None and one.unit == other.unit:
            machines = one.fingerprint_id, other.fingerprint_id
            found.append(Measurement(other.id, metric, one.unit, one.measured, other.measured, *machines))
    return found


def verdicts(found: Sequence[Evidence], names: Mapping[str, str], limits: Limits) -> list[Verdict]:
    """What the rule says, with sentences that call candidates by their names."""
    told = [replace(one, candidate=names[one.candidate], baseline=names[one.baseline]) for one in found]
    decided = decide(told, limits)
    return [replace(said, candidate=one.candidate, baseline=one.baseline) for said, one in zip(decided, found, strict=True)]


def inputs(found: Sequence[Evidence], limits: Limits) -> str:
    """The evidence as one text, of which a verdict keeps the hash: the same evidence gives the same text."""
    return json.dumps([[asdict(one) for one in found], asdict(limits)], sort_keys=True, default=str)


def _held(one: Output, number: int) -> bool:
    return not one.refused and all(check.passed for check in one.checks if check.number == number)


# -- what else is read out of the same record


async def strengths(store: Store, caller: Caller, comparison: Comparison) -> list[Strength]:
    """Three candidates or more on one scale, strongest first, by the candidates' ids; [] for two, about which it says nothing new."""
    found = await gathered(store, caller, comparison)
    if found.baseline is None or len(found.sides) < 2:
        return []
    sides = {found.baseline.id: found.baseline, **found.sides}
    matches: list[Match] = []
    for prompt in found.prompts:
        if prompt.judged:  # judges held each against the baseline alone
            rows = {id: row_of(found, prompt, found.baseline, side) for id, side in found.sides.items()}
            matches += [Match(id, found.baseline.id, row.new, prompt.group) for id, row in rows.items() if row is not None]
            continue
        scores = {id: score for id, side in sides.items() if (score := side.score(prompt)) is not None}
        for left, right in combinations(scores, 2):
            matches.append(Match(left, right, 0.5 + (scores[left] - scores[right]) / 2, prompt.group))
    return await asyncio.to_thread(bradley_terry, matches, found.baseline.id) if matches else []


async def panel_evidence(store: Store, caller: Caller, comparison: Comparison) -> dict[str, PanelEvidence]:
    """What the panel may read about each candidate, the baseline among them; what people voted is added by whoever counts that."""
    found = await gathered(store, caller, comparison)
    if found.baseline is None:
        return {item.candidate_id: PanelEvidence() for item in comparison.items}
    sides = {found.baseline.id: found.baseline, **found.sides}
    rates = {id: rate.value for id, side in sides.items() if (rate := side.measured.get(PASS_RATE)) is not None}
    read = {item.candidate_id: PanelEvidence() for item in comparison.items}
    for id, side in sides.items():
        leaked = await leaks(store, caller, side.run.suite_id, side.candidate)
        read[id] = _read(found, side, rates, leaked)
    return read


def _read(found: Gathered, side: Side, rates: Mapping[str, float], leaked: Sequence[Trouble]) -> PanelEvidence:
    base = found.baseline
    assert base is not None
    scored = [(prompt, score) for prompt in found.prompts if (score := side.score(prompt)) is not None]
    rate, cost = side.measured.get(PASS_RATE), side.measured.get(Metric.COST)
    served = base.measured.get(Metric.COST)
    comparable = cost and served and cost.unit == served.unit and cost.fingerprint_id == served.fingerprint_id
    answers = [(prompt, one) for prompt in found.prompts for one in side.answers(prompt)]
    passed_before = [(score, old) for prompt, score in scored if (old := base.score(prompt)) is not None and old >= 1]
    slices: dict[str, list[float]] = {}
    for prompt, score in scored:
        for tag in prompt.tags:
            slices.setdefault(tag, []).append(score)
    worst = min(((mean(s), tag) for tag, s in slices.items() if len(s) >= SLICE_PROMPTS), default=None)
    flips = [judge.flip_rate for judge in found.bench.records]
    style = [score for prompt, score in scored if prompt.style]
    best = max(rates.values(), default=None)
    none_leaked = not leaked and bool(side.candidate.lineage.train_data)
    return PanelEvidence(
        pass_rate_low=Exhibit(rate.id, rate.low) if rate is not None and rate.low is not None else None,
        format_errors=Exhibit(f"format:{side.id}", mean(map(_misshapen, answers))) if answers else None,
        worst_slice=Exhibit(f"slice:{worst[1]}", worst[0]) if worst is not None else None,
        regressions=Exhibit(f"regressions:{side.id}", mean(score < old for score, old in passed_before))
        if passed_before and side is not base
        else None,
        flip_rate=Exhibit(found.bench.records[0].id, mean(flips)) if flips else None,
        leakage=Exhibit(f"leakage:{side.id}", 0.0) if none_leaked else None,
        cost=Exhibit(cost.id, cost.value) if comparable and cost else None,
        served_cost=Exhibit(served.id, served.value) if comparable and served else None,
        headroom=Exhibit(f"best:{side.id}", best - rates[side.id]) if best is not None and side.id in rates else None,
        style=Exhibit(f"style:{side.id}", mean(style)) if style else None,
    )


def _misshapen(found: tuple[Prompt, Output]) -> bool:
    """Whether an answer breaks its form: it was cut off, never came, or a check of its form failed."""
    _, one = found
    return one.refused or one.finish in CUT_OFF or any(check.kind in FORMS and not check.passed for check in one.checks)
