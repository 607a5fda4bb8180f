"""The verb `workspaces usage`: what questions and trainings cost, as a table, JSON or CSV."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Literal

from ropewalk.database import Database
from ropewalk.errors import BadInput
from ropewalk.tenants.commands import Place
from ropewalk.tenants.keys import check_user_id
from ropewalk.tenants.token_report import PriceOf, Report, Sum, Training, report
from ropewalk.tenants.workspaces import find_workspace
from ropewalk.vault import Vault

HEADS = ("requests", "prompt tokens", "not read again", "written", "cost", "saved")
JOB_HEADS = ("jobs", "trained tokens", "device seconds", "cost of jobs")  # where there was one


def show_usage(
    place: Place,
    workspace: str | None,
    user: str | None,
    days: int,
    price_of: PriceOf,
    form: Literal["text", "json", "csv"],
    training: Training | None = None,
    training_price: PriceOf = lambda base: None,
) -> int:
    """Prints what a workspace, one of its users, or all together asked and trained in the last days."""
    if user is not None:
        if workspace is None:
            raise BadInput("--user: a user is one of a workspace; name the workspace as well")
        check_user_id(user)

    async def work(database: Database, _: Vault) -> Report:
        id = None
        if workspace is not None:
            async with database.reading() as connection:
                id = (await find_workspace(connection, workspace)).id
        return await report(database, id, days, price_of, user, training, training_price)

    found = place.run(work)
    if form == "json":
        print(json.dumps(found.as_dict()))
    elif form == "csv":
        print(found.as_csv(), end="")
    else:
        print(_text(found))
    return 0


def _text(found: Report) -> str:
    jobs = found.total.jobs > 0
    tables = [
        _table(f"{found.first} to {found.last}", [one for one in found.days.items() if _busy(one[1])], jobs),
        _table("model", found.models.items(), jobs),
        _table("workspace", [(name or id, sums) for (id, name), sums in found.workspaces.items() if _busy(sums)], jobs),
        _table("together", [("", found.total)], jobs),
    ]
    return "\n\n".join(filter(None, tables))


def _busy(sums: Sum) -> bool:
    return sums.requests > 0 or sums.jobs > 0


def _table(head: str, found: Iterable[tuple[str, Sum]], jobs: bool) -> str:
    rows = [(name, (*_cells(sums), *(_job_cells(sums) if jobs else ()))) for name, sums in found]
    if not rows:
        return ""
    heads = (*HEADS, *(JOB_HEADS if jobs else ()))
    lines = [(head, heads), *rows]
    first = max(len(name) for name, _ in lines)
    widths = [max(len(cells[i]) for _, cells in lines) for i in range(len(heads))]
    return "\n".join(
        f"{name:<{first}}  " + "  ".join(f"{cell:>{width}}" for cell, width in zip(cells, widths, strict=True))
        for name, cells in lines
    )


def _job_cells(sums: Sum) -> tuple[str, ...]:
    return f"{sums.jobs:,}", f"{sums.trained:,}", f"{sums.device_seconds:,.0f}", str(sums.training_cost) or "-"


def _cells(sums: Sum) -> tuple[str, ...]:
    found = f"{sums.cache_read:,} ({100 * sums.share:.0f}%)"
    return f"{sums.requests:,}", f"{sums.prompts:,}", found, f"{sums.output:,}", str(sums.cost) or "-", str(sums.saved) or "-"
