"""The pytest plugin of an SDK's environment: rows put back before each test, expected failures marked, results counted.

It knows nothing of ours but the seeder's address, so that it runs where only an SDK and pytest are installed.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from expected_failures import EXPECTED_FAILURES
from seeder_client import Seeder

RESEED = os.environ.get("ROPEWALK_TEST_RESEED") == "1"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Strict, and of one exception only: passing, or failing in any other way, is a failure."""
    for item in items:
        if item.nodeid in EXPECTED_FAILURES:
            from anthropic import BadRequestError

            item.add_marker(pytest.mark.xfail(reason=EXPECTED_FAILURES[item.nodeid], raises=BadRequestError, strict=True))


def pytest_sessionstart(session: pytest.Session) -> None:
    if RESEED:
        session.config.stash[_SEEDER] = Seeder()


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Returns when the rows are in the database, and one process runs one test at a time: no test meets another's deletion."""
    if RESEED:
        item.config.stash[_SEEDER].ask("rows")


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    counts = {name: len(terminalreporter.stats.get(name, [])) for name in ("passed", "failed", "error", "xfailed", "skipped")}
    line = {
        "passed": counts["passed"],
        "failed": counts["failed"] + counts["error"],
        "expected_failures": counts["xfailed"],
        "skipped": counts["skipped"],
    }
    Path(os.environ["ROPEWALK_TEST_COUNTS"]).write_text(json.dumps(line), encoding="utf-8")


_SEEDER = pytest.StashKey[Seeder]()
