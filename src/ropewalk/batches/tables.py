"""The tables of message batches: who sent them, how far they are, and their requests with what was answered."""

from __future__ import annotations

from sqlalchemy import BigInteger, Boolean, Column, ForeignKey, Index, Integer, LargeBinary, Table, Text, UniqueConstraint

from ropewalk.database import metadata

batches = Table(
    "batches",
    metadata,
    Column("id", Text, primary_key=True),
    Column("organization_id", Text, nullable=False),
    Column("workspace_id", Text, ForeignKey("workspaces.id"), nullable=False),
    Column("user_id", Text),
    Column("key_id", Text),
    Column("rights", Text, nullable=False),  # of the key, as it was used
    Column("version", Text, nullable=False),  # of the API that the requests are written in
    Column("sealed_key", LargeBinary),  # seals requests and results; wrapped by the workspace's key; null once they are gone
    Column("complete", Boolean, nullable=False),  # whether all requests are written down; before that nobody sees it
    Column("total", Integer, nullable=False),
    Column("unanswered", Integer, nullable=False),
    Column("succeeded", Integer, nullable=False),
    Column("errored", Integer, nullable=False),
    Column("canceled", Integer, nullable=False),
    Column("expired", Integer, nullable=False),
    Column("created_at", BigInteger, nullable=False),
    Column("expires_at", BigInteger, nullable=False),
    Column("cancel_initiated_at", BigInteger),
    Column("ended_at", BigInteger),
    Column("archived_at", BigInteger),  # when the results were erased
    Index("batches_workspace_created", "workspace_id", "created_at", "id"),
    Index("batches_ended", "ended_at"),
)

batch_items = Table(
    "batch_items",
    metadata,
    Column("batch_id", Text, ForeignKey("batches.id"), primary_key=True),
    Column("number", Integer, primary_key=True),
    Column("custom_id", Text, nullable=False),
    Column("request", LargeBinary),  # sealed; null once it is answered
    Column("outcome", Text),  # succeeded, errored, canceled, expired; null: not yet
    Column("result", LargeBinary),  # sealed; null where the outcome says all
    Column("holder", Text),  # the process that works on it ...
    Column("lease_until", BigInteger, nullable=False),  # ... and is believed alive until then
    Column("tries", Integer, nullable=False),
    UniqueConstraint("batch_id", "custom_id"),
    Index("batch_items_open", "batch_id", "outcome", "number"),
)
