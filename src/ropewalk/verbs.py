"""What the verbs of every room share: how one is added, and the arguments and settings that several of them have.

A room's own verbs.py holds what its commands take and starts their work. cli.py reads all of them for every command line: at their
top they import nothing else of ours.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

if TYPE_CHECKING:
    from ropewalk.files.settings import Settings
    from ropewalk.registry import Registry

Verb: TypeAlias = Callable[[argparse.Namespace], int]
Verbs: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"


def add_verb(verbs: Verbs, name: str, summary: str, example: str, run: Verb | None = None) -> argparse.ArgumentParser:
    """A verb with its example; without `run`, one that needs another verb after it."""
    verb: argparse.ArgumentParser = verbs.add_parser(name, help=summary, description=summary, epilog=f"example: {example}")
    verb.set_defaults(run=run or (lambda arguments: needs_verb(verb)))
    return verb


def needs_verb(verb: argparse.ArgumentParser) -> int:
    """The answer to a command that says too little: its help, and exit code 2."""
    verb.print_help(sys.stderr)
    return 2


def json_argument(verb: argparse.ArgumentParser) -> None:
    """--json"""
    verb.add_argument("--json", action="store_true", help="print JSON")


def database_arguments(verb: argparse.ArgumentParser) -> None:
    """Where the state is: --data and --database-url."""
    verb.add_argument("--data", type=Path, help="folder of the state (default: $ROPEWALK_HOME, else ~/.ropewalk)")
    verb.add_argument(
        "--database-url",
        metavar="URL",
        help="postgresql+asyncpg://... (default: $ROPEWALK_DATABASE_URL, else SQLite in the data folder)",
    )


def store_arguments(verb: argparse.ArgumentParser) -> None:
    """Where the file store is: its database, and --blobs."""
    database_arguments(verb)
    blobs_argument(verb)


def blobs_argument(verb: argparse.ArgumentParser) -> None:
    """--blobs"""
    verb.add_argument(
        "--blobs",
        metavar="URL",
        help="s3://BUCKET/PREFIX, gs://... or az://... (default: $ROPEWALK_BLOBS, else the data folder)",
    )


# What is said of commands without these arguments.
BY_ENVIRONMENT = "files by their ids are those of $ROPEWALK_HOME, $ROPEWALK_DATABASE_URL and $ROPEWALK_BLOBS"


def settings_of(arguments: argparse.Namespace, **more: Any) -> Settings:
    """The store that the arguments mean."""
    from ropewalk.files.settings import Settings

    given: dict[str, Any] = {name: getattr(arguments, name, None) for name in ("data", "database_url", "blobs")}
    return Settings(**{name: value for name, value in given.items() if value is not None}, **more)


def registry_of(arguments: argparse.Namespace) -> Registry:
    """The models that the arguments mean: this machine's, or those that it shares with others."""
    from ropewalk.shared_registry import open_registry

    settings = settings_of(arguments)
    return open_registry(settings.data, settings.database_url)
