"""Whether Triton's kernels run: on a GPU that has tensor cores for bfloat16, where Triton is installed, until one of them does not compile.

ROPEWALK_TRITON=0 leaves them out.
"""

from __future__ import annotations

import importlib.util
import logging
import os

import torch

log = logging.getLogger("ropewalk.kernels")
SWITCH = "ROPEWALK_TRITON"
CAPABILITY = (8, 0)

_refused = False


def usable(device: torch.device) -> bool:
    """Whether to try a kernel on this device."""
    if _refused or device.type != "cuda" or os.environ.get(SWITCH) == "0":
        return False
    return importlib.util.find_spec("triton") is not None and torch.cuda.get_device_capability(device) >= CAPABILITY


def refuse(error: Exception) -> None:
    """A kernel did not run: say so once and try none again. What is no fault of the kernel's is raised."""
    global _refused
    if isinstance(error, torch.OutOfMemoryError):
        raise error
    if not _refused:
        _refused = True
        reason = f"{type(error).__name__}: {str(error).strip()[:500]}"
        log.warning(
            "a Triton kernel did not run, from here on torch's own products are used (%s=0 says so early): %s", SWITCH, reason
        )
