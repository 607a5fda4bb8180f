"""Where Ropewalk keeps its own state."""

from __future__ import annotations

import os
from pathlib import Path


def home() -> Path:
    """$ROPEWALK_HOME, else ~/.ropewalk."""
    return Path(os.environ.get("ROPEWALK_HOME") or Path.home() / ".ropewalk").expanduser()
