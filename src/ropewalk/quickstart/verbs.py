"""The arguments of `quickstart`."""

from __future__ import annotations

import argparse
import os
import socket
import sys
from pathlib import Path

from ropewalk.verbs import BY_ENVIRONMENT, Verbs, add_verb

PORT = 8700  # what `ropewalk serve` listens on by itself


def add_verbs(verbs: Verbs) -> None:
    """`quickstart`."""
    verb = add_verb(
        verbs,
        "quickstart",
        "the whole loop on a small model, on CPU, in minutes",
        "ropewalk quickstart --dir runs/quickstart",
        _quickstart,
    )
    verb.add_argument(
        "--dir",
        type=Path,
        default=Path("runs/quickstart"),
        help=f"where everything goes but stored files and models (default: %(default)s); {BY_ENVIRONMENT}",
    )
    verb.add_argument("--fast", action="store_true", help="the short form: fewer steps, fewer controls")
    verb.add_argument(
        "--serve",
        action=argparse.BooleanOptionalAction,
        default=sys.stdin.isatty() and sys.stdout.isatty() and not os.environ.get("CI"),
        help="end with the server up, until Ctrl-C (default: on a terminal)",
    )


def _quickstart(arguments: argparse.Namespace) -> int:
    from ropewalk.quickstart.run import quickstart

    quickstart(fast=arguments.fast, folder=arguments.dir)
    if arguments.serve:
        _become_server()
    return 0


def _become_server() -> None:
    """The server takes the place of this process, and with it the terminal; the models trained here need no memory any more."""
    print("\nThe server starts, with everything that was made. Ctrl-C stops it; `ropewalk serve` starts it again.", flush=True)
    command = [sys.executable, "-m", "ropewalk", "serve", "--port", str(PORT if _is_free(PORT) else 0)]
    os.execv(sys.executable, command)


def _is_free(port: int) -> bool:
    try:
        socket.create_server(("127.0.0.1", port)).close()
    except OSError:
        return False
    return True
