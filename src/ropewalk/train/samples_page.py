"""`samples.html`: completions of a training by rewards, with what each was given, as one page that needs nothing else. No torch."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ropewalk.standalone import environment
from ropewalk.train.headlines import number
from ropewalk.train.plots import line_plot

NEWEST, FIRST = 12, 3  # steps that are shown; the log has them all


@dataclass(frozen=True)
class Completion:
    """One completion and what it was given."""

    text: str
    reward: float | None
    rewards: tuple[float | None, ...]  # in the order of the page's names
    advantage: float

    @property
    def tone(self) -> str:
        """What it is taught to do: be said more often, more rarely, or nothing."""
        return "up" if self.advantage > 0 else "down" if self.advantage < 0 else "level"


@dataclass(frozen=True)
class Asked:
    """One prompt with its completions, the best first."""

    prompt: str
    completions: tuple[Completion, ...]


@dataclass(frozen=True)
class Shown:
    """The logged samples of one step."""

    step: int
    groups: tuple[Asked, ...]


@dataclass(frozen=True)
class Page:
    """All that the page shows."""

    run: str
    names: tuple[str, ...]  # of the rewards, where there is more than one
    newest: tuple[Shown, ...]
    first: tuple[Shown, ...]
    left_out: int  # steps in between
    plot: str  # SVG, ours


def samples_page(log: Sequence[Mapping[str, Any]], run: str) -> str:
    """The page of an event log; nothing where it holds no samples."""
    told = {e["step"]: e["samples"] for e in log if e["event"] == "samples" and e["samples"]}
    if not told:
        return ""
    names = tuple(dict.fromkeys(name for samples in told.values() for sample in samples for name in sample["rewards"]))
    names = names if len(names) > 1 else ()
    shown = [Shown(step, _asked(told[step], names)) for step in sorted(told, reverse=True)]
    newest, rest = shown[:NEWEST], shown[NEWEST:]
    page = Page(run, names, tuple(newest), tuple(rest[-FIRST:]), max(0, len(rest) - FIRST), _curve(log))
    templates = environment(Path(__file__).parent)
    templates.filters["number"] = number
    return templates.get_template("samples.html.j2").render(page=page)


def _asked(samples: Sequence[Mapping[str, Any]], names: Sequence[str]) -> tuple[Asked, ...]:
    """The samples of a step by prompt, in the order in which prompts come."""
    by_prompt: dict[str, list[Completion]] = {}
    for sample in samples:
        rewards = tuple(sample["rewards"].get(name) for name in names)
        completion = Completion(sample["completion"], sample["reward"], rewards, sample["advantage"])
        by_prompt.setdefault(_text(sample["prompt"]), []).append(completion)
    return tuple(Asked(prompt, tuple(sorted(found, key=_worth, reverse=True))) for prompt, found in by_prompt.items())


def _worth(completion: Completion) -> float:
    reward = completion.reward
    return -math.inf if reward is None or math.isnan(reward) else reward


def _text(prompt: Any) -> str:
    """A prompt as it is read: text as it is, messages under their roles."""
    if isinstance(prompt, str):
        return prompt
    return "\n\n".join(f"{message['role']}: {message['content']}" for message in prompt)


def _curve(log: Sequence[Mapping[str, Any]]) -> str:
    steps = [e for e in log if e["event"] == "step" and e.get("reward") is not None]
    if len(steps) < 2:
        return ""
    curve = [("reward", [e["step"] for e in steps], [e["reward"] for e in steps])]
    return line_plot("Reward", "step", "mean", curve)
