"""What a file is for, and what a file was made from that a model wrote."""

import sqlalchemy as sa
from alembic import op

revision = "0009_file_purpose"
down_revision = "0008_jobs"


def upgrade() -> None:
    op.add_column("files", sa.Column("purpose", sa.Text(), nullable=True))
    op.add_column("files", sa.Column("lineage", sa.JSON(), nullable=True))
