"""What `ropewalk compare price` does: what answers cost, said and listed."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from datetime import UTC, datetime

from ropewalk.compare.commands import Desk, Place
from ropewalk.compare.prices import MACHINE, PriceRow, Unit, prices, set_price
from ropewalk.errors import BadInput
from ropewalk.tenants.prices import MILLION


def price(place: Place, target: str | None, given: Mapping[Unit, float], day: str | None, source: str, as_json: bool) -> int:
    """Keeps what is given, US dollars per million tokens or per hour of this machine; lists everything where nothing is."""
    if target is not None and not given:
        raise BadInput(f"no price is given for '{target}'; expected --input and --output, per million tokens")
    if target is None and any(unit != "hour" for unit in given):
        raise BadInput("tokens are of a served model: name it before the prices; --hour alone is of this machine")

    async def work(desk: Desk) -> list[PriceRow]:
        first = day or datetime.now(UTC).date().isoformat()
        for unit, usd in given.items():
            each = usd if unit == "hour" else usd / MILLION
            await set_price(desk.store, desk.caller, target or MACHINE, unit, each, first, source)
        return await prices(desk.store, desk.caller)

    for row in place.run(work):
        print(json.dumps(asdict(row)) if as_json else _line(row))
    return 0


def _line(row: PriceRow) -> str:
    per, usd = ("hour", row.usd) if row.unit == "hour" else (f"million {row.unit}s", row.usd * MILLION)
    return f"{row.target or 'this machine'}: {usd:g} USD per {per} from {row.valid_from}" + (
        f" ({row.source})" if row.source else ""
    )
