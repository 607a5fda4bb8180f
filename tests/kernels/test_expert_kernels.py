"""The Triton kernels without a GPU: in Triton's interpreter, which must be asked for before Triton is imported, hence in a process of its own."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

CASES = [Path(__file__).with_name(f"interpreted_{what}.py") for what in ("experts", "layers", "losses", "rotary")]


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="there is no Triton for this system")
def test_every_kernel_equals_its_twin_in_the_interpreter():
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *map(str, CASES)]
    ran = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, cwd=CASES[0].parents[2])
    assert ran.returncode == 0, ran.stdout[-5000:]
    passed = re.search(r"(\d+) passed", ran.stdout)
    assert passed
    assert int(passed[1]) >= 88
    assert "skipped" not in ran.stdout
