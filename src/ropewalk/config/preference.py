"""The keys of training by preferences; their names and meaning are Axolotl's."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import BeforeValidator, Field

from ropewalk.config.keys import AboveZero, Group, Number, key, not_a_switch, one_or_more
from ropewalk.config.scoring import scored

if TYPE_CHECKING:
    from collections.abc import Iterator

    from ropewalk.config.document import Place
    from ropewalk.config.run import Run

DpoLoss = Literal["sigmoid", "hinge", "ipo", "robust"]
Half = Annotated[float, BeforeValidator(not_a_switch), Field(ge=0, lt=0.5)]

# The methods, and what a row holds: a pair of answers, or one answer that is judged.
METHODS: Mapping[str, Literal["pairs", "judged"]] = {
    "dpo": "pairs",
    "ipo": "pairs",
    "kto": "judged",
    "orpo": "pairs",
    "simpo": "pairs",
    "cpo": "pairs",
}
REFERENCED = ("dpo", "ipo", "kto")  # these compare with the base
BETA = {"simpo": 2.0}  # where rl_beta is not given; 0.1 elsewhere
# Which method each key is for.
KEYS_OF = {
    "dpo_loss_type": ("dpo",),
    "dpo_loss_weights": ("dpo",),
    "dpo_label_smoothing": ("dpo",),
    "rpo_alpha": ("dpo", "ipo"),
    "kto_desirable_weight": ("kto",),
    "kto_undesirable_weight": ("kto",),
    "orpo_alpha": ("orpo",),
    "simpo_gamma": ("simpo",),
    "cpo_alpha": ("cpo", "simpo"),
}


class PreferenceKeys(Group):
    """Training by preferences"""

    rl_beta: AboveZero | None = key(
        "How strongly answers are held to the base (dpo, ipo, kto), or the scale of the margin (simpo, cpo); "
        "default 0.1, for simpo 2.",
        alias="dpo_beta",
    )
    dpo_loss_type: Annotated[tuple[DpoLoss, ...], BeforeValidator(one_or_more)] | None = key(
        "What DPO makes of a margin: sigmoid (the default), hinge, ipo, robust, or several that are added up.", min_length=1
    )
    dpo_loss_weights: tuple[Number, ...] | None = key("One weight for each of several dpo_loss_type; default 1.")
    dpo_label_smoothing: Half = key("The share of pairs thought to be the wrong way round; robust needs it.", 0.0)
    rpo_alpha: Number | None = key("Weight of the likelihood of chosen answers beside DPO's loss; default 0.")
    kto_desirable_weight: Number = key("KTO: weight of wanted answers.", 1.0)
    kto_undesirable_weight: Number = key("KTO: weight of unwanted answers.", 1.0)
    orpo_alpha: Number = key("ORPO: weight of the odds ratio beside the likelihood.", 0.1)
    simpo_gamma: Number = key("SimPO: the margin that chosen answers are to reach.", 0.5)
    cpo_alpha: Number | None = key("Weight of the likelihood of chosen answers; default 1 for cpo, 0 for simpo.")


Held = Literal["pairs", "judged", "ranked", "steps"]


def held(run: Run) -> Held | None:
    """What a row of the run's data holds beside plain text: answers that are compared, or (ranked, steps) scored; None: nothing."""
    kind = scored(run)
    if kind is not None:
        return "ranked" if kind == "answers" else "steps"
    return METHODS.get(run.rl or "")


def compares_with_base(run: Run) -> bool:
    """Whether the base must be there as it was: without an adapter, that is a second copy of it."""
    return run.rl in REFERENCED or (run.by_rewards and run.trl is not None and run.trl.beta > 0)


def conflicts_of_preference(run: Run) -> Iterator[tuple[Place, str]]:
    """Where the keys of this page contradict each other or the rest."""
    method = run.rl if run.rl in METHODS else None
    for name, methods in KEYS_OF.items():
        if name in run.model_fields_set and method not in methods and getattr(run, name):
            yield (name,), f"key '{name}' is for rl: {' or '.join(methods)}; add that, or remove the key"
    for at, source in enumerate(run.datasets or ()):
        for name in ("field_chosen", "field_rejected", "field_completion", "field_label"):
            if getattr(source, name) is not None and held(run) is None:
                yield ("datasets", at, name), f"key 'datasets.{at}.{name}' is for preferences; add rl: dpo, orpo, simpo or kto"
    if method is None:
        return
    if method in REFERENCED and run.reinit_weights:
        yield (
            ("reinit_weights",),
            f"rl: {method} compares with the base, which new random weights are not; remove reinit_weights",
        )
    if method in REFERENCED and run.lora_model_dir:
        yield (
            ("lora_model_dir",),
            f"rl: {method} would compare with the base without this adapter; merge it first (`ropewalk merge`) and name the result "
            "as base_model",
        )
    if run.streams:
        yield ("streaming" if run.streaming else "pretraining_dataset",), f"rl: {method} cannot be streamed; name datasets"
    if run.train_on_inputs:
        yield ("train_on_inputs",), f"rl: {method} compares answers alone; remove train_on_inputs"
    kinds = run.dpo_loss_type or ()
    if run.dpo_loss_weights is not None and len(run.dpo_loss_weights) != len(kinds):
        yield (
            ("dpo_loss_weights",),
            f"dpo_loss_weights has {len(run.dpo_loss_weights)} weights for {len(kinds)} of dpo_loss_type; give one for each",
        )
    if "robust" in kinds and not run.dpo_label_smoothing:
        yield ("dpo_loss_type",), "dpo_loss_type: robust needs dpo_label_smoothing, the share of wrong labels, such as 0.1"
