"""Which prompts of a suite stand in which training file."""

import sqlalchemy as sa
from alembic import op

revision = "0007_leakages"
down_revision = "0006_compare"


def upgrade() -> None:
    op.create_table(
        "leakages",
        sa.Column("suite_id", sa.Text(), nullable=False),
        sa.Column("file", sa.Text(), nullable=False),
        sa.Column("stamp", sa.Text(), nullable=False),
        sa.Column("numbers", sa.Text(), nullable=False),
        sa.Column("created_at", sa.BigInteger(), nullable=False),
        sa.ForeignKeyConstraint(["suite_id"], ["suites.id"], ondelete="CASCADE"),
        sa.PrimaryKeyConstraint("suite_id", "file"),
    )
