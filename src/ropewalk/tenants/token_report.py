"""What questions and trainings cost: by day, by model and, of all workspaces together, by workspace; with money where prices are known."""

from __future__ import annotations

import csv
import io
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any

from sqlalchemy import Row, func, select

from ropewalk.database import Database, now
from ropewalk.errors import BadInput
from ropewalk.tenants.prices import Money, Price
from ropewalk.tenants.tables import storage_days, token_days, workspaces
from ropewalk.tenants.tables import usage as quotas

COUNTERS = ("requests", "input", "cache_creation", "cache_read", "output")
MOST_DAYS = 3660
CSV = (
    *("day", "model", "requests", "input_tokens", "cache_creation_input_tokens", "cache_read_input_tokens", "output_tokens"),
    *("cost", "saved", "currency", "jobs", "trained_tokens", "device_seconds", "training_cost", "stored_bytes"),
)


@dataclass
class Sum:
    """Some requests together, and what they cost."""

    requests: int = 0
    input: int = 0
    cache_creation: int = 0
    cache_read: int = 0
    output: int = 0
    cost: Money = field(default_factory=Money)
    saved: Money = field(default_factory=Money)
    stored: int | None = None  # bytes; None: not looked at
    jobs: int = 0  # trainings
    trained: int = 0  # their tokens
    device_seconds: float = 0.0
    training_cost: Money = field(default_factory=Money)

    @property
    def prompts(self) -> int:
        """Tokens of all prompts."""
        return self.input + self.cache_creation + self.cache_read

    @property
    def share(self) -> float:
        """The part of the prompts that was not read again."""
        return self.cache_read / self.prompts if self.prompts else 0.0

    def as_dict(self) -> dict[str, Any]:
        return {
            "requests": self.requests,
            "input_tokens": self.input,
            "cache_creation_input_tokens": self.cache_creation,
            "cache_read_input_tokens": self.cache_read,
            "output_tokens": self.output,
            "cached_share": round(self.share, 4),
            "stored_bytes": self.stored,
            "cost": _amounts(self.cost),
            "saved": _amounts(self.saved),
            "jobs": self.jobs,
            "trained_tokens": self.trained,
            "device_seconds": round(self.device_seconds, 3),
            "training_cost": _amounts(self.training_cost),
        }


@dataclass(frozen=True)
class Trained:
    """The jobs over one base, of one workspace, that one day counts.  jobs -> report"""

    day: str
    base: str
    workspace_id: str
    jobs: int
    tokens: int
    device_seconds: float


# The jobs since a day, of a workspace or all, of one of its users or all.
Training = Callable[[Database, str, str | None, str | None], Awaitable[Sequence[Trained]]]
PriceOf = Callable[[str], Price | None]


@dataclass(frozen=True)
class Entry:
    """The requests of one day to one model, and the trainings over it."""

    day: str
    model: str
    sum: Sum


@dataclass(frozen=True)
class Report:
    """What a workspace, one of its users, or (None) all workspaces asked between two days, both included."""

    workspace_id: str | None
    first: str
    last: str
    entries: tuple[Entry, ...]
    days: Mapping[str, Sum]
    models: Mapping[str, Sum]
    workspaces: Mapping[tuple[str, str], Sum]  # by id and name; empty for one workspace
    total: Sum  # its bytes are those stored now

    def as_dict(self) -> dict[str, Any]:
        return {
            "workspace_id": self.workspace_id,
            "from": self.first,
            "to": self.last,
            "total": self.total.as_dict(),
            "days": [{"day": day, **found.as_dict()} for day, found in self.days.items()],
            "models": [{"model": model, **found.as_dict()} for model, found in self.models.items()],
            "workspaces": [{"id": id, "name": name, **found.as_dict()} for (id, name), found in self.workspaces.items()],
        }

    def as_csv(self) -> str:
        """A line for each day and model, and one without a model for what was stored on a day. Amounts are in the currency beside
        them."""
        out = io.StringIO()
        writer = csv.writer(out, lineterminator="\n")
        writer.writerow(CSV)
        lines = [*self.entries, *(Entry(day, "", found) for day, found in self.days.items() if found.stored is not None)]
        for entry in sorted(lines, key=lambda line: line.day):
            found = entry.sum
            currency = next(iter({**found.cost.amounts, **found.training_cost.amounts}), "")
            if not entry.model:
                writer.writerow([entry.day, *[""] * (len(CSV) - 2), found.stored])
                continue
            money = [_told(one, currency) for one in (found.cost, found.saved)]
            counts = [getattr(found, name) for name in COUNTERS]
            training = [found.jobs, found.trained, f"{found.device_seconds:.3f}", _told(found.training_cost, currency)]
            writer.writerow([entry.day, entry.model, *counts, *money, currency, *training, ""])
        return out.getvalue()


async def report(
    database: Database,
    workspace_id: str | None,
    days: int,
    price_of: PriceOf,
    user_id: str | None = None,
    training: Training | None = None,
    training_price: PriceOf = lambda base: None,
) -> Report:
    """The last `days` days, today included, UTC."""
    if not 1 <= days <= MOST_DAYS:
        raise BadInput(f"days: {days} is out of range; expected a whole number from 1 to {MOST_DAYS:,}")
    last = datetime.fromtimestamp(now() / 1e6, UTC).date()
    first = last - timedelta(days=days - 1)
    span = [(first + timedelta(days=n)).isoformat() for n in range(days)]
    found = [token_days.c.day >= span[0]]
    if workspace_id is not None:
        found.append(token_days.c.workspace_id == workspace_id)
    if user_id is not None:
        found.append(token_days.c.user_id == user_id)
    sums = [func.sum(token_days.c[name]).label(name) for name in COUNTERS]
    by_day = token_days.c.day, token_days.c.model
    by_workspace = token_days.c.workspace_id, token_days.c.model
    async with database.reading() as connection:
        query = select(*by_day, *sums).where(*found).group_by(*by_day).order_by(*by_day)
        rows = (await connection.execute(query)).all()
        of_workspaces: list[Any] = []
        names: dict[str, str] = {}
        if workspace_id is None:
            query = select(*by_workspace, *sums).where(*found).group_by(*by_workspace).order_by(*by_workspace)
            of_workspaces = list((await connection.execute(query)).all())
            names = {row.id: row.name for row in await connection.execute(select(workspaces.c.id, workspaces.c.name))}
        stored, stored_now = dict[str, int](), None
        if user_id is None:
            seen = select(storage_days.c.day, func.sum(storage_days.c.used_bytes).label("used"))
            seen = seen.where(storage_days.c.day >= span[0]).group_by(storage_days.c.day)
            held = select(quotas.c.id, quotas.c.used_bytes).where(quotas.c.scope == "workspace")
            if workspace_id is not None:
                seen, held = seen.where(storage_days.c.workspace_id == workspace_id), held.where(quotas.c.id == workspace_id)
            stored = {row.day: int(row.used) for row in await connection.execute(seen)}
            held_now = {row.id: int(row.used_bytes) for row in await connection.execute(held)}
            stored_now = sum(held_now.values())
    found_entries = {(row.day, row.model): Entry(row.day, row.model, _sum(row, price_of)) for row in rows}
    jobs = await training(database, span[0], workspace_id, user_id) if training is not None else ()
    for one in jobs:
        entry = found_entries.setdefault((one.day, one.base), Entry(one.day, one.base, Sum()))
        _add(entry.sum, _sum_of_jobs(one, training_price))
    entries = tuple(found_entries[key] for key in sorted(found_entries))
    in_days = {day: Sum(stored=stored.get(day)) for day in span}
    of_models: dict[str, Sum] = {}
    total = Sum(stored=stored_now)
    for entry in entries:
        for sum_ in (in_days.setdefault(entry.day, Sum()), of_models.setdefault(entry.model, Sum()), total):
            _add(sum_, entry.sum)
    in_workspaces: dict[tuple[str, str], Sum] = {}
    if workspace_id is None:
        in_workspaces = {(id, names.get(id, "")): Sum(stored=used) for id, used in held_now.items() if id in names}
        for row in of_workspaces:
            id = row.workspace_id
            _add(in_workspaces.setdefault((id, names.get(id, "")), Sum()), _sum(row, price_of))
        for one in jobs:
            place = one.workspace_id, names.get(one.workspace_id, "")
            _add(in_workspaces.setdefault(place, Sum()), _sum_of_jobs(one, training_price))
    by_prompts = lambda item: (-item[1].prompts, item[0])
    return Report(
        workspace_id,
        first.isoformat(),
        last.isoformat(),
        entries,
        in_days,
        dict(sorted(of_models.items(), key=by_prompts)),
        dict(sorted(in_workspaces.items(), key=by_prompts)),
        total,
    )


def _sum(row: Row[Any], price_of: PriceOf) -> Sum:
    found = Sum(int(row.requests), int(row.input), int(row.cache_creation), int(row.cache_read), int(row.output))
    if (price := price_of(row.model)) is not None:
        found.cost.add(price.cost(found), price.currency)
        found.saved.add(price.saved(found.cache_read), price.currency)
    return found


def _sum_of_jobs(one: Trained, price_of: PriceOf) -> Sum:
    found = Sum(jobs=one.jobs, trained=one.tokens, device_seconds=one.device_seconds)
    price = price_of(one.base)
    if price is not None and (cost := price.trained(one.tokens, one.device_seconds)) is not None:
        found.training_cost.add(cost, price.currency)
    return found


def _add(to: Sum, more: Sum) -> None:
    for name in (*COUNTERS, "jobs", "trained", "device_seconds"):
        setattr(to, name, getattr(to, name) + getattr(more, name))
    for old, new in ((to.cost, more.cost), (to.saved, more.saved), (to.training_cost, more.training_cost)):
        for currency, amount in new.amounts.items():
            old.add(amount, currency)


def _told(money: Money, currency: str) -> str:
    return f"{money.amounts[currency]:.8f}" if currency in money.amounts else ""


def _amounts(money: Money) -> dict[str, float]:
    return {currency: round(amount, 8) for currency, amount in sorted(money.amounts.items())}
