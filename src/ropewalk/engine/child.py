"""A process of ours that is told and tells in lines of JSON: the settings first, and when its input ends, it ends. No torch."""

from __future__ import annotations

import asyncio
import json
import os
import sys
from collections.abc import Mapping
from typing import Any

from ropewalk import errors
from ropewalk.errors import RopewalkError

LINE = 1 << 26  # bytes of one line at most
STOP_SECONDS = 10.0


async def start(module: str, settings: Mapping[str, Any]) -> tuple[asyncio.subprocess.Process, bytes]:
    """The process, which knows no root key, and the first line that it says; b"" where it has ended instead."""
    pipe = asyncio.subprocess.PIPE
    environment = {name: value for name, value in os.environ.items() if not name.startswith("ROPEWALK_ROOT_KEY")}
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", module, stdin=pipe, stdout=pipe, limit=LINE, env=environment
    )
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        process.stdin.write(json.dumps(settings).encode() + b"\n")
        return process, await process.stdout.readline()
    except BaseException:  # nobody knows the process yet: it would stay for ever
        if process.returncode is None:
            process.kill()
        await process.wait()
        raise


async def end(process: asyncio.subprocess.Process) -> None:
    """Has it end, by force if it takes too long."""
    if process.returncode is not None:
        return
    assert process.stdin is not None
    process.stdin.close()
    try:
        async with asyncio.timeout(STOP_SECONDS):
            await process.wait()
    except TimeoutError:
        process.kill()
        await process.wait()


def raised(name: str, message: str) -> RopewalkError:
    """An error of the other process, as it was raised there."""
    kind: type[RopewalkError] = getattr(errors, name, RopewalkError)
    error = RopewalkError.__new__(kind)
    Exception.__init__(error, message)
    return error
