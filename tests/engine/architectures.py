"""Tiny random models of every way in which layers keep the past."""

from __future__ import annotations

from typing import Any

import torch
from transformers import (
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    FalconH1Config,
    FalconH1ForCausalLM,
    Gemma4ForCausalLM,
    Gemma4TextConfig,
    GptOssConfig,
    GptOssForCausalLM,
    JambaConfig,
    JambaForCausalLM,
    Llama4ForCausalLM,
    Llama4TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    Qwen3_5MoeForCausalLM,
    Qwen3_5MoeTextConfig,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

VOCABULARY = 500
COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "initializer_range": 0.06,
}
WINDOW = 24


def llama() -> Any:
    return LlamaForCausalLM(LlamaConfig(**COMMON))


def qwen3() -> Any:
    return Qwen3ForCausalLM(Qwen3Config(**COMMON, head_dim=16))


def qwen3_moe() -> Any:
    return Qwen3MoeForCausalLM(
        Qwen3MoeConfig(**COMMON, head_dim=16, moe_intermediate_size=32, num_experts=8, num_experts_per_tok=2)
    )


def mixtral() -> Any:
    return MixtralForCausalLM(MixtralConfig(**COMMON, num_local_experts=4, num_experts_per_tok=2, sliding_window=None))


def gpt_oss() -> Any:
    """Every other layer slides; attention has sinks; experts have biases and a clamped gate."""
    return GptOssForCausalLM(
        GptOssConfig(**COMMON, head_dim=16, num_local_experts=4, num_experts_per_tok=2, sliding_window=WINDOW)
    )


def gemma4() -> Any:
    """Three of four layers slide, with other heads than the fourth; experts beside a dense layer."""
    return Gemma4ForCausalLM(
        Gemma4TextConfig(
            **COMMON | {"num_key_value_heads": 4},
            head_dim=16,
            global_head_dim=32,
            num_global_key_value_heads=2,
            attention_k_eq_v=True,
            sliding_window=WINDOW,
            hidden_size_per_layer_input=0,
            vocab_size_per_layer_input=VOCABULARY,
            enable_moe_block=True,
            num_experts=8,
            top_k_experts=2,
            moe_intermediate_size=32,
            layer_types=[*["sliding_attention"] * 3, "full_attention"],
        )
    )


def gemma4_small() -> Any:
    """The last two layers attend to what earlier ones keep, one of each kind; every layer has inputs of its own."""
    return Gemma4ForCausalLM(
        Gemma4TextConfig(
            **COMMON | {"num_attention_heads": 4},
            head_dim=16,
            global_head_dim=32,
            sliding_window=WINDOW,
            num_kv_shared_layers=2,
            use_double_wide_mlp=True,
            hidden_size_per_layer_input=16,
            vocab_size_per_layer_input=VOCABULARY,
            layer_types=["sliding_attention", "full_attention"] * 2,
        )
    )


def llama4() -> Any:
    """Three of four layers attend within chunks; the fourth has no positions but scales its queries by them."""
    return Llama4ForCausalLM(
        Llama4TextConfig(
            **COMMON,
            head_dim=16,
            intermediate_size_mlp=96,
            num_local_experts=4,
            interleave_moe_layer_step=2,
            attention_chunk_size=WINDOW,
            no_rope_layers=[1, 1, 1, 0],
            floor_scale=10,
            layer_types=[*["chunked_attention"] * 3, "full_attention"],
        )
    )


def deepseek_v3() -> Any:
    """Attention over latents."""
    return DeepseekV3ForCausalLM(
        DeepseekV3Config(
            **COMMON | {"num_hidden_layers": 2, "num_key_value_heads": 8},
            moe_intermediate_size=32,
            n_routed_experts=8,
            num_experts_per_tok=2,
            n_group=2,
            topk_group=1,
            first_k_dense_replace=1,
            kv_lora_rank=16,
            q_lora_rank=24,
            qk_rope_head_dim=8,
            qk_nope_head_dim=16,
            v_head_dim=24,
        )
    )


def jamba() -> Any:
    """State space layers that read on from a state one id at a time."""
    return JambaForCausalLM(
        JambaConfig(
            **COMMON | {"num_hidden_layers": 2},
            num_experts=4,
            num_experts_per_tok=2,
            attn_layer_period=2,
            attn_layer_offset=1,
            mamba_d_state=8,
            mamba_dt_rank=8,
            use_mamba_kernels=False,
        )
    )


def falcon_h1() -> Any:
    """A state and attention in every layer."""
    return FalconH1ForCausalLM(
        FalconH1Config(
            **COMMON | {"num_hidden_layers": 2},
            head_dim=16,
            mamba_d_ssm=64,
            mamba_n_heads=4,
            mamba_d_head=16,
            mamba_d_state=8,
            mamba_chunk_size=8,
        )
    )


def qwen3_5_moe() -> Any:
    """Three of four layers keep a recurrent state."""
    return Qwen3_5MoeForCausalLM(
        Qwen3_5MoeTextConfig(
            **COMMON,
            head_dim=16,
            linear_key_head_dim=16,
            linear_value_head_dim=16,
            linear_num_key_heads=2,
            linear_num_value_heads=4,
            linear_conv_kernel_dim=4,
            moe_intermediate_size=32,
            shared_expert_intermediate_size=32,
            num_experts=8,
            num_experts_per_tok=2,
            layer_types=[*["linear_attention"] * 3, "full_attention"],
        )
    )


ARCHITECTURES = {
    maker.__name__: maker
    for maker in (
        llama,
        qwen3,
        qwen3_moe,
        mixtral,
        gpt_oss,
        gemma4,
        gemma4_small,
        llama4,
        deepseek_v3,
        qwen3_5_moe,
        jamba,
        falcon_h1,
    )
}


def make(name: str) -> Any:
    """The same model every time, in float32."""
    torch.manual_seed(0)
    return ARCHITECTURES[name]().float().eval()
