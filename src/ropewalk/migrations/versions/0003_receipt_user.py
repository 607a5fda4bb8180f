"""Whose file a receipt is of, so that a user's receipts are theirs."""

import sqlalchemy as sa
from alembic import op

revision = "0003_receipt_user"
down_revision = "0002_resumable"


def upgrade() -> None:
    op.add_column("deletions", sa.Column("user_id", sa.Text(), nullable=True))
