"""A step and an evaluation in words: the plain line, and the rows of the panel. Pure functions over what events hold. No torch."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from statistics import fmean
from typing import Any

Values = Mapping[str, Any]  # of an event
Rows = list[tuple[str, ...]]  # name, value, name, value, ...

PREFIX = "rewards/"
NEAR = 5  # steps at either end whose rewards are told together


def step_line(values: Values, total: int, left: str) -> str:
    """What a step says where there is no live panel."""
    parts = [f"step {values['step']}/{total}"]
    if is_rewarded(values):
        parts += [_reward(values), *_completions(values), *_policy(values), *_flow(values)]
    else:
        parts += [f"loss {values['loss']:.4f}", f"lr {values['learning_rate']:.2e}", f"{values['tokens_per_second']:.0f} tok/s"]
    return "  ".join([*parts, _memory(values), f"{left} left", *_compared(values)])


def evaluation_line(values: Values) -> str:
    """What an evaluation says."""
    parts = [f"step {values['step']}"]
    if is_rewarded(values):
        parts += [f"evaluation {_reward(values)}", *_completions(values)]
    else:
        parts += [f"evaluation loss {values['loss']:.4f} over {values['trained']} tokens", *_compared(values)]
    return "  ".join([*parts, *(["(best so far)"] if values.get("best") else [])])


def failure_lines(values: Values, new: Collection[str]) -> list[str]:
    """What failed in a step or an evaluation, with the tracebacks of those that had never failed before."""
    where = f"step {values['step']}" + (", evaluation" if values.get("evaluation") else "")
    lines = list[str]()
    for name, count in values["failed"].items():
        lines.append(f"{where}  {name} failed on {count} of {values['samples']} completions")
        if name in new:
            lines += [f"  {line}" for line in values["errors"][name].splitlines()]
    lines += [f"{where}  {what} and was replaced" for what in values["replaced"]]
    if more := values["workers_replaced"] - len(values["replaced"]):
        lines.append(f"{where}  {more} more workers were replaced")
    return lines


def end_line(steps: Sequence[Values]) -> str:
    """What all steps together have come to; single rewards are too rough to be set side by side."""
    if not steps:
        return "no step"
    if not is_rewarded(steps[-1]):
        return f"loss {steps[0]['loss']:.4f} -> {steps[-1]['loss']:.4f} in {len(steps)} steps"
    first, last = ([step["reward"] for step in some] for some in (steps[:NEAR], steps[-NEAR:]))
    return f"reward {fmean(first):.3f} -> {fmean(last):.3f} (first and last {len(first)} of {len(steps)} steps)"


def panel_rows(values: Values, evaluated: Values, total: int, left: str) -> Rows:
    """What the live panel shows above its bar."""
    step, rate = f"{values['step']} / {total}", f"{values['learning_rate']:.2e}"
    if not is_rewarded(values):
        evaluation = number(evaluated.get("loss"), 4)
        rows: Rows = [("step", step, "loss", f"{values['loss']:.4f}", "evaluation", evaluation)]
        rows.append(("epoch", f"{values['epoch']:.2f}", "learning rate", rate, "left", left))
        if "rewards/margins" in values:
            rows.append(("margin", number(values["rewards/margins"]), "accuracy", number(values["rewards/accuracies"])))
    else:
        rows = [("step", step, "reward", number(values["reward"]), "evaluation", number(evaluated.get("reward")))]
        rows += [(name, number(value), "", "", "", number(evaluated.get(PREFIX + name))) for name, value in several(values)]
        length = f"{number(values.get('length'), 1)}, longest {number(values.get('length_max'), 0)}"
        rows.append(
            ("length", length, "ended", percent(values.get("ended")), "groups that teach", percent(values.get("varied")))
        )
        ratio = f"{number(values.get('ratio'))}, {percent(values.get('clipped'))} clipped"
        rows.append(("ratio", ratio, "entropy", number(values.get("entropy")), "mismatch", number(values.get("mismatch"), 5)))
        age = f"{number(values.get('staleness'), 2)}, at most {number(values.get('staleness_max'), 0)}"
        trainer, generator = waiting(values)
        rows.append(("versions behind", age, "trainer waits", percent(trainer), "generator waits", percent(generator)))
        decoded = number(values.get("decode_tokens_per_second"), 0)
        rows.append(("decoded/s", decoded, "learning rate", rate, "left", left))
    rows.append(("tokens/s", f"{values['tokens_per_second']:.0f}", "gradient norm", number(values["gradient_norm"]), "memory", _memory(values)))  # fmt: skip
    return rows


def is_rewarded(values: Values) -> bool:
    """Whether it is of a training by rewards; a training by preferences has `rewards/...` too, but no `reward`."""
    return "reward" in values


def components(values: Values) -> list[tuple[str, float]]:
    """The rewards by name."""
    return [(name.removeprefix(PREFIX), value) for name, value in values.items() if name.startswith(PREFIX)]


def several(values: Values) -> list[tuple[str, float]]:
    """The rewards by name, where there is more than one: a single one is what stands there already."""
    found = components(values)
    return found if len(found) > 1 else []


def waiting(values: Values) -> tuple[float | None, float | None]:
    """The share of a step in which the trainer waited for completions, and in which the generator stood still with its queue full."""
    seconds = values.get("seconds")
    names = ("wait_rollouts_seconds", "wait_trainer_seconds")
    trainer, generator = (values[name] / seconds if seconds and values.get(name) is not None else None for name in names)
    return trainer, generator


def number(value: Any, digits: int = 3) -> str:
    """A measure, or a dash where it does not apply."""
    return "-" if value is None or math.isnan(value) else f"{value:.{digits}f}"


def percent(value: Any) -> str:
    return "-" if value is None or math.isnan(value) else f"{value:.0%}"


def _reward(values: Values) -> str:
    by_name = ", ".join(f"{name} {number(value)}" for name, value in several(values))
    return f"reward {number(values['reward'])}" + (f" ({by_name})" if by_name else "")


def _completions(values: Values) -> list[str]:
    said = [f"length {number(values.get('length'), 1)}, {percent(values.get('ended'))} ended"]
    return [*said, f"{percent(values['failed'])} failed"] if values.get("failed") else said


def _policy(values: Values) -> list[str]:
    said = [f"entropy {number(values['entropy'])}"] if "entropy" in values else []
    if "ratio" in values:
        said.append(f"ratio {number(values['ratio'])}, {percent(values.get('clipped'))} clipped")
    return said


def _flow(values: Values) -> list[str]:
    said = [f"{number(values['staleness'], 2)} versions behind"] if "staleness" in values else []
    trainer, generator = waiting(values)
    if trainer is not None or generator is not None:
        said.append(f"waiting: trainer {percent(trainer)}, generator {percent(generator)}")
    if "decode_tokens_per_second" in values:
        said.append(f"{number(values['decode_tokens_per_second'], 0)} tok/s decoded")
    return said


def _compared(values: Values) -> list[str]:
    if "rewards/margins" not in values:
        return []
    return [f"margin {values['rewards/margins']:.3f}", f"accuracy {values['rewards/accuracies']:.3f}"]


def _memory(values: Values) -> str:
    return f"{values['memory'] / 1e6:.0f} MB"
