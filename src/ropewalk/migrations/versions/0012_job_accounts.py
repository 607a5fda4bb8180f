"""What a job's account needs: who wrote its rows, how long a device was held, what a failed one keeps; and a workspace's own limits."""

import sqlalchemy as sa
from alembic import op

revision = "0012_job_accounts"
down_revision = "0011_archives"


def upgrade() -> None:
    op.add_column("jobs", sa.Column("data_generator", sa.JSON(), nullable=True))
    op.add_column("jobs", sa.Column("device_time", sa.BigInteger(), nullable=False, server_default="0"))
    op.add_column("jobs", sa.Column("kept_until", sa.BigInteger(), nullable=True))
    op.add_column("workspaces", sa.Column("jobs_running", sa.Integer(), nullable=True))
    op.add_column("workspaces", sa.Column("jobs_queued", sa.Integer(), nullable=True))
    op.add_column("workspaces", sa.Column("jobs_file_bytes", sa.BigInteger(), nullable=True))
