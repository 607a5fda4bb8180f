"""The page of tenants shows only command lines and paths that there are."""

import re
import shlex
from pathlib import Path

import pytest

from ropewalk.cli import parse
from ropewalk.server.admin import routes
from ropewalk.tenants.audit import ACTIONS
from ropewalk.tenants.caller import RIGHTS

PAGE = (Path(__file__).parents[2] / "docs" / "tenants.md").read_text(encoding="utf-8")
COMMANDS = [line.strip() for line in PAGE.splitlines() if line.startswith("    ropewalk ")]


@pytest.mark.parametrize("line", COMMANDS)
def test_a_command_line_of_the_page_is_understood(line):
    words = shlex.split(line, comments=True)
    if ">" in words:
        words = words[: words.index(">")]
    assert parse(words[1:]).run.__name__ != "<lambda>"  # of a group without its verb


def test_the_page_names_every_right_and_every_route():
    assert len(COMMANDS) > 20
    assert set(re.findall(r"^\| `(\w+)` \|", PAGE, re.MULTILINE)) == RIGHTS
    for route in routes:
        path = re.sub(r"\{\w+\}", "{id}", route.path).removeprefix("/v1/organizations")
        assert f"{path}`" in PAGE or f"{path}?" in PAGE, path
    assert "denied" in ACTIONS
