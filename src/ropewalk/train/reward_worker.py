"""A process that computes rewards, so that no function of a user's can stop, crash or change the trainer."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping, Sequence
from typing import Any

from ropewalk.errors import BadInput, Overloaded, RateLimited, RopewalkError, SandboxFailed, UpstreamFailed
from ropewalk.train.reward_builtins import RewardSpec, build
from ropewalk.train.reward_functions import AT_ONCE, Form, RewardFunction, Sample, Score, arguments, read_values
from ropewalk.train.worker_child import Answer, serve, told


def main() -> None:
    """The process."""
    with asyncio.Runner() as runner:
        serve(lambda specs: load(specs, runner))


def load(specs: Mapping[int, RewardSpec], runner: asyncio.Runner) -> tuple[dict[int, Form], Answer]:
    """The forms of some rewards, and what computes them."""
    functions = {number: loaded(spec) for number, spec in specs.items()}

    def answer(asked: tuple[int, Sequence[Sample]]) -> list[Score]:
        number, samples = asked
        return scored(specs[number], functions[number], samples, runner)

    return {number: function.form for number, function in functions.items()}, answer


def loaded(spec: RewardSpec) -> RewardFunction:
    """The function of a reward; whatever is wrong with a user's module is told."""
    try:
        return build(spec)
    except RopewalkError:
        raise
    except BaseException as error:
        raise BadInput(f"reward '{spec.name}' cannot be loaded:\n{told(error)}") from None


def scored(spec: RewardSpec, function: RewardFunction, samples: Sequence[Sample], runner: asyncio.Runner) -> list[Score]:
    """One call, or one for each sample of an asynchronous function; whatever goes wrong is a score with an error."""
    if function.form.asynchronous and not function.form.batch:
        return runner.run(_side_by_side(spec, function, samples))
    begun = time.perf_counter()
    try:
        returned = function.call(**arguments(function.form, samples))
        if function.form.asynchronous:
            returned = runner.run(_within(spec.seconds, returned))
        values = read_values(spec.name, function.form, returned, len(samples))
        return [Score(value, seconds=time.perf_counter() - begun) for value in values]
    except (Exception, SystemExit) as error:
        return [failed(spec, error, time.perf_counter() - begun)] * len(samples)


async def _side_by_side(spec: RewardSpec, function: RewardFunction, samples: Sequence[Sample]) -> list[Score]:
    turn = asyncio.Semaphore(AT_ONCE)

    async def one(sample: Sample) -> Score:
        async with turn:
            begun = time.perf_counter()
            try:
                returned = await _within(spec.seconds, function.call(**arguments(function.form, [sample])))
                (value,) = read_values(spec.name, function.form, returned, 1)
                return Score(value, seconds=time.perf_counter() - begun)
            except (Exception, SystemExit) as error:
                return failed(spec, error, time.perf_counter() - begun)

    return await asyncio.gather(*map(one, samples))


async def _within(seconds: float, awaited: Any) -> Any:
    return await asyncio.wait_for(awaited, seconds)


def failed(spec: RewardSpec, error: BaseException, seconds: float) -> Score:
    """The score of a call that raised: 0, or nothing where the sample is not to blame."""
    blameless = isinstance(error, (UpstreamFailed, Overloaded, RateLimited)) or (
        isinstance(error, SandboxFailed) and error.reason == "killed"
    )
    if isinstance(error, TimeoutError) and seconds >= spec.seconds:
        late = f"reward '{spec.name}' took longer than {spec.seconds:g} seconds"
        return Score(None if spec.kind == "judge" else 0.0, late, seconds)  # a judge's silence says nothing of an answer
    own = isinstance(error, (BadInput, UpstreamFailed, Overloaded, RateLimited))
    said = str(error) if own else f"reward '{spec.name}' raised:\n{told(error)}"
    return Score(None if blameless else 0.0, said, seconds)


if __name__ == "__main__":
    main()
