"""What each page of Compare shows: one dataclass per page, and how verdicts, cards and outcomes become lines of them."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ropewalk.compare.candidates import Candidate, StoredClaim
from ropewalk.compare.cards import NO_TAKE, Card
from ropewalk.compare.diff import Change, Piece
from ropewalk.compare.evidence import Metric
from ropewalk.compare.intervals import IntervalRow, plot, sentences
from ropewalk.compare.measures import PASS_RATE
from ropewalk.compare.panel import PanelTake
from ropewalk.compare.records import Comparison, StoredVerdict
from ropewalk.compare.state import State
from ropewalk.server.words import Moment, Part, moment, parts

# What colours a state beside its word.
LOOKS = {
    State.SHIP: "good",
    State.SHIP_CHEAPER: "good",
    State.SKIP: "bad",
    State.TIE: "even",
    State.NOT_ENOUGH: "open",
    State.NO_VERDICT: "even",
    State.OPINION_ONLY: "told",
}
NOTHING_RUN = "OPINION ONLY — nothing was run"
MARKS = {True: "passed", False: "failed", None: "not checked"}
FIRST = (PASS_RATE, *map(str, (Metric.COST, Metric.LATENCY, Metric.MEMORY)))
EXCERPT = 160  # characters of a prompt in a list
ID = re.compile(r"(?:prompt|cand)_[0-9A-Za-z]{24}")


@dataclass(frozen=True)
class Named:
    """A candidate, wherever its name stands."""

    id: str
    name: tuple[Part, ...]
    kind: str
    text: str  # the name, where no mark-up can stand

    @property
    def href(self) -> str:
        return f"/candidates/{self.id}"


@dataclass(frozen=True)
class Said:
    """A sentence and the evidence that it rests on."""

    text: str
    evidence: tuple[tuple[str, str | None], ...] = ()  # words, and where they lead


@dataclass(frozen=True)
class ShownVerdict:
    """A verdict about one candidate."""

    id: str
    candidate: Named
    comparison_id: str
    state: State
    look: str
    headline: str
    interval: str
    facts: str  # how many prompts and groups, the test, the rule
    reasons: tuple[Said, ...]
    confirmation: str
    may_ship: bool
    can_ship: bool  # it can be run, so that an override may
    when: Moment
    share: str


@dataclass(frozen=True)
class Cell:
    """A figure of one candidate; `note` says why it cannot be held against the baseline's."""

    value: str
    note: str = ""
    id: str = ""


@dataclass(frozen=True)
class Line:
    """A row of a table with one cell per candidate."""

    label: str
    cells: tuple[Cell, ...]


@dataclass(frozen=True)
class Tab:
    """A choice of what is listed."""

    label: str
    href: str
    count: int
    here: bool


@dataclass(frozen=True)
class OutcomeRow:
    """One prompt of the list."""

    href: str
    number: int
    text: str
    change: str
    look: str
    before: str
    after: str
    must_pass: bool
    tags: tuple[str, ...]


@dataclass(frozen=True)
class Changes:
    """What became of the prompts under one candidate."""

    candidate: Named
    others: tuple[Tab, ...]  # the other candidates
    tabs: tuple[Tab, ...]
    slices: tuple[Tab, ...]
    rows: tuple[OutcomeRow, ...]
    next: str | None
    first_regression: str | None


@dataclass(frozen=True)
class ShownTake:
    """One persona's opinion."""

    persona: str
    score: str
    stance: str
    text: str
    cited: tuple[tuple[str, str | None], ...] = ()  # words, and where they lead


@dataclass(frozen=True)
class Panel:
    """The opinions about one candidate."""

    candidate: Named
    summary: str
    takes: tuple[ShownTake, ...]
    label: str  # whose opinion it is


@dataclass(frozen=True)
class ShownClaim:
    """What a page says in numbers, and what was measured."""

    id: str
    text: str
    value: str
    status: str
    look: str
    measured: str


@dataclass(frozen=True)
class ShownCard:
    """Every field of an imported page about one tool."""

    candidate: Named
    letter: str
    facts: tuple[tuple[str, str], ...]
    description: tuple[str, ...]
    percent: str
    takes: tuple[ShownTake, ...]
    claims: tuple[ShownClaim, ...]
    warnings: tuple[str, ...]
    source: str
    linked: Named | None


@dataclass(frozen=True)
class ShownJudge:
    """A judge, and whether it was fit to judge."""

    name: tuple[Part, ...]
    state: str
    sentence: str


@dataclass(frozen=True)
class Drawing:
    """Intervals as a picture, and the same facts as sentences."""

    svg: str  # with every name in it escaped
    sentences: tuple[str, ...]


@dataclass(frozen=True)
class ComparePage:
    """/compare/{id}"""

    id: str
    title: str
    category: str
    created: Moment
    state: str
    error: str | None
    doing: str
    baseline: Named
    served: tuple[str, ...]  # aliases that point at the baseline
    candidates: tuple[Named, ...]
    suite: str
    opinion_only: bool
    verdicts: tuple[ShownVerdict, ...]
    drawing: Drawing | None
    strengths: tuple[str, ...]
    columns: tuple[Named, ...]
    measured: tuple[Line, ...]  # what the rule looks at
    more_measured: tuple[Line, ...]
    machines: tuple[str, ...]
    evidence: tuple[str, ...]
    judges: tuple[ShownJudge, ...]
    changes: Changes | None
    panels: tuple[Panel, ...]
    votes: tuple[str, ...]
    cards: tuple[ShownCard, ...]
    bookmarked: bool
    may_write: bool
    may_admin: bool
    may_vote: bool
    method: str
    share: str
    shipped: tuple[str, ...]


@dataclass(frozen=True)
class ShownAnswer:
    """One candidate's answer, and what it differs in from the baseline's."""

    candidate: Named
    baseline: bool
    text: str
    error: str
    pieces: tuple[Piece, ...] | None
    passed: str
    look: str
    checks: tuple[tuple[str, str, str], ...]  # kind, passed or failed, detail
    facts: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class ShownJudgement:
    """What a judge said with the answers in one order."""

    judge: str
    candidate: Named
    order: str
    preferred: str
    reason: str


@dataclass(frozen=True)
class PromptPage:
    """/compare/{id}/prompts/{prompt_id}"""

    comparison_id: str
    title: str
    number: int
    group: str
    tags: tuple[str, ...]
    held: bool
    must_pass: bool
    system: str
    turns: tuple[tuple[str, str], ...]
    reference: str
    change: str
    look: str
    answers: tuple[ShownAnswer, ...]
    judgements: tuple[ShownJudgement, ...]
    votes: str
    next_regression: str | None
    regressions: int
    back: str


def rank(metric: str) -> tuple[int, str]:
    """What the rule looks at stands first, the rest by its name."""
    return (FIRST.index(metric) if metric in FIRST else len(FIRST)), metric


def figure(value: float, unit: str) -> str:
    """A measured number: shares as percent, large numbers with commas."""
    if unit == "share":
        return f"{value:.1%}"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def named(candidate: Candidate) -> Named:
    return Named(candidate.id, parts(candidate.name), candidate.kind, candidate.name)


def state_look(state: State) -> str:
    return LOOKS[state]


def shown_verdict(found: StoredVerdict, names: Mapping[str, Candidate], numbers: Mapping[str, int]) -> ShownVerdict:
    """A verdict in words; ids in its sentences become names and links."""
    verdict, candidate = found.verdict, names[found.candidate_id]

    def said(sentence: str) -> str:
        return ID.sub(
            lambda id: names[id[0]].name if id[0] in names else f"prompt {numbers[id[0]]}" if id[0] in numbers else id[0],
            sentence,
        )

    def place(id: str) -> tuple[str, str | None]:
        if id in numbers:
            return f"#{numbers[id]}", f"/compare/{found.comparison_id}/prompts/{id}?of={found.candidate_id}"
        if id.startswith("meas_"):
            return "measured", f"#{id}"
        return (names[id].name, f"/candidates/{id}") if id in names else (id, None)

    reasons = tuple(Said(said(reason.sentence), tuple(map(place, reason.evidence[:20]))) for reason in verdict.reasons)
    counted = f"{verdict.n_prompts:,} prompts in {verdict.n_groups:,} groups" if verdict.n_prompts else ""
    test = f"p = {verdict.p_adjusted:.3g}, {verdict.method}, Holm over candidates" if verdict.p_adjusted is not None else ""
    confirmation = ""
    if verdict.needs_confirmation:
        confirmation = {
            True: f"confirmed on the half that was held back: {verdict.held}",
            False: f"not confirmed on the half that was held back: {verdict.held}",
            None: "chosen among several: it needs confirmation on the half that was held back",
        }[verdict.confirmed]
    headline = reasons[0].text if reasons else ""
    state = NOTHING_RUN if verdict.state is State.OPINION_ONLY else str(verdict.state)
    return ShownVerdict(
        id=found.id,
        candidate=named(candidate),
        comparison_id=found.comparison_id,
        state=verdict.state,
        look=LOOKS[verdict.state],
        headline=headline,
        interval=str(verdict.interval) if verdict.interval else "",
        facts="; ".join(filter(None, (counted, test, f"rule {verdict.rule_version}"))),
        reasons=reasons,
        confirmation=confirmation,
        may_ship=verdict.may_ship and candidate.runs,
        can_ship=candidate.runs and verdict.state is not State.OPINION_ONLY,
        when=moment(found.created_at),
        share=f"{state}: {candidate.name}" + (f", {headline}" if verdict.interval else ""),
    )


def drawing(found: Sequence[StoredVerdict], names: Mapping[str, Candidate], baseline: Candidate) -> Drawing | None:
    """The intervals of all candidates; nothing where nothing was compared."""
    rows = []
    for one in found:
        if (interval := one.verdict.interval) is not None:
            low, effect, high = (100 * value for value in (interval.low, interval.effect, interval.high))
            rows.append(IntervalRow(names[one.candidate_id].name, low, effect, high))
    if not rows:
        return None
    svg = plot(f"Difference from {baseline.name}, with 95 % intervals", rows, key="intervals", zero_label=f"as {baseline.name}")
    return Drawing(svg, tuple(sentences(rows)))


def shown_card(candidate: Candidate, claims: Sequence[StoredClaim], linked: Candidate | None) -> ShownCard:
    """Every field of a card; what the page does not say is said to be missing."""
    card = candidate.card
    assert card is not None
    facts = [
        ("Category", card.category),
        ("Tagline", card.tagline),
        ("Chip", card.chip),
        ("Entry", card.entry_label),
        ("Pricing", card.pricing),
        ("Panel verdict", _panel_verdict(card)),
        ("Panel ship, as printed", None if card.panel_percent is None else f"{card.panel_percent:g}%"),
        ("Community, beside the name", card.community_share),
        ("Community, in the table", card.community),
        ("Best for", card.best_for),
        ("Home page", card.home_url),
        *card.other,
    ]
    shown = tuple((label, value if value else "not on the page") for label, value in facts)
    source = ", ".join(filter(None, (card.source_url, card.source_date)))
    takes = tuple(
        ShownTake(
            take.persona,
            "" if take.score is None else f"{take.score:g}/100",
            take.stance or "",
            NO_TAKE if take.missing else take.text or "",
        )
        for take in card.takes
    )
    return ShownCard(
        candidate=named(candidate),
        letter=next((letter for letter in card.name if letter.isalnum()), "?").upper(),
        facts=shown,
        description=tuple((card.description or "").split("\n")) if card.description else (),
        percent=_recomputed(card),
        takes=takes,
        claims=tuple(shown_claim(one) for one in claims),
        warnings=tuple(warning.text for warning in card.warnings),
        source=source,
        linked=None if linked is None else named(linked),
    )


def shown_claim(found: StoredClaim) -> ShownClaim:
    claim = found.claim
    span = "" if claim.high is None else f" to {figure(claim.high, '')}"
    value = f"{claim.metric}: {claim.bound + ' ' if claim.bound else ''}{figure(claim.value, '')}{span} {claim.unit}".strip()
    measured = "not measured here"
    if found.low is not None or found.high is not None:
        low, high = ("no bound" if end is None else f"{end:.4g}" for end in (found.low, found.high))
        measured = f"{low} to {high} {claim.unit}"
    look = {"confirmed": "good", "contradicted": "bad"}.get(str(found.status), "even")
    return ShownClaim(found.id, claim.text, value, str(found.status), look, measured)


def shown_take(take: PanelTake, names: Mapping[str, Candidate]) -> ShownTake:
    """A persona's reading of the run; what it cites leads to where it stands."""

    def place(id: str) -> tuple[str, str | None]:
        if id.startswith("meas_"):
            return "measured", f"#{id}"
        return ID.sub(lambda found: names[found[0]].name if found[0] in names else found[0], id), None

    score = "" if take.score is None else f"{take.score:.0f}/100"
    return ShownTake(take.persona, score, take.stance or "", take.text, tuple(map(place, take.cited)))


def change_look(change: Change) -> str:
    return {Change.BROKE: "bad", Change.FIXED: "good", Change.BOTH_WRONG: "open"}.get(change, "even")


def excerpt(text: str, most: int = EXCERPT) -> str:
    """The beginning of a text, in one line."""
    line = " ".join(text[: 4 * most].split())
    return line if len(line) <= most else line[: most - 1].rstrip() + "…"


def _panel_verdict(card: Card) -> str | None:
    counted = None
    if card.panel_ships is not None or card.panel_skips is not None:
        counted = f"{_count(card.panel_ships)} ship / {_count(card.panel_skips)} skip"
    return " · ".join(filter(None, (card.panel_verdict, counted))) or None


def _count(number: int | None) -> str:
    return "–" if number is None else str(number)


def _recomputed(card: Card) -> str:
    if card.panel_percent_recomputed is None:
        return "the page gives no takes or counts to recompute it from"
    found = f"{card.panel_percent_recomputed:.4g}%"
    if card.panel_percent is None:
        return f"{found}, recomputed; the page prints none"
    same = abs(card.panel_percent - card.panel_percent_recomputed) < 0.5
    return f"{found}, recomputed: {'as printed' if same else f'the page prints {card.panel_percent:g}%'}"


def plan_in_words(comparison: Comparison) -> tuple[str, ...]:
    """What was decided before anything ran."""
    plan = comparison.plan
    said = ["sampling " + ", ".join(f"{name} {value}" for name, value in plan.sampling.items())]
    if plan.samples > 1:
        said.append(f"{plan.samples} answers to each prompt")
    if plan.stop_early:
        said.append("may stop early")
    if plan.budget is not None:
        said.append(f"at most ${plan.budget:g}")
    for item in comparison.items:
        if item.chosen_from > 1:
            said.append(f"a candidate is the best of {item.chosen_from} checkpoints")
    return tuple(said)
