"""The verbs `workspaces` and `keys`: each opens the store's database, does one thing and prints it."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

from ropewalk.database import Database, now, timestamp
from ropewalk.errors import BadInput
from ropewalk.tenants import keys, usage, workspaces
from ropewalk.tenants.caller import RIGHTS
from ropewalk.tenants.secrets import check_root, rotate_root
from ropewalk.vault import Vault

Result = TypeVar("Result")
UNITS = {"kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12, "kib": 2**10, "mib": 2**20, "gib": 2**30, "tib": 2**40}


@dataclass(frozen=True)
class Place:
    """Where a store's database is, and the data folder that its root key must not lie in."""

    url: str
    data: Path

    @asynccontextmanager
    async def open(self) -> AsyncIterator[tuple[Database, Vault]]:
        """The database after its first start, and what opens its keys."""
        vault = Vault.open(self.data)
        database = await Database.open(self.url)
        try:
            await workspaces.ensure_default(database, vault)
            yield database, vault
        finally:
            await database.close()

    def run(self, work: Callable[[Database, Vault], Awaitable[Result]]) -> Result:
        """What the work gives, on the open database."""

        async def whole() -> Result:
            async with self.open() as (database, vault):
                return await work(database, vault)

        return asyncio.run(whole())


# -- workspaces ------------------------------------------------------------------------------------------------------------------


def create_workspace(place: Place, name: str, settings: Mapping[str, Any], as_json: bool) -> int:
    """Makes a workspace and prints its id."""
    made = place.run(lambda database, vault: workspaces.create_workspace(database, vault, name, **settings))
    _show(_told(made), made.id, as_json)
    return 0


def list_workspaces(place: Place, limit: int, after_id: str | None, archived: bool, as_json: bool) -> int:
    """Prints workspaces, newest first."""
    page = place.run(
        lambda database, _: workspaces.list_workspaces(database, limit=limit, after_id=after_id, archived=archived)
    )
    if as_json:
        print(json.dumps({"data": [_told(one) for one in page.items], "has_more": page.more}))
        return 0
    for one in page.items:
        print(f"{one.id}  {timestamp(one.created_at)}  {one.name}{'  (archived)' if one.archived_at else ''}")
    _tell_more(page)
    return 0


def archive_workspace(place: Place, id_or_name: str, as_json: bool) -> int:
    """Closes a workspace for good."""
    archived = place.run(lambda database, _: workspaces.archive_workspace(database, id_or_name))
    _show(_told(archived), f"{archived.id} is archived: its keys open nothing any more, its files stay", as_json)
    return 0


def limit(
    place: Place, scope: str, id: str | None, limits: Mapping[str, Any], settings: Mapping[str, Any], as_json: bool
) -> int:
    """Changes what is given, and prints what is used and may be."""

    async def work(database: Database, _: Vault) -> tuple[usage.Share, dict[str, Any]]:
        if settings:
            if scope != "workspace" or id is None:
                raise BadInput(f"{' and '.join(settings)}: only a workspace has that, and no {scope}")
            await workspaces.change_workspace(database, id, settings)
        share = await (usage.change_limits(database, scope, id, limits) if limits else usage.share_of(database, scope, id))
        if scope != "workspace":
            return share, {}
        async with database.reading() as connection:
            found = await workspaces.find_workspace(connection, share.id)
        return share, {name: getattr(found, name) for name in workspaces.SETTINGS}

    share, set_ = place.run(work)
    used = share.usage
    lines = [
        f"{share.scope} {share.id}",
        f"  bytes  {used.used_bytes + used.reserved_bytes:,} of {_limit(used.limit_bytes)}",
        f"  files  {used.used_files + used.reserved_files:,} of {_limit(used.limit_files)}",
        *(f"  {name.replace('_', '-')}  {_setting(value)}" for name, value in set_.items()),
    ]
    _show({"scope": share.scope, "id": share.id, **asdict(used), **set_}, "\n".join(lines), as_json)
    return 0


# -- keys ------------------------------------------------------------------------------------------------------------------------


def create_key(
    place: Place,
    workspace: str | None,
    name: str,
    rights: Sequence[str],
    user_id: str | None,
    expires_in_days: float | None,
    as_json: bool,
) -> int:
    """Makes a key and prints its secret, this once."""
    expires_at = None if expires_in_days is None else now() + round(expires_in_days * 86_400_000_000)
    key, secret = place.run(
        lambda database, vault: keys.create_key(
            database, vault, workspace, name, rights=rights, user_id=user_id, expires_at=expires_at
        )
    )
    _show({**_told(key), "key": secret}, secret, as_json)
    return 0


def list_keys(place: Place, workspace: str | None, status: str | None, limit: int, after_id: str | None, as_json: bool) -> int:
    """Prints keys, newest first; never a secret."""

    async def work(database: Database, _: Vault) -> workspaces.Page[keys.Key]:
        workspace_id = None
        if workspace is not None:
            async with database.reading() as connection:
                workspace_id = (await workspaces.find_workspace(connection, workspace)).id
        return await keys.list_keys(database, workspace_id=workspace_id, status=status, limit=limit, after_id=after_id)

    page = place.run(work)
    if as_json:
        print(json.dumps({"data": [_told(key) for key in page.items], "has_more": page.more}))
        return 0
    for key in page.items:
        where = key.workspace_id or "every workspace"
        user = f" for {key.user_id}" if key.user_id else ""
        print(f"{key.id}  ...{key.hint}  {key.status:8}  {where}{user}  {','.join(sorted(key.rights))}  {key.name}")
    _tell_more(page)
    return 0


def revoke_key(place: Place, id: str, as_json: bool) -> int:
    """Ends a key at once."""
    key = place.run(lambda database, _: keys.revoke_key(database, id))
    _show(_told(key), f"{key.id} is revoked: no request with it is answered any more", as_json)
    return 0


def rotate(place: Place, to: Path, as_json: bool) -> int:
    """Wraps every key by the root key in another file, which is made if it is not there."""

    async def work(database: Database, vault: Vault) -> int:
        new = Vault.from_file(to, place.data)  # durable before anything is wrapped by it
        async with database.reading() as connection:
            try:
                await check_root(connection, new)
            except BadInput:
                pass
            else:
                raise BadInput(f"the root key in {to} is the store's own already; name a file that is not there yet")
        return await rotate_root(database, vault, new)

    count = place.run(work)
    text = (
        f"{count} keys are wrapped by the root key in {to} now, and by no other. From here on it is the one to give: "
        f"ROPEWALK_ROOT_KEY_FILE={to}, without ROPEWALK_ROOT_KEY and ROPEWALK_ROOT_KEY_COMMAND.\n"
        f"Start running servers again. Keep the old root key as long as backups made before this one."
    )
    _show({"keys": count, "root_key_file": str(to)}, text, as_json)
    return 0


def scope_of(workspace: str | None, user: str | None, key: str | None, every: bool, new: bool) -> tuple[str, str | None]:
    """Whose limits are meant -> scope and id."""
    if (workspace is not None) == bool(key or every or new) or (user is not None and workspace is None):
        raise BadInput(
            "whose limits? Name a workspace, with or without --user, or one of --key, --organization, --new-workspaces"
        )
    if key:
        return "key", key
    if workspace is None:
        return ("organization" if every else "new_workspaces"), None
    return ("user", f"{workspace}/{user}") if user is not None else ("workspace", workspace)


def limits_of(size: str | None, files: str | None) -> dict[str, int | None]:
    """The limits that were given."""
    given = {"limit_bytes": (size, parse_size), "limit_files": (files, parse_count)}
    return {name: parse(text) for name, (text, parse) in given.items() if text is not None}


def settings_of(given: Mapping[str, Any]) -> dict[str, Any]:
    """The settings among what was given."""
    parse: dict[str, Callable[[str], Any]] = {"downloads": str, "jobs_file_bytes": parse_size}
    found = {name: given[name] for name in workspaces.SETTINGS if given[name] is not None}
    return {name: parse.get(name, parse_count)(text) for name, text in found.items()}


def parse_size(text: str) -> int | None:
    """`10GB`, `512MiB`, `1000` -> bytes; `none` -> None."""
    if text.lower() == "none":
        return None
    number, unit = text.lower().strip(), 1
    for name, size in UNITS.items():
        if number.endswith(name):
            number, unit = number.removesuffix(name).strip(), size
            break
    try:
        return round(float(number) * unit)
    except (ValueError, OverflowError):
        raise BadInput(f"'{text}' is no size; expected a number of bytes, such as 1000, 10GB or 512MiB, or none") from None


def parse_count(text: str) -> int | None:
    """`1000` -> 1000; `none` -> None."""
    if text.lower() == "none":
        return None
    if not (text.isascii() and text.isdigit()):
        raise BadInput(f"'{text}' is no whole number; expected one, or none")
    return int(text)


def parse_rights(text: str) -> list[str]:
    """`read,write` -> both; `all` -> every right."""
    return sorted(RIGHTS) if text == "all" else [right.strip() for right in text.split(",") if right.strip()]


def _told(item: workspaces.Workspace | keys.Key) -> dict[str, Any]:
    told = {name: getattr(item, name) for name in keys.NAMES} if isinstance(item, keys.Key) else asdict(item)
    told = {name: timestamp(value) if value and name.endswith("_at") else value for name, value in told.items()}
    return {**told, "rights": sorted(item.rights), "status": item.status} if isinstance(item, keys.Key) else told


def _show(told: Mapping[str, Any], text: str, as_json: bool) -> None:
    print(json.dumps(told) if as_json else text)


def _tell_more(page: workspaces.Page[Any]) -> None:
    if page.more:
        print(f"and more: --after {page.items[-1].id}")


def _setting(value: int | str | None) -> str:
    return "the server's default" if value is None else value if isinstance(value, str) else f"{value:,}"


def _limit(value: int | None) -> str:
    return "no limit" if value is None else f"{value:,}"
