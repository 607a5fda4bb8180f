"""Memory of the host that is freed: kept where a training wants it again in the next step, given back where it will not be.

A step on a CPU takes and returns hundreds of megabytes in large blocks. glibc gives each back to the system at once, which hands out new
pages, one fault and one filling with zeros after another: up to a tenth of a step. Kept, they are there again. No torch.
"""

from __future__ import annotations

import ctypes
import platform

TRIM_THRESHOLD, MMAP_THRESHOLD, MMAP_MAX = -1, -3, -4  # of mallopt(3)
USUAL = 2**25  # bytes of a block that glibc gives back at once when it has seen many
LARGE = 2**31 - 1  # bytes of a block that is still given back; an older glibc refuses so many and gives none back


def keep_freed() -> bool:
    """From here on this process returns nothing to the system before it ends -> whether it could be arranged."""
    if platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    return bool(mallopt(MMAP_THRESHOLD, LARGE) or mallopt(MMAP_MAX, 0)) and bool(mallopt(TRIM_THRESHOLD, -1))


def give_back(large: int = 2**20) -> None:
    """From here on freed blocks of so many bytes go back to the system at once, where glibc else keeps them up to 32 MB, full of holes."""
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).mallopt(MMAP_THRESHOLD, large)
