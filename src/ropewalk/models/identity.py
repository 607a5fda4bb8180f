"""What names the content of a model folder, without reading all of it. No torch."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

from ropewalk.errors import ModelError
from ropewalk.models.folder import check_folder, read_header

SAMPLE = 1024  # bytes of a tensor read at its beginning, its middle and its end: training changes all of them


def weights_digest(folder: Path) -> str:
    """A hash of the configuration, of every tensor's name and shape, and of samples of every tensor."""
    digest = hashlib.sha256((folder / "config.json").read_bytes())
    for file in check_folder(folder):
        header = read_header(file)
        digest.update(json.dumps([file.name, file.stat().st_size, header], sort_keys=True).encode())
        with file.open("rb") as stream:
            first = 8 + int.from_bytes(stream.read(8), "little")
            for _, entry in sorted(header.items()):
                begin, end = entry["data_offsets"]
                for place in (begin, (begin + end) // 2, max(begin, end - SAMPLE)):
                    digest.update(os.pread(stream.fileno(), min(SAMPLE, end - place), first + place))
    return digest.hexdigest()


def stamp(folder: Path) -> str:
    """Changes whenever a file of the folder does, as far as sizes and times tell."""
    if not folder.is_dir():
        raise ModelError(f"there is no folder {folder} any more; publish the model again")
    parts = sorted((f.name, s.st_size, s.st_mtime_ns) for f in folder.iterdir() if (s := f.stat()) and f.is_file())
    return hashlib.sha256(repr((str(folder), parts)).encode()).hexdigest()[:24]
