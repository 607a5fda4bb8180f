"""Code held against its tests, in the confined process that checks.py calls: it imports nothing, so that a check costs a bare interpreter."""

from __future__ import annotations

from typing import Any


def run(code: str, tests: str) -> None:
    """The code, and then its tests among its names. Code that ends the process has not passed.

    The two share a process: code written to deceive its tests can. This scores honest answers, and keeps the others from doing harm.
    """
    names: dict[str, Any] = {"__name__": "answer"}
    exec(compile(code, "answer", "exec"), names)
    exec(compile(tests, "tests", "exec"), names)
