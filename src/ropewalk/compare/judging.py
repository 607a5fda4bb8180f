"""Whether a judge is fit to judge, and what its judgements say: both orders, flips, calibration, kinship."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import mean

import numpy as np

from ropewalk.compare.evidence import JudgeRecord
from ropewalk.compare.statistics import of_means
from ropewalk.compare.verdict import Interval

FLIPS = 0.30  # of decided prompts: beyond this the order of the answers decides more than the answers
LABELS = 50  # by people, on pairs of answers that the judge judged too: below it a judge is uncalibrated
ONLY_LENGTH = 0.90  # siding with the longer answer more often than this, beyond chance, is no taste but a count, until labels say otherwise
DECIDED = 0.05  # of prompts: a judge that calls nearly all the same has said nothing


@dataclass(frozen=True, slots=True)
class Judgement:
    """One call: the judge saw both answers in one order and preferred one or neither."""

    prompt: str
    judge: str
    new_first: bool
    score: float  # of the candidate: 1 it is better, 0.5 the same, 0 it is worse


@dataclass(frozen=True)
class Model:
    """A model by name and family: judges of one family like their own."""

    name: str
    family: str


@dataclass(frozen=True)
class Lineage:
    """What a candidate comes from, as its job recorded it."""

    candidate: Model
    generators: tuple[Model, ...] = ()  # wrote its training data
    rewards: tuple[Model, ...] = ()  # was the reward it was trained for


def kinship(judge: Model, lineages: Sequence[Lineage]) -> str | None:
    """Why this judge may not judge these candidates; None: it may."""
    for lineage in lineages:
        name = lineage.candidate.name
        if judge.name == name:
            return f"{judge.name} may not judge itself"
        if judge.name in {model.name for model in lineage.rewards}:
            return f"{judge.name} was the reward that {name} was trained for"
        if judge.name in {model.name for model in lineage.generators}:
            return f"{judge.name} wrote training data of {name}"
        kin = (lineage.candidate, *lineage.generators, *lineage.rewards)
        if judge.family in {model.family for model in kin}:
            return f"{judge.name} is of the family {judge.family}, as is {name} or what it was trained on"
    return None


def both_orders(judgements: Sequence[Judgement]) -> dict[str, tuple[float, float]]:
    """One judge's scores by prompt, the new answer shown first and second; a prompt asked in one order only is left out."""
    first = {j.prompt: j.score for j in judgements if j.new_first}
    second = {j.prompt: j.score for j in judgements if not j.new_first}
    return {prompt: (score, second[prompt]) for prompt, score in first.items() if prompt in second}


def preferences(judgements: Sequence[Judgement]) -> dict[str, float]:
    """The mean preference by prompt: over both orders of each judge, then over judges. What a row is scored by."""
    found: dict[str, list[float]] = {}
    for judge in dict.fromkeys(j.judge for j in judgements):
        for prompt, scores in both_orders([j for j in judgements if j.judge == judge]).items():
            found.setdefault(prompt, []).append(mean(scores))
    return {prompt: mean(scores) for prompt, scores in found.items()}


def flip_rate(judgements: Sequence[Judgement]) -> float:
    """Of the prompts that one judge decided in both orders, the share on which swapping the answers swapped its preference."""
    decided = [pair for pair in both_orders(judgements).values() if 0.5 not in pair]
    return mean(pair[0] != pair[1] for pair in decided) if decided else 0.0


def position_bias(judgements: Sequence[Judgement]) -> Interval | None:
    """How much more often one judge prefers what it is shown first: 0 for none, 1 for always. None below two prompts."""
    pairs = both_orders(judgements)
    shown = [first - second for first, second in pairs.values()]  # what being first added to the new answer's score
    found = of_means(shown, len(shown))
    return found.interval if found else None


def effective_votes(by_judge: Mapping[str, Mapping[str, float]]) -> float:
    """What several judges are worth in independent ones: k / (1 + (k - 1) r), r their mean correlation over shared prompts.

    Correlation counts what they share because it is true as shared error, so the number is a lower bound.
    """
    shared = sorted(set.intersection(*(set(scores) for scores in by_judge.values()))) if by_judge else []
    k = len(by_judge)
    if k < 2 or len(shared) < 3:
        return float(min(k, 1))
    table = np.array([[scores[prompt] for prompt in shared] for scores in by_judge.values()])
    varied = table.std(axis=1) > 1e-9
    if not varied.all():  # one that always says the same adds nothing, and has no correlation
        return effective_votes({judge: by_judge[judge] for judge, kept in zip(by_judge, varied) if kept})
    r = (float(np.corrcoef(table).sum()) - k) / (k * (k - 1))
    return k / (1 + (k - 1) * min(max(r, 0.0), 1.0))


def agreement(scores: Mapping[str, float], labels: Mapping[str, float]) -> float:
    """How often a judge sides with people, where these took a side; half for one that takes none."""
    asked = [(scores[prompt], label) for prompt, label in labels.items() if prompt in scores and label != 0.5]
    return mean(0.5 if score == 0.5 else float((score > 0.5) == (label > 0.5)) for score, label in asked) if asked else 0.5


def longest(lengths: Mapping[str, tuple[int, int]]) -> dict[str, float]:
    """What a judge would say that only counts characters; lengths are (old, new)."""
    return {prompt: 0.5 if old == new else float(new > old) for prompt, (old, new) in lengths.items()}


def admission(
    judge: str, judgements: Sequence[Judgement], labels: Mapping[str, float], lengths: Mapping[str, tuple[int, int]]
) -> JudgeRecord:
    """Whether one judge is admitted: few flips, and from 50 labels on, siding with people beyond chance and better than length does.

    Labels are by prompt: 1 people hold the new answer better, 0.5 the same, 0 worse. Lengths are of the judged answers, old first.
    """
    pairs = both_orders(judgements)
    scores = {prompt: mean(pair) for prompt, pair in pairs.items()}
    flips, decided = flip_rate(judgements), mean(pair != (0.5, 0.5) for pair in pairs.values()) if pairs else 0.0
    used = {prompt: label for prompt, label in labels.items() if prompt in scores and prompt in lengths and label != 0.5}
    calibrated = len(used) >= LABELS

    def record(admitted: bool, why: str) -> JudgeRecord:
        return JudgeRecord(judge, admitted, calibrated, flips, f"judge {judge}: {why}")

    if flips >= FLIPS:
        return record(False, f"swapping the answers swaps {flips:.0%} of what it decides; {FLIPS:.0%} is too much")
    if decided < DECIDED:
        return record(False, f"it decided {decided:.0%} of the prompts; it says the same of everything")
    if not calibrated:
        counted = {prompt: side for prompt, side in longest(lengths).items() if prompt in scores and side != 0.5}
        same = agreement(scores, counted)
        if counted and lower_bound(same, len(counted)) > ONLY_LENGTH:
            told = f"it sides with the longer answer in {same:.0%} of {len(counted)} pairs"
            return record(
                False, f"{told}; only labels ({LABELS}, there are {len(used)}) tell it from one that counts characters"
            )
        return record(True, f"{flips:.0%} of its decisions flip with the order; {len(used)} of {LABELS} labels")
    right, dummy = agreement(scores, used), agreement(longest(lengths), used)
    told = f"it sides with people in {right:.0%} of {len(used)} labels, the longer answer does in {dummy:.0%}"
    if lower_bound(right, len(used)) <= 0.5:
        return record(False, f"{told}; that is not beyond chance")
    if right <= dummy:
        return record(False, f"{told}; counting characters judges as well")
    return record(True, f"{told}; {flips:.0%} of its decisions flip with the order")


def lower_bound(share: float, n: int, z: float = 1.959964) -> float:
    """The lower end of Wilson's 95 % interval of a share."""
    spread = z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    return (share + z * z / (2 * n) - spread) / (1 + z * z / n)
