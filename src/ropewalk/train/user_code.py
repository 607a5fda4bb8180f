"""Python of a user's, found by the name that a configuration gives it: `module.name` or `path/to/file.py:name`."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ropewalk.errors import BadInput


def load_named(name: str, folders: Sequence[str], *, kind: str, noun: str) -> Any:
    """What a name stands for, which is a `noun` for a `kind`; runs the user's module."""
    place, own = split_name(name, kind=kind, noun=noun)
    found = _module(place, f"{kind} '{name}'", folders, noun)
    if not hasattr(found, own):
        known = [key for key, value in vars(found).items() if callable(value) and not key.startswith("_")]
        raise BadInput(f"{kind} '{name}': {place} has no '{own}'; it has {', '.join(known[:12]) or f'no {noun} at all'}")
    return getattr(found, own)


def split_name(name: str, *, kind: str, noun: str) -> tuple[str, str]:
    """`pkg.module.name` or `file.py:name` -> where it is and what it is called."""
    place, mark, own = name.rpartition(":") if ":" in name else name.rpartition(".")
    if not place or not mark or not own.isidentifier():
        more = ", or one of the built-in kinds" if noun == "function" else ""
        raise BadInput(f"{kind} '{name}' names no {noun}; expected module.{noun}, or path/to/file.py:{noun}{more}")
    return place, own


def _module(place: str, asked: str, folders: Sequence[str], noun: str) -> Any:
    for folder in folders:
        if folder not in sys.path:
            sys.path.append(folder)
    if place.endswith(".py"):
        found = [path for path in (Path(folder, place).expanduser() for folder in folders or (".",)) if path.is_file()]
        if not found:
            raise BadInput(f"{asked}: there is no file {place} in {' or '.join(folders or ('.',))}")
        spec = importlib.util.spec_from_file_location(found[0].stem, found[0])
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules.setdefault(found[0].stem, module)
        spec.loader.exec_module(module)
        return module
    try:
        return importlib.import_module(place)
    except ModuleNotFoundError as error:
        if error.name and (place == error.name or place.startswith(f"{error.name}.")):
            raise BadInput(
                f"{asked}: there is no module '{error.name}' in {', '.join(folders) or 'the path of Python'}; "
                f"write path/to/file.py:{noun}, or put the file beside the configuration"
            ) from None
        raise
