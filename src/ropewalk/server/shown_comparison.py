"""A comparison and its prompts, gathered for their pages: verdict first, then cost, what broke, why it is believed, and opinions last."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from starlette.requests import Request

from ropewalk.compare import bookmarks, candidates, promotions, suites, vote_counts, voters
from ropewalk.compare.ballots import Tally
from ropewalk.compare.candidates import Candidate
from ropewalk.compare.cards import NO_TAKE
from ropewalk.compare.diff import Change, word_diff
from ropewalk.compare.fingerprint import get_fingerprint
from ropewalk.compare.gather import panel_evidence, strengths
from ropewalk.compare.judges import judgements, judges
from ropewalk.compare.measures import StoredMeasurement, measurements
from ropewalk.compare.outcomes import Outcome, counts, outcomes
from ropewalk.compare.panel import panel, summary
from ropewalk.compare.records import Comparison, latest
from ropewalk.compare.runs import Output, prompt_outputs
from ropewalk.errors import NotFound
from ropewalk.server import compare_views as views
from ropewalk.server import words
from ropewalk.server.comparisons import runs_of
from ropewalk.server.visitors import Visitor, address, origin, store_of

ROWS = 25  # of what changed


async def compare_page(
    request: Request, visitor: Visitor, found: Comparison, names: Mapping[str, Candidate]
) -> views.ComparePage:
    """Everything that is known about a comparison."""
    store, caller = store_of(request), visitor.caller
    given = await latest(store, caller, found.id)
    shown = [names[found.baseline_id], *(names[id] for id in found.candidate_ids)]
    became = {id: await outcomes(store, caller, found, id) for id in found.candidate_ids}
    numbers = {one.prompt.id: one.prompt.number for some in became.values() for one in some}
    verdicts = tuple(views.shown_verdict(one, names, numbers) for one in given)
    progress = runs_of(request).progress_of(found.id)
    aliases = request.app.state.registry.aliases()
    columns, figures = [one for one in shown if one.runs], []
    for item in found.items:
        if item.run_id is not None:
            figures += await measurements(store, caller, item.run_id)
    bench = await judges(store, caller, found.id)
    machines = [await get_fingerprint(store, id) for id in sorted({one.fingerprint_id for one in figures})]
    shipped = [one for one in await promotions.list_promotions(store, caller) if one.comparison_id == found.id]
    cards = [
        views.shown_card(
            one,
            await candidates.card_claims(store, caller, one.id),
            await candidates.get_candidate(store, caller, one.linked_to) if one.linked_to else None,
        )
        for one in shown
        if one.card is not None
    ]
    return views.ComparePage(
        id=found.id,
        title=found.title,
        category=found.category,
        created=words.moment(found.created_at),
        state=found.state,
        error=found.error,
        doing="" if progress is None else f"{progress.done:,} of {progress.total:,}: {progress.doing}",
        baseline=views.named(shown[0]),
        served=tuple(alias for alias, name in aliases.items() if name == shown[0].target),
        candidates=tuple(map(views.named, shown[1:])),
        suite=await _suite(request, visitor, found),
        opinion_only=found.suite_id is None or not any(one.runs for one in shown[1:]),
        verdicts=verdicts,
        drawing=views.drawing(given, names, shown[0]),
        strengths=await _strengths(request, visitor, found, names) if found.state == "done" and len(columns) > 2 else (),
        columns=tuple(map(views.named, columns)),
        measured=_measured([one for one in figures if one.metric in views.FIRST], columns),
        more_measured=_measured([one for one in figures if one.metric not in views.FIRST], columns),
        machines=tuple(f"{one.device}, {one.driver}, {one.dtype}, {_software(one.versions)}" for one in machines),
        evidence=(*_evidence(became), *views.plan_in_words(found)) if found.suite_id else (),
        judges=tuple(
            views.ShownJudge(
                words.parts(names[one.candidate_id].name if one.candidate_id in names else one.candidate_id),
                "refused"
                if one.refused_reason
                else {True: "admitted", False: "not admitted", None: "not tried yet"}[one.admitted],
                one.refused_reason or one.sentence or "",
            )
            for one in bench
        ),
        changes=_changes(request, found, names, became),
        panels=await _panels(request, visitor, found, names),
        votes=await _votes(request, visitor, found, names),
        cards=tuple(cards),
        bookmarked=await bookmarks.is_bookmarked(store, caller, found.id),
        may_write=visitor.may("write"),
        may_admin=visitor.may("admin"),
        may_vote=found.state == "done" and any(became.values()),
        method="/method",
        share="\n".join([*(one.share for one in verdicts), origin(request) + f"/compare/{found.id}"]) if verdicts else "",
        shipped=tuple(
            f"{one.alias} serves {one.to_name} since {words.moment(one.created_at).exact}"
            if one.rolled_back_at is None
            else f"{one.alias} was moved to {one.to_name} and rolled back at {words.moment(one.rolled_back_at).exact}"
            for one in shipped
        ),
    )


async def prompt_page(
    request: Request, visitor: Visitor, found: Comparison, names: Mapping[str, Candidate], prompt_id: str
) -> views.PromptPage:
    """One prompt with all answers to it."""
    store, caller = store_of(request), visitor.caller
    prompt = await suites.prompt(store, caller, prompt_id)
    if prompt.suite_id != found.suite_id:
        raise NotFound(f"Prompt `{prompt_id[:128]}` not found.")
    candidate_id = _of(request, found)
    became = await outcomes(store, caller, found, candidate_id)
    answers = await prompt_outputs(store, caller, found, prompt_id)
    broke = [one.prompt.id for one in became if one.change is Change.BROKE]
    following = None
    if broke:
        following = broke[(broke.index(prompt_id) + 1) % len(broke)] if prompt_id in broke else broke[0]
    mine = next((one for one in became if one.prompt.id == prompt_id), None)
    order = [found.baseline_id, candidate_id, *(id for id in found.candidate_ids if id != candidate_id)]
    base = answers.get(found.baseline_id)
    said = await judgements(store, caller, found.id, prompt_id=prompt_id)
    judge_names = {one.id: one.candidate_id for one in await judges(store, caller, found.id)}
    shown = tuple(_answer(names[id], answers[id], base, id == found.baseline_id) for id in order if id in answers)
    return views.PromptPage(
        comparison_id=found.id,
        title=found.title,
        number=prompt.number,
        group=prompt.group,
        tags=prompt.tags,
        held=prompt.held,
        must_pass=prompt.must_pass,
        system=prompt.system,
        turns=tuple((str(turn["role"]), _turn(turn["content"])) for turn in prompt.messages),
        reference=prompt.reference,
        change=str(mine.change) if mine else "not answered by both",
        look=views.change_look(mine.change) if mine else "even",
        answers=shown,
        judgements=tuple(
            views.ShownJudgement(
                names[judge_names[one.judge_id]].name if judge_names.get(one.judge_id) in names else one.judge_id,
                views.named(names[one.candidate_id]),
                f"{names[found.baseline_id].name} first" if one.order == "AB" else f"{names[one.candidate_id].name} first",
                _preferred(one.score, names[found.baseline_id].name, names[one.candidate_id].name, one.error),
                one.reason or "",
            )
            for one in said
            if one.candidate_id in names
        ),
        votes=await _votes_on(request, visitor, found, names, prompt_id),
        next_regression=_place(found, following, candidate_id) if following not in (None, prompt_id) else None,
        regressions=len(broke),
        back=address(f"/compare/{found.id}", {"of": candidate_id}),
    )


def _of(request: Request, found: Comparison) -> str:
    asked = request.query_params.get("of")
    if asked is None:
        return found.candidate_ids[0]
    if asked not in found.candidate_ids:
        raise candidates.missing(asked)
    return asked


def _place(found: Comparison, prompt_id: str | None, candidate_id: str) -> str:
    return address(f"/compare/{found.id}/prompts/{prompt_id}", {"of": candidate_id})


async def _suite(request: Request, visitor: Visitor, found: Comparison) -> str:
    if found.suite_id is None:
        return ""
    try:
        suite = await suites.get_suite(store_of(request), visitor.caller, found.suite_id)
    except NotFound:
        return "a suite that is deleted: its prompts and all answers to them are gone, verdicts and figures stay"
    return f"{suite.name}: {suite.n_prompts:,} prompts in {suite.n_groups:,} groups, {suite.n_held:,} held back"


async def _strengths(request: Request, visitor: Visitor, found: Comparison, names: Mapping[str, Candidate]) -> tuple[str, ...]:
    """Three or more ranked, which does not decide."""
    return tuple(
        f"{names[one.name].name if one.name in names else one.name}: would win {one.share:.0%} against the baseline "
        f"(95 %: {one.share_low:.0%} to {one.share_high:.0%})"
        for one in await strengths(store_of(request), visitor.caller, found)
    )


def _measured(figures: Sequence[StoredMeasurement], columns: Sequence[Candidate]) -> tuple[views.Line, ...]:
    """One line per metric and load; what was taken on another machine than the baseline's is not comparable."""
    places: dict[tuple[str, str, int], dict[str, StoredMeasurement]] = {}
    for one in sorted(figures, key=lambda one: views.rank(one.metric)):
        places.setdefault((one.metric, one.unit, one.concurrency), {})[one.candidate_id] = one
    several = len({concurrency for _, _, concurrency in places}) > 1
    lines = []
    for (metric, unit, concurrency), by_candidate in places.items():
        base = by_candidate.get(columns[0].id) if columns else None
        cells = []
        for column in columns:
            cells.append(_cell(by_candidate.get(column.id), base, unit))
        label = f"{metric}, {unit}" if unit not in ("share", "") else metric
        lines.append(views.Line(label + (f", {concurrency} at once" if several else ""), tuple(cells)))
    return tuple(lines)


def _cell(one: StoredMeasurement | None, base: StoredMeasurement | None, unit: str) -> views.Cell:
    if one is None:
        return views.Cell("–", "not measured")
    note = (
        "" if one.low is None or one.high is None else f"95 %: {views.figure(one.low, unit)} to {views.figure(one.high, unit)}"
    )
    if base is not None and one.fingerprint_id != base.fingerprint_id:
        note = "not comparable: another machine"
    return views.Cell(views.figure(one.value, unit), note, one.id)


def _software(versions: Mapping[str, str]) -> str:
    return ", ".join(f"{name} {version}" for name, version in versions.items())


def _evidence(became: Mapping[str, Sequence[Outcome]]) -> tuple[str, ...]:
    first: Sequence[Outcome] = next(iter(became.values()), ())
    if not first:
        return ("no prompt was answered by both yet",)
    judged = sum(one.prompt.judged for one in first)
    held = sum(one.prompt.held for one in first)
    must = [one for one in first if one.prompt.must_pass]
    said = [f"checks {len(first) - judged:,} prompts", f"judged {judged:,}" if judged else "no judge was needed"]
    if held:
        said.append(f"{held:,} of these are of the half that is held back")
    if must:
        said.append(f"must-pass {sum(one.new_passed is True for one in must):,} of {len(must):,}")
    return tuple(said)


def _changes(
    request: Request, found: Comparison, names: Mapping[str, Candidate], became: Mapping[str, Sequence[Outcome]]
) -> views.Changes | None:
    """What became of the prompts, as filters and a page of them."""
    if not any(became.values()):
        return None
    candidate, asked = _of(request, found), request.query_params
    path, chosen, slice = f"/compare/{found.id}", asked.get("show", ""), asked.get("slice", "")
    rows = became[candidate]
    tags = sorted({tag for one in rows for tag in one.prompt.tags})
    inside = [one for one in rows if not slice or slice in one.prompt.tags]
    counted = counts(inside)
    here: dict[str, str] = {"of": candidate} | ({"slice": slice} if slice else {})
    tabs = [views.Tab("all", address(path, here) + "#changed", len(inside), not chosen)]
    tabs += [
        views.Tab(str(kind), address(path, {**here, "show": str(kind)}) + "#changed", counted[kind], chosen == kind)
        for kind in Change
    ]
    shown = [one for one in inside if not chosen or one.change == chosen]
    start = next((n + 1 for n, one in enumerate(shown) if one.prompt.id == asked.get("after")), 0)
    page = shown[start : start + ROWS]
    more = {**here, **({"show": chosen} if chosen else {}), "after": page[-1].prompt.id} if len(shown) > start + ROWS else None
    broke = next((one.prompt.id for one in rows if one.change is Change.BROKE), None)
    return views.Changes(
        candidate=views.named(names[candidate]),
        others=tuple(
            views.Tab(names[id].name, address(path, {"of": id}) + "#changed", len(became[id]), id == candidate)
            for id in found.candidate_ids
        ),
        tabs=tuple(tabs),
        slices=tuple(
            views.Tab(
                tag,
                address(path, {"of": candidate, "slice": tag}) + "#changed",
                sum(tag in one.prompt.tags for one in rows),
                slice == tag,
            )
            for tag in tags
        ),
        rows=tuple(
            views.OutcomeRow(
                _place(found, one.prompt.id, candidate),
                one.prompt.number,
                views.excerpt(one.prompt.text),
                str(one.change),
                views.change_look(one.change),
                views.MARKS[one.old_passed],
                views.MARKS[one.new_passed],
                one.prompt.must_pass,
                one.prompt.tags,
            )
            for one in page
        ),
        next=address(path, more) + "#changed" if more else None,
        first_regression=_place(found, broke, candidate) if broke else None,
    )


async def _panels(
    request: Request, visitor: Visitor, found: Comparison, names: Mapping[str, Candidate]
) -> tuple[views.Panel, ...]:
    """Computed from the evidence of the run, for what was run."""
    if found.state != "done" or found.suite_id is None:
        return ()
    read = await panel_evidence(store_of(request), visitor.caller, found)
    shown = []
    for id in found.candidate_ids:
        if id in read:
            takes = panel(read[id])
            shown.append(
                views.Panel(
                    views.named(names[id]),
                    summary(takes),
                    tuple(views.shown_take(take, names) for take in takes),
                    "computed from this run",
                )
            )
    return tuple(shown)


async def _votes(request: Request, visitor: Visitor, found: Comparison, names: Mapping[str, Candidate]) -> tuple[str, ...]:
    said = []
    for id, counted in (await vote_counts.tally_votes(store_of(request), visitor.caller, found.id)).items():
        if counted.tally.voters:
            said.append(f"{names[id].name} against {names[found.baseline_id].name}: {_tally(counted.tally)}")
        if counted.trainers.voters:
            said.append(f"counted apart, from who trained {names[id].name}: {_tally(counted.trainers)}")
        said += [f"left out: a voter, because {reason}" for _, reason in counted.excluded]
    return tuple(said)


def _tally(tally: Tally) -> str:
    people = f"{len(tally.voters)} {'person' if len(tally.voters) == 1 else 'people'}"
    if tally.share is None:
        return f"{people}; no percentage below five"
    return f"{people}, {tally.share:.0%} ({tally.low:.0%} to {tally.high:.0%}), blind"


async def _votes_on(
    request: Request, visitor: Visitor, found: Comparison, names: Mapping[str, Candidate], prompt_id: str
) -> str:
    """What others chose would not leave the next voter blind: shown to who administers, or has nothing left to vote on."""
    store, caller = store_of(request), visitor.caller
    cast = [one for one in await vote_counts.votes_on(store, caller, found.id, prompt_id) if not one.is_repeat]
    if not cast:
        return "nobody has voted on this prompt yet"
    left = await vote_counts.waiting(store, caller, voters.who(caller), limit=1000)
    if not visitor.may("admin") and any(one.id == found.id for one in left):
        return f"{len(cast)} votes, shown when you have voted on all pairs"
    chosen: dict[str, int] = {}
    for one in cast:
        winner = {"left": one.left_candidate, "right": one.right_candidate}.get(one.choice, "")
        word = names[winner].name if winner in names else one.choice.replace("_", " ")
        chosen[word] = chosen.get(word, 0) + 1
    return ", ".join(f"{word} {count}" for word, count in chosen.items())


def _answer(candidate: Candidate, output: Output, base: Output | None, is_base: bool) -> views.ShownAnswer:
    text = output.text or ""
    compared = not is_base and base is not None and base.text is not None and output.text is not None
    facts = [
        ("Tokens read", f"{output.tokens_in:,}, {output.tokens_cached:,} of them from the cache"),
        ("Tokens written", f"{output.tokens_out:,}"),
    ]
    if output.ttft_ms is not None:
        facts.append(("First token", f"{output.ttft_ms:,.0f} ms"))
    if output.total_ms is not None:
        facts.append(("Whole answer", f"{output.total_ms:,.0f} ms"))
    if output.finish:
        facts.append(("Ended", output.finish))
    return views.ShownAnswer(
        candidate=views.named(candidate),
        baseline=is_base,
        text=text,
        error=output.error or "",
        pieces=tuple(word_diff(base.text or "", text)) if compared and base is not None else None,
        passed=views.MARKS[output.passed],
        look={True: "good", False: "bad", None: "even"}[output.passed],
        checks=tuple((one.kind, "passed" if one.passed else "failed", one.detail) for one in output.checks),
        facts=tuple(facts),
    )


def _turn(content: object) -> str:
    if isinstance(content, str):
        return content
    blocks = content if isinstance(content, list) else []
    return "\n".join(block.get("text", f"[{block.get('type')}]") for block in blocks)


def _preferred(score: float | None, base: str, candidate: str, error: str | None) -> str:
    if score is None:
        return error or NO_TAKE
    return candidate if score > 0.5 else base if score < 0.5 else "neither"
