"""The machine and the software that figures were taken on: two with different fingerprints are not held against each other."""

from __future__ import annotations

import hashlib
import json
import os
import platform
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from sqlalchemy import select

from ropewalk.compare.tables import fingerprints
from ropewalk.database import now
from ropewalk.engine.models import Models
from ropewalk.errors import NotFound
from ropewalk.files.store import Store

PACKAGES = ("ropewalk", "torch", "transformers", "tokenizers", "safetensors", "numpy")
NVIDIA = Path("/proc/driver/nvidia")
# What of the engine's settings decides how fast it answers and what it takes.
OPTIONS = ("dtype", "device", "memory_gb", "int8_on_disk", "running", "chunk", "threads")


@dataclass(frozen=True)
class Fingerprint:
    """One machine with its software; the same weights on it take the same time and memory."""

    id: str
    device: str
    driver: str
    versions: Mapping[str, str]
    dtype: str  # as it is configured: 'auto' is decided by weights and device
    commit: str  # the version of this program
    detail: Mapping[str, Any]  # cores, memory and settings of the engine


def fingerprint(models: Models) -> Fingerprint:
    """Of this machine, as its models are served now."""
    versions = {"python": platform.python_version()} | {name: found for name in PACKAGES if (found := _version(name))}
    options = models.serving.engine
    detail = {
        "cores": len(os.sched_getaffinity(0)),
        "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / (1 << 30)),
        "system": f"{platform.system()} {platform.machine()}",
        "engine": {name: getattr(options, name) for name in OPTIONS},
    }
    own: dict[str, Any] = {
        "device": _device(),
        "driver": _driver(),
        "versions": versions,
        "dtype": options.dtype,
        "commit": versions.get("ropewalk", ""),
        "detail": detail,
    }
    digest = hashlib.sha256(json.dumps(own, sort_keys=True).encode()).hexdigest()
    return Fingerprint(f"machine_{digest[:24]}", **own)


async def save_fingerprint(store: Store, found: Fingerprint) -> None:
    """Writes it down, where it is not yet."""
    row = {**vars(found), "versions": json.dumps(found.versions), "detail": json.dumps(found.detail), "created_at": now()}
    async with store.database.writing() as connection:
        await connection.execute(store.database.upsert(fingerprints).values(row).on_conflict_do_nothing())


async def get_fingerprint(store: Store, id: str) -> Fingerprint:
    """One that was written down; machines belong to the installation and not to a workspace."""
    async with store.database.reading() as connection:
        row = (await connection.execute(select(fingerprints).where(fingerprints.c.id == id[:128]))).first()
    if row is None:
        raise NotFound(f"Machine `{id[:128]}` not found.")
    own = {name: getattr(row, name) for name in ("id", "device", "driver", "dtype", "commit")}
    return Fingerprint(**own, versions=json.loads(row.versions), detail=json.loads(row.detail))


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return ""


def _device() -> str:
    """The graphics processors, or the processor, by their names."""
    cards = [_field(file, "Model") for file in sorted(NVIDIA.glob("gpus/*/information"))]
    if named := [card for card in cards if card]:
        return f"{len(named)} x {named[0]}" if len(named) > 1 else named[0]
    return _field(Path("/proc/cpuinfo"), "model name") or platform.processor() or platform.machine()


def _driver() -> str:
    try:
        first = (NVIDIA / "version").read_text(encoding="utf-8").splitlines()[0]
    except (OSError, IndexError):
        return platform.release()
    return first.removeprefix("NVRM version:").strip()


def _field(file: Path, name: str) -> str:
    """The first line 'name : value' of a file of the kernel's."""
    try:
        with file.open(encoding="utf-8", errors="replace") as lines:
            for line in lines:
                key, _, value = line.partition(":")
                if key.strip() == name:
                    return " ".join(value.split())
    except OSError:
        pass
    return ""
