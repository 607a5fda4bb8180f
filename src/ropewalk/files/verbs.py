"""The arguments of `files`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from ropewalk.verbs import Verb, Verbs, add_verb, json_argument, registry_of, settings_of, store_arguments

if TYPE_CHECKING:
    from ropewalk.files.local import LocalFiles


def add_verbs(verbs: Verbs) -> None:
    """`files ...`."""
    files = add_verb(verbs, "files", "the file store", "ropewalk files put facts.jsonl")
    inner = files.add_subparsers(metavar="VERB")
    put = _verb(inner, "put", "store files and print their ids", "facts.jsonl", _put)
    put.add_argument("path", type=Path, nargs="+")
    put.add_argument("--name", help="another name than the path's own")
    put.add_argument("--tag", action="append", default=[], metavar="TAG", help="may be given several times")
    put.add_argument("--expires-in", type=int, metavar="SECONDS", help="from 3600 to 7776000, 90 days (default: never)")
    json_argument(put)
    json_argument(_verb(inner, "list", "list stored files, newest first", "", _list))
    show = _verb(inner, "show", "show what is known about a file", "file_abc", _show)
    show.add_argument("id")
    json_argument(show)
    get = _verb(inner, "get", "write a file's bytes to the standard output", "file_abc --out facts.jsonl", _get)
    get.add_argument("id")
    get.add_argument("--out", type=Path, metavar="FILE", help="write there instead")
    summary = "erase files and all that was made from them, and print the signed receipts"
    delete = _verb(inner, "delete", summary, "file_abc", _delete)
    delete.add_argument("id", nargs="+")
    delete.add_argument(
        "--receipt", type=Path, metavar="FILE", help="save the receipt of one file there instead of printing it"
    )
    summary = "read and hash everything; exit code 1 and the ids where it is not what was stored"
    json_argument(_verb(inner, "verify", summary, "", _verify))
    receipt = _verb(
        inner, "verify-receipt", "check the receipt of a deletion", "receipt.json --public-key key.pem", _verify_receipt
    )
    receipt.add_argument("receipt", type=Path)
    receipt.add_argument("--public-key", type=Path, metavar="FILE", help="what receipt-key printed (default: this store's key)")
    receipt.add_argument("--id", help="check too that it is the receipt of this file")
    json_argument(_verb(inner, "receipt-key", "print the public key of receipts", "> key.pem", _receipt_key))
    summary = "have a model write questions and answers from a file, as a new file to train on"
    questions = _verb(inner, "questions", summary, "file_abc --model answers", _questions)
    questions.add_argument("id")
    questions.add_argument("--model", required=True, help="an alias, a base or an adapter, or a name of --models")
    questions.add_argument("--models", type=Path, metavar="FILE", help="what is served, as for `ropewalk serve`")
    questions.add_argument("--each", type=int, default=3, metavar="N", help="questions of a chunk (default: %(default)s)")
    questions.add_argument("--chunk", type=int, default=3000, metavar="N", help="its characters (default: %(default)s)")
    questions.add_argument("--most", type=int, default=500, metavar="N", help="chunks at most (default: %(default)s)")
    json_argument(questions)
    json_argument(_verb(inner, "sweep", "expire what is due and erase what nothing refers to", "", _sweep))
    summary = "copy the store into a folder while it is at work"
    backup = add_verb(inner, "backup", summary, "ropewalk files backup /mnt/backup", _backup)
    backup.add_argument("folder", type=Path, help="empty, or with an older backup, which is brought up to date")
    summary = "fill an empty place from a backup"
    restore = add_verb(inner, "restore", summary, "ropewalk files restore /mnt/backup --data /srv/ropewalk", _restore)
    restore.add_argument("folder", type=Path, help="what `ropewalk files backup` wrote")
    for whole in (backup, restore):
        store_arguments(whole)
        json_argument(whole)


def _verb(verbs: Verbs, name: str, summary: str, example: str, run: Verb) -> argparse.ArgumentParser:
    verb = add_verb(verbs, name, summary, f"ropewalk files {name} {example}".rstrip(), run)
    verb.add_argument("--workspace", default="default", help="name or id (default: %(default)s)")
    store_arguments(verb)
    return verb


def local_files(arguments: argparse.Namespace) -> LocalFiles:
    """The files of the workspace and store that the arguments mean."""
    from ropewalk.files.local import LocalFiles

    return LocalFiles(settings_of(arguments), arguments.workspace, registry_of(arguments).trained_on)


def _put(arguments: argparse.Namespace) -> int:
    from ropewalk.files import commands

    files = local_files(arguments)
    return commands.put(files, arguments.path, arguments.name, arguments.expires_in, arguments.tag, arguments.json)


def _list(arguments: argparse.Namespace) -> int:
    from ropewalk.files import commands

    return commands.list_files(local_files(arguments), arguments.json)


def _show(arguments: argparse.Namespace) -> int:
    from ropewalk.files import commands

    return commands.show(local_files(arguments), arguments.id, arguments.json)


def _get(arguments: argparse.Namespace) -> int:
    from ropewalk.files import commands

    return commands.get(local_files(arguments), arguments.id, arguments.out)


def _delete(arguments: argparse.Namespace) -> int:
    from ropewalk.files import commands

    return commands.delete(local_files(arguments), arguments.id, arguments.receipt)


def _verify(arguments: argparse.Namespace) -> int:
    from ropewalk.files import commands

    return commands.verify(local_files(arguments), arguments.json)


def _verify_receipt(arguments: argparse.Namespace) -> int:
    from ropewalk.files import commands

    files = lambda: local_files(arguments)
    return commands.verify_receipt(files, arguments.receipt, arguments.public_key, arguments.id)


def _receipt_key(arguments: argparse.Namespace) -> int:
    from ropewalk.files import commands

    return commands.receipt_key(local_files(arguments), arguments.json)


def _questions(arguments: argparse.Namespace) -> int:
    import asyncio
    import json

    from ropewalk.chat.questions import Wanted
    from ropewalk.engine.questioning import write_questions
    from ropewalk.errors import BadInput
    from ropewalk.files.commands import as_dict

    for option, least in (("each", 1), ("chunk", 300), ("most", 1)):
        if getattr(arguments, option) < least:
            raise BadInput(f"--{option} is {getattr(arguments, option)}; expected {least} or more")
    wanted = Wanted(arguments.model, arguments.each, arguments.chunk, arguments.most)
    settings, place = settings_of(arguments), arguments.workspace
    made = asyncio.run(write_questions(settings, registry_of(arguments), place, arguments.id, wanted, arguments.models))
    print(json.dumps(as_dict(made)) if arguments.json else made.id)
    return 0


def _sweep(arguments: argparse.Namespace) -> int:
    from ropewalk.files import commands

    return commands.sweep(local_files(arguments), arguments.json)


def _know_every_table() -> None:
    """Rows of tables that are not known would be left behind."""
    import ropewalk.compare.tables
    import ropewalk.jobs.tables
    import ropewalk.shared_registry  # noqa: F401


def _backup(arguments: argparse.Namespace) -> int:
    from ropewalk.files import commands

    _know_every_table()
    return commands.backup(settings_of(arguments), arguments.folder, arguments.json)


def _restore(arguments: argparse.Namespace) -> int:
    from ropewalk.files import commands

    _know_every_table()
    return commands.restore(settings_of(arguments), arguments.folder, arguments.json)
