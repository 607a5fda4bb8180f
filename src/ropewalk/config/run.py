"""YAML -> one frozen Run. Derived values are properties, and nothing rewrites what was written. No torch.

document.py   the YAML and its lines        keys.py    every key that has an effect: type, default, sentence
reinforcement.py   those of training by rewards   preference.py   by preferences   scoring.py   and of reward models
parallel.py   those of several processes   memory.py   those that trade memory   cluster.py   and of a Ray cluster
axolotl.py    every other key of Axolotl's  rules.py   what cannot go together
faults.py     what is wrong, in words         reference.py  the page and the schema made from keys.py
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from pydantic import PrivateAttr, ValidationError

from ropewalk.config.cluster import ClusterKeys
from ropewalk.config.document import Document, dump, parse_document, read_document
from ropewalk.config.faults import names_of, sort_keys, told, wrong_values
from ropewalk.config.keys import AdapterKeys, DataKeys, DataSource, ModelKeys, OutputKeys, PromptFormat, TrainingKeys
from ropewalk.config.memory import MemoryKeys
from ropewalk.config.parallel import FEW_BITS, ParallelKeys
from ropewalk.config.preference import PreferenceKeys
from ropewalk.config.reinforcement import ReinforcementKeys
from ropewalk.config.rounding import RoundingKeys
from ropewalk.config.rules import conflicts
from ropewalk.config.scoring import ScoringKeys
from ropewalk.config.vllm import by_server, told_of_vllm

__all__ = ["DataSource", "PromptFormat", "Run", "as_yaml", "ignored_keys", "load_run", "make_run", "parse_run"]

# The older switches and what each means as `attn_implementation`.
ATTENTION_SWITCHES = {
    "flash_attention": "flash_attention_2",
    "sdp_attention": "sdpa",
    "flex_attention": "flex_attention",
    "eager_attention": "eager",
}


class Run(
    ModelKeys,
    AdapterKeys,
    DataKeys,
    TrainingKeys,
    ReinforcementKeys,
    PreferenceKeys,
    ScoringKeys,
    RoundingKeys,
    ParallelKeys,
    MemoryKeys,
    ClusterKeys,
    OutputKeys,
):
    """One training, as asked for: the keys of the twelve groups and what follows from them."""

    _ignored: dict[str, str] = PrivateAttr(default_factory=dict)
    _document: Document | None = PrivateAttr(default=None)

    @property
    def dtype_name(self) -> Literal["auto", "bfloat16", "float32"]:
        """What is computed in; auto: bfloat16 on a GPU that does it, else float32."""
        if self.float32:
            return "float32"
        asked = self.bf16 if self.bf16 is not None else self.bfloat16
        if asked is None or asked == "auto":
            return "auto"
        return "bfloat16" if asked else "float32"

    @property
    def attention(self) -> str | None:
        """The attention implementation asked for; None: the best that is there."""
        if self.attn_implementation:
            return self.attn_implementation
        return next((name for switch, name in ATTENTION_SWITCHES.items() if getattr(self, switch)), None)

    @property
    def quantization(self) -> Literal["nf4", "int4", "int8"] | None:
        """How the frozen base is held; qlora means 4 bits, and 4 bits nf4."""
        if self.load_in_8bit:
            return "int8"
        four_bits = self.load_in_4bit or self.adapter == "qlora"
        return (self.bnb_4bit_quant_type or "nf4") if four_bits else None

    @property
    def experts(self) -> str:
        """The implementation of experts; adapted or quantised ones are always computed by ours."""
        asked = self.experts_implementation
        if asked in (None, "ropewalk", "scattermoe", "sonicmoe") or self.adapts_experts or self.quantization:
            return "ropewalk"
        return str(asked)

    @property
    def adapts_experts(self) -> bool:
        """Whether experts that the config does not name one by one are adapted too."""
        return self.adapter is not None and self.lora_experts and not self.lora_target_parameters

    @property
    def targets_linear(self) -> bool:
        """Whether every linear layer is adapted: asked for, or nothing else is named."""
        if self.lora_target_linear is not None:
            return self.lora_target_linear
        return not self.lora_target_modules and not self.lora_target_parameters

    @property
    def rank(self) -> int:
        """Rank of the adapter."""
        return self.lora_r or 16

    @property
    def alpha(self) -> float:
        """Scale of the adapter; 2 r where it is not given."""
        return self.lora_alpha if self.lora_alpha is not None else 2.0 * self.rank

    @property
    def sees(self) -> bool:
        """Whether pictures are trained on too."""
        return self.processor_type is not None

    @property
    def packing(self) -> bool:
        """Whether rows of training are packed."""
        return bool(self.sample_packing)

    @property
    def eval_packing(self) -> bool:
        """Whether rows of evaluation are packed."""
        return self.packing if self.eval_sample_packing is None else self.eval_sample_packing

    @property
    def pads_rows(self) -> bool:
        """Whether every row is filled up to sequence_len."""
        return self.packing if self.pad_to_sequence_len is None else self.pad_to_sequence_len

    @property
    def accumulation(self) -> int:
        """Forward passes per optimizer step."""
        if self.gradient_accumulation_steps is None and self.batch_size:
            return self.batch_size // self.micro_batch_size
        return self.gradient_accumulation_steps or 1

    @property
    def tokens_per_step(self) -> int:
        """The most tokens of one optimizer step of one process."""
        return self.micro_batch_size * self.accumulation * self.sequence_len

    @property
    def tokenizer(self) -> str:
        """Where the tokenizer comes from."""
        return self.tokenizer_config or self.base_model

    @property
    def sources(self) -> tuple[DataSource, ...]:
        """What is trained on."""
        return self.datasets or self.pretraining_dataset or ()

    @property
    def streams(self) -> bool:
        """Whether rows are read while training."""
        return self.streaming or self.pretraining_dataset is not None

    @property
    def moved_by(self) -> str:
        """The optimizer; over sharded weights AdamW keeps its state in 32 bits, of which each process has a part."""
        return "adamw_torch_fused" if self.sharded and self.optimizer in FEW_BITS else self.optimizer

    @property
    def schedule(self) -> str:
        """The schedule under its full name."""
        return "warmup_stable_decay" if self.lr_scheduler == "wsd" else self.lr_scheduler

    @property
    def recompute(self) -> Literal["keep", "experts", "layer", "offload", "auto"]:
        """What every layer keeps for the backward pass; auto: chosen layer by layer to fill the memory there is."""
        if self.activation_offloading or self.gradient_checkpointing == "offload":
            return "offload"
        if isinstance(self.gradient_checkpointing, bool):
            asked = self.gradient_checkpointing or (self.fsdp_config is not None and self.fsdp_config.activation_checkpointing)
            return "layer" if asked else "keep"
        return self.gradient_checkpointing

    @property
    def weights_on_host(self) -> Literal["auto", "experts", "layers", "off"]:
        """Which frozen weights wait on the host until their layer's turn; auto: those whose absence makes the run fit."""
        if self.adapter is None or self.sharded or (self.by_rewards and not by_server(self)):
            return "off"  # who writes while it is learnt from reads the same weights at other times
        if self.peft_use_dora and self.stream_weights == "auto" and not self.layer_offloading:
            return "off"  # DoRA measures the weights before any of them has been fetched
        return "layers" if self.layer_offloading else self.stream_weights

    @property
    def evaluates(self) -> bool:
        """Whether there is anything to evaluate on and a moment to do it."""
        return (bool(self.val_set_size) or self.test_datasets is not None) and self.eval_strategy != "no"

    @property
    def resumes(self) -> bool:
        """Whether an unfinished run in output_dir is gone on with."""
        return self.resume and self.auto_resume_from_checkpoints is not False

    @property
    def trackers(self) -> tuple[str, ...]:
        """The services that events are sent to."""
        wandb = self.use_wandb is not False and bool(self.use_wandb or self.wandb_project) and self.wandb_mode != "disabled"
        mlflow = self.use_mlflow is not False and bool(self.use_mlflow or self.mlflow_experiment_name)
        asked = {"wandb": wandb, "tensorboard": self.use_tensorboard, "mlflow": mlflow}
        return tuple(name for name, on in asked.items() if on or name in (self.report_to or ()))

    @property
    def by_rewards(self) -> bool:
        """Whether it is rewards that are learnt from."""
        return self.rl in ("grpo", "gdpo")

    @property
    def normalises_rewards_apart(self) -> bool:
        """Whether each reward is standardised by itself before they are added up, as GDPO does."""
        asked = self.trl.multi_objective_aggregation if self.trl else None
        return asked == "normalize_then_sum" if asked else self.rl == "gdpo"

    @property
    def folder(self) -> str:
        """Where the configuration lies: code of the user's own that it names is looked for there first."""
        return str(self._document.path.parent) if self._document and self._document.path else "."

    def where(self, *place: str | int) -> str:
        """`file.yml:12: ` for a key, to stand before a message about its value."""
        return self._document.where(place) if self._document else ""

    def warmup(self, total: int) -> int:
        """Steps of warm-up in a run of `total` steps."""
        if self.warmup_steps is not None:
            return math.ceil(self.warmup_steps * total) if 0 < self.warmup_steps < 1 else int(self.warmup_steps)
        return int(self.warmup_ratio * total) if self.warmup_ratio is not None else min(int(0.03 * total), 100)

    def eval_every(self, per_epoch: int, total: int) -> int:
        """Steps between evaluations; 0: only at the end, if at all."""
        if not self.evaluates or self.evals_per_epoch == 0:
            return 0
        return _every(self.eval_steps, self.evals_per_epoch, self.eval_strategy or "epoch", per_epoch, total)

    def save_every(self, per_epoch: int, total: int) -> int:
        """Steps between checkpoints; 0: only at the end."""
        if self.save_strategy == "no" or self.saves_per_epoch == 0:
            return 0
        if self.save_strategy == "best":
            return self.eval_every(per_epoch, total)
        return _every(self.save_steps, self.saves_per_epoch, self.save_strategy or "epoch", per_epoch, total)


def _every(steps: float | None, times: int | None, strategy: str, per_epoch: int, total: int) -> int:
    if steps:
        return max(1, math.ceil(steps * total)) if steps < 1 else int(steps)
    if times:
        return max(1, per_epoch // times)
    return 500 if strategy == "steps" else max(1, per_epoch)


def load_run(path: Path | str, overrides: Sequence[str] = ()) -> Run:
    """Reads a configuration file; `overrides` are texts such as "learning_rate=1e-4"."""
    return make_run(read_document(path, overrides))


def parse_run(text: str, overrides: Sequence[str] = ()) -> Run:
    """The same from a text."""
    return make_run(parse_document(text, overrides))


def make_run(document: Document) -> Run:
    """Checks every key, then every value, then what goes together; whatever is wrong is said in one go."""
    values, ignored, problems = sort_keys(document, Run)
    run = None
    try:
        run = Run.model_validate(values)
    except ValidationError as error:
        # A mapping with an unknown key fits no type either; it has been told already.
        told_of = [place for place, _ in problems]
        problems += (p for p in wrong_values(error, document) if not any(place[: len(p[0])] == p[0] for place in told_of))
    if run is not None and not problems:
        written = {field: name for name, field in names_of(Run).items() if name in document.values}
        problems = [
            ((written.get(str(place[0]), place[0]), *place[1:]) if place else (), text) for place, text in conflicts(run)
        ]
    if problems or run is None:
        raise told(problems, document)
    run._ignored = ignored
    run._document = document
    return run


def ignored_keys(run: Run) -> dict[str, str]:
    """Keys that were given and are not needed: key -> reason."""
    ignored = dict(run._ignored)
    if run.adapter and run.lisa_n_layers:
        ignored["lisa_n_layers"] = "LISA is for full fine-tuning; under an adapter the base stays frozen"
    if run.adapter and run.unfrozen_parameters:
        ignored["unfrozen_parameters"] = "under an adapter the base stays frozen; lora_target_* say what is adapted"
    if run.trl is not None and not run.by_rewards:
        ignored["trl"] = "no method that reads it is switched on; rl: grpo is one"
    ignored |= told_of_vllm(run)
    if run.moved_by != run.optimizer:
        ignored["optimizer"] = "over sharded weights AdamW keeps its state in 32 bits, divided by the number of processes"
    if run.fsdp_version == 1:
        ignored["fsdp_version"] = "FSDP1's keys are read, and FSDP2 does what they ask for"
    for name in ("num_labels", "center_rewards_coefficient"):
        if getattr(run, name) and not (run.reward_model or (run.process_reward_model and name == "num_labels")):
            ignored[name] = "no method that reads it is switched on; reward_model: true is one"
    if run.optimizer.startswith("paged_"):
        ignored["optimizer"] = "its state is not paged to the host; see the memory estimate"
    if run.experts_implementation not in (None, run.experts):
        ignored["experts_implementation"] = "adapted and quantised experts are computed by one implementation on every device"
    return ignored


def as_yaml(run: Run) -> str:
    """The run as a configuration that gives the same run: every key that was set."""
    return dump(run.model_dump(mode="json", exclude_unset=True, exclude_none=True))
