"""How Alembic runs here: on the connection it is given, in that connection's transaction."""

from alembic import context

import ropewalk.batches.tables
import ropewalk.compare.tables
import ropewalk.files.tables
import ropewalk.jobs.tables
import ropewalk.shared_registry
import ropewalk.tenants.tables  # noqa: F401  (they put their tables into `metadata`)
from ropewalk.database import metadata

context.configure(
    connection=context.config.attributes["connection"], target_metadata=metadata, render_as_batch=True, transactional_ddl=False
)
context.run_migrations()
