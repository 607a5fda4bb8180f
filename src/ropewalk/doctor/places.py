"""Where the state lies: the data folder, the database, the bytes, the root key. Looks, and makes nothing that was not there."""

from __future__ import annotations

import os
import shutil
import stat
from pathlib import Path

from sqlalchemy import inspect

from ropewalk.database import Database, newest_migration, version_at
from ropewalk.doctor.findings import Finding, Looking
from ropewalk.files.blobs import open_blobs
from ropewalk.files.settings import Settings
from ropewalk.tenants.secrets import check_root
from ropewalk.vault import Vault, default_key_file

LITTLE_DISK = 5 << 30  # below this a base of a few billion parameters no longer fits
KEY_VARIABLES = ("ROPEWALK_ROOT_KEY", "ROPEWALK_ROOT_KEY_COMMAND")


async def places(settings: Settings) -> list[Finding]:
    """The state of one installation, as the server would find it."""
    look = Looking("state")
    with look.at("data folder"):
        _folder(look, settings.data.expanduser())
    vault = None
    with look.at("root key"):
        vault = _key(look, settings)
    with look.at("database"):
        await _database(look, settings, vault)
    with look.at("blobs"):
        _blobs(look, settings)
    return look.found


def _folder(look: Looking, folder: Path) -> None:
    nearest = next(path for path in (folder, *folder.parents) if path.exists())
    free = shutil.disk_usage(nearest).free
    if not os.access(nearest, os.W_OK | os.X_OK):
        way = "name another with --data or ROPEWALK_HOME"
        look.say("data folder", "broken", f"{folder} cannot be written", way)
        return
    when = "" if nearest == folder else ", not there yet: the first start makes it"
    text = f"{folder}{when}; {free / 1e9:.1f} GB free"
    few = free < LITTLE_DISK
    look.say("data folder", "note" if few else "ok", text, "bases and files need more room" if few else None)


def _key(look: Looking, settings: Settings) -> Vault | None:
    for name in KEY_VARIABLES:
        if os.environ.get(name):
            vault = Vault.open(settings.data)
            look.say("root key", "ok", f"from ${name}")
            return vault
    path = Path(os.environ.get("ROPEWALK_ROOT_KEY_FILE") or default_key_file()).expanduser()
    if not path.exists():
        look.say("root key", "ok", f"none yet; the first start makes {path}")
        return None
    vault = Vault.open(settings.data)
    mode = stat.S_IMODE(path.stat().st_mode)
    if mode & 0o077:
        look.say("root key", "note", f"{path} can be read by others (mode {mode:o})", f"chmod 600 {path}")
    else:
        look.say("root key", "ok", f"{path}, readable by its owner alone; keep a copy elsewhere")
    return vault


async def _database(look: Looking, settings: Settings, vault: Vault | None) -> None:
    place = Path(settings.database.removeprefix("sqlite:///"))
    if settings.database_url is None and not place.exists():
        look.say("database", "ok", f"none yet; the first start makes {place}")
        return
    async with Database.unprepared(settings.database) as database, database.reading() as connection:
        found, newest = await connection.run_sync(version_at), newest_migration()
        if found is None:
            look.say("database", "ok", f"{database.dialect}, reached, empty; the first start makes its tables")
            return
        if found > newest:
            text = f"{database.dialect}, at migration {found}; this version of Ropewalk knows none after {newest}"
            look.say("database", "broken", text, "start the newer version, or restore a backup that this one wrote")
            return
        when = "" if found == newest else f"; the next start brings it to {newest}"
        look.say("database", "ok", f"{database.dialect}, reached, at migration {found}{when}")
        if not await connection.run_sync(lambda here: inspect(here).has_table("secrets")):
            return
        if vault is None:
            text = "there is a store, and no root key: none of its files can be read"
            look.say("root key", "broken", text, "give the key that the store was made with in $ROPEWALK_ROOT_KEY_FILE")
            return
        await check_root(connection, vault)  # or says that the key is another store's


def _blobs(look: Looking, settings: Settings) -> None:
    if settings.blobs is None and not Path(settings.blobs_at).exists():
        look.say("blobs", "ok", f"none yet; the first start makes {settings.blobs_at}")
        return
    open_blobs(settings.blobs_at).check()
    look.say("blobs", "ok", f"{settings.blobs_at} can be written")
