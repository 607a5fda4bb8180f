"""`ropewalk doctor`: every part looked at, a line each as it is found."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Collection, Iterator
from threading import Timer

from ropewalk.doctor.findings import Finding, broken
from ropewalk.doctor.installed import installed
from ropewalk.doctor.machine import machine
from ropewalk.doctor.places import places
from ropewalk.files.settings import Settings

SECONDS = 120  # for the process of the probe; on an idle machine it takes about ten
PROBE = "ropewalk.doctor.probe"


def doctor(settings: Settings, needed: Collection[str], *, test: bool, as_json: bool) -> int:
    """Shows all findings; 1 if something that is asked for is broken."""
    findings: list[Finding] = []
    for finding in examine(settings, needed, test=test):
        if not as_json:
            if not findings or findings[-1].part != finding.part:
                print(f"\n{finding.part}" if findings else finding.part)
            print(finding.line(), flush=True)
        findings.append(finding)
    bad = [f"{finding.part}: {finding.name}" for finding in findings if finding.state == "broken"]
    if as_json:
        print(json.dumps({"ok": not bad, "findings": [finding.as_dict() for finding in findings]}, indent=2))
    else:
        print(f"\n{len(bad)} broken: {', '.join(bad)}" if bad else "\nall that was asked for works")
    return 1 if broken(findings) else 0


def examine(settings: Settings, needed: Collection[str], *, test: bool) -> Iterator[Finding]:
    """Part after part; torch is met in a process of its own, since what is broken there may take its process down."""
    yield from installed(set(needed) - {"gpu"})  # the extra of that name is of use on a GPU, and no GPU
    yield from machine()
    yield from asyncio.run(places(settings))
    command = [sys.executable, "-m", PROBE, "gpu" if "gpu" in needed else "any", "test" if test else "look"]
    yield from probed(command)


def probed(command: list[str], seconds: float = SECONDS) -> Iterator[Finding]:
    """What another process finds; its end before its time is a finding too."""
    under_way = "torch"
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as errors:
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True) as process:
            stop = _after(seconds, process.kill)
            try:
                assert process.stdout is not None
                for line in process.stdout:
                    said = json.loads(line)
                    if "begins" in said:
                        under_way = said["begins"]
                    else:
                        yield Finding(**said)
                code = process.wait()
            finally:
                stop()
                process.kill()
        if code:
            errors.seek(0)
            last = ([line.strip() for line in errors if line.strip()] or ["it said nothing"])[-1]
            how = f"signal {-code}" if code < 0 else f"exit code {code}"
            yield Finding("self-test", under_way, "broken", f"the process ended with {how}: {last[:400]}")


def _after(seconds: float, act: Callable[[], None]) -> Callable[[], None]:
    timer = Timer(seconds, act)
    timer.daemon = True
    timer.start()
    return timer.cancel
