"""Judges at work: which pairs of answers they are shown, in both orders, so many at once, until all is said or one of them gives up."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

from ropewalk.compare import judges
from ropewalk.compare.candidates import Candidate, get_candidate
from ropewalk.compare.judges import Question, StoredJudge
from ropewalk.compare.prices import Tariff, tariff
from ropewalk.compare.records import Comparison
from ropewalk.compare.runs import Answered, Output
from ropewalk.compare.subjects import Subject
from ropewalk.compare.suites import Prompt
from ropewalk.engine.models import Models
from ropewalk.errors import RopewalkError
from ropewalk.files.store import Store
from ropewalk.tenants.caller import Caller

GIVE_UP = 3  # questions in a row that a judge does not answer


@dataclass
class Hearing:
    """The judges of one comparison in one process."""

    store: Store
    models: Models
    caller: Caller
    comparison: Comparison
    key: bytes
    at_once: int
    sitting: list[tuple[StoredJudge, Candidate, Tariff]] = field(default_factory=list)

    async def open(self, compared: Sequence[Candidate]) -> None:
        """Seats those who may judge."""
        for one in await judges.seat(self.store, self.models, self.caller, self.comparison, compared):
            if one.refused_reason is None:
                candidate = await get_candidate(self.store, self.caller, one.candidate_id)
                remote = candidate.kind == "remote"
                price = await tariff(self.store, self.models, self.caller, candidate.target, remote=remote)
                self.sitting.append((one, candidate, price))

    async def questions(
        self, asked: Sequence[Prompt], base: Subject, subjects: Sequence[Subject]
    ) -> list[tuple[Question, Candidate, Tariff]]:
        """What was not judged yet: each two answers that differ, in both orders, once for each judge."""
        known = {
            (one.judge_id, one.left_output, one.right_output)
            for one in await judges.judgements(self.store, self.caller, self.comparison.id)
            if one.error is None
        }
        found = []
        for number, prompt in enumerate(asked):
            for subject in subjects:
                old, new = _readable(base, prompt), _readable(subject, prompt)
                if subject is base or old is None or new is None or old.text_hash == new.text_hash:
                    continue
                for one, candidate, price in self.sitting:
                    for order in ("AB", "BA") if number % 2 == 0 else ("BA", "AB"):
                        question = Question(one, candidate.target, prompt, subject.id, old, new, order)
                        if (one.id, *(shown.id for shown in question.shown)) not in known:
                            found.append((question, candidate, price))
        return found

    async def hear(self, questions: Sequence[tuple[Question, Candidate, Tariff]], heard: Callable[[float], bool]) -> None:
        """Asks them; `heard` is told what each one cost, and says whether to go on."""
        waiting, silent, going = iter(questions), Counter[str](), True

        async def worker() -> None:
            nonlocal going
            for question, candidate, price in waiting:
                if not going:
                    return
                if silent[question.judge.id] >= GIVE_UP:
                    heard(0.0)
                    continue
                parts = self.store, self.models, self.caller, self.comparison
                try:
                    said = await judges.judge(*parts, question, candidate.digest, self.key, partial(self._cost, price))
                except RopewalkError:  # it cannot be loaded
                    silent[question.judge.id] = GIVE_UP
                    continue
                silent[question.judge.id] = 0 if said.error is None else silent[question.judge.id] + 1
                going = heard(said.cost or 0.0) and going

        await asyncio.gather(*(worker() for _ in range(min(self.at_once, len(questions)))))

    def _cost(self, price: Tariff, took: Answered) -> float | None:
        """In US dollars; None where nobody said what it costs."""
        if not price.known:
            return None
        tokens = took.tokens_in, took.tokens_cached, took.tokens_out
        return price.cost(*tokens, (took.total_ms or 0.0) / self.at_once) * (1 + took.retries)


def _readable(subject: Subject, prompt: Prompt) -> Output | None:
    """A first answer that has a text."""
    found = subject.outputs.get((prompt.id, 0))
    return found if found is not None and found.text is not None else None
