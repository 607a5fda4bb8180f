"""`ropewalk rewards check`: what the rewards of a run say of real completions, before anything is trained."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ropewalk.config.run import load_run
from ropewalk.errors import ConfigError
from ropewalk.models.hub import resolve_base
from ropewalk.train.prepare import load_template, tell
from ropewalk.train.reward_functions import Sample, check_columns
from ropewalk.train.reward_samples import Groups, Played, given, sampled
from ropewalk.train.rewards import Array, Rewards, Scores, as_array, combine, specs_of

SHOWN = 160  # characters of a text in the report
FLAT = 0.9  # a share of groups without spread that is worth a warning


@dataclass(frozen=True)
class Example:
    """One completion and what it was given."""

    prompt: str
    completion: str
    value: float


@dataclass(frozen=True)
class Distribution:
    """What one reward, or their sum, said of all samples; None: it said nothing."""

    name: str
    weight: float
    samples: int
    scored: int
    failed: int
    mean: float | None
    std: float | None
    least: float | None
    most: float | None
    flat_groups: float | None  # the share of groups in which it is the same for all, and so teaches nothing
    slowest: float  # seconds
    error: str = ""  # the first
    examples: list[Example] = field(default_factory=list)  # the best and the worst


@dataclass(frozen=True)
class Report:
    """The rewards, their weighted sum, and what is wrong with them."""

    groups: int
    samples: int
    rewards: list[Distribution]
    total: Distribution
    warnings: list[str]
    replaced: list[str]
    replies: float | None = None  # of an episode with the environment, on average; None: completions are of one turn

    @property
    def usable(self) -> bool:
        """Whether every reward could say something."""
        return all(one.failed < one.samples for one in self.rewards)

    def text(self) -> str:
        """For a terminal."""
        width = max(6, *(len(one.name) for one in self.rewards))
        head = f"{'reward':<{width}}  weight  scored  failed     mean      std      min      max  flat groups  slowest"
        what = "completions" if self.replies is None else f"episodes of {self.replies:.1f} replies on average,"
        lines = [f"{self.samples} {what} of {self.groups} prompts", "", head]
        lines += [_line(one, width) for one in (*self.rewards, self.total)]
        for one in self.rewards:
            for example in one.examples:
                lines += ["", f"{one.name} {example.value:g}: {example.prompt!r}", f"  {example.completion!r}"]
            if one.error:
                lines += ["", f"{one.name}, the first failure:", *(f"  {line}" for line in one.error.splitlines())]
        if self.warnings:
            lines += ["", *(f"warning: {warning}" for warning in self.warnings)]
        return "\n".join(lines)


def check_command(config: Path, overrides: Sequence[str], completions: Path | None, prompts: int, as_json: bool) -> int:
    """`ropewalk rewards check CONFIG`; 1 where a reward could say nothing of any completion."""
    run = load_run(config, overrides)
    specs = specs_of(run)
    if run.trl is not None and run.trl.harness is not None and completions is None:
        raise ConfigError(
            f"{run.where('trl', 'harness')}trl.harness asks a model under training, and here none is trained; try it by "
            "`ropewalk train CONFIG max_steps=1`, or remove the key to try trl.reward_funcs alone"
        )
    if completions is not None and not specs:
        raise ConfigError(
            f"{run.where('trl')}no reward is a function of completions, and an environment plays episodes of its own; leave --completions out"
        )
    rewards = Rewards(specs, run.trl.reward_num_workers if run.trl else 1)
    played = None
    if completions is not None:
        groups = given(completions)
        if run.trl and run.trl.environment:
            tell(f"given completions are not played with trl.environment {run.trl.environment}: its reward is left out")
    else:
        base = resolve_base(run.base_model, run.revision_of_model, tell=tell)
        what = "completions" if run.trl is None or run.trl.environment is None else f"episodes with {run.trl.environment}"
        tell(f"sampling {run.trl.num_generations if run.trl else 1} {what} each of {prompts} prompts")
        groups, played = sampled(run, base, load_template(run, base), prompts)
    with rewards:
        report = measure(rewards, groups, played)
    print(json.dumps(asdict(report), indent=2) if as_json else report.text())
    return 0 if report.usable else 1


def measure(rewards: Rewards, groups: Groups, played: Played | None = None) -> Report:
    """Scores all groups and describes what comes, with what the environment has said of them first."""
    columns = dict.fromkeys(name for group in groups for sample in group for name in sample.row)
    for number, spec in enumerate(rewards.specs):
        check_columns(spec.name, rewards.pool.forms[number], columns)
    # All are handed out before the first is waited for: nothing stands idle.
    coming = [rewards.pool.submit(group) for group in groups]
    scores: Scores = [row for future in coming for row in rewards.pool.wait_for(future)]
    samples = [sample for group in groups for sample in group]
    values = as_array(scores)
    sizes = [len(group) for group in groups]
    found = [] if played is None else [_of_environment(played, samples, sizes)]
    for number, spec in enumerate(rewards.specs):
        column = [row[number] for row in scores]
        errors = [one.error for one in column if one.error]
        found.append(
            _described(
                spec.name,
                spec.weight,
                values[:, number],
                sizes,
                failed=len(errors),
                error=errors[0] if errors else "",
                slowest=max(one.seconds for one in column),
                examples=_examples(samples, values[:, number]),
            )
        )
    weights = rewards.weights
    if played is not None:  # it counts as it is, as in the run
        values = np.concatenate([np.array(played.rewards)[:, None], values], axis=1)
        weights = np.concatenate([np.ones(1), weights])
    total = _described("total", 1.0, combine(values, weights), sizes, failed=0, error="", slowest=0.0, examples=[])
    replies = None if played is None else played.replies
    return Report(len(groups), len(samples), found, total, _warnings(found, total), rewards.pool.replaced, replies)


def _of_environment(played: Played, samples: Sequence[Sample], sizes: Sequence[int]) -> Distribution:
    values = np.array(played.rewards)
    return _described(
        played.name,
        1.0,
        values,
        sizes,
        failed=len(played.errors),
        error=played.errors[0] if played.errors else "",
        slowest=0.0,
        examples=_examples(samples, values),
    )


def _described(name: str, weight: float, values: Array, sizes: Sequence[int], **more: Any) -> Distribution:
    scored = values[~np.isnan(values)]
    groups = np.split(values, np.cumsum(sizes)[:-1])
    told = [group[~np.isnan(group)] for group in groups if not np.isnan(group).all() and len(group) > 1]
    return Distribution(
        name=name,
        weight=weight,
        samples=len(values),
        scored=len(scored),
        mean=float(scored.mean()) if len(scored) else None,
        std=float(scored.std(ddof=1)) if len(scored) > 1 else None,
        least=float(scored.min()) if len(scored) else None,
        most=float(scored.max()) if len(scored) else None,
        flat_groups=sum(bool(np.ptp(group) == 0) for group in told) / len(told) if told else None,
        **more,
    )


def _examples(samples: Sequence[Sample], values: Array) -> list[Example]:
    scored = [number for number in range(len(values)) if not math.isnan(values[number])]
    if not scored:
        return []
    best, worst = max(scored, key=lambda number: values[number]), min(scored, key=lambda number: values[number])
    return [_example(samples[number], float(values[number])) for number in dict.fromkeys((best, worst))]


def _example(sample: Sample, value: float) -> Example:
    last = sample.prompt if isinstance(sample.prompt, str) else str(sample.prompt[-1].get("content")) if sample.prompt else ""
    return Example(_short(last), _short(sample.completion), value)


def _warnings(found: Sequence[Distribution], total: Distribution) -> list[str]:
    said = []
    for one in found:
        if one.failed:
            said.append(f"{one.name} failed on {one.failed} of {one.samples} completions")
        if one.samples and not one.scored:
            said.append(f"{one.name} says nothing of any completion")
        elif one.flat_groups is not None and one.flat_groups >= FLAT:
            same = f"is {one.least:g} for every completion" if one.least == one.most else "is mostly the same within a group"
            said.append(f"{one.name} {same}, so {one.flat_groups:.0%} of the groups teach nothing by it")
    if total.flat_groups is not None and total.flat_groups >= FLAT:
        said.append(
            f"{total.flat_groups:.0%} of the groups have one total reward for all their completions and would teach nothing; "
            "take easier or harder prompts, more num_generations, or a reward that tells more apart"
        )
    if total.scored and total.flat_groups is None:
        said.append("no prompt has two completions, so nothing can be told about groups")
    return said


def _line(one: Distribution, width: int) -> str:
    flat = "" if one.flat_groups is None else f"{one.flat_groups:.0%}"
    numbers = "".join(f"{'' if value is None else f'{value:.3f}':>9}" for value in (one.mean, one.std, one.least, one.most))
    slowest = f"{one.slowest:>7.2f}s" if one.slowest else ""
    return f"{one.name:<{width}}  {one.weight:>6g}  {one.scored:>6}  {one.failed:>6}{numbers}  {flat:>11}  {slowest}".rstrip()


def _short(text: str) -> str:
    return text if len(text) <= SHOWN else f"{text[: SHOWN // 2]} … {text[-SHOWN // 2 :]}"
