"""What cannot go together with pictures, each with its one way out."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ropewalk.config.document import Place
    from ropewalk.config.run import Run


def conflicts_of_sight(run: Run) -> Iterator[tuple[Place, str]]:
    """Every place where a run on pictures contradicts itself."""
    if not run.sees:
        return
    place: Place = ("processor_type",)
    if run.adapter is None:
        yield place, "pictures are trained on with an adapter over a model that stays as it is; add adapter: lora"
    if run.rl is not None or run.reward_model or run.process_reward_model:
        yield (
            place,
            "pictures are trained on by supervised fine-tuning alone; remove processor_type, or rl and the reward model",
        )
    if run.streams:
        yield place, "rows with pictures are looked through before training; remove streaming, and name them under datasets"
    if run.alora_invocation_tokens:
        yield place, "an activated adapter reads no pictures; remove alora_invocation_tokens"
