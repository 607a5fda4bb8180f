"""Runs and their outputs: what each candidate answered to each prompt, how long it took, and what the checks said; written at once."""

from __future__ import annotations

import asyncio
import hashlib
import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal

from sqlalchemy import ColumnElement, delete, insert, select, update
from sqlalchemy.ext.asyncio import AsyncConnection

from ropewalk.checks import CheckOutcome
from ropewalk.compare.candidates import Candidate
from ropewalk.compare.records import Comparison
from ropewalk.compare.sealing import keyed_hash, seal, unseal
from ropewalk.compare.suites import Prompt, suite_key
from ropewalk.compare.tables import candidates, runs
from ropewalk.compare.tables import check_results as results
from ropewalk.compare.tables import outputs as rows_of_outputs
from ropewalk.database import now
from ropewalk.errors import NotFound
from ropewalk.failpoints import failpoint
from ropewalk.files.store import Store
from ropewalk.ids import new_id
from ropewalk.tenants.caller import Caller

State = Literal["new", "running", "done", "failed"]
AT_ONCE = 500  # ids in one question to the database


@dataclass(frozen=True)
class Run:
    """One candidate on one suite. Times are microseconds."""

    id: str
    workspace_id: str
    candidate_id: str
    suite_id: str
    params: Mapping[str, Any]  # sampling, samples, at_once; stopped: why not all was asked; since: when it came to this machine
    seed: int | None
    path: str
    digest: str  # of the candidate as it ran
    fingerprint_id: str | None
    state: State
    error: str | None
    created_at: int
    started_at: int | None
    finished_at: int | None

    @property
    def stopped(self) -> str | None:
        """Why it ended before all was asked, where that was intended: a certain verdict, or a budget."""
        return self.params.get("stopped")


@dataclass(frozen=True)
class CheckResult:
    """What one check said of one answer."""

    number: int  # of the check among the prompt's, from 0
    kind: str
    guardrail: bool
    passed: bool
    detail: str


@dataclass(frozen=True)
class Output:
    """One answer, or the error that came in its place."""

    id: str
    run_id: str
    prompt_id: str
    sample: int
    key: str
    text: str | None
    finish: str | None
    tokens_in: int
    tokens_cached: int
    tokens_out: int
    ttft_ms: float | None
    total_ms: float | None
    retries: int
    error: str | None
    cached_from: str | None  # the output that this one repeats; its times are that one's
    created_at: int
    text_hash: str | None = None
    checks: tuple[CheckResult, ...] = ()

    @property
    def answered(self) -> bool:
        """Whether it counts: an answer came, or the candidate cannot answer this prompt at all. What is not answered is asked again."""
        return self.error is None or self.refused

    @property
    def refused(self) -> bool:
        """Whether the prompt itself is what could not be answered, such as one that is longer than the model's context."""
        return self.error is not None and self.error.startswith(REFUSED)

    @property
    def passed(self) -> bool | None:
        """Whether all checks passed; None where there is none."""
        if self.refused:
            return False
        return all(check.passed for check in self.checks) if self.checks else None


REFUSED = "cannot be answered: "  # begins the error of a prompt that this candidate will never answer


@dataclass(frozen=True)
class Answered:
    """What came of asking once, retries included."""

    text: str | None = None
    finish: str | None = None
    tokens_in: int = 0
    tokens_cached: int = 0
    tokens_out: int = 0
    ttft_ms: float | None = None
    total_ms: float | None = None
    retries: int = 0
    error: str | None = None
    outcomes: Sequence[tuple[int, str, bool, CheckOutcome]] = field(default_factory=tuple)  # number, kind, guardrail, outcome


OWN = [column for column in runs.c if column.name in {field.name for field in fields(Run)}]


def output_key(candidate: Candidate, digest: str, prompt: Prompt, sampling: Mapping[str, Any], sample: int) -> str:
    """What is asked, of whom, how: an answer under this key is not asked for again, in this comparison or another."""
    parts = [digest, candidate.template_digest, prompt.id, prompt.text_hash, sampling, sample]
    if sampling.get("temperature", 0.0) > 0:  # one drawn by chance is its candidate's own, also where two are the same bytes
        parts.append(candidate.id)
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


async def start_run(
    store: Store, caller: Caller, candidate: Candidate, suite_id: str, params: Mapping[str, Any], seed: int | None, digest: str
) -> Run:
    """A run that is yet to ask."""
    caller.needs("write")
    run = Run(
        new_id("run"), caller.workspace_id, candidate.id, suite_id, params, seed, "serving", digest, None, "new", None, now(), None, None
    )  # fmt: skip
    async with store.database.writing() as connection:
        await connection.execute(insert(runs).values({**vars(run), "params": json.dumps(params)}))
    return run


async def set_run_state(
    store: Store,
    caller: Caller,
    run: Run,
    state: State,
    error: str | None = None,
    *,
    fingerprint_id: str | None = None,
    stopped: str | None = None,
) -> Run:
    """How far a run is."""
    caller.needs("write")
    params = {key: value for key, value in run.params.items() if key != "stopped"} | ({"stopped": stopped} if stopped else {})
    values: dict[str, Any] = {"state": state, "error": error, "params": json.dumps(params)}
    if fingerprint_id is not None:
        values["fingerprint_id"] = fingerprint_id
        if run.fingerprint_id not in (None, fingerprint_id):  # it goes on elsewhere: earlier times were not taken here
            values["params"] = json.dumps({**params, "since": now()})
    values |= {"started_at": run.started_at or now()} if state == "running" else {"finished_at": now()}
    async with store.database.writing() as connection:
        await connection.execute(update(runs).where(runs.c.id == run.id, visible(caller)).values(values))
    return await get_run(store, caller, run.id)


async def get_run(store: Store, caller: Caller, id: str) -> Run:
    """One run; NotFound also for another's."""
    caller.needs("read")
    async with store.database.reading() as connection:
        row = (await connection.execute(select(*OWN).where(runs.c.id == id[:128], visible(caller)))).first()
    if row is None:
        raise NotFound(f"Run `{id[:128]}` not found.")
    return Run(**{**row._mapping, "params": json.loads(row.params)})


async def runs_of(store: Store, caller: Caller, comparison: Comparison) -> dict[str, Run]:
    """The runs of a comparison, by candidate, as far as they were begun."""
    return {
        item.candidate_id: await get_run(store, caller, item.run_id) for item in comparison.items if item.run_id is not None
    }


# -- outputs


async def add_output(
    store: Store, caller: Caller, run: Run, key: bytes, prompt_id: str, sample: int, output_key: str, answered: Answered
) -> Output:
    """Writes down what came, sealed, with what the checks said; an error that stood there makes way, and its tries are counted on."""
    caller.needs("write")
    id = new_id("out")
    row = {
        "id": id,
        "run_id": run.id,
        "suite_id": run.suite_id,
        "prompt_id": prompt_id,
        "sample": sample,
        "key": output_key,
        "content": seal(key, answered.text, f"output {id}") if answered.text is not None else None,
        "text_hash": keyed_hash(key, answered.text) if answered.text is not None else None,
        "retries": answered.retries,
        "created_at": now(),
    }
    copied = ("finish", "tokens_in", "tokens_cached", "tokens_out", "ttft_ms", "total_ms", "error")
    row |= {name: getattr(answered, name) for name in copied}
    checks = [
        CheckResult(number, kind, guardrail, outcome.passed, outcome.detail)
        for number, kind, guardrail, outcome in answered.outcomes
    ]
    async with store.database.writing() as connection:
        row["retries"] = await _put(connection, row, _sealed(key, id, checks))
    failpoint("compare.output")
    return _output(row, answered.text, checks)


async def reuse(store: Store, caller: Caller, run: Run, key: bytes, wanted: Mapping[str, tuple[str, int]]) -> list[Output]:
    """Answers that other runs have under these keys, written down for this one too; wanted are (prompt, sample) by key."""
    caller.needs("write")
    made: list[Output] = []
    for some in portions(list(wanted)):
        same = (rows_of_outputs.c.suite_id == run.suite_id) & rows_of_outputs.c.key.in_(some)
        good = rows_of_outputs.c.error.is_(None) & (rows_of_outputs.c.run_id != run.id)
        found = await _read(store, caller, run.suite_id, same & good)
        oldest = {one.key: one for one in sorted(found, key=lambda one: one.created_at, reverse=True)}
        copies = []
        for one in oldest.values():
            prompt_id, sample = wanted[one.key]
            id, source = new_id("out"), one.cached_from or one.id
            own: dict[str, Any] = {"id": id, "run_id": run.id, "prompt_id": prompt_id, "sample": sample, "cached_from": source}
            copies.append(replace(one, **own, retries=0, created_at=now()))
        async with store.database.writing() as connection:
            for copy in copies:
                content = seal(key, copy.text, f"output {copy.id}") if copy.text is not None else None
                row = {name: value for name, value in vars(copy).items() if name not in ("text", "checks")}
                await _put(
                    connection, {**row, "suite_id": run.suite_id, "content": content}, _sealed(key, copy.id, copy.checks)
                )
        made += copies
    return made


async def outputs(store: Store, caller: Caller, run_id: str, prompt_ids: Collection[str] | None = None) -> list[Output]:
    """A run's outputs by prompt and sample."""
    run = await get_run(store, caller, run_id)
    if prompt_ids is None:
        return await _read(store, caller, run.suite_id, rows_of_outputs.c.run_id == run.id)
    found: list[Output] = []
    for some in portions(list(prompt_ids)):
        where = (rows_of_outputs.c.run_id == run.id) & rows_of_outputs.c.prompt_id.in_(some)
        found += await _read(store, caller, run.suite_id, where)
    return found


async def output(store: Store, caller: Caller, output_id: str) -> Output:
    """One output; NotFound also for another's."""
    caller.needs("read")
    missing = NotFound(f"Output `{output_id[:128]}` not found.")
    query = select(rows_of_outputs.c.suite_id).join(runs, runs.c.id == rows_of_outputs.c.run_id)
    async with store.database.reading() as connection:
        row = (await connection.execute(query.where(rows_of_outputs.c.id == output_id[:128], visible(caller)))).first()
    if row is None:
        raise missing
    return (await _read(store, caller, row.suite_id, rows_of_outputs.c.id == output_id))[0]


async def prompt_outputs(store: Store, caller: Caller, comparison: Comparison, prompt_id: str) -> dict[str, Output]:
    """What each candidate of a comparison answered to one prompt, the first time."""
    found = {}
    for candidate_id, run in (await runs_of(store, caller, comparison)).items():
        for one in await outputs(store, caller, run.id, [prompt_id]):
            if one.sample == 0:
                found[candidate_id] = one
    return found


async def origins(store: Store, ids: Sequence[str]) -> dict[str, tuple[str | None, int]]:
    """Where answers were taken that others repeat: the machine's fingerprint, and how many were asked side by side."""
    found = {}
    for some in portions(ids):
        query = select(rows_of_outputs.c.id, runs.c.fingerprint_id, runs.c.params)
        query = query.join(runs, runs.c.id == rows_of_outputs.c.run_id).where(rows_of_outputs.c.id.in_(some))
        async with store.database.reading() as connection:
            for row in await connection.execute(query):
                found[row.id] = row.fingerprint_id, int(json.loads(row.params).get("at_once", 1))
    return found


def visible(caller: Caller) -> ColumnElement[bool]:
    """Runs of the caller's workspace, and of its user's candidates if it stands for one."""
    mine = runs.c.workspace_id == caller.workspace_id
    if caller.user_id is None:
        return mine
    return mine & runs.c.candidate_id.in_(select(candidates.c.id).where(candidates.c.user_id == caller.user_id))


def portions(ids: Sequence[str]) -> Iterator[Sequence[str]]:
    """So many ids as one statement may hold."""
    for begin in range(0, len(ids), AT_ONCE):
        yield ids[begin : begin + AT_ONCE]


async def _put(connection: AsyncConnection, row: Mapping[str, Any], checks: Sequence[Mapping[str, Any]]) -> int:
    """Writes an output in the place of an error; how often it was tried by now."""
    place = [rows_of_outputs.c[name] == row[name] for name in ("run_id", "prompt_id", "sample")]
    earlier = (await connection.execute(select(rows_of_outputs.c.retries).where(*place))).scalar()
    retries = int(row["retries"]) + (0 if earlier is None else int(earlier) + 1)
    if earlier is not None:
        await connection.execute(delete(rows_of_outputs).where(*place))
    await connection.execute(insert(rows_of_outputs).values({**row, "retries": retries}))
    if checks:
        await connection.execute(insert(results), list(checks))
    return retries


async def _read(store: Store, caller: Caller, suite_id: str, where: ColumnElement[bool]) -> list[Output]:
    key = await suite_key(store, caller, suite_id)
    order = rows_of_outputs.c.prompt_id, rows_of_outputs.c.sample
    async with store.database.reading() as connection:
        rows = (await connection.execute(select(rows_of_outputs).where(where).order_by(*order))).all()
        told: dict[str, list[Any]] = {}
        for some in portions([row.id for row in rows]):
            query = select(results).where(results.c.output_id.in_(some)).order_by(results.c.number)
            for result in await connection.execute(query):
                told.setdefault(result.output_id, []).append(result)

    def read() -> list[Output]:
        return [
            _output(dict(row._mapping), _opened(key, row), [_check(key, result) for result in told.get(row.id, [])])
            for row in rows
        ]

    return await asyncio.to_thread(read)


def _output(row: Mapping[str, Any], text: str | None, checks: Sequence[CheckResult]) -> Output:
    own: dict[str, Any] = {field.name: row.get(field.name) for field in fields(Output) if field.name not in ("text", "checks")}
    return replace(Output(**{**own, "text": text}), checks=tuple(sorted(checks, key=lambda check: check.number)))


def _opened(key: bytes, row: Any) -> str | None:
    return unseal(key, row.content, f"output {row.id}") if row.content is not None else None


def _sealed(key: bytes, output_id: str, checks: Sequence[CheckResult]) -> list[dict[str, Any]]:
    return [
        {**vars(one), "output_id": output_id, "detail": seal(key, one.detail, f"check {output_id}/{one.number}")}
        for one in checks
    ]


def _check(key: bytes, row: Any) -> CheckResult:
    detail = unseal(key, row.detail, f"check {row.output_id}/{row.number}")
    return CheckResult(row.number, row.kind, row.guardrail, row.passed, detail)
