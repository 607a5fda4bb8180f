"""The store's own secrets, each wrapped by the root key: made at the first start, wrapped anew when the root key changes.

check     opens, or the root key is not this store's
pepper    under which the secrets of keys are digested
signing   the Ed25519 key of receipts and of the audit log's head
cursor    under which the cursors of lists are signed
"""

from __future__ import annotations

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from sqlalchemy import select, update
from sqlalchemy.ext.asyncio import AsyncConnection

from ropewalk.database import Database
from ropewalk.errors import BadInput, DamagedContent
from ropewalk.tenants.audit import append
from ropewalk.tenants.tables import secrets, workspaces
from ropewalk.vault import ROOT_KEY_WAYS, Vault, new_key

NAMES = ("check", "pepper", "signing", "cursor")


async def ensure_secrets(connection: AsyncConnection, database: Database, vault: Vault) -> None:
    """Makes the secrets that are not there; of several processes, the second waits here until the first has committed."""
    for name in NAMES:
        sealed = vault.wrap(new_key(), purpose(name))
        await connection.execute(database.upsert(secrets).values(name=name, sealed=sealed).on_conflict_do_nothing())
    await check_root(connection, vault)


async def check_root(connection: AsyncConnection, vault: Vault, *, change: bool = False) -> None:
    """Raises BadInput unless this root key opens the store; until the transaction ends, it stays the root key."""
    query = select(secrets.c.sealed).where(secrets.c.name == "check").with_for_update(read=not change)
    sealed = (await connection.execute(query)).scalar_one()
    try:
        vault.unwrap(sealed, purpose("check"))
    except DamagedContent:
        raise BadInput(
            "the root key does not open this store: its keys were wrapped by another. Give the one that the store was made with "
            f"in {ROOT_KEY_WAYS}; without it the files cannot be read"
        ) from None


async def open_secret(connection: AsyncConnection, vault: Vault, name: str) -> bytes:
    """One of NAMES, in the clear."""
    sealed = (await connection.execute(select(secrets.c.sealed).where(secrets.c.name == name))).scalar_one()
    return vault.unwrap(sealed, purpose(name))


async def signing_key(connection: AsyncConnection, vault: Vault) -> Ed25519PrivateKey:
    """The key that signs receipts and the audit log's head."""
    return Ed25519PrivateKey.from_private_bytes(await open_secret(connection, vault, "signing"))


async def rotate_root(database: Database, old: Vault, new: Vault) -> int:
    """Wraps everything that the old root key opens by the new one, in one transaction; how many keys that were.

    The keys themselves stay, so no file is touched. Processes that hold the old root key must be started again.
    """
    async with database.writing() as connection:
        await check_root(connection, old, change=True)  # nobody makes a workspace under the old key meanwhile
        count = 0
        for name, sealed in (await connection.execute(select(secrets.c.name, secrets.c.sealed))).all():
            again = new.wrap(old.unwrap(sealed, purpose(name)), purpose(name))
            await connection.execute(update(secrets).where(secrets.c.name == name).values(sealed=again))
            count += 1
        query = select(workspaces.c.id, workspaces.c.sealed_key).where(workspaces.c.sealed_key.is_not(None))
        for id, sealed in (await connection.execute(query)).all():
            again = new.wrap(old.unwrap(sealed, workspace_purpose(id)), workspace_purpose(id))
            await connection.execute(update(workspaces).where(workspaces.c.id == id).values(sealed_key=again))
            count += 1
        await append(connection, None, "root_rotated", "root", detail={"keys": count})
    await database.forget()
    return count


def purpose(name: str) -> str:
    """What a secret is wrapped for."""
    return f"secret {name}"


def workspace_purpose(id: str) -> str:
    """What a workspace's key is wrapped for."""
    return f"workspace {id}"
