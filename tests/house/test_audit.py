"""The audit of what is installed: a known vulnerability fails it, an advisory service that is away does not, and is told."""

import json

from audit import told

GOOD = {"name": "good", "version": "1", "vulns": []}
BAD = {"name": "bad", "version": "2", "vulns": [{"id": "PYSEC-1"}]}
UNKNOWN = {"name": "own", "skip_reason": "not found"}


def test_a_known_vulnerability_is_named_and_fails():
    code, words = told(json.dumps({"dependencies": [GOOD, BAD, UNKNOWN]}))
    assert (code, words) == (1, "2 of 3 packages audited, 1 known vulnerabilities\nbad 2: PYSEC-1")


def test_a_clean_set_passes():
    assert told(json.dumps({"dependencies": [GOOD]})) == (0, "1 of 1 packages audited, 0 known vulnerabilities")


def test_where_nothing_could_be_asked_it_says_so_and_passes():
    assert told("")[0] == 0
    assert told("")[1].startswith("not audited: ")
    assert told(json.dumps({"dependencies": [UNKNOWN]})) == (
        0,
        "not audited: of 1 packages the advisory service knows none",
    )
