"""Tiny random models that see, as folders: weights, processor, tokenizer and chat template."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    Gemma4Config,
    Gemma4ForConditionalGeneration,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen3_5MoeConfig,
    Qwen3_5MoeForConditionalGeneration,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
)

from engine.architectures import WINDOW

SPECIAL = ["<pad>", "<bos>", "<|im_end|>", "<|im_start|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>"]
SPECIAL += ["<|video_pad|>", "<|image>", "<image|>", "<|image|>", "<|video|>", "<|turn>", "<turn|>", "<|audio|>"]
ID = {token: number for number, token in enumerate(SPECIAL)}
VOCABULARY = len(SPECIAL) + 256
TEXT: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "initializer_range": 0.06,
    "max_position_embeddings": 2048,
}
QWEN_VISION: dict[str, Any] = {
    "depth": 2,
    "hidden_size": 32,
    "num_heads": 2,
    "intermediate_size": 48,
    "out_hidden_size": 64,
    "patch_size": 4,
    "num_position_embeddings": 64,
    "spatial_merge_size": 2,
    "initializer_range": 0.06,
}
QWEN_IDS = {
    "image_token_id": ID["<|image_pad|>"],
    "video_token_id": ID["<|video_pad|>"],
    "vision_start_token_id": ID["<|vision_start|>"],
    "vision_end_token_id": ID["<|vision_end|>"],
}
QWEN_PROCESSOR = {
    "processor_class": "Qwen3VLProcessor",
    "image_processor_type": "Qwen2VLImageProcessor",
    "patch_size": 4,
    "merge_size": 2,
    "temporal_patch_size": 2,
    "size": {"shortest_edge": 256, "longest_edge": 4096},
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.5, 0.5, 0.5],
}
QWEN_TEMPLATE = """{%- macro shown(content) -%}
{%- if content is string -%}{{ content }}{%- else -%}{%- for part in content -%}
{%- if part.type == 'image' -%}<|vision_start|><|image_pad|><|vision_end|>{%- else -%}{{ part.text }}{%- endif -%}
{%- endfor -%}{%- endif -%}
{%- endmacro -%}
{%- for message in messages -%}
<|im_start|>{{ message.role }}
{{ shown(message.content) }}<|im_end|>
{% endfor -%}
{%- if add_generation_prompt -%}<|im_start|>assistant
{% endif -%}"""
GEMMA_TEMPLATE = """{%- for message in messages -%}
<|turn>{{ 'model' if message.role == 'assistant' else message.role }}
{% if message.content is string -%}{{ message.content | trim }}{%- else -%}{%- for part in message.content -%}
{%- if part.type == 'image' -%}{{ '\\n\\n<|image|>\\n\\n' }}{%- else -%}{{ part.text | trim }}{%- endif -%}
{%- endfor -%}{%- endif -%}<turn|>
{% endfor -%}
{%- if add_generation_prompt -%}<|turn>model
{% endif -%}"""


def gemma4() -> tuple[Any, dict[str, Any]]:
    """Pictures whose ids see each other in sliding layers."""
    text = TEXT | {
        "num_key_value_heads": 4,
        "global_head_dim": 32,
        "num_global_key_value_heads": 2,
        "attention_k_eq_v": True,
        "sliding_window": WINDOW,
        "hidden_size_per_layer_input": 0,
        "vocab_size_per_layer_input": VOCABULARY,
        "enable_moe_block": True,
        "num_experts": 8,
        "top_k_experts": 2,
        "moe_intermediate_size": 32,
        "layer_types": [*["sliding_attention"] * 3, "full_attention"],
        "use_bidirectional_attention": "vision",
    }
    vision = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "global_head_dim": 16,
        "patch_size": 4,
        "pooling_kernel_size": 3,
        "position_embedding_size": 1024,
        "default_output_length": 70,
        "initializer_range": 0.06,
    }
    config = Gemma4Config(
        text_config=text,
        vision_config=vision,
        audio_config=None,
        image_token_id=ID["<|image|>"],
        video_token_id=ID["<|video|>"],
        audio_token_id=ID["<|audio|>"],
        boi_token_id=ID["<|image>"],
        eoi_token_id=ID["<image|>"],
        initializer_range=0.06,
    )
    processor = {
        "processor_class": "Gemma4Processor",
        "image_processor_type": "Gemma4ImageProcessor",
        "patch_size": 4,
        "max_soft_tokens": 70,
        "pooling_kernel_size": 3,
    }
    return Gemma4ForConditionalGeneration(config), processor


def qwen3_5_moe() -> tuple[Any, dict[str, Any]]:
    """Places in three dimensions; three of four layers keep a recurrent state."""
    text = TEXT | {
        "linear_key_head_dim": 16,
        "linear_value_head_dim": 16,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "linear_conv_kernel_dim": 4,
        "moe_intermediate_size": 32,
        "shared_expert_intermediate_size": 32,
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "layer_types": [*["linear_attention"] * 3, "full_attention"],
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 10_000.0,
            "partial_rotary_factor": 1.0,
            "mrope_section": [4, 2, 2],
            "mrope_interleaved": True,
        },
    }
    config = Qwen3_5MoeConfig(text_config=text, vision_config=QWEN_VISION, **QWEN_IDS)
    return Qwen3_5MoeForConditionalGeneration(config), QWEN_PROCESSOR


def qwen3_vl() -> tuple[Any, dict[str, Any]]:
    """What the vision tower sees on its way is added between layers; no class of its own for the text part."""
    text = TEXT | {
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 10_000.0,
            "mrope_section": [4, 2, 2],
            "mrope_interleaved": True,
        }
    }
    vision = QWEN_VISION | {"deepstack_visual_indexes": [0, 1]}
    config = Qwen3VLConfig(text_config=text, vision_config=vision, **QWEN_IDS)
    return Qwen3VLForConditionalGeneration(config), QWEN_PROCESSOR


def gemma3() -> tuple[Any, dict[str, Any]]:
    """Pictures whose ids see each other in all layers, between line breaks that belong to them."""
    text = TEXT | {
        "model_type": "gemma3_text",
        "sliding_window": WINDOW,
        "layer_types": [*["sliding_attention"] * 3, "full_attention"],
        "query_pre_attn_scalar": 16,
    }
    vision = {
        "model_type": "siglip_vision_model",
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": 16,
        "patch_size": 2,
    }
    config = Gemma3Config(
        text_config=text,
        vision_config=vision,
        mm_tokens_per_image=16,
        image_token_index=ID["<|image|>"],
        boi_token_index=ID["<|image>"],
        eoi_token_index=ID["<image|>"],
    )
    processor = {
        "processor_class": "Gemma3Processor",
        "image_processor_type": "Gemma3ImageProcessor",
        "size": {"height": 16, "width": 16},
        "image_seq_length": 16,
        "settings": {"processor_class": "Gemma3Processor", "image_seq_length": 16},
    }
    return Gemma3ForConditionalGeneration(config), processor


def qwen2_5_vl() -> tuple[Any, dict[str, Any]]:
    """Places in three dimensions, a vision tower with windows, and no size of heads in the configuration."""
    text = {key: value for key, value in TEXT.items() if key != "head_dim"}
    text |= {"layer_types": ["full_attention"] * 4}
    text |= {"rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0, "mrope_section": [2, 1, 1]}}
    vision = {key: value for key, value in QWEN_VISION.items() if key != "num_position_embeddings"}
    vision |= {"window_size": 16, "fullatt_block_indexes": [1]}
    config = Qwen2_5_VLConfig(text_config=text, vision_config=vision, **QWEN_IDS)
    return Qwen2_5_VLForConditionalGeneration(config), QWEN_PROCESSOR | {"processor_class": "Qwen2_5_VLProcessor"}


def llava() -> tuple[Any, dict[str, Any]]:
    """Every picture in as many ids as every other."""
    vision = {
        "model_type": "clip_vision_model",
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "image_size": 16,
        "patch_size": 4,
    }
    config = LlavaConfig(
        text_config=TEXT | {"model_type": "llama"},
        vision_config=vision,
        image_token_index=ID["<|image_pad|>"],
        image_seq_length=16,
    )
    processor = {
        "processor_class": "LlavaProcessor",
        "image_processor_type": "CLIPImageProcessor",
        "size": {"shortest_edge": 16},
        "crop_size": {"height": 16, "width": 16},
        "settings": {
            "processor_class": "LlavaProcessor",
            "image_token": "<|image_pad|>",
            "patch_size": 4,
            "num_additional_image_tokens": 1,
            "vision_feature_select_strategy": "default",
        },
    }
    return LlavaForConditionalGeneration(config), processor


SEEING = {maker.__name__: maker for maker in (gemma4, qwen3_5_moe, qwen3_vl, gemma3, qwen2_5_vl, llava)}


def make(name: str, folder: Path, sharp: float = 1.0) -> Path:
    """The same folder every time, in float32; `sharp`: how much louder its head is, which as it is says nothing with confidence."""
    torch.manual_seed(0)
    model, processor = SEEING[name]()
    with torch.no_grad():
        for parameter in model.parameters():  # spread so that an answer depends on what was seen
            if parameter.dim() > 1:
                parameter.normal_(0, 0.06)
        model.get_output_embeddings().weight.mul_(sharp)
    model.float().eval().save_pretrained(folder)
    if settings := processor.pop("settings", None):
        (folder / "processor_config.json").write_text(json.dumps(settings))
    (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    _tokenizer(gemma=name.startswith("gemma")).save_pretrained(folder)
    template = GEMMA_TEMPLATE if name.startswith("gemma") else QWEN_TEMPLATE
    if name == "gemma3":  # whose processor writes all that stands around a picture
        template = template.replace("\\n\\n<|image|>\\n\\n", "<|image>")
    (folder / "chat_template.jinja").write_text(template)
    return folder


def _tokenizer(*, gemma: bool) -> PreTrainedTokenizerFast:
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = ID | {letter: len(ID) + number for number, letter in enumerate(letters)}
    plain = Tokenizer(models.BPE(vocabulary, []))
    plain.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    plain.decoder = decoders.ByteLevel()
    plain.add_special_tokens(SPECIAL)
    names = {"image_token": "<|image|>", "boi_token": "<|image>", "eoi_token": "<image|>", "audio_token": "<|audio|>"}
    names |= {"boa_token": "<|audio|>", "eoa_token": "<|audio|>"}
    end = "<turn|>" if gemma else "<|im_end|>"
    return PreTrainedTokenizerFast(
        tokenizer_object=plain,
        bos_token="<bos>",
        eos_token=end,
        pad_token="<pad>",
        extra_special_tokens=names if gemma else {},
    )
