"""The command line, put together from the verbs of each room. Their work is imported after parsing, so that --help answers at once."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from typing import Any

from ropewalk.bench import verbs as bench
from ropewalk.compare import verbs as compare
from ropewalk.config import verbs as config
from ropewalk.doctor import verbs as doctor
from ropewalk.engine import verbs as engine
from ropewalk.errors import RopewalkError
from ropewalk.files import verbs as files
from ropewalk.jobs import verbs as jobs
from ropewalk.models import verbs as models
from ropewalk.quickstart import verbs as quickstart
from ropewalk.server import verbs as server
from ropewalk.tenants import verbs as tenants
from ropewalk.train import verbs as train
from ropewalk.verbs import Verb, needs_verb

# Each has a function add_verbs. In the order of --help; a new room needs an import and its place here.
ROOMS = (quickstart, train, models, compare, engine, server, jobs, files, tenants, config, doctor, bench)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; a RopewalkError becomes one clear last line and its exit code."""
    # Threads that wait must not spin: on a busy machine that makes two threads slower than one. Read when torch is loaded.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    arguments = parse(argv)
    try:
        run: Verb = arguments.run
        return run(arguments)
    except RopewalkError as error:
        print(f"ropewalk: {error}", file=sys.stderr)
        return error.exit_code
    except BrokenPipeError:  # whoever read the output has gone, as `| head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except KeyboardInterrupt:
        print("ropewalk: interrupted", file=sys.stderr)
        return 130


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Reads a command line; key=value may stand before and after options, which argparse by itself does not allow."""
    top = parser()
    arguments, rest = top.parse_known_args(argv)
    if rest and (not hasattr(arguments, "overrides") or any(word.startswith("-") for word in rest)):
        top.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:
        arguments.overrides += rest
    return arguments


def parser() -> argparse.ArgumentParser:
    """Every verb with its arguments and an example."""
    top = argparse.ArgumentParser(
        prog="ropewalk",
        description="From files to a shipped model: fine-tune mixture-of-experts models, compare, ship, ask.",
        epilog="example: ropewalk quickstart        (the whole loop on a small model, on CPU, in minutes)",
    )
    top.add_argument("--version", action="store_true", help="print the version and exit")
    # Of what one room does for another, where the other may not import it.
    top.set_defaults(run=lambda arguments: _version(arguments, top), opens=_open_policy)
    verbs = top.add_subparsers(title="commands", metavar="COMMAND")
    for room in ROOMS:
        room.add_verbs(verbs)
    return top


def _open_policy(*given: Any, **named: Any) -> Any:
    """The address at which `ropewalk train` lets its model be asked."""
    from ropewalk.server.policy_endpoint import open_policy

    return open_policy(*given, **named)


def _version(arguments: argparse.Namespace, top: argparse.ArgumentParser) -> int:
    if not arguments.version:
        return needs_verb(top)
    from importlib.metadata import version

    print(f"ropewalk {version('ropewalk')}")
    return 0
