"""Starts one training process per device on this machine, as torchrun would, and ends them all when one fails."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Sequence


def launch(processes: int, arguments: Sequence[str]) -> int:
    """Runs `ropewalk train ARGUMENTS` in so many processes and gives the first exit code that is not 0, else 0."""
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port()), "WORLD_SIZE": str(processes)}
    command = [sys.executable, "-m", "ropewalk", "train", *arguments]
    workers = [
        subprocess.Popen(command, env=os.environ | address | {"RANK": str(rank), "LOCAL_RANK": str(rank)})
        for rank in range(processes)
    ]
    try:
        while True:
            codes = [worker.poll() for worker in workers]
            failed = next((code for code in codes if code), None)
            if failed is not None or all(code == 0 for code in codes):
                return failed or 0
            time.sleep(0.05)
    finally:
        for worker in workers:
            worker.terminate()
        for worker in workers:
            worker.wait()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
