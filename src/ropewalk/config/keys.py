"""The keys of a run, group by group: type, default, sentence. Names and meaning are Axolotl's, but for those that say Own."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field


def key(sentence: str, default: Any = None, **limits: Any) -> Any:
    """A field with its sentence; `limits` are pydantic's (gt, ge, le, alias)."""
    return Field(default, description=sentence, **limits)


def not_a_switch(value: Any) -> Any:
    if isinstance(value, bool):
        raise ValueError("expected a number, not true or false")
    return value


def giga_bytes(value: Any) -> Any:
    """24, 24GB and 24GiB in GB of 1e9 bytes."""
    found = re.fullmatch(r"\s*([\d.]+)\s*(GB|GiB|G)?\s*", value) if isinstance(value, str) else None
    if found is None:
        return not_a_switch(value)
    return float(found[1]) * (2**30 / 1e9 if found[2] == "GiB" else 1)


def one_or_more(value: Any) -> Any:
    return (value,) if isinstance(value, str | Mapping) else value


def _word(value: Any) -> Any:
    # YAML 1.1 reads a bare `no` as false.
    return "no" if value is False else value


def _off(value: Any) -> Any:
    # And a bare `off` too.
    return "off" if value is False else value


Count = Annotated[int, BeforeValidator(not_a_switch), Field(ge=0)]
Dropout = Annotated[float, BeforeValidator(not_a_switch), Field(ge=0, lt=1)]
AboveZero = Annotated[float, BeforeValidator(not_a_switch), Field(gt=0, allow_inf_nan=False)]
Positive = Annotated[int, BeforeValidator(not_a_switch), Field(gt=0)]
Number = Annotated[float, BeforeValidator(not_a_switch), Field(ge=0, allow_inf_nan=False)]
Share = Annotated[float, BeforeValidator(not_a_switch), Field(ge=0, le=1)]
GigaBytes = Annotated[float, BeforeValidator(lambda value: giga_bytes(value)), Field(gt=0, allow_inf_nan=False)]
Texts = Annotated[tuple[str, ...], BeforeValidator(one_or_more)]
Stream = Annotated[Literal["auto", "experts", "layers", "off"], BeforeValidator(_off)]
Moment = Annotated[Literal["no", "steps", "epoch", "best"], BeforeValidator(_word)]
Optimizer = Literal[
    "adamw_torch_fused",
    "adamw_torch",
    "adamw_hf",
    "adamw_8bit",
    "adamw_bnb_8bit",
    "adamw_torch_8bit",
    "paged_adamw_8bit",
    "adamw_torch_4bit",
    "paged_adamw_32bit",
    "adafactor",
    "sgd",
    "muon",
]
Trackers = Annotated[tuple[Literal["wandb", "tensorboard", "mlflow"], ...], BeforeValidator(one_or_more)]
Trained = Literal["all", "turn", "last", "none"]


class Group(BaseModel):
    """Frozen keys, of which none may be unknown."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", validate_by_name=True, validate_by_alias=True, protected_namespaces=()
    )


class PromptFormat(Group):
    """The mapping form of a data source's `type`: how columns become a prompt and its answer."""

    system_prompt: str | None = key("A fixed system text put before every prompt.")
    system_format: str | None = key("How the system text is written; {system} stands for it.")
    field_system: str | None = key("The column of the system text; default system.")
    field_instruction: str | None = key("The column of the instruction; default instruction.")
    field_input: str | None = key("The column of the further input; default input.")
    field_output: str | None = key("The column of the answer, which is trained; default output.")
    format: str | None = key("The prompt; {instruction} and {input} stand for the columns.")
    no_input_format: str | None = key("The prompt of a row whose input is empty; {instruction} stands for the column.")
    field_prompt: str | None = key("Preferences: the column of the prompt; default prompt.")
    field_chosen: str | None = key("Preferences: the column of the preferred answer; default chosen.")
    field_rejected: str | None = key("Preferences: the column of the other answer; default rejected.")
    field_completion: str | None = key("KTO: the column of the answer; default completion.")
    field_label: str | None = key("KTO: the column that says whether the answer is wanted; default label.")
    prompt_format: str | None = key("Preferences: the prompt; {prompt} and {system} stand for the columns.")
    chosen_format: str | None = key("Preferences: the preferred answer; {chosen} stands for the column.")
    rejected_format: str | None = key("Preferences: the other answer; {rejected} stands for the column.")
    completion_format: str | None = key("KTO: the answer; {completion} stands for the column.")


class DataSource(Group):
    """One entry of `datasets`, `test_datasets` or `pretraining_dataset`."""

    path: str = key("A file, a folder, a hub data set, or json, csv, parquet, text together with `data_files`.", ...)
    name: str | None = key("The configuration of a hub data set.")
    split: str | None = key("The split, with an optional slice such as train[:10%]; default train.")
    revision: str | None = key("The commit, tag or branch of a hub data set.")
    data_files: Texts | None = key("The files to read within `path`.")
    ds_type: str | None = key("What kind of file it is (json, csv, parquet, arrow, text), when the ending does not say.")
    type: str | PromptFormat | None = key(
        "The format of a row: chat_template, alpaca, completion, input_output, ... or a mapping; none: pre-tokenised."
    )
    shards: Positive | None = key("Cut the source into so many parts and use one.")
    shards_idx: Count | None = key("Which of the `shards` to use, from 0; default 0.")
    skip: Count | None = key("Leave out so many rows at the start.")
    chat_template: str | None = key("The chat template of this source alone; see the run's key of this name.")
    chat_template_jinja: str | None = key("A Jinja chat template, or the path of one, for this source alone.")
    field_messages: str | None = key("The column that holds the messages; default messages.")
    field_tools: str | None = key("The column that holds the tools; default tools.")
    field_thinking: str | None = key("The property of a message that holds its reasoning; default reasoning_content.")
    template_thinking_key: str | None = key("The name under which the chat template expects the reasoning.")
    split_thinking: bool | None = key(
        "Take reasoning written inside <think> tags out of the content, for templates that expect it apart."
    )
    message_field_role: str | None = key(
        "The property of a message that holds its role; the older form of message_property_mappings.role."
    )
    message_field_content: str | None = key(
        "The property that holds the content; the older form of message_property_mappings.content."
    )
    message_property_mappings: dict[str, str] | None = key("The template's property name -> the name in the data.")
    message_field_training: str | None = key("The property of a message that says whether it is trained.")
    message_field_training_detail: str | None = key("The property of a message that lists which characters of it are trained.")
    roles: dict[str, Texts] | None = key("The template's role -> the names it has in the data.")
    roles_to_train: Texts | None = key("The roles whose messages are trained; default assistant (all when train_on_inputs).")
    train_on_eos: Trained | None = key(
        "Which end-of-sequence tokens are trained: all, those of trained turns (turn, the default), last, none."
    )
    train_on_eot: Trained | None = key("Which end-of-turn tokens are trained; default as train_on_eos.")
    drop_system_message: bool | None = key("Leave out the system message of every conversation.")
    field: str | None = key("The column of the text of a completion source; default text.")
    text_column: str | None = key("The column of the text of a pre-training source; default text.")
    field_system: str | None = key("The column of the system text, for instruction formats.")
    field_instruction: str | None = key("The column of the instruction, for instruction formats.")
    field_input: str | None = key("The column of the further input, for instruction formats.")
    field_output: str | None = key("The column of the answer, for instruction formats.")
    field_prompt: str | None = key("The column of the prompt, for preferences and rewards; default: what the format says.")
    field_chosen: str | None = key("The column of the preferred answer: a text, a message, or messages; default chosen.")
    field_rejected: str | None = key("The column of the other answer; default rejected.")
    field_completion: str | None = key("KTO: the column of the answer; default completion.")
    field_label: str | None = key("KTO: the column that says whether the answer is wanted; default label.")
    step_separator: str | None = key(
        "stepwise_supervised: what ends every step, whose last token is where it is scored; default: a line's end."
    )
    max_completion_length: Positive | None = key("stepwise_supervised: cut the steps of a row to so many tokens.")
    train_on_last_step_only: bool = key("stepwise_supervised: only the last step of a row is scored.", False)


class SpecialTokens(Group):
    """Special tokens to set; a token the tokenizer does not have is added."""

    bos_token: str | None = key("Begin of sequence.")
    eos_token: str | None = key("End of sequence.")
    pad_token: str | None = key("Padding.")
    unk_token: str | None = key("Unknown.")
    additional_special_tokens: Texts | None = key("Further special tokens.")


class ModelKeys(Group):
    """The base model"""

    base_model: str = key("The base: a folder, or a name on the hub.", ..., min_length=1)
    revision_of_model: str | None = key("The commit, tag or branch of a base on the hub.", alias="model_revision")
    trust_remote_code: bool = key(
        "Axolotl's consent to Python code that comes with the base; here --trust-remote-code on the command line gives it.",
        False,
    )
    tokenizer_config: str | None = key("A folder or hub name to take the tokenizer from; default base_model.")
    processor_type: Annotated[Literal["AutoProcessor"] | None, BeforeValidator(lambda value: value or None)] = key(
        "Train on pictures too: the whole of a base that sees is loaded, and all of it but its text part stays as it is."
    )
    overrides_of_model_config: dict[str, Any] | None = key(
        "Values laid over the base's config.json; output_router_logits: true adds the routers' load-balancing loss.",
        alias="model_config",
    )
    reinit_weights: bool = key("Begin from new random weights of this shape, to train a model from nothing.", False)
    load_in_4bit: bool = key("Hold the frozen base in 4 bits, experts included; see bnb_4bit_quant_type.", False)
    load_in_8bit: bool = key("Hold the frozen base as 8-bit integers, experts included.", False)
    bf16: bool | Literal["auto"] | None = key("Compute in bfloat16; auto, the default: where the device does, else float32.")
    bfloat16: bool | None = key("Another name for bf16.")
    fp16: bool | None = key("Half precision: only false is accepted; bf16 has its speed without its overflow.")
    float16: bool | None = key("As fp16.")
    float32: bool | None = key("Compute in float32, even where the device does bfloat16.")
    tf32: bool | Literal["auto"] | None = key("Let float32 products use TF32 on a GPU; default off.")
    attn_implementation: str | None = key(
        "sdpa, eager, flash_attention_2 or _3, flex_attention, or a hub kernel; default: the best that is there."
    )
    flash_attention: bool | None = key("The older form of attn_implementation: flash_attention_2.")
    sdp_attention: bool | None = key("The older form of attn_implementation: sdpa.")
    flex_attention: bool | None = key("The older form of attn_implementation: flex_attention.")
    eager_attention: bool | None = key("The older form of attn_implementation: eager.")
    experts_implementation: str | None = key(
        "ropewalk (the default; scattermoe and sonicmoe mean it too), or transformers' eager, grouped_mm, batched_mm."
    )


class AdapterKeys(Group):
    """What is trained"""

    adapter: Literal["lora", "qlora"] | None = key("lora; qlora: the same over a 4-bit base; none: every weight is trained.")
    lora_model_dir: str | None = key("An adapter to go on from.")
    lora_r: Positive | None = key("Rank of the adapter; default 16.")
    lora_alpha: Number | None = key("Scale of the adapter: its output is multiplied by alpha / r; default 2 r.")
    lora_dropout: Dropout = key("Dropout before the adapter of linear layers.", 0.0)
    lora_target_modules: str | tuple[str, ...] | None = key(
        "Names of linear layers, or one regular expression over full names; default all linear ones."
    )
    lora_target_linear: bool | None = key("All linear layers but the output head; the default when no other target is given.")
    lora_target_parameters: Texts | None = key(
        "Names of expert parameters, such as experts.gate_up_proj; default: all experts, see lora_experts."
    )
    lora_experts: bool = key("Own: adapt the experts of a mixture too, unless lora_target_parameters names some itself.", True)
    lora_modules_to_save: Texts | None = key(
        "Modules trained whole and saved beside the adapter, such as embed_tokens and lm_head."
    )
    lora_rank_pattern: dict[str, Positive] | None = key(
        "Pattern over full names -> rank, such as {'experts.*': 4}; the rest has lora_r."
    )
    lora_alpha_pattern: dict[str, Number] | None = key("Pattern over full names -> alpha; the rest has lora_alpha.")
    peft_use_dora: bool = key("DoRA: learn magnitudes apart from directions, on linear layers.", False)
    peft_use_rslora: bool = key("Rank-stabilised LoRA: scale by alpha / sqrt(r).", False)
    peft_layers_to_transform: tuple[Count, ...] | None = key("Numbers of the decoder layers to adapt; default all.")
    loraplus_lr_ratio: Number | None = key("LoRA+: the B factors learn so many times faster than the A factors; 16 is usual.")
    loraplus_lr_embedding: Number = key("LoRA+: learning rate of adapted embeddings.", 1e-6)
    alora_invocation_tokens: tuple[Count, ...] | None = key(
        "Own: activated LoRA; the adapter acts only from the last such run of token ids on."
    )
    lisa_n_layers: Positive | None = key("LISA, without an adapter: so many decoder layers learn at a time, the others rest.")
    lisa_step_interval: Positive = key("LISA: draw the layers anew every so many steps.", 20)
    lisa_layers_attribute: str = key("LISA: where the decoder layers are.", "model.layers")
    unfrozen_parameters: Texts | None = key(
        "Without an adapter: train only parameters whose name matches one of these expressions."
    )


class DataKeys(Group):
    """Data"""

    datasets: tuple[DataSource, ...] | None = key("What to train on.", min_length=1)
    test_datasets: tuple[DataSource, ...] | None = key("What to evaluate on; instead of val_set_size.", min_length=1)
    pretraining_dataset: Annotated[tuple[DataSource, ...], BeforeValidator(one_or_more)] | None = key(
        "Plain text to train on, streamed."
    )
    val_set_size: Number = key("Set aside for evaluation: a share of the rows below 1, else a number of rows.", 0.0)
    dataset_prepared_path: str | None = key("Folder for tokenised data; default: in Ropewalk's own cache.")
    dataset_num_proc: Positive | None = key("Processes that tokenise; default one per core.", alias="dataset_processes")
    dataset_exact_deduplication: bool = key("Leave out rows that equal an earlier one.", False)
    shuffle_merged_datasets: bool = key("Shuffle the rows of all sources together; off: keep their order.", True)
    shuffle_before_merging_datasets: bool = key("Shuffle each source before they are joined.", False)
    streaming: bool = key("Read rows while training instead of tokenising them all first; needs max_steps.", False)
    streaming_multipack_buffer_size: Positive = key("Rows held at once for packing when streaming.", 10_000)
    on_bad_row: Literal["error", "skip"] = key(
        "Own: a row that cannot be used stops the run, or is counted, listed and left out.", "error"
    )
    chat_template: str | None = key(
        "tokenizer_default, jinja, or the name of a model family's template; default: the base's own."
    )
    chat_template_jinja: str | None = key("A Jinja chat template, or the path of one.")
    chat_template_kwargs: dict[str, Any] | None = key("Further variables for the chat template, such as enable_thinking.")
    default_system_message: str | None = key("The system message of conversations that have none.")
    special_tokens: SpecialTokens | None = key("Special tokens to set or add.")
    tokens: Texts | None = key("Tokens to add to the vocabulary.")
    eot_tokens: Texts | None = key("Tokens that end a turn, where the end-of-sequence token is not the one.")
    train_on_inputs: bool = key("Train prompts too, not only answers.", False)
    sequence_len: Positive = key("The most tokens of a row; with packing, of a packed row.", 512)
    eval_sequence_len: Positive | None = key("The same for evaluation; default sequence_len.")
    excess_length_strategy: Literal["drop", "truncate", "raise"] = key("What becomes of longer rows.", "drop")
    min_sample_len: Count | None = key("Leave out rows of fewer tokens; default 2.")
    sample_packing: bool | None = key("Lay several rows into one of sequence_len tokens, without attention across them.")
    eval_sample_packing: bool | None = key("The same for evaluation; default as sample_packing.")
    sample_packing_sequentially: bool = key("Pack rows in their order instead of by best fit.", False)
    pad_to_sequence_len: bool | None = key("Fill every row up to sequence_len; default as sample_packing.")
    pad_to_multiple_of: Positive | None = key("Fill rows up to a multiple of so many tokens.")
    curriculum_sampling: bool = key("Take rows in their order instead of shuffled.", False)
    group_by_length: bool = key("Without packing: put rows of like length into one batch.", False)


class TrainingKeys(Group):
    """Training"""

    micro_batch_size: Positive = key("Rows (packed ones, with packing) per process and forward pass.", 1)
    eval_batch_size: Positive | None = key("The same for evaluation; default micro_batch_size.")
    gradient_accumulation_steps: Positive | None = key("Forward passes per optimizer step; default 1.")
    batch_size: Positive | None = key("Instead of gradient_accumulation_steps: rows per process and optimizer step.")
    num_epochs: AboveZero = key("Passes over the data; may be a fraction.", 1.0)
    max_steps: Positive | None = key("Stop after so many optimizer steps.")
    learning_rate: AboveZero = key("The highest learning rate.", ...)
    lr_scheduler: Literal["cosine", "linear", "constant", "constant_with_warmup", "warmup_stable_decay", "wsd", "rex"] = key(
        "How the rate goes on after warm-up; wsd is warmup_stable_decay.", "cosine"
    )
    warmup_steps: Number | None = key("Steps in which the rate rises; below 1: that share of all steps, as in transformers 5.")
    warmup_ratio: Share | None = key("The same as a share of all steps; default 3 % and at most 100 steps.")
    cosine_min_lr_ratio: Share | None = key("The share of the highest rate that cosine and rex end at; default 0.")
    cosine_constant_lr_ratio: Share | None = key("Cosine reaches its lowest rate at this share of the steps and stays there.")
    optimizer: Optimizer = key(
        "The optimizer. 8-bit AdamW, by any of its names, quantises its moments in blocks of 256 (arXiv 2110.02861); adamw_torch_8bit is "
        "torchao's on a GPU where that is installed, adamw_torch_4bit always.",
        "adamw_torch_fused",
    )
    weight_decay: Number = key("Decoupled weight decay.", 0.0)
    adam_beta1: Share = key("AdamW's first decay.", 0.9)
    adam_beta2: Share = key("AdamW's second decay.", 0.999)
    adam_epsilon: Number = key("AdamW's epsilon.", 1e-8)
    max_grad_norm: Number = key("Gradients are scaled down to this norm; 0: never.", 1.0)
    gradient_checkpointing: bool | Literal["offload", "experts", "auto"] = key(
        "Keep only the inputs of layers and compute the rest again; offload: keep them on the host. Own: experts computes only "
        "those again, auto chooses layer by layer so that the memory there is gets filled.",
        False,
    )
    gpu_memory_limit: GigaBytes | None = key(
        "Plan for a GPU with so much memory, a number of GB or as in 24GiB, and take no more of it; default: all there is."
    )
    stream_weights: Stream = key(
        "Own: frozen weights of decoder layers wait in the host's memory and come to the GPU layer by layer: experts, or whole "
        "layers; auto: where the run does not fit otherwise, as much as makes it fit.",
        "auto",
    )
    layer_offloading: bool = key("Axolotl's name for stream_weights: layers.", False)
    activation_offloading: bool | Literal["legacy", "hidden_states"] | None = key(
        "The same as gradient_checkpointing: offload."
    )
    seed: Count = key("Seed of everything random.", 42)
    num_threads: Positive | None = key("Own: threads of the CPU; default: OMP_NUM_THREADS, else half of the cores it may use.")


class OutputKeys(Group):
    """Evaluation, saving and logging"""

    output_dir: str = key("Where adapter, checkpoints, events and plots go.", "./model-out")
    logging_steps: Positive | None = key(
        "Outside a terminal, print a line every so many steps; default every step. events.jsonl holds them all."
    )
    eval_strategy: Moment | None = key("no, steps or epoch; default from the keys below.", alias="evaluation_strategy")
    eval_steps: Number | None = key("Evaluate every so many steps, or below 1: share of all steps.")
    evals_per_epoch: Count | None = key("Evaluate so many times per epoch.")
    save_strategy: Moment | None = key("no, steps, epoch or best; default from the keys below, else epoch.")
    save_steps: Number | None = key("Write a checkpoint every so many steps, or below 1: share of all steps.")
    saves_per_epoch: Count | None = key("Write so many checkpoints per epoch.")
    save_total_limit: Positive = key("Keep so many checkpoints.", 4)
    save_first_step: bool = key("Write a checkpoint after the first step, to see that it can be done.", False)
    save_only_model: bool = key("Checkpoints without optimizer state, which cannot be resumed.", False)
    early_stopping_patience: Positive | None = key("Stop when so many evaluations in a row bring nothing better.")
    load_best_model_at_end: bool = key("End with the weights of the best evaluation.", False)
    metric_for_best_model: str | None = key("What is compared: eval_loss, the default.")
    greater_is_better: bool | None = key("Whether more of it is better; default: not for a loss.")
    loss_watchdog_threshold: Number | None = key("Stop when the loss lies above this,")
    loss_watchdog_patience: Positive | None = key("so many times in a row; default 3.")
    resume: bool = key("Own: go on by itself when output_dir holds an unfinished run of the same configuration.", True)
    resume_from_checkpoint: str | None = key("Go on from this checkpoint.")
    auto_resume_from_checkpoints: bool | None = key("Axolotl's name for resume.")
    report_to: Trackers | None = key("Also send events there.")
    use_wandb: bool | None = key("Report to Weights & Biases; also on when wandb_project is set.")
    wandb_project: str | None = key("The project there.")
    wandb_entity: str | None = key("Its owner there.")
    wandb_name: str | None = key("The name of the run there.")
    wandb_run_id: str | None = key("The id of the run there.")
    wandb_mode: str | None = key("online, offline or disabled.")
    use_tensorboard: bool | None = key("Report to TensorBoard, below output_dir.")
    use_mlflow: bool | None = key("Report to MLflow; also on when mlflow_experiment_name is set.")
    mlflow_tracking_uri: str | None = key("Where its server is.")
    mlflow_experiment_name: str | None = key("The experiment there.")
    mlflow_run_name: str | None = key("The name of the run there.")
    hub_model_id: str | None = key("Upload the result to this hub repository, as a private one.")
    hub_revision: str | None = key("The branch to upload to.")
