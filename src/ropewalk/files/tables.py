"""The tables of files: what is stored, under which name, who refers to it, and what is yet to be erased."""

from __future__ import annotations

from sqlalchemy import (
    JSON,
    BigInteger,
    Boolean,
    Column,
    ForeignKey,
    ForeignKeyConstraint,
    Index,
    Integer,
    LargeBinary,
    Table,
    Text,
    UniqueConstraint,
)

from ropewalk.database import metadata

# Places of what is made from files, beside bytes:
FILES = "files"  # a file of its own, which is deleted with those that it was made from
BATCHES = "batches"  # requests of a batch that quote a file
ARCHIVES = "archives"  # a folder that is kept sealed

blobs = Table(
    "blobs",
    metadata,
    Column("id", Text, primary_key=True),  # its name in the blob store: that of the upload, random, never used twice
    Column("workspace_id", Text, ForeignKey("workspaces.id"), nullable=False),
    Column("content_hmac", LargeBinary, nullable=False),  # of the SHA-256, under a key of the workspace
    Column("size", BigInteger, nullable=False),
    Column("sealed_key", LargeBinary, nullable=False),  # the data key, wrapped by the workspace's key
    Column("refs", BigInteger, nullable=False),
    Column("created_at", BigInteger, nullable=False),
    Column("verified_at", BigInteger),
    Column("damaged_at", BigInteger),
    UniqueConstraint("workspace_id", "content_hmac"),
)

files = Table(
    "files",
    metadata,
    Column("id", Text, primary_key=True),
    Column("workspace_id", Text, ForeignKey("workspaces.id"), nullable=False),
    Column("user_id", Text),
    Column("key_id", Text),
    Column("blob_id", Text, ForeignKey("blobs.id")),  # null once expired
    Column("filename", Text, nullable=False),
    Column("mime_type", Text, nullable=False),
    Column("size", BigInteger, nullable=False),
    Column("sha256", Text, nullable=False),
    Column("tags", JSON, nullable=False),
    Column("created_at", BigInteger, nullable=False),
    Column("expires_at", BigInteger),
    Column("expired_at", BigInteger),  # when the bytes were given back
    Column("purpose", Text),  # what OpenAI's clients say that it is for; null: nothing was said
    Column("lineage", JSON(none_as_null=True)),  # of one that a model wrote: which model, from which files
    Index("files_workspace_created", "workspace_id", "created_at", "id"),
    Index("files_blob", "blob_id"),
    Index("files_expires", "expires_at"),
)

uploads = Table(  # uploads in flight: what they have reserved, and until when they are believed alive
    "uploads",
    metadata,
    Column("id", Text, primary_key=True),
    Column("organization_id", Text, nullable=False),
    Column("workspace_id", Text, nullable=False),
    Column("user_id", Text),
    Column("key_id", Text),
    Column("reserved_bytes", BigInteger, nullable=False),
    Column("lease_until", BigInteger, nullable=False),
    Column("created_at", BigInteger, nullable=False),
)

file_token_days = Table(  # what questions about a file cost and did not; dies with it
    "file_token_days",
    metadata,
    Column("file_id", Text, ForeignKey("files.id", ondelete="CASCADE"), primary_key=True),
    Column("day", Text, primary_key=True),  # UTC, as 2026-11-22
    Column("model", Text, primary_key=True),
    Column("questions", BigInteger, nullable=False),
    Column("cache_creation", BigInteger, nullable=False),  # tokens of the file that were read and kept
    Column("cache_read", BigInteger, nullable=False),  # tokens of the file that were not read again
)

derived = Table(  # everything made from a file; dies with it
    "derived",
    metadata,
    Column("owner", Text, primary_key=True),  # a blob's id, or a file's
    Column("kind", Text, primary_key=True),  # text, tokens, ...
    Column("name", Text, primary_key=True),
    Column(
        "place", Text, nullable=False
    ),  # blobs: in the blob store; path: of this machine; files, batches, archives: one of them; upstream: of another server
    Column("stored", Text, nullable=False),  # its name there
    Column("size", BigInteger, nullable=False),
    Column("created_at", BigInteger, nullable=False),
)

archives = Table(  # folders kept sealed in the blob store, such as the checkpoints of a job
    "archives",
    metadata,
    Column("id", Text, primary_key=True),  # its name in the blob store: random, never used twice
    Column("owner", Text, nullable=False),  # what it goes with: a job's id
    Column("name", Text, nullable=False),  # what it is to its owner
    Column("organization_id", Text, nullable=False),
    Column("workspace_id", Text, ForeignKey("workspaces.id"), nullable=False),
    Column("user_id", Text),
    Column("key_id", Text),
    Column("size", BigInteger),  # plain bytes; null while it is on its way
    Column("lease_until", BigInteger, nullable=False),  # one on its way is believed alive until then
    Column("sealed_key", LargeBinary, nullable=False),  # its data key, wrapped by the workspace's key
    Column("created_at", BigInteger, nullable=False),
    Index("archives_owner", "owner", "name"),
)

question_jobs = Table(  # questions and answers that a model writes from a file; what quotes it is in the batch, which is sealed
    "question_jobs",
    metadata,
    Column("id", Text, primary_key=True),
    Column("file_id", Text, nullable=False),
    Column("made_as", Text, nullable=False),  # "questions": with file_id and id the key of a row of `derived`
    Column("batch_id", Text, nullable=False),
    Column("state", Text, nullable=False),  # in_progress, succeeded, failed
    Column("wanted", JSON, nullable=False),
    Column("chunks", Integer, nullable=False),  # that the model is shown
    Column("rows", Integer, nullable=False),
    Column("dropped", Integer, nullable=False),  # rows whose quote does not stand in the file, and repeated questions
    Column("output_file_id", Text),
    Column("error", Text),
    Column("lease_until", BigInteger, nullable=False),  # a process that gathers the answers is believed alive until then
    Column("created_at", BigInteger, nullable=False),
    Column("ended_at", BigInteger),
    ForeignKeyConstraint(
        ["file_id", "made_as", "id"],
        ["derived.owner", "derived.kind", "derived.name"],
        ondelete="CASCADE",
        name="question_jobs_made_of",
    ),
    Index("question_jobs_file", "file_id", "made_as", "id"),
    Index("question_jobs_state", "state", "created_at"),
)

erasures = Table(  # bytes that no row refers to any more; erased after the commit, and by the sweep if that was cut short
    "erasures",
    metadata,
    Column("place", Text, primary_key=True),
    Column("stored", Text, primary_key=True),
)

deletions = Table(  # the chain of receipts
    "deletions",
    metadata,
    Column("seq", BigInteger, primary_key=True, autoincrement=False),
    Column("workspace_id", Text, nullable=False),
    Column("receipt", Text, nullable=False),  # canonical JSON, as signed
    Column("created_at", BigInteger, nullable=False),
    Column("user_id", Text),  # whose file it was
)

resumables = Table(  # uploads that come in several requests
    "resumables",
    metadata,
    Column("id", Text, primary_key=True),
    Column("organization_id", Text, nullable=False),
    Column("workspace_id", Text, ForeignKey("workspaces.id"), nullable=False),
    Column("user_id", Text),
    Column("key_id", Text),
    Column("filename", Text),
    Column("mime_type", Text),
    Column("expires_in", BigInteger),  # seconds that the file shall live
    Column("tags", JSON, nullable=False),
    Column("length", BigInteger, nullable=False),
    Column("received", BigInteger, nullable=False),  # how many bytes are on the disk
    Column("reserved", Boolean, nullable=False),  # whether the length is set aside under the quotas
    Column("sealed_key", LargeBinary),  # wrapped by the workspace's key; null once the parts have become a file
    Column("created_at", BigInteger, nullable=False),
    Column("expires_at", BigInteger, nullable=False),
    Column("file_id", Text),
    Index("resumables_expires", "expires_at"),
)

parts = Table(  # what has come of them
    "parts",
    metadata,
    Column("name", Text, primary_key=True),  # in the blob store; never used twice
    Column("resumable_id", Text, nullable=False),
    Column("start", BigInteger, nullable=False),
    Column("size", BigInteger),  # null while it is on its way
    Index("parts_resumable", "resumable_id", "start"),
)
