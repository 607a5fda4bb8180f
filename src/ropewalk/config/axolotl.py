"""Axolotl's other keys, each known by name: not needed here and why, or not offered and what to do instead. No torch.

A key that has an effect is in keys.py. One of these that is switched off (false, null, empty, a size of one) asks for nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

# reason -> keys. The result of the run is the same without them.
_IGNORED = {
    "losses are computed in chunks in every run, so logits never exist whole": """
        cut_cross_entropy chunked_cross_entropy chunked_cross_entropy_num_chunks flash_attn_cross_entropy
        liger_cross_entropy liger_fused_linear_cross_entropy
    """,
    "a fused kernel with the same result; kernels are chosen by measurement here": """
        liger_rope liger_rms_norm liger_rms_norm_gated liger_layer_norm liger_swiglu liger_glu_activation
        flash_attn_fuse_mlp fused_attn_kernel lora_mlp_kernel lora_qkv_kernel lora_o_kernel lora_embedding_kernel tiled_mlp
        tiled_mlp_num_shards tiled_mlp_use_original_mlp use_kernels flash_optimum flash_attn_d512 large_head_attention
        sdpa_varlen gemma4_hybrid_attn_impl flex_attn_compile_kwargs
    """,
    "experts and their adapter are computed by one implementation on every device": """
        use_scattermoe use_sonicmoe expert_backend moe_grouped_backend moe_dequant_chunk_size moe_bnb_fast
    """,
    "experts are quantised together with the rest of the base": "quantize_moe_experts",
    "the original checkpoint is read as it is": "llama4_linearized_experts",
    "losses and norms are computed in float32 where it matters": "fp32_norms fp32_norm_classes",
    "a quantised base is sharded as any other": "qlora_sharded_model_loading",
    "the adapter and every checkpoint are written whole": "fsdp_final_state_dict_type",
    "processes are started by torchrun or --processes, and find each other": """
        ddp ddp_bucket_cap_mb ddp_broadcast_buffers ddp_find_unused_parameters accelerator_config local_rank world_size
    """,
    "on Ray a run is called by its output_dir": "ray_run_name",
    "the model goes to the device of its process": "device device_map low_cpu_mem_usage experimental_skip_move_to_device",
    "the class is found from the base's config.json": """
        model_type tokenizer_type cls_model_config tokenizer_use_fast tokenizer_legacy is_falcon_derived_model
        is_llama_derived_model is_mistral_derived_model is_qwen_derived_model type_of_model
    """,
    "the tokenizer.json of the base is used, which gives the same tokens": """
        tokenizer_use_mistral_common tokenizer_save_jinja_files
    """,
    "4-bit bases are always double-quantised here and compute in the run's dtype": "bnb_config_kwargs",
    "all of a model but its text part always stays frozen": "freeze_mm_modules",
    "embeddings stay in the type that they are read in": "embeddings_skip_upcast",
    "tied weights stay tied": "peft_ensure_weight_tying",
    "embeddings grow by exactly the tokens that are added": "resize_token_embeddings_to_32x mean_resizing_embeddings",
    "the model runs uncompiled, with the same result": """
        deepcompile torch_compile torch_compile_backend torch_compile_mode torch_compile_options
    """,
    "found from the layer": "lora_fan_in_fan_out",
    "adapters are merged afterwards, by `ropewalk merge`": "merge_lora merge_method lora_on_cpu",
    "recomputation keeps its routing and needs no reentrant form": """
        gradient_checkpointing_kwargs selective_checkpointing
    """,
    "batches are read from a memory-mapped cache; there is no loader to tune": """
        dataloader_pin_memory dataloader_num_workers dataloader_prefetch_factor remove_unused_columns dataset_keep_in_memory
        num_dataset_shards_to_save skip_prepare_dataset sample_packing_mp_start_method preprocess_iterable
    """,
    "packing looks at all rows at once and needs no knob": """
        sample_packing_group_size sample_packing_bin_size sample_packing_eff_est multipack_real_batches batch_flattening
        pretrain_multipack_buffer_size pretraining_sample_concatenation
    """,
    "packed rows never attend across samples here": "pretrain_multipack_attn",
    "counted from the data": "total_num_tokens total_supervised_tokens",
    "the token of the hub's own login is used where there is one": "hf_use_auth_token",
    "a run writes safetensors, and only those": "save_safetensors",
    "the result is uploaded once, at the end": "hub_strategy",
    "tokens per second and memory are in every event": """
        include_tokens_per_second include_tkps profiler_steps profiler_steps_start gc_steps gc_collect_steps
        torch_empty_cache_steps
    """,
    "events are written to events.jsonl; report_to sends them to wandb, tensorboard or mlflow": """
        use_comet comet_api_key comet_workspace comet_project_name comet_experiment_key comet_mode comet_online
        comet_experiment_config use_trackio trackio_project_name trackio_run_name trackio_space_id use_otel_metrics
        otel_metrics_host otel_metrics_port use_swanlab swanlab_project swanlab_experiment_name swanlab_description
        swanlab_mode swanlab_workspace swanlab_api_key swanlab_log_model swanlab_web_host swanlab_api_host
        swanlab_lark_webhook_url swanlab_lark_secret swanlab_log_completions swanlab_completion_log_interval
        swanlab_completion_max_buffer wandb_watch wandb_log_model hf_mlflow_log_artifacts
    """,
    "an evaluation here is a loss; generated answers are compared by `ropewalk compare`": """
        eval_table_size eval_max_new_tokens generate_samples num_generation_samples generation_max_new_tokens
        generation_temperature generation_top_p generation_top_k generation_prompt_ratio generation_do_sample
        do_causal_lm_eval eval_causal_lm_metrics do_bench_eval bench_dataset bench_split lm_eval_tasks lm_eval_batch_size
        lm_eval_post_train lm_eval_model
    """,
    "checkpoints are written atomically, and a stopped run goes on by itself": "dynamic_checkpoint",
    "the base's log-probabilities come from the same model with its adapter switched off, where they are needed": """
        precompute_ref_log_probs dpo_generate_during_eval
    """,
    "log-probabilities are computed in chunks over packed tokens in every run": """
        dpo_use_liger_kernel dpo_padding_free dpo_use_logits_to_keep
    """,
    "a server is started by `vllm serve` with options of its own; trl.vllm_server_host and _port say where it is": "vllm",
    "unknown keys are always errors here": "strict",
    "of Axolotl's own inner workings": """
        is_preprocess axolotl_config_path torchdistx_path debug gradio_title gradio_share gradio_server_name
        gradio_server_port gradio_max_new_tokens gradio_temperature
    """,
    "no method that reads it is switched on": """
        ebft max_prompt_len eaft_alpha eaft_k jagged_restart_warmup_steps
        jagged_restart_anneal_steps relora_prune_ratio relora_prune_method relora_cpu_offload adam_epsilon2
        adam_beta3 dion_lr dion_momentum dion_rank_fraction dion_rank_multiple_of
        qgalore_rank qgalore_update_proj_gap qgalore_scale qgalore_proj_type qgalore_proj_quant qgalore_proj_bits
        qgalore_proj_group_size qgalore_cos_threshold qgalore_gamma_proj qgalore_queue_size pose_split_on_token_ids
        pose_max_context_len pose_num_chunks scaling_softmax_factor scaling_softmax_bias fp8_enable_fsdp_float8_all_gather
        nvfp4_merge_aware_start_step role_boundaries
        liger_use_token_scaling model_quantization_config_kwargs grokfast_lamb spectrum_model_name lr_div_factor
        optim_target_modules heads_k_stride ring_attn_func expert_parallel_backend expert_parallel_num_nvl_bytes
        expert_parallel_num_rdma_bytes expert_parallel_token_capacity expert_parallel_fallback_on_unsupported
        kd_ce_alpha kd_alpha kd_temperature kd_beta kd_normalize_topk kd_online_topk
        kd_online_server kd_online_timeout kd_temperature_min
    """,
}

# way out -> keys. The run would differ from what was asked for.
_REFUSED = {
    "pictures are shown as the base's own processor shows them, the same as when they are served; remove it": """
        image_size image_resize_algorithm processor_kwargs
    """,
    (
        "weights are not compressed while they are trained; train plainly, `ropewalk merge`, and compress the merged checkpoint with "
        "llm-compressor"
    ): "llmcompressor",
    (
        "the result is not quantised here; `ropewalk merge`, and quantise the merged checkpoint with torchao or llm-compressor (qat trains "
        "for it)"
    ): "quantization",
    "GPTQ bases are not supported; name the original checkpoint and write adapter: qlora": "gptq gptq_disable_exllama",
    "FP8 compute is not supported yet; write bf16: true": "fp8",
    "NVFP4 and FP8 bases are not supported yet; name the original checkpoint and write adapter: qlora": """
        nvfp4_merge_aware use_dsv4_kernels use_glm_dsa_kernels dsv4_fp8_nonexpert_mode dsv4_fp8_lora_kernel dsv4_bf16_all
        dsv4_shared_mlp_lora_kernel dsv4_fp4_grouped_mode gemma4_fp8_nonexpert gemma4_nf4_nonexpert nonexpert_quantization
    """,
    "ReLoRA is not supported; raise lora_r, or train every weight without an adapter": "relora jagged_restart_steps",
    "MoRA is not supported; use adapter: lora, with peft_use_rslora for high ranks": "mora",
    "this initialisation is not supported; leave it out, and the adapter starts as the untouched base": """
        peft peft_init_lora_weights peft_layers_pattern peft_layer_replication peft_trainable_token_indices
    """,
    "this form of DPO is not supported; rl: ipo, simpo or orpo compare means over tokens": "dpo_use_weighting dpo_norm_loss",
    "Spectrum's choice of layers is not supported; list them in unfrozen_parameters": "spectrum_top_fraction",
    "this loss is not supported; remove it for the usual cross entropy": "use_eaft neftune_noise_alpha noisy_embedding_alpha",
    "diffusion language models are not supported": "diffusion",
    (
        "a teacher's probabilities are not learnt from; train on text that the teacher wrote (have it answer over /v1/messages/batches)"
    ): "kd_trainer kd_online_server_base_url",
    (
        "rows are not split over devices (context parallelism); write gradient_checkpointing: offload, or fsdp_version: 2, or a lower "
        "sequence_len"
    ): "context_parallel_size sequence_parallel_degree",
    (
        "layers are not split over devices (tensor parallelism); fsdp_version: 2 shards the same weights, and vLLM splits what is served"
    ): "tensor_parallel_size",
    "training through a remote service is not supported": "hatchery",
    "NeMo Gym is not supported": """
        nemo_gym_enabled nemo_gym_dir nemo_gym_auto_clone nemo_gym_config_paths nemo_gym_head_port nemo_gym_server_timeout
        nemo_gym_verify_timeout nemo_gym_run_timeout nemo_gym_datasets nemo_gym_auto_start nemo_gym_model_name
        nemo_gym_multi_turn nemo_gym_max_turns
    """,
    "Grokfast is not supported; remove it": "grokfast_alpha",
    (
        "training every expert through a dense pass is not supported; experts get exact gradients for the tokens routed to them"
    ): "dense_mixer",
    "the configuration is read from base_model; lay values over it with overrides_of_model_config": """
        base_model_config rope_scaling overrides_of_model_kwargs
    """,
    "this quantisation of the base is not supported; leave it out, or name a plain checkpoint": "model_quantization_config",
    "attention of this kind is not supported; remove it, and sdpa or flash_attention_2 is used": """
        xformers_attention sage_attention s2_attention scaling_softmax use_pose flash_attn_rms_norm
    """,
    "one learning rate for all parameters but LoRA+'s; use loraplus_lr_ratio, or remove it": """
        lr_groups embedding_lr embedding_lr_scale
    """,
    "further arguments are not passed on; the optimizer's keys are adam_beta1, adam_beta2, adam_epsilon, weight_decay": """
        optim_args
    """,
    (
        "further arguments are not passed on; the schedule's keys are warmup_*, cosine_min_lr_ratio, cosine_constant_lr_ratio"
    ): "lr_scheduler_kwargs lr_quadratic_warmup",
    "the size of a batch is not searched for; `ropewalk check` estimates the memory": """
        auto_find_batch_size max_memory
    """,
    "the vocabulary can only grow; use tokens": "shrink_embeddings added_tokens_overrides fix_untrained_tokens",
    "the trainer cannot be exchanged": "trainer_cls",
    "write bf16: true, bf16: auto or float32: true": "torch_dtype",
    "a share of a source is taken with shards and shards_idx of its entry in datasets": "dataset_shard_num dataset_shard_idx",
    "prepared data is not uploaded": "push_dataset_to_hub",
    "write sequence_len and sample_packing": "max_packed_sequence_len",
    "without an adapter every weight is trained: remove this key and leave adapter out": "full_finetune",
    "a batch that is not full is trained as it is; remove it": "dataloader_drop_last",
}

# Entries of `plugins`, by the last part of their name.
_PLUGINS = {
    "CutCrossEntropyPlugin": "",
    "LigerPlugin": "",
    "KernelsPlugin": "",
    "ExpertParallelPlugin": "",  # its keys say whether it is to do anything
    "SwanLabPlugin": "",
    "LMEvalPlugin": "",
    "SpectrumPlugin": "",
    "DiffusionPlugin": "diffusion language models are not supported",
    "LLMCompressorPlugin": "weights are not compressed while they are trained; compress the merged checkpoint with llm-compressor",
    "KDPlugin": "distillation is not supported; train on text that the teacher wrote",
    "GrokfastPlugin": "Grokfast is not supported",
    "DenseMixerPlugin": "the dense pass over experts is not supported",
    "HatcheryPlugin": "training through a remote service is not supported",
    "NemoGymPlugin": "NeMo Gym is not supported",
    "MoraPlugin": "MoRA is not supported",
}

# The keys of nested blocks, so that a misspelt one is found there too. What a block does not list here takes any key.
_BLOCKS = {
    "gradient_checkpointing_kwargs": "use_reentrant preserve_rng_state",
    "selective_checkpointing": "save save_sliding_window recompute_layer_types offload",
    "bnb_config_kwargs": """
        load_in_4bit load_in_8bit bnb_4bit_use_double_quant bnb_4bit_quant_type bnb_4bit_compute_dtype
        bnb_4bit_quant_storage llm_int8_threshold llm_int8_skip_modules llm_int8_enable_fp32_cpu_offload
        llm_int8_has_fp16_weight
    """,
    "dynamic_checkpoint": "enabled check_interval trigger_file_path",
    "quantization": "weight_dtype activation_dtype quantize_embedding group_size",
    "peft": "loftq_config",
    "mora": "use_mora mora_type",
    "vllm": """
        device tensor_parallel_size data_parallel_size gpu_memory_utilization dtype max_model_len enable_prefix_caching host
        port enable_reasoning reasoning_parser enforce_eager serve_module worker_extension_cls
    """,
    "ebft": """
        feature_layers embed_method use_whitening alignment_coef diversity_coef ce_coef adaptive_max_tokens
        gt_length_multiplier mode stride context_length generate_max_len n_samples_per_prompt temperature top_p rl_coef
        advantage_estimator min_completion_prefix
    """,
    "diffusion": """
        noise_schedule min_mask_ratio max_mask_ratio num_diffusion_steps eps importance_weighting mask_token_id
        mask_token_str generate_samples generation_interval num_generation_samples generation_steps generation_temperature
        generation_max_length
    """,
    "hatchery": """
        backend base_url api_key project_id lora_rank train_attn train_mlp train_unembed loss_fn loss_fn_config pipeline
        max_sample_tokens sample_temperature num_samples reward_funcs save_steps save_name_prefix future_timeout
    """,
    "llmcompressor": "recipe save_compressed",
}

# Keys of the block `trl` that have no field in reinforcement.py: reason -> keys.
_IN_TRL = {
    "completions are generated by the trainer's own engine": """
        use_data_producer streaming_partial_batch streaming_min_groups
    """,
    "an adapter is published after every step, and never the whole weights": "vllm_sync_interval vllm_lora_sync",
    "a server keeps its memory while the trainer steps, since both work at once": "vllm_enable_sleep_mode",
    "the difference to the sampler is corrected as trl.correction and trl.correction_weight say": """
        vllm_importance_sampling_correction vllm_importance_sampling_mode vllm_importance_sampling_cap
    """,
    "losses are computed in chunks in every run": "use_liger_loss",
    "a table of samples is part of every run": "log_completions num_completions_to_print",
    "groups whose rewards are all equal teach nothing, and are always left out": "skip_zero_advantage_batches",
}
_REFUSED_IN_TRL = {
    "completions are generated by the trainer's own engine alone; remove it": "rollout_func",
    "it would make the probabilities of the sampler differ from those of the model; remove it": "repetition_penalty",
    "not supported; remove it": """
        vllm_guided_decoding_regex generation_kwargs sync_ref_model ref_model_mixup_alpha ref_model_sync_steps
        use_bias_correction_kl replay_buffer_size replay_recompute_logps reroll_start_fraction
        reroll_max_groups
    """,
    "write it at the top of the configuration": "chat_template_kwargs",
}

# Keys of the block `fsdp_config` that have no field in parallel.py: reason -> keys.
_IN_FSDP = {
    "every decoder layer is sharded by itself, and what is around them together": """
        auto_wrap_policy transformer_layer_cls_to_wrap min_num_params
    """,
    "the adapter and every checkpoint are written whole": "state_dict_type final_state_dict_type",
    "FSDP2 needs none of it": """
        version fsdp_version use_orig_params sync_module_states limit_all_gathers backward_prefetch forward_prefetch
        cpu_offload_pin_memory
    """,
    "a process keeps its part of what it reads and no more": "cpu_ram_efficient_loading",
    "the dtype is chosen by bf16, and gradients are added up in float32": "mixed_precision_policy",
}

# Keys of a data source that are Axolotl's and have no effect here that was asked for.
_OF_SOURCES = {
    "this belongs into the mapping of type": "prompt_format chosen_format rejected_format completion_format",
    "a teacher's probabilities are not learnt from; leave this out, and train on the text that the teacher wrote": """
        logprobs_field temperature
    """,
    "synthetic rows are not made here; name real ones": "length sequence_length min_input_id max_input_id seed",
    "this form is no longer used; write type: chat_template with field_messages and message_property_mappings": """
        conversation field_human field_model
    """,
    "rows are not transformed by code; write them in one of the formats": "input_transform input_format",
    "tokenising goes in pieces by itself; remove it": "preprocess_shards",
    "code of data sets is never run; use one that is plain files": "trust_remote_code",
}

_SIZES = frozenset(
    [
        "context_parallel_size",
        "sequence_parallel_degree",
        "tensor_parallel_size",
    ]
)


def _by_key(table: dict[str, str]) -> dict[str, str]:
    return {key: reason for reason, keys in table.items() for key in keys.split()}


IGNORED = _by_key(_IGNORED)
REFUSED = _by_key(_REFUSED)
SOURCE_KEYS = _by_key(_OF_SOURCES)
IGNORED_IN_TRL = _by_key(_IN_TRL)
IGNORED_IN_FSDP = _by_key(_IN_FSDP)
REFUSED_IN_TRL = _by_key(_REFUSED_IN_TRL)
# Values of `rl` that are Axolotl's and not ours.
REFUSED_METHODS = {"ebft": "energy-based fine-tuning is not supported; train on the answers as chat_template, or with rl: orpo"}
REFUSED_LOSSES = {
    "luspo": "luspo is not supported; the nearest is loss_type: dapo with importance_sampling_level: sequence, whose ratios are of whole "
    "completions too, each counting by its length (loss_type: gspo counts all alike)",
    "sapo": "sapo is not supported; the nearest is loss_type: cispo, which bounds a token's weight and leaves none out, where sapo lets it "
    "fall off softly",
}
# Misspelt or of another tool, seen in real configurations, and too far from the right name to be found by likeness.
MEANT = {"eta_min": "cosine_min_lr_ratio", "min_lr": "cosine_min_lr_ratio", "lora_target_linear_modules": "lora_target_modules"}
KEYS = frozenset([*IGNORED, *REFUSED, "plugins"])


@dataclass(frozen=True)
class Answer:
    """What becomes of a key that has no effect here; an empty reason: it asked for nothing."""

    reason: str
    refused: bool = False


def answer(name: str, value: Any) -> Answer | None:
    """The answer to one of Axolotl's keys; None: it is not one."""
    if name not in KEYS:
        return None
    if _is_off(name, value):
        return Answer("")
    if name == "plugins":
        return _plugins(value)
    special = _by_value(name, value)
    if special is not None:
        return special
    return Answer(REFUSED[name], refused=True) if name in REFUSED else Answer(IGNORED[name])


def refused_value(name: str, value: Any) -> str:
    """Why a value of a key of ours, which Axolotl has, is not supported."""
    return REFUSED_METHODS.get(value, "") if name == "rl" and isinstance(value, str) else ""


def sort_trl(value: Any) -> tuple[Any, dict[str, str], dict[str, str]]:
    """The block `trl` without the keys that are not needed; those, and those that are refused, with their reasons."""
    if not isinstance(value, dict):
        return value, {}, {}
    asked = {key for key, found in value.items() if not (found is None or found is False)}
    neutral = {"repetition_penalty"} if value.get("repetition_penalty") == 1 else set()
    ignored = {key: IGNORED_IN_TRL[key] for key in value if key in IGNORED_IN_TRL}
    refused = {key: REFUSED_IN_TRL[key] for key in value if key in REFUSED_IN_TRL and key in asked - neutral}
    kept = {key: found for key, found in value.items() if key not in IGNORED_IN_TRL and key not in REFUSED_IN_TRL}
    if isinstance(loss := kept.get("loss_type"), str) and loss in REFUSED_LOSSES:
        refused["loss_type"] = REFUSED_LOSSES[kept.pop("loss_type")]
    return kept, ignored, refused


def sort_fsdp(value: Any) -> tuple[Any, dict[str, str]]:
    """The block `fsdp_config` without the prefix that its keys may have and without those that are not needed; those, with reasons."""
    if not isinstance(value, dict) or not value:
        return value or None, {}
    plain = {key if key == "fsdp_version" else str(key).removeprefix("fsdp_"): found for key, found in value.items()}
    ignored = {key: IGNORED_IN_FSDP[key] for key in plain if key in IGNORED_IN_FSDP}
    return {key: found for key, found in plain.items() if key not in ignored and found is not None}, ignored


def strangers(name: str, value: Any) -> Iterator[tuple[tuple[str | int, ...], list[str]]]:
    """Keys inside a block that nobody knows, each with those that are known."""
    if name in _BLOCKS and isinstance(value, dict):
        known = _BLOCKS[name].split()
        yield from (((key,), known) for key in value if key not in known)


def _is_off(name: str, value: Any) -> bool:
    if value is None or value is False or value in ("", [], {}):
        return True
    return name in _SIZES and value in (0, 1)


def _by_value(name: str, value: Any) -> Answer | None:
    """Keys whose answer depends on what they say."""
    match name, value:
        case "bnb_config_kwargs", {"bnb_4bit_quant_type": kind} if kind != "nf4":
            return Answer(
                f"4-bit bases are nf4 or int4 here, not {kind}; write bnb_4bit_quant_type by itself, or remove it", refused=True
            )
        case "model_quantization_config", "Mxfp4Config":
            return Answer("MXFP4 experts are read as bfloat16; load_in_4bit holds them as NF4")
        case "peft_init_lora_weights", True:
            return Answer("the usual initialisation")
        case "torch_dtype", "auto":
            return Answer("the dtype is chosen by bf16")
        case "save_safetensors", False:
            return Answer(IGNORED[name])
    return None


def _plugins(value: Any) -> Answer:
    names = [str(item).rsplit(".", 1)[-1] for item in (value if isinstance(value, list) else [value])]
    for name in names:
        if name not in _PLUGINS:
            return Answer(f"the plugin '{name}' is not known; code of plugins is not run here", refused=True)
        if _PLUGINS[name]:
            return Answer(f"the plugin '{name}': {_PLUGINS[name]}", refused=True)
    return Answer("what these plugins do is built in or listed here by its key")
