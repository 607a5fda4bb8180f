"""The arguments of `quickstart`."""

from __future__ import annotations

import argparse
from pathlib import Path

from ropewalk.verbs import Verbs, add_verb


def add_verbs(verbs: Verbs) -> None:
    """`quickstart`."""
    verb = add_verb(
        verbs,
        "quickstart",
        "the whole loop on a small model, on CPU, in minutes",
        "ropewalk quickstart --dir runs/quickstart",
        _quickstart,
    )
    verb.add_argument("--dir", type=Path, default=Path("runs/quickstart"), help="where everything goes (default: %(default)s)")
    verb.add_argument("--fast", action="store_true", help="the short form: fewer steps, fewer controls")


def _quickstart(arguments: argparse.Namespace) -> int:
    from ropewalk.quickstart.run import quickstart

    quickstart(fast=arguments.fast, folder=arguments.dir)
    return 0
