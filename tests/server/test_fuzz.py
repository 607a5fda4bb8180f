"""The short form of benchmarks/fuzz_files.py: a few hundred hostile requests against a real server."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "fuzz_files.py"


def test_hostile_requests_are_never_answered_in_the_500s(tmp_path):
    written = tmp_path / "fuzz.json"
    command = [sys.executable, str(SCRIPT), "--requests", "200", "--seed", "7", "--json", str(written)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads(written.read_text(encoding="utf-8"))
    assert (result["requests"], result["server_errors"], result["hung"], result["untrue"]) == (200, 0, 0, 0)
    # Something of every kind was let in, so that what lies behind the first door was tried too.
    assert {"upload 200", "schema 200", "document 200", "preview 200"} <= set(result["statuses"])
