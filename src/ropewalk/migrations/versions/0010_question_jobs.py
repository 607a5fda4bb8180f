"""Questions and answers that a model writes from a file: what was asked for, and how far it is."""

import sqlalchemy as sa
from alembic import op

revision = "0010_question_jobs"
down_revision = "0009_file_purpose"


def upgrade() -> None:
    op.create_table(
        "question_jobs",
        sa.Column("id", sa.Text(), nullable=False),
        sa.Column("file_id", sa.Text(), nullable=False),
        sa.Column("made_as", sa.Text(), nullable=False),
        sa.Column("batch_id", sa.Text(), nullable=False),
        sa.Column("state", sa.Text(), nullable=False),
        sa.Column("wanted", sa.JSON(), nullable=False),
        sa.Column("chunks", sa.Integer(), nullable=False),
        sa.Column("rows", sa.Integer(), nullable=False),
        sa.Column("dropped", sa.Integer(), nullable=False),
        sa.Column("output_file_id", sa.Text(), nullable=True),
        sa.Column("error", sa.Text(), nullable=True),
        sa.Column("lease_until", sa.BigInteger(), nullable=False),
        sa.Column("created_at", sa.BigInteger(), nullable=False),
        sa.Column("ended_at", sa.BigInteger(), nullable=True),
        sa.ForeignKeyConstraint(
            ["file_id", "made_as", "id"],
            ["derived.owner", "derived.kind", "derived.name"],
            ondelete="CASCADE",
            name="question_jobs_made_of",
        ),
        sa.PrimaryKeyConstraint("id"),
    )
    op.create_index("question_jobs_file", "question_jobs", ["file_id", "made_as", "id"])
    op.create_index("question_jobs_state", "question_jobs", ["state", "created_at"])
