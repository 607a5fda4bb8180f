"""A small base made here: a tokenizer from text at hand, a chat template, and a randomly initialised model of any architecture."""

from __future__ import annotations

import json
import os
import pkgutil
import shutil
import sys
import sysconfig
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GenerationConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from ropewalk.errors import ModelError, OutputError
from ropewalk.models.load import auto_class, quiet
from ropewalk.models.tiny import tiny_config

PAD, START, END = "<|pad|>", "<|im_start|>", "<|im_end|>"
RESERVED = 64
"""Low ids are special tokens of some configurations (images, sound), so none of them is given to text."""

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] | trim + '<|im_end|>' + '\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


@dataclass(frozen=True)
class Size:
    """How large a made base is: its vocabulary, and how often the tiny configuration's layers and widths are repeated."""

    vocabulary: int
    layers: int
    width: int


SIZES = {"tiny": Size(1024, 1, 1), "small": Size(4096, 2, 4)}
WIDTHS = ("hidden_size", "d_model", "n_embd", "intermediate_size", "ffn_dim", "moe_intermediate_size")


def make_base(
    folder: Path, arch: str, *, size: str = "tiny", text_files: Sequence[Path] | None = None, seed: int = 0
) -> PreTrainedModel:
    """Write a complete model folder, whole or not at all; the same arguments give the same weights."""
    if size not in SIZES:
        raise ModelError(f"size '{size}' is unknown; one of {', '.join(SIZES)}")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise OutputError(f"{folder} exists already; name a folder that does not, or an empty one")
    tokenizer = train_tokenizer(text_at_hand() if text_files is None else read_texts(text_files), SIZES[size].vocabulary)
    model = _build(arch, size, tokenizer, seed)
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}.writing")
    try:
        temporary.mkdir(parents=True)
        with quiet():
            model.save_pretrained(temporary)
        _save_tokenizer(tokenizer, temporary)
        if folder.is_dir():
            folder.rmdir()
        temporary.rename(folder)
    except OSError as error:
        raise OutputError(f"{folder} cannot be written: {error.strerror or error}; name another folder") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return model


def train_tokenizer(texts: Iterator[str], vocabulary: int) -> Tokenizer:
    """Byte-level BPE: any text can be written with it, and comes back exactly."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = [PAD, START, END, *(f"<|reserved_{index}|>" for index in range(3, RESERVED))]
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[AddedToken(token, special=True, normalized=False) for token in special],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def text_at_hand() -> Iterator[str]:
    """Real English that every Python brings along: its licence and the words at the head of its modules."""
    licence = Path(sysconfig.get_path("stdlib")) / "LICENSE.txt"
    if licence.is_file():
        yield licence.read_text(encoding="utf-8")
    yield sys.copyright
    stdlib = sysconfig.get_path("stdlib")
    for module in sorted(pkgutil.iter_modules([stdlib]), key=lambda module: module.name):
        source = Path(stdlib) / f"{module.name}.py"
        if not module.ispkg and source.is_file():
            yield source.read_text(encoding="utf-8", errors="ignore")[:4000]


def read_texts(paths: Sequence[Path]) -> Iterator[str]:
    """The given files, and the text files of given folders."""
    for path in paths:
        files = sorted(path.rglob("*.txt")) + sorted(path.rglob("*.md")) if path.is_dir() else [path]
        for file in files:
            try:
                yield file.read_text(encoding="utf-8")
            except (OSError, UnicodeDecodeError) as error:
                raise ModelError(f"{file} cannot be read as text: {error}") from error


def _build(arch: str, size: str, tokenizer: Tokenizer, seed: int) -> PreTrainedModel:
    config = tiny_config(arch)
    text = config.get_text_config(decoder=True)
    if type(text) in MODEL_FOR_CAUSAL_LM_MAPPING:
        config = text
    elif type(config) not in auto_class(config)._model_mapping:
        raise ModelError(f"architecture '{arch}' is no causal language model")
    text.vocab_size = tokenizer.get_vocab_size()
    if getattr(text, "vocab_size_per_layer_input", 0):
        text.vocab_size_per_layer_input = text.vocab_size
    _enlarge(text, SIZES[size])
    ids = {"pad_token_id": PAD, "bos_token_id": None, "eos_token_id": END}
    for name, token in ids.items():
        for part in (config, text):
            setattr(part, name, None if token is None else tokenizer.token_to_id(token))
    try:
        with torch.random.fork_rng(devices=[]), quiet():
            torch.manual_seed(seed)
            model: PreTrainedModel = auto_class(config).from_config(config).eval()
            with torch.no_grad():
                model(input_ids=torch.arange(RESERVED, RESERVED + 8).unsqueeze(0), use_cache=False)
    except (ValueError, RuntimeError, TypeError, AttributeError, ImportError) as error:
        smaller = "" if size == "tiny" else "; try --size tiny"
        raise ModelError(f"no {size} model of architecture '{arch}' can be built: {error}{smaller}") from error
    stop = tokenizer.token_to_id(END)
    model.generation_config = GenerationConfig(eos_token_id=stop, pad_token_id=tokenizer.token_to_id(PAD))
    return model


def _enlarge(config: Any, size: Size) -> None:
    """Repeat a tiny configuration's layers, with the lists that say what kind each is, and multiply its widths."""
    depth = next((name for name in ("num_hidden_layers", "n_layer") if hasattr(config, name)), None)
    if depth is not None and size.layers > 1:
        layers = getattr(config, depth)
        for name, value in list(vars(config).items()):
            if isinstance(value, list) and len(value) == layers and name.endswith(("types", "type")):
                setattr(config, name, value * size.layers)
        setattr(config, depth, layers * size.layers)
        special = config.to_dict().get("per_layer_config")  # what single layers have of their own, by number
        if special:
            repeated = {int(i) + layers * turn: own for i, own in special.items() for turn in range(size.layers)}
            config.per_layer_config = repeated
    for name in WIDTHS:
        if isinstance(getattr(config, name, None), int):
            setattr(config, name, getattr(config, name) * size.width)


def _save_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "pad_token": PAD,
        "eos_token": END,
        "model_max_length": 2048,
        "clean_up_tokenization_spaces": False,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE)
