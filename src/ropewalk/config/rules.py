"""What cannot go together, each with its one way out. Whatever has one sensible meaning is taken to mean that."""

from __future__ import annotations

from collections.abc import Iterator
from difflib import get_close_matches
from typing import TYPE_CHECKING

from ropewalk.chat.families import SOURCES
from ropewalk.config.memory import conflicts_of_memory
from ropewalk.config.parallel import conflicts_of_parallel
from ropewalk.config.preference import conflicts_of_preference
from ropewalk.config.reinforcement import conflicts_of_reinforcement
from ropewalk.config.rounding import conflicts_of_rounding
from ropewalk.config.scoring import conflicts_of_scoring
from ropewalk.config.sight import conflicts_of_sight
from ropewalk.config.vllm import by_server, conflicts_of_vllm

if TYPE_CHECKING:
    from ropewalk.config.document import Place
    from ropewalk.config.run import Run

ATTENTION = ("sdpa", "eager", "flash_attention_2", "flash_attention_3", "flex_attention")
EXPERTS = ("ropewalk", "scattermoe", "sonicmoe", "eager", "grouped_mm", "batched_mm")


def conflicts(run: Run) -> Iterator[tuple[Place, str]]:
    """Every place where the configuration contradicts itself."""
    yield from _base(run)
    yield from _adapter(run)
    yield from _data(run)
    yield from _training(run)
    yield from conflicts_of_reinforcement(run)
    yield from conflicts_of_preference(run)
    yield from conflicts_of_scoring(run)
    yield from conflicts_of_vllm(run)
    yield from conflicts_of_rounding(run)
    yield from conflicts_of_parallel(run)
    yield from conflicts_of_memory(run)
    yield from conflicts_of_sight(run)
    yield from _output(run)


def _base(run: Run) -> Iterator[tuple[Place, str]]:
    for name in ("fp16", "float16"):
        if getattr(run, name):
            yield (name,), f"key '{name}': half precision overflows and is not offered; write bf16: auto"
    if run.float32 and (run.bf16 is True or run.bfloat16):
        yield ("float32",), "float32 and bf16 exclude each other; keep one"
    name = run.attention or ""
    if name and name not in ATTENTION and "/" not in name:
        near = next((a for a in ATTENTION if name in a or a in name), None)
        hint = f" (did you mean '{near}'?)" if near else ""
        yield ("attn_implementation",), f"key 'attn_implementation': '{name}' is not one of {', '.join(ATTENTION)}{hint}"
    if run.experts_implementation and run.experts_implementation not in EXPERTS:
        yield (
            ("experts_implementation",),
            f"key 'experts_implementation': '{run.experts_implementation}' is not one of {', '.join(EXPERTS)}; leave it out",
        )


def _adapter(run: Run) -> Iterator[tuple[Place, str]]:
    if run.load_in_4bit and run.load_in_8bit:
        yield ("load_in_8bit",), "load_in_4bit and load_in_8bit exclude each other; keep one"
    if run.adapter == "qlora" and run.load_in_8bit:
        yield ("load_in_8bit",), "adapter: qlora means a 4-bit base; for an 8-bit one write adapter: lora"
    if run.adapter == "qlora" and not run.load_in_4bit and "load_in_4bit" in run.model_fields_set:
        yield ("load_in_4bit",), "adapter: qlora means a 4-bit base; leave load_in_4bit out, or write adapter: lora"
    if run.adapter and run.reinit_weights:
        yield ("reinit_weights",), "an adapter over random weights learns nothing; leave adapter out, or reinit_weights"
    if run.adapter is None:
        yield from _without_adapter(run)
    if (
        run.adapter
        and run.lora_target_linear is False
        and not (run.lora_target_modules or run.lora_target_parameters or run.lora_experts)
    ):
        yield ("lora_target_linear",), "nothing is left to adapt; name lora_target_modules or lora_target_parameters"


def _without_adapter(run: Run) -> Iterator[tuple[Place, str]]:
    if run.quantization:
        yield (
            (f"load_in_{'8' if run.load_in_8bit else '4'}bit",),
            "a quantised base cannot be trained whole; add adapter: qlora, or load it plain",
        )
    for name in sorted(run.model_fields_set):
        if (
            name.startswith(("lora_", "peft_", "lora+", "loraplus_", "alora_"))
            and name != "lora_dropout"
            and getattr(run, name)
        ):
            yield (name,), f"key '{name}' is given without an adapter; add adapter: lora, or remove it to train every weight"


def _data(run: Run) -> Iterator[tuple[Place, str]]:
    if not run.sources:
        yield (), "there is nothing to train on; add datasets, a list of entries with path and type"
    if run.datasets and run.pretraining_dataset:
        yield ("pretraining_dataset",), "datasets and pretraining_dataset exclude each other; keep one"
    if run.test_datasets and run.val_set_size:
        yield ("val_set_size",), "test_datasets and val_set_size exclude each other; keep one"
    if run.val_set_size > 1 and run.val_set_size % 1:
        yield ("val_set_size",), f"key 'val_set_size': {run.val_set_size} is neither a share below 1 nor a whole number of rows"
    if run.streams and run.max_steps is None:
        yield (
            ("streaming" if run.streaming else "pretraining_dataset",),
            "streamed data has no end that is known; add max_steps",
        )
    if run.streams and run.val_set_size:
        yield ("val_set_size",), "rows cannot be set aside from streamed data; name test_datasets instead"
    for name in ("datasets", "test_datasets", "pretraining_dataset"):
        for index, source in enumerate(getattr(run, name) or ()):
            if source.shards_idx is not None and source.shards_idx >= (source.shards or 1):
                yield (name, index, "shards_idx"), f"shards_idx {source.shards_idx} is not below shards {source.shards or 1}"
            yield from _template((name, index), source.chat_template, source.chat_template_jinja)
    yield from _template((), run.chat_template, run.chat_template_jinja)


def _template(place: Place, name: str | None, jinja: str | None) -> Iterator[tuple[Place, str]]:
    if name == "jinja" and not jinja:
        yield (*place, "chat_template"), "chat_template: jinja needs chat_template_jinja, the template or its path"
    known = ["tokenizer_default", "jinja", *SOURCES]
    if name and name.removeprefix("tokenizer_default_fallback_") not in known:
        near = get_close_matches(name, known, n=1)
        hint = f"did you mean '{near[0]}'?" if near else f"one of {', '.join(sorted(known))}; or give chat_template_jinja"
        yield (*place, "chat_template"), f"key 'chat_template': '{name}' is not the name of a template; {hint}"


def _training(run: Run) -> Iterator[tuple[Place, str]]:
    if run.batch_size and run.gradient_accumulation_steps:
        if run.batch_size != run.micro_batch_size * run.gradient_accumulation_steps:
            yield (
                ("batch_size",),
                "batch_size and gradient_accumulation_steps contradict each other; keep gradient_accumulation_steps",
            )
    elif run.batch_size and run.batch_size % run.micro_batch_size:
        yield ("batch_size",), f"batch_size {run.batch_size} is not a multiple of micro_batch_size {run.micro_batch_size}"
    yield from _streaming(run)
    if run.warmup_steps is not None and run.warmup_ratio is not None:
        yield ("warmup_ratio",), "warmup_steps and warmup_ratio exclude each other; keep one"
    if run.warmup_steps and run.warmup_steps > 1 and run.warmup_steps % 1:
        yield (
            ("warmup_steps",),
            f"key 'warmup_steps': {run.warmup_steps} is neither a whole number of steps nor a share below 1",
        )


def _streaming(run: Run) -> Iterator[tuple[Place, str]]:
    asked = run.stream_weights not in ("auto", "off")
    name, value = ("stream_weights", run.stream_weights) if asked else ("layer_offloading", "true")
    if not asked and not run.layer_offloading:
        return
    if run.layer_offloading and "stream_weights" in run.model_fields_set and run.stream_weights != "layers":
        yield ("layer_offloading",), f"layer_offloading means stream_weights: layers, not {run.stream_weights}; keep one"
    if run.adapter is None:
        yield (name,), f"{name}: {value} is for weights that stay as they are; add an adapter, or remove it"
    if run.sharded:
        yield (
            (name,),
            f"{name}: {value} and sharded weights exclude each other; keep one, or write fsdp_config: {{offload_params: true}}",
        )
    if run.by_rewards and not by_server(run):
        yield (
            (name,),
            f"{name}: {value} cannot serve a model that is trained and written with at once; remove it, or have another engine write: "
            "trl: {use_vllm: true}",
        )
    if run.peft_use_dora and (run.stream_weights == "layers" or run.layer_offloading):
        yield (name,), f"DoRA reads whole layers before they are streamed; write stream_weights: experts, or remove {name}"


def _output(run: Run) -> Iterator[tuple[Place, str]]:
    for steps, times in (("eval_steps", "evals_per_epoch"), ("save_steps", "saves_per_epoch")):
        if getattr(run, steps) and getattr(run, times):
            yield (times,), f"{steps} and {times} exclude each other; keep one"
    for name in ("early_stopping_patience", "load_best_model_at_end"):
        if getattr(run, name) and not run.evaluates:
            yield (name,), f"key '{name}' needs an evaluation; add val_set_size: 0.05 or test_datasets"
    if run.save_strategy == "best" and not run.evaluates:
        yield ("save_strategy",), "save_strategy: best needs an evaluation; add val_set_size: 0.05 or test_datasets"
    if run.metric_for_best_model not in (None, "eval_loss", "loss"):
        yield (
            ("metric_for_best_model",),
            f"key 'metric_for_best_model': '{run.metric_for_best_model}' is not measured while training; only eval_loss is",
        )
    if run.greater_is_better:
        yield ("greater_is_better",), "key 'greater_is_better': a loss is better when it is smaller; remove it"
    if run.loss_watchdog_patience and run.loss_watchdog_threshold is None:
        yield ("loss_watchdog_patience",), "loss_watchdog_patience needs loss_watchdog_threshold"
