"""The tokenizer and chat template in a model folder, read without transformers: which files, which keys, which tokens are added."""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer

from ropewalk.chat.families import SOURCES
from ropewalk.errors import ConfigError, ModelError

SPECIAL_NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


def own_source(folder: Path, config: Mapping[str, Any]) -> str | None:
    """The chat template in a model folder: its own file, or a key of tokenizer_config.json (one text, or a list with names)."""
    if (path := folder / "chat_template.jinja").is_file():
        return path.read_text(encoding="utf-8")
    own = config.get("chat_template") or read_json(folder / "chat_template.json").get("chat_template")
    if isinstance(own, list):
        named = {entry["name"]: entry["template"] for entry in own}
        return str(named.get("default") or next(iter(named.values()), "")) or None
    return own


def choose_source(name: str | None, jinja: str | None, own: str | None, folder: Path | str) -> str | None:
    """The template text that a configuration asks for."""
    if name in (None, "jinja") and jinja:
        # Axolotl takes the text itself or the path of a file.
        return Path(jinja).read_text(encoding="utf-8") if "{" not in jinja and Path(jinja).is_file() else jinja
    if name == "jinja":
        raise ConfigError("chat_template: jinja needs the template itself in 'chat_template_jinja'")
    if name is None:
        return own
    if name == "tokenizer_default":
        if own is None:
            raise ConfigError(f"chat_template: tokenizer_default, but {folder} has no chat template; name one, such as chatml")
        return own
    fallback = name.removeprefix("tokenizer_default_fallback_")
    if fallback != name and own is not None:
        return own
    if fallback not in SOURCES:
        near = difflib.get_close_matches(fallback, SOURCES, 1)
        hint = f"did you mean '{near[0]}'?" if near else f"known are tokenizer_default, jinja, {', '.join(sorted(SOURCES))}"
        raise ConfigError(f"chat_template: there is no template named '{fallback}'; {hint}")
    return SOURCES[fallback]


def read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ModelError(f"{path} is not valid JSON: {error}") from error
    return content


def read_tokenizer(folder: Path) -> Tokenizer:
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise ModelError(f"{folder} has no tokenizer.json; it is needed to turn text into tokens")
    # Untrimmed offsets say which blanks belong to a token, and so on which side of a boundary it lies.
    raw = re.sub(r'("trim_offsets"\s*:\s*)true', r"\1false", path.read_text(encoding="utf-8"))
    try:
        tokenizer = Tokenizer.from_str(raw)
    except Exception as error:  # the Rust library raises a bare Exception
        raise ModelError(f"{path} cannot be read: {error}") from error
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer


def special_tokens_of(folder: Path, config: Mapping[str, Any]) -> dict[str, str]:
    found: dict[str, str] = {}
    for source in (read_json(folder / "special_tokens_map.json"), config):
        for name, value in source.items():
            content = value.get("content") if isinstance(value, dict) else value
            if name.endswith("_token") and isinstance(content, str):
                found[name] = content
    extra = config.get("extra_special_tokens")
    return {**found, **extra} if isinstance(extra, dict) else found


def add_missing(tokenizer: Tokenizer, config: Mapping[str, Any], special: Sequence[str], tokens: Sequence[str]) -> None:
    """Tokens that only tokenizer_config.json or the configuration knows."""
    for _, token in sorted((config.get("added_tokens_decoder") or {}).items(), key=lambda item: int(item[0])):
        if tokenizer.token_to_id(token["content"]) is None:
            kept = {k: v for k, v in token.items() if k in ("lstrip", "rstrip", "normalized", "single_word", "special")}
            tokenizer.add_tokens([AddedToken(token["content"], **kept)])
    known = {token.content for token in tokenizer.get_added_tokens_decoder().values()}
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in special if t not in known])
    tokenizer.add_tokens([AddedToken(token, normalized=False) for token in tokens if token not in known])
