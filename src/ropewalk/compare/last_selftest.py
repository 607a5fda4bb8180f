"""The last self-test of the rule on this installation: kept beside the data, shown on the method page."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ropewalk.database import now

FILE = "selftest.json"


@dataclass(frozen=True)
class Kept:
    """What `Selftest.as_dict` said, and when."""

    at: int  # microseconds
    found: Mapping[str, Any]


def keep(data: Path, found: Mapping[str, Any]) -> None:
    """Replaces the one before it."""
    data.mkdir(parents=True, exist_ok=True)
    temporary = data / f"{FILE}.new"
    temporary.write_text(json.dumps({"at": now(), "found": dict(found)}), encoding="utf-8")
    os.replace(temporary, data / FILE)


def last(data: Path) -> Kept | None:
    """The last one; None where none was run."""
    try:
        said = json.loads((data / FILE).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    return Kept(said["at"], said["found"])
