"""The command line: one verb per command. Everything else is imported after parsing, so that --help answers at once."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from ropewalk.errors import RopewalkError

if TYPE_CHECKING:
    from ropewalk.files.local import LocalFiles
    from ropewalk.files.settings import Settings
    from ropewalk.registry import Registry
    from ropewalk.tenants.commands import Place

Verb = Callable[[argparse.Namespace], int]


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
    top.set_defaults(run=lambda arguments: _version(arguments, top))
    verbs = top.add_subparsers(title="commands", metavar="COMMAND")
    _quickstart(verbs)
    _training(verbs)
    _models(verbs)
    _serve(verbs)
    _files(verbs)
    _tenants(verbs)
    _config(verbs)
    return top


Verbs: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"


def _add(verbs: Verbs, name: str, summary: str, example: str, run: Verb | None) -> argparse.ArgumentParser:
    verb: argparse.ArgumentParser = verbs.add_parser(name, help=summary, description=summary, epilog=f"example: {example}")
    verb.set_defaults(run=run or (lambda arguments: _needs_verb(verb)))
    return verb


def _needs_verb(verb: argparse.ArgumentParser) -> int:
    verb.print_help(sys.stderr)
    return 2


def _version(arguments: argparse.Namespace, top: argparse.ArgumentParser) -> int:
    if not arguments.version:
        return _needs_verb(top)
    from importlib.metadata import version

    print(f"ropewalk {version('ropewalk')}")
    return 0


# -- quickstart ------------------------------------------------------------------------------------------------------------------


def _quickstart(verbs: Verbs) -> None:
    verb = _add(
        verbs,
        "quickstart",
        "the whole loop on a small model, on CPU, in minutes",
        "ropewalk quickstart --dir runs/quickstart",
        _run_quickstart,
    )
    verb.add_argument("--dir", type=Path, default=Path("runs/quickstart"), help="where everything goes (default: %(default)s)")
    verb.add_argument("--fast", action="store_true", help="the short form: fewer steps, fewer controls")


def _run_quickstart(arguments: argparse.Namespace) -> int:
    from ropewalk.quickstart.run import quickstart

    quickstart(fast=arguments.fast, folder=arguments.dir)
    return 0


# -- training --------------------------------------------------------------------------------------------------------------------


def _config_argument(verb: argparse.ArgumentParser) -> None:
    verb.add_argument("config", type=Path, metavar="CONFIG", help="a YAML file with Axolotl's keys")
    verb.add_argument(
        "overrides", nargs="*", metavar="key=value", help="values laid over the file's, such as learning_rate=1e-4"
    )


def _training(verbs: Verbs) -> None:
    check = _add(
        verbs,
        "check",
        "validate a configuration and show what will be trained, without loading weights",
        "ropewalk check examples/sft-tiny.yml",
        _run_check,
    )
    _config_argument(check)
    check.add_argument("--offline", action="store_true", help="fetch nothing; what is not on disk is named as not checked")
    check.add_argument("--json", action="store_true", help="print the plan as JSON")
    train = _add(
        verbs,
        "train",
        "train; goes on by itself with an unfinished run in the output folder",
        "ropewalk train examples/sft-tiny.yml learning_rate=1e-4",
        _run_train,
    )
    _config_argument(train)
    train.add_argument("--restart", action="store_true", help="move a run that the output folder holds aside and begin anew")
    train.add_argument("--processes", type=int, default=1, metavar="N", help="train with N processes on this machine")
    train.add_argument("--trust-remote-code", action="store_true", help="let Python code that comes with the base run")
    merge = _add(
        verbs,
        "merge",
        "write base and adapter as one plain checkpoint, shard by shard, and verify its logits",
        "ropewalk merge base/ run/adapter merged/",
        _run_merge,
    )
    merge.add_argument("base", type=str, help="folder or hub name of the base")
    merge.add_argument("adapter", type=Path, help="folder of the adapter")
    merge.add_argument("out", type=Path, help="folder to write; must not exist")


def _run_check(arguments: argparse.Namespace) -> int:
    from ropewalk.train.plan import check_command

    return check_command(arguments.config, arguments.overrides, offline=arguments.offline, as_json=arguments.json)


def _run_train(arguments: argparse.Namespace) -> int:
    from ropewalk.config.run import load_run
    from ropewalk.train.prepare import prepare

    run = load_run(arguments.config, arguments.overrides)
    trusted = arguments.trust_remote_code
    prepared = prepare(run, restart=arguments.restart, trust_remote_code=trusted)
    if arguments.processes > 1 and "WORLD_SIZE" not in os.environ and not prepared.folder.finished:
        prepared.folder.close()
        from ropewalk.train.launch import launch

        return launch(arguments.processes, [str(arguments.config), *arguments.overrides, *["--trust-remote-code"] * trusted])
    from ropewalk.train.trainer import fit

    fit(prepared)
    return 0


def _run_merge(arguments: argparse.Namespace) -> int:
    from ropewalk.models.hub import resolve_base

    base = resolve_base(arguments.base)
    from ropewalk.models.merge import merge

    merge(base, arguments.adapter, arguments.out)
    print(arguments.out)
    return 0


# -- models ----------------------------------------------------------------------------------------------------------------------


def _models(verbs: Verbs) -> None:
    base = _add(verbs, "base", "make small bases", "ropewalk base make tiny-moe --arch qwen3_moe", None)
    make = _add(
        base.add_subparsers(metavar="VERB"),
        "make",
        "make a tokenizer and a randomly initialised model of any architecture that transformers knows",
        "ropewalk base make tiny-moe --arch qwen3_moe --size tiny",
        _run_base_make,
    )
    make.add_argument("folder", type=Path, metavar="DIR")
    make.add_argument("--arch", required=True, help="model type as in config.json, such as qwen3_moe, gemma4, mixtral, llama")
    make.add_argument("--size", default="tiny", choices=["tiny", "small"], help="(default: %(default)s)")
    make.add_argument("--text", type=Path, nargs="*", help="text files to train the tokenizer on (default: text at hand)")
    make.add_argument("--seed", type=int, default=0, help="(default: %(default)s)")
    models = _add(verbs, "models", "models of the hub and of this machine", "ropewalk models list", None)
    inner = models.add_subparsers(metavar="VERB")
    _add(inner, "list", "list what is published, and what each alias points at", "ropewalk models list", _run_models_list)
    add = _add(
        inner,
        "add",
        "publish a base, or an adapter over a published base",
        "ropewalk models add house runs/qwen3-30b/adapter --base qwen3",
        _run_models_add,
    )
    add.add_argument("name")
    add.add_argument("folder", type=Path)
    add.add_argument("--base", help="name of the base that an adapter goes over; leave out for a base")
    ship = _add(inner, "ship", "point an alias at a published name", "ropewalk models ship answers house", _run_models_ship)
    ship.add_argument("alias")
    ship.add_argument("name")
    back = _add(
        inner,
        "rollback",
        "point an alias at what it pointed at before",
        "ropewalk models rollback answers",
        _run_models_rollback,
    )
    back.add_argument("alias")
    chat = _add(
        verbs,
        "chat",
        "ask a published model or alias",
        "ropewalk chat answers 'What does it cost?' --file report.pdf",
        _run_chat,
    )
    chat.add_argument("name", help="an alias, a base or an adapter; see `ropewalk models list`")
    chat.add_argument("prompt", nargs="?", help="one question; without it, a conversation until end of input")
    chat.add_argument("--max-tokens", type=int, default=512, help="(default: %(default)s)")
    chat.add_argument(
        "--file", action="append", default=[], metavar="FILE", help="a file to ask about, or its id; may be given several times"
    )
    _store_arguments(chat)
    pull = _add(
        inner,
        "pull",
        "fetch a model from the hub: resumed, checked for space, its licence shown",
        "ropewalk models pull Qwen/Qwen3-30B-A3B",
        _run_models_pull,
    )
    pull.add_argument("name", help="name on the hub, such as Qwen/Qwen3-30B-A3B")
    pull.add_argument("--revision", help="commit, tag or branch (default: the newest, whose commit is printed)")


def _run_base_make(arguments: argparse.Namespace) -> int:
    from ropewalk.models.base import make_base

    make_base(arguments.folder, arguments.arch, size=arguments.size, text_files=arguments.text, seed=arguments.seed)
    print(arguments.folder)
    return 0


def _registry() -> Registry:
    from ropewalk.home import home
    from ropewalk.registry import Registry

    return Registry(home() / "registry")


def _run_models_list(arguments: argparse.Namespace) -> int:
    registry = _registry()
    for entry in registry.entries():
        print(f"{entry.name}  {entry.kind}{f' over {entry.base}' if entry.base else ''}  {entry.path}")
    for alias, name in registry.aliases().items():
        print(f"{alias} -> {name}")
    return 0


def _run_models_add(arguments: argparse.Namespace) -> int:
    from ropewalk.train.folder import lineage

    if arguments.base:
        _registry().publish_adapter(arguments.name, arguments.folder, arguments.base, lineage(arguments.folder))
    else:
        _registry().publish_base(arguments.name, arguments.folder, lineage(arguments.folder))
    return 0


def _run_models_ship(arguments: argparse.Namespace) -> int:
    print(f"{arguments.alias} -> {_registry().ship(arguments.alias, arguments.name).name}")
    return 0


def _run_models_rollback(arguments: argparse.Namespace) -> int:
    print(f"{arguments.alias} -> {_registry().rollback(arguments.alias).name}")
    return 0


def _run_chat(arguments: argparse.Namespace) -> int:
    registry = _registry()
    registry.resolve(arguments.name)  # an unknown name is told before anything is loaded
    import asyncio

    from ropewalk.engine.conversation import converse

    settings = _settings(arguments)
    asyncio.run(converse(settings, registry, arguments.name, arguments.prompt, arguments.file, arguments.max_tokens))
    return 0


def _run_models_pull(arguments: argparse.Namespace) -> int:
    from ropewalk.models.hub import pull

    print(pull(arguments.name, arguments.revision, tell=lambda line: print(line, file=sys.stderr)).folder)
    return 0


# -- serve -----------------------------------------------------------------------------------------------------------------------


def _serve(verbs: Verbs) -> None:
    serve = _add(verbs, "serve", "the API and its pages, on one port", "ropewalk serve --port 8700", _run_serve)
    serve.add_argument("--host", default="127.0.0.1", help="address to listen on (default: %(default)s, for this machine only)")
    serve.add_argument("--port", type=int, default=8700, help="0: any free one (default: %(default)s)")
    _store_arguments(serve)
    serve.add_argument(
        "--models", type=Path, metavar="YAML", help="which models are served, and how (default: all that are published)"
    )
    serve.add_argument("--preload", nargs="+", default=[], metavar="NAME", help="models to load before the first question")
    serve.add_argument("--max-file-mb", type=float, default=500, metavar="MB", help="largest file (default: %(default)s)")
    serve.add_argument(
        "--requests-per-minute", type=int, metavar="N", help="of each workspace without a limit of its own (default: no limit)"
    )
    serve.add_argument("--tls-cert", type=Path, metavar="PEM", help="certificate; with --tls-key, the server speaks HTTPS")
    serve.add_argument("--tls-key", type=Path, metavar="PEM", help="key of the certificate")
    serve.add_argument(
        "--drain-seconds", type=float, default=30, metavar="S", help="time to finish when told to stop (default: %(default)s)"
    )
    serve.add_argument(
        "--drain-notice-seconds",
        type=float,
        default=0,
        metavar="S",
        help="/ready says no for so long before the server stops listening (default: %(default)s)",
    )


def _run_serve(arguments: argparse.Namespace) -> int:
    from dataclasses import replace

    from ropewalk.config.serving import Serving, read_serving
    from ropewalk.server.serve import serve
    from ropewalk.server.settings import ServerSettings

    serving = read_serving(arguments.models) if arguments.models else Serving()
    return serve(
        _settings(arguments, max_file_bytes=round(arguments.max_file_mb * 1_000_000)),
        ServerSettings(
            host=arguments.host,
            port=arguments.port,
            tls_cert=arguments.tls_cert,
            tls_key=arguments.tls_key,
            requests_per_minute=arguments.requests_per_minute,
            drain_seconds=arguments.drain_seconds,
            drain_notice_seconds=arguments.drain_notice_seconds,
            serving=replace(serving, preload=(*serving.preload, *arguments.preload)),
        ),
    )


# -- files -----------------------------------------------------------------------------------------------------------------------


def _files(verbs: Verbs) -> None:
    files = _add(verbs, "files", "the file store", "ropewalk files put facts.jsonl", None)
    inner = files.add_subparsers(metavar="VERB")
    put = _files_verb(inner, "put", "store files and print their ids", "facts.jsonl", _run_files_put)
    put.add_argument("path", type=Path, nargs="+")
    put.add_argument("--name", help="another name than the path's own")
    put.add_argument("--tag", action="append", default=[], metavar="TAG", help="may be given several times")
    put.add_argument("--expires-in", type=int, metavar="SECONDS", help="from 3600 to 7776000, 90 days (default: never)")
    _json_argument(put)
    _json_argument(_files_verb(inner, "list", "list stored files, newest first", "", _run_files_list))
    show = _files_verb(inner, "show", "show what is known about a file", "file_abc", _run_files_show)
    show.add_argument("id")
    _json_argument(show)
    get = _files_verb(inner, "get", "write a file's bytes to the standard output", "file_abc --out facts.jsonl", _run_files_get)
    get.add_argument("id")
    get.add_argument("--out", type=Path, metavar="FILE", help="write there instead")
    delete = _files_verb(
        inner,
        "delete",
        "erase files and all that was made from them, and print the signed receipts",
        "file_abc",
        _run_files_delete,
    )
    delete.add_argument("id", nargs="+")
    delete.add_argument(
        "--receipt", type=Path, metavar="FILE", help="save the receipt of one file there instead of printing it"
    )
    verify = _files_verb(
        inner,
        "verify",
        "read and hash everything; exit code 1 and the ids where it is not what was stored",
        "",
        _run_files_verify,
    )
    _json_argument(verify)
    receipt = _files_verb(
        inner,
        "verify-receipt",
        "check the receipt of a deletion",
        "receipt.json --public-key key.pem",
        _run_files_verify_receipt,
    )
    receipt.add_argument("receipt", type=Path)
    receipt.add_argument("--public-key", type=Path, metavar="FILE", help="what receipt-key printed (default: this store's key)")
    receipt.add_argument("--id", help="check too that it is the receipt of this file")
    _json_argument(_files_verb(inner, "receipt-key", "print the public key of receipts", "> key.pem", _run_files_receipt_key))
    sweep = _files_verb(inner, "sweep", "expire what is due and erase what nothing refers to", "", _run_files_sweep)
    _json_argument(sweep)
    backup = _add(
        inner,
        "backup",
        "copy the store into a folder while it is at work",
        "ropewalk files backup /mnt/backup",
        _run_files_backup,
    )
    backup.add_argument("folder", type=Path, help="empty, or with an older backup, which is brought up to date")
    _store_arguments(backup)
    _json_argument(backup)
    restore = _add(
        inner,
        "restore",
        "fill an empty place from a backup",
        "ropewalk files restore /mnt/backup --data /srv/ropewalk",
        _run_files_restore,
    )
    restore.add_argument("folder", type=Path, help="what `ropewalk files backup` wrote")
    _store_arguments(restore)
    _json_argument(restore)


def _files_verb(verbs: Verbs, name: str, summary: str, example: str, run: Verb) -> argparse.ArgumentParser:
    verb = _add(verbs, name, summary, f"ropewalk files {name} {example}".rstrip(), run)
    verb.add_argument("--workspace", default="default", help="name or id (default: %(default)s)")
    _store_arguments(verb)
    return verb


def _json_argument(verb: argparse.ArgumentParser) -> None:
    verb.add_argument("--json", action="store_true", help="print JSON")


def _store_arguments(verb: argparse.ArgumentParser) -> None:
    verb.add_argument("--data", type=Path, help="folder of the state (default: $ROPEWALK_HOME, else ~/.ropewalk)")
    verb.add_argument("--database-url", metavar="URL", help="postgresql+asyncpg://... (default: SQLite in the data folder)")
    verb.add_argument("--blobs", metavar="URL", help="s3://BUCKET/PREFIX, gs://... or az://... (default: the data folder)")


def _settings(arguments: argparse.Namespace, **more: Any) -> Settings:
    from ropewalk.files.settings import Settings

    given: dict[str, Any] = {name: getattr(arguments, name) for name in ("data", "database_url", "blobs")}
    return Settings(**{name: value for name, value in given.items() if value is not None}, **more)


def _local_files(arguments: argparse.Namespace) -> LocalFiles:
    from ropewalk.files.local import LocalFiles

    return LocalFiles(_settings(arguments), arguments.workspace, lambda id: _registry().trained_on(id))


def _run_files_put(arguments: argparse.Namespace) -> int:
    from ropewalk.files import commands

    files = _local_files(arguments)
    return commands.put(files, arguments.path, arguments.name, arguments.expires_in, arguments.tag, arguments.json)


def _run_files_list(arguments: argparse.Namespace) -> int:
    from ropewalk.files import commands

    return commands.list_files(_local_files(arguments), arguments.json)


def _run_files_show(arguments: argparse.Namespace) -> int:
    from ropewalk.files import commands

    return commands.show(_local_files(arguments), arguments.id, arguments.json)


def _run_files_get(arguments: argparse.Namespace) -> int:
    from ropewalk.files import commands

    return commands.get(_local_files(arguments), arguments.id, arguments.out)


def _run_files_delete(arguments: argparse.Namespace) -> int:
    from ropewalk.files import commands

    return commands.delete(_local_files(arguments), arguments.id, arguments.receipt)


def _run_files_verify(arguments: argparse.Namespace) -> int:
    from ropewalk.files import commands

    return commands.verify(_local_files(arguments), arguments.json)


def _run_files_verify_receipt(arguments: argparse.Namespace) -> int:
    from ropewalk.files import commands

    files = lambda: _local_files(arguments)
    return commands.verify_receipt(files, arguments.receipt, arguments.public_key, arguments.id)


def _run_files_receipt_key(arguments: argparse.Namespace) -> int:
    from ropewalk.files import commands

    return commands.receipt_key(_local_files(arguments), arguments.json)


def _run_files_sweep(arguments: argparse.Namespace) -> int:
    from ropewalk.files import commands

    return commands.sweep(_local_files(arguments), arguments.json)


def _run_files_backup(arguments: argparse.Namespace) -> int:
    from ropewalk.files import commands

    return commands.backup(_settings(arguments), arguments.folder, arguments.json)


def _run_files_restore(arguments: argparse.Namespace) -> int:
    from ropewalk.files import commands

    return commands.restore(_settings(arguments), arguments.folder, arguments.json)


# -- tenants ---------------------------------------------------------------------------------------------------------------------


def _tenants(verbs: Verbs) -> None:
    from ropewalk.tenants.verbs import Tenants

    Tenants(_add, _place, _run_workspaces_delete).add(verbs)


def _run_workspaces_delete(arguments: argparse.Namespace) -> int:
    from ropewalk.files import commands

    return commands.delete_workspace(_local_files(arguments), arguments.receipts, arguments.yes)


def _place(arguments: argparse.Namespace) -> Place:
    from ropewalk.files.settings import Settings
    from ropewalk.tenants.commands import Place

    given = {name: value for name in ("data", "database_url") if (value := getattr(arguments, name)) is not None}
    settings = Settings(**given)
    return Place(settings.database, settings.data)


# -- config ----------------------------------------------------------------------------------------------------------------------


def _config(verbs: Verbs) -> None:
    config = _add(verbs, "config", "the reference of configuration keys", "ropewalk config docs", None)
    inner = config.add_subparsers(metavar="VERB")
    _add(
        inner, "schema", "print the JSON Schema of a configuration", "ropewalk config schema > schema.json", _run_config_schema
    )
    _add(inner, "docs", "print the reference page of every key", "ropewalk config docs > docs/config.md", _run_config_docs)


def _run_config_schema(arguments: argparse.Namespace) -> int:
    import json

    from ropewalk.config.reference import schema

    print(json.dumps(schema(), indent=2))
    return 0


def _run_config_docs(arguments: argparse.Namespace) -> int:
    from ropewalk.config.reference import reference_page

    print(reference_page(), end="")
    return 0
