"""Folders whose names survive a power cut: a synced file is lost all the same when the name of a folder above it is."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path


def make_folder(folder: Path) -> None:
    """The folder exists, for its owner alone, and its name is on the disk, as are those of the parents that had to be made."""
    if not folder.parent.exists():
        make_folder(folder.parent)
    folder.mkdir(mode=0o700, exist_ok=True)
    # Also where it was there already: another process may have made it a moment ago and not yet synced it.
    with suppress(PermissionError):  # a parent that we may not read is older than we are
        sync_folder(folder.parent)


def sync_folder(folder: Path) -> None:
    """What was created, renamed and removed in the folder is so on the disk."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
