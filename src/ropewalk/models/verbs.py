"""The arguments of `merge`, `base` and `models`."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from ropewalk.verbs import Verb, Verbs, add_verb, database_arguments, registry_of, settings_of


def add_verbs(verbs: Verbs) -> None:
    """`merge`, `base make` and `models ...`."""
    merge = add_verb(
        verbs,
        "merge",
        "write base and adapter as one plain checkpoint, shard by shard, and verify its logits",
        "ropewalk merge base/ run/adapter merged/",
        _merge,
    )
    merge.add_argument("base", type=str, help="folder or hub name of the base")
    merge.add_argument("adapter", type=Path, help="folder of the adapter")
    merge.add_argument("out", type=Path, help="folder to write; must not exist")
    _base(add_verb(verbs, "base", "make small bases", "ropewalk base make tiny-moe --arch qwen3_moe"))
    _models(add_verb(verbs, "models", "models of the hub and of this machine", "ropewalk models list"))


def _base(group: argparse.ArgumentParser) -> None:
    make = add_verb(
        group.add_subparsers(metavar="VERB"),
        "make",
        "make a tokenizer and a randomly initialised model of any architecture that transformers knows",
        "ropewalk base make tiny-moe --arch qwen3_moe --size tiny",
        _make,
    )
    make.add_argument("folder", type=Path, metavar="DIR")
    make.add_argument("--arch", required=True, help="model type as in config.json, such as qwen3_moe, gemma4, mixtral, llama")
    make.add_argument("--size", default="tiny", choices=["tiny", "small"], help="(default: %(default)s)")
    make.add_argument("--text", type=Path, nargs="*", help="text files to train the tokenizer on (default: text at hand)")
    make.add_argument("--seed", type=int, default=0, help="(default: %(default)s)")


def _models(group: argparse.ArgumentParser) -> None:
    inner = group.add_subparsers(metavar="VERB")
    _published(inner, "list", "list what is published, and what each alias points at", "", _list)
    summary = "publish a base, or an adapter over a published base"
    add = _published(inner, "add", summary, "house runs/qwen3-30b/adapter --base qwen3", _add)
    add.add_argument("name")
    add.add_argument("folder", type=Path)
    add.add_argument("--base", help="name of the base that an adapter goes over; leave out for a base")
    ship = _published(inner, "ship", "point an alias at a published name", "answers house", _ship)
    ship.add_argument("alias")
    ship.add_argument("name")
    back = _published(inner, "rollback", "point an alias at what it pointed at before", "answers", _rollback)
    back.add_argument("alias")
    pull = add_verb(
        inner,
        "pull",
        "fetch a model from the hub: resumed, checked for space, its licence shown",
        "ropewalk models pull Qwen/Qwen3-30B-A3B",
        _pull,
    )
    pull.add_argument("name", help="name on the hub, such as Qwen/Qwen3-30B-A3B")
    pull.add_argument("--revision", help="commit, tag or branch (default: the newest, whose commit is printed)")


def _published(inner: Verbs, name: str, summary: str, example: str, run: Verb) -> argparse.ArgumentParser:
    verb = add_verb(inner, name, summary, f"ropewalk models {name} {example}".rstrip(), run)
    database_arguments(verb)
    return verb


def _merge(arguments: argparse.Namespace) -> int:
    from ropewalk.models.hub import resolve_base

    base = resolve_base(arguments.base)
    from ropewalk.models.merge import merge

    merge(base, arguments.adapter, arguments.out)
    print(arguments.out)
    return 0


def _make(arguments: argparse.Namespace) -> int:
    from ropewalk.models.base import make_base

    make_base(arguments.folder, arguments.arch, size=arguments.size, text_files=arguments.text, seed=arguments.seed)
    print(arguments.folder)
    return 0


def _list(arguments: argparse.Namespace) -> int:
    known = registry_of(arguments)
    for entry in known.entries():
        print(f"{entry.name}  {entry.kind}{f' over {entry.base}' if entry.base else ''}  {entry.path}")
    for alias, name in known.aliases().items():
        print(f"{alias} -> {name}")
    return 0


def _add(arguments: argparse.Namespace) -> int:
    from ropewalk.files.local import LocalFiles
    from ropewalk.train.folder import lineage

    known, made = registry_of(arguments), lineage(arguments.folder, LocalFiles(settings_of(arguments)))
    if arguments.base:
        known.publish_adapter(arguments.name, arguments.folder, arguments.base, made)
    else:
        known.publish_base(arguments.name, arguments.folder, made)
    return 0


def _ship(arguments: argparse.Namespace) -> int:
    print(f"{arguments.alias} -> {registry_of(arguments).ship(arguments.alias, arguments.name).name}")
    return 0


def _rollback(arguments: argparse.Namespace) -> int:
    print(f"{arguments.alias} -> {registry_of(arguments).rollback(arguments.alias).name}")
    return 0


def _pull(arguments: argparse.Namespace) -> int:
    from ropewalk.models.hub import pull

    print(pull(arguments.name, arguments.revision, tell=lambda line: print(line, file=sys.stderr)).folder)
    return 0
