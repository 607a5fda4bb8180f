"""The keys of training a model that scores: a reward model, or one that judges every step; their names and meaning are Axolotl's."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from ropewalk.config.keys import Group, Number, Positive, key

if TYPE_CHECKING:
    from collections.abc import Iterator

    from ropewalk.config.document import Place
    from ropewalk.config.run import DataSource, Run

OUTPUTS = {"answers": 1, "steps": 2}  # numbers that a model gives for each of what it scores
OF_STEPS = ("step_separator", "max_completion_length", "train_on_last_step_only")


class ScoringKeys(Group):
    """Reward models"""

    reward_model: bool = key(
        "Train a model that scores answers, from pairs of them (Bradley-Terry): the base with one output for the output head.",
        False,
    )
    process_reward_model: bool = key(
        "Train a model that scores every step of an answer, from rows of type stepwise_supervised.", False
    )
    center_rewards_coefficient: Number | None = key(
        "Reward models: weight of the square of both scores' sum, which holds them around 0; default 0."
    )
    num_labels: Positive | None = key("Axolotl's number of outputs: 1 for reward_model, 2 for process_reward_model.")


def scored(run: Run) -> Literal["answers", "steps"] | None:
    """What a model that this run trains scores; None: it writes text."""
    if run.reward_model:
        return "answers"
    return "steps" if run.process_reward_model else None


def conflicts_of_scoring(run: Run) -> Iterator[tuple[Place, str]]:
    """Where the keys of this page contradict each other or the rest."""
    kind = scored(run)
    for name in ("datasets", "test_datasets"):
        for at, source in enumerate(getattr(run, name) or ()):
            yield from _of_source(source, (name, at), kind)
    if kind is None:
        return
    key = "reward_model" if kind == "answers" else "process_reward_model"
    if run.reward_model and run.process_reward_model:
        yield ("process_reward_model",), "reward_model and process_reward_model exclude each other; keep one"
    if run.rl:
        yield ("rl",), f"{key} trains a model that scores, and rl: {run.rl} one that writes; keep one of them"
    if run.num_labels not in (None, OUTPUTS[kind]):
        yield ("num_labels",), f"key 'num_labels': a model under {key} has {OUTPUTS[kind]}, not {run.num_labels}; remove it"
    if run.streams:
        yield ("streaming" if run.streaming else "pretraining_dataset",), f"{key} cannot be streamed; name datasets"
    if run.train_on_inputs:
        yield ("train_on_inputs",), f"{key} scores the end of an answer or step; remove train_on_inputs"
    if run.alora_invocation_tokens:
        yield ("alora_invocation_tokens",), f"{key} reads whole texts, and activated LoRA only their end; remove it"


def _of_source(source: DataSource, place: Place, kind: str | None) -> Iterator[tuple[Place, str]]:
    where = ".".join(map(str, place))
    stepwise = isinstance(source.type, str) and source.type.startswith("stepwise_supervised")
    if stepwise and kind != "steps":
        yield (*place, "type"), f"key '{where}.type': stepwise_supervised is for process_reward_model: true; add that"
    if not stepwise and kind == "steps":
        yield (*place, "type"), f"key '{where}.type': process_reward_model reads type: stepwise_supervised; write that"
    for name in OF_STEPS:
        if name in source.model_fields_set and getattr(source, name) and not stepwise:
            yield (*place, name), f"key '{where}.{name}' is for type: stepwise_supervised; remove it"
    ranked = isinstance(source.type, str) and source.type.split(".")[0] == "bradley_terry"
    if ranked and kind != "answers":
        yield (*place, "type"), f"key '{where}.type': '{source.type}' is for reward_model: true; add that"
