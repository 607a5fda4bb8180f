"""A model folder on disk: is it all there, and in files that cannot run code. No torch: faults are told at once."""

from __future__ import annotations

import difflib
import json
from pathlib import Path
from typing import Any

from ropewalk.errors import ModelError

INDEX = "model.safetensors.index.json"
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")


def check_folder(folder: Path) -> list[Path]:
    """The weight files of a complete model folder; a missing, cut or unreadable file is an error that names it."""
    read_config(folder)
    files = weight_files(folder)
    for file in files:
        read_header(file)
    return files


def read_config(folder: Path) -> dict[str, Any]:
    """The folder's config.json."""
    if not folder.is_dir():
        raise ModelError(f"base model '{folder}' not found{_near(folder)}")
    path = folder / "config.json"
    if not path.is_file():
        raise ModelError(f"{folder} is no model folder: it has no config.json, only {_listing(folder)}")
    return _read_json(path)


def sees(folder: Path) -> bool:
    """Whether a folder has what is needed to show a model pictures: a vision tower and a processor."""
    processors = ("preprocessor_config.json", "processor_config.json")
    return bool(read_config(folder).get("vision_config")) and any((folder / name).is_file() for name in processors)


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files that hold the weights, all of them present."""
    index = folder / INDEX
    if index.is_file():
        names = sorted(set(_read_json(index).get("weight_map", {}).values()))
        missing = [name for name in names if not (folder / name).is_file()]
        if missing:
            raise ModelError(f"{folder}: {len(missing)} of {len(names)} weight files are missing, first '{missing[0]}'")
        if not names:
            raise ModelError(f"{index} names no weight file")
        return [folder / name for name in names]
    single = folder / "model.safetensors"
    if single.is_file():
        return [single]
    if any(True for pattern in PICKLES for _ in folder.glob(pattern)):
        raise ModelError(
            f"{folder} holds its weights as pickle files, which can run code when they are opened; Ropewalk reads safetensors "
            "only: take a revision that has them, or convert it once with save_pretrained()"
        )
    raise ModelError(f"{folder} holds no weights: expected model.safetensors or {INDEX}")


def read_header(file: Path) -> dict[str, Any]:
    """The table at the start of a safetensors file: tensor name -> dtype, shape, data_offsets."""
    size = file.stat().st_size
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if size < 8 or length > size - 8:
            raise ModelError(f"{file} is damaged or cut short: it is no safetensors file of {size} bytes; fetch it again")
        try:
            header: dict[str, Any] = json.loads(stream.read(length))
        except ValueError as error:
            raise ModelError(f"{file} is damaged: the table at its start cannot be read; fetch it again") from error
    header.pop("__metadata__", None)
    end = 8 + length + max((entry["data_offsets"][1] for entry in header.values()), default=0)
    if end != size:
        raise ModelError(f"{file} is cut short or damaged: {size} bytes where its table promises {end}; fetch it again")
    return header


def tensor_names(folder: Path) -> list[str]:
    """The names of all tensors in the folder's weight files."""
    index = folder / INDEX
    if index.is_file():
        return list(_read_json(index).get("weight_map", {}))
    return [name for file in weight_files(folder) for name in read_header(file)]


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise ModelError(f"{path} is not readable JSON: {error}") from error
    if not isinstance(value, dict):
        raise ModelError(f"{path} holds a {type(value).__name__} where a JSON object is expected")
    return value


def _near(folder: Path) -> str:
    try:
        siblings = [entry.name for entry in folder.parent.iterdir() if entry.is_dir()]
    except OSError:
        return f": the folder above it, {folder.parent}, does not exist either"
    near = difflib.get_close_matches(folder.name, siblings, n=1)
    return f"; did you mean '{folder.parent / near[0]}'?" if near else ": give a model folder or a name on the hub"


def _listing(folder: Path) -> str:
    names = sorted(entry.name for entry in folder.iterdir())
    return ", ".join(names[:4]) + (", ..." if len(names) > 4 else "") if names else "nothing"
