"""What a run measured: latency, tokens, memory, and what a passing answer costs, each with an interval where there are readings."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sqlalchemy import insert, select

from ropewalk.compare.evidence import Measured, Metric
from ropewalk.compare.prices import Tariff
from ropewalk.compare.runs import Output, Run
from ropewalk.compare.tables import measurements as rows
from ropewalk.compare.tables import runs
from ropewalk.database import now
from ropewalk.files.store import Store
from ropewalk.ids import new_id
from ropewalk.tenants.caller import Caller

RESAMPLES, SEED = 500, 7  # of the bootstrap: the same readings always give the same interval
PASS_RATE = "pass rate"
FIRST_TOKEN = "time to first token"


@dataclass(frozen=True)
class Figure:
    """One measured number."""

    metric: str
    measured: Measured
    n: int  # readings
    unit: str
    detail: Mapping[str, Any]


@dataclass(frozen=True)
class StoredMeasurement:
    """A figure as it was written down."""

    id: str
    run_id: str | None
    candidate_id: str
    metric: str
    value: float
    low: float | None
    high: float | None
    n: int
    unit: str
    concurrency: int
    fingerprint_id: str
    detail: Mapping[str, Any]
    created_at: int

    @property
    def measured(self) -> Measured:
        return Measured(self.value, self.low, self.high)


def figures(outputs: Sequence[Output], tariff: Tariff, at_once: int, peak_bytes: int | None) -> list[Figure]:
    """All figures of one run's outputs; what nothing was read for is left out."""
    came = [one for one in outputs if one.error is None]
    found: list[Figure] = []
    for name, values in (
        ("latency", [one.total_ms for one in came if one.total_ms is not None]),
        (FIRST_TOKEN, [one.ttft_ms for one in came if one.ttft_ms is not None]),
    ):
        for percent in (50, 95):
            if values:
                metric = str(Metric.LATENCY) if (name, percent) == ("latency", 95) else f"p{percent} {name}"
                found.append(Figure(metric, percentile(values, percent), len(values), "ms", {}))
    for name, total in (
        ("tokens in", sum(one.tokens_in for one in came)),
        ("tokens cached", sum(one.tokens_cached for one in came)),
        ("tokens out", sum(one.tokens_out for one in came)),
        ("errors", sum(one.error is not None for one in outputs)),
        ("retries", sum(one.retries for one in outputs)),
    ):
        found.append(Figure(name, Measured(float(total)), len(outputs), "", {}))
    checked = [one for one in outputs if one.passed is not None]
    if checked:
        passed = sum(bool(one.passed) for one in checked)
        found.append(Figure(PASS_RATE, wilson(passed, len(checked)), len(checked), "share", {}))
    if peak_bytes is not None:
        found.append(Figure(str(Metric.MEMORY), Measured(peak_bytes / 1e6), 1, "MB", {}))
    cost = cost_per_pass(outputs, tariff, at_once)
    return [*found, cost] if cost is not None else found


def costs(outputs: Sequence[Output], tariff: Tariff, at_once: int) -> tuple[list[float], str]:
    """What each output cost, tries that came to nothing included, and in what: US dollars, or else seconds of this machine.

    Of the time in which several were answered side by side, each is charged its share.
    """

    def once(one: Output) -> float:
        machine_ms = (one.total_ms or 0.0) / at_once
        if not tariff.known:
            return machine_ms / 1000
        return tariff.cost(one.tokens_in, one.tokens_cached, one.tokens_out, machine_ms)

    return [once(one) * (1 + one.retries) for one in outputs], "USD" if tariff.known else "s of this machine"


def cost_per_pass(outputs: Sequence[Output], tariff: Tariff, at_once: int) -> Figure | None:
    """The headline: what was paid, over the answers that pass; None where none does. Without checks every answer passes that came."""
    checked = [one for one in outputs if one.passed is not None]
    counted = checked or list(outputs)
    if not tariff.by_token:  # an answer whose time was taken elsewhere has no price here
        counted = [one for one in counted if one.total_ms is not None]
    if not counted:
        return None
    paid, unit = costs(counted, tariff, at_once)
    passes = np.array([one.passed if checked else one.error is None for one in counted], dtype=float)
    if not passes.sum():
        return None
    money = np.array(paid)
    picks = _picks(len(counted))
    won = passes[picks].sum(axis=1)
    ratios = money[picks].sum(axis=1)[won > 0] / won[won > 0]
    low, high = (float(np.quantile(ratios, q)) for q in (0.025, 0.975))
    value = float(money.sum() / passes.sum())
    detail = {"passing": int(passes.sum()), "total": float(money.sum()), "as_of": tariff.as_of, "source": tariff.source}
    return Figure(str(Metric.COST), Measured(value, min(low, value), max(high, value)), len(counted), unit, detail)


def percentile(values: Sequence[float], percent: float) -> Measured:
    """A percentile with its bootstrap interval."""
    table = np.array(values)
    value = float(np.percentile(table, percent))
    if len(table) < 2:
        return Measured(value)
    drawn = np.percentile(table[_picks(len(table))], percent, axis=1)
    low, high = (float(np.quantile(drawn, q)) for q in (0.025, 0.975))
    return Measured(value, min(low, value), max(high, value))


def wilson(passed: int, n: int, z: float = 1.959964) -> Measured:
    """A share with Wilson's interval."""
    share = passed / n
    centre, spread = share + z * z / (2 * n), z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    return Measured(share, max(0.0, (centre - spread) / (1 + z * z / n)), min(1.0, (centre + spread) / (1 + z * z / n)))


def _picks(n: int) -> NDArray[np.int_]:
    most = max(50, min(RESAMPLES, 20_000_000 // n))  # so that a large suite takes no gigabytes
    return np.random.default_rng(SEED).integers(0, n, (most, n))


# -- written down


async def save(
    store: Store, caller: Caller, run: Run, found: Sequence[Figure], at_once: int, fingerprint_id: str
) -> list[StoredMeasurement]:
    """Writes figures down beside earlier ones: a claim may have been tested by those."""
    caller.needs("write")
    moment = now()
    stored = [
        StoredMeasurement(
            new_id("meas"), run.id, run.candidate_id, one.metric, one.measured.value, one.measured.low, one.measured.high,
            one.n, one.unit, at_once, fingerprint_id, one.detail, moment,
        )
        for one in found
    ]  # fmt: skip
    values = [{**vars(one), "detail": json.dumps(one.detail), "workspace_id": caller.workspace_id} for one in stored]
    if values:
        async with store.database.writing() as connection:
            await connection.execute(insert(rows), values)
    return stored


async def measurements(store: Store, caller: Caller, run_id: str) -> list[StoredMeasurement]:
    """The latest figure of each metric of a run."""
    caller.needs("read")
    own = [rows.c[field.name] for field in fields(StoredMeasurement)]
    query = select(*own).join(runs, runs.c.id == rows.c.run_id).where(rows.c.run_id == run_id)
    query = query.where(rows.c.workspace_id == caller.workspace_id).order_by(rows.c.created_at, rows.c.id)
    async with store.database.reading() as connection:
        found = (await connection.execute(query)).all()
    latest = {row.metric: StoredMeasurement(**{**row._mapping, "detail": json.loads(row.detail)}) for row in found}
    return list(latest.values())
