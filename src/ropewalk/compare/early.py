"""In which order prompts are asked, and when nothing more need be asked because the verdict is certain."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import mean

from ropewalk.compare import anytime, rule
from ropewalk.compare.statistics import LEVEL
from ropewalk.compare.subjects import Subject
from ropewalk.compare.suites import Prompt

LOOKS = 50  # times at which a run that may stop early looks whether it can
Job = tuple[Prompt, Subject, int]  # the sample last


@dataclass
class Looking:
    """Looks from time to time whether a run may stop: whether every candidate's verdict is certain on the groups that are whole."""

    base: Subject
    others: Sequence[Subject]
    groups: Mapping[str, Sequence[Prompt]]  # in the order in which they are asked; prompts that checks score
    samples: int
    passed: int = 1 << 30  # groups since it last looked: what was asked before may be enough

    def certain(self) -> bool:
        """Whether nothing more need be asked, as far as checks tell."""
        self.passed += 1
        if self.passed < max(1, len(self.groups) // LOOKS):
            return False
        self.passed = 0
        levels = rule.SHIP_LEVEL / len(self.others), LEVEL / len(self.others)
        return all(one.failed is not None or self._stops(one, *levels) for one in self.others)

    def _stops(self, one: Subject, better: float, worse: float) -> bool:
        means = []
        for asked in self.groups.values():
            told = [(self.base.passed(prompt, self.samples), one.passed(prompt, self.samples)) for prompt in asked]
            if all(old is not None and new is not None for old, new in told):
                means.append(mean(bool(new) - bool(old) for old, new in told))
        return bool(means) and anytime.stops(means, better, worse) is not None


def ordered(asked: Sequence[Prompt]) -> list[Prompt]:
    """Whole groups, in an order that has nothing to do with what they say and is the same for every comparison on the suite."""

    def place(prompt: Prompt) -> tuple[bytes, int]:
        return hashlib.sha256(f"{prompt.suite_id} {prompt.group}".encode()).digest(), prompt.number

    return sorted(asked, key=place)


def interleaved(asked: Sequence[Prompt], subjects: Sequence[Subject], samples: int) -> Iterator[Job]:
    """A-B-B-A: what drifts meanwhile, drifts for all."""
    turn = 0
    for prompt in asked:
        for sample in range(samples):
            for subject in subjects if turn % 2 == 0 else reversed(subjects):
                yield prompt, subject, sample
            turn += 1
