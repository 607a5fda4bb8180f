"""A tiny model of any architecture that transformers knows, by shrinking its default configuration.

Sizes are shrunk by what their names say; of the layers, one of each kind is kept, so that dense and sparse, full and linear attention all
occur. No architecture is named. Used by `ropewalk base make` and by the test that runs every mixture-of-experts model there is.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import transformers
from torch import nn
from transformers import CONFIG_MAPPING

from ropewalk.errors import ModelError

VOCABULARY = 256
FIRST_FREE_ID = 64  # ids below are special tokens of some configuration

_SIZES: dict[str, int] = {
    # widths
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "decoder_dim", "moe_hidden_size", "thinker_hidden_size"), 64),
    **dict.fromkeys(("text_hidden_size", "adapter_in_dim", "adapter_out_dim", "adapter_input_size"), 64),
    **dict.fromkeys(
        ("out_hidden_size", "output_dim", "projector_hidden_size", "ple_embed_dim", "projection_intermediate_size"), 64
    ),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "encoder_ffn_dim", "n_inner", "dense_intermediate_size", "mlp_dim"), 96),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size", "shared_experts_intermediate_size"), 32),
    **dict.fromkeys(("moe_shared_expert_intermediate_size", "shared_intermediate_size", "router_hidden_size"), 32),
    **dict.fromkeys(("hidden_size_per_layer_input", "downsample_hidden_size", "output_channels", "codebook_size"), 16),
    # attention
    **dict.fromkeys(("num_attention_heads", "n_head", "num_heads", "encoder_attention_heads", "swa_num_attention_heads"), 4),
    **dict.fromkeys(("num_key_value_heads", "swa_num_key_value_heads", "num_global_key_value_heads", "index_n_heads"), 2),
    **dict.fromkeys(("linear_num_heads", "linear_num_value_heads"), 4),
    "linear_num_key_heads": 2,
    **dict.fromkeys(
        ("head_dim", "global_head_dim", "swa_head_dim", "linear_head_dim", "linear_key_head_dim", "index_head_dim"), 16
    ),
    **dict.fromkeys(("linear_value_head_dim", "v_head_dim", "qk_nope_head_dim", "mamba_d_head", "mamba_head_dim"), 16),
    **dict.fromkeys(("qk_rope_head_dim", "rotary_dim", "d_rel"), 8),
    "qk_head_dim": 24,
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank", "o_lora_rank", "gated_norm_rank", "hc_lowrank"), 16),
    "o_groups": 2,
    **dict.fromkeys(("index_topk", "index_topk_blocks"), 8),
    **dict.fromkeys(("index_block_size", "index_kpool"), 4),
    "rel_extent": 32,
    # state space layers
    **dict.fromkeys(("mamba_d_state", "ssm_state_size", "mamba_dt_rank"), 8),
    **dict.fromkeys(("mamba_n_heads", "mamba_num_heads"), 8),
    **dict.fromkeys(("mamba_chunk_size", "chunk_size", "block_size"), 8),
    "n_groups": 2,
    # layers
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "depth", "encoder_layers", "decoder_layers"), 2),
    **dict.fromkeys(("first_k_dense_replace", "num_dense_layers", "num_nextn_predict_layers", "accept_hidden_layer"), 1),
    **dict.fromkeys(("attn_layer_period", "expert_layer_period", "layer_group_size", "sliding_window_pattern"), 2),
    **dict.fromkeys(("attn_layer_offset", "expert_layer_offset", "moe_layer_start_index", "moe_layer_end_index"), 1),
    **dict.fromkeys(("global_attn_every_n_layers", "n_layers_per_attn_res_block"), 2),
    # experts
    **dict.fromkeys(("num_experts", "n_routed_experts", "num_local_experts", "moe_num_experts"), 8),
    **dict.fromkeys(("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k", "top_k_experts"), 2),
    **dict.fromkeys(("n_shared_experts", "num_shared_experts", "moe_num_shared_experts"), 1),
    **dict.fromkeys(("n_group", "topk_group", "num_expert_group"), 1),
    # vocabularies and lengths
    **dict.fromkeys(("vocab_size", "vocab_size_per_layer_input", "unpadded_vocab_size", "ngram_vocab_size_base"), VOCABULARY),
    "make_ngram_vocab_size_divisible_by": 16,
    "split_ngram_parts": 2,
    **dict.fromkeys(("max_position_embeddings", "n_positions", "model_max_length"), 512),
    **dict.fromkeys(("sliding_window", "sliding_window_size", "canvas_length"), 16),
    # images and sound
    "image_size": 32,
    "patch_size": 8,
    **dict.fromkeys(("num_position_embeddings", "position_embedding_size", "max_source_positions"), 64),
    **dict.fromkeys(("num_mel_bins", "num_code_groups", "num_quantizers"), 4),
}
_SWITCHES = ("enable_moe_block",)  # experts that an architecture has but its default leaves out
_MISSING: dict[str, Any] = {  # defaults that are None although the architecture cannot be built without a value
    **dict.fromkeys(("num_experts", "n_routed_experts"), 8),
    **dict.fromkeys(("num_experts_per_tok", "top_k_experts"), 2),
    "moe_intermediate_size": 32,
    "n_shared_experts": 1,
    **dict.fromkeys(("n_group", "topk_group"), 1),
    "head_dim": 16,
    "layer_types": ["full_attention", "full_attention"],
    "mlp_layer_types": ["dense", "sparse"],
    "indexer_n_heads": 2,
    "indexer_kv_heads": 1,
    "indexer_head_dim": 16,
    "indexer_budget": 8,
    "indexer_compress_ratio": 4,
}
_COUNTS = ("num_experts_per", "moe_topk", "moe_k", "first_k", "num_dense")
_EQUALS = {
    "num_key_value_heads": ("num_attention_heads",),
    "swa_num_key_value_heads": ("swa_num_attention_heads",),
    "head_dim": ("qk_rope_head_dim", "qk_head_dim"),
}


def tiny_config(model_type: str, **overrides: Any) -> Any:
    """The default configuration of an architecture, shrunk; `overrides` go into its text part."""
    if model_type not in CONFIG_MAPPING:
        raise ModelError(
            f"architecture {model_type!r} is unknown to transformers {transformers.__version__}; it knows {len(CONFIG_MAPPING)}"
        )
    config = shrink(CONFIG_MAPPING[model_type])
    text = config.get_text_config(decoder=True)
    for name, value in overrides.items():
        setattr(text, name, value)
    return config


def shrink(kind: Any, **fixed: Any) -> Any:
    """A small configuration of a class: its defaults with every size replaced, or `fixed` as given."""
    default = kind()
    values: dict[str, Any] = {}
    layers = _layer_kinds(default)
    for name, value in vars(default).items():
        if name.startswith("_"):
            continue
        if hasattr(value, "to_dict") and hasattr(value, "model_type"):
            values[name] = shrink(type(value))
        elif layers is not None and isinstance(value, list | tuple) and len(value) == _layers(default):
            values[name] = [_clipped(value[i], len(layers), i) for i in layers]
        elif name.endswith(("token_id", "token_index", "bos_id", "pad_id")) or re.search(r"_(bos|eos|pad)_id$", name):
            values[name] = _special(name, value, values)
        elif value is None and name in _MISSING and not (name == "head_dim" and "qk_rope_head_dim" in vars(default)):
            values[name] = _MISSING[name]
        elif name in _SWITCHES:
            values[name] = True
        elif name in _SIZES and isinstance(value, int) and not isinstance(value, bool) and value > 0:
            values[name] = min(_SIZES[name], value) if name.startswith(_COUNTS) else _SIZES[_alike(default, name, value)]
    if layers is not None:
        values[_depth_name(default)] = len(layers)
    if isinstance(getattr(default, "mlp_only_layers", None), list):
        values["mlp_only_layers"] = [i for i in default.mlp_only_layers if i < 1]
    if "qk_nope_head_dim" in values and "qk_rope_head_dim" in values:
        if vars(default)["qk_nope_head_dim"] == vars(default)["qk_rope_head_dim"]:
            values["qk_nope_head_dim"] = values["qk_rope_head_dim"]
        whole = values["qk_nope_head_dim"] + values["qk_rope_head_dim"]
        values |= {n: whole for n in ("head_dim", "qk_head_dim") if vars(default).get(n) == vars(default).get("qk_head_dim", 0)}
    if "mrope_section" in getattr(default, "ignore_keys_at_rope_validation", ()) or "mrope_section" in _rope(default):
        values["rope_parameters"] = {**_rope(default), "mrope_section": _sections(default, values)}
    if set(values.get("layer_types", ())) == {"linear_attention"}:
        values["layer_types"][-1] = "full_attention"
    return kind(**values | fixed)


def _rope(config: Any) -> dict[str, Any]:
    return vars(config).get("rope_parameters") or {}


def _sections(config: Any, values: dict[str, Any]) -> list[int]:
    """Rotary sections of height, width and time that add up to half of the smaller head's rotated part."""
    half = int(values.get("head_dim", 16) * _rope(config).get("partial_rotary_factor", 1.0)) // 2
    return [half * 3 // 8, half * 3 // 8, half - 2 * (half * 3 // 8)]


def _alike(config: Any, name: str, value: int) -> str:
    """The size that this one follows: where two sizes are equal by default, models count on it."""
    return next((other for other in _EQUALS.get(name, ()) if vars(config).get(other) == value), name)


def _depth_name(config: Any) -> str:
    return next((n for n in ("num_hidden_layers", "n_layer") if n in vars(config)), "num_hidden_layers")


def _layers(config: Any) -> int:
    depth = getattr(config, _depth_name(config), 0)
    return depth if isinstance(depth, int) else 0


def _layer_kinds(config: Any) -> list[int] | None:
    """The first layer of each kind, at least two; None where no list says what kind a layer is."""
    depth = _layers(config)
    every = {n: v for n, v in vars(config).items() if isinstance(v, list | tuple) and len(v) == depth}
    lists = [v for n, v in every.items() if n.endswith(("_types", "_type"))]
    if depth < 2 or not every:
        return None
    if not lists:
        return [0, 1]
    first: dict[tuple[Any, ...], int] = {}
    for i, kind in enumerate(zip(*lists)):
        first.setdefault(tuple(map(str, kind)), i)
    chosen = sorted(first.values())
    return chosen if len(chosen) > 1 else [chosen[0], chosen[0] + 1]


def _clipped(value: Any, depth: int, place: int) -> Any:
    """An entry of a per-layer list; heads are shrunk as everywhere."""
    if isinstance(value, int) and not isinstance(value, bool) and value > 8 and value != place:
        return _SIZES["num_attention_heads"]
    return value


def _special(name: str, value: Any, taken: dict[str, Any]) -> Any:
    """A small id of its own for every special token."""
    fixed = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    if value is None or name in fixed:
        return None if value is None else fixed[name]
    return 3 + sum(1 for n in taken if n.endswith(("_id", "_index")))


def expert_architectures() -> Iterator[tuple[str, Any]]:
    """Every architecture of the installed transformers whose experts use the interface: its name and the class to build of it."""
    root = Path(transformers.__file__).parent / "models"
    for file in sorted(root.glob("*/modeling_*.py")):
        if re.search(r"^@use_experts_implementation", file.read_text(encoding="utf-8"), re.MULTILINE):
            module = importlib.import_module(f"transformers.models.{file.parent.name}.{file.stem}")
            yield file.parent.name, _class_to_build(module)


def _class_to_build(module: Any) -> Any:
    """The text model with a head where there is one, else whatever is nearest to it."""
    own: list[Any] = [c for c in vars(module).values() if isinstance(c, type) and c.__module__ == module.__name__]
    models = [c for c in own if getattr(c, "config_class", None) is not None and c.forward is not nn.Module.forward]
    for ending in ("ForCausalLM", "ForConditionalGeneration", "ForTokenClassification", "ForBlockDiffusion", "Model"):
        for kind in models:
            if kind.__name__.endswith(ending):
                return kind
    raise ModelError(f"{module.__name__} has no model class with a configuration")
