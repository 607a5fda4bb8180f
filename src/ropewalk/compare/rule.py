"""The rule that turns evidence into verdicts: the same evidence always gives the same words."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from ropewalk.compare import anytime
from ropewalk.compare.evidence import Evidence, Finding, Kind, Limits, Row
from ropewalk.compare.length import length_controlled
from ropewalk.compare.price import cheaper, prices, too_dear
from ropewalk.compare.state import State
from ropewalk.compare.statistics import LEVEL, Paired, group_means, holm, more_prompts, paired
from ropewalk.compare.verdict import Interval, Reason, Slice, Verdict

RULE_VERSION = "1"
SHIP_LEVEL = 0.0125  # two-sided: shipping changes what people get, so chance alone may look this good once in 160 times
SLICE_LEVEL = 0.01  # two-sided, over all slices: one that fell is named even where the whole rose
JUDGED_GROUPS = 20  # with fewer groups of judged prompts their answers are there to be read, not counted
SLICE_PROMPTS = 5
TOLD = 20  # ids that one reason names at most
DEFAULT = Limits()

RULE = f"""\
0 VALID    Both answered the same prompts with the same sampling, template and serving path; no prompt stands in a candidate's
           training files; no judge is kin to a candidate; every judge was admitted.               Else NO VERDICT.
1 FLOOR    No guardrail broke; every must-pass prompt that what is served passes is passed; no slice fell by more than the
           margin (p <= {SLICE_LEVEL:g}, Holm over slices).                                                    Else SKIP.
2 EFFECT   The mean over groups of prompts of the paired difference, checks and (from {JUDGED_GROUPS} groups on) judges, with its 95 %
           interval; Holm over the candidates of the comparison.
             better   the interval lies above zero, p <= {SHIP_LEVEL:g}; where judges scored, both hold at equal length of answers too
             worse    the interval lies below zero, p <= {LEVEL:g}
             same     the interval lies within the margin
             unclear  anything else
3 PRICE    better, within the limits set on cost per passing answer, p95 latency, memory       SHIP, beyond them SKIP
           same, at least a fifth cheaper or faster, at the level of all candidates together   SHIP (cheaper)
           same                                                                                TIE
           worse                                                                               SKIP
           unclear                                                                             NOT ENOUGH: about N more prompts
4 CONFIRM  A candidate chosen among several must show 2 again (p <= {LEVEL:g}) on the prompts held back before it is shipped.
A card, about which nothing was run, is OPINION ONLY.
"""


@dataclass(frozen=True)
class Compared:
    """One candidate on the prompts that count for it."""

    found: Paired
    rows: list[Row]
    controlled: Interval | None


def decide(evidence: Sequence[Evidence], limits: Limits = DEFAULT) -> list[Verdict]:
    """One verdict for each candidate of a comparison; all of them at once, since each is one more chance to be fooled."""
    early = [without_effect(one) for one in evidence]
    compared = [
        None if said else compare([r for r in one.rows if not r.held], one.anytime) for one, said in zip(evidence, early)
    ]
    adjusted = iter(holm([one.found.p for one in compared if one]))
    n = sum(one is not None for one in compared)
    verdicts = []
    for one, said, found in zip(evidence, early, compared):
        if said:
            verdicts.append(said)
        elif found is None:
            verdicts.append(too_few(one))
        else:
            verdicts.append(weigh(one, found, next(adjusted), n, limits))
    return verdicts


def without_effect(one: Evidence) -> Verdict | None:
    """What is said before any difference is looked at."""
    if not one.ran:
        return verdict(one, State.OPINION_ONLY, [Reason("nothing was run: what is known are claims and opinions")])
    blocking = [Reason(t.sentence, (t.id,)) for t in one.troubles if t.blocks]
    judged = any(row.kind is Kind.JUDGE for row in one.rows)
    blocking += [Reason(judge.sentence, (judge.id,)) for judge in one.judges if judged and not judge.admitted]
    if judged and not one.judges:
        blocking.append(Reason("prompts were judged, but there is no record of by whom"))
    if blocking:
        return verdict(one, State.NO_VERDICT, blocking)
    if one.same_artifact:
        return verdict(one, State.TIE, [Reason(f"{one.candidate} and {one.baseline} are the same bytes")])
    if all(row.held for row in one.rows):
        return verdict(one, State.NO_VERDICT, [Reason("no prompt was answered by both", (Finding.INCOMPLETE,))])
    return None


def compare(rows: Sequence[Row], looked_at: bool) -> Compared | None:
    """The difference on the rows that count; None where too few do."""
    counted = list(rows)
    if any(row.kind is Kind.JUDGE for row in counted):
        groups = {row.group for row in counted if row.kind is Kind.JUDGE}
        if len(groups) < JUDGED_GROUPS:
            counted = [row for row in counted if row.kind is Kind.CHECK]
    found = paired(counted)
    if found is None:
        return None
    if looked_at:
        means = group_means(counted)
        found = replace(
            found, interval=anytime.confidence(means), p=anytime.p_value(means), method="betting, valid at any stop"
        )
    return Compared(found, counted, length_controlled(counted))


def too_few(one: Evidence) -> Verdict:
    judged = sum(row.kind is Kind.JUDGE for row in one.rows if not row.held)
    why = f"fewer than {JUDGED_GROUPS} groups of prompts were judged" if judged else "the prompts are of fewer than two groups"
    wanted = JUDGED_GROUPS if judged else 2
    have = len({row.group for row in one.rows if not row.held})
    said = verdict(one, State.NOT_ENOUGH, [Reason(f"{why}: read the answers, there is nothing to count")])
    return replace(said, n_prompts=sum(not row.held for row in one.rows), n_groups=have, n_more=max(1, wanted - have))


def weigh(one: Evidence, compared: Compared, p: float, candidates: int, limits: Limits) -> Verdict:
    """Floor, effect, price and confirmation, in this order."""
    found, interval = compared.found, compared.found.interval
    slices = by_slice(compared.rows, limits)
    broken = floor(one, slices, limits)
    better = interval.low > 0 and p <= SHIP_LEVEL
    by_length = better and rests_on_length(compared, SHIP_LEVEL)
    dear = too_dear(one, limits)
    saved = cheaper(one, limits)
    n_more = None
    if broken:
        state, why = State.SKIP, broken
    elif better and not by_length:
        state, why = (State.SKIP, dear) if dear else (State.SHIP, [])
        why = [Reason(f"better than {one.baseline}: {interval}"), *why]
    elif interval.high < 0 and p <= LEVEL:
        state, why = State.SKIP, [Reason(f"worse than {one.baseline}: {interval}", broke(compared.rows))]
    elif -limits.margin < interval.low and interval.high < limits.margin:
        state, why = same(one, found, candidates, limits, saved, dear)
    else:
        n_more = more_prompts(found, limits.margin, SHIP_LEVEL, candidates, anytime.SLOWER if one.anytime else 1.0)
        state, why = State.NOT_ENOUGH, [unclear(compared, n_more, by_length)]
    said = replace(
        verdict(one, state, [*why, *also(one, compared, slices)]),
        interval=interval, p=found.p, p_adjusted=p, method=found.method, n_prompts=found.n_prompts, n_groups=found.n_groups,
        n_more=n_more, n_judged=sum(row.kind is Kind.JUDGE for row in compared.rows), worst=worst(slices),
        regressions=broke(compared.rows), fixed=tuple(row.id for row in compared.rows if row.new > row.old),
        length_controlled=compared.controlled,
    )  # fmt: skip
    return confirm(one, said, limits) if state.ships and one.chosen_from > 1 else said


def floor(one: Evidence, slices: Sequence[Slice], limits: Limits) -> list[Reason]:
    """What must hold and did not."""
    reasons = [Reason(g.sentence, (g.id,)) for g in one.guardrails if g.broken]
    lost = [r.id for r in one.rows if r.must_pass and r.kind is Kind.CHECK and r.new < 1 <= r.old and r.repeated]
    if lost:
        must = sum(r.must_pass for r in one.rows)
        reasons.append(Reason(f"fails {len(lost)} of {must} must-pass prompts that {one.baseline} passes", tuple(lost[:TOLD])))
    reasons += [
        Reason(f"slice {s.name} fell: {s.interval} on {s.n_prompts} prompts", (f"slice:{s.name}",)) for s in slices if s.fell
    ]
    return reasons


def by_slice(rows: Sequence[Row], limits: Limits) -> list[Slice]:
    """The difference under each tag, and whether it fell by more than chance, margin and the number of tags explain."""
    tagged: dict[str, list[Row]] = {}
    for row in rows:
        for name in row.slices:
            tagged.setdefault(name, []).append(row)
    found = {name: paired(under) for name, under in tagged.items() if len(under) >= SLICE_PROMPTS}
    told = {name: one for name, one in found.items() if one}
    return [
        Slice(name, one.interval, one.n_prompts, p <= SLICE_LEVEL and one.interval.effect < -limits.margin)
        for (name, one), p in zip(told.items(), holm([one.p for one in told.values()]))
    ]


def worst(slices: Sequence[Slice]) -> Slice | None:
    return min(slices, key=lambda s: (not s.fell, s.interval.effect), default=None)


def rests_on_length(compared: Compared, level: float) -> bool:
    """Whether what judges preferred could be length: at equal length the interval of this level does not lie above zero."""
    controlled = length_controlled(compared.rows, level)
    return controlled is not None and controlled.low <= 0


def same(
    one: Evidence, found: Paired, candidates: int, limits: Limits, saved: list[Reason], dear: list[Reason]
) -> tuple[State, list[Reason]]:
    """TIE, or SHIP (cheaper) where the saving is worth it and "not worse" holds for all candidates together."""
    reason = Reason(f"the same as {one.baseline} within {100 * limits.margin:g} points: {found.interval}")
    if not saved or dear:
        return State.TIE, [reason, *dear]
    wider = found.interval if one.anytime else found.at(LEVEL / candidates)
    if wider.low <= -limits.margin:
        return State.TIE, [
            reason,
            *saved,
            Reason(f"not certain enough for one of {candidates} candidates to be shipped for it"),
        ]
    return State.SHIP_CHEAPER, [reason, *saved]


def unclear(compared: Compared, n_more: int, by_length: bool) -> Reason:
    found = compared.found
    have = f"about {n_more:,} more prompts would tell; there are {found.n_prompts:,}"
    if by_length:
        return Reason(f"depends on length: {found.interval}, but {compared.controlled} for answers of equal length; {have}")
    return Reason(f"not enough evidence: {found.interval}; {have}")


def also(one: Evidence, compared: Compared, slices: Sequence[Slice]) -> list[Reason]:
    """What is told whatever the state: fixed and broken prompts, the worst slice, prices, judges."""
    fell, rose = broke(compared.rows), sum(row.new > row.old for row in compared.rows)
    reasons = [Reason(f"{rose} prompts got better, {len(fell)} worse", fell)]
    least = worst(slices)
    if least and not least.fell and least.interval.effect < 0:
        reasons.append(
            Reason(f"worst slice: {least.name}, {least.interval} on {least.n_prompts} prompts", (f"slice:{least.name}",))
        )
    unread = sum(row.kind is Kind.JUDGE and not row.held for row in one.rows) - sum(r.kind is Kind.JUDGE for r in compared.rows)
    if unread:
        reasons.append(
            Reason(f"{unread} judged prompts are of fewer than {JUDGED_GROUPS} groups: there to be read, not counted")
        )
    judged = [judge for judge in one.judges if len(compared.rows) and any(r.kind is Kind.JUDGE for r in compared.rows)]
    reasons += [Reason(judge.sentence + ("" if judge.calibrated else "; uncalibrated"), (judge.id,)) for judge in judged]
    reasons += [Reason(t.sentence, (t.id,)) for t in one.troubles]
    return reasons + prices(one)


def broke(rows: Sequence[Row]) -> tuple[str, ...]:
    return tuple(row.id for row in rows if row.new < row.old)


def confirm(one: Evidence, said: Verdict, limits: Limits) -> Verdict:
    """The held-back half asked once: the best of several always looks better than it is."""
    said = replace(said, needs_confirmation=True)
    chosen = f"chosen among {one.chosen_from} on these prompts"
    held = compare([row for row in one.rows if row.held], looked_at=False)
    if held is None:
        reason = Reason(f"{chosen}: it needs confirmation on prompts that were held back")
        return replace(said, reasons=(*said.reasons, reason))
    found = held.found
    if said.state is State.SHIP:
        holds = found.interval.low > 0 and found.p <= LEVEL and not rests_on_length(held, LEVEL)
    else:
        holds = found.interval.low > -limits.margin
    word = "confirmed" if holds else "not confirmed"
    reason = Reason(f"{chosen}, {word} on {found.n_prompts} held-back prompts: {found.interval}")
    return replace(said, confirmed=holds, held=found.interval, reasons=(*said.reasons, reason))


def verdict(one: Evidence, state: State, reasons: Sequence[Reason]) -> Verdict:
    return Verdict(one.candidate, one.baseline, state, tuple(reasons), RULE_VERSION)
