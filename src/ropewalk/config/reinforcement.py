"""The keys of training by rewards: `rl` and the block `trl`, whose names and meaning are Axolotl's, but for those that say Own."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from ropewalk.config.keys import AboveZero, Count, Group, Number, Positive, Share, key
from ropewalk.config.vllm import VllmKeys

if TYPE_CHECKING:
    from ropewalk.config.document import Place
    from ropewalk.config.run import Run

CLIPPED = ("grpo", "dr_grpo", "dapo", "bnpo", "gspo", "rloo", "reinforce++", "reinforce++-baseline")  # these bound the ratio
READ_BY = {"epsilon": CLIPPED, "epsilon_high": (*CLIPPED, "cispo"), "delta": CLIPPED}  # key of trl -> the losses that read it
# What rewards are divided by in these; in the others scale_rewards chooses.
DIVIDED = {"rloo": "none", "reinforce++": "batch", "reinforce++-baseline": "batch"}


def _off(value: Any) -> Any:
    return None if value is False or value == "" else value


def _scale(value: Any) -> Any:
    return {True: "group", False: "none"}.get(value, value) if isinstance(value, bool) else value


def _listed(value: Any) -> Any:
    return (value,) if isinstance(value, (str, dict)) else value


class TrlKeys(VllmKeys):
    """The block `trl`: what is generated, what rewards it, and how it is learnt from."""

    reward_funcs: Annotated[tuple[str | dict[str, Any], ...], BeforeValidator(_listed)] | None = key(
        "The rewards: module.function, path/to/file.py:function, a built-in kind, a reward model's name, or a mapping.",
        min_length=1,
    )
    reward_weights: tuple[Annotated[float, Field(allow_inf_nan=False)], ...] | None = key("One weight per reward; default 1.")
    reward_num_workers: Positive = key("Processes that compute rewards, and as many that hold environments.", 1)
    reward_seconds: AboveZero | None = key(
        "Own: seconds that one call of a reward or an environment may take before its process is replaced; default 10."
    )
    environment: str | None = key(
        "Own: what answers the model over several turns: module.Class or path/to/file.py:Class; its rewards are added to the others."
    )
    harness: str | None = key(
        "Own: code that asks the model itself, as an OpenAI client: module.function or path/to/file.py:function; what it asked is "
        "learnt from, and its reward is added to the others."
    )
    harness_seconds: AboveZero = key("Own: seconds that one rollout of a harness may take.", 600.0)
    max_turns: Positive = key("Own: the most replies of an episode.", 8)
    max_episode_tokens: Positive | None = key("Own: the most tokens of an episode, prompt and all; default: sequence_len.")
    scale_rewards: Annotated[Literal["group", "batch", "none"], BeforeValidator(_scale)] | None = key(
        "What rewards are divided by: the standard deviation of their group (also true), of the batch, or nothing (also false); "
        "default: as the loss's paper does."
    )
    multi_objective_aggregation: Literal["sum_then_normalize", "normalize_then_sum"] | None = key(
        "Whether rewards are added up before they are standardised, or after (GDPO); default: what rl says."
    )
    num_generations: Annotated[int, Field(ge=2)] = key("Completions of a prompt, which are compared with each other.", 8)
    generation_batch_size: Positive | None = key("Completions of an optimizer step, a multiple of num_generations.")
    max_completion_length: Positive = key("The most tokens of a completion.", 256)
    temperature: AboveZero = key("Temperature of the sampling.", 1.0)
    top_p: Share = key("Sample from the likeliest tokens that have this share together.", 1.0)
    top_k: Count = key("Sample from so many of the likeliest tokens; 0: from all.", 0)
    min_p: Share = key("Sample from tokens that have this share of the likeliest one's probability.", 0.0)
    beta: Number = key("Weight of the KL divergence from the base.", 0.0)
    kl_estimator: Literal["k2", "k3"] | None = key(
        "Own: how that divergence is estimated in the loss: k3, the default, or k2, half the square of the log ratio."
    )
    epsilon: Number | None = key("How far the ratio may fall below 1; default: the loss's own.")
    epsilon_high: Number | None = key("How far the ratio may rise above 1; default: the loss's own.")
    loss_type: (
        Literal["grpo", "dr_grpo", "dapo", "bnpo", "gspo", "cispo", "rloo", "reinforce++", "reinforce++-baseline", "dppo"]
        | None
    ) = key("The loss; default dapo.")
    importance_sampling_level: Literal["token", "sequence"] | None = key(
        "Whether ratios are of tokens or of whole completions."
    )
    delta: Annotated[float, Field(gt=1)] | None = key(
        "The most that a ratio counts where the advantage is negative (dual clip)."
    )
    off_policy_mask_threshold: AboveZero | None = key(
        "Leave out a bad completion whose mean log-probability has fallen by more than this since it was sampled."
    )
    correction: Literal["bypass", "decoupled"] = key(
        "Own: whether ratios are taken to the policy that sampled, or to the one before the step, which is then computed once more.",
        "bypass",
    )
    correction_weight: Literal["none", "tis", "icepop"] = key(
        "Own: the weight for the difference to the policy that sampled: truncated (tis, decoupled only), or 0 outside the bounds.",
        "none",
    )
    correction_bounds: tuple[AboveZero, AboveZero] = key("Own: the bounds of correction_weight.", (0.5, 2.0))
    correction_level: Literal["token", "sequence"] = key(
        "Own: whether tis weighs tokens by their own ratio, or by that of their whole completion.", "token"
    )
    correction_keep: tuple[AboveZero, AboveZero] | None = key(
        "Own: keep a completion only while the geometric mean of its ratios to the policy that sampled lies within these bounds."
    )
    overlong_tokens: Count = key(
        "Own: so many of the last tokens before the limit cost up to 1 of the reward (DAPO), with GDPO a reward of its own; 0: none.",
        0,
    )
    replay_routing: bool = key(
        "Own: in training, experts are those that were picked when the tokens were sampled; their weights are computed anew.",
        False,
    )
    endpoint: str | None = key(
        "Own: host:port at which the model under training is asked while it learns, in the shape of OpenAI's API."
    )
    num_iterations: Positive = key("Optimizer steps over each batch of completions.", 1)
    mask_truncated_completions: bool = key("Learn nothing from completions that did not end by themselves.", False)
    async_prefetch: bool = key("Generate the next batch while this one is learnt from.", False)
    prefetch_depth: Positive = key(
        "How many optimizer steps old a completion may be when it is first learnt from, with async_prefetch.", 1
    )


class ReinforcementKeys(Group):
    """Training by rewards"""

    rl: Annotated[Literal["grpo", "gdpo", "dpo", "ipo", "kto", "orpo", "simpo", "cpo"] | None, BeforeValidator(_off)] = key(
        "Train by rewards instead of by answers: grpo, or gdpo, which standardises each reward by itself; "
        "or by preferences: dpo, ipo, kto, orpo, simpo, cpo."
    )
    trl: TrlKeys | None = key("What is generated, what rewards it, and how it is learnt from; see below.")


def conflicts_of_reinforcement(run: Run) -> Iterator[tuple[Place, str]]:
    """Where the keys of this page contradict each other or the rest, or would be read by nobody."""
    if not run.by_rewards:
        return
    trl = run.trl
    if trl is None or not (trl.reward_funcs or trl.environment or trl.harness):
        yield (
            ("rl",),
            f"rl: {run.rl} needs a reward; add trl.reward_funcs, such as [rewards.correct] or [{{kind: numeric}}], trl.environment or trl.harness",
        )
        return
    yield from _of_rewards(run, trl)
    yield from _of_the_loss(run, trl)
    yield from _of_corrections(trl)
    if trl.generation_batch_size and trl.generation_batch_size % trl.num_generations:
        yield (
            ("trl", "generation_batch_size"),
            f"trl.generation_batch_size {trl.generation_batch_size} is no multiple of trl.num_generations {trl.num_generations}",
        )
    if "prefetch_depth" in trl.model_fields_set and not trl.async_prefetch:
        yield (
            ("trl", "prefetch_depth"),
            f"trl.prefetch_depth {trl.prefetch_depth} is how far async_prefetch writes ahead; add trl.async_prefetch: true, or remove it",
        )
    if run.alora_invocation_tokens:
        yield (
            ("alora_invocation_tokens",),
            f"rl: {run.rl} writes with the adapter from the first token on, so that it cannot be an activated one; "
            "remove alora_invocation_tokens",
        )
    if run.pretraining_dataset:
        yield ("pretraining_dataset",), f"rl: {run.rl} needs prompts; name them under datasets, not pretraining_dataset"


def _of_rewards(run: Run, trl: TrlKeys) -> Iterator[tuple[Place, str]]:
    if trl.harness and trl.environment:
        yield ("trl", "harness"), "trl.harness and trl.environment exclude each other: both say what an episode is; keep one"
    if trl.harness and "max_turns" in trl.model_fields_set:
        yield ("trl", "max_turns"), "trl.max_turns bounds trl.environment; a harness ends by itself, remove trl.max_turns"
    if "harness_seconds" in trl.model_fields_set and not trl.harness:
        yield ("trl", "harness_seconds"), "trl.harness_seconds is of trl.harness; add that, or remove it"
    if trl.reward_weights is not None and len(trl.reward_weights) != len(trl.reward_funcs or ()):
        yield (
            ("trl", "reward_weights"),
            f"trl.reward_weights has {len(trl.reward_weights)} weights for {len(trl.reward_funcs or ())} rewards; give one for each",
        )
    if run.rl == "gdpo" and trl.multi_objective_aggregation == "sum_then_normalize":
        yield (
            ("trl", "multi_objective_aggregation"),
            "rl: gdpo standardises each reward by itself; remove trl.multi_objective_aggregation, or write rl: grpo",
        )
    scale, loss = trl.scale_rewards, trl.loss_type or "dapo"
    if run.normalises_rewards_apart and scale not in (None, "group"):
        yield (
            ("trl", "scale_rewards"),
            f"trl.scale_rewards {scale}: each reward is divided by the standard deviation of its group before they are added up "
            "(rl: gdpo, normalize_then_sum); remove it, or have rewards added up first: rl: grpo",
        )
    elif not run.normalises_rewards_apart and scale not in (None, DIVIDED.get(loss, scale)):
        yield (
            ("trl", "scale_rewards"),
            f"trl.scale_rewards {scale}: loss_type {loss} means {DIVIDED[loss]}; remove it, or write loss_type: grpo, dr_grpo or dapo",
        )
    longest = trl.max_completion_length
    if trl.overlong_tokens > longest:
        yield (
            ("trl", "overlong_tokens"),
            f"trl.overlong_tokens {trl.overlong_tokens} are more than the {longest} of trl.max_completion_length; write less",
        )
    if trl.overlong_tokens and (trl.harness or (trl.environment and trl.max_turns > 1)):
        yield (
            ("trl", "overlong_tokens"),
            "trl.overlong_tokens is counted from max_completion_length, the limit of one reply, and episodes have several; let the "
            "environment or the harness reward what is short, or write max_turns: 1",
        )


def _of_the_loss(run: Run, trl: TrlKeys) -> Iterator[tuple[Place, str]]:
    loss = trl.loss_type or "dapo"
    for name, losses in READ_BY.items():
        if getattr(trl, name) is not None and loss not in losses:
            instead = "; epsilon_high is the most that it counts" if loss == "cispo" and name == "epsilon" else ""
            yield (
                ("trl", name),
                f"trl.{name} bounds ratios that are clipped, and loss_type {loss} clips none{instead}; remove it, or write loss_type: dapo",
            )
    if trl.kl_estimator is not None and not trl.beta:
        yield ("trl", "kl_estimator"), "trl.kl_estimator is of the divergence that trl.beta weighs; add trl.beta, or remove it"
    elif trl.kl_estimator is not None and loss == "reinforce++" and not run.normalises_rewards_apart:
        yield (
            ("trl", "kl_estimator"),
            "trl.kl_estimator is for a divergence in the loss, and reinforce++ takes it off the reward; remove it, or write "
            "loss_type: reinforce++-baseline",
        )


def _of_corrections(trl: TrlKeys) -> Iterator[tuple[Place, str]]:
    if trl.correction == "bypass" and trl.correction_weight == "tis":
        yield (
            ("trl", "correction_weight"),
            "trl.correction_weight tis with correction bypass would count the sampler's difference twice; "
            "write trl.correction: decoupled, or leave tis out",
        )
    if trl.correction_level == "sequence" and trl.correction_weight != "tis":
        yield (
            ("trl", "correction_level"),
            f"trl.correction_level sequence is read by correction_weight tis, not {trl.correction_weight}; write tis, or leave it out",
        )
    if "correction_bounds" in trl.model_fields_set and trl.correction_weight == "none":
        yield (
            ("trl", "correction_bounds"),
            "trl.correction_bounds are those of trl.correction_weight, which is none; write tis or icepop there, or remove them",
        )
    for name in ("correction_bounds", "correction_keep"):
        bounds = getattr(trl, name)
        if bounds is not None and bounds[0] > bounds[1]:
            low, high = bounds
            yield ("trl", name), f"trl.{name} [{low:g}, {high:g}]: the lower bound comes first; write [{high:g}, {low:g}]"
