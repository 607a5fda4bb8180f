"""Rewards that need no code, named by their kind, and how an entry of `trl.reward_funcs` becomes one.

exact contains regex numeric choice length schema code     the checks of checks.py: 1 where it passes, else 0
format        the completion is <think>...</think> <answer>...</answer>, or other tags, and nothing else
repetition    from 0 down to -1: the share of word n-grams that stood before
judge         another model gives a mark (reward_judge.py)
model         a reward model gives a number (reward_model.py)
process_model a process reward model judges every step (reward_process_model.py)
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ropewalk import checks
from ropewalk.errors import BadInput
from ropewalk.train.reward_functions import Form, RewardFunction, load_function

SECONDS = 10.0  # of one call, where nothing else is said
JUDGE_SECONDS = 120.0
MODEL_SECONDS = 120.0
REFERENCES = ("reference", "answer", "solution")  # columns that hold what is expected, in this order
CHECKED = tuple(kind for kind in checks.KINDS if kind != "judge")
_COMMON = ("kind", "function", "name", "weight", "limit")
_OF_CHECKS = ("reference", "after", "reference_after", "from_row")
_KEYS: Mapping[str, tuple[str, ...]] = {
    "format": ("tags", "partial"),
    "repetition": ("n",),
    "judge": ("url", "model", "api", "key_env", "rubric", "least", "most", "cache"),
    "model": ("path", "base", "device"),
    "process_model": ("path", "base", "device", "separator", "over", "plain"),
}
KINDS = (*CHECKED, *_KEYS)
_NEEDED: Mapping[str, tuple[str, ...]] = {"judge": ("url", "model"), "model": ("path",), "process_model": ("path",)}
_OVER = ("min", "mean", "last", "product")


@dataclass(frozen=True)
class RewardSpec:
    """One reward, as a worker process is told of it."""

    name: str
    kind: str  # of KINDS, or 'function'
    params: Mapping[str, Any] = field(default_factory=dict)
    weight: float = 1.0
    seconds: float = SECONDS  # that one call may take

    @property
    def alone(self) -> bool:
        """Whether it has a worker process of its own: what it holds is held once."""
        return self.kind in _NEEDED


def read_spec(entry: str | Mapping[str, Any], folders: Sequence[str] = (), seconds: float = SECONDS) -> RewardSpec:
    """The reward that an entry means: the name of a function, of a kind, of a reward model, or a mapping with more."""
    if isinstance(entry, str):
        if entry in KINDS:
            entry = {"kind": entry}
        elif "/" in entry and ":" not in entry and not entry.endswith(".py"):
            entry = {"kind": "model", "path": entry}
        else:
            entry = {"function": entry}
    own = {key: value for key, value in entry.items() if key not in _COMMON}
    if ("kind" in entry) == ("function" in entry):
        raise BadInput(f"{dict(entry)!r} is no reward; expected one with 'kind' ({', '.join(KINDS)}) or with 'function'")
    weight, limit = entry.get("weight", 1.0), entry.get("limit")
    for key, value in (("weight", weight), ("limit", 1.0 if limit is None else limit)):
        if isinstance(value, bool) or not isinstance(value, (int, float)) or (key == "limit" and value <= 0):
            raise BadInput(f"{key} is {value!r}; expected a number{' of seconds above 0' if key == 'limit' else ''}")
    if "function" in entry:
        function = str(entry["function"])
        if "." not in function and ":" not in function:
            raise BadInput(
                f"'{function}' is no kind of reward; {_near(function, KINDS)}expected {', '.join(KINDS)}, or module.function"
            )
        if own:
            raise BadInput(f"'{next(iter(own))}' cannot be given to a function; it takes what the row holds")
        name = str(entry.get("name", re.split(r"[.:]", function)[-1]))
        return RewardSpec(name, "function", {"function": function, "folders": tuple(folders)}, weight, limit or seconds)
    kind = str(entry["kind"])
    if kind not in KINDS:
        raise BadInput(f"'{kind}' is no kind of reward; {_near(kind, KINDS)}expected {', '.join(KINDS)}, or module.function")
    spec = RewardSpec(str(entry.get("name", kind)), kind, own, weight, limit or _limit(kind, own, seconds))
    if kind in _KEYS:
        if unknown := [key for key in own if key not in _KEYS[kind]]:
            known = _KEYS[kind]
            raise BadInput(
                f"a reward of kind '{kind}' has no '{unknown[0]}'; {_near(unknown[0], known)}it takes {', '.join(known)}"
            )
    else:
        _check_of(spec, {})
    if kind not in _NEEDED:
        build(spec)
    elif missing := [key for key in _NEEDED[kind] if not isinstance(own.get(key), str)]:
        raise BadInput(f"a reward of kind '{kind}' needs '{missing[0]}', a text")
    if kind == "process_model":
        _check_steps(own)
    return spec


def _check_steps(params: Mapping[str, Any]) -> None:
    if params.get("over", "min") not in _OVER:
        raise BadInput(f"over is {params['over']!r}; expected {', '.join(_OVER)}: how the steps' values are taken together")
    if not isinstance(params.get("separator", ""), str):
        raise BadInput(f"separator is {params['separator']!r}; expected the text that ends a step")
    if not isinstance(params.get("plain", False), bool):
        raise BadInput(f"plain is {params['plain']!r}; expected true or false: whether messages are read as plain text")


def build(spec: RewardSpec) -> RewardFunction:
    """The function itself; for one of a user's, their module is run."""
    if spec.kind == "function":
        return load_function(spec.params["function"], spec.params["folders"])
    if spec.kind == "judge":
        from ropewalk.train.reward_judge import judge  # takes HTTP's library

        return RewardFunction(judge(spec.params), Form(batch=False, asynchronous=True, optional=("prompt",), rest=True))
    if spec.kind == "model":
        from ropewalk.train.reward_model import reward_model  # takes torch

        return RewardFunction(reward_model(spec.params), Form(batch=True, asynchronous=False, optional=("prompts",)))
    if spec.kind == "process_model":
        from ropewalk.train.reward_process_model import process_reward_model  # takes torch

        return RewardFunction(process_reward_model(spec.params), Form(batch=True, asynchronous=False, optional=("prompts",)))
    made = _MADE.get(spec.kind, _checked)(spec)
    return RewardFunction(made, Form(batch=False, asynchronous=False, rest=True))


def _checked(spec: RewardSpec) -> Callable[..., float]:
    """A check of checks.py; what it expects may come from the row."""
    params = spec.params

    def reward(completion: str, **row: Any) -> float:
        check = _check_of(spec, row)
        answer, reference = completion, _reference(params, row)
        if marker := params.get("reference_after"):
            reference = reference.rpartition(marker)[2]
        if marker := params.get("after"):
            _, found, answer = completion.rpartition(marker)
            if not found:
                return 0.0
        checks.check_reference(check, reference, f"reward '{spec.name}'")
        return float(checks.score(check, answer, reference).passed)

    return reward


def _check_of(spec: RewardSpec, row: Mapping[str, Any]) -> checks.CheckSpec:
    taken = spec.params.get("from_row", {})
    if not isinstance(taken, Mapping):
        raise BadInput(
            f"from_row is {taken!r}; expected a mapping of the check's keys to columns, such as {{tests: unit_tests}}"
        )
    said = {key: value for key, value in spec.params.items() if key not in _OF_CHECKS}
    if not row and taken:  # whether the rest is right is told before there is a row
        return checks.parse_check({"kind": spec.kind, **said, **dict.fromkeys(taken, "assert True")}, f"reward '{spec.name}'")
    if missing := [column for column in taken.values() if column not in row]:
        raise BadInput(f"reward '{spec.name}': the row has no '{missing[0]}'; it has {', '.join(row) or 'nothing'}")
    return checks.parse_check(
        {"kind": spec.kind, **said, **{key: row[column] for key, column in taken.items()}}, f"reward '{spec.name}'"
    )


def _reference(params: Mapping[str, Any], row: Mapping[str, Any]) -> str:
    named = params.get("reference")
    if named is not None and named not in row:
        raise BadInput(f"the row has no '{named}' to hold an answer against; it has {', '.join(row) or 'nothing'}")
    column = named or next((name for name in REFERENCES if row.get(name) is not None), None)
    value = row[column] if column else ""
    return value if isinstance(value, str) else str(value)


def _format(spec: RewardSpec) -> Callable[..., float]:
    tags, partial = spec.params.get("tags", ["think", "answer"]), spec.params.get("partial", False)
    if not isinstance(tags, list) or not tags or not all(isinstance(tag, str) and re.fullmatch(r"[\w-]+", tag) for tag in tags):
        raise BadInput(f"reward '{spec.name}': tags is {tags!r}; expected a list of words, such as [think, answer]")
    if not isinstance(partial, bool):
        raise BadInput(f"reward '{spec.name}': partial is {partial!r}; expected true or false")
    marks = [mark for tag in tags for mark in (f"<{tag}>", f"</{tag}>")]
    any_mark = re.compile("|".join(map(re.escape, dict.fromkeys(marks))))

    def reward(completion: str, **row: Any) -> float:
        found = any_mark.findall(completion)
        if partial:
            return sum(found.count(mark) == 1 for mark in marks) / len(marks)
        if found != marks:
            return 0.0
        outside = any_mark.split(completion)[::2]  # before, between and after the tags
        return float(not any(text.strip() for text in outside))

    return reward


def _repetition(spec: RewardSpec) -> Callable[..., float]:
    n = spec.params.get("n", 3)
    if isinstance(n, bool) or not isinstance(n, int) or n < 1:
        raise BadInput(f"reward '{spec.name}': n is {n!r}; expected a whole number from 1, the words of an n-gram")

    def reward(completion: str, **row: Any) -> float:
        words = completion.casefold().split()
        grams = [tuple(words[start : start + n]) for start in range(len(words) - n + 1)]
        return len(set(grams)) / len(grams) - 1.0 if grams else 0.0

    return reward


_MADE: Mapping[str, Callable[[RewardSpec], Callable[..., float]]] = {"format": _format, "repetition": _repetition}


def _limit(kind: str, params: Mapping[str, Any], seconds: float) -> float:
    if kind == "code":  # which keeps its own time; a process must start beside it
        own = params.get("seconds", 5.0)
        return seconds + (own if isinstance(own, (int, float)) else 0.0)
    return max(seconds, {"judge": JUDGE_SECONDS, "model": MODEL_SECONDS, "process_model": MODEL_SECONDS}.get(kind, 0.0))


def _near(word: str, known: Sequence[str]) -> str:
    near = difflib.get_close_matches(word, list(known), 1)
    return f"did you mean '{near[0]}'? " if near else ""
