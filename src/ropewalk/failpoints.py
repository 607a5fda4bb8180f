"""Places where a crash can be asked for, so that what a crash leaves behind can be tested."""

from __future__ import annotations

import os
import signal
from collections import Counter

_passed: Counter[str] = Counter()


def failpoint(name: str) -> None:
    """Kills this process when $ROPEWALK_FAILPOINT is NAME:COUNT and this is the COUNT-th time that NAME is passed."""
    wanted = os.environ.get("ROPEWALK_FAILPOINT")
    if not wanted:
        return
    _passed[name] += 1
    if wanted == f"{name}:{_passed[name]}":
        os.kill(os.getpid(), signal.SIGKILL)
