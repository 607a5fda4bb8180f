"""The tables of who may ask: organisations, workspaces, keys, what they use, and what they did."""

from __future__ import annotations

from sqlalchemy import BigInteger, Column, ForeignKey, Index, Integer, LargeBinary, Table, Text

from ropewalk.database import metadata

organizations = Table(
    "organizations",
    metadata,
    Column("id", Text, primary_key=True),
    Column("name", Text, nullable=False),
    Column("created_at", BigInteger, nullable=False),
)

workspaces = Table(
    "workspaces",
    metadata,
    Column("id", Text, primary_key=True),
    Column("organization_id", Text, ForeignKey("organizations.id"), nullable=False),
    Column("name", Text, nullable=False, unique=True),
    Column("created_at", BigInteger, nullable=False),
    Column("archived_at", BigInteger),
    Column("sealed_key", LargeBinary),  # the workspace's key, wrapped by the root key; gone when the workspace is deleted
    Column("requests_per_minute", Integer),
    Column("jobs_running", Integer),  # at a time; here and below, null: the server's default
    Column("jobs_queued", Integer),  # that have not ended
    Column("jobs_file_bytes", BigInteger),  # of the files of all these
    Column("downloads", Text, nullable=False, server_default="owner"),  # owner | nobody: may uploads be downloaded
)

keys = Table(
    "keys",
    metadata,
    Column("id", Text, primary_key=True),
    Column("organization_id", Text, ForeignKey("organizations.id"), nullable=False),
    Column("workspace_id", Text, ForeignKey("workspaces.id")),  # null: every workspace
    Column("digest", LargeBinary, nullable=False, unique=True),  # HMAC-SHA-256 of the secret under the pepper
    Column("hint", Text, nullable=False),
    Column("name", Text, nullable=False),
    Column("rights", Text, nullable=False),  # a JSON list
    Column("user_id", Text),  # the one user it may act for
    Column("created_at", BigInteger, nullable=False),
    Column("expires_at", BigInteger),
    Column("revoked_at", BigInteger),
)

usage = Table(
    "usage",
    metadata,
    Column("scope", Text, primary_key=True),  # organization | workspace | key | user
    Column("id", Text, primary_key=True),  # a user's is WORKSPACE/USER
    Column("used_bytes", BigInteger, nullable=False, server_default="0"),
    Column("reserved_bytes", BigInteger, nullable=False, server_default="0"),
    Column("used_files", BigInteger, nullable=False, server_default="0"),
    Column("reserved_files", BigInteger, nullable=False, server_default="0"),
    Column("limit_bytes", BigInteger),
    Column("limit_files", BigInteger),
)

token_days = Table(  # what questions cost; a row outlives the files that were asked about, and names none of them
    "token_days",
    metadata,
    Column("workspace_id", Text, primary_key=True),
    Column("day", Text, primary_key=True),  # UTC, as 2026-11-22
    Column("model", Text, primary_key=True),
    Column("user_id", Text, primary_key=True),  # '': nobody's in particular
    Column("requests", BigInteger, nullable=False),
    Column("input", BigInteger, nullable=False),
    Column("cache_creation", BigInteger, nullable=False),
    Column("cache_read", BigInteger, nullable=False),
    Column("output", BigInteger, nullable=False),
    Index("token_days_day", "day"),
)

storage_days = Table(  # the most that a workspace had stored on a day, of what was seen
    "storage_days",
    metadata,
    Column("workspace_id", Text, primary_key=True),
    Column("day", Text, primary_key=True),
    Column("used_bytes", BigInteger, nullable=False),
)

audit = Table(
    "audit",
    metadata,
    Column("seq", BigInteger, primary_key=True, autoincrement=False),
    Column("at", BigInteger, nullable=False),
    Column("organization_id", Text),
    Column("workspace_id", Text),
    Column("key_id", Text),
    Column("user_id", Text),
    Column("action", Text, nullable=False),
    Column("subject", Text, nullable=False),
    Column("outcome", Text, nullable=False),
    Column("request_id", Text, nullable=False),
    Column("detail", Text, nullable=False),  # canonical JSON
    Column("previous", LargeBinary, nullable=False),
    Column("digest", LargeBinary, nullable=False),
    Index("audit_workspace_at", "workspace_id", "at"),
)

chains = Table(
    "chains",
    metadata,
    Column("name", Text, primary_key=True),  # audit | receipts
    Column("seq", BigInteger, nullable=False),
    Column("head", LargeBinary, nullable=False),
)

secrets = Table(
    "secrets",
    metadata,
    Column("name", Text, primary_key=True),  # pepper | signing | cursor | check
    Column("sealed", LargeBinary, nullable=False),
)
