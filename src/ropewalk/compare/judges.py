"""Judges: who may judge, what they said of each pair of answers in both orders, and whether they were fit to."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from statistics import mean
from typing import Any

from sqlalchemy import delete, insert, select, update

from ropewalk.compare import judge_prompt, judging
from ropewalk.compare.asking import ask
from ropewalk.compare.candidates import Candidate, get_candidate
from ropewalk.compare.evidence import Finding, JudgeRecord, Trouble
from ropewalk.compare.judging import Judgement, Lineage, Model
from ropewalk.compare.labels import Pair, mean_labels
from ropewalk.compare.provenance import family, served
from ropewalk.compare.records import Comparison, get_comparison
from ropewalk.compare.runs import Answered, Output
from ropewalk.compare.sealing import seal, unseal
from ropewalk.compare.suites import Prompt, suite_key
from ropewalk.compare.tables import judgements as rows_of_judgements
from ropewalk.compare.tables import judges as rows_of_judges
from ropewalk.database import now
from ropewalk.engine.models import Models
from ropewalk.errors import RopewalkError, UpstreamFailed
from ropewalk.failpoints import failpoint
from ropewalk.files.store import Store
from ropewalk.ids import new_id
from ropewalk.tenants.caller import Caller

MOST = 3  # judges of one comparison: more of them share their errors


@dataclass(frozen=True)
class StoredJudge:
    """A judge of one comparison."""

    id: str
    comparison_id: str
    candidate_id: str
    family: str
    admitted: bool | None  # None: not tried yet
    calibrated: bool
    agreement: float | None
    agreement_longest: float | None
    flip_rate: float | None
    n_labels: int
    sentence: str | None
    refused_reason: str | None


@dataclass(frozen=True)
class StoredJudgement:
    """One call."""

    id: str
    prompt_id: str
    judge_id: str
    candidate_id: str
    left_output: str
    right_output: str
    order: str  # AB: the baseline's answer stood first
    score: float | None  # for the candidate
    reason: str
    tokens_in: int
    tokens_out: int
    cost: float | None
    error: str | None


@dataclass(frozen=True)
class Bench:
    """The judges of a comparison, and what they are good for."""

    judges: Sequence[StoredJudge] = ()
    judgements: Sequence[StoredJudgement] = ()
    preferences: Mapping[Pair, float] = field(default_factory=dict)  # of the judges that were admitted
    records: tuple[JudgeRecord, ...] = ()  # of those
    troubles: tuple[Trouble, ...] = ()  # of the others
    rejected: tuple[JudgeRecord, ...] = ()


# -- who may judge


async def refusal(store: Store, models: Models, caller: Caller, judge: Candidate, compared: Iterable[Candidate]) -> str | None:
    """Why this judge may not judge these candidates; None: it may. A model is known by its weights as well as by its names."""
    own = {judge.name, judge.target, *_remote_name(models, judge.target)}

    async def model(ref: str) -> Model:
        try:
            found = await served(store, models, caller, ref)
        except (RopewalkError, OSError):  # it is not served here: its name is all that is known
            return Model(judge.name if ref in own else ref, family(ref))
        same = found.digest == judge.digest or ref in own or bool(own & _remote_name(models, ref))
        return Model(judge.name if same else ref, found.family)

    for one in compared:
        same = one.digest == judge.digest or one.target in own
        lineage = Lineage(
            Model(judge.name if same else one.name, one.family),
            tuple([await model(ref) for ref in (*one.lineage.data_generator, *one.lineage.teacher)]),
            tuple([await model(ref) for ref in one.lineage.reward_model]),
        )
        if (why := judging.kinship(Model(judge.name, judge.family), [lineage])) is not None:
            return why
    return None


async def seat(
    store: Store, models: Models, caller: Caller, comparison: Comparison, compared: Sequence[Candidate]
) -> list[StoredJudge]:
    """The judges that the plan names, each with the reason for which it is refused, if it is."""
    caller.needs("write")
    found: list[dict[str, Any]] = []
    families: set[str] = set()
    for id in comparison.plan.judges:
        judge = await get_candidate(store, caller, id)
        why = await refusal(store, models, caller, judge, compared) or await _unreachable(store, models, caller, judge)
        if why is None and judge.family in families:
            why = f"{judge.name} is of the family {judge.family}, as is a judge before it; a panel is of different families"
        if why is None and len(families) >= MOST:
            why = f"{judge.name} would be one judge more than {MOST}; more of them share their errors"
        if why is None:
            families.add(judge.family)
        found.append({"candidate_id": id, "family": judge.family, "refused_reason": why, "prompt_digest": judge_prompt.DIGEST})
    known = {one.candidate_id: one for one in await judges(store, caller, comparison.id)}
    async with store.database.writing() as connection:
        for row in found:
            if row["candidate_id"] in known:
                same = rows_of_judges.c.id == known[row["candidate_id"]].id
                await connection.execute(update(rows_of_judges).where(same).values(row))
            else:
                new = {"id": new_id("judge"), "comparison_id": comparison.id, "workspace_id": caller.workspace_id}
                plain = {"calibrated": False, "n_labels": 0, "created_at": now()}
                await connection.execute(insert(rows_of_judges).values({**row, **new, **plain}))
    return await judges(store, caller, comparison.id)


async def judges(store: Store, caller: Caller, comparison_id: str) -> list[StoredJudge]:
    """The judges of a comparison, in the plan's order."""
    comparison = await get_comparison(store, caller, comparison_id)
    own = [rows_of_judges.c[field.name] for field in fields(StoredJudge)]
    async with store.database.reading() as connection:
        rows = (await connection.execute(select(*own).where(rows_of_judges.c.comparison_id == comparison_id))).all()
    place = {id: number for number, id in enumerate(comparison.plan.judges)}
    return sorted((StoredJudge(**row._mapping) for row in rows), key=lambda one: place.get(one.candidate_id, len(place)))


async def _unreachable(store: Store, models: Models, caller: Caller, judge: Candidate) -> str | None:
    try:
        if (await served(store, models, caller, judge.target)).digest != judge.digest:
            return f"{judge.name} is served with other weights than when it was added; add it again"
    except (RopewalkError, OSError) as error:  # OSError: its folder is gone
        return f"{judge.name} is not served: {error}"
    return None


# -- what they say


@dataclass(frozen=True)
class Question:
    """Two answers to one prompt, in one order, for one judge."""

    judge: StoredJudge
    target: str
    prompt: Prompt
    candidate_id: str
    old: Output
    new: Output
    order: str

    @property
    def shown(self) -> tuple[Output, Output]:
        return (self.old, self.new) if self.order == "AB" else (self.new, self.old)

    def key(self, digest: str) -> str:
        """The hash of judge, words and answers: what was judged is not asked again, in this comparison or another."""
        parts = [digest, judge_prompt.DIGEST, self.prompt.text_hash, *(one.text_hash for one in self.shown)]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


async def judge(
    store: Store,
    models: Models,
    caller: Caller,
    comparison: Comparison,
    question: Question,
    digest: str,
    key: bytes,
    cost: Callable[[Answered], float | None],
) -> StoredJudgement:
    """One judgement, asked for or found, and written down at once with what it cost."""
    wanted = question.key(digest)
    if (found := await _known(store, question, wanted, key)) is not None:
        return await _write(store, comparison, question, wanted, key, *found, None, Answered(), None)
    texts = [one.text or "" for one in question.shown]
    answered = await ask(models, caller, judge_prompt.request_for(question.target, question.prompt, *texts))
    score: float | None = None
    reason, error = "", answered.error
    if answered.text is not None:
        try:
            said = judge_prompt.read_reply(answered.text, texts)
            score = said.score if question.order == "BA" else 1 - said.score
            reason = said.text
        except UpstreamFailed as failed:
            error = str(failed)
    return await _write(store, comparison, question, wanted, key, score, reason, error, answered, cost(answered))


async def judgements(
    store: Store, caller: Caller, comparison_id: str, candidate_id: str | None = None, prompt_id: str | None = None
) -> list[StoredJudgement]:
    """What the judges of a comparison said, in the order in which they said it."""
    comparison = await get_comparison(store, caller, comparison_id)
    if comparison.suite_id is None:
        return []
    key = await suite_key(store, caller, comparison.suite_id)
    query = select(rows_of_judgements).where(rows_of_judgements.c.comparison_id == comparison_id)
    if candidate_id is not None:
        query = query.where(rows_of_judgements.c.candidate_id == candidate_id)
    if prompt_id is not None:
        query = query.where(rows_of_judgements.c.prompt_id == prompt_id)
    async with store.database.reading() as connection:
        rows = (await connection.execute(query.order_by(rows_of_judgements.c.created_at, rows_of_judgements.c.id))).all()
    return [_judgement(dict(row._mapping), _reason(key, row)) for row in rows]


# -- what they are good for


async def bench(store: Store, caller: Caller, comparison: Comparison, lengths: Mapping[Pair, tuple[int, int]]) -> Bench:
    """The judges of a comparison as they have shown themselves; lengths are of the answers, the baseline's first."""
    seated = await judges(store, caller, comparison.id)
    if not seated:
        return Bench()
    said = await judgements(store, caller, comparison.id)
    labels = await mean_labels(store, comparison)
    by_judge = {
        one.id: [
            Judgement(_name((j.candidate_id, j.prompt_id)), one.id, j.order == "BA", j.score)
            for j in said
            if j.judge_id == one.id and j.score is not None
        ]
        for one in seated
    }
    names = {_name(pair): length for pair, length in lengths.items()}
    told = {_name(pair): value for pair, value in labels.items()}
    tried = {
        one.id: judging.admission(one.id, by_judge[one.id], told, names)
        for one in seated
        if one.refused_reason is None and by_judge[one.id]
    }
    admitted = [record for record in tried.values() if record.admitted]
    found = judging.preferences([one for record in admitted for one in by_judge[record.id]])
    called = {one.id: (await get_candidate(store, caller, one.candidate_id)).name for one in seated}
    records = tuple(_called(record, called) for record in admitted)
    rejected = tuple(_called(record, called) for record in tried.values() if not record.admitted)
    troubles = [
        Trouble(one.id, Finding.LINEAGE, f"judge refused: {one.refused_reason}", not admitted)
        for one in seated
        if one.refused_reason is not None
    ]
    troubles += [Trouble(record.id, Finding.JUDGE, record.sentence, not admitted) for record in rejected]
    for one in seated:
        errors = [judgement.error for judgement in said if judgement.judge_id == one.id and judgement.error]
        if one.refused_reason is None and not by_judge[one.id] and errors:
            sentence = f"judge {called[one.id]} said nothing that counts: {errors[0]}"
            troubles.append(Trouble(one.id, Finding.JUDGE, sentence, not admitted))
    pairs = {_name(pair): pair for pair in lengths}
    preferred = {pairs[name]: score for name, score in found.items() if name in pairs}
    return Bench(seated, said, preferred, records, tuple(troubles), rejected)


async def save_admission(
    store: Store, caller: Caller, comparison: Comparison, found: Bench, lengths: Mapping[Pair, tuple[int, int]]
) -> None:
    """Writes down how the judges did."""
    caller.needs("write")
    labels = {_name(pair): value for pair, value in (await mean_labels(store, comparison)).items()}
    dummy = judging.agreement(judging.longest({_name(pair): length for pair, length in lengths.items()}), labels)
    async with store.database.writing() as connection:
        for record in (*found.records, *found.rejected):
            mine = [j for j in found.judgements if j.judge_id == record.id and j.score is not None]
            by_pair: dict[str, list[float]] = {}
            for one in mine:
                by_pair.setdefault(_name((one.candidate_id, one.prompt_id)), []).append(one.score or 0.0)
            scores = {name: mean(values) for name, values in by_pair.items() if len(values) == 2}
            used = [name for name, label in labels.items() if name in scores and label != 0.5]
            values = {
                "admitted": record.admitted,
                "calibrated": record.calibrated,
                "agreement": judging.agreement(scores, labels) if used else None,
                "agreement_longest": dummy if used else None,
                "flip_rate": record.flip_rate,
                "n_labels": len(used),
                "sentence": record.sentence,
            }
            await connection.execute(update(rows_of_judges).where(rows_of_judges.c.id == record.id).values(values))


def _name(pair: Pair) -> str:
    return "/".join(pair)


def _called(record: JudgeRecord, names: Mapping[str, str]) -> JudgeRecord:
    sentence = record.sentence.replace(record.id, names[record.id])
    return JudgeRecord(record.id, record.admitted, record.calibrated, record.flip_rate, sentence)


def _remote_name(models: Models, name: str) -> set[str]:
    """What a remote model is called where it is."""
    found = (models.serving.models or {}).get(name)
    return {found.remote.model} if found is not None and found.remote is not None and found.remote.model else set()


async def _known(store: Store, question: Question, wanted: str, key: bytes) -> tuple[float, str] | None:
    """What was said under this key before: the candidate's score, and the reason."""
    same = (rows_of_judgements.c.suite_id == question.prompt.suite_id) & (rows_of_judgements.c.key == wanted)
    query = select(rows_of_judgements).where(same, rows_of_judgements.c.error.is_(None)).limit(1)
    async with store.database.reading() as connection:
        row = (await connection.execute(query)).first()
    if row is None or row.score is None:
        return None
    score = row.score if row.order == question.order else 1 - row.score  # the two may have had each other's part
    return score, _reason(key, row)


async def _write(
    store: Store,
    comparison: Comparison,
    question: Question,
    wanted: str,
    key: bytes,
    score: float | None,
    reason: str,
    error: str | None,
    answered: Answered,
    cost: float | None,
) -> StoredJudgement:
    id = new_id("judgement")
    left, right = question.shown
    row = {
        "id": id,
        "comparison_id": comparison.id,
        "suite_id": question.prompt.suite_id,
        "prompt_id": question.prompt.id,
        "judge_id": question.judge.id,
        "candidate_id": question.candidate_id,
        "left_output": left.id,
        "right_output": right.id,
        "order": question.order,
        "score": score,
        "reason": seal(key, reason, f"judgement {id}"),
        "key": wanted,
        "tokens_in": answered.tokens_in + answered.tokens_cached,
        "tokens_out": answered.tokens_out,
        "cost": cost,
        "error": error,
        "created_at": now(),
    }
    same = [rows_of_judgements.c[name] == row[name] for name in ("comparison_id", "judge_id", "left_output", "right_output")]
    async with store.database.writing() as connection:
        await connection.execute(delete(rows_of_judgements).where(*same))  # an error that came before
        await connection.execute(insert(rows_of_judgements).values(row))
    failpoint("compare.judgement")
    return _judgement(row, reason)


def _judgement(row: Mapping[str, Any], reason: str) -> StoredJudgement:
    own = {field.name: row[field.name] for field in fields(StoredJudgement) if field.name != "reason"}
    return StoredJudgement(**own, reason=reason)


def _reason(key: bytes, row: Any) -> str:
    return unseal(key, row.reason, f"judgement {row.id}") if row.reason is not None else ""
