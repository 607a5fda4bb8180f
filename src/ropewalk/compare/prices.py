"""What answers cost: price rows with their days, per token for a remote, per hour for this machine."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Literal, TypeAlias, get_args

from sqlalchemy import delete, insert, select

from ropewalk.compare.tables import prices as rows
from ropewalk.database import now
from ropewalk.engine.models import Models
from ropewalk.errors import BadInput
from ropewalk.files.store import Store
from ropewalk.ids import new_id
from ropewalk.tenants.caller import Caller
from ropewalk.tenants.prices import MILLION, is_day

Unit: TypeAlias = Literal["input token", "cached token", "output token", "hour"]
MACHINE = ""  # the target of an hour of this machine
HOUR = 3_600_000.0  # milliseconds


@dataclass(frozen=True)
class PriceRow:
    """What one unit costs, from a day on; of tokens, a single one."""

    id: str
    target: str  # a served name, or '' for this machine
    unit: Unit
    usd: float
    valid_from: str  # UTC, as 2026-11-22
    source: str


@dataclass(frozen=True)
class Tariff:
    """The prices of one target on one day; None where nobody said."""

    input: float | None = None
    cached: float | None = None
    output: float | None = None
    hour: float | None = None
    as_of: str = ""
    source: str = ""

    @property
    def known(self) -> bool:
        return self.hour is not None or self.by_token

    @property
    def by_token(self) -> bool:
        return self.input is not None and self.output is not None

    def cost(self, tokens_in: int, tokens_cached: int, tokens_out: int, machine_ms: float) -> float:
        """In US dollars. Tokens are paid where they have a price; else the machine's time is."""
        if self.input is not None and self.output is not None:
            cached = self.input if self.cached is None else self.cached
            return tokens_in * self.input + tokens_cached * cached + tokens_out * self.output
        assert self.hour is not None, "a tariff that is not known costs nothing that could be told"
        return machine_ms / HOUR * self.hour


async def set_price(
    store: Store, caller: Caller, target: str, unit: Unit, usd: float, valid_from: str, source: str
) -> PriceRow:
    """Says what a unit costs from a day on; another price for the same day takes its place."""
    caller.needs("write")
    if unit not in get_args(Unit):
        raise BadInput(f"'{unit}' is no unit of a price; expected {', '.join(get_args(Unit))}")
    if not (math.isfinite(usd) and usd >= 0):
        raise BadInput(f"a price of {usd} US dollars; expected 0 or more")
    if not is_day(valid_from):
        raise BadInput(f"'{valid_from[:40]}' is no day; expected one such as 2026-11-22")
    if (target == MACHINE) != (unit == "hour"):
        raise BadInput("an hour is of this machine, whose name is '', and tokens are of a served model")
    row = PriceRow(new_id("price"), target[:256], unit, float(usd), valid_from, source.strip()[:200])
    same = (rows.c.workspace_id == caller.workspace_id) & (rows.c.target == row.target) & (rows.c.unit == unit)
    async with store.database.writing() as connection:
        await connection.execute(delete(rows).where(same, rows.c.valid_from == valid_from))
        await connection.execute(insert(rows).values(**vars(row), workspace_id=caller.workspace_id, created_at=now()))
    return row


async def prices(store: Store, caller: Caller) -> list[PriceRow]:
    """Every price of the workspace, by target, unit and day."""
    caller.needs("read")
    query = select(rows).where(rows.c.workspace_id == caller.workspace_id)
    async with store.database.reading() as connection:
        found = (await connection.execute(query.order_by(rows.c.target, rows.c.unit, rows.c.valid_from))).all()
    return [PriceRow(row.id, row.target, row.unit, row.usd, row.valid_from, row.source) for row in found]


async def tariff(store: Store, models: Models, caller: Caller, target: str, *, remote: bool, day: str = "") -> Tariff:
    """What this target costs on a day: by the rows of the workspace, else by the file that says what is served."""
    valid = await prices(store, caller)
    day = day or datetime.now(UTC).date().isoformat()
    found = {unit: _last(valid, target, unit, day) for unit in ("input token", "cached token", "output token")}
    first, cached, last = found.values()
    if first is not None and last is not None:
        return Tariff(first.usd, cached.usd if cached else None, last.usd, None, first.valid_from, first.source)
    served = (models.serving.models or {}).get(target)
    listed = served.price if served is not None else None
    if listed is not None and listed.currency == "USD" and (listed.input or listed.output):
        own = listed.input / MILLION, listed.cache_read / MILLION, listed.output / MILLION
        return Tariff(*own, None, listed.as_of, "the file that says what is served")
    hour = None if remote else _last(valid, MACHINE, "hour", day)
    return Tariff(hour=hour.usd, as_of=hour.valid_from, source=hour.source) if hour is not None else Tariff()


def _last(valid: Sequence[PriceRow], target: str, unit: str, day: str) -> PriceRow | None:
    """The price that holds on a day."""
    held = [row for row in valid if row.target == target and row.unit == unit and row.valid_from <= day]
    return max(held, key=lambda row: row.valid_from, default=None)
