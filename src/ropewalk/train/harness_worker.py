"""A process that runs harnesses: code of a user's that asks the model under training itself, many rollouts side by side.

    async def rollout(client, row) -> reward                  or a class, or an object, with such a method

`client` is an openai.AsyncOpenAI whose key is that of the rollout alone; what is asked by it becomes the episode.
"""

from __future__ import annotations

import asyncio
import inspect
import math
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ropewalk.errors import BadInput, RopewalkError
from ropewalk.train.environment import Failed, Outcome
from ropewalk.train.user_code import load_named
from ropewalk.train.worker_child import Answer, serve_side_by_side, told

if TYPE_CHECKING:
    from openai import AsyncOpenAI

Rollout = Callable[[Any, dict[str, Any]], Awaitable[Any]]


@dataclass(frozen=True)
class HarnessSpec:
    """The harness of a run, as a worker process is told of it."""

    name: str  # module.function or path/to/file.py:function
    folders: tuple[str, ...] = ()
    seconds: float = 600.0  # that one rollout may take


@dataclass(frozen=True)
class AskedRollout:
    """One rollout to be run.  pool -> worker"""

    row: Mapping[str, Any]
    url: str
    key: str


def load(spec: HarnessSpec) -> tuple[None, Answer]:
    """What answers for a run's harness; whatever is wrong with a user's module is told."""
    try:
        found = load_named(spec.name, spec.folders, kind="harness", noun="function")
        rollout = _rollout(spec.name, found() if inspect.isclass(found) else found)
    except RopewalkError:
        raise
    except BaseException as error:
        raise BadInput(f"harness '{spec.name}' cannot be loaded:\n{told(error)}") from None
    try:
        import openai  # noqa: F401  (here, so that its absence is told before anything is written)
    except ModuleNotFoundError:
        raise BadInput("trl.harness needs the package openai; pip install 'ropewalk[harness]'") from None

    async def answer(asked: AskedRollout) -> Outcome | Failed:
        limit = asyncio.timeout(spec.seconds)
        try:
            async with limit, client_of(asked) as client:
                return outcome_of(await rollout(client, dict(asked.row)))
        except (Exception, SystemExit, asyncio.CancelledError) as error:
            if limit.expired():
                return Failed(f"harness '{spec.name}' took longer than {spec.seconds:g} seconds")
            return Failed(str(error) if isinstance(error, BadInput) else told(error))

    return None, answer


def client_of(asked: AskedRollout) -> AsyncOpenAI:
    """A client of one rollout's own, which ends with it; the rollout's limit of time is the only one."""
    from openai import AsyncOpenAI, DefaultAsyncHttpxClient

    # Plain HTTP on this machine: there is no certificate to look at, and no proxy in between.
    http = DefaultAsyncHttpxClient(verify=False, trust_env=False, timeout=None)
    return AsyncOpenAI(base_url=asked.url, api_key=asked.key, max_retries=0, timeout=None, http_client=http)


def outcome_of(said: Any) -> Outcome:
    """What a rollout returned, a number or a mapping with `reward` and further numbers, as plain data."""
    if not isinstance(said, Mapping):
        return Outcome(_number("the reward", said))
    if "reward" not in said:
        raise BadInput(f"rollout gave {_shown(dict(said))}; expected a number, or a mapping with 'reward'")
    metrics = {str(name): _number(f"'{name}'", value) for name, value in said.items() if name != "reward"}
    return Outcome(_number("the reward", said["reward"]), metrics)


def _rollout(name: str, found: Any) -> Rollout:
    rollout: Rollout = getattr(found, "rollout", found)
    if not inspect.iscoroutinefunction(rollout):
        raise BadInput(
            f"harness '{name}' is {_shown(found)}; expected `async def rollout(client, row)`, or a class or an object with that method"
        )
    return rollout


def _number(what: str, value: Any) -> float:
    found = value.item() if callable(getattr(value, "item", None)) else value
    if not isinstance(found, int | float) or not math.isfinite(found):
        raise BadInput(f"rollout gave {what} as {_shown(found)}; expected a finite number")
    return float(found)


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:79]}…"


def main() -> None:
    """The process."""
    serve_side_by_side(load)


if __name__ == "__main__":
    main()
