"""Saves a run so that it goes on exactly where it was, and never reads what was only half written.

A checkpoint is a folder `checkpoints/step-00000120/`. It is written under another name, synced to disk and renamed, so that it
exists whole or not at all; `manifest.json` holds the digest of every file, so that later damage is noticed and the one before is
taken. What is random in a step is drawn from (seed, step), and the batches are a function of (seed, epoch): neither needs saving.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError

from ropewalk.errors import ModelError, OutputError

MANIFEST = "manifest.json"
STATE = "optimizer.pt"


@dataclass(frozen=True)
class Position:
    """How far a run has come."""

    step: int = 0  # optimizer steps done
    tokens: int = 0  # real tokens seen
    best_loss: float | None = None  # lowest evaluation loss so far
    best_step: int | None = None
    bad_evaluations: int = 0  # evaluations in a row without a new best
    first_loss: float | None = None
    data: dict[str, Any] = field(default_factory=dict)  # a streaming source's place; empty for data that can be indexed


class Stateful(Protocol):
    """An optimizer, or what stands for it."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> object: ...


class Checkpoints:
    """The checkpoints of one run folder, newest last."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def list(self) -> list[Path]:
        return sorted(p for p in self.folder.glob("step-*") if p.is_dir())

    def newest(self) -> Path | None:
        """The newest checkpoint that can be gone on from: its files are all as they were written, the optimizer among them."""
        return next((p for p in reversed(self.list()) if (p / STATE).exists() and is_whole(p)), None)

    def save(self, position: Position, optimizer: Stateful | None, save_weights: Callable[[Path], None]) -> Path:
        """Writes weights, optimizer and position; OutputError where the disk will not have it, with the last good one named."""
        final = self.folder / f"step-{position.step:08d}"
        if final.exists() and is_whole(final):
            return final
        temporary = self.folder / f".writing-{final.name}"
        try:
            shutil.rmtree(temporary, ignore_errors=True)
            shutil.rmtree(final, ignore_errors=True)
            temporary.mkdir(parents=True)
            save_weights(temporary)
            if optimizer is not None:
                torch.save(optimizer.state_dict(), temporary / STATE)
            _seal(temporary, position)
            temporary.rename(final)
            _sync(self.folder)
        except (OSError, RuntimeError, SafetensorError, OutputError) as error:
            shutil.rmtree(temporary, ignore_errors=True)
            raise _explain(error, final, self.newest()) from error
        return final

    def prune(self, keep: int | None, *, but: int | None = None) -> None:
        """Removes all but the newest `keep` and the one of step `but` (the best)."""
        if not keep:
            return
        for path in self.list()[:-keep]:
            if path.name != f"step-{but or 0:08d}":
                doomed = path.with_name(f".removing-{path.name}")
                path.rename(doomed)  # nobody sees, and no kill leaves, half a checkpoint
                shutil.rmtree(doomed)

    def clear_unfinished(self) -> None:
        """Removes what a kill left half written, or half removed."""
        for path in (*self.folder.glob(".writing-*"), *self.folder.glob(".removing-*")):
            shutil.rmtree(path)


def read_position(checkpoint: Path) -> Position:
    """How far the run had come; ModelError where the folder is no whole checkpoint."""
    if not (checkpoint / STATE).exists() or not is_whole(checkpoint):
        raise ModelError(
            f"resume_from_checkpoint: {checkpoint} is not a whole checkpoint with an optimizer state; name another, or none"
        )
    return Position(**json.loads((checkpoint / MANIFEST).read_text(encoding="utf-8"))["position"])


def restore_optimizer(checkpoint: Path, optimizer: Stateful) -> None:
    """Puts back the optimizer's state; tensors only, no pickled code."""
    optimizer.load_state_dict(torch.load(checkpoint / STATE, weights_only=True, map_location="cpu"))


def is_whole(checkpoint: Path) -> bool:
    """Whether every file is there with the digest it was written with."""
    try:
        digests: dict[str, str] = json.loads((checkpoint / MANIFEST).read_text(encoding="utf-8"))["files"]
        return all(_digest(checkpoint / name) == digest for name, digest in digests.items())
    except (OSError, ValueError, KeyError):
        return False


def _seal(folder: Path, position: Position) -> None:
    files = sorted(p for p in folder.rglob("*") if p.is_file())
    for path in files:
        _sync(path)
    manifest = {"position": asdict(position), "files": {str(p.relative_to(folder)): _digest(p) for p in files}}
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=1), encoding="utf-8")
    _sync(folder / MANIFEST)
    _sync(folder)


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _explain(error: Exception, wanted: Path, newest: Path | None) -> OutputError:
    safe = f"the run is safe up to {newest.name} and goes on from there" if newest else "no earlier checkpoint exists"
    return OutputError(
        f"could not write the checkpoint {wanted}: {error}; {safe}. Free disk space or set another `output_dir`, then run it again"
    )
