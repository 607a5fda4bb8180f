"""What a reward is: one Python function of a user's, found by its name, and how it wants to be called.

    def shortness(completion: str, **row) -> float                     one sample at a time
    def right(completions, answer, **columns) -> list[float | None]     a batch, each column a list; TRL's and Axolotl's form

Both may be `async`. A name among the parameters is a column of the data; None says that the reward does not apply to a sample.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ropewalk.errors import BadInput
from ropewalk.train.user_code import load_named

Message = Mapping[str, Any]
SHOWN = 80  # characters of a value in a message
AT_ONCE = 16  # samples of an asynchronous reward that are computed side by side


@dataclass(frozen=True)
class Sample:
    """One completion and the row that it answers.  rollouts -> rewards"""

    completion: str
    prompt: str | Sequence[Message] = ""
    row: Mapping[str, Any] = field(default_factory=dict)
    completion_ids: tuple[int, ...] = ()


@dataclass(frozen=True)
class Score:
    """What one reward says of one sample; None: nothing.  rewards -> trainer"""

    value: float | None
    error: str = ""  # what went wrong, with the traceback where it was the function's own
    seconds: float = 0.0  # of the call; a batch shares one


@dataclass(frozen=True)
class Form:
    """How a function wants to be called."""

    batch: bool
    asynchronous: bool
    required: tuple[str, ...] = ()  # columns that it cannot do without
    optional: tuple[str, ...] = ()
    rest: bool = False  # whether it takes whatever else there is

    def columns(self, row: Iterable[str]) -> list[str]:
        """The columns of a row that it is given."""
        named = {*self.required, *self.optional}
        return [name for name in row if name not in _OF_BOTH and (self.rest or name in named)]


@dataclass(frozen=True)
class RewardFunction:
    """A function and its form."""

    call: Callable[..., Any]
    form: Form


_SAMPLE, _BATCH = ("completion", "prompt", "completion_ids"), ("completions", "prompts", "completion_ids")
_OF_BOTH = frozenset({*_SAMPLE, *_BATCH})


def load_function(name: str, folders: Sequence[str] = ()) -> RewardFunction:
    """The function that `module.function` or `path/to/file.py:function` names; runs the user's module."""
    call = load_named(name, folders, kind="reward", noun="function")
    if not callable(call):
        raise BadInput(f"reward '{name}' is {_shown(call)}; expected a function")
    return RewardFunction(call, form_of(call, name))


def form_of(call: Callable[..., Any], name: str) -> Form:
    """How a function wants to be called, from its signature."""
    try:
        parameters = inspect.signature(call).parameters.values()
    except (TypeError, ValueError):
        raise BadInput(f"reward '{name}': its parameters cannot be read; wrap it in a function of Python") from None
    names = [parameter.name for parameter in parameters]
    batch = "completions" in names
    if batch == ("completion" in names):
        both = "both 'completion' and 'completions'" if batch else f"({', '.join(names) or 'nothing'})"
        raise BadInput(
            f"reward '{name}' takes {both}; expected 'completion', for one sample at a time, or 'completions', for a batch"
        )
    own, other = (_BATCH, _SAMPLE) if batch else (_SAMPLE, _BATCH)
    if mixed := [word for word in names if word in other and word not in own]:
        raise BadInput(f"reward '{name}' takes '{own[0]}' and '{mixed[0]}', which belong to different forms")
    if bare := [one.name for one in parameters if one.kind is one.POSITIONAL_ONLY]:
        raise BadInput(f"reward '{name}': '{bare[0]}' can be given by place only; remove the '/', arguments come by name")
    columns = [one for one in parameters if one.kind in (one.POSITIONAL_OR_KEYWORD, one.KEYWORD_ONLY)]
    asked = [(one.name, one.default is one.empty) for one in columns if one.name not in own]
    return Form(
        batch=batch,
        asynchronous=inspect.iscoroutinefunction(call) or inspect.iscoroutinefunction(type(call).__call__),
        required=tuple(column for column, needed in asked if needed),
        optional=(
            *(column for column, needed in asked if not needed),
            *(one.name for one in columns if one.name in own),
        ),
        rest=any(one.kind is one.VAR_KEYWORD for one in parameters),
    )


def check_columns(name: str, form: Form, columns: Iterable[str]) -> None:
    """Raises for a column that a reward asks for and the data does not have."""
    known = list(columns)
    if missing := [column for column in form.required if column not in known]:
        raise BadInput(
            f"reward '{name}' asks for '{missing[0]}', which is no column of the data; it has {', '.join(known) or 'none'}; "
            "give the parameter a default, or take **row"
        )


def arguments(form: Form, samples: Sequence[Sample]) -> dict[str, Any]:
    """The keyword arguments of one call: a sample's own values, or a batch's lists."""
    if not form.batch:
        (sample,) = samples
        own: dict[str, Any] = {
            "completion": sample.completion,
            "prompt": sample.prompt,
            "completion_ids": list(sample.completion_ids),
        }
        return _taken(form, own) | {name: sample.row[name] for name in form.columns(sample.row)}
    own = {
        # Where prompts are messages, completions are too: what reward functions written for TRL and Axolotl read.
        "completions": [one.completion if isinstance(one.prompt, str) else [_reply(one)] for one in samples],
        "prompts": [one.prompt for one in samples],
        "completion_ids": [list(one.completion_ids) for one in samples],
    }
    names = form.columns(dict.fromkeys(name for one in samples for name in one.row))
    return _taken(form, own) | {name: [one.row.get(name) for one in samples] for name in names}


def read_values(name: str, form: Form, returned: Any, count: int) -> list[float | None]:
    """The numbers that a call returned, one for each sample."""
    if not form.batch:
        return [_number(name, returned)]
    if hasattr(returned, "tolist"):  # of NumPy or torch
        returned = returned.tolist()
    if not isinstance(returned, (list, tuple)):
        raise BadInput(
            f"reward '{name}' returned {_shown(returned)}; expected a list of {count} numbers, one for each completion"
        )
    if len(returned) != count:
        raise BadInput(f"reward '{name}' returned {len(returned)} values for {count} completions; expected one for each")
    return [_number(name, value) for value in returned]


def _taken(form: Form, own: Mapping[str, Any]) -> dict[str, Any]:
    first = "completions" if form.batch else "completion"
    return {key: value for key, value in own.items() if key == first or form.rest or key in form.optional}


def _reply(sample: Sample) -> dict[str, str]:
    return {"role": "assistant", "content": sample.completion}


def _number(name: str, value: Any) -> float | None:
    if value is None:
        return None
    if callable(getattr(value, "item", None)):  # of NumPy or torch
        value = value.item()
    if not isinstance(value, (int, float)) or not math.isfinite(value):
        raise BadInput(f"reward '{name}' returned {_shown(value)}; expected a finite number, or None where it does not apply")
    return float(value)


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= SHOWN else f"{text[: SHOWN - 1]}…"
