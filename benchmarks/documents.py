"""What reading a document costs: a process of its own each time, its start included.

    python benchmarks/documents.py [--quick] [--json FILE]

    ms         by the clock, from the call to the answer; median
    cpu_ms     of a processor, in both processes; median. The number to compare on a machine that is busy
    peak_mb    resident memory of the process that read, at most; never below what this process has, from which it begins

Exits 1 if a document has not the characters it was made with.
"""

from __future__ import annotations

import argparse
import resource
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

from forks import forked
from hostile_documents import papers
from measure import machine, table, write_json
from ropewalk import sandbox
from ropewalk.files.reading import Document

LINE = "The rope was laid up by hand, three strands of hemp, a hundred fathoms long."
PAGE = "\n".join(LINE for _ in range(34))
HEAD = ("document", "bytes", "characters", "ms", "cpu_ms", "peak_mb")

# What is made, as what it is read, and the characters that must come out.
READ: dict[str, tuple[Callable[[], bytes], str, int | None]] = {
    "text, one word": (lambda: b"rope", "text/plain", 4),
    "text, 1 MB": (lambda: (LINE + "\n").encode() * (1_000_000 // len(LINE)), "text/plain", None),
    "HTML, 1 MB": (lambda: f"<p>{LINE}</p>".encode() * (1_000_000 // len(LINE)), "text/html", None),
    "PDF, 1 page": (lambda: papers.pdf(PAGE), "application/pdf", len(PAGE)),
    "PDF, 100 pages": (lambda: papers.pdf(*[PAGE] * 100), "application/pdf", 100 * (len(PAGE) + 2) - 2),
    "PDF, 600 pages": (lambda: papers.pdf(*[PAGE] * 600), "application/pdf", 600 * (len(PAGE) + 2) - 2),
    "DOCX": (papers.word, papers.DOCX, None),
    "PPTX": (papers.slides, papers.PPTX, None),
    "XLSX, a million rows, four filled": (papers.sheets, papers.XLSX, None),
    "PNG, 8000 by 8000": (lambda: papers.picture("PNG", 8000, 8000), "image/png", 0),
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="3 times each instead of 11")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the result here")
    arguments = parser.parse_args()
    times = 3 if arguments.quick else 11
    rows = [{"document": "nothing: the start alone", **forked(_measure, lambda: sandbox.call("builtins:len", ("",)), times)}]
    wrong = 0
    for name, (make, media_type, characters) in READ.items():
        data = make()
        rows.append({"document": name, "bytes": len(data), **forked(_measure, partial(_read, data, media_type), times)})
        wrong += characters is not None and rows[-1]["characters"] != characters
    hundred = papers.pdf(*[PAGE] * 100)
    rows.append({"document": "drawing page 50 of 100", **forked(_measure, lambda: _draw(hundred), times)})
    print(table(HEAD, [[row.get(key) for key in HEAD] for row in rows]))
    write_json(arguments.json, {"machine": machine("pypdfium2", "lxml", "pillow"), "rows": rows, "wrong": wrong})
    return 1 if wrong else 0


def _read(data: bytes, media_type: str) -> int:
    made = sandbox.call(
        "ropewalk.files.reading:read_serialised", (media_type, ""), data=data, cpu_seconds=30, result_bytes=64 << 20
    )
    return len(Document.from_bytes(made).text)


def _draw(data: bytes) -> None:
    sandbox.call("ropewalk.files.reading:render_page", ("application/pdf", "", 50), data=data)


async def _measure(work: Callable[[], int | None], times: int) -> dict[str, Any]:
    """In a process of its own, whose children are then only those of this work."""
    walls, processors, characters = [], [], None
    for _ in range(times):
        wall, processor = time.perf_counter(), _processor()
        characters = work()
        walls.append(1000 * (time.perf_counter() - wall))
        processors.append(1000 * (_processor() - processor))
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
    return {
        "characters": characters,
        "ms": round(median(walls)),
        "cpu_ms": round(median(processors)),
        "peak_mb": round(peak / 1024),
    }


def _processor() -> float:
    used = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(one.ru_utime + one.ru_stime for one in used)


if __name__ == "__main__":
    sys.exit(main())
