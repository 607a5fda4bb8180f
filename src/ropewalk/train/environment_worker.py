"""A process that holds environments, one object for each of its episodes, so that none can stop, crash or change the trainer."""

from __future__ import annotations

import asyncio
import inspect
import json
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from ropewalk.chat.messages import Tool
from ropewalk.errors import BadInput, RopewalkError
from ropewalk.train.environment import Failed, Step
from ropewalk.train.environment_tools import Toolbox
from ropewalk.train.reward_functions import Message
from ropewalk.train.user_code import load_named
from ropewalk.train.worker_child import Answer, serve, told

Asked = tuple[Literal["reset", "step", "call", "close"], int, Any]  # what, of which episode, with which row, reply or calls


@dataclass(frozen=True)
class EnvironmentSpec:
    """The environment of a run, as a worker process is told of it."""

    name: str  # module.Class or path/to/file.py:Class
    folders: tuple[str, ...] = ()
    seconds: float = 10.0  # that one call may take


class Environments:
    """The objects of a class, by episode."""

    def __init__(self, kind: Any, toolbox: Toolbox, runner: asyncio.Runner) -> None:
        self.kind, self.toolbox, self.runner = kind, toolbox, runner
        self.living: dict[int, Any] = {}

    def answer(self, asked: Asked) -> Sequence[Message] | Step | Sequence[str] | Failed | None:
        """What an episode's environment answers; whatever goes wrong is a failure with its traceback."""
        what, episode, given = asked
        try:
            if what == "reset":
                self.living[episode] = self.kind()
                return messages_of(self._call(self.living[episode].reset, given), "reset")
            if what == "step":
                return step_of(self._call(self.living[episode].step, given))
            if what == "call":
                return [self.toolbox.call(self.living[episode], call, self._call) for call in given]
        except (Exception, SystemExit) as error:
            return Failed(str(error) if isinstance(error, BadInput) else told(error))
        self._close(self.living.pop(episode, None))
        return None

    def _close(self, env: Any) -> None:
        try:
            if hasattr(env, "close"):
                self._call(env.close)
        except (Exception, SystemExit) as error:  # the episode is over, and nobody asks for more
            print(told(error), file=sys.stderr)

    def _call(self, method: Any, *given: Any, **named: Any) -> Any:
        answer = method(*given, **named)
        return self.runner.run(answer) if inspect.iscoroutine(answer) else answer


def messages_of(said: Any, method: str) -> list[Message]:
    """Messages as plain data: what a template reads, and what can be sent."""
    if not isinstance(said, list | tuple) or not all(
        isinstance(one, Mapping) and isinstance(one.get("role"), str) for one in said
    ):
        raise BadInput(f"{method} gave {_shown(said)}; expected a list of messages, each with 'role' and 'content'")
    if method == "reset" and not said:
        raise BadInput("reset gave no message; expected at least one, for the model to answer")
    try:
        plain: list[Message] = json.loads(json.dumps([dict(one) for one in said]))
    except (TypeError, ValueError) as error:
        raise BadInput(f"{method} gave {_shown(said)}; expected messages of plain data: {error}") from None
    return plain


def step_of(said: Any) -> Step:
    """What `step` returned, a Step or a tuple of its parts, as plain data."""
    if isinstance(said, tuple) and len(said) == 3:
        said = Step(*said)
    if not isinstance(said, Step):
        raise BadInput(f"step gave {_shown(said)}; expected Step(messages, reward, done)")
    reward = said.reward.item() if callable(getattr(said.reward, "item", None)) else said.reward  # type: ignore[attr-defined]
    if not isinstance(reward, int | float) or not math.isfinite(reward):
        raise BadInput(f"step gave the reward {_shown(reward)}; expected a finite number")
    messages, done = messages_of(said.messages, "step"), bool(said.done)
    if not messages and not done:
        raise BadInput("step gave no message and is not done; expected a message for the model to answer, or done=True")
    return Step(messages, float(reward), done)


def load(spec: EnvironmentSpec, runner: asyncio.Runner) -> tuple[tuple[Tool, ...], Answer]:
    """The tools of a run's environment, and what answers for it; whatever is wrong with a user's module is told."""
    try:
        kind = load_named(spec.name, spec.folders, kind="environment", noun="Class")
    except RopewalkError:
        raise
    except BaseException as error:
        raise BadInput(f"environment '{spec.name}' cannot be loaded:\n{told(error)}") from None
    if not inspect.isclass(kind):
        raise BadInput(f"environment '{spec.name}' is {_shown(kind)}; expected a class")
    if missing := [name for name in ("reset", "step") if not callable(getattr(kind, name, None))]:
        raise BadInput(f"environment '{spec.name}' has no method '{missing[0]}'; expected reset(row) and step(reply)")
    toolbox = Toolbox(spec.name, kind)
    return toolbox.tools, Environments(kind, toolbox, runner).answer


def main() -> None:
    """The process."""
    with asyncio.Runner() as runner:
        serve(lambda spec: load(spec, runner))


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:79]}…"


if __name__ == "__main__":
    main()
