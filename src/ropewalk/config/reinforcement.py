"""The keys of training by rewards: `rl` and the block `trl`, whose names and meaning are Axolotl's, but for those that say Own."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from ropewalk.config.keys import AboveZero, Count, Group, Number, Positive, Share, key
from ropewalk.config.vllm import VllmKeys


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
    correction_keep: tuple[AboveZero, AboveZero] | None = key(
        "Own: keep a completion only while the geometric mean of its ratios to the policy that sampled lies within these bounds."
    )
    overlong_tokens: Count = key(
        "Own: so many of the last tokens before the limit cost up to 1 of the reward (DAPO); 0: none.", 0
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
    prefetch_depth: Positive = key("How many steps old a completion may be when async_prefetch is on.", 1)


class ReinforcementKeys(Group):
    """Training by rewards"""

    rl: Annotated[Literal["grpo", "gdpo", "dpo", "ipo", "kto", "orpo", "simpo", "cpo"] | None, BeforeValidator(_off)] = key(
        "Train by rewards instead of by answers: grpo, or gdpo, which standardises each reward by itself; "
        "or by preferences: dpo, ipo, kto, orpo, simpo, cpo."
    )
    trl: TrlKeys | None = key("What is generated, what rewards it, and how it is learnt from; see below.")
