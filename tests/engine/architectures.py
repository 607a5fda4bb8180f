"""Tiny random models of every way in which layers keep the past."""

from __future__ import annotations

from typing import Any

import torch
from transformers import (
    Gemma4ForCausalLM,
    Gemma4TextConfig,
    GptOssConfig,
    GptOssForCausalLM,
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


ARCHITECTURES = {maker.__name__: maker for maker in (llama, qwen3, qwen3_moe, mixtral, gpt_oss, gemma4, qwen3_5_moe)}


def make(name: str) -> Any:
    """The same model every time, in float32."""
    torch.manual_seed(0)
    return ARCHITECTURES[name]().float().eval()
