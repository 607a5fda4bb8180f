"""A process that computes rewards, so that no function of a user's can stop, crash or change the trainer.

Asked and answered one call at a time over the socket that it is started with. reward_pool.py keeps the time.
"""

from __future__ import annotations

import asyncio
import os
import sys
import time
import traceback
from collections.abc import Sequence
from multiprocessing.connection import Connection
from typing import Any

from ropewalk import confinement
from ropewalk.errors import BadInput, Overloaded, RateLimited, RopewalkError, SandboxFailed, UpstreamFailed
from ropewalk.train.reward_builtins import RewardSpec, build
from ropewalk.train.reward_functions import AT_ONCE, RewardFunction, Sample, Score, arguments, read_values

TOLD = 4000  # characters of a traceback


def main() -> None:
    """The process."""
    socket, parent = (int(word) for word in sys.argv[1:])
    confinement.die_with_parent(parent)
    os.dup2(2, 1)  # what a function prints must not mix with what a command prints
    connection: Connection[Any, Any] = Connection(socket)
    specs: Sequence[RewardSpec] = connection.recv()
    functions: dict[int, RewardFunction] = {}
    for number, spec in enumerate(specs):
        try:
            functions[number] = build(spec)
        except RopewalkError as error:
            connection.send(("unusable", str(error)))
            return
        except BaseException as error:
            connection.send(("unusable", f"reward '{spec.name}' cannot be loaded:\n{told(error)}"))
            return
    connection.send(("ready", [functions[number].form for number in range(len(specs))]))
    with asyncio.Runner() as runner:
        while True:
            try:
                task, number, samples = connection.recv()
            except EOFError:  # whoever asks has gone
                return
            connection.send((task, scored(specs[number], functions[number], samples, runner)))


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
        return Score(0.0, f"reward '{spec.name}' took longer than {spec.seconds:g} seconds", seconds)
    own = isinstance(error, (BadInput, UpstreamFailed, Overloaded, RateLimited))
    said = str(error) if own else f"reward '{spec.name}' raised:\n{told(error)}"
    return Score(None if blameless else 0.0, said, seconds)


def told(error: BaseException) -> str:
    """The traceback, without the frames of this file."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None and trace.tb_frame.f_code.co_filename == __file__:
        trace = trace.tb_next
    return "".join(traceback.format_exception(type(error), error, trace)).strip()[-TOLD:]


if __name__ == "__main__":
    main()
