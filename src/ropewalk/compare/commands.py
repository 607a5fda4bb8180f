"""What `ropewalk compare ...` does: everything it prints, and its exit codes."""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Callable, Coroutine, Iterator, Mapping, Sequence
from contextlib import AsyncExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Protocol, TypeVar

from ropewalk.compare import promotions, report
from ropewalk.compare.candidates import Candidate, add_candidate, add_cards, get_candidate, link, list_candidates
from ropewalk.compare.digest import preview
from ropewalk.compare.digest_mail import subject_of, text_of
from ropewalk.compare.digest_sending import send_due
from ropewalk.compare.mail import Mailer
from ropewalk.compare.outcomes import outcomes
from ropewalk.compare.promotions import Promotion
from ropewalk.compare.records import Comparison, Plan, create, get_comparison, latest, list_comparisons
from ropewalk.compare.runner import ComparisonRunner, Progress
from ropewalk.compare.ship import rollback, ship
from ropewalk.compare.suites import Suite, add_suite, list_suites
from ropewalk.config.mail import configured_mail
from ropewalk.config.serving import Serving
from ropewalk.engine.models import Models
from ropewalk.errors import BadInput, NotFound
from ropewalk.files.settings import Settings
from ropewalk.files.store import Store
from ropewalk.registry import Registry
from ropewalk.tenants.caller import Caller

T = TypeVar("T")


class Run(Protocol):
    """Does some work at a desk."""

    def __call__(self, work: Callable[[Desk], Coroutine[Any, Any, T]]) -> T: ...


@dataclass(frozen=True)
class Desk:
    """What a command works with while it runs."""

    store: Store
    models: Models
    caller: Caller


@dataclass(frozen=True)
class Place:
    """Where the state is, and what is served: this machine's, with no server in between."""

    settings: Settings
    registry: Registry
    serving: Serving
    workspace: str

    def run(self, work: Callable[[Desk], Coroutine[Any, Any, T]]) -> T:
        """Opens all, does the work in the name of this machine's user, closes all."""
        with self.opened() as run:
            return run(work)

    @contextmanager
    def opened(self) -> Iterator[Run]:
        """The same for several pieces of work, between which a person is waited for."""
        with asyncio.Runner() as runner:
            desk, exits = runner.run(self._open())
            try:
                yield lambda work: runner.run(work(desk))
            finally:
                runner.run(exits.aclose())

    async def _open(self) -> tuple[Desk, AsyncExitStack]:
        async with AsyncExitStack() as exits:
            store = await Store.open(self.settings)
            exits.push_async_callback(store.close)
            models = Models(store, self.registry, self.serving)
            exits.push_async_callback(models.close)
            return Desk(store, models, await store.local_caller(self.workspace)), exits.pop_all()


@dataclass(frozen=True)
class Asked:
    """What `compare run` is to compare."""

    names: tuple[str, ...]  # what is served, then its candidates
    suite: str | None
    settings: Mapping[str, Any]  # of a suite that is yet to be made
    plan: Plan
    judges: tuple[str, ...] = ()
    chosen_from: int = 1
    title: str = ""
    category: str = ""


def add(place: Place, names: Sequence[str], url: str | None, date: str | None, as_json: bool) -> int:
    """Served names become candidates, texts of pages cards."""

    async def work(desk: Desk) -> list[Candidate]:
        found = []
        for name in names:
            if Path(name).is_file():
                found += await add_cards(desk.store, desk.caller, Path(name).read_bytes(), url, date)
            else:
                found.append(await _served(desk, name))
        return found

    for candidate in place.run(work):
        _tell(as_json, report.of_candidate(candidate), report.candidate_line(candidate))
        for warning in candidate.card.warnings if candidate.card and not as_json else ():
            print(f"  note: {warning.text}")
    return 0


def link_card(place: Place, card: str, candidate: str, as_json: bool) -> int:
    """Says which candidate a card is about."""

    async def work(desk: Desk) -> Candidate:
        return await link(desk.store, desk.caller, card, (await _served(desk, candidate)).id)

    found = place.run(work)
    _tell(as_json, report.of_candidate(found), f"{found.id} -> {found.linked_to}")
    return 0


def suite(place: Place, source: str, name: str, settings: Mapping[str, Any], as_json: bool) -> int:
    """Makes a suite and prints its id."""

    async def work(desk: Desk) -> Suite:
        return await _made(desk, source, settings, name)

    found = place.run(work)
    _tell(as_json, report.of_suite(found), report.suite_line(found))
    return 0


def listed(place: Place, what: str, limit: int, as_json: bool) -> int:
    """One line for each."""

    async def work(desk: Desk) -> list[tuple[dict[str, Any], str]]:
        store, caller = desk.store, desk.caller
        if what == "suites":
            return [(report.of_suite(one), report.suite_line(one)) for one in await list_suites(store, caller, limit)]
        if what == "candidates":
            found = await list_candidates(store, caller, limit)
            return [(report.of_candidate(one), report.candidate_line(one)) for one in found]
        if what == "promotions":
            moves = await promotions.list_promotions(store, caller, limit=limit)
            return [(one.as_dict(), report.promotion_line(one)) for one in moves]
        told = [await _told(desk, one) for one in await list_comparisons(store, caller, limit)]
        return [(one.as_dict(), one.line()) for one in told]

    for values, line in place.run(work):
        _tell(as_json, values, line)
    return 0


def run(place: Place, asked: Asked, as_json: bool) -> int:
    """Runs a comparison, or goes on with one, and prints its verdicts."""

    async def work(desk: Desk) -> report.Told:
        if len(asked.names) == 1 and asked.names[0].startswith("cmp_"):
            comparison = await get_comparison(desk.store, desk.caller, asked.names[0])
        else:
            comparison = await _new(desk, asked)
            print(f"{comparison.id}  {comparison.title}", file=sys.stderr)
        with _bar() as tell:
            await ComparisonRunner(desk.store, desk.models).run(desk.caller, comparison.id, tell)
        return await _told(desk, await get_comparison(desk.store, desk.caller, comparison.id))

    told = place.run(work)
    _tell(as_json, told.as_dict(), told.text())
    return 0


def show(place: Place, id: str, candidate: str | None, prompts: str | None, form: str) -> int:
    """Prints the verdicts of a comparison -> the exit code of one, or of the best."""

    async def work(desk: Desk) -> tuple[report.Told, int, list[str]]:
        told = await _told(desk, await get_comparison(desk.store, desk.caller, id))
        if not told.verdicts:
            raise BadInput(
                f"comparison `{id}` is {told.comparison.state} and has no verdict yet; `ropewalk compare run {id}` goes on with it"
            )
        codes = {one.candidate_id: one.verdict.state.exit_code for one in told.verdicts}
        chosen = _named(told, candidate).id if candidate else None
        lines = []
        for one in told.verdicts if prompts else ():
            if chosen in (None, one.candidate_id):
                lines += [
                    report.outcome_line(told.names[one.candidate_id], found)
                    for found in await outcomes(desk.store, desk.caller, told.comparison, one.candidate_id)
                    if found.change == prompts
                ]
        return told, codes[chosen] if chosen else min(codes.values()), lines

    told, code, lines = place.run(work)
    if form == "json":
        print(json.dumps({**told.as_dict(), "exit_code": code, **({"prompts": lines} if prompts else {})}))
    else:
        print("\n".join([told.markdown() if form == "md" else told.text(), *lines]))
    return code


def ship_it(place: Place, id: str, candidate: str | None, alias: str, override: str | None, as_json: bool) -> int:
    """Moves an alias to a candidate."""

    async def work(desk: Desk) -> Promotion:
        told = await _told(desk, await get_comparison(desk.store, desk.caller, id))
        one = _named(told, candidate)
        parts = desk.store, desk.models, place.registry, desk.caller, id, one.id, alias
        with _steps() as tell:
            return await ship(*parts, override=override, progress=tell)

    promotion = place.run(work)
    _tell(as_json, promotion.as_dict(), report.promotion_line(promotion))
    return 0


def roll_back(place: Place, alias: str, as_json: bool) -> int:
    """Moves an alias back."""

    async def work(desk: Desk) -> Promotion | None:
        # Whoever serves has what it served before still loaded; this process serves nothing.
        return await rollback(desk.store, desk.models, place.registry, desk.caller, alias, load=False)

    promotion, name = place.run(work), place.registry.resolve(alias).name
    _tell(
        as_json, {"alias": alias, "name": name, "promotion": promotion.as_dict() if promotion else None}, f"{alias} -> {name}"
    )
    return 0


def digest(place: Place, send: bool, mail: Path | None, as_json: bool) -> int:
    """Prints the weekly mail, or sends that of the week that ended last; exit code 1 where a mail could not be sent."""
    if not send:
        found = place.run(lambda desk: preview(desk.store, desk.caller))
        values = {"week": found.week, "subject": subject_of(found), "items": [asdict(item) for item in found.items]}
        told = text_of(found, report.SERVED_AT, "(a link of the reader's own)")
        _tell(as_json, values, f"{subject_of(found)}\n\n{told}")
        return 0
    settings = configured_mail(mail)
    if settings is None:
        raise BadInput("nothing says how mail is sent: name the file with --mail, or in $ROPEWALK_MAIL")
    sent = place.run(lambda desk: send_due(desk.store, Mailer(settings)))
    _tell(as_json, asdict(sent), ", ".join(f"{count} {what}" for what, count in asdict(sent).items()))
    return 1 if sent.failed else 0


# -- what several of them do


async def _served(desk: Desk, text: str) -> Candidate:
    """A candidate by its id, or the model that is served by a name."""
    if text.startswith("cand_"):
        return await get_candidate(desk.store, desk.caller, text)
    return await add_candidate(desk.store, desk.models, desk.caller, text)


async def _made(desk: Desk, source: str, settings: Mapping[str, Any], name: str = "") -> Suite:
    path = Path(source)
    stored = source.startswith("file_") and not path.exists()
    if not stored and not path.is_file():
        raise NotFound(f"there is no file '{source}', and it is no id of a suite or of a stored file")
    return await add_suite(desk.store, desk.caller, source if stored else path, name=name, **settings)


async def _new(desk: Desk, asked: Asked) -> Comparison:
    if len(asked.names) < 2:
        raise BadInput(f"'{asked.names[0]}' alone cannot be compared; name what is served, then one or more candidates")
    found = [await _served(desk, name) for name in asked.names]
    suite_id = asked.suite
    if suite_id is not None and (Path(suite_id).exists() or not suite_id.startswith("suite_")):
        suite_id = (await _made(desk, suite_id, asked.settings)).id
    judges = [(await _served(desk, name)).id for name in asked.judges]
    ids = [candidate.id for candidate in found]
    return await create(
        desk.store,
        desk.caller,
        baseline_id=ids[0],
        candidate_ids=ids[1:],
        suite_id=suite_id,
        title=asked.title,
        category=asked.category,
        plan=replace(asked.plan, judges=tuple(judges)),
        chosen_from=dict.fromkeys(ids[1:], asked.chosen_from),
    )


async def _told(desk: Desk, comparison: Comparison) -> report.Told:
    ids = [item.candidate_id for item in comparison.items]
    found = [await get_candidate(desk.store, desk.caller, id) for id in ids]
    return report.Told(comparison, tuple(await latest(desk.store, desk.caller, comparison.id)), tuple(found))


def _named(told: report.Told, text: str | None) -> Candidate:
    """One of the candidates, by name or id; the only one if none is named."""
    some = [one for one in told.candidates if one.id in told.comparison.candidate_ids]
    matching = [one for one in some if text in (None, one.id, one.name)]
    if len(matching) == 1:
        return matching[0]
    names = ", ".join(f"{one.name} ({one.id})" for one in some)
    if text is None:
        raise BadInput(f"comparison `{told.comparison.id}` has several candidates; name one of {names}")
    raise NotFound(f"'{text}' is none of the candidates of comparison `{told.comparison.id}`: {names}")


def _tell(as_json: bool, values: Mapping[str, Any], text: str) -> None:
    print(json.dumps(values) if as_json else text)


@contextmanager
def _bar() -> Iterator[Callable[[Progress], None] | None]:
    """A bar on a terminal; nothing elsewhere."""
    if not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bar

    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    with Bar(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("asking", total=None)
        yield lambda told: bar.update(task, completed=told.done, total=told.total, description=told.doing)


@contextmanager
def _steps() -> Iterator[Callable[[str, float], None] | None]:
    """A line for each step that is done, on a terminal; nothing elsewhere."""
    if not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    with Progress(TextColumn("{task.description:<10}"), BarColumn(), TimeElapsedColumn(), console=Console(stderr=True)) as bar:
        tasks: dict[str, Any] = {}

        def tell(step: str, share: float) -> None:
            if step not in tasks:
                tasks[step] = bar.add_task(step, total=1.0)
            bar.update(tasks[step], completed=share)

        yield tell
