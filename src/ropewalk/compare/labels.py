"""Labels: people's preferences between two answers, that judges are held against."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import mean

from sqlalchemy import insert, select

from ropewalk.compare.records import Comparison, get_comparison
from ropewalk.compare.runs import portions
from ropewalk.compare.tables import labels as rows_of_labels
from ropewalk.compare.tables import outputs
from ropewalk.database import now
from ropewalk.errors import BadInput, NotFound
from ropewalk.files.store import Store
from ropewalk.ids import new_id
from ropewalk.tenants.caller import Caller

Pair = tuple[str, str]  # candidate, prompt


async def add_labels(
    store: Store, caller: Caller, comparison_id: str, found: Sequence[tuple[str, str, float]], source: str = "file"
) -> int:
    """People's preferences that judges are held against: (prompt, candidate, value), 1 where the candidate's answer is better."""
    caller.needs("write")
    comparison = await get_comparison(store, caller, comparison_id)
    runs = {item.candidate_id: item.run_id for item in comparison.items}
    ids = {id for _, id, _ in found} | {comparison.baseline_id}
    if wrong := [id for id in ids if id not in runs]:
        raise BadInput(f"'{wrong[0][:128]}' is no candidate of this comparison")
    if wrong_values := [value for _, _, value in found if value not in (0, 0.5, 1)]:
        raise BadInput(f"a label of {wrong_values[0]}; expected 1 (better), 0.5 (the same) or 0 (worse)")
    rows = []
    async with store.database.writing() as connection:
        answers: dict[tuple[str, str], str] = {}
        for some in portions(list({prompt for prompt, _, _ in found})):
            mine = outputs.c.run_id.in_([run for run in runs.values() if run]) & outputs.c.prompt_id.in_(some)
            query = select(outputs.c.id, outputs.c.run_id, outputs.c.prompt_id).where(mine, outputs.c.sample == 0)
            answers |= {(row.run_id, row.prompt_id): row.id for row in await connection.execute(query)}
        for prompt, candidate, value in found:
            pair = [answers.get((runs[id] or "", prompt)) for id in (comparison.baseline_id, candidate)]
            if pair[0] is None or pair[1] is None:
                raise NotFound(f"Prompt `{prompt[:128]}` has no answers of both; run the comparison first.")
            rows.append(
                {
                    "id": new_id("label"),
                    "comparison_id": comparison.id,
                    "suite_id": comparison.suite_id,
                    "prompt_id": prompt,
                    "left_output": pair[0],
                    "right_output": pair[1],
                    "value": float(value),
                    "source": source,
                    "created_at": now(),
                }
            )
        if rows:
            await connection.execute(insert(rows_of_labels), rows)
    return len(rows)


async def mean_labels(store: Store, comparison: Comparison) -> dict[Pair, float]:
    """The mean label of each pair, for the candidate."""
    runs = {item.run_id: item.candidate_id for item in comparison.items if item.run_id}
    found: dict[Pair, list[float]] = {}
    async with store.database.reading() as connection:
        rows = (await connection.execute(select(rows_of_labels).where(rows_of_labels.c.comparison_id == comparison.id))).all()
        whose: dict[str, str] = {}
        for some in portions([id for row in rows for id in (row.left_output, row.right_output)]):
            query = select(outputs.c.id, outputs.c.run_id).where(outputs.c.id.in_(some))
            whose |= {row.id: runs.get(row.run_id, "") for row in await connection.execute(query)}
    for row in rows:
        left, right = whose.get(row.left_output), whose.get(row.right_output)
        if left == comparison.baseline_id and right:
            found.setdefault((right, row.prompt_id), []).append(row.value)
        elif right == comparison.baseline_id and left:
            found.setdefault((left, row.prompt_id), []).append(1 - row.value)
    return {pair: mean(values) for pair, values in found.items()}
