"""From a verdict to what is served: an alias is moved when, step by step, nothing speaks against it, and back at once.

    permission   the verdict lets the candidate be shipped to where its baseline is served, or somebody says why it is all the same
    hashes       the weights on disk are those that were measured
    load         the candidate's engine and adapter are ready beside the old ones, which stay
    prefill      files that have been read for the old one are read for the new one
    replay       recorded prompts, through the path that serves, give the recorded answers again
    swap         the registry and the record of the promotion, together

A request has found out what its alias stands for before it is answered, so that each is answered by the one or by the other.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeAlias

from ropewalk.compare import promotions
from ropewalk.compare.candidates import Candidate, current_digest
from ropewalk.compare.gather import runnable
from ropewalk.compare.prefill import prefill
from ropewalk.compare.promotions import Promotion, Replay, whose
from ropewalk.compare.provenance import weights_of
from ropewalk.compare.records import Comparison, StoredVerdict, get_comparison, latest
from ropewalk.compare.replay import answered_again
from ropewalk.compare.runs import get_run
from ropewalk.database import now
from ropewalk.engine.models import Models, Target
from ropewalk.errors import BadInput, NotFound, NotShipped, Overloaded, RopewalkError
from ropewalk.files.store import Store
from ropewalk.ids import new_id
from ropewalk.registry import Registry, before
from ropewalk.tenants.audit import append
from ropewalk.tenants.caller import Caller

STEPS = ("permission", "hashes", "load", "prefill", "replay", "swap")
TRIES = 40  # of a model that is busy or still being loaded
LONGEST_REASON = 500

Progress: TypeAlias = Callable[[str, float], None]  # a step, and how much of it is done


@dataclass(frozen=True)
class Move:
    """What is to be moved, as it was found to be."""

    comparison: Comparison
    candidate_id: str  # there
    candidate: Candidate  # what was run
    verdict: StoredVerdict
    name: str  # in the registry
    alias: str
    history: tuple[str, ...]  # of the alias; () for a new one


async def ship(
    store: Store,
    models: Models,
    registry: Registry,
    caller: Caller,
    comparison_id: str,
    candidate_id: str,
    alias: str,
    *,
    override: str | None = None,
    progress: Progress | None = None,
) -> Promotion:
    """Moves the alias to the candidate; NotShipped names the step that failed, and then nothing has changed."""
    caller.needs("admin")  # an alias is everybody's, not one workspace's
    tell = progress or (lambda step, share: None)
    move = await _move(store, models, registry, caller, comparison_id, candidate_id, alias)
    with _step("permission", tell):
        reason = _reason(override)
        against = await _against(store, models, registry, caller, move)
        if against is not None and reason is None:
            raise BadInput(f"{against}; say why with an override, or compare again")
    with _step("hashes", tell):
        digest = await _unchanged(store, models, caller, move)
    with _step("load", tell):
        await _ready(models, await asyncio.to_thread(models.target, move.candidate.target))
    with _step("prefill", tell):
        names = (alias, move.history[-1]) if move.history else ()
        read = await prefill(store, models, names, move.candidate.target, lambda share: tell("prefill", share))
    with _step("replay", tell):
        replay = await answered_again(
            store, models, caller, move.comparison, move.candidate_id, move.candidate, lambda share: tell("replay", share)
        )
    with _step("swap", tell):
        if await asyncio.to_thread(_name, models, registry, move.candidate.target) != move.name:
            raise BadInput(f"'{move.candidate.target}' has come to stand for something else meanwhile")
        overridden = reason if against is not None else None
        done = await _swap(store, registry, caller, move, digest, replace(replay, files=read), overridden)
    await models.follow(alias)
    return done


async def rollback(
    store: Store,
    models: Models,
    registry: Registry,
    caller: Caller,
    alias: str,
    *,
    load: bool = True,
    progress: Progress | None = None,
) -> Promotion | None:
    """Moves the alias back to what it pointed at before -> the promotion that is taken back; None where it is none of the caller's.

    `load` False: by a process that serves nothing, where loading would make nobody's answer come sooner.
    """
    caller.needs("admin")
    tell = progress or (lambda step, share: None)
    history = registry.history(alias)
    with _step("permission", tell):
        previous = before(alias, history)
    with _step("load", tell):  # nothing to do where it has been served since
        target = _target(registry, previous)
        await models.brought(target)
        await asyncio.to_thread(weights_of, target)
        if load:
            await _ready(models, target)
    with _step("swap", tell):
        standing = await promotions.behind(store, alias, history[-1])
        try:
            async with store.database.writing() as connection:
                if standing is not None:
                    await promotions.take_back(connection, standing.id, whose(caller))
                await append(connection, caller, "alias_rolled_back", alias, detail={"from": history[-1], "to": previous})
                await asyncio.to_thread(registry.rollback, alias, history)
        except BaseException:
            await asyncio.shield(asyncio.to_thread(_put_back, registry, alias, history[:-1], history))
            raise
    if load:
        await models.follow(alias)
    mine = await promotions.list_promotions(store, caller, alias)
    return next((one for one in mine if standing is not None and one.id == standing.id), None)


async def may(
    store: Store, models: Models, registry: Registry, caller: Caller, comparison_id: str, candidate_id: str, alias: str
) -> str | None:
    """Why the rule does not permit this move, which then needs an override; None where it does."""
    caller.needs("read")
    move = await _move(store, models, registry, caller, comparison_id, candidate_id, alias)
    return await _against(store, models, registry, caller, move)


# -- the steps


@contextmanager
def _step(name: str, tell: Progress) -> Iterator[None]:
    """What fails within it says so."""
    tell(name, 0.0)
    try:
        yield
    except RopewalkError as error:
        raise NotShipped(str(error), name) from error
    tell(name, 1.0)


async def _move(
    store: Store, models: Models, registry: Registry, caller: Caller, comparison_id: str, candidate_id: str, alias: str
) -> Move:
    comparison = await get_comparison(store, caller, comparison_id)
    if candidate_id not in comparison.candidate_ids:
        raise NotFound(
            f"Candidate `{candidate_id[:128]}` is none of comparison `{comparison.id}`; "
            f"it has {', '.join(comparison.candidate_ids)}"
        )
    candidate = await runnable(store, caller, candidate_id)
    if candidate is None:
        raise BadInput("a card is words on a page: nothing was run, and there is nothing to serve")
    if candidate.kind == "remote":
        raise BadInput(
            f"'{candidate.name}' is another server's model: an alias points at what is published here; "
            "name it in the serving configuration instead"
        )
    verdicts = [one for one in await latest(store, caller, comparison_id) if one.candidate_id == candidate_id]
    if not verdicts or comparison.state != "done":
        raise BadInput(f"comparison `{comparison.id}` is {comparison.state}: there is no verdict to ship on; run it to its end")
    if not alias.strip() or alias != alias.strip() or len(alias) > 128:
        raise BadInput(f"'{alias[:128]}' is no name for an alias; expected 1 to 128 characters without spaces around them")
    name = await asyncio.to_thread(_name, models, registry, candidate.target)
    history = tuple(registry.history(alias)) if alias in registry.aliases() else ()
    if alias in {entry.name for entry in registry.entries()}:
        raise BadInput(f"'{alias}' is the name of a published model; choose another alias")
    if history and history[-1] == name:
        raise BadInput(f"alias '{alias}' points at '{name}' already")
    return Move(comparison, candidate_id, candidate, verdicts[0], name, alias, history)


async def _against(store: Store, models: Models, registry: Registry, caller: Caller, move: Move) -> str | None:
    """What the verdict does not cover."""
    verdict = move.verdict.verdict
    if not verdict.may_ship:
        if verdict.state.ships:
            return (
                f"{verdict.state} of {move.candidate.name} is not confirmed: it was chosen among several, and the prompts that "
                "were held back " + ("do not say the same" if verdict.confirmed is False else "have not been asked")
            )
        return f"the verdict on {move.candidate.name} is {verdict.state}"
    if not move.history:
        return None
    baseline = await runnable(store, caller, move.comparison.baseline_id)
    assert baseline is not None
    target = _target(registry, move.history[-1])
    await models.brought(target)
    served = await asyncio.to_thread(weights_of, target)
    if served != baseline.digest:
        return f"the verdict is against {baseline.name}, and alias '{move.alias}' serves '{move.history[-1]}'"
    return None


async def _unchanged(store: Store, models: Models, caller: Caller, move: Move) -> str:
    """The digest of what is measured and served; BadInput where these are two things."""
    digest = await current_digest(store, models, caller, move.candidate.target)
    run_id = move.comparison.item(move.candidate_id).run_id
    measured = (await get_run(store, caller, run_id)).digest if run_id else move.candidate.digest
    if not digest == measured == move.candidate.digest:
        raise BadInput(
            f"'{move.candidate.target}' is not what was measured: its weights are {digest[:12]} now and were {measured[:12]}; "
            "add it as a candidate and compare again"
        )
    return digest


async def _ready(models: Models, target: Target) -> None:
    """Loads it; what takes long to be loaded is waited for."""
    for _ in range(TRIES):
        try:
            return await models.load(target)
        except Overloaded as error:
            told = error
            await asyncio.sleep(error.retry_after)
    raise told


async def _swap(
    store: Store,
    registry: Registry,
    caller: Caller,
    move: Move,
    digest: str,
    replay: Replay,
    override: str | None,
) -> Promotion:
    promotion = Promotion(
        id=new_id("promo"),
        workspace_id=caller.workspace_id,
        alias=move.alias,
        from_name=move.history[-1] if move.history else None,
        to_name=move.name,
        to_digest=digest,
        comparison_id=move.comparison.id,
        candidate_id=move.candidate_id,
        verdict_id=move.verdict.id,
        rule_version=move.verdict.verdict.rule_version,
        by=whose(caller),
        override_reason=override,
        replay=replay,
        created_at=now(),
    )
    detail = {"from": promotion.from_name or "", "to": promotion.to_name, "promotion": promotion.id}
    try:
        async with store.database.writing() as connection:
            await promotions.write(connection, promotion)
            await append(connection, caller, "alias_shipped", move.alias, detail={**detail, "override": override is not None})
            await asyncio.to_thread(registry.ship, move.alias, move.name, move.history)
    except BaseException:
        moved = (*move.history, move.name)
        await asyncio.shield(asyncio.to_thread(_put_back, registry, move.alias, moved, move.history))
        raise
    return promotion


def _name(models: Models, registry: Registry, served: str) -> str:
    """What the registry calls a model that is served by a name, which may be an alias or one of the serving configuration."""
    target = models.target(served)
    names = [entry.name for entry in registry.entries() if _target(registry, entry.name) == target]
    if not names:
        raise BadInput(f"'{served}' is served out of a folder that is not published; `ropewalk models add` publishes it")
    return served if served in names else names[0]


def _target(registry: Registry, name: str) -> Target:
    entry = registry.resolve(name)
    if entry.base is None:
        return Target(Path(entry.path))
    return Target(Path(registry.resolve(entry.base).path), Path(entry.path))


def _put_back(registry: Registry, alias: str, moved: Sequence[str], history: Sequence[str]) -> None:
    """After a commit that failed: only what we ourselves have moved."""
    if alias in registry.aliases() and registry.history(alias) == list(moved):
        registry.restore(alias, history)


def _reason(override: str | None) -> str | None:
    if override is None:
        return None
    if not override.strip() or len(override) > LONGEST_REASON:
        raise BadInput(f"an override needs a reason of 1 to {LONGEST_REASON} characters")
    return override.strip()
