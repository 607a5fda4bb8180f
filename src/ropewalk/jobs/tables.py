"""The tables of jobs: what is to be trained and how far it is, what happened, and what may quote a file and therefore dies with it."""

from __future__ import annotations

from sqlalchemy import (
    JSON,
    BigInteger,
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

jobs = Table(
    "jobs",
    metadata,
    Column("id", Text, primary_key=True),
    Column("organization_id", Text, nullable=False),
    Column("workspace_id", Text, ForeignKey("workspaces.id"), nullable=False),
    Column("user_id", Text),
    Column("key_id", Text),
    Column("state", Text, nullable=False),  # queued, running, paused, succeeded, failed, cancelled
    Column("wanted", Text),  # pause or cancel: what somebody asked for and is yet to be done
    Column("base", Text, nullable=False),  # as it was asked for: a name or an alias of the registry
    Column("suffix", Text, nullable=False),
    Column("method", Text, nullable=False),  # supervised, dpo, reinforcement
    Column("hyperparameters", JSON, nullable=False),  # as they were asked for, and what "auto" became
    Column("seed", BigInteger, nullable=False),
    Column("metadata", JSON(none_as_null=True)),
    Column("training_file", Text, nullable=False),
    Column("validation_file", Text),
    Column("file_bytes", BigInteger, nullable=False),
    Column("config", JSON, nullable=False),  # of the run, less where it lies on this machine
    Column("config_digest", Text, nullable=False),
    Column("holder", Text),  # the server process that runs it ...
    Column("lease_until", BigInteger, nullable=False),  # ... and is believed alive until then
    Column("tries", Integer, nullable=False),  # runs that were begun
    Column("failures", Integer, nullable=False),  # of them, those that ended by themselves without saying why
    Column("model", Text),  # what came of it, as the registry calls it
    Column("trained_tokens", BigInteger),
    Column("step", BigInteger, nullable=False),
    Column("steps", BigInteger),  # in all; null before the files are read
    Column("data_generator", JSON(none_as_null=True)),  # the models that wrote its rows: files go, and this stays
    Column(
        "device_time", BigInteger, nullable=False, server_default="0"
    ),  # microseconds that its runs held devices, times these
    Column("error_code", Text),
    Column("kept_until", BigInteger),  # of a failed one: until then it can go on from what it has kept
    Column("created_at", BigInteger, nullable=False),
    Column("started_at", BigInteger),
    Column("finished_at", BigInteger),
    Index("jobs_workspace_created", "workspace_id", "created_at", "id"),
    Index("jobs_state", "state", "created_at"),
)

job_events = Table(
    "job_events",
    metadata,
    Column("job_id", Text, ForeignKey("jobs.id", ondelete="CASCADE"), primary_key=True),
    Column("number", Integer, primary_key=True),
    Column("key", Text, nullable=False),  # step:12, checkpoint:20, ...: what is told again after a resume stands here once
    Column("level", Text, nullable=False),
    Column("kind", Text, nullable=False),  # message or metrics
    Column("message", Text, nullable=False),  # never a word of a file
    Column("data", JSON(none_as_null=True)),
    Column("created_at", BigInteger, nullable=False),
    UniqueConstraint("job_id", "key"),
)

job_errors = Table(  # why a job failed: a sentence that may quote a row
    "job_errors",
    metadata,
    Column("job_id", Text, ForeignKey("jobs.id", ondelete="CASCADE"), primary_key=True),
    Column("made_as", Text, nullable=False),  # "job": with each file and the job's id the key of a row of `derived`
    Column("training_file", Text, nullable=False),
    Column("validation_file", Text),
    Column("sealed", LargeBinary, nullable=False),  # under the workspace's key
    ForeignKeyConstraint(
        ["training_file", "made_as", "job_id"],
        ["derived.owner", "derived.kind", "derived.name"],
        ondelete="CASCADE",
        name="job_errors_training",
    ),
    ForeignKeyConstraint(
        ["validation_file", "made_as", "job_id"],
        ["derived.owner", "derived.kind", "derived.name"],
        ondelete="CASCADE",
        name="job_errors_validation",
    ),
)

job_logs = Table(  # the end of what a job's run has said, for servers that did not run it
    "job_logs",
    metadata,
    Column("job_id", Text, ForeignKey("jobs.id", ondelete="CASCADE"), primary_key=True),
    Column("made_as", Text, nullable=False),  # as of job_errors
    Column("training_file", Text, nullable=False),
    Column("validation_file", Text),
    Column("sealed", LargeBinary, nullable=False),  # under the workspace's key
    ForeignKeyConstraint(
        ["training_file", "made_as", "job_id"],
        ["derived.owner", "derived.kind", "derived.name"],
        ondelete="CASCADE",
        name="job_logs_training",
    ),
    ForeignKeyConstraint(
        ["validation_file", "made_as", "job_id"],
        ["derived.owner", "derived.kind", "derived.name"],
        ondelete="CASCADE",
        name="job_logs_validation",
    ),
)
