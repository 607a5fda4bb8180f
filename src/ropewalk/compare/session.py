"""One comparison at work: what is asked in which order, when it stops, and what follows from the answers.

reuse -> warm up -> ask A-B-B-A -> ask failures again -> judge -> decide -> (held-back half, the same way) -> verdicts
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace

from ropewalk.chat.messages import MessagesRequest, Text, Turn
from ropewalk.checks import CheckOutcome, score
from ropewalk.compare import gather, judges
from ropewalk.compare.asking import ask, loaded, request_for, sampling_of
from ropewalk.compare.claim_measures import measure_claims
from ropewalk.compare.early import Job, Looking, interleaved, ordered
from ropewalk.compare.fingerprint import fingerprint, save_fingerprint
from ropewalk.compare.hearing import Hearing
from ropewalk.compare.measures import costs
from ropewalk.compare.records import Comparison, StoredVerdict, get_comparison, save_verdicts
from ropewalk.compare.runs import Answered, Output, add_output, reuse
from ropewalk.compare.subjects import Subject, close_subject, open_subject
from ropewalk.compare.suites import Prompt, prompts, suite_key
from ropewalk.engine.models import Models
from ropewalk.errors import BadInput, RopewalkError, SandboxFailed
from ropewalk.files.store import Store
from ropewalk.tenants.caller import Caller

AT_ONCE = 4  # questions side by side; a plan may say otherwise
MOST_AT_ONCE = 64
GIVE_UP = 3  # questions in a row without an answer: then it is the candidate that cannot be reached
CERTAIN = "the verdict was certain enough"
WARM_UP = "Say yes."


@dataclass
class Session:
    """One comparison at work in one process."""

    store: Store
    models: Models
    caller: Caller
    comparison: Comparison
    progress: Callable[[int, int, str], None]  # done, total, doing
    failed: str | None = None  # why not all candidates could be asked
    stopped: str | None = None  # why no more is asked, though there is more
    done: int = 0
    total: int = 0
    spent: float = 0.0  # US dollars, by earlier sessions too
    at_once: int = AT_ONCE
    subjects: list[Subject] = field(default_factory=list)
    key: bytes = b""  # of the suite
    hearing: Hearing | None = None  # where the plan names judges

    async def work(self) -> list[StoredVerdict]:
        """All of it."""
        plan, suite = self.comparison.plan, self.comparison.suite_id
        if suite is None:
            return await self._decided()
        if plan.samples < 1:
            raise BadInput(f"samples is {plan.samples}; expected 1 or more")
        sampling, self.at_once = sampling_of(plan.sampling), _at_once(plan.more.get("at_once", AT_ONCE))
        self.key = await suite_key(self.store, self.caller, suite)
        every = ordered(await prompts(self.store, self.caller, suite))
        machine = fingerprint(self.models)
        await save_fingerprint(self.store, machine)
        params = {"sampling": sampling, "samples": plan.samples, "at_once": self.at_once}
        parts = self.store, self.models, self.caller, self.comparison
        for item in self.comparison.items:
            if subject := await open_subject(*parts, item.candidate_id, params, machine.id):
                self.subjects.append(subject)
        for subject in self.subjects:
            self.spent += self._paid(subject, [one for one in subject.outputs.values() if one.cached_from is None])
        self.spent += sum(one.cost or 0.0 for one in await judges.judgements(self.store, self.caller, self.comparison.id))
        if plan.judges:
            self.hearing = Hearing(*parts, self.key, self.at_once)
            await self.hearing.open([subject.candidate for subject in self.subjects])
        await self._stage([prompt for prompt in every if not prompt.held or prompt.must_pass], self.subjects)
        await self._close()
        if chosen := await self._to_confirm():
            before, self.stopped = self.stopped, None
            base = [one for one in self.subjects if one.id == self.comparison.baseline_id]
            await self._stage([prompt for prompt in every if prompt.held], [*base, *chosen], confirming=True)
            self.stopped = self.stopped or before
            await self._close()
        return await self._decided()

    async def _stage(self, asked: Sequence[Prompt], subjects: Sequence[Subject], confirming: bool = False) -> None:
        """Some prompts, with all that follows from them."""
        samples = self.comparison.plan.samples
        jobs = list(interleaved(asked, subjects, samples))
        await self._ask(jobs, "asking", early=self.comparison.plan.stop_early and not confirming)
        base = self._base()
        again = [
            (prompt, one, samples)
            for prompt in asked
            if prompt.must_pass or any(spec.guardrail for spec in prompt.checks)
            for one in subjects
            if one is not base and base is not None and base.passed(prompt, samples) and one.passed(prompt, samples) is False
        ]
        await self._ask(again, "asking failures again")
        await self._judge([prompt for prompt in asked if prompt.judged], subjects)

    # -- asking

    async def _ask(self, jobs: Sequence[Job], doing: str, early: bool = False) -> None:
        """Asks what was not answered yet, in this order, so many at once."""
        left = await self._reused(jobs)
        self.total += len(left)
        self._tell(0, doing)
        firsts: dict[str, Subject] = {}  # two that are the same bytes are asked once
        asked, twins = list[Job](), list[Job]()
        for job in left:
            same = firsts.setdefault(job[1].key(job[0], job[2]), job[1])
            (asked if same is job[1] else twins).append(job)
        for subject in _subjects(asked):
            await self._warm(subject)
        looking = self._looking(jobs) if early else None
        waiting = self._next(asked, looking)
        workers = [asyncio.create_task(self._worker(waiting, doing)) for _ in range(min(self.at_once, len(asked)))]
        try:
            await asyncio.gather(*workers)
        finally:
            for worker in workers:
                worker.cancel()
            await asyncio.gather(*workers, return_exceptions=True)
        await self._reused(twins)
        self._tell(len(left) - len(asked), doing)

    def _looking(self, jobs: Sequence[Job]) -> Looking | None:
        base = self._base()
        groups: dict[str, dict[str, Prompt]] = {}
        for prompt, _, _ in jobs:
            if not prompt.judged and not prompt.held:
                groups.setdefault(prompt.group, {})[prompt.id] = prompt
        if base is None:
            return None
        others = [one for one in self.subjects if one is not base]
        whole = {group: list(asked.values()) for group, asked in groups.items()}
        return Looking(base, others, whole, self.comparison.plan.samples)

    def _next(self, jobs: Sequence[Job], looking: Looking | None) -> Iterator[Job]:
        """The next question, as long as there is a reason to ask it."""
        group = None
        for job in jobs:
            prompt, subject, _ = job
            base = self._base()
            if self._over_budget():
                self.stopped = self._spent()
                return
            if looking is not None and prompt.group != group:
                group = prompt.group
                if self.stopped is None and looking.certain():
                    self.stopped = CERTAIN
            alone = base is None or base.failed is not None or all(one.failed for one in self.subjects if one is not base)
            if subject.failed is None and not alone and (looking is None or self.stopped is None or prompt.must_pass):
                yield job
            else:
                self._tell(1, "skipping")

    async def _worker(self, jobs: Iterator[Job], doing: str) -> None:
        for prompt, subject, sample in jobs:
            try:
                request = request_for(prompt, subject.candidate.target, subject.run.params["sampling"])
                answered = await ask(self.models, self.caller, request)
            except BadInput as error:
                subject.failed = str(error)
                continue
            except RopewalkError as error:  # it cannot be loaded
                subject.failed = f"{type(error).__name__}: {error}"
                continue
            if answered.text is not None:
                answered = await asyncio.to_thread(_checked, prompt, answered)
            await self._keep(prompt, subject, sample, answered)
            self._tell(1, doing)

    async def _keep(self, prompt: Prompt, subject: Subject, sample: int, answered: Answered) -> None:
        parts = self.store, self.caller, subject.run, self.key, prompt.id, sample, subject.key(prompt, sample)
        found = await add_output(*parts, answered)
        subject.outputs[prompt.id, sample] = found
        subject.asked += 1
        self.spent += self._paid(subject, [found])
        subject.lost = 0 if found.answered else subject.lost + 1
        if subject.lost >= GIVE_UP:
            subject.failed = f"{GIVE_UP} questions in a row had no answer: {found.error}"

    async def _reused(self, jobs: Sequence[Job]) -> list[Job]:
        """What is left when the answers that other comparisons have are taken over."""
        left = [job for job in jobs if job[1].lacks(job[0], job[2])]
        for subject in _subjects(left):
            wanted = {subject.key(prompt, sample): (prompt.id, sample) for prompt, one, sample in left if one is subject}
            for found in await reuse(self.store, self.caller, subject.run, self.key, wanted):
                subject.outputs[found.prompt_id, found.sample] = found
        return [job for job in left if job[1].lacks(job[0], job[2])]

    async def _warm(self, subject: Subject) -> None:
        """One question that does not count: models are loaded and connections made before times are taken."""
        if subject.failed is not None or subject.asked:
            return
        self._tell(0, f"loading {subject.candidate.name}")
        try:
            await loaded(self.models, subject.candidate.target)
            request = MessagesRequest(subject.candidate.target, 4, (Turn("user", (Text(WARM_UP),)),), temperature=0.0)
            answered = await ask(self.models, self.caller, request)
        except RopewalkError as error:
            subject.failed = f"'{subject.candidate.target}' cannot be asked: {error}"
            return
        if answered.error is not None:
            subject.failed = f"'{subject.candidate.target}' cannot be asked: {answered.error}"

    # -- deciding

    async def _judge(self, asked: Sequence[Prompt], subjects: Sequence[Subject]) -> None:
        """Has the judges say which of each two answers they prefer."""
        base, hearing = self._base(), self.hearing
        if hearing is None or not asked or base is None:
            return
        questions = await hearing.questions(asked, base, subjects)
        self.total += len(questions)
        self._tell(0, "judging")

        def heard(cost: float) -> bool:
            self.spent += cost
            self._tell(1, "judging")
            if self._over_budget():
                self.stopped = self._spent()
            return not self._over_budget()

        await hearing.hear(questions, heard)

    async def _to_confirm(self) -> list[Subject]:
        """Those that would be shipped, were they not chosen among several."""
        if all(item.chosen_from == 1 for item in self.comparison.items):
            return []
        found = await gather.gathered(self.store, self.caller, await self._now())
        said = gather.verdicts(await gather.evidence_of(self.store, self.caller, found), found.names, found.limits)
        chosen = {one.candidate for one in said if one.state.ships and one.needs_confirmation}
        return [subject for subject in self.subjects if subject.id in chosen and subject.failed is None]

    async def _close(self) -> None:
        """Writes down what was measured, and how each run ended."""
        stats = await self.models.stats()
        for subject in self.subjects:
            peak = None
            if subject.candidate.kind != "remote" and subject.failed is None:
                target = await asyncio.to_thread(self.models.target, subject.candidate.target)
                peak = stats.get(str(target.base), {}).get("peak_memory")
            await close_subject(self.store, self.caller, subject, self.comparison.plan.samples, peak, self.stopped)
        told = [f"{subject.candidate.name}: {subject.failed}" for subject in self.subjects if subject.failed]
        self.failed = "; ".join(told) or None

    async def _decided(self) -> list[StoredVerdict]:
        """What the rule says, written down."""
        self._tell(0, "deciding")
        found = await gather.gathered(self.store, self.caller, await self._now())
        evidence = await gather.evidence_of(self.store, self.caller, found)
        await judges.save_admission(self.store, self.caller, self.comparison, found.bench, found.lengths)
        await measure_claims(self.store, self.caller, found)
        said = await asyncio.to_thread(gather.verdicts, evidence, found.names, found.limits)
        inputs = gather.inputs(evidence, found.limits)
        return await save_verdicts(self.store, self.caller, self.comparison.id, said, inputs)

    async def _now(self) -> Comparison:
        return await get_comparison(self.store, self.caller, self.comparison.id)

    # -- how far it is

    def _base(self) -> Subject | None:
        return next((one for one in self.subjects if one.id == self.comparison.baseline_id), None)

    def _paid(self, subject: Subject, found: Sequence[Output]) -> float:
        return sum(costs(found, subject.tariff, self.at_once)[0]) if subject.tariff.known else 0.0

    def _over_budget(self) -> bool:
        budget = self.comparison.plan.budget
        return budget is not None and self.spent >= budget * (1 - 1e-9)  # sums in another order differ by that

    def _spent(self) -> str:
        return f"the budget of {self.comparison.plan.budget:g} US dollars was spent"

    def _tell(self, done: int, doing: str) -> None:
        self.done += done
        self.progress(self.done, self.total, doing)


def _checked(prompt: Prompt, answered: Answered) -> Answered:
    """The answer with what the prompt's checks say of it."""
    told: list[tuple[int, str, bool, CheckOutcome]] = []
    for number, spec in enumerate(prompt.checks):
        if spec.kind != "judge":
            try:
                outcome = score(spec, answered.text or "", prompt.reference)
            except SandboxFailed as error:
                outcome = CheckOutcome(False, str(error))
            told.append((number, spec.kind, spec.guardrail, outcome))
    return replace(answered, outcomes=tuple(told))


def _subjects(jobs: Sequence[Job]) -> list[Subject]:
    """Those who are asked, each once."""
    return list({id(subject): subject for _, subject, _ in jobs}.values())


def _at_once(value: object) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= MOST_AT_ONCE:
        raise BadInput(f"at_once is {value!r}; expected 1 to {MOST_AT_ONCE} questions side by side")
    return value
