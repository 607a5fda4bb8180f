"""How `ropewalk quickstart` ends: with the server up before a person, with files before anything else."""

import pytest

from ropewalk import cli
from ropewalk.quickstart import verbs


@pytest.fixture
def became(monkeypatch):
    """What the process turned into, in place of the quickstart's own work."""
    commands = []
    monkeypatch.setattr("ropewalk.quickstart.run.quickstart", lambda **_: None)
    monkeypatch.setattr(verbs.os, "execv", lambda program, command: commands.append(command))
    monkeypatch.delenv("CI", raising=False)
    return commands


def on_a_terminal(monkeypatch, is_one):
    for stream in ("stdin", "stdout"):
        monkeypatch.setattr(f"sys.{stream}.isatty", lambda: is_one)


def test_on_a_terminal_the_quickstart_ends_as_the_server(became, monkeypatch):
    on_a_terminal(monkeypatch, True)
    monkeypatch.setattr(verbs, "_is_free", lambda port: True)
    assert cli.main(["quickstart"]) == 0
    assert [command[1:] for command in became] == [["-m", "ropewalk", "serve", "--port", "8700"]]


def test_a_port_that_is_taken_is_not_insisted_on(became, monkeypatch):
    on_a_terminal(monkeypatch, True)
    with verbs.socket.create_server(("127.0.0.1", 0)) as taken:
        monkeypatch.setattr(verbs, "PORT", taken.getsockname()[1])
        cli.main(["quickstart"])
    assert became[0][-1] == "0"


@pytest.mark.parametrize(("arguments", "is_one"), [((), False), (("--no-serve",), True)])
def test_without_a_terminal_or_on_request_it_just_ends(became, monkeypatch, arguments, is_one):
    on_a_terminal(monkeypatch, is_one)
    assert cli.main(["quickstart", *arguments]) == 0
    assert not became


def test_continuous_integration_is_no_person(became, monkeypatch):
    on_a_terminal(monkeypatch, True)
    monkeypatch.setenv("CI", "true")
    cli.main(["quickstart"])
    assert not became
