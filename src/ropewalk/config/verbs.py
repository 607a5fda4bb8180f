"""The arguments of `config`."""

from __future__ import annotations

import argparse

from ropewalk.verbs import Verbs, add_verb


def add_verbs(verbs: Verbs) -> None:
    """`config schema` and `config docs`."""
    config = add_verb(verbs, "config", "the reference of configuration keys", "ropewalk config docs")
    inner = config.add_subparsers(metavar="VERB")
    add_verb(inner, "schema", "print the JSON Schema of a configuration", "ropewalk config schema > schema.json", _schema)
    add_verb(inner, "docs", "print the reference page of every key", "ropewalk config docs > docs/config.md", _docs)


def _schema(arguments: argparse.Namespace) -> int:
    import json

    from ropewalk.config.reference import schema

    print(json.dumps(schema(), indent=2))
    return 0


def _docs(arguments: argparse.Namespace) -> int:
    from ropewalk.config.reference import reference_page

    print(reference_page(), end="")
    return 0
