"""The commands around a run: publish, ship, roll back, ask."""

import io

import pytest

from ropewalk.cli import main
from ropewalk.quickstart.run import BASE


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("ROPEWALK_HOME", str(tmp_path / "home"))


def test_an_alias_is_shipped_listed_asked_and_rolled_back(capsys, monkeypatch):
    for name in ("one", "two"):
        assert main(["models", "add", name, str(BASE)]) == 0
        assert main(["models", "ship", "answers", name]) == 0
    assert main(["models", "list"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "answers -> two"
    assert main(["chat", "answers", "hello", "--max-tokens", "3"]) == 0
    once = capsys.readouterr().out
    monkeypatch.setattr("sys.stdin", io.StringIO("hello\nand again\n"))
    assert main(["chat", "answers", "--max-tokens", "3"]) == 0
    assert capsys.readouterr().out.startswith(f"you: answers: {once}")
    assert main(["models", "rollback", "answers"]) == 0
    assert capsys.readouterr().out == "answers -> one\n"


def test_a_name_that_nobody_published_is_told_with_those_that_are(capsys):
    main(["models", "add", "one", str(BASE)])
    assert main(["chat", "three", "hello"]) == 2
    assert capsys.readouterr().err.splitlines()[-1] == "ropewalk: nothing is published as 'three'; known: one"
