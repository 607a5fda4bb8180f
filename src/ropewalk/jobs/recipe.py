"""What a client asks for -> the configuration of its run: data by ids of the caller's own files, a base by its name, and listed keys.

A key that is not listed here is refused whatever it is: no path, no code, no name on a hub, no address, no service that is told.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import yaml

from ropewalk.checks import parse_check
from ropewalk.config.run import parse_run
from ropewalk.errors import BadInput, ConfigError
from ropewalk.files.catalog import File
from ropewalk.jobs.judge_desk import URL

Method = Literal["supervised", "dpo", "reinforcement"]
METHODS: tuple[Method, ...] = ("supervised", "dpo", "reinforcement")
RATES: Mapping[str, float] = {"supervised": 2e-4, "dpo": 2e-5, "reinforcement": 1e-5}  # times learning_rate_multiplier
EPOCHS = 3
ROW_BYTES = 1000  # of a usual row: "auto" takes about one row in five hundred into a step, 64 at most
ENDINGS = (
    ".jsonl",
    ".ndjson",
    ".json",
    ".csv",
    ".tsv",
    ".parquet",
    ".jsonl.gz",
    ".ndjson.gz",
    ".json.gz",
    ".csv.gz",
    ".tsv.gz",
)

# What `extra_body={"ropewalk": {...}}` may hold: keys of a run that change what is learnt, and none that names a place.
KEYS = frozenset(
    "adapter lora_r lora_alpha lora_dropout lora_experts lora_target_linear lora_modules_to_save peft_use_dora peft_use_rslora "
    "peft_layers_to_transform loraplus_lr_ratio loraplus_lr_embedding alora_invocation_tokens load_in_4bit load_in_8bit bf16 float32 "
    "bnb_4bit_quant_type peft_autocast_adapter_dtype float32_master step_in_backward "
    "tf32 gradient_checkpointing num_threads "
    "val_set_size dataset_exact_deduplication shuffle_merged_datasets on_bad_row chat_template default_system_message train_on_inputs "
    "sequence_len eval_sequence_len excess_length_strategy min_sample_len sample_packing eval_sample_packing "
    "sample_packing_sequentially pad_to_sequence_len pad_to_multiple_of curriculum_sampling group_by_length "
    "micro_batch_size eval_batch_size gradient_accumulation_steps num_epochs max_steps learning_rate lr_scheduler warmup_steps "
    "warmup_ratio cosine_min_lr_ratio cosine_constant_lr_ratio optimizer weight_decay adam_beta1 adam_beta2 adam_epsilon max_grad_norm "
    "eval_steps evals_per_epoch save_steps saves_per_epoch save_first_step save_total_limit early_stopping_patience "
    "load_best_model_at_end loss_watchdog_threshold loss_watchdog_patience".split()
)
KEYS_OF: Mapping[str, frozenset[str]] = {
    "supervised": frozenset({"processor_type"}),
    "dpo": frozenset(
        "rl rl_beta dpo_loss_type dpo_loss_weights dpo_label_smoothing rpo_alpha kto_desirable_weight kto_undesirable_weight "
        "orpo_alpha simpo_gamma cpo_alpha".split()
    ),
    "reinforcement": frozenset({"rl", "trl"}),
}
RL: Mapping[str, tuple[str, ...]] = {
    "dpo": ("dpo", "ipo", "kto", "orpo", "simpo", "cpo"),
    "reinforcement": ("grpo", "gdpo"),
}
# How the rows of the caller's file are read.
ROW_KEYS = frozenset(
    "type field_messages field_tools field_thinking template_thinking_key split_thinking message_field_role message_field_content "
    "message_property_mappings message_field_training message_field_training_detail roles roles_to_train train_on_eos train_on_eot "
    "drop_system_message field text_column field_system field_instruction field_input field_output field_prompt field_chosen "
    "field_rejected field_completion field_label ds_type skip".split()
)
# Of the block `trl`. Rewards are named by their kind alone.
TRL_KEYS = frozenset(
    "reward_funcs reward_weights scale_rewards multi_objective_aggregation num_generations generation_batch_size "
    "max_completion_length temperature top_p top_k min_p beta epsilon epsilon_high loss_type importance_sampling_level num_iterations "
    "mask_truncated_completions async_prefetch prefetch_depth".split()
)
CHECKS = ("exact", "contains", "regex", "numeric", "choice", "length", "schema")  # those of checks.py that run no code
SHAPES: Mapping[str, frozenset[str]] = {"format": frozenset({"tags", "partial"}), "repetition": frozenset({"n"})}
JUDGE = frozenset({"model", "rubric", "least", "most"})  # of a judge, which is a model of the caller's workspace by its name
MOST_RUBRIC, MOST_JUDGES = 10_000, 3
REWARDS = (*CHECKS, *SHAPES, "judge")
REWARD_KEYS = frozenset({"kind", "name", "weight", "limit"})
CHECK_KEYS = frozenset(
    {"reference", "after", "reference_after"}
)  # a column; what an answer, and what it is held against, come after
MOST: Mapping[str, float] = {  # what one job may ask of a machine that others use too
    "sequence_len": 131_072,
    "eval_sequence_len": 131_072,
    "num_epochs": 50,
    "max_steps": 1_000_000,
    "micro_batch_size": 256,
    "eval_batch_size": 256,
    "gradient_accumulation_steps": 1024,
    "lora_r": 512,
    "num_threads": 64,
    "save_total_limit": 20,
    "pad_to_multiple_of": 4096,
}
PLACES = ("base_model", "output_dir", "dataset_prepared_path")  # where things lie; added where the run is started


@dataclass(frozen=True)
class Asked:
    """A job as it was asked for.  server -> queue"""

    base: str
    training_file: str
    validation_file: str | None = None
    method: Method = "supervised"
    epochs: int | None = None  # None: "auto", here and below
    batch_size: int | None = None
    rate: float | None = None  # learning_rate_multiplier
    beta: float | None = None  # of dpo
    suffix: str = ""
    seed: int | None = None
    metadata: Mapping[str, str] | None = None
    keys: Mapping[str, Any] = field(default_factory=dict)  # of the run
    rows: Mapping[str, Any] = field(default_factory=dict)  # how the files are read


@dataclass(frozen=True)
class Recipe:
    """What is to be run, less where it lies on a machine."""

    config: Mapping[str, Any]
    hyperparameters: Mapping[str, Any]  # with what "auto" became

    @property
    def digest(self) -> str:
        return hashlib.sha256(json.dumps(self.config, sort_keys=True).encode()).hexdigest()


def make_recipe(asked: Asked, seed: int, training: File, validation: File | None) -> Recipe:
    """The run that is asked for; BadInput, or a ConfigError, for what it may not hold or what cannot go together."""
    keys = _checked(asked)
    rows = {"type": "chat_template", **_only(asked.rows, ROW_KEYS, "ropewalk.dataset")}
    for file in (training, validation):
        if file is not None:
            _is_data(file, rows)
    epochs = EPOCHS if asked.epochs is None else asked.epochs
    batch = _auto_batch(training) if asked.batch_size is None else asked.batch_size
    rate = RATES[asked.method] * (1.0 if asked.rate is None else asked.rate)
    config: dict[str, Any] = {
        "adapter": "lora",
        "sequence_len": 2048,
        "sample_packing": asked.batch_size is None,  # rows that are counted are not laid together
        "datasets": [{"path": training.id, **rows}],
        "seed": seed,
    }
    if asked.method != "supervised":
        config["rl"] = {"dpo": "dpo", "reinforcement": "grpo"}[asked.method]
    if asked.beta is not None:
        config["rl_beta"] = asked.beta
    own: dict[str, Any] = {"num_epochs": epochs, "gradient_accumulation_steps": batch, "learning_rate": rate}
    given = {"num_epochs": asked.epochs, "gradient_accumulation_steps": asked.batch_size, "learning_rate": asked.rate}
    for name, word in (
        ("num_epochs", "n_epochs"),
        ("gradient_accumulation_steps", "batch_size"),
        ("learning_rate", "learning_rate_multiplier"),
    ):
        if name in keys and given[name] is not None:
            raise BadInput(f"ropewalk.{name}: {word} says the same; give one of them")
    if validation is not None:
        config["test_datasets"] = [{"path": validation.id, **rows}]
        if "val_set_size" in keys:
            raise BadInput("ropewalk.val_set_size: validation_file names the rows to evaluate on; give one of them")
    config |= own | keys
    try:
        parse_run(yaml.safe_dump({"base_model": "base", "output_dir": "run", **config}))
    except ConfigError as error:
        raise BadInput(f"ropewalk: {error}") from error
    told = {
        "n_epochs": config["num_epochs"],
        "batch_size": config["gradient_accumulation_steps"],
        "learning_rate_multiplier": round(config["learning_rate"] / RATES[asked.method], 6),
    }
    if asked.method == "dpo":
        told["beta"] = config.get("rl_beta", "auto")
    return Recipe(config, told)


def reproducing(method: str, config: Mapping[str, Any]) -> dict[str, Any]:
    """What makes the same run of the same files: a job's configuration as a client gives it, `extra_body={"ropewalk": ...}`. It goes
    with the method, the seed and the files alone; what hyperparameters became stands in it."""
    allowed = KEYS | KEYS_OF[method]
    keys = {name: value for name, value in config.items() if name in allowed}
    if isinstance(trl := keys.get("trl"), Mapping):
        keys["trl"] = {**trl, "reward_funcs": [_as_given(one) for one in trl["reward_funcs"]]}
    rows = {name: value for name, value in config["datasets"][0].items() if name in ROW_KEYS}
    return {**keys, "dataset": rows}


def _as_given(reward: Any) -> Any:
    if isinstance(reward, Mapping) and reward.get("kind") == "judge":
        return {name: value for name, value in reward.items() if name != "url"}  # which the server adds
    return reward


def _auto_batch(training: File) -> int:
    """About one row in five hundred; a power of two, which several workers can share."""
    return min(64, 1 << max(0, round(math.log2(max(1.0, training.size / ROW_BYTES / 500)))))


def judges_of(config: Mapping[str, Any]) -> tuple[str, ...]:
    """The models that a job's configuration names as judges, each once."""
    trl = config.get("trl")
    funcs = trl.get("reward_funcs") if isinstance(trl, Mapping) else None
    named = [one.get("model") for one in funcs or () if isinstance(one, Mapping) and one.get("kind") == "judge"]
    return tuple(dict.fromkeys(name for name in named if isinstance(name, str)))


def _checked(asked: Asked) -> dict[str, Any]:
    """The keys of the run, all of which a client may give."""
    allowed = KEYS | KEYS_OF[asked.method]
    keys = _only(asked.keys, allowed, "ropewalk")
    for name, most in MOST.items():
        value = keys.get(name)
        if isinstance(value, int | float) and not isinstance(value, bool) and value > most:
            raise BadInput(f"ropewalk.{name}: {value} is more than a job may ask for; expected {most:g} at most")
    if keys.get("adapter", "lora") not in ("lora", "qlora"):
        raise BadInput(f"ropewalk.adapter: {keys['adapter']!r}; a job trains an adapter, expected lora or qlora")
    template = keys.get("chat_template")
    if template is not None and (not isinstance(template, str) or template == "jinja"):
        raise BadInput("ropewalk.chat_template: expected the name of a model family's template, or tokenizer_default")
    if "rl" in keys and keys["rl"] not in RL[asked.method]:
        raise BadInput(f"ropewalk.rl: {keys['rl']!r}; method {asked.method} is one of {', '.join(RL[asked.method])}")
    if asked.method == "reinforcement":
        keys["trl"] = _rewarded(keys.get("trl"))
    return keys


def _rewarded(trl: Any) -> dict[str, Any]:
    """The block `trl`, whose rewards are all built in, or judges."""
    if not isinstance(trl, Mapping) or not isinstance(trl.get("reward_funcs"), list) or not trl["reward_funcs"]:
        raise BadInput(
            'method reinforcement needs its rewards: extra_body={"ropewalk": {"trl": {"reward_funcs": [{"kind": "numeric"}]}}}'
        )
    found = _only(trl, TRL_KEYS, "ropewalk.trl")
    found["reward_funcs"] = rewards = [dict(one) if isinstance(one, Mapping) else one for one in found["reward_funcs"]]
    for number, entry in enumerate(rewards):
        where = f"ropewalk.trl.reward_funcs.{number}"
        spec = {"kind": entry} if isinstance(entry, str) else entry
        if not isinstance(spec, Mapping) or spec.get("kind") not in REWARDS:
            shown = spec.get("kind") if isinstance(spec, Mapping) else spec
            raise BadInput(
                f"{where}: {str(shown)[:80]!r} is no reward that a job may use; expected one of {', '.join(REWARDS)}"
            )
        own = {key: value for key, value in spec.items() if key not in REWARD_KEYS}
        if (kind := spec["kind"]) == "judge":
            rewards[number] = {**spec, **_judge(own, where)}
        elif kind in SHAPES:
            _only(own, SHAPES[kind], where)
        else:
            parse_check({"kind": kind, **{key: value for key, value in own.items() if key not in CHECK_KEYS}}, where)
    if len(judges := judges_of({"trl": found})) > MOST_JUDGES:
        raise BadInput(f"ropewalk.trl.reward_funcs: {len(judges)} models as judges; a job may ask {MOST_JUDGES}")
    return found


def _judge(own: Mapping[str, Any], where: str) -> dict[str, Any]:
    """A judge, less what says where it is reached: that is for the server to say."""
    _only(own, JUDGE, where)
    model, rubric, least, most = own.get("model"), own.get("rubric", ""), own.get("least", 1), own.get("most", 10)
    if not isinstance(model, str) or not 1 <= len(model) <= 256 or "," in model or " " in model:
        raise BadInput(f'{where}.model: a judge is named by a model that is served here: {{"kind": "judge", "model": NAME}}')
    if not isinstance(rubric, str) or len(rubric) > MOST_RUBRIC:
        raise BadInput(f"{where}.rubric: expected a text of {MOST_RUBRIC:,} characters at most")
    numbers = all(isinstance(one, int | float) and not isinstance(one, bool) and abs(one) <= 1e6 for one in (least, most))
    if not numbers or least >= most:
        raise BadInput(f"{where}: marks from {least!r} to {most!r}; expected two numbers, the smaller one first")
    return {"url": URL}


def _only(given: Mapping[str, Any], allowed: frozenset[str], where: str) -> dict[str, Any]:
    for name in given:
        if name not in allowed:
            near = difflib.get_close_matches(str(name), allowed, 1)
            hint = f"did you mean '{near[0]}'?" if near else "docs/jobs.md lists the keys that it may"
            raise BadInput(f"{where}.{str(name)[:100]}: a job may not set this key; {hint}")
    return dict(given)


def _is_data(file: File, rows: Mapping[str, Any]) -> None:
    name = file.filename.lower()
    if not name.endswith(ENDINGS) and "ds_type" not in rows:
        raise BadInput(
            f"file `{file.id}` ('{file.filename[:80]}') cannot be trained on by its name; expected one of {', '.join(ENDINGS[:6])}, "
            'or say what it is: extra_body={"ropewalk": {"dataset": {"ds_type": "json"}}}'
        )
    if file.size == 0:
        raise BadInput(f"file `{file.id}` is empty")
