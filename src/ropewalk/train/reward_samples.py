"""Completions to try rewards on: of one turn, or of several with the run's environment; or given in a file. No torch."""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import Callable, Coroutine, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any, TypeVar

from ropewalk.chat.template import Template
from ropewalk.config.run import Run
from ropewalk.engine.request import Sampling
from ropewalk.errors import BadInput, DataError
from ropewalk.train.environment import Episode
from ropewalk.train.environment_pool import environment_of
from ropewalk.train.episodes import Episodes
from ropewalk.train.prompts import Prompt, some_prompts
from ropewalk.train.questions import Question
from ropewalk.train.reward_functions import Sample
from ropewalk.train.reward_writer import Writer, writing

AT_ONCE = 8  # prompts

Found = TypeVar("Found")
Groups = list[list[Sample]]  # the completions of each prompt


@dataclass(frozen=True)
class Played:
    """What an environment said of the episodes, in the order of the samples."""

    name: str
    rewards: list[float]  # NaN: it failed, and nobody knows what the episode was worth
    errors: list[str]  # of those that failed
    replies: float  # of an episode, on average


def sampled(run: Run, base: Path, template: Template, count: int) -> tuple[Groups, Played | None]:
    """Completions of some prompts of the run's data, and what its environment says of them where it has one."""
    return asyncio.run(_sampled(run, base, template, some_prompts(run, count)))


def given(path: Path) -> Groups:
    """The rows of a JSONL file, each with the column `completions`, a list, or `completion`."""
    groups: Groups = []
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"cannot be read: {error}", path=path) from None
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise DataError(f"malformed JSON: {error}", path=path, line=number) from None
        found = row.get("completions", [row["completion"]] if "completion" in row else None) if isinstance(row, dict) else None
        if not isinstance(found, list) or not found or not all(isinstance(text, str) for text in found):
            raise DataError(
                "expected an object with 'completions', a list of texts, beside the columns of the row", path=path, line=number
            )
        asked = row.get("prompt", row.get("messages", ""))
        rest = {key: value for key, value in row.items() if key not in ("completion", "completions")}
        groups.append([Sample(text, asked, rest) for text in found])
    if not groups:
        raise DataError("holds no completion", path=path)
    return groups


async def _sampled(run: Run, base: Path, template: Template, prompts: Sequence[Prompt]) -> tuple[Groups, Played | None]:
    spec = environment_of(run)
    async with writing(run, base, at_once=AT_ONCE) as writer:
        if spec is None:
            return await _some_at_once(prompts, lambda number, prompt: _group(writer, run, template, prompt, number)), None
        with Episodes(run, spec, template) as host:
            played = await _some_at_once(prompts, lambda number, prompt: _episodes(writer, run, host, prompt, number))
    groups = [
        [Sample("\n".join(e.replies), prompt.asked, prompt.row, tuple(e.ids[e.prompt :])) for e in group]
        for prompt, group in zip(prompts, played)
    ]
    every = [episode for group in played for episode in group]
    return groups, Played(
        spec.name.replace(":", ".").rpartition(".")[2],
        [math.nan if episode.end == "failed" else episode.reward for episode in every],
        [episode.error for episode in every if episode.error],
        sum(len(episode.replies) for episode in every) / len(every),
    )


async def _some_at_once(
    prompts: Sequence[Prompt], work: Callable[[int, Prompt], Coroutine[Any, Any, list[Found]]]
) -> list[list[Found]]:
    turn = asyncio.Semaphore(AT_ONCE)

    async def one(number: int, prompt: Prompt) -> list[Found]:
        async with turn:
            return await work(number, prompt)

    return list(await asyncio.gather(*(one(number, prompt) for number, prompt in enumerate(prompts))))


async def _group(writer: Writer, run: Run, template: Template, prompt: Prompt, number: int) -> list[Sample]:
    trl = run.trl
    assert trl is not None
    ids = prompt.ids(template)
    if not ids:
        raise BadInput(f"{prompt.path}:{prompt.line}: the prompt is empty")
    found = await writer(ids, trl.num_generations, trl.max_completion_length, _sampling(run, number), template.stop_ids)
    return [Sample(template.decode(one.ids), prompt.asked, prompt.row, tuple(one.ids)) for one in found]


async def _episodes(writer: Writer, run: Run, host: Episodes, prompt: Prompt, number: int) -> list[Episode]:
    trl = run.trl
    assert trl is not None

    async def episode(sample: int) -> Episode:
        """One to its end; what its environment answers is bounded by the limits of that one's process."""
        playing, given, turn = host.play(Question(prompt, ())), None, 0
        while True:
            try:
                asked: Any = playing.send(given)
            except StopIteration as stopped:
                found: Episode = stopped.value
                return found
            if isinstance(asked, Future):
                given = await asyncio.wrap_future(asked)
                continue
            most = min(trl.max_completion_length, host.room(asked))
            (given,) = await writer(asked, 1, most, _sampling(run, number, sample, turn), host.stop_ids)
            turn += 1

    return list(await asyncio.gather(*map(episode, range(trl.num_generations))))


def _sampling(run: Run, *place: int) -> Sampling:
    trl = run.trl
    assert trl is not None
    return Sampling(trl.temperature, trl.top_p, trl.top_k, trl.min_p, Random(f"{run.seed} {place}").getrandbits(62))
