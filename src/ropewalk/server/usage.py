"""The Usage page: what questions and trainings cost and what reading files once has saved, by day, by model and by workspace."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route

from ropewalk.config.serving import Serving
from ropewalk.engine.models import Models
from ropewalk.errors import BadInput, PermissionDenied
from ropewalk.files.token_ledger import FileTokens, of_files, sample_storage
from ropewalk.jobs.account import trained
from ropewalk.server import words
from ropewalk.server.visitors import Visitor, address, show, signed_in, store_of
from ropewalk.tenants.prices import Price, saved
from ropewalk.tenants.token_report import Report, Sum, report

SPANS = (7, 30, 90, 365)  # days
DEFAULT_SPAN = 30
ALL = "all"  # workspaces


@dataclass(frozen=True)
class Bar:
    """Tokens as a bar: what was not read again, what was read, what was written; each in thousandths of the longest."""

    found: int
    read: int
    written: int


@dataclass(frozen=True)
class Line:
    """One day, model or workspace."""

    name: str
    requests: str
    prompts: str  # tokens of all prompts
    found: str  # of these, tokens that were not read again
    share: str
    output: str
    cost: str  # '' where no price is known
    saved: str
    stored: str
    jobs: str  # '' for none, here and below
    trained: str
    device: str
    job_cost: str
    bar: Bar


@dataclass(frozen=True)
class Table:
    """Lines of one kind."""

    title: str
    of: str
    lines: tuple[Line, ...]
    stored: bool
    empty: int = 0  # days without a question or a job, which are left out


@dataclass(frozen=True)
class Span:
    """Days that can be looked at."""

    days: int
    here: bool


@dataclass(frozen=True)
class UsagePage:
    """/usage"""

    title: str
    first: str
    last: str
    spans: tuple[Span, ...]
    all: bool  # workspaces are shown together
    may_see_all: bool
    total: Line
    tables: tuple[Table, ...]
    priced: bool
    trains: bool  # there was a job
    prices: tuple[str, ...]
    csv: str
    json: str


@dataclass(frozen=True)
class Savings:
    """What questions about one file cost, and did not."""

    questions: str
    found: str  # tokens not read again
    read: str
    saved: str

    @property
    def words(self) -> str:
        told = f"{self.questions}, {self.found} tokens not read again"
        return told + (f", {self.saved} saved" if self.saved else "")


async def show_usage(request: Request, visitor: Visitor) -> Response:
    days, everything = _days(request), _everything(request, visitor)
    found = await _report(request, visitor, days, everything)
    prices = _prices(request)
    query = {"days": days, **({"of": ALL} if everything else {})}
    whose = "all workspaces" if everything else visitor.workspace.name
    if visitor.caller.user_id and not everything:
        whose = f"{visitor.caller.user_id} in {whose}"
    tables = [
        _table("By day", "Day", reversed(list(found.days.items())), by_day=True, stored=True),
        _table("By model", "Model", found.models.items()),
    ]
    if everything:
        named = ((name or id, sums) for (id, name), sums in found.workspaces.items())
        tables.append(_table("By workspace", "Workspace", named, stored=True))
    page = UsagePage(
        title=f"Usage of {whose}",
        first=found.first,
        last=found.last,
        spans=tuple(Span(span, span == days) for span in SPANS),
        all=everything,
        may_see_all=_may_see_all(visitor),
        total=_line("Together", found.total, found.total.prompts + found.total.output),
        tables=tuple(tables),
        priced=any(sums.cost.amounts for sums in found.models.values()),
        trains=found.total.jobs > 0,
        prices=tuple(_price_in_words(name, price) for name, price in sorted(prices.items()) if name in found.models),
        csv=address("/usage/csv", query),
        json=address("/usage/json", query),
    )
    return await show(request, visitor, "usage.html", "Usage", page)


async def download_csv(request: Request, visitor: Visitor) -> Response:
    found = await _report(request, visitor, _days(request), _everything(request, visitor))
    return _download(found.as_csv(), "csv", found)


async def download_json(request: Request, visitor: Visitor) -> Response:
    found = await _report(request, visitor, _days(request), _everything(request, visitor))
    return _download(json.dumps(found.as_dict(), indent=2, ensure_ascii=False) + "\n", "json", found)


async def savings(request: Request, ids: list[str]) -> dict[str, Savings]:
    """By file, what questions about it cost and did not; files that nobody asked about are left out."""
    await _models(request).ledger.flush()
    prices = _prices(request)
    found = await of_files(store_of(request).database, ids)
    return {id: _savings(by_model, prices) for id, by_model in found.items()}


def _savings(by_model: Mapping[str, FileTokens], prices: Mapping[str, Price]) -> Savings:
    questions = sum(tokens.questions for tokens in by_model.values())
    money = saved(((model, tokens.cache_read) for model, tokens in by_model.items()), prices)
    return Savings(
        f"{questions:,} question{'' if questions == 1 else 's'}",
        f"{sum(tokens.cache_read for tokens in by_model.values()):,}",
        f"{sum(tokens.cache_creation for tokens in by_model.values()):,}",
        str(money),
    )


async def _report(request: Request, visitor: Visitor, days: int, everything: bool) -> Report:
    store, caller = store_of(request), visitor.caller
    await _models(request).ledger.flush()
    await sample_storage(store.database)
    prices = _prices(request)
    user = None if everything else caller.user_id
    serving: Serving = request.app.state.settings.serving
    whose = None if everything else caller.workspace_id
    return await report(store.database, whose, days, prices.get, user, trained, serving.training_price)


def _days(request: Request) -> int:
    text = request.query_params.get("days", str(DEFAULT_SPAN))
    if not (text.isascii() and text.isdigit() and len(text) < 6):
        raise BadInput(f"days: '{text[:40]}' is no number of days; expected one such as {DEFAULT_SPAN}")
    return int(text)


def _may_see_all(visitor: Visitor) -> bool:
    return visitor.may("admin") and visitor.key.workspace_id is None


def _everything(request: Request, visitor: Visitor) -> bool:
    if request.query_params.get("of") != ALL:
        return False
    if not _may_see_all(visitor):
        raise PermissionDenied("this key may not see what other workspaces use: it needs the right 'admin' in every workspace")
    return True


def _models(request: Request) -> Models:
    found: Models = request.app.state.models
    return found


def _prices(request: Request) -> dict[str, Price]:
    serving = request.app.state.settings.serving
    return {name: model.price for name, model in (serving.models or {}).items() if model.price is not None}


def _table(title: str, of: str, found: Iterable[tuple[str, Sum]], *, by_day: bool = False, stored: bool = False) -> Table:
    rows = list(found)
    shown = [(name, sums) for name, sums in rows if sums.requests or sums.jobs or (sums.stored and not by_day)]
    longest = max((sums.prompts + sums.output for _, sums in shown), default=0)
    lines = tuple(_line(name, sums, longest) for name, sums in shown)
    return Table(title, of, lines, stored, len(rows) - len(shown) if by_day else 0)


def _line(name: str, sums: Sum, longest: int) -> Line:
    return Line(
        name=name,
        requests=f"{sums.requests:,}",
        prompts=f"{sums.prompts:,}",
        found=f"{sums.cache_read:,}",
        share=f"{100 * sums.share:.0f}%",
        output=f"{sums.output:,}",
        cost=str(sums.cost),
        saved=str(sums.saved),
        stored="–" if sums.stored is None else words.size(sums.stored),
        jobs=f"{sums.jobs:,}" if sums.jobs else "",
        trained=f"{sums.trained:,}" if sums.jobs else "",
        device=words.duration(sums.device_seconds) if sums.jobs else "",
        job_cost=str(sums.training_cost),
        bar=Bar(*(round(1000 * n / max(longest, 1)) for n in (sums.cache_read, sums.prompts - sums.cache_read, sums.output))),
    )


def _price_in_words(name: str, price: Price) -> str:
    kinds = {"input": price.input, "cached": price.cache_read, "output": price.output}
    kinds |= {"trained": price.training} if price.training else {}
    amounts = ", ".join(f"{kind} {amount:g}" for kind, amount in kinds.items())
    amounts += f", an hour of a device {price.device_hour:g}" if price.device_hour else ""
    return f"{name}: {amounts} {price.currency}" + (f", as of {price.as_of}" if price.as_of else "")


def _download(text: str, kind: str, found: Report) -> Response:
    named = f'attachment; filename="usage-{found.first}-{found.last}.{kind}"'
    media = "text/csv; charset=utf-8" if kind == "csv" else "application/json"
    return Response(text, media_type=media, headers={"content-disposition": named})


routes: list[BaseRoute] = [
    Route("/usage", signed_in(show_usage), methods=["GET"]),
    Route("/usage/csv", signed_in(download_csv), methods=["GET"]),
    Route("/usage/json", signed_in(download_json), methods=["GET"]),
]
