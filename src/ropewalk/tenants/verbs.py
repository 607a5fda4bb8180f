"""The arguments of `workspaces`, `keys` and `audit`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from ropewalk.verbs import Verb, Verbs, add_verb, blobs_argument, database_arguments, json_argument, registry_of, settings_of

if TYPE_CHECKING:
    from ropewalk.tenants.commands import Place

NONE = "or 'none'"


def add_verbs(verbs: Verbs) -> None:
    """`workspaces ...`, `keys ...` and `audit ...`."""
    _workspaces(add_verb(verbs, "workspaces", "tenants", "ropewalk workspaces list"))
    _keys(add_verb(verbs, "keys", "who may ask, and for what", "ropewalk keys create --name laptop"))
    _audit(add_verb(verbs, "audit", "the log of who did what", "ropewalk audit verify"))


# -- workspaces ----------------------------------------------------------------------------------------------------------------


def _workspaces(group: argparse.ArgumentParser) -> None:
    inner = group.add_subparsers(metavar="VERB")
    create = _verb(
        inner, "workspaces create", "make a workspace and print its id", "acme --limit-bytes 50GB", _create_workspace
    )
    create.add_argument("name")
    create.add_argument("--limit-bytes", metavar="SIZE", help="such as 50GB (default: what is set for new workspaces)")
    create.add_argument("--limit-files", metavar="N", help="(default: what is set for new workspaces)")
    _settings_arguments(create)
    listed = _verb(inner, "workspaces list", "list workspaces, newest first", "--limit 100", _list_workspaces)
    listed.add_argument("--archived", action="store_true", help="archived ones too")
    _paging_arguments(listed)
    archive = _verb(inner, "workspaces archive", "close a workspace for good: its keys end at once", "acme", _archive_workspace)
    archive.add_argument("workspace", help="name or id")
    delete = _verb(
        inner,
        "workspaces delete",
        "archive a workspace, erase every file in it, destroy its key, and print the signed receipts, one a line",
        "acme --yes --receipts acme.jsonl",
        _delete_workspace,
    )
    delete.add_argument("workspace", help="name or id")
    blobs_argument(delete)
    delete.add_argument("--yes", action="store_true", help="without it, only the number of files is told")
    delete.add_argument("--receipts", type=Path, metavar="FILE", help="add the receipts to this file instead of printing them")
    limit = _verb(
        inner,
        "workspaces limit",
        "show what is used and may be; set limits of a workspace, a user, a key or all together",
        "acme --bytes 50GB --files none",
        _limit,
    )
    whose = limit.add_mutually_exclusive_group()
    limit.add_argument("workspace", nargs="?", help="name or id")
    limit.add_argument("--bytes", metavar="SIZE", help=f"such as 50GB, {NONE}")
    limit.add_argument("--files", metavar="N", help=f"a number, {NONE}")
    limit.add_argument("--user", help="of this user of the workspace")
    whose.add_argument("--key", metavar="ID", help="of a key")
    whose.add_argument("--organization", action="store_true", help="of everything together")
    whose.add_argument("--new-workspaces", action="store_true", help="of each workspace that is made from now on")
    _settings_arguments(limit)

    used = _verb(
        inner,
        "workspaces usage",
        "what questions and trainings cost, and what reading files once has saved: by day, by model and by workspace",
        "acme --days 7 --models models.yml",
        _usage,
    )
    used.add_argument("workspace", nargs="?", help="name or id (default: all together)")
    used.add_argument("--days", type=int, default=30, metavar="N", help="the last N days, UTC (default: %(default)s)")
    used.add_argument("--user", help="of this user of the workspace")
    used.add_argument("--models", type=Path, metavar="YAML", help="the file of models, for their prices")
    used.add_argument("--csv", action="store_true", help="print a line for each day and model, as CSV")


def _usage(arguments: argparse.Namespace) -> int:
    from ropewalk.config.serving import Serving, read_serving
    from ropewalk.jobs.account import trained
    from ropewalk.tenants import usage_commands

    serving = read_serving(arguments.models) if arguments.models else Serving()
    form: Literal["csv", "json", "text"] = "csv" if arguments.csv else "json" if arguments.json else "text"
    whose = arguments.workspace, arguments.user
    training = trained, serving.training_price
    return usage_commands.show_usage(_place(arguments), *whose, arguments.days, serving.price, form, *training)


def _create_workspace(arguments: argparse.Namespace) -> int:
    from ropewalk.tenants import commands

    settings = commands.settings_of(vars(arguments))
    limits = commands.limits_of(arguments.limit_bytes, arguments.limit_files)
    return commands.create_workspace(_place(arguments), arguments.name, {**settings, **limits}, arguments.json)


def _list_workspaces(arguments: argparse.Namespace) -> int:
    from ropewalk.tenants import commands

    return commands.list_workspaces(_place(arguments), arguments.limit, arguments.after, arguments.archived, arguments.json)


def _archive_workspace(arguments: argparse.Namespace) -> int:
    from ropewalk.tenants import commands

    return commands.archive_workspace(_place(arguments), arguments.workspace, arguments.json)


def _delete_workspace(arguments: argparse.Namespace) -> int:
    from ropewalk.compare.closing import forget
    from ropewalk.files import commands
    from ropewalk.files.verbs import local_files
    from ropewalk.jobs.closing import forgetting

    forgetters = [forget, forgetting(registry_of(arguments), settings_of(arguments).data.expanduser())]
    return commands.delete_workspace(local_files(arguments), arguments.receipts, arguments.yes, forgetters)


def _limit(arguments: argparse.Namespace) -> int:
    from ropewalk.tenants import commands

    scope, id = commands.scope_of(
        arguments.workspace, arguments.user, arguments.key, arguments.organization, arguments.new_workspaces
    )
    settings = commands.settings_of(vars(arguments))
    limits = commands.limits_of(arguments.bytes, arguments.files)
    return commands.limit(_place(arguments), scope, id, limits, settings, arguments.json)


# -- keys ----------------------------------------------------------------------------------------------------------------------


def _keys(group: argparse.ArgumentParser) -> None:
    inner = group.add_subparsers(metavar="VERB")
    create = _verb(
        inner,
        "keys create",
        "make a key and print its secret, this once",
        "--workspace acme --name laptop --rights read,write",
        _create_key,
    )
    create.add_argument("--name", required=True, help="for people to tell it by")
    where = create.add_mutually_exclusive_group()
    where.add_argument("--workspace", default="default", help="name or id (default: %(default)s)")
    where.add_argument("--every-workspace", action="store_true", help="as the right 'admin' needs")
    create.add_argument(
        "--rights",
        default="read,write,download",
        help="some of read, write, download, users (to act for any user), admin; or all (default: %(default)s)",
    )
    create.add_argument("--user", metavar="ID", help="the one user that it acts for")
    create.add_argument("--expires-in-days", type=float, metavar="N", help="(default: never)")
    listed = _verb(inner, "keys list", "list keys, newest first, without their secrets", "", _list_keys)
    listed.add_argument("--workspace", help="only keys of this workspace, by name or id")
    listed.add_argument("--status", choices=["active", "expired", "archived"], help="only keys of this status")
    _paging_arguments(listed)
    revoke = _verb(inner, "keys revoke", "end a key at once and for good", "key_abc", _revoke_key)
    revoke.add_argument("id")
    rotate = _verb(
        inner,
        "keys rotate-root",
        "wrap every key of the store by another root key; no file is touched",
        "--to ~/.config/ropewalk/root-2.key",
        _rotate,
    )
    rotate.add_argument(
        "--to", type=Path, required=True, metavar="FILE", help="outside the data folder; made if it is not there"
    )


def _create_key(arguments: argparse.Namespace) -> int:
    from ropewalk.tenants import commands

    return commands.create_key(
        _place(arguments),
        None if arguments.every_workspace else arguments.workspace,
        arguments.name,
        commands.parse_rights(arguments.rights),
        arguments.user,
        arguments.expires_in_days,
        arguments.json,
    )


def _list_keys(arguments: argparse.Namespace) -> int:
    from ropewalk.tenants import commands

    place, limit = _place(arguments), arguments.limit
    return commands.list_keys(place, arguments.workspace, arguments.status, limit, arguments.after, arguments.json)


def _revoke_key(arguments: argparse.Namespace) -> int:
    from ropewalk.tenants import commands

    return commands.revoke_key(_place(arguments), arguments.id, arguments.json)


def _rotate(arguments: argparse.Namespace) -> int:
    from ropewalk.tenants import commands

    return commands.rotate(_place(arguments), arguments.to, arguments.json)


# -- audit ---------------------------------------------------------------------------------------------------------------------


def _audit(group: argparse.ArgumentParser) -> None:
    inner = group.add_subparsers(metavar="VERB")
    listed = _verb(inner, "audit list", "list entries, newest first", "--workspace acme", _list_entries)
    listed.add_argument("--workspace", help="only entries of this workspace, by name or id")
    listed.add_argument("--action", help="only entries of this action, such as file_deleted or denied")
    listed.add_argument("--limit", type=int, default=100, metavar="N", help="(default: %(default)s)")
    listed.add_argument("--before", type=int, metavar="SEQ", help="only entries before this one")
    verify = _verb(
        inner,
        "audit verify",
        "check every entry of the log; exit code 1 if one was changed, removed or exchanged",
        "--head audit-head.json",
        _verify,
    )
    verify.add_argument("export", type=Path, nargs="?", help="an exported log to check instead of the store's")
    verify.add_argument(
        "--head", type=Path, action="append", default=[], metavar="FILE", help="a signed head saved before; may be repeated"
    )
    verify.add_argument("--save-head", type=Path, metavar="FILE", help="write the signed head there, to keep elsewhere")
    verify.add_argument(
        "--public-key", type=Path, metavar="FILE", help="what `ropewalk files receipt-key` printed (default: this store's)"
    )
    export = _verb(
        inner, "audit export", "print the whole log and its signed head, as JSON lines", "--out audit.jsonl", _export
    )
    export.add_argument("--out", type=Path, metavar="FILE", help="write there instead")


def _list_entries(arguments: argparse.Namespace) -> int:
    from ropewalk.tenants import audit_commands

    place, limit = _place(arguments), arguments.limit
    return audit_commands.list_entries(place, arguments.workspace, arguments.action, limit, arguments.before, arguments.json)


def _verify(arguments: argparse.Namespace) -> int:
    from ropewalk.tenants import audit_commands

    place = _place(arguments)
    if arguments.export is not None:
        return audit_commands.verify_export(place, arguments.export, arguments.public_key, arguments.json)
    return audit_commands.verify(place, arguments.head, arguments.public_key, arguments.save_head, arguments.json)


def _export(arguments: argparse.Namespace) -> int:
    from ropewalk.tenants import audit_commands

    return audit_commands.export(_place(arguments), arguments.out)


def _verb(verbs: Verbs, name: str, summary: str, example: str, run: Verb) -> argparse.ArgumentParser:
    verb = add_verb(verbs, name.split()[1], summary, f"ropewalk {name} {example}".rstrip(), run)
    database_arguments(verb)
    if name not in ("audit export", "workspaces delete"):  # which print JSON in any case
        json_argument(verb)
    return verb


def _place(arguments: argparse.Namespace) -> Place:
    from ropewalk.tenants.commands import Place

    settings = settings_of(arguments)
    return Place(settings.database, settings.data)


def _settings_arguments(verb: argparse.ArgumentParser) -> None:
    verb.add_argument("--requests-per-minute", metavar="N", help=f"of the workspace, {NONE} for the server's default")
    verb.add_argument("--downloads", choices=["owner", "nobody"], help="who may download what was uploaded")
    verb.add_argument("--jobs-running", metavar="N", help=f"its trainings at a time, {NONE} for the server's default")
    verb.add_argument("--jobs-queued", metavar="N", help=f"its trainings that have not ended, {NONE}")
    verb.add_argument("--jobs-file-bytes", metavar="SIZE", help=f"files of all these, such as 20GB, {NONE}")


def _paging_arguments(verb: argparse.ArgumentParser) -> None:
    verb.add_argument("--limit", type=int, default=1000, metavar="N", help="from 1 to 1000 (default: %(default)s)")
    verb.add_argument("--after", metavar="ID", help="only what stands after this one")
