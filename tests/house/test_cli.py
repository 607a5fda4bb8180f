"""The command line answers at once, and every verb has an example."""

import argparse
import sys

import pytest

from ropewalk.cli import main, parse, parser
from ropewalk.errors import BadInput, RopewalkError
from spent import spent


def every_parser(top):
    yield top
    for action in top._actions:
        if isinstance(action, argparse._SubParsersAction):
            for inner in action.choices.values():
                yield from every_parser(inner)


def test_help_takes_less_than_half_a_second_of_processor_time():
    code, told, _, seconds = spent(sys.executable, "-m", "ropewalk", "--help")
    assert code == 0
    assert "quickstart" in told
    assert seconds < 0.5


def test_every_verb_shows_an_example():
    assert [p.prog for p in every_parser(parser()) if not (p.epilog or "").startswith("example: ropewalk ")] == []


# These open neither a store nor a registry.
APART = {"merge", "base make", "models pull", "compare selftest", "config schema", "config docs", "bench moe"}


def test_every_verb_over_a_store_says_how_it_is_found():
    silent = set()
    for verb in every_parser(parser()):
        leaf = not any(isinstance(action, argparse._SubParsersAction) for action in verb._actions)
        if leaf and "$ROPEWALK_DATABASE_URL" not in verb.format_help():
            silent.add(verb.prog.removeprefix("ropewalk "))
    assert silent == APART


def test_a_command_without_a_verb_prints_help_and_exits_2(capsys):
    assert main(["models"]) == 2
    assert "pull" in capsys.readouterr().err


def test_an_error_of_ours_is_the_last_line_and_has_its_exit_code(monkeypatch, capsys):
    def fail(path, overrides):
        raise BadInput("the value 7 is not a folder")

    monkeypatch.setattr("ropewalk.config.run.load_run", fail)
    assert main(["train", "x.yml"]) == 2
    assert capsys.readouterr().err.splitlines()[-1] == "ropewalk: the value 7 is not a folder"


def every_error(cls):
    yield cls
    for inner in cls.__subclasses__():
        yield from every_error(inner)


@pytest.mark.parametrize("error", [error for error in every_error(RopewalkError) if error.__module__ == "ropewalk.errors"])
def test_the_tree_in_the_docstring_of_errors_tells_the_truth(error):
    import ropewalk.errors as errors

    line = next(line for line in errors.__doc__.splitlines() if f"{error.__name__} " in line + " ")
    if "exit" in line:
        assert f"exit {error.exit_code}" in line
    if error.claude_type in line:
        assert str(error.status) in line


def test_key_value_may_stand_before_and_after_options():
    assert parse(["train", "x.yml", "a=1", "--restart", "b=2"]).overrides == ["a=1", "b=2"]
    with pytest.raises(SystemExit):
        parse(["train", "x.yml", "--restrat"])
