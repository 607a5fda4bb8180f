"""What every server of one installation must be able to read: runs of jobs, what they say, and the models that there are."""

import sqlalchemy as sa
from alembic import op

revision = "0011_archives"
down_revision = "0010_question_jobs"


def upgrade() -> None:
    op.create_table(
        "archives",
        sa.Column("id", sa.Text(), nullable=False),
        sa.Column("owner", sa.Text(), nullable=False),
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("organization_id", sa.Text(), nullable=False),
        sa.Column("workspace_id", sa.Text(), nullable=False),
        sa.Column("user_id", sa.Text(), nullable=True),
        sa.Column("key_id", sa.Text(), nullable=True),
        sa.Column("size", sa.BigInteger(), nullable=True),
        sa.Column("lease_until", sa.BigInteger(), nullable=False),
        sa.Column("sealed_key", sa.LargeBinary(), nullable=False),
        sa.Column("created_at", sa.BigInteger(), nullable=False),
        sa.ForeignKeyConstraint(["workspace_id"], ["workspaces.id"]),
        sa.PrimaryKeyConstraint("id"),
    )
    op.create_index("archives_owner", "archives", ["owner", "name"])
    op.create_table(
        "job_logs",
        sa.Column("job_id", sa.Text(), nullable=False),
        sa.Column("made_as", sa.Text(), nullable=False),
        sa.Column("training_file", sa.Text(), nullable=False),
        sa.Column("validation_file", sa.Text(), nullable=True),
        sa.Column("sealed", sa.LargeBinary(), nullable=False),
        sa.ForeignKeyConstraint(["job_id"], ["jobs.id"], ondelete="CASCADE"),
        sa.ForeignKeyConstraint(
            ["training_file", "made_as", "job_id"],
            ["derived.owner", "derived.kind", "derived.name"],
            ondelete="CASCADE",
            name="job_logs_training",
        ),
        sa.ForeignKeyConstraint(
            ["validation_file", "made_as", "job_id"],
            ["derived.owner", "derived.kind", "derived.name"],
            ondelete="CASCADE",
            name="job_logs_validation",
        ),
        sa.PrimaryKeyConstraint("job_id"),
    )
    op.create_table(
        "registry",
        sa.Column("id", sa.Integer(), autoincrement=False, nullable=False),
        sa.Column("state", sa.JSON(), nullable=False),
        sa.PrimaryKeyConstraint("id"),
    )
