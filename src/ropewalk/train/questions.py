"""The prompts of a run, as ids, those to learn from and those to be examined on. No torch."""

from __future__ import annotations

import math
import random
from collections.abc import Iterable
from dataclasses import dataclass

from ropewalk.chat.template import Template
from ropewalk.config.run import Run
from ropewalk.errors import ConfigError, DataError
from ropewalk.train.prompts import Prompt, prompts


@dataclass(frozen=True)
class Question:
    """A prompt that the model can go on from."""

    prompt: Prompt
    ids: tuple[int, ...]


@dataclass(frozen=True)
class Questions:
    """What a run by rewards trains and is examined on."""

    train: tuple[Question, ...]
    evaluation: tuple[Question, ...]
    notices: tuple[str, ...] = ()
    bad: tuple[()] = ()  # a row without a prompt ends the run instead of being skipped


def open_questions(run: Run, template: Template) -> Questions:
    """Reads the prompts of the run's data and leaves out those after which no completion would fit."""
    assert run.trl is not None
    room = run.sequence_len - run.trl.max_completion_length
    if room < 1:
        raise ConfigError(
            f"{run.where('sequence_len')}sequence_len {run.sequence_len} leaves no room for a prompt beside "
            f"trl.max_completion_length {run.trl.max_completion_length}; raise the one or lower the other"
        )
    train, long = _read(prompts(run), template, room)
    tested = run.model_copy(update={"datasets": run.test_datasets})
    evaluation, more = _read(prompts(tested), template, room) if run.test_datasets else ([], 0)
    if not train:
        raise DataError(
            f"no prompt is left to train on: {f'{long} are longer than {room} tokens' if long else 'the data is empty'}"
        )
    if run.val_set_size and not run.test_datasets:
        train, evaluation = _set_aside(train, run)
    notices = [f"{len(train)} prompts to learn from" + (f", {len(evaluation)} to be examined on" if evaluation else "")]
    if long + more:
        notices.append(
            f"left out: {long + more} prompts of more than {room} tokens, beside which no completion of "
            f"{run.trl.max_completion_length} fits in sequence_len {run.sequence_len}"
        )
    return Questions(tuple(train), tuple(evaluation), tuple(notices))


def groups_of(run: Run, processes: int = 1) -> int:
    """Prompts of an optimizer step, over all processes."""
    assert run.trl is not None
    completions = run.trl.generation_batch_size or run.micro_batch_size * run.accumulation * processes
    return math.ceil(completions / run.trl.num_generations)


def _read(found: Iterable[Prompt], template: Template, room: int) -> tuple[list[Question], int]:
    kept, long = list[Question](), 0
    for prompt in found:
        ids = tuple(prompt.ids(template))
        if not ids:
            raise DataError("the prompt is empty", path=prompt.path, line=prompt.line)
        if len(ids) > room:
            long += 1
        else:
            kept.append(Question(prompt, ids))
    return kept, long


def _set_aside(found: list[Question], run: Run) -> tuple[list[Question], list[Question]]:
    """By the seed; prompts of equal ids stay on one side, so that none is trained on and examined too."""
    asked = run.val_set_size
    held = round(asked * len(found)) if asked < 1 else int(asked)
    if not 0 < held < len(found):
        raise ConfigError(
            f"val_set_size: {asked:g} of {len(found)} prompts leaves {'nothing to train on' if held else 'none'}; change it"
        )
    order = sorted({question.ids for question in found})
    random.Random(run.seed).shuffle(order)
    chosen = set[tuple[int, ...]]()
    left = held
    counts: dict[tuple[int, ...], int] = {}
    for question in found:
        counts[question.ids] = counts.get(question.ids, 0) + 1
    for ids in order:
        if left <= 0:
            break
        chosen.add(ids)
        left -= counts[ids]
    return [q for q in found if q.ids not in chosen], [q for q in found if q.ids in chosen]
