"""Memory that a step frees is there again in the next one."""

import platform
import subprocess
import sys

import pytest

TWICE = """
import resource
from ropewalk.models.host_memory import keep_freed
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    bytearray(100_000_000)  # 24,415 pages
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
print(faults() > 20_000, faults() > 20_000, keep_freed(), faults() > 20_000, faults() < 100)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc can be told")
def test_pages_are_handed_out_once():
    done = subprocess.run([sys.executable, "-c", TWICE], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["True"] * 5
