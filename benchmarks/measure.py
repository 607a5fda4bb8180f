"""Shared by the benchmarks: runs a command and watches its process tree, names the machine, prints tables, writes results.

Linux only: it reads /proc. Memory is resident memory summed over the whole process tree, CPU is that of the whole tree, whatever
the contender; a page shared by two processes counts twice for everybody.
"""

from __future__ import annotations

import json
import os
import platform
import re
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import median
from typing import Any

PAGE, TICK = os.sysconf("SC_PAGE_SIZE"), os.sysconf("SC_CLK_TCK")
SAMPLE_SECONDS = 0.2


@dataclass(frozen=True)
class Mark:
    """A line of a command's output that matched: when, what, and the CPU seconds of the tree until then."""

    seconds: float
    cpu_seconds: float
    text: str
    value: float


@dataclass(frozen=True)
class Watched:
    """What a command did."""

    code: int
    seconds: float
    cpu_seconds: float
    peak_rss: int  # bytes, of the whole tree
    marks: tuple[Mark, ...]
    log: Path

    @property
    def tail(self) -> str:
        """The last lines of its output, to show why it failed."""
        lines = [line for line in re.split(r"[\r\n]", self.log.read_text(encoding="utf-8", errors="replace")) if line.strip()]
        return "\n".join(lines[-8:])


def watch(
    command: Sequence[str],
    log: Path,
    *,
    pattern: str = "(?!)",
    cwd: Path | None = None,
    environment: Mapping[str, str] | None = None,
    timeout: float = 600.0,
    until: Callable[[Mark], bool] | None = None,
) -> Watched:
    """Runs a command to its end (or to the first mark that `until` accepts) while sampling its process tree.

    Every line of output that matches `pattern` becomes a Mark, whose value is the first group. At the timeout the tree is killed.
    """
    marks: list[Mark] = []
    begun = time.perf_counter()
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        cwd=cwd,
        env=os.environ | {"PYTHONUNBUFFERED": "1"} | dict(environment or {}),
        start_new_session=True,
    )
    tree = _Tree(process.pid)
    late = threading.Timer(timeout, tree.kill)
    late.daemon = True
    late.start()
    assert process.stdout is not None
    expression = re.compile(pattern)
    with process.stdout, log.open("wb") as file:
        for raw in _lines(process.stdout.fileno(), file.write):
            if found := expression.search(raw):
                marks.append(Mark(time.perf_counter() - begun, tree.sample(), raw, float(found[1])))
                if until and until(marks[-1]):
                    tree.kill()
    _, status, used = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - begun
    process.returncode = os.waitstatus_to_exitcode(status)
    late.cancel()
    tree.stop()
    return Watched(
        code=process.returncode,
        seconds=seconds,
        cpu_seconds=max(used.ru_utime + used.ru_stime, tree.cpu_seconds),
        peak_rss=tree.peak_rss,  # not ru_maxrss: that begins with the size of whoever forked
        marks=tuple(marks),
        log=log,
    )


def _lines(handle: int, keep: Callable[[bytes], Any]) -> Any:
    """Lines as they arrive; a carriage return ends one too, since progress bars are drawn with it."""
    rest = b""
    while chunk := os.read(handle, 1 << 16):
        keep(chunk)
        *whole, rest = re.split(rb"[\r\n]", rest + chunk)
        for line in whole:
            yield line.decode("utf-8", "replace")
    if rest:
        yield rest.decode("utf-8", "replace")


class _Tree:
    """A process and all its descendants, sampled in the background."""

    def __init__(self, root: int) -> None:
        self.root, self.peak_rss, self.cpu_seconds = root, 0, 0.0
        self._stop = threading.Event()
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def sample(self) -> float:
        """Notes the memory of this moment and gives the CPU seconds so far."""
        rss = 0
        ticks = 0
        for pid in descendants(self.root):
            try:
                rss += int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * PAGE
                # utime, stime, and those of children that ended and were waited for: fields 14 to 17 of proc(5)
                ticks += sum(int(x) for x in Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[11:15])
            except (OSError, IndexError):
                continue  # it ended between the listing and the reading
        with self._lock:
            self.peak_rss = max(self.peak_rss, rss)
            self.cpu_seconds = max(self.cpu_seconds, ticks / TICK)
            return self.cpu_seconds

    def kill(self) -> None:
        """Ends the whole tree at once, children first."""
        for pid in reversed(descendants(self.root)):
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue

    def stop(self) -> None:
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._stop.wait(SAMPLE_SECONDS):
            self.sample()


def descendants(root: int) -> list[int]:
    """The process and everything below it, parents first."""
    children: dict[int, list[int]] = {}
    for entry in os.scandir("/proc"):
        if entry.name.isdigit():
            try:
                parent = int(Path(f"/proc/{entry.name}/stat").read_text().rpartition(")")[2].split()[1])
            except OSError:
                continue
            children.setdefault(parent, []).append(int(entry.name))
    found = [root]
    for pid in found:
        found += children.get(pid, [])
    return found


def cpu_seconds(process_id: int) -> float:
    """What a process and all below it have computed, to the nanosecond (the ticks of /proc/PID/stat are too coarse for one request)."""
    total = 0
    for pid in descendants(process_id):
        for task in Path(f"/proc/{pid}/task").glob("*/schedstat"):
            with suppress(OSError):  # it ended between the listing and the reading
                total += int(task.read_text().split()[0])
    return total / 1e9


def machine(*packages: str) -> dict[str, Any]:
    """What a number was measured on; `packages` adds their installed versions."""
    names = ("torch", "transformers", "peft", "ropewalk", *packages)
    return {
        "cpu": _cpu_name(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gb": round(os.sysconf("SC_PHYS_PAGES") * PAGE / 2**30, 1),
        "system": platform.platform(),
        "load": round(os.getloadavg()[0], 2),
        "versions": {"python": platform.python_version()} | {n: v for n in names if (v := _version(n))},
        "time": time.strftime("%Y-%m-%d %H:%M"),
    }


def _cpu_name() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def middle(values: Sequence[float]) -> float:
    return float(median(values))


def table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """A Markdown table with aligned columns, to print and to paste into the docs; numbers to the right, None as a dash."""
    cells = [[_cell(value) for value in row] for row in (head, *rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(head))]
    right = [bool(rows) and all(isinstance(row[i], int | float | None) for row in rows) for i in range(len(head))]
    lines = ["| " + " | ".join(c.rjust(w) if r else c.ljust(w) for c, w, r in zip(row, widths, right)) + " |" for row in cells]
    lines.insert(1, "|" + "|".join("-" * (w + 1) + (":" if r else "-") for w, r in zip(widths, right)) + "|")
    return "\n".join(lines)


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.3g}" if abs(value) < 0.01 else f"{value:.2f}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def write_json(path: Path | None, result: Mapping[str, Any]) -> None:
    """Writes a result where --json was given, atomically."""
    if path is None:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = path.with_name(path.name + ".new")
    fresh.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    fresh.replace(path)
