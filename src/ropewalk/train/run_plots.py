"""What of a run's events is drawn: the name of each plot and its SVG. Pure functions over events. No torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ropewalk.train.headlines import PREFIX, is_rewarded, several
from ropewalk.train.plots import Series, line_plot, stacked

Events = Sequence[Mapping[str, Any]]


def plots_of(log: Events) -> dict[str, str]:
    """File name -> SVG, for all that the log has measures of."""
    steps, evals = ([e for e in log if e["event"] == kind] for kind in ("step", "eval"))
    found = {
        "loss.svg": line_plot("Loss", "step", _loss_unit(steps), _with_evaluation(steps, evals, "loss", " loss")),
        "throughput.svg": line_plot(
            "Throughput", "step", "tokens per second", _curves(steps, {"tokens_per_second": "tokens/s"})
        ),
        "rate.svg": line_plot("Learning rate", "step", "learning rate", _curves(steps, {"learning_rate": "learning rate"})),
    }
    if any(is_rewarded(step) for step in steps):
        # An evaluation by rewards has no loss to set beside the policy's.
        loss = line_plot("Loss", "step", "loss of the policy", _curves(steps, {"loss": "loss"}))
        return found | {"loss.svg": loss} | _rewarded(steps, evals)
    if any("rewards/margins" in step for step in steps):
        return found | _compared(steps, evals)
    return found


def _compared(steps: Events, evals: Events) -> dict[str, str]:
    rewards = _curves(steps, {PREFIX + name: name for name in ("chosen", "rejected", "margins")})
    share = _with_evaluation(steps, evals, "rewards/accuracies")
    return {
        "rewards.svg": line_plot("Implicit rewards", "step", "reward", rewards),
        "accuracy.svg": line_plot("Preferred rightly", "step", "share", share),
    }


def _rewarded(steps: Events, evals: Events) -> dict[str, str]:
    """Each plot has one or more parts, one below the other; a part without any measure in the log is left out, and so is such a plot."""
    by_name = {PREFIX + name: name for step in steps for name, _ in several(step)}
    waits = _curves(
        steps, {"wait_rollouts_seconds": "trainer, for completions", "wait_trainer_seconds": "generator, queue full"}
    )
    failed = _with_evaluation(steps, evals, "failed")
    parts = {
        "reward.svg": [
            ("Reward", "mean", _with_evaluation(steps, evals, "reward")),
            ("Rewards by name", "mean", _curves(steps, by_name)),
            ("Rewards by name, evaluation", "mean", _curves(evals, by_name)),
            ("Groups that teach", "share", _curves(steps, {"varied": "varied"})),
            ("Completions whose rewards failed", "share", failed if any(e.get("failed") for e in (*steps, *evals)) else []),
        ],
        "length.svg": [
            ("Length of completions", "tokens", [*_with_evaluation(steps, evals, "length"), *_curves(steps, {"length_max": "longest"})]),
            ("Ended by themselves", "share", _with_evaluation(steps, evals, "ended")),
        ],
        "entropy.svg": [
            ("Entropy", "nats per token", _curves(steps, {"entropy": "entropy"})),
            ("Distance from the base", "nats per token", _curves(steps, {"kl": "kl"})),
        ],
        "ratio.svg": [
            ("Ratio to the policy that sampled", "mean", _curves(steps, {"ratio": "ratio"})),
            ("Tokens left out", "share", _curves(steps, {"clipped": "clipped", "dropped": "dropped"})),
            ("Generator beside trainer, before the update", "mean |difference| in nats", _curves(steps, {"mismatch": "mismatch"})),
        ],
        "staleness.svg": [("Staleness", "versions behind", _curves(steps, {"staleness": "mean", "staleness_max": "oldest"}))],
        "waiting.svg": [
            ("Waiting", "seconds of a step", [*waits, *_curves(steps, {"seconds": "the step"})] if waits else []),
            ("Decoding", "tokens per second", _curves(steps, {"decode_tokens_per_second": "decoded"})),
        ],
    }  # fmt: skip
    drawn = {}
    for name, several_parts in parts.items():
        if plots := [line_plot(title, "step", unit, curves) for title, unit, curves in several_parts if curves]:
            drawn[name] = stacked(plots)
    return drawn


def _curves(events: Events, measures: Mapping[str, str]) -> list[Series]:
    """A curve for each measure that any of the events has."""
    curves: list[Series] = []
    for measure, name in measures.items():
        if points := [(e["step"], e[measure]) for e in events if e.get(measure) is not None]:
            curves.append((name, [x for x, _ in points], [y for _, y in points]))
    return curves


def _with_evaluation(steps: Events, evals: Events, measure: str, what: str = "") -> list[Series]:
    return [*_curves(steps, {measure: f"training{what}"}), *_curves(evals, {measure: f"evaluation{what}"})]


def _loss_unit(steps: Events) -> str:
    return "loss of a comparison" if any("rewards/margins" in step for step in steps) else "nats per trained token"
