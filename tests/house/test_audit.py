"""The audit of what is installed: a known vulnerability fails it, an advisory service that is away does not, and is told."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import audit
from audit import told

GOOD = {"name": "good", "version": "1", "vulns": []}
BAD = {"name": "bad", "version": "2", "vulns": [{"id": "PYSEC-1"}]}
UNKNOWN = {"name": "own", "skip_reason": "not found"}


def test_a_known_vulnerability_is_named_and_fails():
    code, words = told(1, json.dumps({"dependencies": [GOOD, BAD, UNKNOWN]}))
    assert (code, words) == (1, "2 of 3 packages audited, 1 known vulnerabilities\nbad 2: PYSEC-1")


def test_a_clean_set_passes():
    assert told(0, json.dumps({"dependencies": [GOOD]})) == (0, "1 of 1 packages audited, 0 known vulnerabilities")


@pytest.mark.parametrize(
    "said",
    [
        "ERROR:pip_audit._cli:Could not connect to PyPI's vulnerability feed\nERROR:pip_audit._cli:Tip: try again",
        "Traceback (most recent call last):\nrequests.exceptions.ConnectionError: HTTPSConnectionPool: Max retries exceeded",
    ],
)
def test_a_service_that_is_away_is_told_and_passes(said):
    code, words = told(1, "", said)
    assert (code, words.partition(": ")[0]) == (0, "not audited")
    assert "Could not connect to PyPI" in words or "requests.exceptions.ConnectionError" in words


def test_packages_that_the_service_does_not_know_are_told_and_pass():
    found = json.dumps({"dependencies": [UNKNOWN]})
    assert told(0, found) == (0, "not audited: of 1 packages the advisory service knows none")


@pytest.mark.parametrize(
    ("output", "said"),
    [
        ("", "python: No module named pip_audit"),
        ("", "Traceback (most recent call last):\nTypeError: unsupported operand"),
        ("", ""),
        ("{}", ""),
    ],
)
def test_an_audit_that_did_not_work_fails(output, said):
    code, words = told(1, output, said)
    assert code == 1
    assert (said.splitlines() or ["it said nothing"])[-1] in words


def test_without_pip_audit_the_script_fails(tmp_path):
    (tmp_path / "pip_audit.py").write_text("raise ImportError('there is none')\n")
    done = subprocess.run(
        [sys.executable, Path(audit.__file__)], capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(tmp_path)}
    )
    assert (done.returncode, "ImportError: there is none" in done.stdout) == (1, True)
