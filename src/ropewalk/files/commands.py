"""What `ropewalk files ...` does: everything it prints, and its exit codes."""

from __future__ import annotations

import asyncio
import json
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from ropewalk.database import timestamp
from ropewalk.errors import BadInput, OutputError, VerificationFailed
from ropewalk.files import backup as backups
from ropewalk.files import closing, integrity, lifecycle, receipts
from ropewalk.files.catalog import File
from ropewalk.files.incoming import checked_expiry
from ropewalk.files.local import LocalFiles, old_files
from ropewalk.files.settings import Settings
from ropewalk.files.store import Store
from ropewalk.tenants.caller import Caller
from ropewalk.tenants.signing import public_pem, read_public_key

SHOWN = 32 << 20  # bytes from which on a person wonders how long it takes
BLOCK = 1 << 20


def put(
    files: LocalFiles, paths: Sequence[Path], name: str | None, expires_in: int | None, tags: Sequence[str], as_json: bool
) -> int:
    """Stores files and prints their ids."""
    checked_expiry(expires_in)
    for path in paths:
        with _progress("storing", path.stat().st_size if path.is_file() else 0) as progress:
            file = files.put(path, name, expires_in=expires_in, tags=tags, progress=progress)
        print(json.dumps(as_dict(file)) if as_json else file.id)
    return 0


def list_files(files: LocalFiles, as_json: bool) -> int:
    """One line for each file, newest first."""
    if left := old_files(files.settings.data):
        print(f"ropewalk: {left}", file=sys.stderr)
    for file in files.list():
        if as_json:
            print(json.dumps(as_dict(file)))
        else:
            print(f"{file.id}  {file.size:>12}  {file.filename}{'  (expired)' if file.expired else ''}")
    return 0


def show(files: LocalFiles, id: str, as_json: bool) -> int:
    """Everything known about a file."""
    known = as_dict(files.show(id))
    if as_json:
        print(json.dumps(known))
        return 0
    for key, value in known.items():
        print(f"{key:<12} {', '.join(value) if isinstance(value, list) else '-' if value is None else value}")
    return 0


def get(files: LocalFiles, id: str, out: Path | None) -> int:
    """The bytes, to a file or to the standard output."""
    with files.open(id) as source:
        if out is None:
            while block := source.read(BLOCK):
                sys.stdout.buffer.write(block)
            sys.stdout.buffer.flush()
            return 0
        partial = out.with_name(f".{out.name}.partial")
        try:
            with partial.open("wb") as target:
                while block := source.read(BLOCK):
                    target.write(block)
            os.replace(partial, out)
        except OSError as error:
            raise OutputError(f"cannot write '{out}': {error.strerror or error}") from error
        finally:
            partial.unlink(missing_ok=True)
    return 0


def delete(files: LocalFiles, ids: Sequence[str], receipt_file: Path | None) -> int:
    """Erases files; prints each receipt, or saves it."""
    if receipt_file and len(ids) > 1:
        raise BadInput("--receipt takes the receipt of one file; delete one at a time, or leave it out to have all printed")
    for id in ids:
        text = json.dumps(files.delete(id).as_dict(), indent=1) + "\n"
        if receipt_file is None:
            print(text, end="")
            continue
        try:
            receipt_file.write_text(text, encoding="utf-8")
        except OSError as error:
            print(text, end="")  # the file is gone: its receipt must not be lost as well
            raise OutputError(
                f"cannot write '{receipt_file}': {error.strerror or error}; the receipt is printed above"
            ) from error
    return 0


def delete_workspace(
    files: LocalFiles, receipts_file: Path | None, certain: bool, forget: Iterable[closing.Forget] = ()
) -> int:
    """Erases a workspace and all in it; prints each receipt, or saves them, one a line."""
    count = files.run(lambda store, _: closing.files_of(store, files.workspace))
    if not certain:
        raise BadInput(
            f"the workspace '{files.workspace}' has {count:,} files, and none of them can be got back: say --yes to erase it all"
        )

    async def work(store: Store, _: Caller) -> None:
        with receipts_file.open("a", encoding="ascii") if receipts_file else nullcontext(sys.stdout) as out:
            async for receipt in closing.delete_workspace(store, files.workspace, forget):
                print(json.dumps(receipt.as_dict()), file=out, flush=True)

    try:
        files.run(work)
    except OSError as error:
        raise OutputError(f"cannot write '{receipts_file}': {error.strerror or error}") from error
    return 0


def verify(files: LocalFiles, as_json: bool) -> int:
    """Reads every byte of the store; exit code 1 and the ids of files that are not whole."""

    async def work(store: Store, _: Caller) -> integrity.VerifyReport:
        with _progress("verifying", await integrity.stored_bytes(store)) as progress:
            return await integrity.verify(store, progress)

    report = files.run(work)
    if as_json:
        print(json.dumps(report.as_dict()))
    else:
        print(f"{report.contents} contents, {report.size:,} bytes, {report.receipts} receipts verified")
        for id, reason in report.damaged.items():
            print(f"{id}  {reason}")
        for fault in report.faults:
            print(fault)
    return 0 if report.whole else 1


def verify_receipt(files: Callable[[], LocalFiles], path: Path, public_key: Path | None, id: str | None) -> int:
    """Whether a receipt is as it was signed; with the key at hand, nothing else of the store is needed."""
    found = receipts.read_receipt(path)
    key = read_public_key(public_key) if public_key else files().run(_public_key)
    receipt = receipts.verify(found, key)
    if id is not None and not receipt.is_of(id):
        raise VerificationFailed(f"the receipt is genuine, and of another file than '{id}'")
    print(f"genuine: receipt {receipt.sequence}, signed by key {receipt.key_id}, deleted at {receipt.deleted_at}")
    return 0


def receipt_key(files: LocalFiles, as_json: bool) -> int:
    """The public key that receipts are verified with."""
    key = files.run(_public_key)
    print(json.dumps(receipts.key_as_dict(key)) if as_json else public_pem(key), end="\n" if as_json else "")
    return 0


def sweep(files: LocalFiles, as_json: bool) -> int:
    """Expires what is due and erases what nothing refers to."""

    async def work(store: Store, _: Caller) -> lifecycle.SweepReport:
        return await lifecycle.sweep(store)

    report = files.run(work).as_dict()
    print(json.dumps(report) if as_json else ", ".join(f"{count} {what.replace('_', ' ')}" for what, count in report.items()))
    return 0


def backup(settings: Settings, folder: Path, as_json: bool) -> int:
    """Copies the store into a folder; exit code 1 when the store itself has lost bytes."""

    async def work(store: Store, _: Caller) -> backups.BackupReport:
        with _progress("backing up", await integrity.stored_bytes(store)) as progress:
            return await backups.backup(store, folder, progress)

    report = LocalFiles(settings).run(work)
    told = f"{report.files} files, {report.contents} contents, {report.size:,} bytes; {report.copied} contents are new"
    print(json.dumps(asdict(report)) if as_json else told)
    if report.missing:
        print(f"{report.missing} contents have no bytes: `ropewalk files verify` names their files", file=sys.stderr)
    return 1 if report.missing else 0


def restore(settings: Settings, folder: Path, as_json: bool) -> int:
    """Fills an empty place from a backup."""
    with _progress("restoring", backups.read_mark(folder).size) as progress:
        report = asyncio.run(backups.restore(folder, settings, progress))
    told = f"{report.files} files, {report.contents} contents, {report.size:,} bytes as of {report.made_at}"
    print(json.dumps(asdict(report)) if as_json else told)
    return 0


def as_dict(file: File) -> dict[str, Any]:
    """A file for a program to read."""
    return {
        "id": file.id,
        "filename": file.filename,
        "mime_type": file.mime_type,
        "size_bytes": file.size,
        "sha256": file.sha256,
        "created_at": timestamp(file.created_at),
        "expires_at": timestamp(file.expires_at) if file.expires_at is not None else None,
        "expired": file.expired,
        "tags": list(file.tags),
        "purpose": file.purpose,
        "lineage": file.lineage,
    }


async def _public_key(store: Store, _: Caller) -> Ed25519PublicKey:
    return store.signing_key.public_key()


@contextmanager
def _progress(what: str, total: int) -> Iterator[Callable[[int], None] | None]:
    """A bar on a terminal, for work that takes long enough to wonder; nothing elsewhere."""
    if total < SHOWN or not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    columns = (TextColumn(what), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(what, total=total)
        yield lambda count: bar.update(task, advance=count)
