"""Any causal language model of transformers, from a folder to its place in memory."""

from __future__ import annotations

import difflib
import importlib.util
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.conversion_mapping import get_checkpoint_conversion_mapping, register_checkpoint_conversion_mapping
from transformers.core_model_loading import WeightRenaming
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
from transformers.utils import logging as hf_logging

from ropewalk.errors import ConfigError, MissingExtra, ModelError
from ropewalk.models.experts import NAME, register_experts
from ropewalk.models.folder import check_folder, read_config, tensor_names
from ropewalk.models.hub import resolve_base
from ropewalk.models.quantized import Share, quantization
from ropewalk.models.stored import reader
from ropewalk.models.targets import SCORES

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_OTHER_SENSES = re.compile(r"vision|visual|audio|image|talker|speech")
ASYNC_OFF = "HF_DEACTIVATE_ASYNC_LOAD"  # transformers' own
FLASH_MAX_HEAD = 256  # the widest head that flash attention 2 computes


@dataclass(frozen=True)
class Scored:
    """What a model scores instead of writing: whole sequences, or each of their tokens."""

    tokens: bool
    outputs: int

    def maker(self, config: PretrainedConfig) -> Any:
        """The class of transformers that makes such a model."""
        found: Any = AutoModelForTokenClassification if self.tokens else AutoModelForSequenceClassification
        if type(config) not in found._model_mapping:
            raise ModelError(
                f"transformers has no model of type '{config.model_type}' that scores {'tokens' if self.tokens else 'sequences'}; "
                "name a base of another architecture, such as qwen3, llama or gemma2"
            )
        return found


def load_base(
    name: str | Path,
    *,
    dtype: torch.dtype | str = "auto",
    device: torch.device | str = "auto",
    attn_implementation: str = "auto",
    experts_implementation: str | None = NAME,
    quantize: str | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
    trainable: bool = False,
    overrides: Mapping[str, Any] | None = None,
    random_weights: bool = False,
    whole: bool = False,
    scored: Scored | None = None,
    on_host: bool = False,
    share: Share | None = None,
) -> PreTrainedModel:
    """The model in eval mode, frozen unless trainable (full fine-tuning); of a multimodal one, its text part or the `whole`.

    One that is `scored` has a new layer, or the base's own, in place of its output head (models/score_head.py). With `on_host` its weights
    stay in the host's memory, from where they are brought to the device that it is loaded for; with a `share` of them no more than that of
    the layers' weights is read in, and only models/sharded.py may follow.
    """
    folder = resolve_base(name, revision, trust_remote_code=trust_remote_code)
    config = load_config(folder, trust_remote_code=trust_remote_code, whole=whole)
    override(config.get_text_config() if whole else config, overrides or {})
    if scored is not None:
        config.num_labels = scored.outputs
        if getattr(config, "classifier_dropout", None) is None:
            config.classifier_dropout = 0.0  # transformers drops a tenth where nothing is said
    place = pick_device(device)
    options: dict[str, Any] = {
        "config": config,
        "dtype": _dtype(dtype, folder),
        "device_map": {"": torch.device("cpu") if on_host else place},
        "attn_implementation": pick_attention(config, attn_implementation, place, folder),
        "trust_remote_code": trust_remote_code,
        "use_safetensors": True,
        "output_loading_info": True,
    }
    renamed = text_prefixes(folder, config)
    if renamed:
        options["key_mapping"] = {f"^{re.escape(there)}": here for there, here in renamed.items()}
    if experts_implementation is not None and has_experts(config):
        register_experts()
        options["experts_implementation"] = experts_implementation
    if quantize is not None:
        if trainable:
            raise ConfigError(
                f"a base quantised to {quantize} cannot be trained whole: set an adapter, or drop the quantisation"
            )
        if options.get("experts_implementation", NAME) != NAME:
            raise ConfigError(f"experts quantised to {quantize} are computed by experts_implementation '{NAME}' only")
    stored = reader(folder, config)
    if quantize is not None or share is not None or stored is not None:
        options["quantization_config"] = quantization(quantize, str(place) if on_host else None, share, stored)
    with quiet():
        maker = AutoModelForImageTextToText if whole else scored.maker(config) if scored else auto_class(config)
        model, found = (_from_config(maker, options), {}) if random_weights else _from_pretrained(maker, folder, options)
    _check_complete(folder, found, new=scored is not None)
    model.requires_grad_(trainable)
    return model.eval()


def load_config(folder: Path, *, trust_remote_code: bool = False, whole: bool = False) -> PretrainedConfig:
    """The configuration of the model to load: for a multimodal checkpoint, that of its text part where there is one, or all."""
    if not trust_remote_code and _needs_code(read_config(folder)):
        raise ModelError(
            f"{folder}: its model type '{read_config(folder).get('model_type')}' is not part of the installed transformers and "
            "comes with code of its own; if you trust that code, say so with --trust-remote-code"
        )
    try:
        with quiet():
            config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except (ValueError, KeyError, OSError) as error:
        raise ModelError(f"{folder}: {_first_line(error)}") from error
    text = config.get_text_config()
    if not whole and text is not config and type(text) in MODEL_FOR_CAUSAL_LM_MAPPING:
        tied = getattr(config, "tie_word_embeddings", None)
        if tied is not None and getattr(text, "tie_word_embeddings", None) != tied:
            text.tie_word_embeddings = tied  # the outer one decides in a multimodal checkpoint
        if text.dtype is None:
            text.dtype = config.dtype
        _convert_as(config, text)
        return text
    return config


def _convert_as(whole: PretrainedConfig, text: PretrainedConfig) -> None:
    """Where transformers knows how a multimodal checkpoint keeps its layers, but not that its text part is read from the same, tell it so."""
    known = get_checkpoint_conversion_mapping(whole.model_type) or []
    cut = any(not isinstance(step, WeightRenaming) for step in known)  # names alone, text_prefixes sees to
    if cut and get_checkpoint_conversion_mapping(text.model_type) is None:
        inside = [step for step in known if not any(pattern.startswith("^") for pattern in step.source_patterns)]
        register_checkpoint_conversion_mapping(text.model_type, [_within_text(step) for step in inside])


def _within_text(step: Any) -> Any:
    """A step to a name in the whole model, as a step to that in its text part."""
    part = "model.language_model."
    if not isinstance(step, WeightRenaming) or not any(pattern.startswith(part) for pattern in step.target_patterns):
        return step
    targets = [pattern.replace(part, "model.", 1) for pattern in step.target_patterns]
    return WeightRenaming(source_patterns=list(step.source_patterns), target_patterns=targets)


def override(config: PretrainedConfig, values: Mapping[str, Any]) -> PretrainedConfig:
    """The configuration with these values laid over it; one that the model does not have is an error."""
    for name, value in values.items():
        if not hasattr(config, name):
            near = difflib.get_close_matches(name, vars(config), 1)
            raise ConfigError(
                f"overrides_of_model_config: the configuration of a {config.model_type} has no '{name}'"
                + (f"; did you mean '{near[0]}'?" if near else "; remove it")
            )
        setattr(config, name, value)
    return config


def text_prefixes(folder: Path, config: PretrainedConfig) -> dict[str, str]:
    """How a multimodal checkpoint names what its text part calls 'model.' and 'lm_head.'; nothing for a plain checkpoint."""
    if read_config(folder).get("model_type") == config.model_type:
        return {}
    prefixes = {}
    for name in tensor_names(folder):
        for ending, here in (("embed_tokens.weight", "model."), ("lm_head.weight", "lm_head.")):
            there = name.removesuffix(ending if here == "model." else "weight")
            if name.endswith("." + ending) and there != here and not _OTHER_SENSES.search(name):
                prefixes[there] = here
    return prefixes


def pick_device(device: torch.device | str) -> torch.device:
    """The device meant by 'auto': a GPU if there is one."""
    if device != "auto":
        return torch.device(device)
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def pick_attention(config: PretrainedConfig, wanted: str, device: torch.device, folder: Path) -> str:
    """The attention meant by 'auto': flash where it is installed and fits, sdpa else, eager for models that have nothing else."""
    model_class = _model_class(config)
    flash = bool(getattr(model_class, "_supports_flash_attn", False))
    if wanted == "auto":
        installed = importlib.util.find_spec("flash_attn") is not None
        if device.type == "cuda" and flash and installed and _widest_head(config) <= FLASH_MAX_HEAD:
            return "flash_attention_2"
        return "sdpa" if getattr(model_class, "_supports_sdpa", True) else "eager"
    if wanted.startswith("flash_attention"):
        if device.type != "cuda":
            raise ConfigError(f"attn_implementation '{wanted}' needs a CUDA GPU; leave it out, or set sdpa")
        if _widest_head(config) > FLASH_MAX_HEAD and wanted == "flash_attention_2":
            raise ConfigError(
                f"flash_attention_2 computes heads of at most {FLASH_MAX_HEAD}, and {folder.name} has one of "
                f"{_widest_head(config)}; leave attn_implementation out, or set sdpa"
            )
        if wanted == "flash_attention_2" and importlib.util.find_spec("flash_attn") is None:
            raise MissingExtra("flash-attn", "gpu", "attn_implementation flash_attention_2")
    return wanted


def has_experts(config: PretrainedConfig) -> bool:
    """Whether a configuration is that of a mixture of experts."""
    text = config.get_text_config()
    names = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts", "num_experts_per_tok")
    return any(getattr(text, name, None) for name in names)


def _widest_head(config: PretrainedConfig) -> int:
    text = config.get_text_config()
    width = getattr(text, "hidden_size", 0) // max(1, getattr(text, "num_attention_heads", 1) or 1)
    return max(getattr(text, name, None) or 0 for name in ("head_dim", "global_head_dim", "v_head_dim")) or width


def auto_class(config: PretrainedConfig) -> Any:
    """The class of transformers that makes a model that writes text; some (Mistral 4) are listed among those that also see."""
    seeing = type(config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING and type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING
    return AutoModelForImageTextToText if seeing else AutoModelForCausalLM


def _model_class(config: PretrainedConfig) -> type | None:
    makers: tuple[Any, ...] = (auto_class(config), AutoModelForTokenClassification)  # some only score tokens
    found: Any = next((maker._model_mapping[type(config)] for maker in makers if type(config) in maker._model_mapping), None)
    chosen: type | None = found[0] if isinstance(found, tuple) else found
    return chosen


def _dtype(dtype: torch.dtype | str, folder: Path) -> torch.dtype | str:
    if isinstance(dtype, torch.dtype):
        return dtype
    if dtype == "auto":
        config = read_config(folder)
        stored = config.get("dtype") or config.get("torch_dtype") or (config.get("text_config") or {}).get("dtype")
        return DTYPES.get(str(stored), "auto")
    if dtype not in DTYPES:
        raise ConfigError(f"dtype '{dtype}' is unknown; one of auto, {', '.join(DTYPES)}")
    return DTYPES[dtype]


def _needs_code(config: dict[str, Any]) -> bool:
    from transformers import CONFIG_MAPPING

    return "auto_map" in config and config.get("model_type") not in CONFIG_MAPPING


def _from_config(maker: Any, options: dict[str, Any]) -> PreTrainedModel:
    """The model with new random weights, as torch's seed gives them."""
    chosen = {name: options[name] for name in ("dtype", "attn_implementation", "experts_implementation") if name in options}
    with options["device_map"][""]:
        model: PreTrainedModel = maker.from_config(options["config"], **chosen)
    return model


def _from_pretrained(maker: Any, folder: Path, options: dict[str, Any]) -> tuple[PreTrainedModel, dict[str, Any]]:
    try:
        with _in_turn() if "quantization_config" in options else nullcontext():
            model, found = maker.from_pretrained(folder, **options)
    except ImportError as error:
        raise ModelError(f"{folder} needs a package that is not installed: {_first_line(error)}") from error
    except (ValueError, KeyError, OSError, RuntimeError) as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise ModelError(
                f"{folder} does not fit on {options['device_map']['']}: load it in 4 bit (adapter: qlora), or on a larger device"
            ) from error
        check_folder(folder)  # a file that was cut while we read it is named before anything else
        raise ModelError(f"{folder} cannot be loaded: {_first_line(error)}") from error
    return model, found


@contextmanager
def _in_turn() -> Iterator[None]:
    """Each tensor is read when it is wanted: threads would bring all of a checkpoint in few bits before the first is held as it will be."""
    before = os.environ.get(ASYNC_OFF)
    os.environ[ASYNC_OFF] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[ASYNC_OFF]
        else:
            os.environ[ASYNC_OFF] = before


def _check_complete(folder: Path, found: dict[str, Any], *, new: bool = False) -> None:
    missing = sorted(key for key in found.get("missing_keys") or [] if not (new and key.split(".")[0] in SCORES))
    wrong = sorted(str(key) for key in found.get("mismatched_keys") or [])
    if missing:
        raise ModelError(f"{folder} lacks {len(missing)} of the model's tensors, first '{missing[0]}'; fetch or save it again")
    if wrong:
        raise ModelError(f"{folder}: {len(wrong)} tensors have another shape than config.json says, first {wrong[0]}")


@contextmanager
def quiet() -> Iterator[None]:
    """Without transformers' progress bars and reports: what matters in them is raised as an error."""
    verbosity, bars = hf_logging.get_verbosity(), hf_logging.is_progress_bar_enabled()
    hf_logging.set_verbosity_error()
    hf_logging.disable_progress_bar()
    try:
        yield
    finally:
        hf_logging.set_verbosity(verbosity)
        if bars:
            hf_logging.enable_progress_bar()


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__
