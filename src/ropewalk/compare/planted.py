"""Candidates, judges and voters with known faults, made up to try the rule on."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ropewalk.compare.anytime import stops
from ropewalk.compare.ballots import Ballot, tally
from ropewalk.compare.evidence import Evidence, Finding, JudgeRecord, Kind, Row, Trouble
from ropewalk.compare.judging import Judgement, Lineage, Model, admission, kinship, preferences
from ropewalk.compare.rule import SHIP_LEVEL, decide
from ropewalk.compare.statistics import group_means
from ropewalk.compare.verdict import Verdict

Rng = np.random.Generator
PASS, CHURN = 0.75, 0.06  # what is served passes so many; two alike differ on so many
PROMPTS = 300
FIT = JudgeRecord("stub", True, True, 0.1, "judge stub: admitted")


def passes(rng: Rng, n: int, gain: float = 0.0, size: int = 1, shared: float = 0.0) -> list[Row]:
    """Pass/fail rows of a candidate that gains so much; prompts of one group share their luck at the given rate."""

    def luck() -> NDArray[np.float64]:
        own, common = rng.random((n // size, size)), rng.random((n // size, 1))
        return np.asarray(np.where(rng.random((n // size, size)) < shared, common, own).ravel(), dtype=float)

    old = luck() < PASS
    up, down = (CHURN / 2 + max(gain, 0)) / (1 - PASS), (CHURN / 2 + max(-gain, 0)) / PASS
    turned = luck() < np.where(old, down, up)
    return [
        Row(f"p{i}", f"g{i // size}", float(o), float(o != t)) for i, (o, t) in enumerate(zip(old.tolist(), turned.tolist()))
    ]


def said(rows: list[Row], *, judge: JudgeRecord | None = None, chosen_from: int = 1, anytime: bool = False) -> Verdict:
    """What the rule says about these rows."""
    judges = (judge,) if judge else ()
    return decide([Evidence("new", "old", rows, judges=judges, chosen_from=chosen_from, anytime=anytime)])[0]


def best_of(rng: Rng, candidates: int, n: int = 200) -> Verdict:
    """The best on the first half of several checkpoints that are all as good as what is served."""
    tried = [passes(rng, n) for _ in range(candidates)]
    chosen = max(tried, key=lambda rows: sum(row.new - row.old for row in rows))
    held = [Row(f"h{row.id}", f"h{row.group}", row.old, row.new, held=True) for row in passes(rng, n)]
    return said([*chosen, *held], chosen_from=candidates)


def peeked(rng: Rng, n: int = PROMPTS) -> Verdict:
    """A run that is looked at after every prompt and stops as soon as it may."""
    rows = passes(rng, n)
    return said(rows[: stops(group_means(rows), SHIP_LEVEL) or n], anytime=True)


def judged(rng: Rng, *, position: float = 0.0, length: float = 0.0, likes: float = 0.0, n: int = 150) -> Verdict:
    """Two equal candidates before a judge with a taste: for what it sees first, for the longer answer, for the new one."""
    longer = rng.normal(np.log(2.0) if length else 0.0, 0.35, n)
    latent = rng.normal(0, 1, n) + length * np.tanh(longer / 0.5) + likes
    judgements = []
    for new_first in (True, False):
        seen = latent + (position if new_first else -position) + rng.normal(0, 0.5, n)
        scores = np.where(np.abs(seen) < 0.25, 0.5, seen > 0).tolist()
        judgements += [Judgement(f"p{i}", "stub", new_first, float(score)) for i, score in enumerate(scores)]
    lengths = [(400, round(400 * float(np.exp(step)))) for step in longer]
    record = admission("stub", judgements, {}, {})
    scored = preferences(judgements)
    rows = [Row(p, p, 1 - s, s, Kind.JUDGE, lengths=lengths[int(p[1:])]) for p, s in scored.items()]
    return said(rows, judge=record)


def kin(rng: Rng) -> Verdict:
    """A judge of the candidate's own family, which likes it: its lineage gives it away."""
    judge, lineage = Model("judge-b", "b"), Lineage(Model("new", "b"))
    why = kinship(judge, [lineage])
    liked = np.clip(rng.normal(0.7, 0.2, PROMPTS), 0, 1).tolist()
    rows = [Row(f"p{i}", f"p{i}", 1 - s, s, Kind.JUDGE) for i, s in enumerate(liked)]
    troubles = [Trouble("judge-b", Finding.LINEAGE, why)] if why else []
    return decide([Evidence("new", "old", rows, judges=[FIT], troubles=troubles)])[0]


def stub(rng: Rng, name: str, n: int = 100) -> tuple[JudgeRecord, Verdict]:
    """A judge that does not read, on pairs of which people labelled every one."""
    truth, new_longer = rng.random(n) < 0.5, rng.random(n) < 0.5
    lengths = {f"p{i}": (400, 600) if longer else (600, 400) for i, longer in enumerate(new_longer)}
    judgements = []
    for i in range(n):
        for new_first in (True, False):
            score = {
                "always_first": float(new_first),
                "longest": float(new_longer[i]),
                "prefers_family": 1.0,
                "random": float(rng.random() < 0.5),
                "says_yes": 0.5,
            }[name]
            judgements.append(Judgement(f"p{i}", name, new_first, score))
    record = admission(name, judgements, {f"p{i}": float(right) for i, right in enumerate(truth)}, lengths)
    rows = [Row(p, p, 1 - s, s, Kind.JUDGE, lengths=lengths[p]) for p, s in preferences(judgements).items()]
    return record, said(rows, judge=record)


def stuffed(rng: Rng) -> bool:
    """Whether twelve honest voters without a preference and one with twenty ballots look as if they had one."""
    honest = [
        Ballot(f"v{v}", f"p{i}", "new" if new else "old")
        for v, row in enumerate(rng.random((12, 5)) < 0.5)
        for i, new in enumerate(row)
    ]
    found = tally(honest + [Ballot("stuffer", f"p{i}", "new") for i in range(20)])
    return found.low is not None and found.high is not None and not found.low <= 0.5 <= found.high
