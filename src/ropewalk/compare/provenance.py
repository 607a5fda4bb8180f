"""What a served name stands for now and where its weights come from: digest, family, template, training files, generator, reward."""

from __future__ import annotations

import asyncio
import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from ropewalk.chat.template import Template
from ropewalk.engine.models import Models, Target
from ropewalk.files.generators import generators
from ropewalk.files.local import is_id
from ropewalk.files.store import Store
from ropewalk.models.folder import read_config
from ropewalk.models.hub import ensure_tokenizer
from ropewalk.models.identity import weights_digest
from ropewalk.registry import Registry
from ropewalk.tenants.caller import Caller

ROLES = ("train_data", "data_generator", "reward_model", "teacher")
# How a registry's entry or a run's record may call them; several in one text are divided by spaces or commas, each perhaps with its
# share of the data, as in "big-model=0.62".
NAMES = {
    "train_data": ("file", "train_data"),
    "data_generator": ("data_generator", "generator"),
    "reward_model": ("reward_model", "reward"),
    "teacher": ("teacher", "teacher_model"),
}
ALSO = {
    "chatgpt": "gpt",
    "o1": "gpt",
    "o3": "gpt",
    "o4": "gpt",
    "codellama": "llama",
    "mixtral": "mistral",
    "ministral": "mistral",
}


@dataclass(frozen=True)
class Lineage:
    """Where weights come from: ids of stored files, paths and names of models."""

    train_data: tuple[str, ...] = ()
    data_generator: tuple[str, ...] = ()
    reward_model: tuple[str, ...] = ()
    teacher: tuple[str, ...] = ()
    shares: Mapping[str, float] = field(default_factory=dict)  # of the training data that a generator wrote, where it is known

    @classmethod
    def of(cls, rows: Iterable[tuple[str, str, float | None]]) -> Lineage:
        """From (role, ref, share)."""
        found: dict[str, dict[str, None]] = {role: {} for role in ROLES}
        shares = {}
        for role, ref, share in rows:
            found[role][ref] = None
            if share is not None:
                shares[ref] = share
        return cls(**{role: tuple(refs) for role, refs in found.items()}, shares=shares)

    def rows(self) -> Iterator[tuple[str, str, float | None]]:
        """The way back."""
        for role in ROLES:
            for ref in getattr(self, role):
                yield role, ref, self.shares.get(ref) if role == "data_generator" else None


@dataclass(frozen=True)
class Served:
    """What a name stands for now."""

    kind: Literal["base", "adapter", "alias", "remote"]
    digest: str
    family: str
    template_digest: str
    lineage: Lineage


async def served(store: Store, models: Models, caller: Caller, name: str) -> Served:
    """Reads the folders behind a served name; NotFound for one that is not served."""
    models.find(name, caller)
    await models.brought(await asyncio.to_thread(models.target, name))
    found, rows = await asyncio.to_thread(_read, models, name)
    ids = [ref for role, ref, _ in rows if role == "train_data" and is_id(ref)]
    for file in await store.find(caller, ids):
        rows += [("data_generator", name, None) for name in generators(file)]
    return Served(*found, Lineage.of(rows))


Rows = list[tuple[str, str, float | None]]


def _read(models: Models, name: str) -> tuple[tuple[Any, str, str, str], Rows]:
    target = models.target(name)
    if target.base is None:
        remote = (models.serving.models or {})[name].remote
        assert remote is not None
        model = remote.model or name
        digest = hashlib.sha256(repr((remote.api, remote.url, model)).encode()).hexdigest()
        return ("remote", digest, family(model), ""), []
    kind = "alias" if name in models.registry.aliases() else "adapter" if target.adapter is not None else "base"
    digest = weights_of(target)
    config = read_config(target.base)
    # A name that says more than the type does not come with every folder; the type does.
    kin = family(str(config.get("model_type") or target.base.name))
    template = Template.load(ensure_tokenizer(target.base)).digest
    folders = [folder for folder in (target.base, target.adapter) if folder is not None]
    rows = _lineage(models.registry, {str(folder) for folder in folders})
    for folder in folders:
        rows += _of_run(folder.parent)
    return (kind, digest, kin, template), rows


def weights_of(target: Target) -> str:
    """The digest of a base of this machine, or of one with an adapter over it."""
    assert target.base is not None
    digest = weights_digest(target.base)
    if target.adapter is None:
        return digest
    return hashlib.sha256(f"{digest} {_adapter_digest(target.adapter)}".encode()).hexdigest()


def family(name: str) -> str:
    """Whose kin a model is: the first word of its name or type, without a number. qwen3_moe, Qwen/Qwen3-8B -> qwen."""
    last = name.rsplit("/", 1)[-1].casefold()
    for word, kin in ALSO.items():
        if re.match(rf"{word}(?![a-z])", last):
            return kin
    matched = re.match(r"[a-z]+", last)
    return matched[0] if matched else last


def _adapter_digest(folder: Path) -> str:
    total = hashlib.sha256()
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        with (folder / file).open("rb") as stream:
            total.update(hashlib.file_digest(stream, "sha256").digest())
    return total.hexdigest()


def _lineage(registry: Registry, folders: set[str]) -> Rows:
    """What the registry says of weights that lie in these folders."""
    rows: Rows = []
    for entry in registry.entries():
        if entry.path in folders:
            rows += _named(entry.lineage)
            rows += _of_run(Path(entry.lineage["run"])) if "run" in entry.lineage else []
    return rows


def _of_run(folder: Path) -> Rows:
    """What the run recorded that made the weights in a folder."""
    try:
        record = json.loads((folder / "run.json").read_text(encoding="utf-8"))
        config = record["config"]
    except (OSError, ValueError, KeyError, TypeError):
        return []  # no run of ours
    rows = _named(record.get("lineage") or {}) + _named(config)
    for source in config.get("datasets") or config.get("pretraining_dataset") or []:
        rows.append(("train_data", str(source["path"]), None))
    return rows


def _named(values: Mapping[str, Any]) -> Rows:
    rows: Rows = []
    for role, names in NAMES.items():
        for said in (values[name] for name in names if values.get(name)):
            words = re.split(r"[\s,]+", said) if isinstance(said, str) else said if isinstance(said, list) else []
            for word in words:
                if isinstance(word, str) and word:
                    rows.append((role, *_shared(word)))
    return rows


def _shared(word: str) -> tuple[str, float | None]:
    """NAME=0.62 -> the name and its share."""
    matched = re.fullmatch(r"(.+)=(0?\.[0-9]{1,9}|0|1(?:\.0)?)", word)
    return (matched[1], float(matched[2])) if matched else (word, None)
